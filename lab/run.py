"""Open a run: what every tool of the lab begins with."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import check, pick_device
from lab.control import EditedBackpack
from lab.edits import make_edits, parse, read_edits
from sample import load_run, newest_run


@torch.no_grad()
def are_of_tokens_alone(model):
    """Whether senses are the same whatever stands beside a token. In a fork they need not be."""
    ids = torch.arange(min(32, model.config.vocab_size), device=model.wte.weight.device)  # (n,)
    together = model.senses(ids[None])[0]  # (n,K,D)
    alone = model.senses(ids[:, None])[:, 0]
    return torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item())


def open_run(run=None, device="auto", edits=None, edit="", senses=True):
    """Open a run folder or a checkpoint file; None: the newest run in out/, which it names.

    edits: a JSON file of edits; edit: more of them, as text; senses: refuse a run without senses.
    Returns a namespace: path, ckpt (without tensors), base (the model as trained), model (with the
    edits), tokenizer, device, edits (their list). UserError or OSError: one of these is missing or bad.
    """
    if run is None:
        run = newest_run()
        print(f"run: {run}", file=sys.stderr)
    path = Path(run)
    device = pick_device(device)
    ckpt, base, tokenizer = load_run(path, device)
    hint = "give a Backpack, with --run=FOLDER"
    check(base.config.n_sense or not senses, f"{path} is a plain Transformer (n_sense=0): {hint}")
    if base.config.n_sense and not are_of_tokens_alone(base):
        alone = "a word's are shown as those of the word alone"
        print(f"senses of this model.py depend on more than the token: {alone}", file=sys.stderr)
    listed = read_edits(edits) + parse(edit)
    model = base
    if listed:
        model = EditedBackpack(base, make_edits(base, tokenizer, listed))
    # the tensors are pages of a file that the caller may want to replace
    known = {key: ckpt[key] for key in ("config", "settings", "meta", "step", "source") if key in ckpt}
    return SimpleNamespace(
        path=path,
        ckpt=known,
        base=base,
        model=model,
        tokenizer=tokenizer,
        device=device,
        edits=listed,
    )
