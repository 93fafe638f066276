"""Checkpoints of train.py: read without executing anything, written so that a whole one is there at any moment."""
import os
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short, of another shape or not ours; the text is one line for the user."""


def load_checkpoint(path, device="cpu"):
    """The dict that train.py saved in a run folder or a file; nothing pickled is executed. Raises CheckpointError."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give a run folder of train.py, or train one first")
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load names no base class: zip, pickle and storage errors all come here
        raise CheckpointError(f"{path} is truncated or no checkpoint of train.py: {str(error)[:200]!r}") from None
    if not isinstance(ckpt, dict) or not {"model", "config", "step", "meta"} <= ckpt.keys():
        raise CheckpointError(f"{path} is no checkpoint of train.py: it has not the keys model, config, step, meta")
    return ckpt


def weights_only(ckpt, dtype=torch.float16):
    """What sampling and finetuning need of a checkpoint, small enough to share: half precision, no optimizer."""
    return {key: ckpt[key] for key in ("config", "step", "meta")} | {
        "model": {name: p.to(dtype) for name, p in ckpt["model"].items()}}


def save_checkpoint(path, value):
    """Write to a temporary name, sync, rename: at any moment path holds a whole checkpoint. Raises CheckpointError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not save {path} ({str(error).splitlines()[0]}): the one before it is whole; "
                              "make room and go on with --init_from=resume") from None
