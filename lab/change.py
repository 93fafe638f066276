"""Validation text, and what edits change in it: log-probabilities, KL, perplexity."""

import numpy as np
import torch

from configurator import UserError
from files import expect
from train import get_batch, load_data, read_tokens


def validation_tokens(r, dataset, data_dir):
    """Token ids of other text (N,): val.bin of a dataset, else the run folder's, else of the run's dataset.

    r: from open_run. UserError: there is none, or it was made with another tokenizer than the run's.
    """
    own = (r.path if r.path.is_dir() else r.path.parent) / "val.bin"  # the shipped model has one
    if not dataset and own.exists():
        meta = expect(r.ckpt["meta"], {"dtype": {"uint16", "uint32"}}, f"{r.path}, meta")
        tokens = read_tokens(own, meta["dtype"])
    elif dataset := dataset or r.ckpt["settings"].get("dataset"):
        _, tokens, meta = load_data(data_dir, dataset)
    else:
        hint = f"made by prepare_data.py with --tokenizer={r.path}"
        raise UserError(f"{r.path} has no dataset of its own: give --dataset=NAME, {hint}")
    if meta["tokenizer"] != r.ckpt["meta"]["tokenizer"]:
        raise UserError(f"{dataset} has another vocabulary than {r.path}")
    if tokens.max() >= r.model.config.vocab_size:
        what = f"outside a vocabulary of {r.model.config.vocab_size}"
        raise UserError(f"{tokens.filename} has token id {tokens.max()}, {what}")
    print(f"other text: {tokens.filename}, {len(tokens):,} tokens")
    return tokens


def validation_windows(r, tokens, n):
    """At most n windows of T + 1 tokens (n,T+1) over validation tokens; apart, unless that leaves too few."""
    T = r.model.config.block_size
    if len(tokens) <= T:
        raise UserError(f"found {len(tokens)} tokens of other text, expected {T + 1}")
    apart, least = (len(tokens) - 1) // T, 13  # which lab/teach.py shares out
    if apart < least:
        print(f"warning: {len(tokens):,} tokens of other text are few: its windows overlap")
    starts = np.linspace(0, len(tokens) - T - 1, min(n, max(least, apart))).astype(int)
    x, y, _ = get_batch(tokens, starts, T, r.device, r.model.config.vocab_size)  # (n,T) each
    return torch.cat([x, y[:, -1:]], 1)


def document_windows(tokens, end, T):
    """Windows of documents, each read by itself: rows (start, first, stop) of the tokens to predict.

    A document starts at the token that ends the one before, and the token that ends it isn't
    predicted. Its last window reaches back, so that it is full, but predicts only what is left.
    """
    stops = np.flatnonzero(tokens == end)
    windows = []
    for start, stop in zip(np.append(-1, stops[:-1]), stops):  # tokens[-1] ends a document, too
        for i in range(start, stop - 1, T):
            windows.append((max(start, min(i, stop - 1 - T)), i + 1, min(i + T + 1, stop)))
    return np.array(windows)


def log_p(model, idx, edits=None):
    """Log-probabilities of the next token under the given edits: idx (B,T) -> (B,T,V)."""
    kept = model.edits
    model.edits = edits
    try:
        return model(idx)[0].log_softmax(-1)
    finally:
        model.edits = kept


def next_p(model, idx, edits=None):
    """The probabilities (V,) of the token after idx (T,) under edits."""
    return log_p(model, idx[None], edits)[0, -1].exp()


def divergence(before, after):
    """KL(before || after) of each token in nats: log-probabilities (...,V) -> (...)."""
    return (before.exp() * (before - after)).sum(-1)


@torch.no_grad()
def change(before, after, text, batch_size=8):
    """What differs on text (n,T+1) between two functions of idx (B,T) to log-probabilities (B,T,V).

    Returns (mean KL(before || after) per token, perplexity before, after).
    """
    total = torch.zeros(3, dtype=torch.float64)
    for part in text.split(batch_size):
        x, y = part[:, :-1], part[:, 1:, None]  # (B,T), (B,T,1)
        p, q = before(x), after(x)  # (B,T,V)
        losses = -p.gather(2, y).sum(), -q.gather(2, y).sum()
        total += torch.stack([divergence(p, q).sum(), *losses]).cpu()
    kl, loss_before, loss_after = total / text[:, 1:].numel()
    return kl.item(), loss_before.exp().item(), loss_after.exp().item()


def damage(model, edits, text):
    """What edits do to text (n,T+1): (mean KL(without || with) per token, perplexity without, with)."""
    return change(lambda x: log_p(model, x), lambda x: log_p(model, x, edits), text)
