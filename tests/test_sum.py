"""The sum of senses beside two other implementations: the paper's dense one, and attention."""

import math

import pytest
import torch
from torch.nn import functional as F

from model import contextualize, sum_senses


def dense_sum(q, k, C, where):
    """As the paper writes it: (B,K,T,T) weights, a (B,K,T,D) product, a sum over senses."""
    T = q.size(2)
    future = torch.ones(T, T).triu(1).bool()
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(3))).masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ C[where].transpose(1, 2)).sum(1)


def attention_sum(q, k, C, where):
    """As flash kernels could do it: attention whose values are senses, cut to the width of a query."""
    B, K, _, d = q.shape
    D = C.size(-1)
    values = F.pad(C[where], (0, -D % d)).unflatten(-1, (-1, d))  # (B,T,K,D/d,d)
    values = values.permute(0, 2, 3, 1, 4)  # (B,K,D/d,T,d)
    q = q[:, :, None].expand(-1, -1, values.size(2), -1, -1)
    k = k[:, :, None].expand(-1, -1, values.size(2), -1, -1)
    heads = [x.flatten(0, 1) for x in (q, k, values)]
    y = F.scaled_dot_product_attention(*heads, is_causal=True)
    return y.unflatten(0, (B, K)).sum(1).transpose(1, 2).flatten(2)[..., :D]  # (B,T,D)


def outputs_and_gradients(function, inputs, where, do):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = function(*leaves, where)
    o.backward(do)
    return [o, *[x.grad for x in leaves]]


# B, K, T, d, D, distinct tokens; a block on a CPU has 128 queries
SHAPES = [
    (2, 3, 150, 5, 7, 20),
    (3, 1, 64, 8, 8, 1),
    (1, 4, 1, 2, 6, 1),
    (1, 16, 129, 2, 3, 30),
    (3, 2, 257, 4, 4, 500),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", [dense_sum, attention_sum])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_sum_is_that_of_others(shape, other, dtype, tolerance):
    """Its gradients, too."""
    B, K, T, d, D, U = shape
    torch.manual_seed(0)
    where = torch.randint(U, (B, T))
    shapes = (B, K, T, d), (B, K, T, d), (U, K, D)
    inputs = [torch.randn(*size, dtype=dtype) for size in shapes]
    do = torch.randn(B, T, D, dtype=dtype)
    exact = [x.double() for x in inputs]
    want = outputs_and_gradients(other, exact, where, do.double())
    for a, b in zip(outputs_and_gradients(sum_senses, inputs, where, do), want):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def test_queries_of_the_last_positions_see_the_keys_before():
    """As in generation, T queries come after S - T cached positions; a mask says otherwise."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 9, 4)
    alpha = contextualize(q, k)
    for T in (1, 4, 9):
        assert torch.allclose(contextualize(q[:, :, 9 - T :], k), alpha[:, :, 9 - T :])
    mask = torch.ones(9, 9).tril().bool().expand(2, 1, 9, 9).clone()
    assert torch.allclose(contextualize(q, k, mask), alpha)
    mask[0, 0, 1:, 0] = False
    assert not contextualize(q, k, mask)[0, :, 1:, 0].any()


def test_no_weights_of_all_pairs_are_kept_for_backward():
    q, k = torch.randn(2, 2, 4, 512, 8, requires_grad=True)
    C = torch.randn(40, 4, 16, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sum_senses(q, k, C, torch.randint(40, (2, 512)))
    assert max(kept) < 2 * 4 * 512 * 512 / 4
