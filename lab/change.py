"""What edits change in other text: log-probabilities, KL, perplexity; and where such text comes from."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError, check
from lab.files import replacing
from sample import prompt
from train import get_batch, load_data

# -----------------------------------------------------------------------------
# other text


def validation_tokens(r, dataset, data_dir):
    """Token ids (N,) of val.bin of a dataset; None: of the one that the run was trained on.

    r: from open_run. UserError: there is none in data_dir, or it has another vocabulary than the run.
    """
    hint = f"make one with prepare_data.py --tokenizer={r.path}, and give --dataset=NAME"
    dataset = dataset or r.ckpt["settings"].get("dataset")
    check(dataset, f"{r.path} was not trained on a dataset: {hint}")
    folder = Path(data_dir) / dataset
    check(folder.is_dir(), f"there is no dataset at {folder}: {hint}")
    _, tokens, meta = load_data(folder)
    same = meta["tokenizer"] == r.ckpt["meta"]["tokenizer"]
    check(same, f"{folder} has another vocabulary than {r.path}: {hint}")
    return tokens


def other_text(r, dataset, data_dir, n):
    """Text that is not about the edits, as n windows of block_size + 1 tokens: (n,T+1).

    It is from val.bin of the dataset that is named, or else of the run's own, if that lies in data_dir and
    is long enough. If not, the model writes the text itself: KL between two models is a mean over text
    that the first one writes. UserError: the dataset that is named can't be used.
    """
    T = r.base.config.block_size
    try:
        tokens = validation_tokens(r, dataset, data_dir)
        what = f"{len(tokens):,} validation tokens are too few for {n} windows of {T}"
        check(len(tokens) > n * T, f"{what}: without --dataset the model writes the text itself")
    except UserError:
        if dataset:
            raise
        return own_text(r, n)
    print(f"other text: {n} windows of {tokens.filename}")
    starts = np.linspace(0, len(tokens) - T - 1, n).astype(int)  # (n,)
    x, y, _ = get_batch(tokens, starts, T, r.device)  # (n,T) each
    return torch.cat([x, y[:, -1:]], dim=1)


def own_text(r, n, batch_size=16):
    """n windows (n,T+1) that the run's model writes at temperature 1, without edits.

    They are kept beside the checkpoint, in a file named after its content.
    """
    T = r.base.config.block_size
    path = r.path / "ckpt.pt" if r.path.is_dir() else r.path
    with open(path, "rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    kept = path.with_name(f"own_text.{key}.npy")
    if kept.exists():
        text = np.load(kept)
        if len(text) >= n:
            print(f"other text: {n} windows that the model wrote ({kept})")
            return torch.from_numpy(text[:n]).to(r.device)
    start = torch.tensor(prompt("", r.tokenizer), device=r.device).repeat(batch_size, 1)  # (B,1)
    table = r.base.sense_table()
    parts = []
    for first in tqdm(range(0, n, batch_size), "the model writes other text", leave=False):
        # all batches are full, so that fewer windows are the first of more
        generator = torch.Generator(r.device).manual_seed(first)
        parts.append(r.base.generate(start, T, sense_table=table, generator=generator))
    text = torch.cat(parts)  # (n or more,T+1)
    print(f"other text: {n} windows that the model wrote", end="")
    try:
        with replacing(kept) as file:
            np.save(file, text.cpu().numpy())
        print(f", kept in {kept}")
    except UserError as error:
        print(f", not kept: {error}")
    return text[:n]


# -----------------------------------------------------------------------------
# what changes


def log_p(model, idx):
    """Log-probabilities of the next token: idx (B,T) -> (B,T,V)."""
    logits, _ = model(idx)
    return logits.log_softmax(-1)


def next_p(model, idx):
    """The probabilities (V,) of the token after idx (T,)."""
    return log_p(model, idx[None])[0, -1].exp()


def divergence(before, after):
    """KL(before || after) of each token in nats: log-probabilities (...,V) -> (...)."""
    return (before.exp() * (before - after)).sum(-1)


@torch.no_grad()
def change(before, after, text, batch_size=8):
    """What differs on text (n,T+1) between two functions of idx (B,T) to log-probabilities (B,T,V).

    Returns (mean KL(before || after) per token in nats, perplexity before, perplexity after).
    """
    kl = 0.0
    loss_before = 0.0
    loss_after = 0.0
    for part in text.split(batch_size):
        x = part[:, :-1]  # (B,T)
        y = part[:, 1:, None]  # (B,T,1)
        p = before(x)  # (B,T,V)
        q = after(x)  # (B,T,V)
        kl += divergence(p, q).sum().item()
        loss_before -= p.gather(2, y).sum().item()
        loss_after -= q.gather(2, y).sum().item()
    n = text[:, 1:].numel()
    return kl / n, np.exp(loss_before / n), np.exp(loss_after / n)


def damage(model, edited, text):
    """What editing a model did to text (n,T+1): see change."""
    return change(lambda idx: log_p(model, idx), lambda idx: log_p(edited, idx), text)
