"""README.md and lab/README.md: their commands, names, links, outputs and Python example are true."""

import importlib
import re
import shlex

import pytest
import torch
from conftest import ROOT

import train
from configurator import configure
from hardware import flops_per_token
from model import Backpack, BackpackConfig

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
    return importlib.import_module(words[at].removesuffix(".py")), words[at + 1 :]


ALL = [
    pytest.param(words, id=" ".join(words)) for text in PAGES.values() for words in commands(text)
]


@pytest.mark.parametrize("words", ALL)
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # they name config files
    module, args = script(words)
    if args != ["--help"]:
        values, _ = configure(module.Settings, args)
        for name in ("run", "source"):
            path = getattr(values, name, None) or ""
            assert not path.startswith("pretrained/") or (ROOT / path / "ckpt.pt").is_file()


def test_the_first_lines_are_the_two_commands():
    assert len(commands(README)) > 15
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r"
    first, second = re.findall(r"^python3 .*", README, re.M)
    assert first.startswith(f"{install} requirements.txt && python prepare_data.py && ")
    # .ci/run takes the first line that has this name
    assert second == f"{install} requirements-dev.txt && python -m pytest -n 2 --dist loadfile"
    assert re.search(r".*requirements-dev\.txt.*", README)[0] == second


def test_it_is_short():
    assert len(README.splitlines()) <= 235


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
        for place in places.split(";"):
            file, *names = re.findall(r"`([^`]+)`", place)
            code = (ROOT / file).read_text()
            for name in names:
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


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert "Denver, Texas" in capsys.readouterr().out
    assert 0 < names["loss"].item() < 10


def test_hours_and_speeds_are_the_flops_at_two_fifths_of_the_peak():
    """A fifth of the tokens distinct, as in 64 sequences of simplewiki in GPT-2's BPE; peaks in TFLOP/s."""
    rows = re.findall(r"^\| (`(?:backpack|gpt2)_.*?) \|.*\| ([\d, ]+) \|.*\|$", README, re.M)
    shown = [
        pair
        for names, hours in rows
        for pair in zip(re.findall(r"`(\w+)`", names), hours.split(", "))
    ]
    for name, hours in shown:
        path = ROOT / f"config/{name}.py"
        s, _ = configure(train.Settings, [str(path)], "")
        s.vocab_size = 50257
        with torch.device("meta"):
            model = Backpack(BackpackConfig(**{key: getattr(s, key) for key in train.MODEL_KEYS}))
        speeds = [0.4e12 * peak / sum(flops_per_token(model, 0.2).values()) for peak in (312, 989)]
        want = s.max_iters * s.tokens_per_step / speeds[0] / 3600
        assert float(hours.replace(",", "")) == pytest.approx(want, rel=0.03), name
        if name == "backpack_from_gpt2":
            continue
        said = r"At 40% of the peak an H100 trains ([\d,]+) tokens/s, an A100 ([\d,]+)\."
        h100, a100 = re.search(said, path.read_text().replace("\n# ", " ")).groups()
        for speed, figure in zip(speeds, (a100, h100)):
            assert float(figure.replace(",", "")) == pytest.approx(speed, rel=0.03), name
    assert len(shown) == 10
