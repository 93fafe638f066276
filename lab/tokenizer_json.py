"""tokenizer.json, the file of the tokenizers library and of transformers: of ours, and from others."""

import hashlib
import json
from pathlib import Path

from configurator import UserError, check
from lab.files import read_json, read_text
from tokenizer import (
    END,
    GPT2_SIZE,
    UNKNOWN,
    byte_characters,
    cut_words,
    keeps_marks,
    load_tokenizer,
    require,
)

# of GPT-2's tokens in the order of their ids, as JSON
GPT2_TOKENS_SHA256 = "ae640db5fc48332d32101df91998abf45c421979a55c96d0df9f812b7d32d806"
# what ends a document in the vocabularies of others, if nothing says so
USUAL_ENDS = (END, "</s>", "<eos>", "[SEP]")

# -----------------------------------------------------------------------------
# ours as a file


def for_transformers(tokenizer):
    """The text of a tokenizer.json that gives the same ids."""
    spec = tokenizer.spec
    if spec["kind"] == "library":
        return spec["json"]
    tokenizers = require("tokenizers", "a tokenizer.json")
    if spec["kind"] == "char":
        ids = {char: i for i, char in enumerate(spec["chars"])}
        codec = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, UNKNOWN))
        each = tokenizers.Regex(r"[\s\S]")
        codec.pre_tokenizer = tokenizers.pre_tokenizers.Split(each, "isolated")
        codec.decoder = tokenizers.decoders.Fuse()
        return codec.to_str()
    character = {byte: char for char, byte in byte_characters().items()}
    vocab = {}
    for token, rank in tokenizer.codec._mergeable_ranks.items():
        vocab["".join(character[byte] for byte in token)] = rank
    merges = merges_of(vocab)
    vocab[END] = tokenizer.end
    codec = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if keeps_marks(spec):
        codec.pre_tokenizer = cut_words()
    codec.decoder = tokenizers.decoders.ByteLevel()
    codec.add_special_tokens([END])
    return codec.to_str()


def merges_of(vocab):
    """The pairs that make the tokens of a BPE, {token: rank}, in order.

    A token's own pair is what is left of it when its characters are merged, the lowest rank first.
    """
    merges = []
    for token in sorted(vocab, key=vocab.get):
        parts = list(token)
        while len(parts) > 2:
            ranks = [vocab.get(a + b, vocab[token]) for a, b in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


# -----------------------------------------------------------------------------
# a file of others


def read_tokenizer(path, end_token=None):
    """The spec of a tokenizer.json, or of the one in a folder; it may come from anywhere.

    If one of our own kinds writes the same file, the spec is of that kind, and tiktoken can run it.
    end_token: the token that ends a document; None: eos_token of the tokenizer_config.json beside the file,
    or a usual one. UserError: the file is damaged, or has no such token.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    text = read_text(path)
    codec = load_codec(text, path)
    own = own_spec(codec)
    if own and end_token in (None, END):
        return own
    ends = [end_token] if end_token else [*described_end(path.parent), *USUAL_ENDS]
    known = [end for end in ends if codec.token_to_id(end) is not None]
    what = f"{path} has no token {' or '.join(map(repr, ends))} to end a document"
    check(known, f"{what}: give one that it has by --end_token=TOKEN")
    return {"kind": "library", "json": text, "end": known[0]}


def load_codec(text, path):
    """The library's Tokenizer that the text of a tokenizer.json describes. UserError: it describes none."""
    tokenizers = require("tokenizers", str(path))
    try:
        return tokenizers.Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # its panics are no Exception
        raise UserError(f"{path} is not a tokenizer.json: {error!r:.120}") from None


def described_end(folder):
    """[eos_token] of a tokenizer_config.json; [] if there is none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    described = read_json(path)
    end = described.get("eos_token") if isinstance(described, dict) else None
    if isinstance(end, dict):
        end = end.get("content")
    return [end] if isinstance(end, str) else []


def own_spec(codec):
    """The spec of our own kind whose tokenizer.json is this one; None: there is none."""
    written = plain(codec.to_str())
    model = written["model"]
    if model["type"] == "WordLevel":
        spec = {"kind": "char", "chars": "".join(sorted(model["vocab"], key=model["vocab"].get))}
    elif model["type"] == "BPE":
        spec = {"kind": "bpe", "model": written}
    else:
        return None
    try:
        same = plain(for_transformers(load_tokenizer(spec))) == written
    except Exception:  # it lacks END or bytes, or ids or merges don't fit: it isn't of this kind
        return None
    if not same:
        return None
    if spec["kind"] == "bpe" and is_gpt2(model["vocab"]) and not keeps_marks(spec):
        return {"kind": "gpt2"}
    return spec


def plain(text):
    """A tokenizer.json, parsed, without what has no effect on the ids of a text and their text."""
    parsed = json.loads(text)
    parsed |= {"truncation": None, "padding": None}
    processor = parsed["post_processor"] or {}
    if processor.get("type") == "ByteLevel" or processor.get("special_tokens") == {}:  # it adds no token
        parsed["post_processor"] = None
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if parsed["model"].get(key) == "":
            parsed["model"][key] = None
    if parsed["normalizer"] is None:
        for token in parsed["added_tokens"]:
            token["normalized"] = False
    return parsed


def is_gpt2(vocab):
    """Whether a vocabulary is GPT-2's: {token: id}, or whatever a file has in its place."""
    if not isinstance(vocab, dict) or len(vocab) != GPT2_SIZE or set(map(type, vocab.values())) != {int}:
        return False
    tokens = sorted(vocab, key=vocab.get)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest() == GPT2_TOKENS_SHA256
