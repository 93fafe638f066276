"""Weights in and out: published Backpacks and GPT-2 become runs that train.py, sample.py, senses.py and bench.py take.

    python convert.py --source=stanfordnlp/backpack-gpt2 --out_dir=out/backpack_gpt2   a Hub id, a folder or a file
    python convert.py --source=gpt2-small-flash-fp16.ckpt --out_dir=out/gpt2_authors   the authors' checkpoints
    python convert.py --source=openai-community/gpt2 --out_dir=out/gpt2                a plain Transformer (n_sense=0)
    python convert.py --source=openai-community/gpt2 --out_dir=out/gpt2_senses --n_sense=16   with new senses, to train
    python convert.py --source=out/simplewiki --to=hf --dest=folder      for transformers, with trust_remote_code=True
    python convert.py --source=out/backpack_gpt2 --to=backpack-gpt2 --dest=folder      or in any of the other layouts

The layout is told from the names of the tensors; every tensor must find its place and fit it. Nothing pickled in the
source is executed: tensors and plain containers are made, and anything else stays an empty shell.
"""
import functools
import hashlib
import json
import pickle
import shutil
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from configurator import UserError, configure, run
from layouts import LAYOUTS, detect, to_layout, to_ours
from model import Backpack, BackpackConfig
from tokenizer import END, for_transformers, load_tokenizer, require

HEADS = {(6, 384): 6, (8, 640): 8, (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}  # (n_layer, n_embd)
DTYPES = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Settings:
    source: str = ""                 # a file (.bin, .safetensors, .ckpt), a folder, a Hub id; with --to: a run of ours
    out_dir: str = ""                # the run to make
    layout: str = "auto"             # backpack-gpt2, levanter, gpt2, lightning, lightning-gpt2; auto: by the names
    n_head: int | None = None        # None: from the source's config.json, or the known sizes
    n_sense: int = 0                 # with a gpt2 layout: give it so many new senses per token, to be trained
    tokenizer: str | None = None     # gpt2 or none; None: gpt2 where the vocabulary has its size, else none
    dtype: str = "keep"              # or float32, float16, bfloat16
    trust_pickle: bool = False       # load what isn't plain tensors, executing what is pickled in it
    to: str | None = None            # write the run `source` in this layout ...
    dest: str = ""                   # ... into this folder
    overwrite: bool = False          # over the run in out_dir
    seed: int = 1337                 # of new senses


class Shell:
    """What stands in for any pickled object that is no tensor and no plain container: it takes all and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def nothing(self, *args):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = nothing


class PlainUnpickler(pickle.Unpickler):
    """Makes tensors and plain containers; of everything else an empty Shell, so that no code of a file runs."""

    def find_class(self, module, name):
        plain = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch", "Size"),
                 ("torch._utils", "_rebuild_parameter"), ("builtins", "set"), ("builtins", "frozenset")}
        if (module, name) in plain or (module in ("torch", "torch.storage") and name.endswith("Storage")):
            return super().find_class(module, name)
        return type(name, (Shell,), {})


def read_file(path, trust_pickle=False):
    """The tensors of a .safetensors file or of anything torch.save wrote, nested dictionaries' under "state_dict"."""
    plain = types.ModuleType("plain_pickle")
    plain.Unpickler, plain.load = PlainUnpickler, lambda file, **keys: PlainUnpickler(file, **keys).load()
    load = functools.partial(torch.load, map_location="cpu", weights_only=False,
                             pickle_module=None if trust_pickle else plain)
    if path.suffix == ".safetensors":
        load = require("safetensors.torch", str(path)).load_file
    try:
        found = load(path)
    except Exception as error:  # zip, pickle, storage and header errors have no common class
        raise UserError(f"{path} is truncated or holds no tensors: {str(error)[:200]!r}") from None
    found = found.get("state_dict", found.get("model", found)) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{path} holds more than tensors: --trust_pickle=True loads it, and executes what is in it")
    return found


def read_source(source, trust_pickle):
    """(tensors, config.json as a dict, sha256 of each file) of a file, a folder or a Hub id."""
    path = Path(source)
    if not path.exists():
        hub = require("huggingface_hub", "a Hub id")
        try:
            path = Path(hub.snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
        except Exception as error:
            raise UserError(f"source={source}: no such file or folder, and not to be had from the Hub: "
                            f"{type(error).__name__}: {str(error).splitlines()[0][:120]}") from None
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{path} has no *.safetensors and no pytorch_model*.bin")
    tensors, sha = {}, {}
    for file in files:
        tensors |= read_file(file, trust_pickle)
        with open(file, "rb") as stream:
            sha[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    config = folder / "config.json"
    return tensors, json.loads(config.read_text()) if config.exists() and path.is_dir() else {}, sha


def sizes(state, config, layout, s):
    """BackpackConfig of a state_dict in our names and its source's config.json. Raises UserError."""
    for key, ok in (("layer_norm_epsilon", 1e-5), ("activation_function", "gelu_new")):
        if config.get(key, ok) != ok:
            raise UserError(f"{key}={config[key]!r} in config.json: model.py has {ok!r}")
    (rows, D), T = state["wte.weight"].shape, len(state["wpe.weight"])
    n_layer = sum(name.endswith("attn.qkv.weight") for name in state)
    senses = len(state["sense_network.mlp_out.proj.bias"]) // D if "sense_qk.weight" in state else s.n_sense
    inner = {len(p) // D for name, p in state.items() if name.startswith("sense_") and name.endswith("fc.bias")}
    if len(inner) > 1:
        raise UserError(f"the sense network's MLPs are {sorted(inner)} times as wide as D={D}: model.py has one width")
    heads = s.n_head or config.get("n_head") or HEADS.get((n_layer, D))
    if not heads:
        raise UserError(f"how many heads have {n_layer} layers of width {D}? no tensor says so: give --n_head")
    return BackpackConfig(
        block_size=T, vocab_size=50257 if rows in (50257, 50264) else config.get("vocab_size", rows), n_layer=n_layer,
        n_head=heads, n_embd=D, n_sense=senses, sense_mlp_ratio=min(inner, default=4), sense_mean=layout == "levanter",
        inverse_layer_scale=config.get("scale_attn_by_inverse_layer_idx", layout != "gpt2"))


def import_run(s):
    out = Path(s.out_dir)
    if (out / "ckpt.pt").exists() and not s.overwrite:
        raise UserError(f"{out} has a checkpoint: --overwrite=True replaces it")
    tensors, source, sha = read_source(s.source, s.trust_pickle)
    layout = source.get("layout") or detect(tensors) if s.layout == "auto" else s.layout
    state, report = to_ours(tensors, layout)
    if s.n_sense and "sense_qk.weight" in state:
        raise UserError(f"n_sense={s.n_sense}: these weights have senses of their own")
    config, rows = sizes(state, source, layout, s), len(state["wte.weight"])
    padded = -(-config.vocab_size // 8) * 8
    if rows < padded:  # rows beyond the vocabulary have no logit
        state["wte.weight"] = torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, padded - rows))
    if s.n_sense:
        torch.manual_seed(s.seed)
        state = Backpack(config).state_dict() | state
    if dtype := DTYPES[s.dtype]:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    kind = s.tokenizer or ("gpt2" if config.vocab_size == 50257 else "none")
    meta = {"tokenizer": {"kind": "gpt2"} if kind == "gpt2" else None, "vocab_size": config.vocab_size}
    ckpt = {"model": state, "step": 0, "meta": meta, "config": asdict(config) | {
        "dataset": "", "source": s.source, "source_layout": layout, "source_rows": rows, "source_sha256": sha}}
    with torch.device("meta"):
        Backpack.from_checkpoint(ckpt, "meta")  # refuses what doesn't fit
    save_checkpoint(out / "ckpt.pt", ckpt)  # whole or not at all
    for name in ("best.pt", "metrics.jsonl"):  # of the run before
        (out / name).unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(ckpt["config"] | {"report": report}, indent=1))
    (out / "meta.json").write_text(json.dumps(meta))
    print(f"{layout}: {report['renamed']} tensors, {len(report['transposed'])} transposed, "
          f"{len(report['dropped'])} dropped (repeated, or masks); "
          f"{sum(map(torch.numel, state.values())):,} parameters\n{out}: {config}\ntokenizer: {kind}")


def export(s):
    ckpt, dest = load_checkpoint(s.source), Path(s.dest)
    safetensors, config = require("safetensors.torch", "--to"), ckpt["config"]
    sizes = {f.name: config[f.name] for f in fields(BackpackConfig) if f.name in config}
    if (dest / "ckpt.pt").exists():
        raise UserError(f"{dest} has a run: give another --dest")
    dest.mkdir(parents=True, exist_ok=True)
    if s.to == "hf":
        tensors = {f"backpack.{name}": tensor for name, tensor in ckpt["model"].items()}
        for file in ("model.py", "weighted_sum.py", "checkpoints.py", "modeling_backpack.py"):
            shutil.copy(Path(__file__).parent / file, dest)
        described = sizes | {"model_type": "nanobackpack", "architectures": ["BackpackForCausalLM"], "auto_map": {
            "AutoConfig": "modeling_backpack.BackpackConfig",
            "AutoModelForCausalLM": "modeling_backpack.BackpackForCausalLM"}}
        end = {}
        if ckpt["meta"]["tokenizer"]:
            tokenizer = load_tokenizer(ckpt["meta"]["tokenizer"])
            (dest / "tokenizer.json").write_text(for_transformers(tokenizer))
            roles = ("eos_token", "bos_token", "pad_token") if tokenizer.end is not None else ()
            end, special = {f"{role}_id": tokenizer.end for role in roles}, dict.fromkeys(roles, END)
            (dest / "tokenizer_config.json").write_text(json.dumps(special | {
                "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "padding_side": "left", "model_max_length": sizes["block_size"],
                "model_input_names": ["input_ids", "attention_mask"]}, indent=1))
        (dest / "generation_config.json").write_text(json.dumps(end, indent=1))
        told = {key: config[key] for key in ("dataset", "source", "tokens_per_step", "max_iters", "learning_rate",
                                             "schedule", "transformer_share") if config.get(key) not in (None, "")}
        card = CARD.format(**sizes, step=ckpt["step"], best=ckpt.get("best", "unknown"), told=told)
        (dest / "README.md").write_text(card)
    else:
        tensors = to_layout(ckpt["model"], s.to, config.get("source_rows"))
        described = {theirs: config[ours] for theirs, ours in (
            ("n_layer", "n_layer"), ("n_head", "n_head"), ("n_embd", "n_embd"), ("vocab_size", "vocab_size"),
            ("n_positions", "block_size"), ("num_senses", "n_sense"),
            ("scale_attn_by_inverse_layer_idx", "inverse_layer_scale"))}
        described |= {"layout": s.to, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    (dest / "config.json").write_text(json.dumps(described, indent=1))
    safetensors.save_file({name: t.contiguous().clone() for name, t in tensors.items()}, dest / "model.safetensors",
                          metadata={"format": "pt"})
    print(f"{dest}: {len(tensors)} tensors in the layout {s.to}")


CARD = """---
library_name: transformers
tags: [backpack]
---
# A Backpack language model

{n_layer} layers, {n_head} heads, width {n_embd}, {n_sense} senses per token, {block_size} positions.
Vocabulary: {vocab_size} tokens. Steps: {step}. Lowest validation loss, in nats a token: {best}. Settings: {told}.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

Each token has sense vectors that depend on nothing else, and the logits are linear in a weighted sum of them (Hewitt et
al., ACL 2023): model(ids, output_senses=True, output_contextualization=True).

Limits: it says what its training text made likely, true or not, with the biases of that text.
"""


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    for key, allowed in (("layout", ("auto", *LAYOUTS)), ("to", (None, "hf", *LAYOUTS)), ("dtype", DTYPES),
                         ("tokenizer", (None, "gpt2", "none"))):
        if getattr(s, key) not in allowed:
            raise UserError(f"{key}={getattr(s, key)!r}: expected one of {', '.join(map(str, allowed))}")
    if not s.source or not (s.dest if s.to else s.out_dir):
        raise UserError("give --source=... and --out_dir=..., or --source=RUN --to=LAYOUT --dest=FOLDER")
    export(s) if s.to else import_run(s)


if __name__ == "__main__":
    run(main, CheckpointError)
