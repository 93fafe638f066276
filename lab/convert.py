"""Weights in and out: published Backpacks and GPT-2 become runs; runs become folders for others.

    python -m lab.convert --source=stanfordnlp/backpack-gpt2 --dest=out/backpack_gpt2    from the Hub
    python -m lab.convert --source=gpt2-small-flash-fp16.ckpt --dest=out/gpt2_authors    the authors' files
    python -m lab.convert --source=openai-community/gpt2 --dest=out/gpt2                 a plain Transformer
    python -m lab.convert --source=openai-community/gpt2 --dest=out/gpt2_senses --n_sense=16  to train
    python -m lab.convert --source=out/my_run --dest=small                               weights to share
    python -m lab.convert --source=pretrained/simplewiki --to=hf --dest=folder           for transformers
    python -m lab.convert --source=out/backpack_gpt2 --to=backpack-gpt2 --dest=published

A source's layout is detected from tensor names; every tensor must find its place and fit it. Nothing
pickled in a source is executed: tensors and plain containers are read, anything else is left out.
"""

import contextlib
import hashlib
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from configurator import UserError, configure, hold, run
from lab.export import cast, export, from_transformers
from lab.layouts import LAYOUTS, detect, infer_config, to_ours
from model import Backpack, BackpackConfig, load_checkpoint, upgrade
from tokenizer import require
from train import save_checkpoint

CHOICES = {
    "to": ("run", *LAYOUTS),
    "layout": ("auto", *LAYOUTS),
    "tokenizer": (None, "gpt2", "none"),
    "dtype": ("auto", "keep", "float32", "float16", "bfloat16"),
}
IMPORT_KEYS = ("layout", "n_head", "n_sense", "tokenizer", "trust_pickle")  # a run knows these
# what a new run replaces or removes in its folder
REPLACED_FILES = ("ckpt.pt", "best.pt", "edits.json", "metrics.jsonl", "config.json", "meta.json")


@dataclass
class Settings:
    source: str = ""  # a Hub id, a file (.bin, .safetensors, .ckpt), a folder, or a run of ours
    dest: str = ""  # the folder to write
    to: str = "run"  # or hf, for transformers, or a published layout (see layout)
    layout: str = "auto"  # or one of backpack-gpt2, levanter, gpt2, lightning, lightning-gpt2, hf
    n_head: int | None = None  # None: from the source's config.json, or from the known sizes
    n_sense: int = 0  # of a plain GPT-2: add this many new senses per token, to be trained
    tokenizer: str | None = None  # gpt2, none; None: gpt2 if the vocabulary fits, else the source's
    dtype: str = "auto"  # keep, float32, float16, bfloat16; auto: keep, but float16 from run to run
    trust_pickle: bool = False  # load more than plain tensors, executing what is pickled
    edits: str | None = None  # with --to=hf: a JSON file of edits (lab/edit.py) to apply there
    overwrite: bool = False  # replace what dest has under the names that are written
    seed: int = 1337  # of new senses


# ---- reading files


class Shell:
    """Stands in for a pickled object that is neither a tensor nor a plain container; does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def nothing(self, *args):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = nothing


class PlainUnpickler(pickle.Unpickler):
    """Makes tensors and plain containers, and a Shell of all else, so that no code of a file runs."""

    PLAIN = {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "Size"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
    }

    def find_class(self, module, name):
        storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        if storage or (module, name) in self.PLAIN:
            return super().find_class(module, name)
        return type(name, (Shell,), {})


class PlainPickle:
    """What torch.load needs of the pickle module."""

    Unpickler = PlainUnpickler

    @staticmethod
    def load(file, **options):
        return PlainUnpickler(file, **options).load()


def read_tensors(path, trust_pickle=False):
    """The tensors of a .safetensors file or of one by torch.save. UserError: damaged, or holds more."""
    try:
        if path.suffix == ".safetensors":
            found = require("safetensors.torch", str(path)).load_file(path)
        else:
            module = None if trust_pickle else PlainPickle
            found = torch.load(path, "cpu", pickle_module=module, weights_only=False)
    except UserError:
        raise
    except Exception as error:  # zip, pickle, storage and header errors have no common class
        text = str(error)[:200]
        raise UserError(f"{path} is truncated or holds no tensors: {text!r}") from None
    if isinstance(found, dict):
        found = found.get("state_dict", found.get("model", found))
    if not isinstance(found, dict) or not all(torch.is_tensor(value) for value in found.values()):
        hint = "--trust_pickle loads it, and executes what is in it"
        raise UserError(f"{path} holds more than tensors: {hint}")
    return found


def json_object(path):
    """The JSON object in a file; {} if there is none. UserError: it is something else."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from None


def find_files(source):
    """(folder, files of weights) of a file, a folder or a Hub id. UserError: there are none."""
    path, patterns = Path(source), ("*.safetensors", "pytorch_model*.bin")
    if path.is_file():
        return path, [path]
    if not path.exists():
        hub = require("huggingface_hub", f"{source} is no file or folder here; a Hub id")
        try:
            for pattern in patterns:  # the second only if a repository has none of the first
                path = Path(hub.snapshot_download(source, allow_patterns=["*.json", pattern]))
                if any(path.glob(pattern)):
                    break
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            raise UserError(f"source={source}: not here, and not on the Hub: {reason}") from None
    for pattern in patterns:
        files = sorted(path.glob(pattern))
        if files:
            return path, files
    raise UserError(f"{path} has no {' and no '.join(patterns)}")


# ---- a source as a checkpoint


def is_run(source):
    path = Path(source)
    return (path / "ckpt.pt").is_file() or (path.is_file() and path.suffix == ".pt")


def read_run(source):
    """(the weights-only checkpoint of a run, the records of metrics.jsonl up to its step)."""
    ckpt, path = load_checkpoint(source), Path(source)
    kept = {key: ckpt[key] for key in ("model", "config", "settings", "step", "meta")}
    found = ckpt.get("source", {})
    if "source" in ckpt["settings"]:  # imports before 2026-11-24 have it there
        found = {key: ckpt["settings"].get(f"source_{key}") for key in ("layout", "sha256", "rows")}
        found["name"] = ckpt["settings"]["source"]
    log = (path if path.is_dir() else path.parent) / "metrics.jsonl"
    records = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        with contextlib.suppress(ValueError):  # half a line of a run that was killed
            records.append(json.loads(line))
    return kept | {"source": found}, [r for r in records if r["step"] <= ckpt["step"]]


def read_weights(s):
    """(a checkpoint of weights that others saved, the edits of an export). UserError."""
    path, files = find_files(s.source)
    described = json_object(path / "config.json")
    tensors, sha256 = {}, {}
    for file in files:
        tensors |= read_tensors(file, s.trust_pickle)
        with open(file, "rb") as stream:
            sha256[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    layout = s.layout
    if layout == "auto":
        layout = described.get("layout") or detect(tensors)
    state, report = to_ours(tensors, layout)
    if s.n_sense and "sense_qk.weight" in state:
        raise UserError(f"n_sense={s.n_sense}: these weights have senses of their own")
    try:
        # our own config.json has all fields, also those of exports before 2026-11-24
        if layout == "hf":
            old = upgrade({"model": state, "config": described})
            state, config = old["model"], BackpackConfig(**old["config"])
        else:
            vocab_size = 50257 if s.tokenizer == "gpt2" else None
            config = infer_config(state, described, layout, s.n_head, s.n_sense, vocab_size)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(str(error)) from None
    rows, padded = len(state["wte.weight"]), -(-config.vocab_size // 8) * 8
    if rows > padded:
        report["dropped"].append(f"rows {padded} to {rows} of wte.weight")  # these have no logits
    state["wte.weight"] = torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, padded - rows))
    if s.n_sense:
        torch.manual_seed(s.seed)
        state = Backpack(config).state_dict() | state
    spec = None
    if s.tokenizer == "gpt2" or (s.tokenizer is None and config.vocab_size == 50257):
        spec = {"kind": "gpt2"}
    elif s.tokenizer is None:
        spec = from_transformers(json_object(path / "tokenizer.json"), config.vocab_size)
    source = {"name": s.source, "layout": layout, "sha256": sha256, "report": report}
    source["rows"] = config.vocab_size if layout == "hf" else rows
    ckpt = {
        "model": state,
        "config": asdict(config),
        "settings": {},
        "step": 0,
        "meta": {"tokenizer": spec, "vocab_size": config.vocab_size},
        "source": source,
    }
    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    Backpack.from_checkpoint(ckpt | {"model": shapes}, "meta")  # refuses what doesn't fit
    print(
        f"{layout}: {report['renamed']} tensors, {len(report['transposed'])} transposed, "
        f"{len(report['dropped'])} dropped (repeated, masks, edits)\n{config}\n"
        f"tokenizer: {spec['kind'] if spec else 'none'}"
    )
    return ckpt, (described.get("edits") or {}).get("list", [])


# ---- writing


def check_dest(s):
    """Raise UserError if dest is the source, or has what would be replaced and overwrite is off."""
    source, dest = Path(s.source).resolve(), Path(s.dest)
    if dest.resolve() == (source.parent if source.is_file() else source):
        raise UserError(f"dest={dest} is the folder of the source: give another --dest")
    if s.to != "run" and (dest / "ckpt.pt").exists():
        raise UserError(f"{dest} has a run: give another --dest")
    found = [path.name for path in sorted(dest.iterdir()) if path.name != ".lock"]
    if s.to == "run":  # an empty log is what a run leaves that ends before its first step
        log = dest / "metrics.jsonl"
        found = [name for name in REPLACED_FILES if name in found]
        if "metrics.jsonl" in found and not log.stat().st_size:
            found.remove("metrics.jsonl")
    if found and not s.overwrite:
        what = ", ".join(found[:6])
        hint = "give another --dest, or --overwrite to replace or remove files of a new one's names"
        raise UserError(f"{dest} has {what}: {hint}")


def write_run(dest, ckpt, edits, metrics):
    save_checkpoint(dest / "ckpt.pt", ckpt)  # whole or not at all
    for name in REPLACED_FILES[1:]:  # of the run before
        (dest / name).unlink(missing_ok=True)
    if edits:
        (dest / "edits.json").write_text(json.dumps(edits))
        print(f"its edits are in {dest / 'edits.json'}: --edits={dest / 'edits.json'} applies them")
    if metrics:
        lines = [json.dumps(record) + "\n" for record in metrics]
        (dest / "metrics.jsonl").write_text("".join(lines))
    described = ckpt["config"] | ckpt["settings"] | {"source": ckpt["source"]}
    (dest / "config.json").write_text(json.dumps(described, indent=1))
    size = sum(tensor.numel() for tensor in ckpt["model"].values())
    print(f"{dest}: a run of {size:,} parameters, step {ckpt['step']}")


def main(argv):
    s, sources = configure(Settings, argv, __doc__)
    for key, allowed in CHOICES.items():
        if getattr(s, key) not in allowed:
            names = ", ".join(map(str, allowed))
            raise UserError(f"{key}={getattr(s, key)!r}: expected one of {names}")
    if not s.source or not s.dest:
        raise UserError("give --source=WHAT and --dest=FOLDER; --help has examples")
    if s.edits and s.to != "hf":
        raise UserError(f"--to={s.to} has no place for edits: --to=hf has")
    own = is_run(s.source)
    useless = [f"--{key}" for key in IMPORT_KEYS if own and key in sources]
    if useless:
        raise UserError(f"{s.source} is a run: {', '.join(useless)} can't change it")
    dtype = s.dtype
    if dtype == "auto":
        dtype = "float16" if own and s.to == "run" else "keep"
    with hold(s.dest):
        check_dest(s)
        edits, metrics = [], []
        if own:
            ckpt, metrics = read_run(s.source)
        else:
            ckpt, edits = read_weights(s)
        if s.to == "run":
            ckpt["model"] = cast(ckpt["model"], dtype)
            write_run(Path(s.dest), ckpt, edits, metrics)
        else:
            export(s, ckpt, edits, metrics, dtype)


if __name__ == "__main__":
    run(main)
