"""lab/notes/small_runs.py: its figures against loops and against models whose figures are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lab.notes import small_runs
from model import Backpack, BackpackConfig
from tokenizer import load_tokenizer

DATA = np.random.default_rng(0).integers(40, size=2000).astype("<u2")


def build(**changes):
    torch.manual_seed(0)
    return Backpack(
        BackpackConfig(
            **{
                "block_size": 8,
                "vocab_size": 40,
                "n_layer": 1,
                "n_head": 1,
                "n_embd": 16,
                "n_sense": 4,
                "init_std": 0.5,
            }
            | changes
        )
    ).eval()


def test_inside_is_what_a_loop_finds():
    model, batch = build(), small_runs.windows(DATA, 5, 8)
    found, (logits, _) = small_runs.inside(model, batch), model(batch[:, :-1])
    alpha, C = model.contextualization(batch[:, :-1]), model.senses(batch[:, :-1])
    for t in range(8):
        assert found["loss"][t].item() == pytest.approx(
            F.cross_entropy(logits[:, t], batch[:, t + 1]).item(), rel=1e-5
        )
    for k in range(4):
        entropies = [
            -sum(a * np.log(a) for a in alpha[b, k, i, : i + 1].tolist())
            for b in range(5)
            for i in range(8)
        ]
        assert found["sight"][k].item() == pytest.approx(np.exp(np.mean(entropies)), rel=1e-5)
        shares = []
        for b in range(5):
            for i in range(8):
                norms = [
                    sum(alpha[b, m, i, j] * C[b, j, m] for j in range(i + 1)).norm().item()
                    for m in range(4)
                ]
                shares.append(norms[k] / sum(norms))
        assert found["use"][k].item() == pytest.approx(np.mean(shares), rel=1e-5)
        assert found["norm"][k].item() == pytest.approx(
            C[:, :, k].norm(dim=-1).mean().item(), rel=1e-5
        )


def test_rank_and_probe_of_known_features(monkeypatch):
    model, batch = build(n_sense=0), small_runs.windows(DATA, 300, 8)

    def features(idx):
        return (
            6 * torch.eye(40)[idx + 1] if rich else torch.randn(*idx.shape, 1) * torch.ones(40)
        ), None

    rich = True
    monkeypatch.setattr(model, "hidden", features)
    cycle = (torch.arange(9) + torch.arange(300)[:, None]) % 39
    assert small_runs.rank(model, cycle) == pytest.approx(39, rel=0.05)
    assert small_runs.probe(model, cycle, cycle) < 0.5  # h names the next token
    rich = False
    assert small_runs.rank(model, batch) == pytest.approx(1)
    assert small_runs.probe(model, batch, batch) > 3.5  # about ln 40


def test_readability_of_senses_that_are_known(tmp_path, monkeypatch):
    model = build()
    (tmp_path / "d").mkdir()
    DATA.tofile(tmp_path / "d/train.bin")
    DATA.tofile(tmp_path / "d/val.bin")
    tokenizer = load_tokenizer({"kind": "char", "chars": "".join(map(chr, range(48, 88)))})
    meta = {"dtype": "uint16", "vocab_size": 40, "tokenizer": tokenizer.spec}
    counts = {"train_tokens": len(DATA), "val_tokens": len(DATA)}
    (tmp_path / "d/meta.json").write_text(json.dumps(meta | counts))
    ckpt = {"settings": {"dataset": "d"}, "meta": meta}
    opened = SimpleNamespace(path=tmp_path, model=model, tokenizer=tokenizer, ckpt=ckpt)
    monkeypatch.setattr(small_runs, "open_run", lambda run, device: opened)
    for same, apart, cosine in ((False, 1.0, 0.0), (True, 0.0, 1.0)):
        with torch.no_grad():
            model.wte.weight.copy_(
                torch.eye(16).repeat_interleave(3, 0)[:40]
            )  # token i lies along axis i // 3
        axes = torch.eye(16)[torch.zeros(4, dtype=int) if same else torch.arange(4)]
        monkeypatch.setattr(model, "senses", lambda ids, axes=axes: axes.expand(len(ids), 4, 16))
        got = small_runs.readability("run", tmp_path, n=30, top=3)
        assert got[:2] == (pytest.approx(apart), pytest.approx(cosine))
        assert sorted(got[2][0].split(": ")[1].split(" | ")[0].split()) == ["0", "1", "2"]


def test_the_figures_are_drawn(tmp_path):
    found = {
        name: small_runs.figures([(0, model), (10, model)], DATA, DATA)
        for name, model in (("Transformer", build(n_sense=0)), ("Backpack", build()))
    }
    assert found["Backpack"]["sight"][1][1].shape == (4,) and "sight" not in found["Transformer"]
    small_runs.draw(found, tmp_path / "x.svg")
    assert "effective rank of h" in (tmp_path / "x.svg").read_text()
