"""The optimizers of a run: AdamW, and Muon for the matrices if muon_lr is set.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is momentum whose update is made orthogonal, so
that a matrix learns in all its directions alike. torch.optim.Muon takes the same steps, but one
matrix at a time and in bfloat16: of a step of config/simplewiki.py, 3.9 s on a CPU without bfloat16
arithmetic, where these take 0.06.
"""

import torch

from configurator import UserError


def orthogonal(M):
    """Matrices M (...,m,n) = U S V^T -> about U V^T, by five Newton-Schulz steps on their singular values."""
    m, n = M.shape[-2:]
    X = M if m <= n else M.mT  # (...,r,s), r <= s
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values in [0, 1]
    for _ in range(5):
        A = X @ X.mT  # (...,r,r)
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X  # to 0.7 ... 1.2, but for the smallest
    return X if m <= n else X.mT  # (...,m,n)


class Muon(torch.optim.Optimizer):
    """params: matrices, or groups of them. Nesterov momentum, decoupled weight decay (lr * weight_decay).

    blocks: into how many matrices, one below the other, each of a group is cut before it is made orthogonal.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, blocks=1):
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "blocks": blocks}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, beta, blocks, shapes = group["lr"], group["momentum"], group["blocks"], {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (m, n), params in shapes.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    self.state[p]["momentum"].lerp_(p.grad, 1 - beta)
                moved = [p.grad.lerp(self.state[p]["momentum"], beta) for p in params]
                moved = torch.stack(moved).unflatten(1, (blocks, -1))  # (count,blocks,m/blocks,n)
                for p, update in zip(params, orthogonal(moved).flatten(1, 2)):  # (m,n) each
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * max(1, m / blocks / n) ** 0.5)


def make_optimizers(model, s):
    """{name in a checkpoint: optimizer}: AdamW, and with muon_lr Muon for the matrices."""
    matrices, rest = model.param_groups(s.weight_decay)
    options = {"betas": (s.beta1, s.beta2), "fused": True}
    if not s.muon_lr:
        return {"optimizer": torch.optim.AdamW([matrices, rest], s.learning_rate, **options)}
    groups = [matrices]
    # each sense is a matrix of its own, which also takes less time than all of them as one
    if K := model.config.n_sense:
        senses = model.sense_network.mlp_out.proj.weight  # (K*D,inner)
        matrices["params"] = [p for p in matrices["params"] if p is not senses]
        groups.append(matrices | {"params": [senses], "blocks": K})
    adamw = torch.optim.AdamW([rest], s.learning_rate, **options)
    return {"optimizer": adamw, "muon": Muon(groups, s.muon_lr)}


def load_optimizer(optimizer, saved, out):
    """Load the moments of a run's checkpoint; the settings stay the optimizer's. UserError: no fit."""
    groups = optimizer.state_dict()["param_groups"]
    params = enumerate(p for group in optimizer.param_groups for p in group["params"])
    names = ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
    want = {i: {name: () if name == "step" else p.shape for name in names} for i, p in params}
    try:
        state = saved["state"]
        found = {i: {name: v.shape for name, v in moments.items()} for i, moments in state.items()}
    except (KeyError, TypeError, AttributeError):
        found = None
    if found not in ({}, want):
        what = f"{out}: the state of its optimizer does not fit its weights"
        raise UserError(f"{what}: start another run from these with --init_from={out}")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for p, moments in optimizer.state.items():  # in memory of their own, not pages of the file
        for name, value in moments.items():
            moments[name] = torch.empty_like(p if value.dim() else value).copy_(value)
