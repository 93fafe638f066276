"""Token windows of a dataset that prepare_data.py made."""
import json
from pathlib import Path

import numpy as np
import torch

from configurator import UserError


def load_data(s):
    """([train, val] token ids, memory-mapped; meta.json) of s.dataset in s.data_dir. Raises UserError."""
    folder = Path(s.data_dir) / s.dataset
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        return [np.memmap(folder / f"{split}.bin", dtype, "r") for split in ("train", "val")], meta
    except FileNotFoundError:
        raise UserError(f"no dataset at {folder}: make it with python prepare_data.py --dataset={s.dataset}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no dataset of prepare_data.py ({error!r}): make it again") from None


def take(tokens, starts, s, device):
    """The windows of tokens that begin at starts (..., B), as (x, y, distinct, count).

    s: settings with block_size = T, vocab_size and dataset. x and y (...,B,T) lie on the device, y being the token that
    follows each of x, -100 beyond the end; distinct is (ids (U,), where (...,B,T)), the different tokens of x and which
    of them stands where, found here so that a GPU need not wait for it; count is how many of y count. Raises UserError
    for an id outside vocab_size.
    """
    at = starts[..., None] + np.arange(s.block_size + 1)                                           # (...,B,T+1)
    ids = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)
    if ids.max() >= s.vocab_size:
        raise UserError(f"{s.dataset} has token id {ids.max()}, outside a vocabulary of {s.vocab_size}")
    x, y = ids[..., :-1], np.where(at < len(tokens), ids, -100)[..., 1:]
    distinct, where = np.unique(x, return_inverse=True)                                            # (U,), (...,B,T)

    def move(array):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
    return move(x), move(y), (move(distinct), move(where)), int((y >= 0).sum())
