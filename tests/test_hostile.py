"""Hostile files and values: a script succeeds, or says in one line what is wrong, and loses no file.

HYPOTHESIS_PROFILE=long tries a hundred of each, some 17,000 in all.
"""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import lzma
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import lines
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import configurator
import prepare_data
import sample
import train
from lab import bench, convert, edit, experiments, look, page

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
each_time = {"deadline": None, "database": None, "suppress_health_check": slow}
each_time["phases"] = [Phase.generate]  # to shrink an example would take minutes
settings.register_profile("short", max_examples=3, derandomize=True, **each_time)
settings.register_profile("long", max_examples=100, **each_time)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

SECONDS = 60  # a script that takes longer here hangs
os.environ["HF_HUB_OFFLINE"] = "1"


# ---- scripts, as a user calls them

MAINS = {
    "train.py": train.main,
    "sample.py": sample.main,
    "prepare_data.py": prepare_data.main,
    "look.py": look.main,
    "edit.py": edit.main,
    "experiments.py": experiments.main,
    "convert.py": convert.main,
    "bench.py": bench.main,
}


class Hang(BaseException):
    """Raised by the clock; no script catches it."""


@contextlib.contextmanager
def at_most(seconds):
    def ring(number, frame):
        raise Hang(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def call(script, args, main=None):
    """Run a script in this process, as its last lines do: its exit code and what it wrote to stderr."""
    kept, code = sys.argv, 0
    sys.argv = [script, *args]
    try:
        with contextlib.redirect_stdout(stream()), contextlib.redirect_stderr(stream()) as said:
            with at_most(SECONDS):
                try:
                    configurator.run(main or MAINS[script])
                except SystemExit as error:
                    code = error.code
            return code, said.buffer.getvalue().decode()
    finally:
        sys.argv = kept


def files_in(folder):
    """{path: content} of all files in a folder; of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path).encode()
        elif path.is_file():
            found[path] = path.read_bytes()
    return found


def check(script, args, names, writes=(), main=None):
    """Run a script: it succeeds, or says in one line what is wrong. Returns that line, or "".

    names: of the file or setting at fault, of which the line has one; writes: patterns of the files
    that it replaces.
    """
    folder = Path.cwd().parent
    before = files_in(folder)
    code, said = call(script, args, main)
    after = files_in(folder)
    for path, content in before.items():
        if not any(path.match(pattern) for pattern in writes):
            assert after.get(path) == content, f"{path} was changed or lost"
    if not code:
        return ""
    assert code in (1, 2), code
    message = said[said.index(f"{script}: ") + len(script) + 2 :]
    message = re.sub(r"\r[^\r\n]*", "", message)  # a progress bar that is closed after it
    assert message.endswith("\n"), message
    problems = message[:-1].split("\n- ")  # train.py lists several
    for line in problems[len(problems) > 1 :]:
        assert len(line.splitlines()) == 1 and len(line) < 500, line
        assert line.isprintable(), line
    assert any(name in message for name in names), message
    assert SAYS_WHY.search(message), message
    for path in after.keys() - before.keys():
        assert after[path], f"{path} is empty: {message}"
        assert not path.name.endswith((".tmp", ".lock")), path
        unfinished = path.name.endswith(".partial") and (path.parent / "progress.json").exists()
        assert unfinished or not path.name.endswith(".partial"), path
    return message


# what was found, or what was expected
SAYS_WHY = re.compile(
    "expected|found|must|[Nn]o such|is not|no checkpoint|no dataset|has no|has another|unknown|missing"
    "|can't be read|can't change|outside|damaged|made with other|too long|too short|s a directory|give"
    "|File exists|Input/output|symbolic links|draws|could not write|not here"
    "|is for|needs|does not fit|but |of another run|lacks|fewer|not UTF-8|, line [0-9?]"
    "|Not a directory|Is a directory"
)


# ---- a folder with one valid file of each kind

SIZES = "--block_size=16 --n_layer=1 --n_head=2 --n_embd=8 --n_sense=2 --init_std=0.2"
STEPS = "--tokens_per_step=64 --batch_size=4 --max_iters=2 --warmup_iters=0 --learning_rate=1e-2"
EVALUATION = "--eval_interval=1 --eval_iters=1 --log_interval=1 --device=cpu"
TINY = f"--dataset=tiny {SIZES} {STEPS} {EVALUATION}"
PAIRS = "".join(f"document\tword{i}\tN\t{i}.5\n" for i in range(25))
EDITS = [
    {"edit": "scale", "word": "words", "sense": 1, "factor": 0.5},
    {"edit": "swap", "word": "has", "from": "words", "to": "line"},
    {"edit": "topic", "words": "line,has", "strength": 2},
    {"edit": "replace", "word": "words", "sense": 0, "by": "has", "by_sense": 1},
    {"edit": "replace", "word": "words", "sense": 1, "vector": [0.5, 1, -1, 2, 0, 0, 0, 1]},
]
STIMULI = {
    "professions": ["words", "line"],
    "bias_prompts_evaluate": ["A PROFESSION", "PROFESSION"],
    "bias_prompts_fit": ["PROFESSION is"],
    "topics": {"letters": ["d", "w"]},
}


def make_world():
    """In the working folder, a dataset, a run, and a file of each other kind."""
    texts = [f"{text} he she" for text in lines(60)]
    Path("text.txt").write_text("\n\n".join(texts))
    Path("text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for name in ("text.txt", "text.jsonl"):
        content = Path(name).read_bytes()
        Path(f"{name}.gz").write_bytes(gzip.compress(content))
        Path(f"{name}.xz").write_bytes(lzma.compress(content))
    mine = "--input=text.txt --documents=blank_line --val_fraction=0.3 --num_proc=1"
    for name, kind in (("tiny", "bpe --vocab_size=400"), ("char", "char")):
        run("prepare_data.py", f"--dataset={name} {mine} --tokenizer={kind}")
    run("train.py", f"{TINY} --out_dir=out/run")
    run("train.py", f"{TINY} --n_sense=0 --out_dir=out/plain")
    Path("edits.json").write_text(json.dumps(EDITS))
    examples = [{"prompt": "document", "good": "word"}, {"prompt": "has", "good": "z", "bad": "y"}]
    Path("examples.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    Path("stimuli.json").write_text(json.dumps(STIMULI))
    Path("sets").mkdir()
    for name in ("SimLex-999.txt", "SimVerb-3500.txt"):
        (Path("sets") / name).write_text(PAIRS)
    (Path("sets") / "RG65.csv").write_text("document;words;3.5\n" * 3)
    (Path("sets") / "WS353.csv").write_text("Word 1,Word 2,Human (mean)\ndocument,words,3.5\n")
    Path("config.py").write_text("# a config\nmax_iters = 2\nlearning_rate = 1e-2\nbias = True\n")
    run("convert.py", "--source=out/run --to=hf --dest=hf")
    run("convert.py", "--source=out/run --to=backpack-gpt2 --dest=published")
    from safetensors.torch import load_file

    tensors = load_file("published/model.safetensors")
    Path("bin").mkdir()
    shutil.copy("published/config.json", "bin")
    torch.save(tensors, "bin/pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:  # interrupted at its end

        def interrupted(folder, meta):
            raise configurator.UserError("interrupted")

        patch.setattr(prepare_data, "finish", interrupted)
        patch.setattr(prepare_data, "SAVE_EVERY", -1)
        assert call("prepare_data.py", f"--dataset=half {mine} --tokenizer=char".split())[0]


def run(script, args):
    code, said = call(script, args.split())
    assert not code, said


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        make_world()
    return folder


@contextlib.contextmanager
def a_copy(world, where=None):
    """The working folder is a copy of the world, two folders deep in a new one; where: on this disk."""

    def copy(source, target):
        # links are faster, and no script may write into a file in place; to these it appends
        if where or source.endswith((".partial", ".jsonl")):
            shutil.copyfile(source, target)
        else:
            os.link(source, target)

    with tempfile.TemporaryDirectory(dir=where or world.parent) as above:
        folder = Path(above) / "a" / "b"
        shutil.copytree(world, folder, copy_function=copy)
        with contextlib.chdir(folder):
            yield folder


def put(path, content):
    """Replace a file of the copy."""
    Path(path).unlink()
    Path(path).write_bytes(content)


# ---- damage

TOKENS = [b"\xef\xbb\xbf", b"\xe9", b"\xed\xa0\x80", "\u2028".encode(), b"\x85", b"\0", b"\r\n"]
TOKENS += [b"\n", b'"', b"[", b"}", b"1e999", b"NaN", b"-1", b"[" * 10**5, b"9" * 5000, b"\x1b[2J"]


@st.composite
def damaged(draw, content):
    """Content with a bit flipped, a part cut, repeated or put in, or another encoding."""
    how = draw(st.sampled_from("flip flip flip cut end twice insert insert crlf bom utf16".split()))
    i, j = sorted(draw(st.tuples(*2 * [st.integers(0, len(content))])))
    if how == "flip" and content:
        i = min(i, len(content) - 1)
        return content[:i] + bytes([content[i] ^ 1 << draw(st.integers(0, 7))]) + content[i + 1 :]
    if how == "cut":
        return content[:i] + content[j:]
    if how == "end":
        return content[:i]
    if how == "twice":
        return content[:j] + content[i:]
    if how == "insert":
        return content[:i] + draw(st.sampled_from(TOKENS)) + content[i:]
    if how == "crlf":
        return content.replace(b"\n", b"\r\n")
    if how == "bom":
        return b"\xef\xbb\xbf" + content
    return content.decode(errors="replace").encode("utf-16")


# put into JSON: "@..." become what json.dumps doesn't write
VALUES = [None, True, 0, -1, 1, 2**31, 10**18, 10**400, 0.5, 1e308, math.nan, math.inf, "", "x"]
VALUES += ["None", "\ud800", "a\u2028b", "\0", "\x1b[2J", "é", "../x", "<!--<script>", "$x^$"]
VALUES += [[], {}, [[]], [None], {"a": 1}, "@deep", "@long", "@inf", "x" * 10**4]
SPECIAL = {"@deep": "[" * 10**5 + "]" * 10**5, "@long": "9" * 5000, "@inf": "1e400"}


@st.composite
def changed(draw, value, values=VALUES):
    """A nested value with one part replaced, removed or added."""
    value = copy.deepcopy(value)
    inner, container = value, None
    while isinstance(inner, (dict, list)) and inner and (container is None or draw(st.booleans())):
        container = inner
        key = draw(st.sampled_from([*inner] if isinstance(inner, dict) else range(len(inner))))
        inner = container[key]
    how = draw(st.sampled_from("replace replace replace remove add whole".split()))
    new = draw(st.sampled_from(values))
    if how == "whole":
        return new
    if how == "remove":
        del container[key]
    elif how == "add" and isinstance(container, dict):
        container[draw(st.sampled_from(["x", "", "text", "sense"]))] = new
    elif how == "add":
        container.insert(key, new)
    else:
        container[key] = new
    return value


def to_json(value):
    text = json.dumps(value)
    for mark, meant in SPECIAL.items():
        text = text.replace(f'"{mark}"', meant)
    return text.encode()


@st.composite
def changed_json(draw, content):
    return to_json(draw(changed(json.loads(content))))


@st.composite
def changed_jsonl(draw, content):
    rows = content.decode().splitlines()
    i = draw(st.integers(0, len(rows) - 1))
    row = to_json(draw(changed(json.loads(rows[i])))).decode()
    return "".join(f"{row}\n" for row in [*rows[:i], row, *rows[i + 1 :]]).encode()


@st.composite
def changed_csv(draw, content):
    rows = content.decode().split("\n")
    i = draw(st.integers(0, len(rows) - 1))
    cells = re.split(r"([\t;,])", rows[i])
    new = ["", "x", "nan", "1e999", "²", '"', "9" * 400, "\0", "-1", "é", "1.5.5"]
    cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from(new))
    rows[i] = "".join(cells)
    return "\n".join(rows).encode()


def as_saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


TENSORS = [torch.zeros(0), torch.tensor(math.nan), torch.full((8, 8), math.inf), torch.ones(8)]
TENSORS += [torch.zeros(400, 8, dtype=torch.int32), torch.zeros(2, 8, dtype=torch.complex64)]
TENSORS += [torch.full((400, 8), math.nan), torch.zeros(400, 8).to_sparse(), "x" * 300, {1: 2}]


@st.composite
def changed_tensors(draw, content):
    """A file of torch.save with one part changed, most often a whole one near the top."""
    value = torch.load(io.BytesIO(content))
    return as_saved(draw(changed(value, [v for v in VALUES if v != "@deep"] + TENSORS)))


@st.composite
def flipped(draw, content):
    """A zip file of torch.save with a bit flipped within one of its members."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = draw(st.sampled_from([m for m in archive.infolist() if m.file_size]))
    name, extra = (content[member.header_offset + at :][:2] for at in (26, 28))
    start = member.header_offset + 30 + int.from_bytes(name, "little")
    start += int.from_bytes(extra, "little")
    i = start + draw(st.integers(0, member.file_size - 1))
    return content[:i] + bytes([content[i] ^ 1 << draw(st.integers(0, 7))]) + content[i + 1 :]


@st.composite
def changed_ids(draw, content):
    """Token ids of 16 bits with one changed."""
    i = 2 * draw(st.integers(0, len(content) // 2 - 1))
    new = draw(st.sampled_from([0, 400, 2**15, 2**16 - 1]))
    return content[:i] + new.to_bytes(2, "little") + content[i + 2 :]


# ---- readers


class Reader(NamedTuple):
    """A file, a command that reads it, and how its content may be changed."""

    file: str
    script: str
    args: str
    strategies: tuple = ()
    writes: tuple = ()
    named: tuple = ()  # also fine in the message, instead of the file's name


SAMPLE = "--device=cpu --num_samples=1 --max_new_tokens=3"
RESUME = "--init_from=resume --out_dir=out/run --max_iters=3"
RUN = ("out/run/*",)
MINE = "--documents=blank_line --val_fraction=0.3 --num_proc=1 --tokenizer=char"
TEACH = "--run=out/run --device=cpu --teach=examples.jsonl --steps=2 --n_window=16 --n_vector=2"
OF_RUN = "--run=out/run --device=cpu"
IMPORT = "--dest=out/imported"
OF_EDITS = tuple(f"{name} " for name in edit.FORMS)
OF_WEIGHTS = (changed_tensors, flipped)
READERS = {
    "sample ckpt.pt": Reader("out/run/ckpt.pt", "sample.py", f"--run=out/run {SAMPLE}", OF_WEIGHTS),
    "resume ckpt.pt": Reader(
        "out/run/ckpt.pt",
        "train.py",
        RESUME,
        OF_WEIGHTS,
        RUN,
        ("out/run", "(resume)", "no dataset at data/"),
    ),
    "tune ckpt.pt": Reader(
        "out/run/ckpt.pt", "train.py", f"{TINY} --init_from=out/run --out_dir=out/b", OF_WEIGHTS
    ),
    "look ckpt.pt": Reader("out/run/ckpt.pt", "look.py", f"{OF_RUN} --word=z", OF_WEIGHTS),
    "convert ckpt.pt": Reader(
        "out/run/ckpt.pt",
        "convert.py",
        f"--source=out/run {IMPORT}",
        OF_WEIGHTS,
        (),
        ("out/run has",),
    ),
    "export ckpt.pt": Reader(
        "out/run/ckpt.pt",
        "convert.py",
        "--source=out/run --to=hf --dest=exported",
        OF_WEIGHTS,
        (),
        ("out/run has",),
    ),
    "train meta.json": Reader(
        "data/tiny/meta.json", "train.py", f"{TINY} --out_dir=out/b", (changed_json,), (), ("tiny",)
    ),
    "train char meta.json": Reader(
        "data/char/meta.json",
        "train.py",
        f"{TINY} --dataset=char --out_dir=out/b",
        (changed_json,),
        (),
        ("char",),
    ),
    "again meta.json": Reader(
        "data/char/meta.json",
        "prepare_data.py",
        f"--dataset=char --input=text.txt {MINE}",
        (changed_json,),
        ("data/char/*",),
        ("data/char",),
    ),
    "tokenizer meta.json": Reader(
        "data/tiny/meta.json",
        "prepare_data.py",
        "--dataset=new --input=text.txt --tokenizer=data/tiny --num_proc=1",
        (changed_json,),
    ),
    "progress.json": Reader(
        "data/half/progress.json",
        "prepare_data.py",
        f"--dataset=half --input=text.txt {MINE}",
        (changed_json,),
        ("data/half/*",),
    ),
    "train.bin": Reader(
        "data/tiny/train.bin",
        "train.py",
        f"{TINY} --out_dir=out/b",
        (changed_ids,),
        (),
        ("tiny", "the data"),
    ),
    "val.bin": Reader(
        "data/tiny/val.bin",
        "train.py",
        f"{TINY} --out_dir=out/b",
        (changed_ids,),
        (),
        ("tiny", "the data"),
    ),
    "words val.bin": Reader(
        "data/tiny/val.bin",
        "experiments.py",
        f"{OF_RUN} --words",
        (changed_ids,),
        (),
        ("tiny", "the data", "this dataset"),
    ),
    "teach val.bin": Reader(
        "data/tiny/val.bin", "edit.py", TEACH, (changed_ids,), (), ("tiny", "the data")
    ),
    "resume metrics.jsonl": Reader(
        "out/run/metrics.jsonl", "train.py", RESUME, (changed_jsonl,), RUN
    ),
    "convert metrics.jsonl": Reader(
        "out/run/metrics.jsonl", "convert.py", f"--source=out/run {IMPORT}", (changed_jsonl,)
    ),
    "export metrics.jsonl": Reader(
        "out/run/metrics.jsonl",
        "convert.py",
        "--source=out/run --to=hf --dest=exported",
        (changed_jsonl,),
    ),
    "sample edits.json": Reader(
        "edits.json",
        "sample.py",
        f"--run=out/run {SAMPLE} --edits=edits.json",
        (changed_json,),
        (),
        OF_EDITS,
    ),
    "edit edits.json": Reader(
        "edits.json",
        "edit.py",
        f"{OF_RUN} --edits=edits.json --remove=1",
        (changed_json,),
        ("edits.json",),
        ("remove=1", *OF_EDITS),
    ),
    "damage edits.json": Reader(
        "edits.json",
        "experiments.py",
        f"{OF_RUN} --damage=edits.json",
        (changed_json,),
        (),
        OF_EDITS,
    ),
    "page edits.json": Reader(
        "edits.json",
        "look.py",
        f"{OF_RUN} --edits=edits.json --html=page.html --word=z",
        (changed_json,),
        (),
        OF_EDITS,
    ),
    "export edits.json": Reader(
        "edits.json",
        "convert.py",
        "--source=out/run --to=hf --dest=exported --edits=edits.json",
        (changed_json,),
        (),
        OF_EDITS,
    ),
    "examples.jsonl": Reader("examples.jsonl", "edit.py", TEACH, (changed_jsonl,)),
    "bias stimuli.json": Reader(
        "stimuli.json",
        "experiments.py",
        f"{OF_RUN} --bias --prompts=stimuli.json --n_bootstrap=5",
        (changed_json,),
        (),
        ("prompts",),
    ),
    "topics stimuli.json": Reader(
        "stimuli.json",
        "experiments.py",
        f"{OF_RUN} --topics --prompts=stimuli.json --num_samples=2 --max_new_tokens=4 --n_bootstrap=5",
        (changed_json,),
    ),
    "SimLex-999.txt": Reader(
        "sets/SimLex-999.txt",
        "experiments.py",
        f"{OF_RUN} --lexical=sets --n_bootstrap=5",
        (changed_csv,),
    ),
    "WS353.csv": Reader(
        "sets/WS353.csv",
        "experiments.py",
        f"{OF_RUN} --lexical=sets --n_bootstrap=5",
        (changed_csv,),
    ),
    "text.txt": Reader(
        "text.txt",
        "prepare_data.py",
        f"--dataset=new --input=text.txt {MINE}",
        (),
        (),
        ("documents gave",),
    ),
    "text.jsonl": Reader(
        "text.jsonl",
        "prepare_data.py",
        f"--dataset=new --input=text.jsonl {MINE}",
        (changed_jsonl,),
        (),
        ("documents gave",),
    ),
    "text.txt.gz": Reader(
        "text.txt.gz",
        "prepare_data.py",
        f"--dataset=new --input=text.txt.gz {MINE}",
        (),
        (),
        ("documents gave",),
    ),
    "text.jsonl.xz": Reader(
        "text.jsonl.xz",
        "prepare_data.py",
        f"--dataset=new --input=text.jsonl.xz {MINE}",
        (),
        (),
        ("documents gave",),
    ),
    "start FILE": Reader("text.txt", "sample.py", f"--run=out/run {SAMPLE} --start=FILE:text.txt"),
    "hf safetensors": Reader(
        "hf/model.safetensors", "convert.py", f"--source=hf {IMPORT}", (), (), ("hf has",)
    ),
    "hf config.json": Reader(
        "hf/config.json",
        "convert.py",
        f"--source=hf {IMPORT}",
        (changed_json,),
        (),
        ("hf/model.safetensors",),
    ),
    "hf tokenizer.json": Reader(
        "hf/tokenizer.json", "convert.py", f"--source=hf {IMPORT}", (changed_json,)
    ),
    "published config.json": Reader(
        "published/config.json",
        "convert.py",
        f"--source=published --n_head=2 {IMPORT}",
        (changed_json,),
        (),
        ("published/tokenizer.json",),
    ),
    "published bin": Reader(
        "bin/pytorch_model.bin",
        "convert.py",
        f"--source=bin {IMPORT}",
        OF_WEIGHTS,
        (),
        ("bin has",),
    ),
}


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_damaged_file(world, name, data):
    """Success, or one line that names the file."""
    reader = READERS[name]
    content = (world / reader.file).read_bytes()
    how = data.draw(st.sampled_from([damaged, *2 * reader.strategies]))
    new = data.draw(how(content))
    with a_copy(world):
        put(reader.file, new)
        check_reader(reader)


def check_reader(reader):
    file = Path(reader.file)
    folder = [str(file.parent)] if file.parent.name else []  # a run is named by its folder
    names = [file.name, *folder, *reader.named]
    return check(reader.script, reader.args.split(), names, reader.writes)


@given(data=st.data())
def test_flipped_bit_of_a_checkpoint_is_noticed(world, data):
    content = (world / "out/run/ckpt.pt").read_bytes()
    with a_copy(world):
        put("out/run/ckpt.pt", data.draw(flipped(content)))
        assert check_reader(READERS["sample ckpt.pt"])


def directory(path):
    path.mkdir()
    (path / "x").write_text("kept")


NO_FILES = {
    "missing": lambda path: None,
    "empty": Path.touch,
    "a directory": directory,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
if Path("/proc/self/mem").exists():
    NO_FILES["unreadable"] = lambda path: path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("name", READERS)
def test_no_file(world, name):
    """Where the file should be is none, or something that can't be read."""
    reader, some = READERS[name], [*NO_FILES]
    if settings.get_current_profile_name() == "short":  # one or two, all among the readers
        first = [*READERS].index(name) % len(some)
        some = {some[0], some[first]}
    for what in some:
        place = NO_FILES[what]
        with a_copy(world):
            Path(reader.file).unlink()
            place(Path(reader.file))
            try:
                check_reader(reader)
            except BaseException as error:
                error.add_note(f"{reader.file} is {what}")
                raise


# ---- settings

# a command of each script in which a setting is given another value
COMMANDS = {
    "train.py": (train, f"{TINY} --out_dir=out/b"),
    "train.py, resume": (train, RESUME),
    "sample.py": (sample, f"--run=out/run {SAMPLE} --start=he --edit=scale_words_0_2 --top_k=5"),
    "prepare_data.py": (prepare_data, f"--dataset=new --input=text.txt {MINE}"),
    "prepare_data.py, bpe": (
        prepare_data,
        "--dataset=new --input=text.jsonl --tokenizer=bpe --num_proc=1 --val_fraction=0.3",
    ),
    "look.py": (look, f"{OF_RUN} --word=words"),
    "look.py, similar": (look, f"{OF_RUN} --similar=words --sense=1"),
    "look.py, text": (look, f"{OF_RUN} --text=he --target=he --against=she"),
    "look.py, page": (look, f"{OF_RUN} --text=he --html=page.html --word=words"),
    "edit.py": (edit, f"{OF_RUN} --edits=edits.json --edit=scale_words_0_2"),
    "edit.py, teach": (edit, TEACH),
    "experiments.py": (
        experiments,
        f"{OF_RUN} --topics --prompts=stimuli.json --num_samples=2 --max_new_tokens=4",
    ),
    "experiments.py, bias": (
        experiments,
        f"{OF_RUN} --bias --prompts=stimuli.json --transformer=out/plain --n_bootstrap=5",
    ),
    "convert.py": (convert, f"--source=out/run {IMPORT}"),
    "convert.py, import": (
        convert,
        f"--source=published --n_head=2 --layout=backpack-gpt2 {IMPORT}",
    ),
    "convert.py, export": (convert, "--source=out/run --to=hf --dest=exported --edits=edits.json"),
    "bench.py": (
        bench,
        "--config=out/run --batch_size=2 --runs=1 --warmup=0 --generate=0 --dense=False --memory=False",
    ),
}
NUMBERS = [0, -1, 1, 10**18, -(10**18), 10**400, 0.5, -0.5, 1e-320, 1e308, math.nan, math.inf]
TEXTS = ["", "None", "x", "..", "../x", "a/b", ".", "é", "x" * 300, '"', "'", "$x^$", "\u2028", ","]
TEXTS += ["[1]", "[" * 200, "{}", "1,2", "<!--<script>", "1_0", "0x10", " ", "\n", "\x1b[2J", "~"]
TEXTS += [
    "out/run",
    "text.txt",
    "edits.json",
    "data",
    "hf",
    "x.xyz",
    "\\",
    "%s",
    "{x}",
]
OTHERS = [None, [], [1], {}, "\0", "\ud800", b"x", (), 1j, ...]


@pytest.mark.parametrize("name", COMMANDS)
@given(data=st.data())
def test_setting(world, name, data):
    """Any value of any setting: success, or one line that names the setting, or the file that it names."""
    module, args = COMMANDS[name]
    keys = [field.name for field in dataclasses.fields(module.Settings)]
    key = data.draw(st.sampled_from(keys))
    in_file = data.draw(st.booleans())
    value = data.draw(st.sampled_from(NUMBERS + TEXTS + (OTHERS if in_file else [])))
    if key == "num_proc":  # more than one would start processes
        value = data.draw(st.sampled_from([0, -1, 10**18, math.nan, "x"]))
    with a_copy(world):
        check_setting(name.split(",")[0], args, key, value, in_file)


def check_setting(script, args, key, value, in_file):
    args = [arg.replace("_words_0_", " words 0 ") for arg in args.split()]
    if in_file:
        Path("its.py").write_text(assignment(key, value), encoding="utf-8")
        args.append("its.py")
    else:
        args.append(f"--{key}={value}")
    names = [key, str(value), configurator.printable(str(value)), ascii(value)[1:40]]
    names += ["the page"] if key == "html" else []
    if isinstance(value, str) and not {*value} & {"\0", "\ud800"}:
        names += [str(Path(value).resolve())]
    outputs = [str(value)] if key in ("html", "plot", "json", "profile", "edits") else []
    writes = [path for path in outputs if Path(path.strip()).name]  # others name no file
    return check(script, args, names, ["edits.json", "out/run/*", *writes])


def assignment(key, value):
    """A line of a config file."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} = float('{value}')\n"
    return f"{key} = {ascii(value)}\n"


EDIT = "scale words 0 2; swap has: words -> line; topic line,has 2; replace words 0 by has 1"
WORDS = [
    "",
    ";",
    ":",
    "->",
    "by",
    "->",
    '"',
    '""',
    '" "',
    '"he"',
    "he",
    "9",
    "-1",
    "1.5",
    "all",
    "nan",
    "1e999",
    "9" * 400,
    "[" * 10**4,
    "{}",
    "true",
    "null",
    "\u2028",
    "<!--<script>",
    "scale",
    "swap",
]


@given(data=st.data())
def test_edit_text(world, data):
    """--edit with words removed, replaced, repeated or put in."""
    words = re.split("( )", EDIT)
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(words) - 1))
        new = data.draw(st.sampled_from([[], words[i : i + 1] * 2, *([word] for word in WORDS)]))
        words[i : i + 1] = new
    text = "".join(words)
    with a_copy(world):
        check("edit.py", ["--run=out/run", "--device=cpu", f"--edit={text}"], ["edit", *OF_EDITS])


NAMES = [
    "$x^$",
    "$\\frac$",
    "<!--<script>",
    "</script>",
    '"',
    '""',
    '"<|endoftext|>"',
    "\u2028",
    "\x1b[2J",
    "é",
    "\n",
    " ",
    "日本語",
    "\U0001f600",
    "&amp;",
    "'",
    "\\",
    "{}",
    "%s",
    "a" * 200,
    ",",
    "words",
    "`",
    "\0x",
]


@given(data=st.data())
def test_words(world, data):
    """Hostile words are drawn into a page and a picture, or refused in one line."""
    key = data.draw(st.sampled_from(["word", "similar", "text", "target", "against"]))
    value = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2).map(",".join))
    args = ["--run=out/run", "--device=cpu", f"--{key}={value}"]
    args += ["--text=he"] if key in ("target", "against") else []
    args += data.draw(st.sampled_from([["--plot=plot.svg"], ["--html=page.html"], []]))
    with a_copy(world):
        check("look.py", args, [key, repr(value)[1:40], *map(repr, value.split(","))])


CONFIGS = [
    "exit()",
    "exit('words')",
    "raise SystemExit",
    "import nothing_of_this_name",
    "1 / 0",
    "max_iters = ",
    "def f(): f()\nf()",
    "raise ValueError('two\\nlines')",
    "raise ValueError",
    "max_iters = [1]",
    "x = 1",
    "max_iters = True",
    "learning_rate = float('nan')",
    "learning_rate = 10**400",
    "out_dir = 1",
    "bias = 1",
    "max_iters = 10**18",
    "dataset = b'x'",
    "raise Exception('\\x1b[2J')",
    "assert False, 'x' * 10**4",
    "\0",
    "max_iters = 'é'.encode()",
    "(" * 300,
    "-" * 10**5 + "1",
    "raise OSError(2, 'gone', 'other')",
    "dataset = '\\0'",
    "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'no')",
    "\ufeffmax_iters = 2",
    "# coding: nothing",
    "dropout = 1",
    "from configurator import UserError\nraise UserError('mine')",
    "schedule = 'none'",
    "device = None",
    "a = [1][2]",
]


@given(data=st.data())
def test_config_file(world, data):
    """A config file may hold anything."""
    content = (world / "config.py").read_bytes()
    written = st.sampled_from(CONFIGS).map(str.encode)
    new = data.draw(written | written.map(lambda part: content + part) | damaged(content))

    def main(argv):
        configurator.configure(train.Settings, argv)

    with a_copy(world):
        put("config.py", new)
        check("train.py", ["config.py"], ["config.py"], main=main)


ARGUMENTS = [
    "--run=\udcff",
    "\udcff.py",
    "--\udcff=1",
    "--start=\ud800",
    "--run",
    "run",
    "--",
    "-x",
    "",
]


@pytest.mark.parametrize("arg", ARGUMENTS)
@pytest.mark.parametrize("script", ["sample.py", "train.py"])
def test_argument(world, script, arg):
    """Arguments that are not UTF-8, or no settings at all."""
    with a_copy(world):
        assert check(
            script, [arg], [arg.encode(errors="backslashreplace").decode(), "run", "udcff", "start"]
        )


# ---- errors of ours are no errors of the user's

INSIDE = {
    "train.py": (train, "get_batch"),
    "train.py, resume": (train, "load_optimizer"),
    "sample.py": (sample, "print_batch"),
    "prepare_data.py": (prepare_data, "encode"),
    "prepare_data.py, bpe": (prepare_data, "batches"),
    "look.py": (look, "says"),
    "look.py, similar": (look, "similarity"),
    "look.py, text": (look, "attribution"),
    "look.py, page": (page, "rounded"),
    "edit.py": (edit, "swapped"),
    "edit.py, teach": (edit, "teach"),
    "experiments.py": (experiments, "topics"),
    "experiments.py, bias": (experiments, "best_factor"),
    "convert.py": (convert, "cast"),
    "convert.py, import": (convert, "to_ours"),
    "convert.py, export": (convert, "export"),
    "bench.py": (bench, "take_turns"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_internal_error_keeps_its_traceback(world, monkeypatch, name):
    _, args = COMMANDS[name]
    error = [RuntimeError, KeyError, TypeError][len(name) % 3]

    def broken(*args, **kwargs):
        raise error("planted")

    monkeypatch.setattr(*INSIDE[name], broken)
    args = [arg.replace("_words_0_", " words 0 ") for arg in args.split()]
    with a_copy(world), pytest.raises(error, match="planted"):
        call(name.split(",")[0], args)


# ---- a full disk

# commands that write over files and add others
WRITERS = {
    "train": ("train.py", f"{RESUME} --save_best=True"),
    "train anew": ("train.py", f"{TINY} --out_dir=out/b"),
    "prepare": ("prepare_data.py", f"--dataset=char --input=text.jsonl {MINE} --overwrite=True"),
    "prepare anew": ("prepare_data.py", f"--dataset=new --input=text.txt {MINE}"),
    "edits": ("edit.py", f"{OF_RUN} --edits=edits.json --remove=1"),
    "teach": ("edit.py", f"{TEACH} --edits=edits.json"),
    "page": ("look.py", f"{OF_RUN} --html=old/page.html --word=words"),
    "plot": ("look.py", f"{OF_RUN} --plot=old/plot.svg --word=words"),
    "import": ("convert.py", "--source=hf --dest=out/old --overwrite=True"),
    "weights": ("convert.py", "--source=out/run --dest=out/old --overwrite=True"),
    "export": ("convert.py", "--source=out/run --to=hf --dest=exported"),
    "export again": (
        "convert.py",
        "--source=out/run --to=hf --dest=hf --overwrite=True --edits=edits.json",
    ),
    "bench": ("bench.py", f"{COMMANDS['bench.py'][1]} --json=old/bench.json"),
}


def make_old():
    """Files for the writers to replace."""
    Path("old").mkdir()
    for name in ("page.html", "plot.svg", "bench.json"):
        Path("old", name).write_text("old")
    shutil.copytree("out/plain", "out/old")


def check_full(name):
    """Run a writer on a disk that is or becomes full: files are the old ones or whole new ones."""
    script, args = WRITERS[name]
    before = files_in(Path.cwd())
    code, said = call(script, args.split())
    if not code:
        return code
    message = said[said.index(f"{script}: ") :]
    assert message.endswith("\n") and message.count("\n") == 1, message
    assert re.search("could not write|No space left|too large", message), message
    for path, content in files_in(Path.cwd()).items():
        assert content or path.name == "empty", f"{path} is empty: {message}"
        assert not path.name.endswith((".tmp", ".lock")), path
        unfinished = (path.parent / "progress.json").exists()
        assert unfinished or not path.name.endswith(".partial"), path
        if path in before and path.suffix in (".json", ".jsonl"):
            assert content == before[path] or parses(path, content), f"{path}: {message}"
        elif path in before:
            assert content == before[path], f"{path} was changed: {message}"
    assert files_in(Path.cwd()).keys() >= before.keys(), f"a file was lost: {message}"
    return code


def parses(path, content):
    """Whether JSON is whole."""
    parts = content.decode().splitlines() if path.suffix == ".jsonl" else [content]
    return all(json.loads(part) is not None for part in parts)


@contextlib.contextmanager
def largest_file(n_bytes):
    """No file can grow beyond this, like on a disk that becomes full."""
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource.setrlimit")
@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
def test_disk_becomes_full(world, name, data):
    n_bytes = data.draw(st.sampled_from([0, 1, 100, 700, 4096, 8192, 20_000, 60_000, 10**5]))
    with a_copy(world):
        make_old()
        with largest_file(n_bytes):
            check_full(name)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 4 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("n_free", [0, 12_288])
def test_disk_is_full(world, small_disk, name, n_free):
    with a_copy(world, small_disk):
        make_old()
        with open("full", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate("full", Path("full").stat().st_size - n_free)
        if n_free == 0:
            assert check_full(name)
        else:
            check_full(name)
