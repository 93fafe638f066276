"""
Why small Backpacks lag behind their Transformers: three runs, seen from inside; see small_runs.md.

    python -m lab.notes.small_runs                         trains, draws small_runs.svg, prints its figures
    python -m lab.notes.small_runs --steps=200             quicker
    python -m lab.notes.small_runs --senses=out/a,out/b    how distinct the senses of runs are

This needs matplotlib and the dataset shakespeare_char. Runs go to out/small_runs; a finished one is not
trained again.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import train
from configurator import check, configure, run
from lab.change import validation_tokens
from lab.draw import Panel, draw_curves, expect_picture
from lab.run import open_run
from lab.words import token_text
from model import Backpack

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "Transformer": ["--n_sense=0"],
    "Backpack (paper)": ["--n_qk=8", "--transformer_share=0"],
    "Backpack (ours)": [],
}
# what the config said on the day of these runs
RECIPE = ["--muon_lr=0", "--tokens_per_step=768", "--batch_size=12", "--schedule=cosine"]
RECIPE += ["--min_lr=3e-4", "--sense_mlp_ratio=4", "--sense_out_ratio=4"]
PANELS = {  # of a quantity of figures(): the title, the scale
    "mean loss": ("validation loss, nats per token", "linear"),
    "probe": ("loss of a linear probe of h, nats per token", "linear"),
    "rank": ("effective rank of h", "log"),
    "sight": ("positions in sight of a sense, exp(entropy of α)", "log"),
    "norm": ("norm of a sense", "log"),
    "use": ("share of a sense in the sum", "log"),
}


@dataclass
class Settings:
    steps: int = 1000  # per run, a multiple of 10
    data_dir: str = "data"  # where datasets lie
    out_dir: str = "out/small_runs"  # where the runs go
    svg: str = "lab/notes/small_runs.svg"  # the picture to draw
    senses: str = ""  # run folders, separated by commas: measure these instead


# -----------------------------------------------------------------------------
# the three runs


def train_all(folder, steps, data_dir):
    """The three runs with a checkpoint at each tenth of their steps: {name: [(step, model)]}."""
    models = {}
    for name, args in RUNS.items():
        out = folder / str(steps) / name
        if not (out / f"step{steps}.pt").exists():
            train_one(out, steps, data_dir, args)
        models[name] = []
        for step in range(0, steps + 1, steps // 10):
            model = Backpack.from_checkpoint(out / f"step{step}.pt")
            models[name].append((step, model))
    return models


def train_one(out, steps, data_dir, args):
    """Train a run; beside ckpt.pt it keeps the checkpoint of each evaluation as stepN.pt."""
    save = train.save_checkpoint

    def save_twice(path, ckpt):
        save(path, ckpt)
        save(path.with_name(f"step{ckpt['step']}.pt"), ckpt)

    argv = [str(ROOT / "config/shakespeare_char.py"), *RECIPE, f"--data_dir={data_dir}"]
    argv += [f"--out_dir={out}", "--overwrite", f"--max_iters={steps}"]
    argv += [f"--warmup_iters={steps // 10}", f"--eval_interval={steps // 10}", *args]
    train.save_checkpoint = save_twice
    try:
        train.main(argv)
    finally:
        train.save_checkpoint = save


# -----------------------------------------------------------------------------
# what is measured of a model


def windows(data, n, T, seed=0):
    """n windows of T + 1 tokens: (n,T+1)."""
    starts = np.random.default_rng(seed).integers(len(data) - T - 1, size=n)
    return torch.from_numpy(data[starts[:, None] + np.arange(T + 1)].astype(np.int64))


def cross_entropy(logits, targets):
    """logits (...,V), targets (...) -> losses (...)."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


@torch.no_grad()
def inside(model, batch):
    """Loss by position (T,); by sense (K,): exp(entropy of alpha), norm, share of the sum."""
    x = batch[:, :-1]  # (B,T)
    logits, _ = model(x)  # (B,T,V)
    values = {"loss": cross_entropy(logits, batch[:, 1:]).mean(0)}
    if model.config.n_sense:
        use = train.sense_use(model, x)
        values["sight"] = torch.tensor(use["positions_in_sight"])
        values["use"] = torch.tensor(use["sense_share"])
        values["norm"] = model.senses(x).norm(dim=-1).mean((0, 1))  # of (B,T,K)
    return values


def probe(model, train_batch, batch, steps=300):
    """Loss of a new linear head on h: what the Transformer's features know about the next token."""
    with torch.no_grad():
        h = model.hidden(train_batch[:, :-1])  # (B,T,D)
        h_val = model.hidden(batch[:, :-1])
    torch.manual_seed(0)
    head = torch.nn.Linear(h.size(-1), model.config.vocab_size)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        some = torch.randint(len(h), (64,))
        cross_entropy(head(h[some]), train_batch[some, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return cross_entropy(head(h_val), batch[:, 1:]).mean().item()


@torch.no_grad()
def rank(model, batch):
    """Effective rank of h: (sum of eigenvalues)^2 / sum of their squares, of its covariance."""
    h = model.hidden(batch[:, :-1])  # (B,T,D)
    values = torch.linalg.eigvalsh(h.flatten(0, 1).T.cov())  # (D,)
    return (values.sum() ** 2 / values.square().sum()).item()


def figures(models, train_data, val_data):
    """{quantity: [(step, value)]} of a run; a value is one number, or one per position or sense."""
    _, first = models[0]
    T = first.config.block_size
    batch = windows(val_data, 300, T)
    probing = windows(train_data, 600, T, seed=1)
    series = {}
    for step, model in models:
        values = inside(model, batch)
        values["mean loss"] = values["loss"].mean()
        values["probe"] = probe(model, probing, batch)
        values["rank"] = rank(model, batch)
        for key, value in values.items():
            series.setdefault(key, []).append((step, np.asarray(value)))
    return series


@torch.no_grad()
def readability(run, data_dir, n=500, top=10):
    """How distinct the senses of the n most frequent tokens of a run's validation text are.

    Returns (share of senses with no top token in common with another sense of the token, mean cosine of
    two senses of a token, the top tokens of some).
    """
    r = open_run(run, "cpu")
    V = r.model.config.vocab_size
    n = min(n, V)
    top = min(top, V)
    tokens = validation_tokens(r, None, data_dir)
    counts = torch.from_numpy(np.bincount(tokens, minlength=V))  # (V,)
    ids = counts.topk(n).indices  # (n,)
    C = r.model.senses(ids)  # (n,K,D)
    tops = r.model.logits(C).topk(top).indices  # (n,K,top)
    apart = ~torch.eye(C.size(1), dtype=torch.bool)  # (K,K)
    same = tops[:, :, None, :, None] == tops[:, None, :, None, :]  # (n,K,K,top,top)
    shared = same.flatten(3).any(-1) & apart  # (n,K,K)
    cosine = F.cosine_similarity(C[:, :, None], C[:, None], dim=-1)[:, apart].mean()
    words = []
    for k in range(20, min(n, 300), 70):
        senses = []
        for row in tops[k, :, :5].tolist():
            senses.append(" ".join(token_text(r.tokenizer, i) for i in row))
        words.append(f"{token_text(r.tokenizer, ids[k].item())}: {' | '.join(senses)}")
    return 1 - shared.any(-1).float().mean().item(), cosine.item(), words


# -----------------------------------------------------------------------------
# the picture


def draw(runs, path):
    """Draw {name of a run: figures(...)}."""
    panels = []
    for key, (title, scale) in PANELS.items():
        curves = {}
        for name, series in runs.items():
            if key in series:
                steps, values = zip(*series[key])
                curves[name] = (steps, np.stack(values))
        panels.append(Panel(title, "step", curves, scale))
    curves = {}
    for name, series in runs.items():
        _, losses = series["loss"][-1]  # (T,)
        curves[name] = (np.arange(len(losses)) + 1, losses)
    panels.append(Panel("loss at the end, nats per token", "position", curves, x_scale="log"))
    draw_curves(path, panels)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    check(s.steps > 0 and s.steps % 10 == 0, f"steps={s.steps}: expected a multiple of 10")
    if s.senses:
        for folder in s.senses.split(","):
            apart, cosine, words = readability(folder, s.data_dir)
            what = f"{apart:.3f} of senses share no top token, mean cosine {cosine:.3f}"
            print(f"{folder}: {what}", *words, sep="\n  ")
        return
    expect_picture(s.svg)
    models = train_all(Path(s.out_dir), s.steps, s.data_dir)
    train_data, val_data, _ = train.load_data(Path(s.data_dir) / "shakespeare_char")
    runs = {name: figures(steps, train_data, val_data) for name, steps in models.items()}
    for name, values in runs.items():
        print(name)
        for key, series in values.items():
            if series[0][1].ndim == 0:
                print(f"  {key:10}", *(f"{value:.4f}" for _, value in series))
            else:
                print(f"  {key:10}", *(f"{value:.3f}" for value in series[-1][1]))
    draw(runs, s.svg)


if __name__ == "__main__":
    run(main)
