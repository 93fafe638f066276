"""sample.py prints what the model generates, and open_run opens runs for every tool."""

import os
import sys

import pytest
import torch
from conftest import ROOT, TINY, lines, make_dataset

import sample
import train
from configurator import UserError, run
from model import Backpack, load_checkpoint
from tokenizer import load_tokenizer

SHIPPED = ROOT / "pretrained/simplewiki"


def printed(capsys, *args):
    """The samples that sample.py prints, without their titles and the last line."""
    capsys.readouterr()
    sample.main(["--device=cpu", "--max_new_tokens=30", *args])
    parts = capsys.readouterr().out.split("--- ")[1:-1]
    return [part.split("\n", 1)[1].removesuffix("\n") for part in parts]


def tokenizer_of(run):
    return load_tokenizer(load_checkpoint(run)["meta"]["tokenizer"])


@pytest.mark.parametrize("table", ["4", "0"])
def test_samples_are_the_models(run_train, capsys, table):
    """They are generate()'s, with one generator for all batches, with a sense table or without."""
    out = run_train()
    how = (
        f"--run={out}",
        "--start=document 1",
        "--temperature=0.9",
        "--top_k=9",
        f"--sense_table_gb={table}",
    )
    three = printed(capsys, *how, "--num_samples=3", "--batch_size=2")
    model, tokenizer = Backpack.from_checkpoint(out), tokenizer_of(out)
    generator = torch.Generator().manual_seed(1337)
    idx = torch.tensor(tokenizer.encode("document 1"))[None]
    rows = [
        *model.generate(idx.repeat(2, 1), 30, temperature=0.9, top_k=9, generator=generator),
        *model.generate(idx, 30, temperature=0.9, top_k=9, generator=generator),
    ]
    assert three == [tokenizer.decode(row.tolist()) for row in rows] and len(set(three)) == 3
    assert printed(capsys, *how, "--num_samples=1", "--seed=1") != three[:1]


def test_start_from_a_file_and_from_nothing(run_train, tmp_path, capsys):
    out = run_train()
    (tmp_path / "start.txt").write_text("document 7 has\n")
    start = f"--start=FILE:{tmp_path / 'start.txt'}"
    (from_file,) = printed(capsys, f"--run={out / 'ckpt.pt'}", "--num_samples=1", start)
    assert from_file.startswith("document 7 has\n") and len(from_file) == 15 + 30
    (empty,) = printed(capsys, f"--run={out}", "--num_samples=1", "--top_p=0.9")
    assert len(empty) == 30


def test_characters_of_several_tokens_are_printed_whole(tmp_path, capsys):
    """A byte-level vocabulary of 257 tokens splits each of these characters."""
    make_dataset(
        tmp_path,
        "bytes",
        (f"{i} 漢字 🙂 {text}" for i, text in enumerate(lines(60))),
        "--tokenizer=bpe",
        "--vocab_size=257",
        "--val_fraction=0.2",
    )
    train.main(
        [
            *TINY,
            f"--data_dir={tmp_path}",
            "--dataset=bytes",
            f"--out_dir={tmp_path / 'run'}",
            "--n_layer=1",
        ]
    )
    how = f"--run={tmp_path / 'run'}", "--num_samples=1"
    (text,) = printed(
        capsys, *how, "--start=漢字 🙂", "--max_new_tokens=200", "--stop_at_end=False"
    )
    tokenizer = tokenizer_of(tmp_path / "run")
    idx = torch.tensor(tokenizer.encode("漢字 🙂"))[None]
    assert idx.size(1) == 3 + 3 + 1 + 4
    ids = Backpack.from_checkpoint(tmp_path / "run").generate(
        idx, 200, temperature=0.8, generator=torch.Generator().manual_seed(1337)
    )
    assert text == tokenizer.decode(ids[0].tolist())
    assert not printed(capsys, *how)[0].startswith("<|endoftext|>")


def test_16_bits(run_train, capsys):
    out = run_train("--max_iters=40")
    exact, rounded = (
        printed(capsys, f"--run={out}", "--num_samples=1", "--temperature=0", f"--dtype={dtype}")[0]
        for dtype in ("float32", "bfloat16")
    )
    assert rounded[:3] == exact[:3]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--start=Ω"], "character 'Ω' is not among the"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt: No such file"),
        (["--start=FILE:bad.txt"], "bad.txt is not UTF-8: byte 2"),
        (["--temperature=-1"], "temperature=-1.0 (command line): expected a number in [0, 1e6]"),
        (["--top_p=2"], "top_p=2.0 (command line): expected a number in (0, 1]"),
        (["--num_samples=0"], "num_samples=0 (command line)"),
        (["--batch_size=0"], "batch_size=0 (command line)"),
        (["--sense_table_gb=-1"], "sense_table_gb=-1.0 (command line)"),
        (["--device=cuda:99"], "device='cuda:99': this machine has no such device"),
        (["--strat=x"], "did you mean 'start'"),
        (["--run=nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_bad_settings(run_train, tmp_path, monkeypatch, args, message):
    out = run_train("--max_iters=1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"ok\xff")
    with pytest.raises((ValueError, OSError)) as error:
        sample.main([f"--run={out}", *args])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_tokenizer():
    with pytest.raises(
        UserError, match="unknown tokenizer 'bert': expected one of char, gpt2, bpe"
    ):
        load_tokenizer({"kind": "bert"})


class Script:
    """Stands in for the model's stream: the next token of every sample, from a list of each."""

    def __init__(self, *samples):
        self.samples, self.taken = samples, 0

    def __call__(self, idx, max_new_tokens, **sampling):
        assert len(idx) == len(self.samples)
        for ids in list(zip(*self.samples))[:max_new_tokens]:
            self.taken += 1
            yield torch.tensor(ids)[:, None]


@pytest.mark.parametrize("stop_at_end", [True, False])
def test_a_sample_ends_with_its_document(capsys, monkeypatch, stop_at_end):
    """Generation stops when all samples of a batch have ended; --stop_at_end=False goes on."""
    tokenizer = tokenizer_of(SHIPPED)
    one, two, rest = (
        tokenizer.encode(text).tolist() for text in (" one", " two", " three four five")
    )
    end = tokenizer.end
    script = Script([*one, end, *rest], [*two, *two, end, *rest])
    monkeypatch.setattr(Backpack, "stream", lambda self, *args, **keys: script(*args, **keys))
    args = [f"--run={SHIPPED}", "--start=It", "--num_samples=2", f"--stop_at_end={stop_at_end}"]
    samples = printed(capsys, *args)
    if stop_at_end:
        assert samples == ["It one", "It two two"] and script.taken == 3
    else:
        mark, rest = "<|endoftext|>", " three four five"
        assert samples[0] == f"It one{mark}{rest}"
        assert samples[1].startswith(f"It two two{mark}") and script.taken == 2 + len(
            tokenizer.encode(rest)
        )


def test_a_trained_model_ends_its_documents(capsys):
    """With --stop_at_end=False the text begins the same, and goes on behind the end."""
    args = [
        f"--run={SHIPPED}",
        "--start=It is a commune.",
        "--num_samples=1",
        "--max_new_tokens=120",
    ]
    for seed in range(10):
        (stopped,) = printed(capsys, *args, f"--seed={seed}")
        (going_on,) = printed(capsys, *args, f"--seed={seed}", "--stop_at_end=False")
        assert going_on.split("<|endoftext|>")[0] == stopped
        if "<|endoftext|>" in going_on:
            break
    else:
        pytest.fail("no sample of ten has an end of document in it")


def test_the_newest_run_is_taken_and_named(run_train, tmp_path, monkeypatch, capsys):
    """The newest in out/, or the newest that has senses if a tool needs them; else the shipped run."""
    monkeypatch.chdir(tmp_path)
    opened = sample.open_run(device="cpu")
    assert opened.path == SHIPPED and f"run: {SHIPPED}" in capsys.readouterr().err
    for age, name, n_sense in ((30, "old", 4), (20, "new", 4), (10, "plain", 0)):
        out = run_train("--max_iters=1", f"--n_sense={n_sense}", out=f"out/{name}")
        at = os.stat(out / "ckpt.pt").st_mtime - age
        os.utime(out / "ckpt.pt", (at, at))
    capsys.readouterr()
    opened = sample.open_run(device="cpu")
    assert str(opened.path) == "out/new" and capsys.readouterr().err == "run: out/new\n"
    assert opened.model.config.n_sense == 4 and not opened.model.training
    assert opened.ckpt["step"] == 1 and opened.edits == [] and opened.model.edits is None
    assert opened.tokenizer.spec["kind"] == "char" and opened.device.type == "cpu"
    sample.main(["--device=cpu", "--num_samples=1", "--max_new_tokens=5"])
    assert capsys.readouterr().err == "run: out/plain\n"
    sample.open_run("out/new", "cpu")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="out/plain is a plain Transformer"):
        sample.open_run("out/plain", "cpu")


@pytest.mark.parametrize("edit", ["", "--edit=scale a 0 0"])
def test_a_run_without_a_tokenizer(run_train, edit):
    out = run_train("--max_iters=1")
    ckpt = load_checkpoint(out)
    ckpt["meta"] = {"tokenizer": None}
    train.save_checkpoint(out / "ckpt.pt", ckpt)
    with pytest.raises(UserError, match="ckpt.pt|run has no tokenizer"):
        sample.main([f"--run={out}", "--device=cpu", *filter(None, [edit])])


def test_a_missing_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        run(sample.main)
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(f"sample.py: no checkpoint at {tmp_path}")
