r"""
Print samples of a run as they are generated.

$ python sample.py                          of the newest run in out/, else of pretrained/simplewiki
$ python sample.py --run=out/shakespeare_char --start="ROMEO:" --num_samples=1 --temperature=0.7
$ python sample.py --run=pretrained/simplewiki --start="He was born in Denver," --max_new_tokens=20 \
    --edit="swap Denver: Colorado -> Texas"
"""

import time
from dataclasses import dataclass
from pathlib import Path

import configurator  # isort: skip  # before torch, for which it sets the environment
import torch

from configurator import Dtype, UserError, check, pick_device, pick_dtype
from model import Backpack, load_checkpoint
from tokenizer import load_tokenizer


@dataclass
class Settings:
    run: str | None = None  # a run folder or a checkpoint; None: the newest run in out/
    start: str = ""  # text to continue, or FILE:path; empty: the beginning of a document
    num_samples: int = 3
    max_new_tokens: int = 500  # of a sample, which ends before where its document ends
    temperature: float = 0.8  # 1: the model's own; lower: likelier tokens; 0: only the likeliest
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the likeliest tokens that together have this probability
    edits: str | None = None  # a JSON file of edits of senses (lab.edit), to compare with none
    edit: str = ""  # more of them, as "scale river 4 0; swap Denver: Colorado -> Texas"
    seed: int = 1337
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: Dtype = "auto"  # float32, bfloat16, float16; auto: 16 bits on a GPU


def newest_run():
    """The folder of the newest run in out/, else of the one that comes with this repository."""
    runs = [path.parent for path in Path("out").glob("*/ckpt.pt")]
    shipped = Path(__file__).parent / "pretrained/simplewiki"
    return max(runs, key=lambda run: (run / "ckpt.pt").stat().st_mtime, default=shipped)


def load_run(path, device):
    """(checkpoint, model, tokenizer) of a run folder or a checkpoint file."""
    ckpt = load_checkpoint(path)
    tokenizer = load_tokenizer(ckpt["meta"]["tokenizer"])
    check(tokenizer, f"{path} has no tokenizer, so it can't read or write text")
    return ckpt, Backpack.from_checkpoint(ckpt, device), tokenizer


def start_text(start):
    """The text of --start, which may name a file."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def prompt(start, tokenizer):
    """The token ids of a start; if it is empty, the token or the newline that a document follows."""
    if start:
        return tokenizer.encode(start, special=True)
    return tokenizer.encode("\n") if tokenizer.end is None else [tokenizer.end]


def print_sample(model, tokenizer, idx, s, generator, table):
    """Print a continuation of idx (1,T), token by token; returns how many there were."""
    given = idx[0].tolist()
    ids = []
    text = tokenizer.decode(given)
    n_printed = len(text)
    sampling = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    stream = model.stream(idx, s.max_new_tokens, table, generator=generator, **sampling)
    for token in stream:
        if token.item() == tokenizer.end:
            break
        ids.append(token.item())
        # all of it, as the space before a word may depend on what stands there
        text = tokenizer.decode(given + ids)
        if not text.endswith("\ufffd"):  # else the rest of a character is still to come
            print(text[n_printed:], end="", flush=True)
            n_printed = len(text)
    print(text[n_printed:])
    return len(ids)


def print_samples(title, model, tokenizer, s, device):
    """Print s.num_samples continuations of s.start."""
    idx = torch.tensor(prompt(s.start, tokenizer), device=device)[None]  # (1,T)
    generator = torch.Generator(device).manual_seed(s.seed)
    dtype = pick_dtype(s.dtype, device)
    c = model.config
    n_tokens = 0
    began = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        # a token's senses take as long alone as those of 25 in a table; and a table must fit in memory
        pays = c.vocab_size <= 25 * s.num_samples * s.max_new_tokens
        fits = c.vocab_size * c.n_sense * c.n_embd < 10**9
        table = model.sense_table() if c.n_sense and pays and fits else None
        for number in range(1, s.num_samples + 1):
            print(f"--- {title}, sample {number} of {s.num_samples}\n{s.start}", end="")
            n_tokens += print_sample(model, tokenizer, idx, s, generator, table)
    speed = n_tokens / (time.perf_counter() - began)
    print(f"--- {speed:,.0f} tokens/s on {device}")


def main(argv):
    s, _ = configurator.configure(Settings, argv, __doc__)
    check(s.temperature >= 0, f"temperature={s.temperature} must not be negative")
    check(s.top_k is None or s.top_k > 0, f"top_k={s.top_k} must be at least 1")
    s.start = start_text(s.start)
    device = pick_device(s.device)
    run = s.run or newest_run()
    ckpt, model, tokenizer = load_run(run, device)
    title = f"{run}, step {ckpt['step']}"
    edited = None
    if s.edits or s.edit:
        check((Path(__file__).parent / "lab").is_dir(), "edits need the folder lab/ of the repository")
        from lab.control import EditedBackpack
        from lab.edits import make_edits, parse, read_edits, summary, unreached

        edits = read_edits(s.edits) + parse(s.edit)
        edited = EditedBackpack(model, make_edits(model, tokenizer, edits))
        for line in unreached(tokenizer, edits, s.start):
            print(line)
    print_samples(title, model, tokenizer, s, device)
    if edited:
        print_samples(f"{title}, with {summary(edits)}", edited, tokenizer, s, device)


if __name__ == "__main__":
    configurator.run(main)
