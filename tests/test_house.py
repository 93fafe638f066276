"""What may be taken away: model.py works alone, the root works without lab/ and without wandb."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, lines

from model import Backpack

ROOT_FILES = sorted(ROOT.glob("*.py"))
OPTIONAL = ["wandb", "datasets", "tokenizers"]  # packages that requirements.txt doesn't have


def call(folder, *args, path=""):
    """Run Python in this folder as a user would, with nothing of the project on its path."""
    command = [sys.executable, *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def checked(folder, *args, path=""):
    """The output of a call that must succeed."""
    done = call(folder, *args, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(nodes):
    """The names of the top-level packages that these statements, and those within them, import."""
    names = set()
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Import):
                names |= {alias.name.split(".")[0] for alias in part.names}
            elif isinstance(part, ast.ImportFrom):
                names.add(part.module.split(".")[0])
    return names


def statements(path):
    return ast.parse(path.read_text()).body


def test_who_imports_what():
    """model.py torch alone; lab is for edits in sample.py, and for a tokenizer.json in prepare_data.py."""
    names = imported(statements(ROOT / "model.py"))
    assert names - set(sys.stdlib_module_names) == {"torch"}
    for path in ROOT_FILES:
        at_once = [node for node in statements(path) if not isinstance(node, ast.FunctionDef)]
        assert not imported(at_once) & {"lab", *OPTIONAL}, path
        assert ("lab" in imported(statements(path))) == (path.name in ("sample.py", "prepare_data.py")), path
        if path.name in ("configurator.py", "prepare_data.py", "tokenizer.py"):
            assert "torch" not in imported(at_once)  # it takes seconds


def test_a_tool_that_is_run_as_a_file_says_how_to_run_it():
    done = call(ROOT, "lab/curves.py", "out/a")
    assert done.returncode == 1
    said = "lab/curves.py is run from the root of the repository, as: python -m lab.curves\n"
    assert done.stderr == said
    # of all tools: lab/configurator.py answers if nothing else of the root is asked for before it
    for path in sorted((ROOT / "lab").glob("*.py")):
        if "__main__" in path.read_text():
            names = [name for node in statements(path) for name in imported([node])]
            own = [name for name in names if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()]
            assert own[0] == "configurator", path


# ---- model.py alone

ALONE = """
import sys
import torch
import model

net = model.Backpack.from_checkpoint(sys.argv[1])
idx = torch.arange(8)[None]
torch.save((net(idx)[0], net.generate(idx, 20, temperature=0)), "out.pt")
optimizer = torch.optim.AdamW(net.param_groups(0.1), lr=1e-2)
losses = []
for _ in range(60):
    _, loss = net(idx, idx + 1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 1, losses
"""


def test_model_alone(run_train, tmp_path):
    """In an empty folder it loads a run of train.py, with the same logits, generates, and trains."""
    run = run_train("--max_iters=4")
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "model.py", folder)
    (folder / "alone.py").write_text(ALONE)
    checked(folder, "alone.py", run)
    logits, tokens = torch.load(folder / "out.pt")
    model = Backpack.from_checkpoint(run)
    idx = torch.arange(8)[None]
    assert torch.equal(logits, model(idx)[0])
    assert torch.equal(tokens, model.generate(idx, 20, temperature=0))


# ---- the root without lab/ and without optional packages


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """(folder, blocker): the root without lab/, with the tiny dataset and a run, made there.

    With blocker on PYTHONPATH, as it was then, Python takes optional packages for missing.
    """
    folder = tmp_path_factory.mktemp("copy")
    blocker = tmp_path_factory.mktemp("blocker")
    blocked = "".join(f'sys.modules["{name}"] = None\n' for name in OPTIONAL)
    (blocker / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    for path in ROOT_FILES:
        shutil.copy(path, folder)
    (folder / "text.txt").write_text("\n\n".join(lines(200)))
    data = ["--dataset=mine", "--input=text.txt", "--tokenizer=char", "--documents=blank_line"]
    checked(folder, "prepare_data.py", *data, path=blocker)
    checked(folder, "train.py", *TINY, "--dataset=mine", "--out_dir=out/mine", path=blocker)
    return folder, blocker


def test_the_root_works_alone(copy):
    folder, blocker = copy
    assert not (folder / "lab").exists()
    args = ["--start=document 1", "--num_samples=1", "--max_new_tokens=20", "--device=cpu"]
    out = checked(folder, "sample.py", *args, path=blocker)
    assert out.startswith("--- out/mine, step 12, sample 1 of 1\ndocument 1")


@pytest.mark.parametrize(
    "command, message",
    [
        ("sample.py --edit=scale", "edits need the folder lab/ of the repository"),
        ("train.py --dataset=mine --max_iters=9999 --wandb", "pip install wandb"),
        (
            "prepare_data.py --dataset=words --input=text.txt --tokenizer=bpe",
            "learning a bpe needs the package 'tokenizers'",
        ),
    ],
)
def test_what_is_missing_is_one_line(copy, command, message):
    folder, blocker = copy
    script, *args = command.split()
    done = call(folder, script, *args, path=blocker)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{script}: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
