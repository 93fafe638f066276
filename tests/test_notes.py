"""Patches that lab/notes has still apply, and do what they say."""

import importlib.util
import re
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the patch")
def test_distillation(tmp_path):
    """Loss and gradients are those of torch's cross-entropy with half of the teacher's probabilities."""
    note = (ROOT / "lab/notes/distillation.md").read_text()
    patch = re.search(r"^```diff\n(.*?)^```$", note, re.M | re.S)[1]
    assert len(re.findall(r"^\+[^+]", patch, re.M)) <= 25
    for name in ("model.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("patched", tmp_path / "model.py")
    patched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patched)

    torch.manual_seed(0)
    sizes = {"block_size": 300, "vocab_size": 61, "n_layer": 1, "n_head": 2, "init_std": 0.4}
    student = patched.Backpack(patched.BackpackConfig(**sizes, n_embd=24, n_sense=3))
    teacher = patched.Backpack(patched.BackpackConfig(**sizes, n_embd=16, n_sense=0)).requires_grad_(False)
    x = torch.randint(61, (2, 300))  # more rows than a chunk of the loss has
    y = x.roll(-1, 1)
    y[0, :20] = -100
    q = teacher(x)[0][y >= 0].softmax(-1)
    o = teacher.hidden(x).flatten(0, 1)
    _, loss = student(x, y, teacher=(o, teacher.wte.weight))
    logits = student(x)[0][y >= 0]
    want = (F.cross_entropy(logits, y[y >= 0]) + F.cross_entropy(logits, q)) / 2
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    parameters = [*student.parameters()]
    grads = torch.autograd.grad(loss, parameters)
    for got, expected in zip(grads, torch.autograd.grad(want, parameters)):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
