"""lab/notes/small_runs.py: its figures against loops and against models whose figures are known."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lab.notes import small_runs
from model import Backpack, BackpackConfig
from tokenizer import load_tokenizer

DATA = np.random.default_rng(0).integers(40, size=2000).astype("<u2")


def build(n_sense):
    torch.manual_seed(0)
    sizes = {"block_size": 8, "vocab_size": 40, "n_layer": 1, "n_head": 1, "n_embd": 16}
    return Backpack(BackpackConfig(**sizes, n_sense=n_sense, init_std=0.5)).eval()


@torch.no_grad()
def test_inside_is_what_a_loop_finds():
    model = build(n_sense=4)
    batch = small_runs.windows(DATA, 5, 8)
    found = small_runs.inside(model, batch)
    x = batch[:, :-1]
    logits, _ = model(x)
    alpha = model.contextualization(x)
    C = model.senses(x)
    for t in range(8):
        assert found["loss"][t].item() == pytest.approx(
            F.cross_entropy(logits[:, t], batch[:, t + 1]).item(), rel=1e-5
        )
    for k in range(4):
        entropies = []
        shares = []
        for b in range(5):
            for i in range(8):
                weights = alpha[b, k, i, : i + 1].tolist()
                entropies.append(-sum(a * math.log(a) for a in weights))
                parts = [sum(alpha[b, m, i, j] * C[b, j, m] for j in range(i + 1)) for m in range(4)]
                norms = [part.norm().item() for part in parts]
                shares.append(norms[k] / sum(norms))
        assert found["sight"][k].item() == pytest.approx(math.exp(np.mean(entropies)), rel=1e-5)
        assert found["use"][k].item() == pytest.approx(np.mean(shares), rel=1e-5)
        norms = [C[b, j, k].norm().item() for b in range(5) for j in range(8)]
        assert found["norm"][k].item() == pytest.approx(np.mean(norms), rel=1e-5)


def test_rank_and_probe_of_known_features(monkeypatch):
    model = build(n_sense=0)
    cycle = (torch.arange(9) + torch.arange(300)[:, None]) % 39
    monkeypatch.setattr(model, "hidden", lambda idx: 6 * torch.eye(40)[idx + 1])
    assert small_runs.rank(model, cycle) == pytest.approx(39, rel=0.05)
    assert small_runs.probe(model, cycle, cycle) < 0.5  # h names the next token
    batch = small_runs.windows(DATA, 300, 8)
    monkeypatch.setattr(model, "hidden", lambda idx: torch.randn(*idx.shape, 1).expand(-1, -1, 40))
    assert small_runs.rank(model, batch) == pytest.approx(1)
    assert small_runs.probe(model, batch, batch) > 3.5  # about ln 40


@pytest.mark.parametrize("alike", [False, True])
def test_readability_of_senses_that_are_known(monkeypatch, alike):
    model = build(n_sense=4)
    with torch.no_grad():
        # token i lies along axis i // 3
        model.wte.weight.copy_(torch.eye(16).repeat_interleave(3, 0)[:40])
    axes = torch.eye(16)[:4]
    if alike:
        axes = axes[:1].expand(4, 16)
    monkeypatch.setattr(model, "senses", lambda ids: axes.expand(len(ids), 4, 16))
    tokenizer = load_tokenizer({"kind": "char", "chars": "".join(map(chr, range(48, 88)))})
    opened = SimpleNamespace(model=model, tokenizer=tokenizer)
    monkeypatch.setattr(small_runs, "open_run", lambda run, device: opened)
    monkeypatch.setattr(small_runs, "validation_tokens", lambda r, dataset, data_dir: DATA)
    apart, cosine, words = small_runs.readability("run", "data", n=30, top=3)
    assert apart == pytest.approx(0.0 if alike else 1.0)
    assert cosine == pytest.approx(1.0 if alike else 0.0)
    first = words[0].split(": ")[1].split(" | ")[0]
    assert sorted(first.split()) == ["0", "1", "2"]


def test_the_figures_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(small_runs, "probe", partial(small_runs.probe, steps=5))
    found = {}
    for name, n_sense in (("Transformer", 0), ("Backpack", 4)):
        model = build(n_sense)
        found[name] = small_runs.figures([(0, model), (10, model)], DATA, DATA)
    assert found["Backpack"]["sight"][1][1].shape == (4,)
    assert "sight" not in found["Transformer"]
    small_runs.draw(found, tmp_path / "x.svg")
    picture = (tmp_path / "x.svg").read_text()
    assert "effective rank of h" in picture
    assert "mathdefault" not in picture  # the numbers at the axes are plain
