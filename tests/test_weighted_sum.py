import math

import pytest
import torch
from torch.nn import functional as F

from weighted_sum import groups, slots, weighted_sum


def dense_sum(q, k, senses, where):
    """As the paper writes it: (B,K,T,T) weights, a (B,K,T,D) product, a sum over senses."""
    T = q.size(2)
    scores = (q @ k.transpose(2, 3)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ senses[where].unflatten(-1, (q.size(1), -1)).transpose(1, 2)).sum(1)


def attention_sum(q, k, senses, where):
    """As flash kernels could do it: attention whose values are senses, cut into pieces as wide as query and key."""
    B, K, T, d = q.shape
    C = F.pad(senses[where].unflatten(-1, (K, -1)), (0, -(senses.size(1) // K) % d))               # (B,T,K,D)
    C = C.unflatten(-1, (-1, d)).permute(0, 2, 3, 1, 4)                                            # (B,K,D/d,T,d)
    q, k = (x[:, :, None].expand(-1, -1, C.size(2), -1, -1) for x in (q, k))
    y = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, C)), is_causal=True, scale=1.0)
    return y.unflatten(0, (B, K)).sum(1).transpose(1, 2).flatten(2)[..., : senses.size(1) // K]    # (B,T,D)


@pytest.fixture(params=["merged", "each position"])
def way(request, monkeypatch):
    """Both ways of groups: equal tokens in one slot, as on a CPU; a slot for each position, as compiled or on a GPU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param != "merged")
    return request.param


def check(other, B, K, T, d, D, U, dtype, tolerance):
    torch.manual_seed(0)
    where = torch.arange(B * T).view(B, T) if U == B * T else torch.randint(U, (B, T))
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((B, K, T, d), (B, K, T, d), (U, K * D))]
    do, results = torch.randn(B, T, D, dtype=torch.float64), []
    for function, kind in ((other, torch.float64), (weighted_sum, dtype)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        o = function(*leaves, where)
        o.backward(do.to(kind))
        results.append([o, *(x.grad for x in leaves)])
    for want, got in zip(*results):
        assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())  # some gradients are 0


SHAPES = [(2, 3, 150, 5, 7, 20), (3, 1, 64, 8, 8, 1), (1, 4, 1, 2, 6, 1), (5, 2, 65, 3, 4, 325), (1, 16, 129, 2, 3, 30),
          (3, 2, 257, 4, 4, 500)]  # B, K, T, d, D, distinct tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_sum_is_the_dense_sum(way, shape, dtype, tolerance):
    check(dense_sum, *shape, dtype, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_attention_whose_values_are_senses(way, shape):
    check(attention_sum, *shape, torch.float32, 1e-5)


def test_groups_of_sequences_change_nothing(way):
    """With long sequences or wide senses a group has fewer sequences, here 4 and 1."""
    torch.manual_seed(0)
    q, k, senses = torch.randn(5, 2, 8, 3), torch.randn(5, 2, 8, 3), torch.randn(9, 2**17)
    where = torch.randint(9, (5, 8))
    found = list(groups(q, k, senses, where))
    assert [len(rows) for _, rows, _, _ in found] == [4, 1]
    used = max(len(row.unique()) for row in where[:4])
    assert found[0][2].shape == (4, used if way == "merged" else 8, 2, 2**16)
    assert torch.allclose(weighted_sum(q, k, senses, where), dense_sum(q, k, senses, where), atol=1e-5)


def test_slots_come_in_order_of_appearance():
    where = torch.tensor([[7, 3, 7, 7, 5], [1, 1, 1, 1, 1]])
    rows, slot, used = slots(where)
    assert rows[0].tolist() == [7, 3, 5] and rows[1, 0] == 1 and used == [3]
    assert slot.tolist() == [[0, 1, 0, 0, 2], [0] * 5] and torch.equal(rows.gather(1, slot), where)
    long = torch.cat((torch.zeros(1, 128), torch.arange(200)[None]), 1).long()
    assert slots(long)[2] == [1, 128, 200]
