"""Muon beside the singular value decomposition and torch.optim.Muon; which weights it trains."""

import pytest
import torch
from test_model import Fork, build

from train import Muon, Settings, freeze, make_optimizers, orthogonal

SHAPES = [(8, 8), (40, 8), (8, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_keeps_directions_and_evens_singular_values(shape):
    M = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for one, X in zip(M, orthogonal(M)):
        U, S, Vh = torch.linalg.svd(one, full_matrices=False)
        inside = U.T @ X @ Vh.T  # diagonal where the singular vectors are the same
        assert torch.allclose(inside, inside.diag().diag(), atol=1e-4)
        clear = S > 0.02 * S.norm()  # five steps bring no more than these near 1
        assert (inside.diag()[clear] - 0.925).abs().max() < 0.325
    assert not orthogonal(torch.zeros(shape)).any()


def take_steps(optimizer, params, blocks=1):
    """Three steps with random gradients; those of a matrix of blocks are one for each."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in params:
            shape = p.size(0) // blocks, p.size(1)
            parts = [torch.randn(shape, generator=generator) for _ in range(blocks)]
            p.grad = torch.cat(parts)
        optimizer.step()


def test_steps_are_those_of_torch():
    """torch rounds to bfloat16, so updates agree to a few hundredths."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    mine = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    take_steps(Muon(mine, 0.02, 0.1), mine)
    take_steps(torch.optim.Muon(theirs, 0.02, 0.1), theirs)
    for a, b, before in zip(mine, theirs, start):
        assert (a - b).norm() < 0.03 * (a - before).norm()


def test_blocks_are_matrices_of_their_own():
    torch.manual_seed(0)
    whole = torch.randn(12, 8, requires_grad=True)
    parts = [part.detach().clone().requires_grad_() for part in whole.chunk(3)]
    take_steps(Muon([whole], 0.02, blocks=3), [whole], 3)
    take_steps(Muon(parts, 0.02), parts)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def test_a_matrix_without_a_gradient_stays():
    unused = torch.ones(4, 4, requires_grad=True)
    Muon([unused], 0.02).step()
    assert (unused == 1).all()


def trained(model):
    """({name of a weight that Muon trains: its blocks}, the names of AdamW's)."""
    adamw, muon = make_optimizers(model, Settings(n_sense=model.config.n_sense, muon_lr=0.01))
    names = {p: name for name, p in model.named_parameters()}
    blocks = {names[p]: group["blocks"] for group in muon.param_groups for p in group["params"]}
    return blocks, {names[p] for group in adamw.param_groups for p in group["params"]}


@pytest.mark.parametrize("n_sense", [0, 3])
def test_muon_trains_matrices_by_kind(n_sense):
    """The weights of Linears; the one that makes the senses is a matrix for each sense."""
    model = build(Fork, n_sense=n_sense)
    blocks, rest = trained(model)
    modules = model.named_modules()
    want = {f"{name}.weight": 1 for name, m in modules if isinstance(m, torch.nn.Linear)}
    if n_sense:
        want["sense_network.mlp_out.proj.weight"] = n_sense
    assert blocks == want
    assert rest == {name for name, _ in model.named_parameters()} - want.keys()


def test_frozen_weights_are_passed_over():
    model = build()
    model.sense_network.requires_grad_(False)
    blocks, rest = trained(model)
    assert "sense_qk.weight" in blocks
    assert not any(name.startswith("sense_network") for name in [*blocks, *rest])


@pytest.mark.parametrize("trains, names", [("sense_qk", ["Muon"]), ("wpe", ["AdamW"])])
def test_an_optimizer_without_weights_is_none(trains, names):
    """A GradScaler would miss its gradients."""
    model = build(bias=False)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trains))
    optimizers = make_optimizers(model, Settings(n_sense=3, muon_lr=0.01))
    assert [type(optimizer).__name__ for optimizer in optimizers] == names


def test_modules_are_frozen_by_name_or_class():
    model = build()
    freeze(model, "blocks.0,LayerNorm,wpe")
    for name, p in model.named_parameters():
        is_frozen = name.startswith(("blocks.0.", "wpe.")) or ".ln_" in name or name.startswith("ln_f")
        assert p.requires_grad != is_frozen, name
