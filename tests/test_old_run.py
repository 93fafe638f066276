"""A run, an edits file and an export of the code before 2026-11-24 (commit 172822d) still work.

tests/old_run has them; expected.json is what that code computed of them: the first 48 logits of the last
position, with or without edits, and a greedy continuation.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import lines, make_dataset, records

import train
from lab import convert
from lab.edit import make_edits, read_edits
from model import Backpack, load_checkpoint
from sample import open_run
from tokenizer import load_tokenizer

OLD = Path(__file__).parent / "old_run"
EXPECTED = json.loads((OLD / "expected.json").read_text())
IDS = torch.tensor([EXPECTED["ids"]])  # (1,T)


@torch.no_grad()
def assert_logits(model, key):
    expected = torch.tensor(EXPECTED[key])  # (48,)
    assert torch.allclose(model(IDS)[0][0, -1, : len(expected)], expected, atol=1e-4)


def old_checkpoint(**changes):
    """ckpt.pt of the old run as it lies in the file, with changes of its config."""
    ckpt = torch.load(OLD / "run/ckpt.pt", weights_only=True)
    return ckpt | {"config": ckpt["config"] | changes}


def test_the_run_computes_what_it_did():
    assert "settings" not in old_checkpoint() and "sense_mean" in old_checkpoint()["config"]
    model = Backpack.from_checkpoint(OLD / "run")
    assert_logits(model, "run")
    greedy = model.generate(IDS[:, :4], 8, temperature=0)
    assert greedy.tolist() == [EXPECTED["greedy"]]


def test_its_edits_file_applies():
    opened = open_run(OLD / "run", "cpu", edits=OLD / "edits.json")
    assert_logits(opened.model, "edits")


def test_sense_mean_is_folded_into_the_weights(tmp_path):
    torch.save(old_checkpoint(sense_mean=True), tmp_path / "ckpt.pt")
    assert_logits(Backpack.from_checkpoint(tmp_path), "sense_mean")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A dataset with the old run's own tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    return make_dataset(folder, "fx", lines(300), f"--tokenizer={OLD / 'run'}")


def test_it_resumes(tmp_path, data_dir):
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    step = old_checkpoint()["step"]
    more = [f"--max_iters={step + 10}", "--eval_interval=10", "--device=cpu"]
    keys = [f"--out_dir={run}", f"--data_dir={data_dir}", "--init_from=resume", *more]
    train.main(keys)
    ckpt = load_checkpoint(run)
    assert ckpt["step"] == step + 10 and ckpt["settings"]["transformer_share"] == 0.4
    assert "optimizer" in ckpt and "out_dir" not in ckpt["config"]
    losses = records(run, "val_loss")
    assert losses[step + 10] < losses[0] - 0.5


@pytest.mark.parametrize("sense_mean", [False, True])
def test_the_export_becomes_a_run_with_its_edits(tmp_path, sense_mean):
    export = tmp_path / "export"
    shutil.copytree(OLD / "export", export)
    if sense_mean:  # as such an export of a sense_mean model would be
        config = json.loads((export / "config.json").read_text())
        (export / "config.json").write_text(json.dumps(config | {"sense_mean": True}))
    convert.main([f"--source={export}", f"--dest={tmp_path / 'run'}"])
    ckpt = load_checkpoint(tmp_path / "run")
    model = Backpack.from_checkpoint(ckpt)
    assert_logits(model, "sense_mean" if sense_mean else "run")
    assert ckpt["meta"]["tokenizer"] == load_checkpoint(OLD / "run")["meta"]["tokenizer"]
    edits = read_edits(tmp_path / "run/edits.json")
    assert edits == read_edits(OLD / "edits.json")
    if not sense_mean:
        model.edits = make_edits(model, load_tokenizer(ckpt["meta"]["tokenizer"]), edits)
        assert_logits(model, "edits")


def test_an_unknown_key_in_a_new_config_is_an_error():
    ckpt = load_checkpoint(OLD / "run")
    with pytest.raises(TypeError, match="sense_mean"):
        Backpack.from_checkpoint(ckpt | {"config": ckpt["config"] | {"sense_mean": True}})
