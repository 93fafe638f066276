"""Print samples of a run as they are generated.

    python sample.py --out_dir=out/shakespeare_char
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3 --temperature=0.8
    python sample.py --out_dir=out/simplewiki --start="The nurse said that" --edit="scale nurse 10 0"
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints import CheckpointError, load_checkpoint
from configurator import UserError, configure, run
from devices import autocast, pick_device, pick_dtype
from edits import make_edits, parse, read_edits, summary
from model import Backpack
from tokenizer import load_tokenizer


@dataclass
class Settings:
    out_dir: str = "out/shakespeare_char"  # a run folder of train.py, or a checkpoint file
    start: str = ""                  # text to go on from, or FILE:path; empty: the start of a document
    num_samples: int = 3
    batch_size: int = 8              # samples generated at once; the first of them is printed as it grows
    max_new_tokens: int = 500        # per sample
    temperature: float = 0.8         # 1: as the model has it; lower: likelier tokens; 0: always the likeliest
    top_k: int | None = None         # draw from the k likeliest tokens only
    top_p: float | None = None       # draw from the likeliest tokens that together have this probability
    edits: str | None = None         # a JSON file of edits of senses (edits.py); each sample without and with them
    edit: str = ""                   # more of them: "scale nurse 10 0; swap MacBook: Apple -> HP; topic sports 2"
    sense_table_gb: float = 4.0      # senses of the whole vocabulary are computed in advance if they fit in this
    seed: int = 1337                 # the same settings and seed give the same text
    device: str = "auto"             # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"              # float32, bfloat16, float16; auto: 16 bits on a GPU


def start_ids(start, tokenizer):
    """The token ids of --start; of an empty one the token that ends documents, or a newline. Raises UserError."""
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_bytes().decode()
        except OSError as error:
            raise UserError(f"--start: {start[5:]}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--start: {start[5:]} is not UTF-8: byte {error.start}") from None
    if not start and tokenizer.end is not None:
        return [tokenizer.end]
    return tokenizer.encode(start or "\n")


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    problems = [f"{key}={getattr(s, key)} must be {what}" for key, what, ok in (
        ("num_samples", "at least 1", s.num_samples > 0), ("max_new_tokens", "at least 1", s.max_new_tokens > 0),
        ("batch_size", "at least 1", s.batch_size > 0), ("sense_table_gb", "at least 0", s.sense_table_gb >= 0),
        ("temperature", "at least 0", s.temperature >= 0), ("top_k", "at least 1", s.top_k is None or s.top_k > 0),
        ("top_p", "in (0, 1]", s.top_p is None or 0 < s.top_p <= 1)) if not ok]
    if problems:
        raise UserError("; ".join(problems))
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    ckpt = load_checkpoint(s.out_dir)
    model, tokenizer = Backpack.from_checkpoint(ckpt, device), load_tokenizer(ckpt["meta"]["tokenizer"])
    idx = torch.tensor(start_ids(s.start, tokenizer), device=device)[None]                         # (1,T)
    text = tokenizer.decode(idx[0].tolist()) if s.start else ""
    listed = read_edits(s.edits) + parse(s.edit)
    edits = make_edits(model, tokenizer, listed)
    began, steps = time.perf_counter(), s.max_new_tokens * -(-s.num_samples // s.batch_size)
    for model.edits in [None] if edits is None else [None, edits]:
        if edits is not None:
            print(f"=== with {summary(listed)}" if model.edits else "=== without edits")
        generator = torch.Generator(device).manual_seed(s.seed)
        with autocast(device, dtype):
            # one token's senses alone take as long as some 25 rows of the whole table (micro's shape on a CPU)
            table = model.sense_table(s.sense_table_gb * 1e9) if model.config.vocab_size <= 25 * steps else None
            for first in range(0, s.num_samples, s.batch_size):
                batch = range(first, min(first + s.batch_size, s.num_samples))
                tokens, pending = [], []  # a character may need several tokens: they wait until they make one
                print(f"--- sample {first + 1} of {s.num_samples}\n{text}", end="", flush=True)
                for token in model.stream(idx.repeat(len(batch), 1), s.max_new_tokens, s.temperature, s.top_k, s.top_p,
                                          generator=generator, sense_table=table):                  # (B,1)
                    tokens.append(token)
                    pending.append(token[0].item())
                    if not (new := tokenizer.decode(pending)).endswith("\ufffd"):
                        print(new, end="", flush=True)
                        pending = []
                print(tokenizer.decode(pending))
                for i, row in zip(batch[1:], torch.cat(tokens, 1)[1:].tolist()):
                    print(f"--- sample {i + 1} of {s.num_samples}\n{text}{tokenizer.decode(row)}")
    rate = s.num_samples * s.max_new_tokens * (1 if edits is None else 2) / (time.perf_counter() - began)
    print(f"--- step {ckpt['step']}, {rate:,.0f} tokens/s on {device}")


if __name__ == "__main__":
    run(main, CheckpointError)
