"""Muon against the singular value decomposition and against torch.optim.Muon; runs are in test_train.py."""

from types import SimpleNamespace

import pytest
import torch

from model import Backpack, BackpackConfig
from optimizers import Muon, make_optimizers, orthogonal

SHAPES = [(8, 8), (40, 8), (8, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_keeps_directions_and_evens_singular_values(shape):
    M = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for one, X in zip(M, orthogonal(M)):
        U, S, Vh = torch.linalg.svd(one, full_matrices=False)
        inside = U.T @ X @ Vh.T  # diagonal where the singular vectors are the same
        assert torch.allclose(inside, inside.diag().diag(), atol=1e-4)
        clear = S > 0.02 * S.norm()  # five steps bring no more than these near 1
        assert ((0.6 < inside.diag()) & (inside.diag() < 1.25))[clear].all()
    assert not orthogonal(torch.zeros(shape)).any()


def test_steps_are_those_of_torch():
    """torch rounds to bfloat16, so updates agree to a few hundredths."""
    torch.manual_seed(0)
    mine = [torch.randn(shape, requires_grad=True) for shape in SHAPES * 2]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    pairs = [(Muon(mine, 0.02, 0.1), mine), (torch.optim.Muon(theirs, 0.02, 0.1), theirs)]
    start = [p.detach().clone() for p in mine]
    for step in range(3):
        for optimizer, params in pairs:
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for a, b, p in zip(mine, theirs, start):
        assert (a - b).norm() < 0.03 * (a - p).norm()


def test_blocks_are_matrices_of_their_own():
    torch.manual_seed(0)
    whole = torch.randn(12, 8, requires_grad=True)
    parts = [part.detach().clone().requires_grad_() for part in whole.chunk(3)]
    pairs = [(Muon([whole], 0.02, blocks=3), [whole]), (Muon(parts, 0.02), parts)]
    for _ in range(3):
        grad = torch.randn(12, 8)
        for optimizer, params in pairs:
            for p, g in zip(params, grad.chunk(len(params))):
                p.grad = g
            optimizer.step()
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def test_a_matrix_without_a_gradient_stays():
    frozen, moving = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    moving.sum().backward()
    Muon([frozen, moving], 0.02).step()
    assert (frozen == 1).all() and (moving != 1).all()


@pytest.mark.parametrize("n_sense", [0, 4])
def test_each_sense_is_a_matrix_of_its_own(n_sense):
    """Of all matrices but the embeddings; vectors and embeddings are AdamW's."""
    sizes = {"block_size": 8, "vocab_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}
    model = Backpack(BackpackConfig(**sizes, n_sense=n_sense))
    how = {"learning_rate": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
    made = make_optimizers(model, SimpleNamespace(muon_lr=0.01, **how))
    name = {p: name for name, p in model.named_parameters()}
    blocks = {name[p]: g["blocks"] for g in made["muon"].param_groups for p in g["params"]}
    rest = {name[p] for g in made["optimizer"].param_groups for p in g["params"]}
    assert blocks.keys() | rest == {*name.values()} and not blocks.keys() & rest
    assert {key for key, n in blocks.items() if n != 1} == (
        {"sense_network.mlp_out.proj.weight"} if n_sense else set()
    )
    assert all(("weight" in key) and "ln" not in key and "e.weight" not in key for key in blocks)
    assert {"wte.weight", "wpe.weight"} < rest
