"""Why small Backpacks lag behind their Transformers: three runs, and what is going on inside; see docs/small_runs.md.

    python docs/small_runs.py                 trains on the default data, draws docs/small_runs.svg, prints its figures
    python docs/small_runs.py --steps=200     quicker
    python docs/small_runs.py --senses=out/a,out/b   how distinct the senses of runs of the same data are

Needs matplotlib. Runs lie in out/small_runs; a finished one is not trained again.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import Backpack  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

RUNS = {"Transformer": ["--n_sense=0"], "Backpack (paper)": ["--n_qk=8", "--transformer_share=0"],
        "Backpack (ours)": []}


def train_all(folder, steps, data_dir):
    """The three runs with a checkpoint for each tenth of their steps; returns {name: [(step, model)]}."""
    save = train.save_checkpoint

    def keep(path, ckpt):
        save(path, ckpt)
        save(path.with_name(f"step{ckpt['step']}.pt"), ckpt)

    train.save_checkpoint, found = keep, {}
    for name, args in RUNS.items():
        out = folder / name
        if not (out / f"step{steps}.pt").exists():
            train.main([str(ROOT / "config/shakespeare_char.py"), f"--out_dir={out}", f"--data_dir={data_dir}",
                        f"--max_iters={steps}", f"--eval_interval={steps // 10}", "--overwrite=True", *args])
        found[name] = [(step, Backpack.from_checkpoint(out / f"step{step}.pt"))
                       for step in range(0, steps + 1, steps // 10)]
    return found


def windows(data, n, T, seed=0):
    """n windows of T + 1 tokens: (n,T+1)."""
    starts = np.random.default_rng(seed).integers(len(data) - T - 1, size=n)
    return torch.from_numpy(data[starts[:, None] + np.arange(T + 1)].astype(np.int64))


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


@torch.no_grad()
def inside(model, batch):
    """Loss by position (T,), and by sense (K,): positions in sight exp(entropy of alpha), norm, share of the sum."""
    x, y = batch[:, :-1], batch[:, 1:]
    found = {"loss": cross_entropy(model(x)[0], y).mean(0)}
    if model.config.n_sense:
        alpha = model.contextualization(x)                                                         # (B,K,T,T)
        C = model.senses(x)                                                                        # (B,T,K,D)
        found["sight"] = (-alpha * alpha.clamp(min=1e-30).log()).sum(-1).mean((0, 2)).exp()
        found["norm"] = C.norm(dim=-1).mean((0, 1))
        part = torch.einsum("bkij,bjkd->bikd", alpha, C).norm(dim=-1)                              # (B,T,K)
        found["use"] = (part / part.sum(-1, keepdim=True)).mean((0, 1))
    return found


def probe(model, train_batch, batch, steps=300):
    """Loss of a linear reading of h, trained anew: what the Transformer's features know of the next token."""
    with torch.no_grad():
        (h, _), (h_val, _) = model._hidden(train_batch[:, :-1]), model._hidden(batch[:, :-1])      # (B,T,D)
    torch.manual_seed(0)
    head = torch.nn.Linear(h.size(-1), model.config.vocab_size)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        some = torch.randint(len(h), (64,))
        F.cross_entropy(head(h[some]).flatten(0, 1), train_batch[some, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return cross_entropy(head(h_val), batch[:, 1:]).mean().item()


@torch.no_grad()
def rank(model, batch):
    """Effective rank of h: (sum of eigenvalues)^2 / sum of their squares, of its covariance."""
    values = torch.linalg.eigvalsh(model._hidden(batch[:, :-1])[0].flatten(0, 1).T.cov())
    return (values.sum() ** 2 / values.square().sum()).item()


@torch.no_grad()
def readability(folder, data_dir, n=500, top=10):
    """Of the n tokens most frequent in a run's data: (share of senses whose top tokens no other sense of the token has
    among its own, mean cosine of two senses of a token, the top tokens of some)."""
    model = Backpack.from_checkpoint(folder)
    data = np.fromfile(Path(data_dir) / f"{json.loads((folder / 'config.json').read_text())['dataset']}/val.bin", "<u2")
    ids = torch.from_numpy(np.bincount(data, minlength=model.config.vocab_size)).topk(n).indices   # (n,)
    C, tokenizer = model.senses(ids), load_tokenizer(json.loads((folder / "meta.json").read_text())["tokenizer"])
    tops = model._logits(C).topk(top).indices                                                      # (n,K,top)
    apart = ~torch.eye(C.size(1), dtype=torch.bool)
    shared = (tops[:, :, None, :, None] == tops[:, None, :, None, :]).any(-1).any(-1) & apart      # (n,K,K)
    cosine = F.cosine_similarity(C[:, :, None], C[:, None], dim=-1)[:, apart].mean()
    words = [f"{tokenizer.decode([i])!r}: " + " | ".join(
        " ".join(repr(tokenizer.decode([j]))[1:-1] for j in row) for row in tops[k, :, :5].tolist())
        for k, i in list(enumerate(ids.tolist()))[20:300:70]]
    return 1 - shared.any(-1).float().mean().item(), cosine.item(), words


def figures(models, train_data, val_data):
    """{quantity: [(step, value)]} of a run's checkpoints; a value is a number, or one for each position or sense."""
    T, found = models[0][1].config.block_size, {}
    batch, probing = windows(val_data, 300, T), windows(train_data, 600, T, seed=1)
    for step, model in models:
        now = inside(model, batch)
        now |= {"mean loss": now["loss"].mean(), "probe": probe(model, probing, batch), "rank": rank(model, batch)}
        for key, value in now.items():
            found.setdefault(key, []).append((step, np.asarray(value)))
    return found


def draw(found, file):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "svg.hashsalt": "small_runs"})
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), layout="constrained")
    panels = [("mean loss", "validation loss, nats", "linear"), (None, "loss by position, at the end", "linear"),
              ("probe", "loss of a linear probe of h, nats", "linear"), ("rank", "effective rank of h", "log"),
              ("sight", "positions in sight of a sense, exp(entropy of α)", "log"),
              ("norm", "norm of a sense", "log"), ("use", "share of a sense in the sum", "log")]
    for (key, title, scale), axis in zip(panels, axes.flat):
        for (name, values), color in zip(found.items(), ("#888888", "#c44e52", "#1f6fb4")):
            if key is None:
                axis.plot(np.arange(len(values["loss"][-1][1])) + 1, values["loss"][-1][1], color=color, label=name)
            elif key in values:
                steps, lines = zip(*((step, value) for step, value in values[key] if step or key != "probe"))
                lines = np.stack(lines).reshape(len(steps), -1)  # a line for each sense, or one
                axis.plot(steps, lines, color=color, lw=1.5 if lines.shape[1] == 1 else 0.7, alpha=0.9)
                axis.plot([], [], color=color, label=name)
        axis.set(title=title, yscale=scale, xlabel="position" if key is None else "step")
        if key is None:
            axis.set_xscale("log")
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of each run, a multiple of 10")
    parser.add_argument("--data_dir", default=ROOT / "data")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out/small_runs")
    parser.add_argument("--svg", default=ROOT / "docs/small_runs.svg")
    parser.add_argument("--senses", help="run folders, comma-separated")
    args = parser.parse_args()
    for folder in map(Path, args.senses.split(",") if args.senses else ()):
        apart, cosine, words = readability(folder, args.data_dir)
        print(f"{folder}: {apart:.3f} of senses share no top token, mean cosine {cosine:.3f}", *words, sep="\n  ")
    if args.senses:
        return
    models = train_all(args.out_dir, args.steps, args.data_dir)
    data = [np.fromfile(Path(args.data_dir) / f"shakespeare_char/{part}.bin", "<u2") for part in ("train", "val")]
    found = {name: figures(run, *data) for name, run in models.items()}
    for name, values in found.items():
        print(name)
        for key, series in values.items():
            if series[0][1].ndim == 0:
                print(f"  {key:10}", *(f"{value:.4f}" for _, value in series))
            else:
                print(f"  {key:10}", *(f"{value:.3f}" for value in series[-1][1]))
    draw(found, args.svg)


if __name__ == "__main__":
    main()
