"""Turn text into a dataset: data/NAME/ with token ids in train.bin and val.bin, and meta.json.

    python prepare_data.py                        Shakespeare's plays, one token per character
    python prepare_data.py --dataset=shakespeare  the same plays, with a BPE of 4,096 tokens
    python prepare_data.py --dataset=openwebtext  from Hugging Face, with GPT-2's BPE
    python prepare_data.py --dataset=mine --input=a.txt,folder --tokenizer=bpe --vocab_size=8192

Built in are shakespeare_char, shakespeare, tinyshakespeare_char, simplewiki, openwebtext and fineweb_edu.
Your own text is plain text (each file is a document, unless --documents says otherwise) or .jsonl
({"text": ...} on each line), optionally as .gz, .xz or .zst; of a folder, its .txt, .md and .jsonl files.
For a dataset of the Hub, --input=FILE takes its place; datasets loads --input=NAME and --input=FOLDER.
To continue an interrupted run, repeat its command. Other files in data/NAME/ are left alone.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import statistics
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UsageError, UserError, changed, configure, run, short
from data import corpora
from files import hold, parse_json, read_json, read_text, write_text
from tokenizer import KINDS, UNKNOWN, learn, load_tokenizer, token_dtype


@dataclass
class Settings:
    dataset: str = "shakespeare_char"  # a built-in dataset, or a new name for your own text
    input: str | None = None  # your text: files and folders, comma-separated, see above
    tokenizer: str | None = None  # char, gpt2, bpe, or the folder of a dataset or run that has one
    vocab_size: int | None = None  # [257, 1000000] of a bpe; None: 8192, or the built-in's
    documents: str | None = None  # what ends one in .txt: file, blank_line, a regular expression
    val_fraction: float | None = None  # (0, 1) for validation; None: 1%, or 10% of whole files
    num_proc: int | None = None  # [1, 1024] processes that tokenize; None: one per core
    data_dir: str = "data"  # where all datasets are kept
    overwrite: bool = False  # replace a dataset that was made with other settings


# a finished dataset; until then each is NAME.partial, and they are renamed in this order
FILES = ("train.bin", "val.bin", "meta.json")
BATCH_CHARS = 500_000  # text that a worker gets at a time
SAVE_EVERY = 30  # seconds between saves of the progress
COUNTS = ("pieces", "documents", "bytes", "train_tokens", "val_tokens", "unknown_characters")
FEW_TOKENS = 20_000  # of validation text; the loss on fewer is uncertain by more than some 0.02


# ---- tokenizing


def start_worker(spec, unseen):
    global TOKENIZER, UNSEEN  # once per process: loading a tokenizer takes longer than a batch
    if parent := multiprocessing.parent_process():  # if it is killed, its workers end, too
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    TOKENIZER = load_tokenizer(spec)
    UNSEEN = re.compile(f"[{re.escape(unseen)}]") if unseen else None


def encode(batch):
    """A list of Pieces -> ids for train.bin, ids for val.bin, and what to add to the counts."""
    ids, n_bytes, n_unknown = ([], []), 0, 0
    for piece in batch:
        text = piece.text
        n_bytes += len(text.encode())
        if piece.is_val and UNSEEN:
            text, n = UNSEEN.subn(UNKNOWN, text)
            n_unknown += n
        ids[piece.is_val].append(TOKENIZER.encode(text))
        if piece.ends and TOKENIZER.end is not None:
            ids[piece.is_val].append([TOKENIZER.end])
    dtype = token_dtype(TOKENIZER.vocab_size)
    train, val = (np.concatenate([[], *part]).astype(dtype) for part in ids)
    n_documents = sum(piece.start == 0 for piece in batch)
    counts = (len(batch), n_documents, n_bytes, len(train), len(val), n_unknown)
    return train, val, dict(zip(COUNTS, counts))


def batches(pieces, bar, lengths):
    """Yield lists of Pieces, of about BATCH_CHARS characters; moves the bar, lists the documents' lengths."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if not piece.start:
            lengths.append(0)
        lengths[-1:] = [piece.start + len(piece.text)]
        if size >= BATCH_CHARS:
            bar.update(piece.share - bar.n)
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


def encode_all(todo, state, num_proc):
    """Yield encode(batch) of all batches in order, computed by num_proc processes."""
    if num_proc == 1:
        start_worker(state["spec"], state["unseen"])
        yield from map(encode, todo)
        return
    spawn, given = multiprocessing.get_context("spawn"), (state["spec"], state["unseen"])
    with ProcessPoolExecutor(num_proc, spawn, start_worker, given) as pool:
        # Ctrl-C is for this process alone: workers start here, and inherit that they ignore it
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(num_proc):
            pool.submit(int)
        signal.signal(signal.SIGINT, handler)
        try:
            yield from map_in_order(pool, encode, todo, 4 * num_proc)
        except BrokenProcessPool:
            what = f"one of num_proc={num_proc} processes was killed, perhaps as memory ran out"
            raise UserError(f"{what}: repeat the command, or lower num_proc") from None


# ---- files


def discard(folder):
    """Remove what an interrupted run has left."""
    for name in ("progress.json", "train.bin.partial", "val.bin.partial"):
        (folder / name).unlink(missing_ok=True)


def write_tokens(folder, source, state, dtype, num_proc):
    """Append the tokens of all pieces to folder/{train,val}.bin.partial; state["counts"] counts them.

    Every SAVE_EVERY seconds the state goes to folder/progress.json, where an interrupted run continues.
    Returns the lengths of the documents in characters.
    """
    counts, lengths = state["counts"], []
    bar_format = "tokenizing {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    with (
        tqdm(total=1.0, bar_format=bar_format) as bar,
        open(folder / "train.bin.partial", "ab") as train,
        open(folder / "val.bin.partial", "ab") as val,
    ):
        # drop what was written after the last save
        train.truncate(counts["train_tokens"] * dtype.itemsize)
        val.truncate(counts["val_tokens"] * dtype.itemsize)
        todo = batches(source(skip=counts["pieces"]), bar, lengths)
        start = saved = time.time()
        start_bytes = counts["bytes"]
        for train_ids, val_ids, new in encode_all(todo, state, num_proc):
            train.write(train_ids.tobytes())
            val.write(val_ids.tobytes())
            for key in new:
                counts[key] += new[key]
            rate = (counts["bytes"] - start_bytes) / 1e6 / (time.time() - start)
            bar.set_postfix_str(f"{rate:.1f} MB/s")
            if time.time() - saved > SAVE_EVERY:
                sync(train, val)
                write_text(folder / "progress.json", json.dumps(state))
                saved = time.time()
        sync(train, val)
    return lengths


def sync(*files):
    """Wait until what was written is on disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def finish(folder, meta):
    """Rename all files to their final names."""
    # A folder without meta.json is no dataset. So it is removed first and comes back last: at any
    # moment the folder holds the old dataset, none, or the new one.
    write_text(folder / "meta.json.partial", json.dumps(meta))
    (folder / "meta.json").unlink(missing_ok=True)
    for name in FILES:
        (folder / f"{name}.partial").replace(folder / name)
    (folder / "progress.json").unlink(missing_ok=True)


def is_made(folder, origin):
    """Whether the folder has this very dataset, complete. UserError: it has one of other settings."""
    there = [name for name in FILES if (folder / name).exists()]
    if not there:
        return False
    path, made = folder / ("meta.json" if "meta.json" in there else "meta.json.partial"), {}
    if path.exists():
        made = read_json(path, {"source?": dict}).get("source") or {}
    for key in made | origin:
        if made.get(key) != origin.get(key):
            what = f"found {key[:40]}={short(made.get(key))}, expected {short(origin.get(key))}"
            hint = "use another --dataset=NAME, or --overwrite to replace it"
            raise UserError(f"{folder} was made with other settings: {what}: {hint}")
    return len(there) == len(FILES)


def saved_progress(folder, origin):
    """The state of an interrupted run with the same settings, or None. UserError: it is damaged."""
    path = folder / "progress.json"
    if not path.exists():
        return None
    shape = {"source": dict, "spec": dict, "unseen": str, "counts": dict.fromkeys(COUNTS, int)}
    where = f"{path} (remove it to start over)"
    state = parse_json(read_text(path), shape, where)
    counts, dtype = state["counts"], token_dtype(load_tokenizer(state["spec"], where).vocab_size)
    fits = state["source"] == origin and min(counts[key] for key in COUNTS) >= 0
    for split in ("train", "val"):
        partial = folder / f"{split}.bin.partial"
        there = partial.stat().st_size if partial.exists() else -1
        fits = fits and there >= counts[f"{split}_tokens"] * dtype.itemsize
    return state if fits else None


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
        print(f"continuing after {state['counts']['bytes'] / 1e6:,.1f} MB")
    else:
        discard(folder)
        unseen = ""
        if not spec:
            print("learning the vocabulary")
            spec, unseen = learn(kind, origin.get("vocab_size"), source)
        counts = dict.fromkeys(COUNTS, 0)
        state = {"source": origin, "spec": spec, "unseen": unseen, "counts": counts}
    counts, vocab_size = state["counts"], load_tokenizer(state["spec"], folder).vocab_size
    dtype = token_dtype(vocab_size)
    lengths = write_tokens(folder, source, state, dtype, settings.num_proc) or [0]
    n_documents, n_train, n_val = (counts[k] for k in ("documents", "train_tokens", "val_tokens"))
    if not n_train or not n_val:
        discard(folder)
        what = f"{n_documents} documents gave {n_train} training and {n_val} validation tokens"
        now = f"val_fraction={settings.val_fraction} or documents={settings.documents!r}"
        raise UserError(f"{what}: change {now}, or give more text")
    meta = {"dtype": dtype.name, "vocab_size": vocab_size, "tokenizer": state["spec"]}
    finish(folder, meta | counts | {"source": origin})
    print(
        f"{folder}: {n_train:,} training and {n_val:,} validation tokens\n"
        f"{n_documents:,} documents, median length {statistics.median(lengths):,.0f} characters, "
        f"a vocabulary of {vocab_size:,} ({kind}), {(n_train + n_val) / counts['bytes']:.3f} tokens "
        f"per byte, {counts['unknown_characters']:,} unknown characters"
    )
    if n_val < FEW_TOKENS:
        print(f"warning: a loss on {n_val:,} tokens is rough: more text would help")


def given_tokenizer(kind):
    """The spec that --tokenizer asks for; None: a char or bpe, to be learned. UserError: unknown."""
    if kind in KINDS:
        return {"kind": "gpt2"} if kind == "gpt2" else None
    path, run = Path(kind) / "meta.json", Path(kind) / "ckpt.pt"
    if path.is_file():
        spec = read_json(path, {"tokenizer": dict})["tokenizer"]
    elif run.is_file():
        from model import load_checkpoint  # imports torch, which nothing else here needs

        path, spec = run, load_checkpoint(run)["meta"]["tokenizer"]
    else:
        others = "or the folder of a dataset (meta.json) or run (ckpt.pt)"
        raise UserError(f"unknown tokenizer {kind!r}: expected {', '.join(KINDS)}, {others}")
    return load_tokenizer(spec, path).spec


def main(argv):
    settings, sources = configure(Settings, argv, __doc__)
    print(f"prepare_data.py\n{changed(settings, sources)}")
    settings.num_proc = settings.num_proc or os.cpu_count()
    # it becomes the name of a folder, which must not be another one
    if not re.fullmatch(r"[\w-]([\w.-]*[\w-])?", settings.dataset):
        what = "a name of letters, digits, _ and -, with dots only inside"
        raise UserError(f"dataset={settings.dataset!r} must be {what}")

    own = corpora.own_text, "gpt2", 8192
    make_source, kind, vocab_size = corpora.BUILT_IN.get(settings.dataset, own)
    kind = settings.tokenizer or kind
    spec = given_tokenizer(kind)
    folder = Path(settings.data_dir) / settings.dataset
    if settings.input and make_source is corpora.plays:
        hint = "to read your own text, name it, as in --dataset=mine"
        raise UsageError(f"input={settings.input!r}: {settings.dataset} reads none; {hint}")
    first = Path((settings.input or "").split(",")[0].strip())
    # the user's text takes the place of what is on the Hub
    if make_source is not corpora.tinyshakespeare and first.is_file():
        make_source = corpora.own_text
    is_own = make_source is corpora.own_text
    if settings.vocab_size and kind != "bpe":
        what = f"vocab_size={settings.vocab_size} has no effect on tokenizer={kind}"
        raise UsageError(f"{what}: give --tokenizer=bpe, or leave it out")
    for key in ("documents", "val_fraction"):
        if getattr(settings, key) is not None and not is_own:
            what = f"{key}={getattr(settings, key)!r} has no effect on {settings.dataset}"
            raise UsageError(f"{what}: leave it out")
    origin = {"dataset": settings.dataset, "input": settings.input, "tokenizer": kind}
    if kind == "bpe":
        origin["vocab_size"] = settings.vocab_size or vocab_size
    if settings.input and (is_own or first.exists()):  # it may be a name on the Hub
        texts, _ = corpora.input_files(settings.input)
        corpora.keep_apart(texts, folder)
        if is_own:
            origin |= corpora.own_origin(settings, texts)
    with hold(folder):
        try:
            make(folder, settings, origin, spec, make_source)
        except BaseException as error:
            if not (folder / "progress.json").exists():  # there is nothing to continue
                with contextlib.suppress(OSError):
                    discard(folder)
            if isinstance(error, KeyboardInterrupt):
                raise UserError(f"{folder}: interrupted; repeat the command to continue") from None
            if isinstance(error, OSError):
                what = f"{error.filename or folder}: {error.strerror or error}"
                raise UserError(f"{what}; fix this, then repeat the command to continue") from None
            raise


if __name__ == "__main__":
    run(main)
