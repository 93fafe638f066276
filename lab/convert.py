"""
Weights in and out: published Backpacks and GPT-2 become runs; runs become folders for others.

    python -m lab.convert --source=stanfordnlp/backpack-gpt2 --dest=out/backpack_gpt2    from the Hub
    python -m lab.convert --source=gpt2-small-flash-fp16.ckpt --dest=out/gpt2_authors    the authors' files
    python -m lab.convert --source=openai-community/gpt2 --dest=out/gpt2                 a plain Transformer
    python -m lab.convert --source=openai-community/gpt2 --dest=out/gpt2_senses --n_sense=16  to train
    python -m lab.convert --source=out/my_transformer --dest=out/senses --n_sense=16     the same of a run
    python -m lab.convert --source=nanoGPT/out/ckpt.pt --dest=out/mine                   nanoGPT's
    python -m lab.convert --source=out/my_run --dest=small                               weights to share
    python -m lab.convert --source=pretrained/simplewiki --to=hf --dest=folder           for transformers
    python -m lab.convert --source=out/backpack_gpt2 --to=backpack-gpt2 --dest=published

The layout of a source is detected from the names of its tensors; every tensor must find its place and fit
it. Nothing pickled in a source is executed: tensors and plain containers are read, all else is left out.
"""

import hashlib
import json
import math
import pickle
import reprlib
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_type_hints

import torch
from torch.nn import functional as F

from configurator import UserError, check, configure, run, typed
from lab.edits import check_edits
from lab.export import cast, export
from lab.files import filling, read_json, read_metrics, write_text
from lab.layouts import (
    GPT2_ROWS,
    LAYOUTS,
    READ_ONLY,
    WITHOUT_SENSES,
    detect,
    infer_config,
    is_network_of_layouts,
    to_ours,
)
from lab.tokenizer_json import is_gpt2, read_tokenizer
from model import Backpack, BackpackConfig, load_checkpoint
from prepare_data import given_tokenizer
from tokenizer import GPT2_SIZE, load_tokenizer, require
from train import save_checkpoint

Target = Literal["run", *LAYOUTS]
Layout = Literal["auto", *LAYOUTS, *READ_ONLY]
Type = Literal["auto", "keep", "float32", "float16", "bfloat16"]


@dataclass
class Settings:
    source: str = ""  # a Hub id, a file (.bin, .safetensors, .ckpt, .pt), a folder, or a run of ours
    revision: str | None = None  # of a Hub id: a branch, a tag or a commit; None: the newest
    dest: str = ""  # the folder to write
    to: Target = "run"  # or hf, for transformers, or a published layout: see layout
    layout: Layout = "auto"  # auto, backpack-gpt2, levanter, gpt2, nanogpt, lightning, lightning-gpt2, hf
    n_head: int | None = None  # None: from config.json, or from the known sizes
    n_sense: int = 0  # of a plain Transformer: add so many new senses per token, to be trained
    tokenizer: str = "auto"  # auto (the source's, or GPT-2's by its size), none, or as in prepare_data.py
    end_token: str | None = None  # of a tokenizer.json: the token that ends a document
    dtype: Type = "auto"  # keep, float32, float16, bfloat16; auto: keep, but float16 run to run
    trust_pickle: bool = False  # load more than plain tensors, executing what is pickled
    edits: str | None = None  # with --to=hf: a JSON file of edits to apply there (lab/edit.py)
    license: str = ""  # with --to=hf: what the model card says, such as mit
    overwrite: bool = False  # replace the run or the export that dest has
    seed: int = 1337  # of new senses


# -----------------------------------------------------------------------------
# files of others


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
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        if is_storage or (module, name) in self.PLAIN:
            return super().find_class(module, name)
        return type(name, (Shell,), {})


class PlainPickle:
    """What torch.load needs of the pickle module."""

    Unpickler = PlainUnpickler

    @staticmethod
    def load(file, **options):
        return PlainUnpickler(file, **options).load()


def is_torchscript(path):
    """Whether torch.load would run a file as a program of torch.jit: this is the question that it asks."""
    try:
        return torch.serialization._is_torchscript_zip(torch._C.PyTorchFileReader(str(path)))
    except RuntimeError:  # not an archive
        return False


def load_pickled(path, trust_pickle):
    """What torch.save wrote. Errors have no common class: they are of zip, pickle or torch."""
    # torch does not look at the checksums
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
        raise ValueError("a checksum is wrong")
    module = None if trust_pickle else PlainPickle
    return torch.load(path, "cpu", pickle_module=module, weights_only=False)


def load_file(path, trust_pickle):
    """What is in a .safetensors file or one by torch.save. UserError: it is damaged, or a program."""
    if path.suffix == ".safetensors":
        load = require("safetensors.torch", str(path)).load_file
    else:
        what = f"{path} is a program of torch.jit, which is not executed here"
        check(not is_torchscript(path), what)
        load = partial(load_pickled, trust_pickle=trust_pickle)
    try:
        return load(path)
    except Exception as error:
        reason = str(error)[:200]
        raise UserError(f"{path} is damaged or holds no tensors: {reason!r}") from None


# types of weights and masks that can be compared and turned into others
NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
NUMBERS |= {torch.int64, torch.int32, torch.uint8, torch.bool}


def read_tensors(path, trust_pickle=False):
    """({name: tensor} of a file, what nanoGPT notes beside them). UserError: damaged, or something else."""
    found = load_file(path, trust_pickle)
    sizes = {}
    if isinstance(found, dict):
        sizes = found.get("model_args", {})
        found = found.get("state_dict", found.get("model", found))
    check(isinstance(sizes, dict), f"{path}: expected the sizes of the network as model_args")
    only_tensors = isinstance(found, dict) and all(map(torch.is_tensor, found.values()))
    hint = "--trust_pickle loads it, and executes what is in it"
    check(only_tensors, f"{path}: found more than tensors: {hint}")
    for name, t in found.items():
        # a small file may expand to any size, where rows share their memory
        is_whole = t.layout == torch.strided and t.nbytes <= t.untyped_storage().nbytes()
        fits = isinstance(name, str) and is_whole and t.dtype in NUMBERS
        what = f"a tensor of {t.dtype} and {t.layout}"
        check(fits, f"{path}, {name!r}: found {what}, expected plain numbers of 16 bits or more")
    return {name: tensor.detach() for name, tensor in found.items()}, sizes


def find_files(source, revision):
    """(path, files of weights) of a file, a folder or a Hub id. UserError: there are none."""
    path = Path(source)
    check(not revision or not path.exists(), f"{source} is not of the Hub: --revision has no effect")
    patterns = ("*.safetensors", "pytorch_model*.bin", "ckpt.pt")
    if path.is_file():
        return path, [path]
    if not path.exists():
        path = download(source, revision, patterns)
    for pattern in patterns:
        files = sorted(path.glob(pattern))
        if files:
            return path, files
    raise UserError(f"{path} has no {' and no '.join(patterns)}")


def download(source, revision, patterns):
    """The folder of a repository of the Hub, with files of the first pattern that it has any of.

    Its name is that of the commit.
    """
    hub = require("huggingface_hub", f"{source} is no file or folder here; a Hub id")
    try:
        for pattern in patterns:
            wanted = ["*.json", *OTHER_VOCABULARIES, pattern]
            path = Path(hub.snapshot_download(source, revision=revision, allow_patterns=wanted))
            if any(path.glob(pattern)):
                break
    except Exception as error:  # of the Hub's library, of HTTP, of the file system
        lines = str(error).splitlines() or ["no message"]
        reason = f"{type(error).__name__}: {lines[0][:120]}"
        raise UserError(f"source={source}: not here, and not on the Hub: {reason}") from None
    return path


# -----------------------------------------------------------------------------
# a source as a checkpoint


def is_run(source):
    """Whether a source is a checkpoint of train.py, and not nanoGPT's, whose file has the same name."""
    path = Path(source)
    if path.is_dir():
        path = path / "ckpt.pt"
    return path.is_file() and path.suffix == ".pt" and "model_args" not in load_checkpoint(path)


def read_run(source):
    """(a run's checkpoint without what only training needs, the records of metrics.jsonl up to its step)."""
    ckpt = load_checkpoint(source)
    keys = ("model", "config", "settings", "meta", "step")
    check(ckpt.keys() >= set(keys), f"{source} is not a checkpoint of train.py")
    kept = {key: ckpt[key] for key in keys}
    kept["source"] = ckpt.get("source", {})
    folder = Path(source)
    if folder.is_file():
        folder = folder.parent
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    return kept, [record for record in records if record["step"] <= ckpt["step"]]


def read_weights(s):
    """(a checkpoint of weights that others saved, the list of edits that an export has). UserError."""
    path, files = find_files(s.source, s.revision)
    about = path / "config.json"  # of a folder; nothing is asked of what lies beside a single file
    described = {}
    if about.is_file():
        described = read_json(about)
        check(isinstance(described, dict), f"{about}: expected an object")
    edits = described.get("edits") or {}
    check(isinstance(edits, dict), f"{about}, edits: expected an object")
    edits = check_edits(edits.get("list", []), f"{about}, edits")
    tensors = {}
    sha256 = {}
    for file in files:
        found, sizes = read_tensors(file, s.trust_pickle)
        tensors |= found
        described |= sizes
        with open(file, "rb") as stream:
            sha256[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    layout = s.layout
    if layout == "auto":
        layout = described.get("layout") or detect(tensors)
        known = layout in (*LAYOUTS, *READ_ONLY)
        check(known, f"{about}: unknown layout {layout!r}")
    state, dropped = to_ours(tensors, layout)
    rows = len(state["wte.weight"])
    spec = find_tokenizer(s, path, described.get("vocab_size") or rows)
    config = make_config(s, state, described, layout, spec)
    state = fit(state, config, s)
    source = {"name": s.source, "layout": layout, "sha256": sha256}
    if not Path(s.source).exists():
        source["commit"] = path.name
    source["rows"] = config.vocab_size if layout == "hf" else rows
    ckpt = {
        "model": state,
        "config": asdict(config),
        "settings": {},
        "step": 0,
        "meta": {"tokenizer": spec, "vocab_size": config.vocab_size},
        "source": source,
    }
    print(f"{layout}: {len(state)} tensors; dropped {len(dropped)} (repeated, masks, edits)")
    print(config)
    print(f"tokenizer: {spec['kind'] if spec else 'none; --tokenizer=WHAT gives it one'}")
    if layout != "hf" and not is_network_of_layouts(Backpack.from_checkpoint(ckpt)):
        print("this model.py computes another network than the one that these weights are of")
    return ckpt, edits


def make_config(s, state, described, layout, spec):
    """The BackpackConfig of tensors in our names; described: what config.json says. UserError.

    The vocabulary is that of the tokenizer, if there is a spec: E may have rows of padding beyond it.
    """
    if layout == "hf":  # it has all settings of the network, under our names
        values = {f.name: described[f.name] for f in fields(BackpackConfig) if f.name in described}
    else:
        values = infer_config(state, described, layout, s.n_head, s.n_sense)
    plain = " and ".join(WITHOUT_SENSES)
    fits = not s.n_sense or layout in WITHOUT_SENSES
    check(fits, f"n_sense={s.n_sense} is for {plain}, found {layout}")
    if spec:
        rows = len(state["wte.weight"])
        size = GPT2_SIZE if spec["kind"] == "gpt2" else load_tokenizer(spec).vocab_size
        what = f"the tokenizer has {size} tokens, but wte.weight {rows} rows"
        check(rows - 128 < size <= rows, f"{what}: --tokenizer=none imports without it")
        values["vocab_size"] = size
    hints = get_type_hints(BackpackConfig)
    for key, value in values.items():
        where = f"{key}={reprlib.repr(value)} of {s.source}"
        values[key] = typed(value, hints[key], where)
    try:
        return BackpackConfig(**values)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{s.source}: {error}") from None


def fit(state, config, s):
    """The state_dict of a Backpack of this config. UserError: tensors are missing, left over or don't fit."""
    rows = len(state["wte.weight"])
    V = config.vocab_size
    check(0 < V <= rows, f"wte.weight has {rows} rows, fewer than a vocabulary of {V} tokens")
    padded = math.ceil(V / 8) * 8  # rows beyond these have no logits
    state = state | {"wte.weight": F.pad(state["wte.weight"], (0, 0, 0, padded - rows))}
    if s.n_sense:
        torch.manual_seed(s.seed)
        state = Backpack(config).state_dict() | state
    # config.json may say anything
    check(config.n_layer <= len(state), f"n_layer={config.n_layer}, but {len(state)} tensors")
    check(config.n_head > 0, f"n_head={config.n_head} is not the number of heads")
    try:
        with torch.device("meta"):
            expected = Backpack(config).state_dict()
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{config} is not a network: {str(error).splitlines()[0]}") from None
    for name in expected | state:
        found = list(state[name].shape) if name in state else "none"
        shape = list(expected[name].shape) if name in expected else "none"
        check(found == shape, f"{name}: found shape {found}, expected {shape}")
        check(state[name].isfinite().all(), f"{name}: found infinite numbers or nan")
    return state


# a vocabulary in other files than tokenizer.json
OTHER_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def find_tokenizer(s, path, size):
    """The spec of the tokenizer of a source whose vocabulary has this size, or is padded to it; or None.

    UserError: it is in files that we don't read, so that GPT-2's in its place would be wrong.
    """
    folder = path if path.is_dir() else path.parent
    has_file = (folder / "tokenizer.json").is_file()
    used = s.tokenizer not in ("auto", "none") or (s.tokenizer == "auto" and has_file)
    check(used or not s.end_token, "end_token has no effect without a tokenizer.json: leave it out")
    if s.tokenizer == "none":
        return None
    if s.tokenizer != "auto":
        return given_tokenizer(s.tokenizer, s.end_token)
    if has_file:
        return read_tokenizer(folder, s.end_token)
    if size not in GPT2_ROWS:
        return None
    found = [folder / name for name in OTHER_VOCABULARIES if (folder / name).is_file()]
    if found:
        own = found[0].name != "vocab.json" or not is_gpt2(read_json(found[0]))
        hint = "make a tokenizer.json with AutoTokenizer's save_pretrained, or give --tokenizer"
        check(not own, f"{found[0]} is not GPT-2's vocabulary: {hint}")
    return {"kind": "gpt2"}


def add_senses(ckpt, s):
    """Give the checkpoint of a run without senses s.n_sense new ones. UserError: it has some."""
    has = ckpt["config"]["n_sense"]
    check(not has, f"n_sense={s.n_sense} is for a Transformer, but {s.source} has {has} senses already")
    try:
        config = BackpackConfig(**ckpt["config"] | {"n_sense": s.n_sense})
    except ValueError as error:
        raise UserError(f"{s.source}: {error}") from None
    ckpt["model"] = fit(ckpt["model"], config, s)
    ckpt["config"] = asdict(config)
    ckpt["settings"] = {}  # of the Transformer's training, as the step was
    ckpt["step"] = 0


# -----------------------------------------------------------------------------
# writing

# what describes a run or an export; of the one that was there before, none of these may stay
DESCRIPTIONS = ("best.pt", "edits.json", "metrics.jsonl", "generation_config.json")
DESCRIPTIONS += ("tokenizer.json", "tokenizer_config.json")


def check_dest(s):
    """Raise UserError if dest is where something is read, or has something and overwrite is off."""
    dest = Path(s.dest)
    for key in ("source", "edits", "tokenizer"):
        if not getattr(s, key):
            continue
        folder = Path(getattr(s, key)).resolve()
        if folder.is_file():
            folder = folder.parent
        check(dest.resolve() != folder, f"dest={dest} is the folder of the {key}: give another --dest")
    if not dest.exists():
        return
    found = sorted(path.name for path in dest.iterdir())
    is_other = s.to != "run" and "ckpt.pt" in found
    check(not is_other, f"{dest} has a run: give another --dest")
    hint = "give another --dest, or --overwrite to replace the files that are written there"
    check(s.overwrite or not found, f"{dest} has {', '.join(found[:6])}: {hint}")


def write_run(folder, ckpt, edits, metrics):
    save_checkpoint(folder / "ckpt.pt", ckpt)
    described = ckpt["config"] | ckpt["settings"] | {"source": ckpt["source"]}
    write_text(folder / "config.json", json.dumps(described, indent=1))
    if edits:
        write_text(folder / "edits.json", json.dumps(edits))
    if metrics:
        lines = [json.dumps(record) + "\n" for record in metrics]
        write_text(folder / "metrics.jsonl", "".join(lines))


def main(argv):
    s, given = configure(Settings, argv, __doc__)
    check(s.source and s.dest, "give --source=WHAT and --dest=FOLDER; --help has examples")
    check(not s.edits or s.to == "hf", f"--to={s.to} has no place for edits: --to=hf has")
    check_dest(s)
    dtype = s.dtype
    if is_run(s.source):
        fixed = ("layout", "n_head", "tokenizer", "end_token", "trust_pickle", "revision")
        for key in fixed:
            check(key not in given, f"{s.source} is a run: --{key} can't change it")
        ckpt, metrics = read_run(s.source)
        edits = []
        if s.n_sense:
            add_senses(ckpt, s)
            metrics = []  # which are the Transformer's
        elif dtype == "auto" and s.to == "run":
            dtype = "float16"
    else:
        ckpt, edits = read_weights(s)
        metrics = []
    if dtype == "auto":
        dtype = "keep"
    with filling(Path(s.dest), ("ckpt.pt", "config.json"), DESCRIPTIONS) as folder:
        if s.to == "run":
            ckpt["model"] = cast(ckpt["model"], dtype)
            write_run(folder, ckpt, edits, metrics)
        else:
            export(s, folder, ckpt, edits, metrics, dtype)
    size = sum(tensor.numel() for tensor in ckpt["model"].values())
    print(f"{s.dest}: {s.to}, {size:,} parameters, step {ckpt['step']}")
    if edits and s.to == "run":
        print(f"its edits are in {s.dest}/edits.json: --edits={s.dest}/edits.json applies them")


if __name__ == "__main__":
    run(main)
