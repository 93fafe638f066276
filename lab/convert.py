"""Weights in and out: published Backpacks and GPT-2 become runs that train.py, sample.py, senses.py and bench.py take.

    python convert.py --source=stanfordnlp/backpack-gpt2 --out_dir=out/backpack_gpt2   a Hub id, a folder or a file
    python convert.py --source=gpt2-small-flash-fp16.ckpt --out_dir=out/gpt2_authors   the authors' checkpoints
    python convert.py --source=openai-community/gpt2 --out_dir=out/gpt2                a plain Transformer (n_sense=0)
    python convert.py --source=openai-community/gpt2 --out_dir=out/gpt2_senses --n_sense=16   with new senses, to train
    python convert.py --out_dir=pretrained/simplewiki --to=hf --dest=folder      for transformers; --edits=FILE in it
    python convert.py --out_dir=out/backpack_gpt2 --to=backpack-gpt2 --dest=folder    or in any of the other layouts

The layout is told from the names of the tensors; every tensor must find its place and fit it. Nothing pickled in the
source is executed: tensors and plain containers are made, and anything else stays an empty shell.
"""
import functools
import hashlib
import json
import pickle
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from checkpoints import CheckpointError, save_checkpoint
from configurator import UserError, configure, hold, run
from export import export
from layouts import LAYOUTS, detect, to_ours
from model import Backpack, BackpackConfig
from tokenizer import from_transformers, require

HEADS = {(6, 384): 6, (8, 640): 8, (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}  # (n_layer, n_embd)
DTYPES = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Settings:
    source: str = ""                 # a file (.bin, .safetensors, .ckpt), a folder or a Hub id
    out_dir: str = ""                # the run to make, or with --to to write
    layout: str = "auto"             # backpack-gpt2, levanter, gpt2, lightning, lightning-gpt2, hf; auto: by the names
    n_head: int | None = None        # None: from the source's config.json, or the known sizes
    n_sense: int = 0                 # with a gpt2 layout: give it so many new senses per token, to be trained
    tokenizer: str | None = None     # gpt2 or none; None: gpt2 where the vocabulary has its size, else the source's
    dtype: str = "keep"              # or float32, float16, bfloat16
    trust_pickle: bool = False       # load what isn't plain tensors, executing what is pickled in it
    to: str | None = None            # write the run in out_dir in this layout (hf: with what transformers needs) ...
    dest: str = ""                   # ... into this folder
    edits: str | None = None         # with --to=hf: a JSON file of edits of senses (edits.py) that shall hold there
    overwrite: bool = False          # over the run in out_dir, or the export in dest
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
    """(tensors, {name: what's in it} of config.json and tokenizer.json beside, sha256 of each file) of a file, a folder
    or a Hub id. Raises UserError."""
    path = Path(source)
    if not path.exists():
        hub = require("huggingface_hub", f"{source} is no file or folder here; a Hub id")
        try:
            for weights in ("*.safetensors", "pytorch_model*.bin"):  # the second only where the first isn't there
                path = Path(hub.snapshot_download(source, allow_patterns=["*.json", weights]))
                if any(path.glob(weights)):
                    break
        except Exception as error:
            raise UserError(f"source={source}: no such file or folder, and not to be had from the Hub: "
                            f"{type(error).__name__}: {str(error).splitlines()[0][:120]}") from None
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{path} has no *.safetensors and no pytorch_model*.bin")
    tensors, sha = {}, {}
    for file in files:
        tensors |= read_file(file, trust_pickle)
        with open(file, "rb") as stream:
            sha[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    beside = {}
    for name in ("config.json", "tokenizer.json"):
        try:
            beside[name] = dict(json.loads((path / name).read_text())) if (path / name).is_file() else {}
        except (ValueError, TypeError) as error:
            raise UserError(f"{path / name} is no JSON object: {error}") from None
    return tensors, beside, sha


def sizes(state, config, layout, s):
    """BackpackConfig of a state_dict in our names and its source's config.json. Raises UserError."""
    if layout == "hf":
        return BackpackConfig(**{f.name: config[f.name] for f in fields(BackpackConfig) if f.name in config})
    for key, ok in (("layer_norm_epsilon", 1e-5), ("activation_function", "gelu_new")):
        if config.get(key, ok) != ok:
            raise UserError(f"{key}={config[key]!r} in config.json: model.py has {ok!r}")
    (rows, D), T = state["wte.weight"].shape, len(state["wpe.weight"])
    n_layer, senses, inner, inner_out = sum(name.endswith("attn.qkv.weight") for name in state), s.n_sense, 4, 4
    if "sense_qk.weight" in state:
        senses, inner, inner_out = (len(state[f"sense_network.{name}.bias"]) // D
                                    for name in ("mlp_out.proj", "mlp.fc", "mlp_out.fc"))
    heads = s.n_head or config.get("n_head") or HEADS.get((n_layer, D))
    if not heads:
        raise UserError(f"how many heads have {n_layer} layers of width {D}? no tensor says so: give --n_head")
    vocab = 50257 if rows in (50257, 50264) or s.tokenizer == "gpt2" else config.get("vocab_size", rows)
    if rows < vocab:
        raise UserError(f"wte.weight has {rows} rows, fewer than a vocabulary of {vocab} tokens")
    return BackpackConfig(
        block_size=T, vocab_size=vocab, n_layer=n_layer, n_head=heads, n_embd=D, n_sense=senses, sense_mlp_ratio=inner,
        sense_out_ratio=inner_out if inner_out != inner else None, sense_mean=layout == "levanter",
        inverse_layer_scale=config.get("scale_attn_by_inverse_layer_idx", layout != "gpt2"))


def check_out_dir(s):
    """Raises UserError where an import would replace or remove a file in out_dir, unless s.overwrite."""
    names = ("ckpt.pt", "best.pt", "edits.json", "metrics.jsonl", "config.json", "meta.json")
    there = [path for name in names if (path := Path(s.out_dir, name)).exists()]
    there = [path.name for path in there if path.name != "metrics.jsonl" or path.stat().st_size]
    if there and not s.overwrite:
        raise UserError(f"{s.out_dir} has {', '.join(there)}, which an import replaces or removes: give another "
                        "--out_dir, or --overwrite=True")


def import_run(s):
    out = Path(s.out_dir)
    check_out_dir(s)
    tensors, beside, sha = read_source(s.source, s.trust_pickle)
    source = beside["config.json"]
    layout = s.layout if s.layout != "auto" else source.get("layout") or detect(tensors)
    state, report = to_ours(tensors, layout)
    if s.n_sense and "sense_qk.weight" in state:
        raise UserError(f"n_sense={s.n_sense}: these weights have senses of their own")
    try:
        config = sizes(state, source, layout, s)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    rows, padded = len(state["wte.weight"]), -(-config.vocab_size // 8) * 8
    if rows != padded:  # rows beyond the vocabulary have no logit
        state["wte.weight"] = torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, padded - rows))  # or cut
        report["dropped"] += [f"rows {padded} to {rows} of wte.weight"] if rows > padded else []
    if s.n_sense:
        torch.manual_seed(s.seed)
        state = Backpack(config).state_dict() | state
    if dtype := DTYPES[s.dtype]:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    spec = None
    if s.tokenizer == "gpt2" or s.tokenizer is None and config.vocab_size == 50257:
        spec = {"kind": "gpt2"}
    elif s.tokenizer is None:
        spec = from_transformers(beside["tokenizer.json"], config.vocab_size)
    meta = {"tokenizer": spec, "vocab_size": config.vocab_size}
    ckpt = {"model": state, "step": 0, "meta": meta, "config": asdict(config) | {
        "dataset": "", "source": s.source, "source_layout": layout, "source_sha256": sha,
        "source_rows": rows if layout != "hf" else config.vocab_size}}
    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    Backpack.from_checkpoint(ckpt | {"model": shapes}, "meta")  # refuses what doesn't fit
    with hold(out):
        check_out_dir(s)  # what another process may have made there meanwhile
        save_checkpoint(out / "ckpt.pt", ckpt)  # whole or not at all
        for name in ("best.pt", "metrics.jsonl", "edits.json"):  # of the run before
            (out / name).unlink(missing_ok=True)
        if layout == "hf" and source.get("edits"):  # their tensors were made from this list
            (out / "edits.json").write_text(json.dumps(source["edits"]["list"]))
            print(f"its edits are in {out / 'edits.json'}, for --edits=")
        (out / "config.json").write_text(json.dumps(ckpt["config"] | {"report": report}, indent=1))
        (out / "meta.json").write_text(json.dumps(meta))
    print(f"{layout}: {report['renamed']} tensors, {len(report['transposed'])} transposed, "
          f"{len(report['dropped'])} dropped (repeated, masks, edits); "
          f"{sum(map(torch.numel, state.values())):,} parameters\n{out}: {config}\n"
          f"tokenizer: {spec['kind'] if spec else 'none'}")


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    for key, allowed in (("layout", ("auto", *LAYOUTS)), ("to", (None, *LAYOUTS)), ("dtype", DTYPES),
                         ("tokenizer", (None, "gpt2", "none"))):
        if getattr(s, key) not in allowed:
            raise UserError(f"{key}={getattr(s, key)!r}: expected one of {', '.join(map(str, allowed))}")
    if not s.out_dir or bool(s.to) != bool(s.dest) or bool(s.to) == bool(s.source):
        raise UserError("give --source=... and --out_dir=RUN, or --out_dir=RUN --to=LAYOUT --dest=FOLDER")
    export(s, DTYPES[s.dtype]) if s.to else import_run(s)


if __name__ == "__main__":
    run(main, CheckpointError)
