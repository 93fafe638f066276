"""Print samples of a run as they are generated.

    python sample.py                                    the newest run in out/, else pretrained/simplewiki
    python sample.py --run=out/shakespeare_char --start="ROMEO:" --num_samples=3 --temperature=0.8
    python sample.py --run=pretrained/simplewiki --start="He was born in Denver," --max_new_tokens=20 \\
        --edit="swap Denver: Colorado -> Texas"
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import configurator  # isort: skip  # before torch, for which it sets the environment
import torch

from configurator import UserError, configure
from files import read_text
from hardware import Dtype, autocast, pick_device, pick_dtype
from model import Backpack, load_checkpoint
from tokenizer import load_tokenizer


@dataclass
class Settings:
    run: str | None = None  # a run folder or a checkpoint file; None: the newest run in out/
    start: str = ""  # text to continue, or FILE:path; empty: the start of a document
    num_samples: int = 3  # [1, 1e6] how many to print
    batch_size: int = 8  # [1, 1e6] samples generated at once; the first is printed as it grows
    max_new_tokens: int = 500  # [1, 1e9] per sample
    stop_at_end: bool = True  # end a sample where its document ends
    temperature: float = (
        0.8  # [0, 1e6] 1: the model's own; lower: likelier tokens; 0: only the likeliest
    )
    top_k: int | None = None  # [1, 1e9] draw from the k likeliest tokens only
    top_p: float | None = None  # (0, 1] draw from the likeliest that together have this probability
    edits: str | None = None  # a JSON file of edits of senses (lab/edit.py), to compare with none
    edit: str = ""  # more edits, as "scale river 4 0; swap Denver: Colorado -> Texas"
    sense_table_gb: float = (
        4.0  # [0, 1e4] compute the senses of all tokens in advance, if they fit in this
    )
    seed: int = 1337  # [0, 4294967295] the same settings and seed give the same text
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: Dtype = "auto"  # float32, bfloat16, float16; auto: 16 bits on a GPU


def newest_run(senses):
    """(folder, checkpoint) of the newest in out/ (if senses, that has senses), or of the shipped run."""
    shipped = Path(__file__).parent / "pretrained/simplewiki"
    runs = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    for folder in [*(path.parent for path in reversed(runs)), shipped]:
        ckpt = load_checkpoint(folder, mmap=True)
        if not senses or ckpt["config"]["n_sense"]:
            return folder, ckpt


def open_run(run=None, device="auto", edits=None, edit="", senses=True):
    """Open a run; every tool does so here.

    run: a run folder or a checkpoint file; None: newest_run, which is then named on stderr. edits: a
    JSON file of edits; edit: more of them as text. senses: refuse a run without senses. Returns a
    namespace: path, ckpt (without tensors), model (with the edits), tokenizer, device, edits (a list).
    UserError, CheckpointError: one of these is missing or bad.
    """
    device = pick_device(device)
    if run:
        path, ckpt = Path(run), load_checkpoint(run, mmap=True)
    else:
        path, ckpt = newest_run(senses)
        print(f"run: {path}", file=sys.stderr)
    if senses and not ckpt["config"]["n_sense"]:
        raise UserError(f"{path} is a plain Transformer (n_sense=0): it has no senses")
    model = Backpack.from_checkpoint(ckpt, device)
    tokenizer = load_tokenizer(ckpt["meta"]["tokenizer"], path)
    # without the tensors, which are pages of a file that the caller may want to write
    ckpt = {key: value for key, value in ckpt.items() if key not in ("model", "optimizer", "muon")}
    listed = []
    if edits or edit:
        try:
            from lab.edit import make_edits, parse, read_edits
        except ModuleNotFoundError as error:
            if error.name not in ("lab", "lab.edit"):
                raise
            raise UserError(
                "edits need the folder lab/ of the repository, which is missing"
            ) from None
        listed = read_edits(edits) + parse(edit)
        model.edits = make_edits(model, tokenizer, listed)
    return SimpleNamespace(
        path=path, ckpt=ckpt, model=model, tokenizer=tokenizer, device=device, edits=listed
    )


def start_ids(start, tokenizer):
    """The token ids of --start; if it is empty, of the end of the document before, or a newline."""
    if start.startswith("FILE:"):
        start = read_text(start[5:])
    if not start and tokenizer.end is not None:
        return [tokenizer.end]
    return tokenizer.encode(start or "\n")


def print_batch(tokens, tokenizer, text, numbers, total, end):
    """Print samples, the first as it grows; returns how many tokens were generated.

    tokens: an iterator of the next token of every sample (B,1); text: what they all start with;
    numbers: the number of each sample; end: the id that ends a sample (-1: none does).
    """
    samples, ended, made = [[] for _ in numbers], [False] * len(numbers), 0
    n_printed = 0  # tokens of the first sample
    print(f"--- sample {numbers[0]} of {total}\n{text}", end="", flush=True)
    for token in tokens:
        made += len(samples)
        for i, id in enumerate(token[:, 0].tolist()):
            ended[i] = ended[i] or id == end
            if not ended[i]:
                samples[i].append(id)
        piece = tokenizer.decode(samples[0][n_printed:])
        if not piece.endswith("\ufffd"):  # else a character whose other tokens are still to come
            print(piece, end="", flush=True)
            n_printed = len(samples[0])
        if all(ended):
            break
    print(tokenizer.decode(samples[0][n_printed:]))
    for number, sample in zip(numbers[1:], samples[1:]):
        print(f"--- sample {number} of {total}\n{text}{tokenizer.decode(sample)}")
    return made


@torch.no_grad()
def sense_table(model, max_bytes=4e9):
    """The senses of all tokens (V,K,D), to look up in generation; None: more than max_bytes, or none."""
    c, ids = model.config, torch.arange(model.config.vocab_size, device=model.wte.weight.device)
    if not 0 < 4 * c.vocab_size * c.n_sense * c.n_embd <= max_bytes:
        return None
    table = model.senses(ids[:1]).new_empty(c.vocab_size, c.n_sense, c.n_embd)  # (V,K,D)
    for part in ids.split(1024):  # what it takes on the way stays small beside the table
        table[part] = model.senses(part)
    return table


def print_samples(s, model, tokenizer, idx, device):
    """Print s.num_samples continuations of idx (1,T); returns how many tokens were generated."""
    text = tokenizer.decode(idx[0].tolist()) if s.start else ""
    end = tokenizer.end if s.stop_at_end and tokenizer.end is not None else -1
    # the senses of one token alone take as long as 25 rows of the whole table (micro's shape, a CPU)
    steps = s.max_new_tokens * -(-s.num_samples // s.batch_size)
    use_table = model.config.vocab_size <= 25 * steps
    sampling = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    sampling["generator"] = torch.Generator(device).manual_seed(s.seed)
    made = 0
    with autocast(device, pick_dtype(s.dtype, device)):
        table = sense_table(model, s.sense_table_gb * 1e9) if use_table else None
        for first in range(0, s.num_samples, s.batch_size):
            numbers = range(first + 1, min(first + s.batch_size, s.num_samples) + 1)
            start = idx.repeat(len(numbers), 1)  # (B,T)
            tokens = model.stream(start, s.max_new_tokens, sense_table=table, **sampling)
            made += print_batch(tokens, tokenizer, text, numbers, s.num_samples, end)
    return made


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    opened = open_run(s.run, s.device, s.edits, s.edit, senses=bool(s.edits or s.edit))
    model, tokenizer, device = opened.model, opened.tokenizer, opened.device
    idx = torch.tensor(start_ids(s.start, tokenizer), device=device)[None]  # (1,T)
    began, made = time.perf_counter(), 0
    if opened.edits:
        from lab.edit import summary

        edits, model.edits = model.edits, None
        if s.start and not (edits.has_topics or edits.row[idx].any()):
            print("note: --start has no edited word: samples differ only once one is generated")
        print("=== without edits")
        made += print_samples(s, model, tokenizer, idx, device)
        model.edits = edits
        print(f"=== with {summary(opened.edits)}")
    made += print_samples(s, model, tokenizer, idx, device)
    rate = made / (time.perf_counter() - began)
    print(f"--- step {opened.ckpt['step']}, {rate:,.0f} tokens/s on {device}")


if __name__ == "__main__":
    configurator.run(main)
