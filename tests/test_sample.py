import json

import pytest
import torch
from conftest import TINY, lines, make_dataset

import sample
import train
from configurator import UserError
from model import Backpack
from tokenizer import load_tokenizer


def printed(capsys, *args):
    """The samples that sample.py prints, without their titles and the last line."""
    capsys.readouterr()
    sample.main(["--device=cpu", "--max_new_tokens=30", *args])
    parts = capsys.readouterr().out.split("--- ")[1:-1]
    return [part.split("\n", 1)[1].removesuffix("\n") for part in parts]


@pytest.mark.parametrize("table", ["4", "0"])
def test_samples_are_the_models(run_train, capsys, table):
    """The text of generate() with one generator for all batches, with a sense table and without; the first is printed
    piece by piece."""
    out = run_train()
    how = f"--out_dir={out}", "--start=document 1", "--temperature=0.9", "--top_k=9", f"--sense_table_gb={table}"
    three = printed(capsys, *how, "--num_samples=3", "--batch_size=2")
    model, meta = Backpack.from_checkpoint(out), json.loads((out / "meta.json").read_text())
    tokenizer, generator = load_tokenizer(meta["tokenizer"]), torch.Generator().manual_seed(1337)
    idx = torch.tensor(tokenizer.encode("document 1"))[None]
    rows = [*model.generate(idx.repeat(2, 1), 30, temperature=0.9, top_k=9, generator=generator),
            *model.generate(idx, 30, temperature=0.9, top_k=9, generator=generator)]
    assert three == [tokenizer.decode(row.tolist()) for row in rows] and len(set(three)) == 3
    assert printed(capsys, *how, "--num_samples=1", "--seed=1") != three[:1]


def test_start_from_a_file_and_from_nothing(run_train, tmp_path, capsys):
    out = run_train()
    (tmp_path / "start.txt").write_text("document 7 has\n")
    start = f"--start=FILE:{tmp_path / 'start.txt'}"
    from_file, = printed(capsys, f"--out_dir={out / 'ckpt.pt'}", "--num_samples=1", start)
    assert from_file.startswith("document 7 has\n") and len(from_file) == 15 + 30
    empty, = printed(capsys, f"--out_dir={out}", "--num_samples=1", "--top_p=0.9")
    assert len(empty) == 30


def test_characters_of_several_tokens_are_printed_whole(tmp_path, capsys):
    """A byte-level vocabulary of 257 splits every one of these characters."""
    make_dataset(tmp_path, "bytes", (f"{i} 漢字 🙂 {text}" for i, text in enumerate(lines(60))), "--tokenizer=bpe",
                 "--vocab_size=257", "--val_fraction=0.2")
    train.main([*TINY, f"--data_dir={tmp_path}", "--dataset=bytes", f"--out_dir={tmp_path / 'run'}", "--n_layer=1"])
    how = f"--out_dir={tmp_path / 'run'}", "--num_samples=1"
    text, = printed(capsys, *how, "--start=漢字 🙂", "--max_new_tokens=200")
    tokenizer = load_tokenizer(json.loads((tmp_path / "run/meta.json").read_text())["tokenizer"])
    idx = torch.tensor(tokenizer.encode("漢字 🙂"))[None]
    assert idx.size(1) == 3 + 3 + 1 + 4
    ids = Backpack.from_checkpoint(tmp_path / "run").generate(
        idx, 200, temperature=0.8, generator=torch.Generator().manual_seed(1337))
    assert text == tokenizer.decode(ids[0].tolist())
    assert not printed(capsys, *how)[0].startswith("<|endoftext|>")


def test_16_bits(run_train, capsys):
    out = run_train("--max_iters=40")
    exact, rounded = (printed(capsys, f"--out_dir={out}", "--num_samples=1", "--temperature=0", f"--dtype={dtype}")[0]
                      for dtype in ("float32", "bfloat16"))
    assert rounded[:3] == exact[:3]


@pytest.mark.parametrize("args, message", [
    (["--start=Ω"], "character 'Ω' is not among the"), (["--start=FILE:nowhere.txt"], "nowhere.txt: No such file"),
    (["--start=FILE:bad.txt"], "bad.txt is not UTF-8: byte 2"),
    (["--temperature=-1"], "temperature=-1.0 must be at least 0"),
    (["--top_k=0", "--top_p=2"], "top_k=0 must be at least 1; top_p=2.0 must be in (0, 1]"),
    (["--num_samples=0"], "num_samples=0 must be"), (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--sense_table_gb=-1"], "sense_table_gb=-1.0 must be"),
    (["--device=cuda:99"], "device='cuda:99': this machine has no such device"),
    (["--strat=x"], "did you mean 'start'"), (["--out_dir=nowhere"], "no checkpoint at nowhere")])
def test_bad_settings(run_train, tmp_path, monkeypatch, args, message):
    out = run_train("--max_iters=1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"ok\xff")
    with pytest.raises(ValueError) as error:
        sample.main([f"--out_dir={out}", *args])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_that_nobody_knows():
    with pytest.raises(UserError, match="unknown tokenizer 'bert': expected one of char, gpt2, bpe"):
        load_tokenizer({"kind": "bert"})
