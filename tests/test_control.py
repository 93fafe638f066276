"""Edits in tensors: each against the equation of the paper, written with loops over numbers."""

import math

import numpy as np
import pytest
import torch

import lab.control
import model as model_file
from configurator import UserError
from lab.control import EditedBackpack, padding_mask, same_sum
from lab.edits import make_edits, parse
from lab.senses import attribution
from model import Backpack, BackpackConfig
from tokenizer import load_tokenizer

CHARS = load_tokenizer({"kind": "char", "chars": "abcdefgh"})
ALL = "swap a: b -> c margin 2; scale a 1 0.5; topic d,e 2; replace f 0 by g 2; topic b 1"
SIZES = {"block_size": 12, "vocab_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_sense": 4}


def tiny(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = BackpackConfig(**SIZES | {"init_std": 0.5} | changes)
    return Backpack(config).to(dtype).eval().requires_grad_(False)


def edited(model, text):
    return EditedBackpack(model, make_edits(model, CHARS, parse(text)))


# ---- vectors


def test_a_sense_at_zero_contributes_exactly_zero():
    model = tiny(torch.float32)
    idx = torch.tensor([[0, 1, 0, 2]])
    before = model.senses(idx)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = edited(model, "scale a 2 0")
    after = other.senses(idx)
    assert (after[0, [0, 2], 2] == 0).all()
    others = torch.ones_like(before, dtype=torch.bool)
    others[0, [0, 2], 2] = False
    assert torch.equal(after[others], before[others])  # bit for bit
    _, parts = attribution(other, idx[0], model.wte.weight[3])
    assert (parts[[0, 2], 2] == 0).all()
    # the model itself is as it was, and both have the same weights
    assert torch.equal(model.senses(idx), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.wte.weight[7] += 1
    assert torch.equal(other.wte.weight, model.wte.weight)


def test_edits_of_other_tokens_leave_logits_bit_for_bit():
    model = tiny(torch.float32)
    idx = torch.tensor([[1, 2, 3, 4, 5]])
    logits, _ = edited(model, "scale a all 0; swap h: b -> c")(idx)
    assert torch.equal(logits, model(idx)[0])


def test_paper_swap_is_the_equation():
    model = tiny()
    C = model.senses(torch.tensor(0))
    a, r = model.wte.weight[2].tolist(), model.wte.weight[1].tolist()
    now = edited(model, "paper_swap a: b -> c").senses(torch.tensor(0))
    for l in range(4):
        phi = sum(x * x for x in a) / sum(x * x for x in r)
        share = sum(c * x for c, x in zip(C[l].tolist(), r)) / sum(x * x for x in r)
        want = [c + share * (x / phi - y) for c, x, y in zip(C[l].tolist(), a, r)]
        assert torch.allclose(now[l], torch.tensor(want, dtype=torch.float64), rtol=1e-12)


def test_swap_exchanges_what_senses_say_and_disturbs_least():
    """Another vector that gives the same two logits makes more difference to the other ones."""
    model = tiny(vocab_size=72)
    E = model.wte.weight
    generator = torch.Generator().manual_seed(0)
    n_changed = 0
    for word in range(3, 8):
        name = CHARS.decode([word])
        C = model.senses(torch.tensor(word))  # (K,D)
        now = edited(model, f"swap {name}: b -> c margin 2").senses(torch.tensor(word))
        said = [float(E[1] @ C[l]) for l in range(4)]
        for l in range(4):
            if said[l] <= 0:
                assert torch.equal(now[l], C[l])
                continue
            n_changed += 1
            to = float(E[2] @ C[l])
            share_of_margin = 2 * said[l] / sum(x for x in said if x > 0)
            assert float(E[2] @ now[l]) == pytest.approx(max(to, said[l] + share_of_margin))
            assert float(E[1] @ now[l]) == pytest.approx(min(said[l], to))
            v = now[l] - C[l]
            for _ in range(20):
                w = torch.randn(16, generator=generator, dtype=torch.float64)
                both = torch.linalg.qr(E[[1, 2]].T).Q  # (D,2)
                w = 0.1 * (w - both @ (both.T @ w))  # it changes neither logit
                assert (E @ (v + w)).var() > (E @ v).var()
    assert 5 < n_changed < 20


def test_a_swap_of_what_no_sense_says_is_refused():
    model = tiny()
    model.wte.weight[1] = 0
    with pytest.raises(UserError, match="no sense of WORD says FROM"):
        edited(model, "swap a: b -> c")


def test_vectors_come_first_each_upon_those_before_and_factors_multiply():
    model = tiny()
    C = model.senses(torch.arange(8))
    text = "scale a 1 0.5; replace a 1 by b 3; replace c 0 by a 1; scale a 1 0.5"
    now = edited(model, text).senses(torch.arange(8))
    assert torch.allclose(now[0, 1], 0.25 * C[1, 3])
    assert torch.allclose(now[2, 0], C[1, 3])
    vector = {"edit": "replace", "word": "a", "sense": 2, "vector": [0.5] * 16}
    edits = make_edits(model, CHARS, [vector])
    assert (EditedBackpack(model, edits).senses(torch.tensor(0))[2] == 0.5).all()


# ---- topics


def test_topic_weights_are_the_papers():
    model = tiny()
    E = model.wte.weight
    edits = make_edits(model, CHARS, parse("topic d,e 2"))
    scores = np.zeros((8, 4))
    for x in range(8):
        C = model.senses(torch.tensor(x))
        for l in range(4):
            says = [sum(float(p) * float(q) for p, q in zip(E[y], C[l])) for y in range(8)]
            scores[x, l] = (says[3] + says[4]) / max(says)
    for x in range(8):
        for l in range(4):
            factors = [(0.6, 1.5), (0.8, 2.2), (0.95, 2.2)]
            above = [factor for q, factor in factors if scores[x, l] >= np.quantile(scores, q)]
            assert edits.w[0, x, l].item() == (above[-1] if above else 1.0)
    assert edits.f.tolist() == [2.2 / 7.5]
    assert len(edits.w.unique()) == 3


def annealed(model, ids):
    """What topics multiply alpha by, for one text: {(sense, i, j): factor}, from the equations."""
    E = model.wte.weight
    C = model.senses(torch.tensor(ids))
    found = {}
    for i in range(len(ids)):
        for j in range(i + 1):
            for l in range(4):
                a = sum(max(0.0, float(E[x] @ C[j, l])) for x in ids[: i + 1])
                factor = 1.0
                for w, f in zip(model.edits.w, model.edits.f):
                    b = (1 + j / 100) / (1 + math.exp(f * a - 6))
                    factor *= b * float(w[ids[j], l]) + 1 - b
                found[l, i, j] = factor
    return found


def test_annealing_is_the_papers_and_the_sum_has_it():
    base = tiny()
    model = edited(base, ALL)
    ids = [0, 3, 1, 5, 0, 7]
    alpha = base.contextualization(torch.tensor([ids]))[0]
    C = model.senses(torch.tensor(ids))
    factors = annealed(model, ids)
    logits, _ = model(torch.tensor([ids]))
    for i in range(6):
        o = torch.zeros(16, dtype=torch.float64)
        for j in range(i + 1):
            for l in range(4):
                o += factors[l, i, j] * alpha[l, i, j] * C[j, l]
        assert torch.allclose(logits[0, i], model.wte.weight @ o, rtol=1e-10)
    assert max(factors.values()) > 1.2
    assert len({round(factor, 3) for factor in factors.values()}) > 10


def test_focus_keeps_the_sum_of_the_weights():
    """Strength 4: the highest hundredth of senses gets more weight, all others so much less."""
    base = tiny()
    idx = torch.tensor([[0, 3, 1, 5, 0, 7]])
    model = edited(base, "topic d,e 4; topic a 4")
    w = model.edits.w  # (2,V,K)
    assert set(w.unique().tolist()) == {1.0, 12.0}
    assert (w == 12).flatten(1).sum(1).tolist() == [1, 1]
    want = base.contextualization(idx)[0] * (w[0] * w[1])[idx[0]].T[:, None]  # (K,T,T)
    for i in range(6):
        want[:, i] *= 4 / want[:, i].sum()
    assert torch.allclose(model.contextualization(idx)[0], want)


# ---- caches, padding, and the sum that is written twice


@pytest.mark.parametrize("text", ["swap a: b -> c; scale d all 0; scale e all 3", ALL])
@pytest.mark.parametrize("with_table", [True, False])
def test_generation_with_edits_is_recomputation(text, with_table):
    """Cached, in a batch, and beyond block_size; against a full pass for each token of each text."""
    model = edited(tiny(), text)
    idx = torch.tensor([[0, 1, 2, 3, 5], [0, 0, 0, 6, 4]])
    table = model.sense_table() if with_table else None
    batch = model.generate(idx, 16, temperature=0, sense_table=table)
    for row, ids in zip(batch, idx.tolist()):
        window = list(ids)
        for _ in range(16):
            if len(window) > 12:
                window = window[-6:]
            new = model(torch.tensor([window]))[0][0, -1].argmax().item()
            window.append(new)
            ids.append(new)
        assert row.tolist() == ids
    assert not torch.equal(batch, tiny().generate(idx, 16, temperature=0))


@pytest.mark.parametrize("text", ["", ALL, "topic d 4"])
def test_padding_changes_nothing(text):
    """Left and right of texts."""
    model = edited(tiny(), text)
    texts = [[0, 1, 2, 3, 5, 1], [6, 4], [7, 0, 2]]
    pads = [(0, 0), (4, 0), (1, 2)]  # left and right
    rows = [[0] * left + ids + [0] * right for ids, (left, right) in zip(texts, pads)]
    real = [[0] * left + [1] * len(ids) + [0] * right for ids, (left, right) in zip(texts, pads)]
    idx = torch.tensor(rows)
    real = torch.tensor(real)
    mask, pos = padding_mask(real, 6)
    whole = model.logits(model.output(idx, mask=mask, pos=pos))  # (B,T,V)
    for ids, logits, (left, _) in zip(texts, whole, pads):
        alone, _ = model(torch.tensor([ids]))
        assert torch.allclose(logits[left : left + len(ids)], alone[0])


def test_a_fork_that_sums_otherwise_is_noticed(monkeypatch):
    assert same_sum(tiny(n_sense=0))
    model = tiny()
    assert same_sum(model)
    lab.control.sense_peaks.cache_clear()
    ours = model_file.sum_senses
    monkeypatch.setattr(model_file, "sum_senses", lambda *args: 1.01 * ours(*args))
    assert not same_sum(model)
    make_edits(model, CHARS, parse("scale a 1 0"))  # which is Backpack.forward as it is
    with pytest.raises(UserError, match="this model.py does not sum senses as EditedBackpack.output"):
        make_edits(model, CHARS, parse("topic a 1"))
