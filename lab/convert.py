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

import hashlib
import json
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from configurator import UserError, checked, configure, run
from files import hold, read_json, read_jsonl, write_text
from lab.edit import expect_edits
from lab.export import cast, export, from_transformers
from lab.layouts import LAYOUTS, TRANSFORMERS, detect, infer_config, to_ours
from model import Backpack, BackpackConfig, load_checkpoint, upgrade
from tokenizer import GPT2_SIZE, require
from train import save_checkpoint

Target, Layout = Literal["run", *LAYOUTS], Literal["auto", *LAYOUTS]
Words = Literal["auto", "gpt2", "none"]
Kept = Literal["auto", "keep", "float32", "float16", "bfloat16"]
IMPORT_KEYS = ("layout", "n_head", "n_sense", "tokenizer", "trust_pickle")  # a run knows these
# what a new run replaces or removes in its folder
REPLACED_FILES = ("ckpt.pt", "best.pt", "edits.json", "metrics.jsonl", "config.json", "meta.json")
# of a source's config.json, beside the network's settings
DESCRIBED = {"layout?": set(LAYOUTS), "n_head?": int, "vocab_size?": int, "edits?": {"list?": list}}
NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}
NUMBERS |= {torch.uint8, torch.bool}  # of masks


@dataclass
class Settings:
    source: str = ""  # a Hub id, a file (.bin, .safetensors, .ckpt), a folder, or a run of ours
    dest: str = ""  # the folder to write
    to: Target = "run"  # or hf, for transformers, or a published layout: see layout
    layout: Layout = "auto"  # backpack-gpt2, levanter, gpt2, lightning, lightning-gpt2, hf, auto
    n_head: int | None = None  # [1, 1000] None: from config.json, or from the known sizes
    n_sense: int = 0  # [0, 1e4] of a plain GPT-2: add so many new senses per token, to be trained
    tokenizer: Words = "auto"  # gpt2, none; auto: gpt2 if it has this size, else the source's
    dtype: Kept = "auto"  # keep, float32, float16, bfloat16; auto: keep, but float16 run to run
    trust_pickle: bool = False  # load more than plain tensors, executing what is pickled
    edits: str | None = None  # with --to=hf: a JSON file of edits (lab/edit.py) to apply there
    overwrite: bool = False  # replace what dest has under the names that are written
    seed: int = 1337  # [0, 4294967295] of new senses


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
            if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
                raise ValueError("a checksum is wrong")
            module = None if trust_pickle else PlainPickle
            found = torch.load(path, "cpu", pickle_module=module, weights_only=False)
    except UserError:
        raise
    except Exception as error:  # zip, pickle, storage and header errors have no common class
        text = str(error)[:200]
        raise UserError(f"{path} is damaged or holds no tensors: {text!r}") from None
    if isinstance(found, dict):
        found = found.get("state_dict", found.get("model", found))
    if not isinstance(found, dict) or not all(torch.is_tensor(value) for value in found.values()):
        hint = "--trust_pickle loads it, and executes what is in it"
        raise UserError(f"{path}: found more than tensors: {hint}")
    for name, t in found.items():
        whole = t.layout == torch.strided and t.nbytes <= t.untyped_storage().nbytes()
        if type(name) is not str or not whole or t.dtype not in NUMBERS:
            what = f"found a tensor of {t.dtype} and {t.layout}"
            raise UserError(f"{path}, {name!r}: {what}, expected plain numbers of 16 bits or more")
    return found


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
            reason = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:120]}"
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
    log, shape = path if path.is_dir() else path.parent, {"step": int, "val_loss?": float}
    log = log / "metrics.jsonl"
    records = read_jsonl(log, shape, is_log=True) if log.is_file() else []
    return kept | {"source": found}, [r for r in records if r["step"] <= ckpt["step"]]


def fit(s, tensors, described, layout):
    """Tensors in a layout as (state_dict of Backpack, BackpackConfig, a report of what was changed).

    described: what config.json says. UserError: they don't fit each other, the layout or the settings.
    """
    state, report = to_ours(tensors, layout)
    if s.n_sense and layout not in TRANSFORMERS:
        raise UserError(f"n_sense={s.n_sense} is for {' and '.join(TRANSFORMERS)}, found {layout}")
    if layout == "hf":  # our own config.json has the network's settings under their names
        values = asdict(BackpackConfig()) | described
    else:
        vocab_size = GPT2_SIZE if s.tokenizer == "gpt2" else None
        values = infer_config(state, described, layout, s.n_head, s.n_sense, vocab_size)
    for f in fields(BackpackConfig):
        if f.name in values:
            values[f.name] = checked(BackpackConfig, f.name, values[f.name], "of this source")
    old = upgrade({"model": state, "config": values})  # exports before 2026-11-24 are like old runs
    try:
        state, config = old["model"], BackpackConfig(**old["config"])
    except ValueError as error:
        raise UserError(str(error)) from None
    rows, V = len(state["wte.weight"]), config.vocab_size
    padded = -(-V // 8) * 8
    if rows < V:
        raise UserError(f"wte.weight has {rows} rows, fewer than a vocabulary of {V} tokens")
    if rows > padded:
        report["dropped"].append(f"rows {padded} to {rows} of wte.weight")  # these have no logits
    state["wte.weight"] = torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, padded - rows))
    if s.n_sense:
        torch.manual_seed(s.seed)
        state = Backpack(config).state_dict() | state
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Backpack(config).state_dict().items()}
    for name in shapes | state:
        found = list(state[name].shape) if name in state else "none"
        if found != shapes.get(name, "none"):
            raise UserError(f"{name}: found shape {found}, expected {shapes.get(name, 'none')}")
        if not state[name].isfinite().all():
            raise UserError(f"{name}: found infinite numbers or nan, expected finite ones")
    return state, config, report | {"rows": V if layout == "hf" else rows}


def read_weights(s):
    """(a checkpoint of weights that others saved, the edits of an export). UserError."""
    path, files = find_files(s.source)
    about, described = path / "config.json", {}
    if about.is_file():
        described = read_json(about, DESCRIBED)
    tensors, sha256 = {}, {}
    for file in files:
        tensors |= read_tensors(file, s.trust_pickle)
        with open(file, "rb") as stream:
            sha256[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        layout = described.get("layout") if s.layout == "auto" else s.layout
        layout = layout or detect(tensors)
        state, config, report = fit(s, tensors, described, layout)
    except UserError as error:
        where = files[0] if len(files) == 1 else path
        raise UserError(f"{where}{' and config.json' if described else ''}: {error}") from None
    spec = None
    if s.tokenizer == "gpt2" or (s.tokenizer == "auto" and config.vocab_size == GPT2_SIZE):
        spec = {"kind": "gpt2"}
    elif s.tokenizer == "auto" and (path / "tokenizer.json").is_file():
        spec = from_transformers(path / "tokenizer.json", config.vocab_size)
    source = {"name": s.source, "layout": layout, "sha256": sha256, "rows": report.pop("rows")}
    ckpt = {
        "model": state,
        "config": asdict(config),
        "settings": {},
        "step": 0,
        "meta": {"tokenizer": spec, "vocab_size": config.vocab_size},
        "source": source | {"report": report},
    }
    print(
        f"{layout}: {report['renamed']} tensors, {len(report['transposed'])} transposed, "
        f"{len(report['dropped'])} dropped (repeated, masks, edits)\n{config}\n"
        f"tokenizer: {spec['kind'] if spec else 'none'}"
    )
    edits = (described.get("edits") or {}).get("list") or []
    return ckpt, expect_edits(edits, f"{about}, edits")


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
        write_text(dest / "edits.json", json.dumps(edits))
        print(f"its edits are in {dest / 'edits.json'}: --edits={dest / 'edits.json'} applies them")
    if metrics:
        lines = [json.dumps(record) + "\n" for record in metrics]
        write_text(dest / "metrics.jsonl", "".join(lines))
    described = ckpt["config"] | ckpt["settings"] | {"source": ckpt["source"]}
    write_text(dest / "config.json", json.dumps(described, indent=1))
    size = sum(tensor.numel() for tensor in ckpt["model"].values())
    print(f"{dest}: a run of {size:,} parameters, step {ckpt['step']}")


def main(argv):
    s, sources = configure(Settings, argv, __doc__)
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
