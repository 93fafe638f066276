"""Edits as text and files: what is read, what is refused in one line, and what lab.edit writes."""

import json
import os
import random
import re

import pytest
import torch
from test_control import ALL, CHARS, tiny

import lab.edit
from configurator import UserError
from lab.control import MARGIN, EditedBackpack
from lab.edits import describe, make_edits, parse, read_edits, summary, unreached
from lab.files import expect_place, read_jsonl, replacing, write_text
from tokenizer import load_tokenizer

# ---- text and files


def test_text_and_file_say_the_same(tmp_path):
    text = f"{ALL}; scale a all 0"
    edits = parse(text)
    assert "; ".join(describe(edit) for edit in edits) == text
    (tmp_path / "many.json").write_text(json.dumps(edits))
    (tmp_path / "one.json").write_text(json.dumps(edits[0]))
    assert read_edits(tmp_path / "many.json") == edits
    assert read_edits(tmp_path / "one.json") == edits[:1]
    assert read_edits(None) == []
    assert parse(" ; ") == []
    assert make_edits(tiny(), CHARS, []) is None
    assert summary(edits) == "6 edits"
    assert summary(edits[:2]) == "swap a: b -> c margin 2; scale a 1 0.5"


def test_a_swap_without_a_margin_is_ours_as_text_and_the_papers_in_an_old_file(tmp_path):
    """Files from before 2026-12 keep their meaning: the paper's formula was the only one."""
    model = tiny()
    words = {"word": "a", "from": "b", "to": "c"}
    assert parse("swap a: b -> c") == [{"edit": "swap", **words, "margin": MARGIN}]
    (tmp_path / "old.json").write_text(json.dumps({"edit": "swap", **words}))
    old = read_edits(tmp_path / "old.json")
    assert old == parse("paper_swap a: b -> c")
    assert summary(old) == "paper_swap a: b -> c"
    C = model.senses(torch.tensor(0))
    now = EditedBackpack(model, make_edits(model, CHARS, old)).senses(torch.tensor(0))
    E = model.wte.weight
    ratio = E[2].norm() ** 2 / E[1].norm() ** 2
    for l in range(4):
        want = C[l] + (C[l] @ E[1]) / E[1].norm() ** 2 * (E[2] / ratio - E[1])
        assert torch.allclose(now[l], want)


def test_words_in_double_quotes_may_hold_spaces_and_semicolons():
    edits = parse('scale " river" 4 0; swap "a;b": " x" -> y')
    assert edits == [
        {"edit": "scale", "word": '" river"', "sense": 4, "factor": 0},
        {"edit": "swap", "word": '"a;b"', "from": '" x"', "to": "y", "margin": MARGIN},
    ]
    assert parse("; ".join(describe(edit) for edit in edits)) == edits


def test_files_of_text(tmp_path):
    """With a byte order mark or without; U+2028 does not end a line, but in print it is escaped."""
    edit = {"edit": "scale", "word": '"\u2028\n\x1b"', "sense": 0, "factor": 0}
    path = tmp_path / "e.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(json.dumps(edit, ensure_ascii=False).encode(encoding))
        assert read_edits(path) == [edit]
    assert describe(edit) == r'scale "\u2028\n\x1b" 0 0'
    path.write_bytes('{"a": "\u2028"}\r\n\r\n{"b": 2}'.encode())
    assert read_jsonl(path) == [{"a": "\u2028"}, {"b": 2}]
    path.write_bytes(json.dumps(edit).encode("utf-16"))
    with pytest.raises(UserError, match="e.json is not UTF-8: byte 0 is 0xff"):
        read_edits(path)


def test_a_word_that_an_edit_does_not_reach():
    """In GPT-2's vocabulary, Zimbabwe is one token after a space only; Paris is edited in both its forms."""
    gpt2 = load_tokenizer({"kind": "gpt2"})
    edits = parse('scale Zimbabwe 0 0; scale Paris 0 0; scale river 1 0; scale "oz" 0 0; topic river 2')

    def said(text):
        return unreached(gpt2, edits, text)

    (line,) = said("Zimbabwe is near")
    pieces = [gpt2.decode([id]) for id in gpt2.encode("Zimbabwe")]
    assert len(pieces) > 1
    begins = "scale Zimbabwe 0 0 leaves Zimbabwe alone without a space before it"
    assert line.startswith(begins) and line.endswith(f": there it is {'|'.join(pieces)}")
    assert [line.split()[1] for line in said("river Zimbabwe\nZimbabwe (river)")] == ["river"]
    for text in ("", "In Zimbabwe", "Zimbabwe or Zimbabwe", "Paris", "Zimbabwean rivers", "Mozart oz"):
        assert said(text) == []


# ---- what is refused


@pytest.mark.parametrize(
    "text, message",
    [
        ("scale a 0", "edit 'scale a 0': expected scale WORD SENSE FACTOR"),
        (
            "scala a 0 1",
            "expected scale WORD SENSE FACTOR; swap WORD: FROM -> TO [margin MARGIN]; paper_swap",
        ),
        ("swap a: b", "expected swap WORD: FROM -> TO [margin MARGIN]"),
        ("swap a: b -> c margin x", "margin is 'x', expected a number from 0"),
        ("swap a: b -> b", "swap a: b -> b margin 14: FROM and TO are the same token"),
        ("swap ab: c -> d", "'ab' is 2 tokens here, a b: this needs a word of one token, or one of these"),
        ("swap a: b -> cd", "'cd' is 2 tokens here, c d: this needs a word of one token, or one of these"),
        ("scale a 4 0", "scale a 4 0: sense is 4, expected 0 to 3"),
        ("scale a 1.5 0", "sense is 1.5, expected the number of a sense"),
        ("replace a all by b 1", "sense is 'all', expected the number of a sense"),
        ("scale a 1 x", "factor is 'x', expected a number"),
        ("scale a 1 " + "9" * 5000, "factor is inf, expected a number"),
        ("scale a 1 -1", "factor is -1, expected a number from 0"),
        ("scale a 1 1e5; scale a 1 1e5", "the edits of a make numbers of 1e+10"),
        ("scale ab 1 0", "scale ab 1 0: 'ab' is 2 tokens here, a b: this needs a word of"),
        ("topic a 5", "strength is 5, expected 1, 2, 3 or 4"),
        ("topic a, 2", "topic a, 2: '' is not a word"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make_edits(tiny(), CHARS, parse(text))
    assert "\n" not in str(error.value)


def file_of(**changes):
    """The text of a file with one edit, a scale, with these changes."""
    return json.dumps([{"edit": "scale", "word": "a", "sense": 0, "factor": 0} | changes])


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "e.json is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "e.json: found 7, expected a list of edits"),
        ("[7]", "edit 1: found 7, expected an object"),
        ("{}", 'edit 1: expected an "edit" that is one of scale, swap, paper_swap, topic, replace'),
        ('[{"edit": "swap", "word": "a"}]', "edit 1: paper_swap lacks 'from'"),
        (file_of(word=1), "edit 1: word is 1, expected text"),
        (file_of(word="\ud800"), r"word is '\ud800', expected text"),
        (file_of(sense=True), "sense is True, expected the number of a sense"),
        (file_of(sense=10**30), "sense is 1000000000000000000000000000000, expected 0 to 3"),
        (file_of(factor=float("nan")), "factor is nan, expected a number"),
        (file_of(edit="replace", by_sense=1), "replace lacks 'by'"),
        (file_of(edit="replace", vector=[1, "b"]), "vector is [1, 'b'], expected a list of"),
        (file_of(edit="replace", vector=[1, 2]), "of norm 2.236: found 2 numbers, expected 16"),
        (file_of(edit="replace", vector=[1] * 16, adds=3), "adds is 3, expected text"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make_edits(tiny(), CHARS, read_edits(tmp_path / "e.json"))
    assert "\n" not in str(error.value)


VALUES = [None, True, -1, 10**400, 1e308, float("nan"), "", "\ud800", "\0", [], [[]], {}, "all"]
VALUES += [0, 1, 2, 3, "a", "b", "c"]  # some that are fine


def spoil(edits, draw):
    """Replace or remove a value of an edit, or the edit itself, and perhaps cut or damage the JSON."""
    edit = draw.choice(edits)
    key = draw.choice(list(edit))
    if draw.random() < 0.2:
        del edit[key]
    elif draw.random() < 0.2:
        edits[draw.randrange(len(edits))] = draw.choice(VALUES)
    else:
        edit[key] = draw.choice(VALUES)
    data = json.dumps(edits).encode()
    if draw.random() < 0.2:
        cut = draw.randrange(len(data))
        data = data[:cut] + draw.choice([b"", b"\xff", b"\0", b"[" * 9])
    return data


def test_any_file_is_read_or_refused_in_one_line(tmp_path):
    """Files of edits come from anywhere. What is read makes edits of finite numbers, and has a name."""
    draw = random.Random(0)
    model = tiny(torch.float32)
    n_read = 0
    for _ in range(400):
        text = "swap a: b -> c; paper_swap b: c -> d; scale b all 0.5; replace c 0 by d 1; topic b 1"
        edits = parse(f"{text}; replace d 0 by a 0")
        edits[5] = {"edit": "replace", "word": "a", "sense": 0, "vector": [0.5] * 16, "adds": "b"}
        (tmp_path / "e.json").write_bytes(spoil(edits, draw))
        try:
            edits = read_edits(tmp_path / "e.json")
            made = make_edits(model, CHARS, edits)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        n_read += 1
        assert all(describe(edit).isprintable() for edit in edits)
        logits, _ = EditedBackpack(model, made)(torch.arange(8)[None])
        assert logits.isfinite().all()
    assert 20 < n_read < 380


def test_models_that_can_not_be_edited():
    with pytest.raises(UserError, match="no senses to edit"):
        make_edits(tiny(n_sense=0), CHARS, parse("scale a 0 0"))
    model = tiny()
    model.wte.weight[1] = 0
    with pytest.raises(UserError, match="the edits of a make numbers of nan"):
        make_edits(model, CHARS, parse("paper_swap a: b -> c"))


# ---- the command


def test_a_file_is_listed_and_changed(run_train, tmp_path, capsys):
    out = run_train("--max_iters=3")
    file = tmp_path / "my.json"
    args = [f"--run={out}", f"--edits={file}", "--device=cpu"]
    lab.edit.main([*args, "--edit=scale z 1 0.5; topic y 2"])
    lab.edit.main([*args, "--edit=swap d: o -> w"])
    capsys.readouterr()
    lab.edit.main([*args, "--remove=2"])
    listed = ["  1  scale z 1 0.5", "  2  swap d: o -> w margin 14"]
    assert capsys.readouterr().out.split("\n") == [*listed, f"wrote {file}", ""]
    lab.edit.main(args)
    assert capsys.readouterr().out.split("\n") == [*listed, ""]
    lab.edit.main([args[0], "--edit=scale z 1 0.5"])
    said = capsys.readouterr().out.split("\n")
    assert said == ["nothing is saved without --edits=FILE", listed[0], ""]
    assert [edit["edit"] for edit in read_edits(file)] == ["scale", "swap"]
    # what does not fit is told before anything is written
    before = file.read_bytes()
    for more, message in [
        ("--remove=7", "remove=7: found 2 edits"),
        ("--edit=scale z 9 0", "sense is 9, expected 0 to 3"),
        (f"--edits={tmp_path}", "is there, and is not a file to replace"),
        (f"--edits={file}/e.json", "my.json is not a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            lab.edit.main([*args, "--edit=scale z 1 0", more])
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        lab.edit.main([*args, f"--edits={tmp_path / 'nothing.json'}"])
    assert file.read_bytes() == before


# ---- files that the lab writes


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "new/page.html"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(KeyboardInterrupt):
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    with pytest.raises(UserError, match="could not write .*page.html: No space left on device"):
        with replacing(path) as file:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
    assert path.read_text() == "é"
    assert os.listdir(path.parent) == ["page.html"]


def test_only_a_file_of_its_kind_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo.html")
    (tmp_path / "thesis.tex").write_text("kept")
    for path, message in [
        (tmp_path / "fifo.html", "is there, and is not a file to replace"),
        (tmp_path, "expected a name that ends in .html"),
        ("/dev/null", "expected a name that ends in .html"),
        (tmp_path / "thesis.tex", "expected a name that ends in .html"),
        (tmp_path / "thesis.tex/page.html", "thesis.tex is not a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            expect_place(path, (".html",))
    with pytest.raises(UserError, match="not a file to replace"):
        write_text("/dev/null", "")
    expect_place(tmp_path / "new/page.HTML", (".html",))
    with pytest.raises(UserError, match="config.json: a file of this name belongs to a run"):
        expect_place(tmp_path / "config.json", (".json",))


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Neither in the place of a file, nor of the temporary one, whose name nobody can know before."""
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    link = tmp_path / "page.html"
    link.symlink_to(mine)
    for write in (lambda: expect_place(link, (".html",)), lambda: write_text(link, "")):
        with pytest.raises(UserError, match="page.html is a link, and not a file to replace"):
            write()
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a link"):
        write_text(link, "")
    monkeypatch.setattr("secrets.token_hex", lambda n: "known")
    (tmp_path / ".known.partial").symlink_to(mine)
    with pytest.raises(UserError, match="could not write .*other.html: File exists"):
        write_text(tmp_path / "other.html", "")
    assert mine.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [".known.partial", "mine.html", "page.html"]
