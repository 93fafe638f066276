"""README.md and lab/README.md: their commands, names, links, outputs and Python example are true."""

import contextlib
import importlib
import io
import re
import shlex

import pytest
from conftest import ROOT

from configurator import configure
from tokenizer import load_tokenizer
from train import load_data

README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "lab/README.md")}
PAGES["lab/notes/cost.md"] = (ROOT / "lab/notes/cost.md").read_text()


def commands(text):
    """The commands of a page that run a script of ours, as lists of words, each once."""
    found = {}
    for line in re.split(r"\n|&&|`", text.replace("\\\n", " ")):
        line = line.strip().replace("[--to=LAYOUT]", "--to=hf")
        if re.match(r"(python|torchrun) ", line) and "-m pytest" not in line:
            found[line] = shlex.split(line, comments=True)
    return list(found.values())


def script(words):
    """The module that a command runs, and its arguments."""
    at = words.index("-m") + 1 if "-m" in words else None
    if at is None:
        at = next(i for i, word in enumerate(words) if i and word.endswith(".py"))
    if words[at] == "lab.jax_train":
        pytest.importorskip("jax", reason="jax is not installed")
    return importlib.import_module(words[at].removesuffix(".py")), words[at + 1 :]


ALL = [pytest.param(words, id=" ".join(words)) for text in PAGES.values() for words in commands(text)]


@pytest.mark.parametrize("words", ALL)
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # they name config files
    module, args = script(words)
    if module.__name__ == "lab.curves":  # which takes names of runs, too
        args = [arg for arg in args if arg.startswith("-")]
    if args != ["--help"]:
        values, _ = configure(module.Settings, args)
        for name in ("run", "source"):
            path = getattr(values, name, None) or ""
            assert not path.startswith("pretrained/") or (ROOT / path / "ckpt.pt").is_file()


def test_the_first_blocks_are_the_two_commands():
    """.ci/run takes the block that installs requirements-dev.txt."""
    assert len(commands(README)) > 15
    first, second = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)[:2]
    install = "python3 -m venv .venv && . .venv/bin/activate &&\n  pip install -r "
    steps = [
        "requirements.txt",
        "python prepare_data.py",
        "python train.py config/shakespeare_char.py",
        "python sample.py",
    ]
    assert first == install + " &&\n  ".join(steps) + "\n"
    assert second == f"{install}requirements-dev.txt &&\n  python -m pytest -n 2 --dist worksteal\n"


def test_it_is_short():
    assert len(README.splitlines()) <= 211


def test_it_says_how_long_the_two_files_are():
    for name in ("model.py", "train.py"):
        said = re.search(rf"`{name}` \((\d+)(?: lines)?\)", README)
        assert int(said[1]) == len((ROOT / name).read_text().splitlines()), name


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    text, folder = PAGES[page], (ROOT / page).parent
    for link in re.findall(r'\]\(([^)#]+)|src="([^"]+)"', text):
        link = "".join(link)
        assert link.startswith("https://") or (folder / link).exists(), link
    for name in re.findall(r"`((?:config|data|lab|pretrained|tests)/[\w/.]+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_every_config_is_in_the_table_and_no_other():
    table = README[README.index("| config | layers") :].split("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row)]
    shipped = re.findall(r"`((?:backpack|gpt2)_\w+|shakespeare\w*|simplewiki)`", README)
    for name in {*named, *shipped}:
        assert (ROOT / "config" / f"{name}.py").is_file(), name


def test_tests_and_functions_that_it_names_exist():
    rows = README[README.index("| to change") :].split("\n\n")[0].splitlines()[2:]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        _, _, places, pinned, _ = row.split("|")
        for name in re.findall(r"`(test_\w+)`", pinned):
            assert f"def {name}(" in tests, name
        for name in re.findall(r"`([^`]+)`", places):
            if name.endswith(".py"):
                code = (ROOT / name).read_text()
            elif name.isidentifier() or "." in name:
                last = name.split(".")[-1]
                assert re.search(rf"(def |class ){last}\b|^{last} = ", code, re.M), name


def test_the_output_it_shows_is_the_output(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = 0
    for block in re.findall(r"^```\n(python .*?)^```", README, re.M | re.S):
        command, *lines = block.replace("\\\n", " ").splitlines()
        module, args = script(shlex.split(command))
        module.main([*args, "--device=cpu"])
        printed = capsys.readouterr().out.splitlines()
        for line in lines:
            # numbers may round differently elsewhere
            words = re.sub(r"[-+]?\d+\.\d+", "", line)
            assert words in [re.sub(r"[-+]?\d+\.\d+", "", other) for other in printed], line
            shown += 1
    assert shown > 10


def test_the_prompts_and_answers_are_made(tmp_path):
    """By the lines as they stand, but for the end of the range."""
    made = re.search(r"^python3 -c '(.*)' > numbers.jsonl", README, re.M)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(made[1].replace("30000", "300"))
    (tmp_path / "numbers.jsonl").write_text(printed.getvalue())
    (command,) = [words for words in commands(README) if "--input=numbers.jsonl" in words]
    module, args = script(command)
    args[args.index("--input=numbers.jsonl")] = f"--input={tmp_path / 'numbers.jsonl'}"
    module.main([*args, f"--data_dir={tmp_path}"])
    _, val, meta = load_data(tmp_path / "backwards")
    documents = load_tokenizer(meta["tokenizer"]).decode(val).split("<|endoftext|>")[:-1]
    assert documents
    for document in documents:
        number, answer = document.split(" backwards is ")
        assert answer == number[::-1]


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert "Denver, Texas" in capsys.readouterr().out
    assert 0 < names["loss"].item() < 10
