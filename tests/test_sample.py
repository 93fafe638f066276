"""sample.py prints what the model generates, as it is generated; scripts where there is no terminal."""

import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import sample
import train
from configurator import UserError, run
from model import Backpack, load_checkpoint
from tokenizer import load_tokenizer

SHIPPED = ROOT / "pretrained/simplewiki"


def printed(capsys, *args):
    """The samples that sample.py prints, without their titles and the lines about speed."""
    capsys.readouterr()
    sample.main(["--device=cpu", "--max_new_tokens=30", *args])
    parts = [part.split("\n", 1) for part in capsys.readouterr().out.split("--- ")[1:]]
    return [text.removesuffix("\n") for title, text in parts if ", sample " in title]


def tokenizer_of(run):
    return load_tokenizer(load_checkpoint(run)["meta"]["tokenizer"])


@pytest.mark.parametrize("table", [True, False])
def test_samples_are_the_models(run_train, capsys, monkeypatch, table):
    """They are generate()'s, with one generator for all, with a sense table or without."""
    out = run_train()
    if not table:
        monkeypatch.setattr(Backpack, "sense_table", lambda self: None)
    sampling = "--temperature=0.9", "--top_k=9", "--top_p=0.95"
    three = printed(capsys, f"--run={out}", "--start=document 1", *sampling)
    model = Backpack.from_checkpoint(out)
    tokenizer = tokenizer_of(out)
    idx = torch.tensor(tokenizer.encode("document 1"))[None]
    how = {"temperature": 0.9, "top_k": 9, "top_p": 0.95}
    how["generator"] = torch.Generator().manual_seed(1337)
    rows = [model.generate(idx, 30, **how)[0] for _ in range(3)]
    assert three == [tokenizer.decode(row.tolist()) for row in rows]
    assert len(set(three)) == 3
    assert printed(capsys, f"--run={out}", "--start=document 1", *sampling, "--seed=1") != three


def test_the_start_may_be_in_a_file_or_empty(run_train, tmp_path, capsys):
    out = run_train("--max_iters=4")
    (tmp_path / "start.txt").write_text("document 7 has\n")
    greedy = f"--run={out / 'ckpt.pt'}", "--num_samples=1", "--temperature=0"
    (from_file,) = printed(capsys, *greedy, f"--start=FILE:{tmp_path / 'start.txt'}")
    assert [from_file] == printed(capsys, *greedy, "--start=document 7 has\n")
    assert len(from_file) == 15 + 30
    (empty,) = printed(capsys, *greedy)
    (newline,) = printed(capsys, *greedy, "--start=\n")
    assert newline == f"\n{empty}"  # a document of characters begins after one


def test_a_sample_is_printed_in_whole_characters_and_ends_with_its_document(capsys, monkeypatch):
    tokenizer = tokenizer_of(SHIPPED)
    ids = [*tokenizer.encode(" one 漢字 🙂"), tokenizer.end, *tokenizer.encode(" two")]
    assert len(tokenizer.encode("漢字")) > 2
    stream = [torch.tensor([[token]]) for token in ids]
    monkeypatch.setattr(Backpack, "stream", lambda *args, **sampling: iter(stream))
    args = f"--run={SHIPPED}", "--start=It", "--num_samples=1"
    assert printed(capsys, *args) == ["It one 漢字 🙂"]


def test_edits_and_16_bits(run_train, capsys):
    """An edited model is compared with none: without the senses of its characters another text follows."""
    out = run_train("--max_iters=40")
    args = f"--run={out}", "--start=document 1", "--num_samples=1", "--temperature=0"
    (plain,) = printed(capsys, *args)
    (rounded,) = printed(capsys, *args, "--dtype=bfloat16")
    assert rounded[:13] == plain[:13]
    edit = "; ".join(f'scale "{character}" all 0' for character in "document 1")
    without, edited = printed(capsys, *args, f"--edit={edit}")
    assert without == plain
    assert edited != plain


def test_the_newest_run_is_taken_and_named(run_train, tmp_path, monkeypatch, capsys):
    """The newest in out/, else the one that comes with the repository."""
    monkeypatch.chdir(tmp_path)
    assert sample.newest_run() == SHIPPED
    for age, name in ((20, "old"), (10, "new"), (30, "older")):
        out = run_train("--max_iters=1", "--warmup_iters=0", out=f"out/{name}")
        at = os.stat(out / "ckpt.pt").st_mtime - age
        os.utime(out / "ckpt.pt", (at, at))
    capsys.readouterr()
    sample.main(["--device=cpu", "--num_samples=1", "--max_new_tokens=5"])
    assert capsys.readouterr().out.startswith("--- out/new, step 1, sample 1 of 1\n")


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--run=nowhere", "no checkpoint at nowhere: give the folder of a trained run"),
        ("--run=bad.txt", "bad.txt is damaged, or no checkpoint of train.py"),
        ("--run=untold", "untold has no tokenizer"),
        ("--start=Ω", "character 'Ω' is not in this vocabulary"),
        ("--start=FILE:nowhere.txt", "No such file"),
        ("--start=FILE:bad.txt", "bad.txt is not UTF-8"),
        ("--temperature=-1", "temperature=-1.0 must not be negative"),
        ("--top_k=0", "top_k=0 must be at least 1"),
        ("--edits=nowhere.json", "nowhere.json"),
        ("--edit=scael words 0 2", "scael"),
        ("--device=cuda:99", "device='cuda:99': this machine has no such device"),
        ("--strat=x", "did you mean 'start'"),
    ],
)
def test_mistakes_are_one_line(run_train, tmp_path, monkeypatch, arg, message):
    out = run_train("--max_iters=1", "--warmup_iters=0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"ok\xff")
    (tmp_path / "untold").mkdir()
    train.save_checkpoint(tmp_path / "untold/ckpt.pt", {"meta": {"tokenizer": None}})
    with pytest.raises((UserError, OSError)) as error:
        sample.main([f"--run={out}", "--device=cpu", arg])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- where there is no terminal


class Cell(io.StringIO):
    """Standard output as a notebook has it: no file, and no way to change its encoding."""

    reconfigure = None

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


def test_scripts_run_in_a_notebook(tiny_argv, tmp_path, monkeypatch):
    """As by %run: in this process, with another standard output."""
    of_sample = [f"--run={tmp_path / 'run'}", "--device=cpu", "--max_new_tokens=3"]
    for script, argv in ((train, tiny_argv("--max_iters=4")), (sample, of_sample)):
        cell = Cell()
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        monkeypatch.setattr(sys, "stdout", cell)
        run(script.main)
        assert "tokens/s" in cell.getvalue()


def test_standard_output_may_be_closed(tiny_argv, tmp_path):
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, ROOT / "train.py"]
    done = subprocess.run([*command, *tiny_argv("--max_iters=4")], stderr=subprocess.PIPE)
    assert done.stderr == b""
    assert done.returncode == 0
    assert load_checkpoint(tmp_path / "run")["step"] == 4
