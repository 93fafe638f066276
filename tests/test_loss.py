"""The loss, whose logits are never whole, beside torch's cross-entropy of whole logits."""

import math

import pytest
import torch
from test_model import build, ids
from torch.nn import functional as F

from model import Backpack, BackpackConfig


def test_the_loss_and_all_gradients_of_a_model():
    model = build(vocab_size=1234).double()
    x = ids(2, 16, n=1234)
    y = ids(2, 16, n=1234, seed=1)
    y[1, 9] = 0
    y[1, 10:] = -100
    loss = model(x, y)[1]
    want = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    assert abs(loss - want) < 1e-10
    parameters = [*model.parameters()]
    grads = torch.autograd.grad(loss, parameters)
    for got, expected in zip(grads, torch.autograd.grad(want, parameters)):
        assert (got - expected).abs().max() < 1e-10


def loss_head(B=16):
    """A model of 8,190 tokens, o (B,128,D), y: logits of deviation 3; a fourth of the tokens are targets."""
    generator = torch.Generator().manual_seed(0)
    model = Backpack(BackpackConfig(128, 8190, n_layer=1, n_head=2, n_embd=64, n_sense=0))
    with torch.no_grad():
        model.wte.weight.normal_(std=3 / math.sqrt(64), generator=generator)
    o = torch.randn(B, 128, 64, generator=generator)
    y = torch.randint(8190 // 4, (B, 128), generator=generator)
    y[3, :50] = -100
    return model, o.requires_grad_(), y


def assert_loss_is_exact(device, dtype, backend=None, B=16):
    """Value and gradients beside float64's; float16 has the loss scale that it trains with."""
    model, o, y = loss_head(B)
    E = model.wte.weight
    logits = F.linear(o.double(), E[:8190].double())
    exact = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    exact_o, exact_E = torch.autograd.grad(exact, (o, E))

    model.to(device)
    o = o.detach().to(device).requires_grad_()
    loss = model.loss
    if backend:
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend=backend)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            evaluated = loss(o, y.to(device))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trained = loss(o, y.to(device))
    for value in (evaluated, trained):
        assert value.dtype == torch.float32
        assert abs(value.item() - exact.item()) < 2e-3
    assert max(kept) < B * 128 * 8190  # no logits are kept for backward

    scale = 65536 if dtype == torch.float16 else 1
    grad_o, grad_E = torch.autograd.grad(scale * trained, (o, E))
    error_o = grad_o.cpu() / scale - exact_o
    error_E = grad_E.cpu() / scale - exact_E
    assert error_o.norm() < 0.01 * exact_o.norm()
    assert error_E.norm() < 0.01 * exact_E.norm()
    never = torch.ones(len(E), dtype=torch.bool)  # tokens that are no target have small gradients
    never[y[y >= 0]] = False
    assert error_E[never].norm() < 0.02 * exact_E[never].norm()
    assert not grad_E[8190:].any()  # rows of padding
    assert not grad_o[3, :50].any()  # positions without a target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_chunks_in_every_number_type(dtype):
    """2,048 rows of 8,192 logits are two chunks."""
    assert_loss_is_exact("cpu", dtype)


def test_compiled():
    assert_loss_is_exact("cpu", torch.bfloat16, "aot_eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_sure_target_is_not_rounded_away(dtype):
    """p is 0.999, which bfloat16 rounds to 1, and the gradient of its logit is p - 1."""
    model = Backpack(BackpackConfig(4, 8, n_layer=1, n_head=1, n_embd=8, n_sense=0))
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(8))
    o = 8.875 * torch.eye(8)[[3, 3, 5]]
    o = o[None].requires_grad_()  # (1,3,8)
    y = torch.tensor([[3, 3, 5]])
    exact = F.cross_entropy(o.double().flatten(0, 1), y.flatten())
    (exact_o,) = torch.autograd.grad(exact, o)
    with torch.autocast("cpu", dtype):
        loss = model.loss(o, y)
    (grad_o,) = torch.autograd.grad(2.0**16 * loss, o)
    assert torch.allclose(grad_o / 2.0**16, exact_o, rtol=0.01, atol=0)


def test_an_overflow_in_float16_shows():
    """GradScaler lowers its scale when it finds an infinite gradient."""
    model, o, y = loss_head()
    with torch.autocast("cpu", torch.float16):
        loss = model.loss(o, y)
    (grad,) = torch.autograd.grad(2.0**40 * loss, o)
    assert not grad.isfinite().all()


def test_no_target_is_a_loss_of_0():
    model = build()
    loss = model(ids(2, 6), torch.full((2, 6), -100))[1]
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_a_frozen_embedding_costs_no_gradient():
    """Those of all others stay, and its own is not computed, where forward would take it."""
    model = build()
    x = ids(2, 6)
    model(x, x)[1].backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.wte.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
        model.loss(torch.ones(2, 6, 24, requires_grad=True), x)
    assert [tensor.shape for tensor in kept] == [(12, 24), ()]  # the gradient of o, the number of targets
    model(x, x)[1].backward()
    assert model.wte.weight.grad is None
    for name, p in model.named_parameters():
        assert name == "wte.weight" or torch.equal(p.grad, want[name]), name


def test_a_second_derivative_raises():
    """The first is computed by hand, so autograd can't know the second."""
    model = build()
    loss = model(ids(2, 6), ids(2, 6))[1]
    with pytest.raises(NotImplementedError, match="the loss has no second derivative"):
        torch.autograd.grad(loss, model.wte.weight, create_graph=True)
