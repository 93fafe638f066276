"""The sum of senses beside two other implementations, with slots of equal tokens and without."""

import math

import pytest
import torch
from torch.nn import functional as F

from model import contextualize, sum_senses, weigh


def dense_sum(q, k, C, where):
    """As the paper writes it: (B,K,T,T) weights, a (B,K,T,D) product, a sum over senses."""
    T = q.size(2)
    future = torch.ones(T, T).triu(1).bool()
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(3))).masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ C[where].transpose(1, 2)).sum(1)


def attention_sum(q, k, C, where):
    """As flash kernels could do it: attention whose values are senses, cut to the width of a query."""
    (B, K, _, d), D = q.shape, C.size(-1)
    values = F.pad(C[where], (0, -D % d)).unflatten(-1, (-1, d))  # (B,T,K,D/d,d)
    values = values.permute(0, 2, 3, 1, 4)  # (B,K,D/d,T,d)
    q, k = (x[:, :, None].expand(-1, -1, values.size(2), -1, -1) for x in (q, k))
    heads = [x.flatten(0, 1) for x in (q, k, values)]
    y = F.scaled_dot_product_attention(*heads, is_causal=True)
    return y.unflatten(0, (B, K)).sum(1).transpose(1, 2).flatten(2)[..., :D]  # (B,T,D)


@pytest.fixture(params=["slots", "each position"])
def way(request, monkeypatch):
    """Both ways: equal tokens share a slot, as on an eager CPU; or not, as compiled and on a GPU."""
    compiling = request.param != "slots"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)


def check(other, B, K, T, d, D, U, dtype, tolerance):
    torch.manual_seed(0)
    where = torch.arange(B * T).view(B, T) if U == B * T else torch.randint(U, (B, T))
    shapes = (B, K, T, d), (B, K, T, d), (U, K, D)
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    do, results = torch.randn(B, T, D, dtype=torch.float64), []
    for function, kind in ((other, torch.float64), (sum_senses, dtype)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        o = function(*leaves, where)
        o.backward(do.to(kind))
        results.append([o, *(x.grad for x in leaves)])
    for want, got in zip(*results):
        assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())  # some are 0


# B, K, T, d, D, distinct tokens
SHAPES = [
    (2, 3, 150, 5, 7, 20),
    (3, 1, 64, 8, 8, 1),
    (1, 4, 1, 2, 6, 1),
    (5, 2, 65, 3, 4, 325),
    (1, 16, 129, 2, 3, 30),
    (3, 2, 257, 4, 4, 500),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_sum_is_the_dense_sum(way, shape, dtype, tolerance):
    check(dense_sum, *shape, dtype, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_attention_whose_values_are_senses(way, shape):
    check(attention_sum, *shape, torch.float32, 1e-5)


def test_the_block_changes_nothing(way):
    torch.manual_seed(0)
    q, k, C = torch.randn(2, 3, 50, 4), torch.randn(2, 3, 50, 4), torch.randn(9, 3, 5)
    where = torch.randint(9, (2, 50))
    whole = weigh(contextualize(q, k), C[where])
    for block in (1, 7, 25, 50, 99):
        assert torch.allclose(sum_senses(q, k, C, where, block), whole, atol=1e-5)


def test_queries_of_the_last_positions_see_the_keys_before():
    """As in generation: T queries after S - T cached positions, with and without padding."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    alpha = contextualize(q, k)
    for T in (1, 4, 9):
        assert torch.allclose(contextualize(q[:, :, 9 - T :], k), alpha[:, :, 9 - T :])
    mask = torch.ones(9, 9).tril().bool().expand(2, 1, 9, 9).clone()
    assert torch.allclose(contextualize(q, k, mask), alpha)
    mask[0, 0, 1:, 0] = False
    assert not contextualize(q, k, mask)[0, :, 1:, 0].any()


def test_no_weights_of_all_pairs_are_kept_for_backward():
    q, k = (torch.randn(2, 4, 512, 8, requires_grad=True) for _ in range(2))
    C, kept = torch.randn(40, 4, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sum_senses(q, k, C, torch.randint(40, (2, 512)))
    assert max(t.numel() for t in kept) < 2 * 4 * 512 * 512 / 4
