"""What may be taken away: model.py works alone, the root works without lab/ and without wandb."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, lines

ROOT_FILES = [*sorted(ROOT.glob("*.py")), ROOT / "data/corpora.py"]


def call(folder, *args, path=None):
    """Run Python in this folder as a user would, with nothing of the project on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def checked(folder, *args, path=None):
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
                names.add((part.module or "").split(".")[0])
    return names


def imported_by_module(path):
    """What a file imports when it is imported itself: not what its functions import when called."""
    body = ast.parse(path.read_text()).body
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return imported(node for node in body if not isinstance(node, functions))


# ---- model.py alone

ALONE = """
import sys
import torch
import model

root, checkpoint = sys.argv[1:]
assert root not in sys.path and root + "/tests" not in sys.path, sys.path
config = model.BackpackConfig(16, 50, n_layer=1, n_head=2, n_embd=16, n_sense=4, init_std=0.2)
torch.manual_seed(0)
net = model.Backpack(config)
optimizer = torch.optim.AdamW(net.param_groups(0.1), lr=1e-2)
tokens = torch.randint(50, (4, 17))
losses = []
for _ in range(60):
    _, loss = net(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 1, losses
assert net.generate(tokens[:1, :4], 30, top_k=5).shape == (1, 34)

net = model.Backpack.from_checkpoint(checkpoint)
idx = torch.arange(8)[None]
torch.save((net(idx)[0], net.generate(idx, 20, temperature=0)), "out.pt")
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
of_project = [f for f in files if f.startswith(root) and "site-packages" not in f]
assert not of_project, of_project
"""


def test_model_alone(run_train, tmp_path):
    """In an empty folder it trains, generates, and loads a run of train.py, with the same logits."""
    import torch

    from model import Backpack

    run, folder = run_train(), tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "model.py", folder)
    (folder / "alone.py").write_text(ALONE)
    checked(folder, "alone.py", ROOT, run)
    logits, tokens = torch.load(folder / "out.pt")
    model, idx = Backpack.from_checkpoint(run), torch.arange(8)[None]
    assert torch.equal(logits, model(idx)[0])
    assert torch.equal(tokens, model.generate(idx, 20, temperature=0))


def test_model_imports_torch_only():
    names = imported([ast.parse((ROOT / "model.py").read_text())])
    assert names - set(sys.stdlib_module_names) == {"torch"}


# ---- without lab/, without wandb


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The root without lab/, with the tiny dataset and a run, all made there without wandb.

    Returns (folder, blocker): blocker on PYTHONPATH makes Python behave as if wandb were not installed.
    """
    folder, blocker = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("blocker")
    (blocker / "sitecustomize.py").write_text('import sys\n\nsys.modules["wandb"] = None\n')
    for path in ROOT_FILES:
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / "text.txt").write_text("\n\n".join(lines(200)))
    data = ["--dataset=mine", "--input=text.txt", "--tokenizer=char"]
    data += ["--documents=blank_line", "--val_fraction=0.1"]
    checked(folder, "prepare_data.py", *data, "--num_proc=2", path=blocker)
    out = checked(folder, "train.py", *TINY, "--dataset=mine", "--out_dir=out/mine", path=blocker)
    assert "step 12/12" in out
    return folder, blocker


def test_the_root_works_without_lab(copy):
    folder, blocker = copy
    assert not (folder / "lab").exists()
    assert {path.name for path in (folder / "out/mine").iterdir()} >= {"ckpt.pt", "metrics.jsonl"}
    args = ["--start=document 1", "--num_samples=1", "--max_new_tokens=20", "--device=cpu"]
    out = checked(folder, "sample.py", *args, path=blocker)
    assert out.startswith("--- sample 1 of 1\ndocument 1")


@pytest.mark.parametrize("arg", ["--edit=scale z 0 0"])
def test_edits_without_lab_are_one_clear_line(copy, arg):
    done = call(copy[0], "sample.py", "--run=out/mine", "--device=cpu", arg)
    assert done.returncode == 1 and done.stdout == ""
    message = "edits need the folder lab/ of the repository, which is missing"
    assert done.stderr == f"sample.py: {message}\n"


def test_only_wandb_true_needs_wandb(copy):
    """The copy was made and sampled without it; asking for it is one line that says what to do."""
    folder, blocker = copy
    args = [*TINY, "--dataset=mine", "--out_dir=out/logged", "--wandb"]
    done = call(folder, "train.py", *args, path=blocker)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "wandb=True, but the package is not installed: pip install wandb" in done.stderr
    for path in [*ROOT_FILES, *(ROOT / "lab").rglob("*.py")]:
        assert "wandb" not in imported_by_module(path), path


def test_the_root_does_not_import_lab():
    """Only sample.py does, when edits are given."""
    for path in ROOT_FILES:
        assert "lab" not in imported_by_module(path), path
        uses_lab = "lab" in imported([ast.parse(path.read_text())])
        assert uses_lab == (path.name == "sample.py"), path
