"""Turn text into a dataset: data/NAME/ with token ids in train.bin and val.bin, and meta.json.

    python prepare_data.py                        Shakespeare's plays, one token per character
    python prepare_data.py --dataset=shakespeare  the same plays, with a BPE of 4,096 tokens
    python prepare_data.py --dataset=openwebtext  from Hugging Face, with GPT-2's BPE
    python prepare_data.py --dataset=mine --input=a.txt,folder --tokenizer=bpe --vocab_size=8192

Built in are shakespeare_char, shakespeare, tinyshakespeare_char, simplewiki, openwebtext and fineweb_edu.
Your own text is .txt (a blank line ends a document) or .jsonl ({"text": ...} on each line), and may be
compressed as .gz, .xz or .zst. To continue an interrupted run, repeat its command. Other files in
data/NAME/ are left alone.
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

from configurator import UserError, changed, configure, hold, run
from data.corpora import BUILT_IN, input_files, keep_apart, own_text
from tokenizer import KINDS, UNKNOWN, load_tokenizer, train_bpe


@dataclass
class Settings:
    dataset: str = "shakespeare_char"  # a built-in dataset, or a new name for your own text
    input: str | None = None  # your text: files and folders, comma-separated
    tokenizer: str | None = None  # char, gpt2, bpe, or the folder of a dataset or run that has one
    vocab_size: int | None = None  # of a bpe; None: the built-in's, 8192 for your own text
    val_fraction: float = 0.01  # share of your documents for validation, chosen by a hash of each
    num_proc: int | None = None  # processes that tokenize; None: one per core
    data_dir: str = "data"  # where all datasets are kept
    overwrite: bool = False  # replace a dataset that was made with other settings


# a finished dataset; until then each is NAME.partial, and they are renamed in this order
FILES = ("train.bin", "val.bin", "meta.json")
BPE_TRAIN_CHARS = 10**9  # learn a bpe from at most this much of the training text
BATCH_CHARS = 500_000  # text that a worker gets at a time
SAVE_EVERY = 30  # seconds between saves of the progress


# ---- tokenizing


def first(texts, n_chars):
    """Yield texts until they add up to n_chars."""
    for text in texts:
        yield text
        n_chars -= len(text)
        if n_chars <= 0:
            return


def learn_vocabulary(kind, vocab_size, source):
    """Learn a tokenizer from the training texts. Returns its spec and, for char, unseen.

    unseen: a pattern of the characters that only validation texts have, which become UNKNOWN, or None.
    """
    if kind == "bpe":
        texts = (text for is_val, text, _ in source() if not is_val)
        return train_bpe(first(texts, BPE_TRAIN_CHARS), vocab_size), None
    train_chars, val_chars = set(), set()
    for is_val, text, _ in source():
        (val_chars if is_val else train_chars).update(text)
    unseen = "".join(sorted(val_chars - train_chars))
    if unseen:
        train_chars.add(UNKNOWN)
    spec = {"kind": "char", "chars": "".join(sorted(train_chars))}
    return spec, f"[{re.escape(unseen)}]" if unseen else None


def start_worker(spec, unseen):
    global TOKENIZER, UNSEEN  # once per process: loading a tokenizer takes longer than a batch
    TOKENIZER, UNSEEN = load_tokenizer(spec), unseen


def token_dtype(vocab_size):
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode(batch):
    """A list of (is_val, text) -> ids for train.bin, ids for val.bin, and what to add to the counts."""
    ids, n_bytes, n_unknown = ([], []), 0, 0
    for is_val, text in batch:
        n_bytes += len(text.encode())
        if is_val and UNSEEN:
            text, n = re.subn(UNSEEN, UNKNOWN, text)
            n_unknown += n
        ids[is_val].append(TOKENIZER.encode(text))
        if TOKENIZER.end is not None:
            ids[is_val].append([TOKENIZER.end])
    dtype = token_dtype(TOKENIZER.vocab_size)
    train, val = (np.concatenate([[], *part]).astype(dtype) for part in ids)
    counts = {"documents": len(batch), "bytes": n_bytes, "unknown_characters": n_unknown}
    return train, val, counts | {"train_tokens": len(train), "val_tokens": len(val)}


def batches(documents, bar):
    """Yield lists of (is_val, text) of about BATCH_CHARS characters; moves the progress bar along."""
    batch, size = [], 0
    for is_val, text, share in documents:
        batch.append((is_val, text))
        size += len(text)
        if size >= BATCH_CHARS:
            bar.update(share - bar.n)
            yield batch
            batch, size = [], 0
    yield batch


def map_in_order(pool, function, items, ahead):
    """Yield function(item) in order. At most `ahead` items are read in advance, to bound memory."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def encode_all(todo, spec, unseen, num_proc):
    """Yield encode(batch) of all batches in order, computed by num_proc processes."""
    if num_proc == 1:
        start_worker(spec, unseen)
        yield from map(encode, todo)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, spawn, start_worker, (spec, unseen)) as pool:
        yield from map_in_order(pool, encode, todo, 4 * num_proc)


# ---- files


def sync(*files):
    """Wait until what was written is on disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def write_json(path, value):
    with open(path, "w") as file:
        file.write(json.dumps(value))
        sync(file)


def read_json(path):
    """The dict in a JSON file; {} if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def write_tokens(folder, source, state, num_proc):
    """Append the tokens of all documents to folder/{train,val}.bin.partial; state["counts"] counts them.

    Every SAVE_EVERY seconds the state goes to folder/progress.json, where an interrupted run continues.
    """
    counts, dtype = state["counts"], np.dtype(state["dtype"])
    bar_format = "tokenizing {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    with (
        tqdm(total=1.0, bar_format=bar_format) as bar,
        open(folder / "train.bin.partial", "ab") as train,
        open(folder / "val.bin.partial", "ab") as val,
    ):
        # drop what was written after the last save
        train.truncate(counts["train_tokens"] * dtype.itemsize)
        val.truncate(counts["val_tokens"] * dtype.itemsize)
        todo = batches(source(skip=counts["documents"]), bar)
        start = saved = time.time()
        start_bytes = counts["bytes"]
        for train_ids, val_ids, new in encode_all(todo, state["spec"], state["unseen"], num_proc):
            train.write(train_ids.tobytes())
            val.write(val_ids.tobytes())
            for key in new:
                counts[key] += new[key]
            rate = (counts["bytes"] - start_bytes) / 1e6 / (time.time() - start)
            bar.set_postfix_str(f"{rate:.1f} MB/s")
            if time.time() - saved > SAVE_EVERY:
                sync(train, val)
                write_json(folder / "progress.json.partial", state)
                (folder / "progress.json.partial").replace(folder / "progress.json")
                saved = time.time()
        sync(train, val)


def finish(folder, meta):
    """Rename all files to their final names."""
    # A folder without meta.json is no dataset. So it is removed first and comes back last: at any
    # moment the folder holds the old dataset, none, or the new one.
    write_json(folder / "meta.json.partial", meta)
    (folder / "meta.json").unlink(missing_ok=True)
    for name in FILES:
        (folder / f"{name}.partial").replace(folder / name)
    (folder / "progress.json").unlink(missing_ok=True)


def is_made(folder, origin):
    """Whether the folder has this very dataset, complete. UserError: it has one of other settings."""
    there = [name for name in FILES if (folder / name).exists()]
    if not there:
        return False
    made = read_json(folder / ("meta.json" if "meta.json" in there else "meta.json.partial"))
    if made.get("source") != origin:
        hint = "use another --dataset=NAME, or --overwrite to replace it"
        raise UserError(f"{folder} was made with other settings: {hint}")
    return len(there) == len(FILES)


def saved_progress(folder, origin):
    """The state of an interrupted run with the same settings, or None."""
    state = read_json(folder / "progress.json")
    if state.get("source") != origin or "dtype" not in state:
        return None
    for split in ("train", "val"):
        path = folder / f"{split}.bin.partial"
        n_bytes = state["counts"][f"{split}_tokens"] * np.dtype(state["dtype"]).itemsize
        if not path.exists() or path.stat().st_size < n_bytes:
            return None
    return state


# ---- the dataset


def make(folder, settings, origin, spec, make_source):
    """Make the dataset in folder, unless it is there. spec: its tokenizer; None: learn one."""
    kind = origin["tokenizer"]
    if not settings.overwrite and is_made(folder, origin):
        print(f"{folder} already exists, made with these settings; --overwrite makes it again")
        return

    # characters have no token that ends a document, so a blank line does
    by_characters = kind == "char" or (spec is not None and spec["kind"] == "char")
    source = make_source(settings, "\n\n" if by_characters else "")
    state = saved_progress(folder, origin)
    if state:
        print(f"continuing after {state['counts']['documents']:,} documents")
    else:
        (folder / "progress.json").unlink(missing_ok=True)
        unseen = None
        if not spec:
            print("learning the vocabulary")
            spec, unseen = learn_vocabulary(kind, origin.get("vocab_size"), source)
        keys = ("train_tokens", "val_tokens", "documents", "bytes", "unknown_characters")
        state = {"source": origin, "spec": spec, "unseen": unseen, "counts": dict.fromkeys(keys, 0)}
    counts, vocab_size = state["counts"], load_tokenizer(state["spec"]).vocab_size
    state["dtype"] = token_dtype(vocab_size).name
    start, start_bytes = time.time(), counts["bytes"]
    write_tokens(folder, source, state, settings.num_proc)

    n_documents, n_train, n_val = (counts[k] for k in ("documents", "train_tokens", "val_tokens"))
    if not n_train or not n_val:
        raise UserError(
            f"{n_documents} documents gave {n_train} training and {n_val} validation tokens: change "
            f"val_fraction={settings.val_fraction}; in .txt, a blank line ends a document"
        )
    meta = {"dtype": state["dtype"], "vocab_size": vocab_size, "tokenizer": state["spec"]}
    finish(folder, meta | counts | {"source": origin})
    rate = (counts["bytes"] - start_bytes) / 1e6 / (time.time() - start)
    print(
        f"{folder}: {n_train:,} training and {n_val:,} validation tokens of {n_documents:,} documents, "
        f"a vocabulary of {vocab_size:,} ({kind}), {counts['unknown_characters']:,} unknown characters, "
        f"{rate:.1f} MB/s"
    )


def given_tokenizer(kind):
    """The spec that --tokenizer asks for; None: a char or bpe, to be learned. UserError: unknown."""
    if kind in KINDS:
        return {"kind": "gpt2"} if kind == "gpt2" else None
    spec = read_json(Path(kind) / "meta.json").get("tokenizer")  # of a dataset
    if not spec and (Path(kind) / "ckpt.pt").is_file():
        from model import load_checkpoint  # imports torch, which nothing else here needs

        spec = load_checkpoint(kind)["meta"]["tokenizer"]
    if not spec:
        hint = f"expected {', '.join(KINDS)} or the folder of a dataset or run that has one"
        raise UserError(f"unknown tokenizer {kind!r}: {hint}")
    return spec


def main(argv):
    settings, sources = configure(Settings, argv, __doc__)
    print(f"prepare_data.py\n{changed(settings, sources)}")
    settings.num_proc = settings.num_proc or os.cpu_count()
    # it becomes the name of a folder, which must not be another one
    if not re.fullmatch(r"[\w-]([\w.-]*[\w-])?", settings.dataset):
        what = "a name of letters, digits, _ and -, with dots only inside"
        raise UserError(f"dataset={settings.dataset!r} must be {what}")
    if not 0 < settings.val_fraction < 1:
        raise UserError(f"val_fraction={settings.val_fraction} must be between 0 and 1")
    if settings.num_proc < 1:
        raise UserError(f"num_proc={settings.num_proc} must be at least 1")

    make_source, kind, vocab_size = BUILT_IN.get(settings.dataset, (own_text, "gpt2", 8192))
    kind = settings.tokenizer or kind
    spec = given_tokenizer(kind)
    folder = Path(settings.data_dir) / settings.dataset
    if settings.input:
        keep_apart(settings.input, folder)
    origin = {"dataset": settings.dataset, "input": settings.input, "tokenizer": kind}
    if kind == "bpe":
        origin["vocab_size"] = settings.vocab_size or vocab_size
    if make_source is own_text and settings.input:
        # the size shows when a text has changed
        origin["input_bytes"] = sum(path.stat().st_size for path in input_files(settings.input))
        origin["val_fraction"] = settings.val_fraction
    with hold(folder):
        make(folder, settings, origin, spec, make_source)


if __name__ == "__main__":
    run(main)
