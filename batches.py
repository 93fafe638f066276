"""Windows of tokens of a dataset that prepare_data.py made."""
import json
import re
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from tokenizer import load_tokenizer


def load_data(s):
    """([train, val] token ids, memory-mapped; meta.json) of s.dataset in s.data_dir. Raises UserError."""
    folder = Path(s.data_dir) / s.dataset
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["dtype"] not in ("uint16", "uint32"):
            raise UserError(f"{folder / 'meta.json'}: dtype={meta['dtype']!r}, expected 'uint16' or 'uint32': make the "
                            "dataset again")
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        return [np.memmap(folder / f"{split}.bin", dtype, "r") for split in ("train", "val")], meta
    except FileNotFoundError:
        raise UserError(f"no dataset at {folder}: make it with python prepare_data.py --dataset={s.dataset}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no dataset of prepare_data.py ({error!r}): make it again") from None


def documents(tokens, spec, T):
    """Windows of each document by itself, as lm-eval-harness scores text: ((start, first, stop) (n,3), how many words),
    or None where no token of the tokenizer (spec) ends documents. The first window starts at the token that ends the
    document before; the last reaches back, so that it is full, too, but predicts only what no other does."""
    tokenizer = load_tokenizer(spec) if spec else None
    if tokenizer is None or tokens[-1] != tokenizer.end:
        return None
    stops = np.flatnonzero(tokens == tokenizer.end)
    parts = list(zip(np.append(-1, stops[:-1]), stops))  # before the first: the last token, an end, too
    windows = [(max(start, min(i, stop - 1 - T)), i + 1, min(i + T + 1, stop))
               for start, stop in parts for i in range(start, stop - 1, T)]
    texts = (tokenizer.decode(tokens[start + 1 : stop]) for start, stop in parts)
    return np.array(windows), sum(len(re.split(r"\s+", text)) for text in texts)


def take(tokens, starts, s, device, first=0, stop=np.inf):
    """The windows of tokens that begin at starts (..., B), as (x, y, distinct, count).

    s: settings with block_size = T, vocab_size and dataset. x and y (...,B,T) lie on the device, y being the token that
    follows each of x, -100 before first and from stop (...,B) or the end on; distinct is (ids (U,), where (...,B,T)),
    the different tokens of x and which of them stands where, found here so that a GPU need not wait for it; count is
    how many of y count. Raises UserError for an id outside vocab_size.
    """
    at = starts[..., None] + np.arange(s.block_size + 1)                                           # (...,B,T+1)
    ids = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)
    if ids.max() >= s.vocab_size:
        raise UserError(f"{s.dataset} has token id {ids.max()}, outside a vocabulary of {s.vocab_size}")
    counts = (at >= np.array(first)[..., None]) & (at < np.minimum(stop, len(tokens))[..., None])  # (...,B,T+1)
    x, y = ids[..., :-1], np.where(counts, ids, -100)[..., 1:]                                     # (...,B,T)
    distinct, where = np.unique(x, return_inverse=True)                                            # (U,), (...,B,T)

    def move(array):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
    return move(x), move(y), (move(distinct), move(where)), int((y >= 0).sum())
