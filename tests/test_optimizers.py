"""Muon against the singular value decomposition and against torch.optim.Muon; runs are in test_train.py."""

import pytest
import torch

from optimizers import Muon, orthogonal

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
