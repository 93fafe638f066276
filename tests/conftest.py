"""Shared by all tests: the scripts on the path, a tiny dataset, a tiny training run in-process."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["WANDB_SILENT"] = "true"
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

import prepare_data  # noqa: E402
import train  # noqa: E402

TINY = ["--block_size=8", "--n_layer=2", "--n_head=2", "--n_embd=16", "--n_sense=4", "--init_std=0.2",
        "--tokens_per_step=64", "--batch_size=8", "--max_iters=12", "--warmup_iters=2", "--learning_rate=1e-2",
        "--eval_interval=4", "--eval_iters=2", "--log_interval=1", "--device=cpu", "--seed=5",
        "--transformer_share=0.4"]


def lines(n, start=0):
    """n documents of made-up words: a few dozen characters each, none like another."""
    return [f"document {i} has {i * 7919 % 1000} words and {'z' * (i % 5)}y\nits second line is {i * i}"
            for i in range(start, start + n)]


def make_dataset(folder, name, texts, *args):
    """folder/name of these documents; returns folder, which is the data_dir."""
    (folder / "text.txt").write_text("\n\n".join(texts))
    prepare_data.main([f"--data_dir={folder}", f"--dataset={name}", f"--input={folder / 'text.txt'}", "--num_proc=1",
                       *args])
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), "tiny", lines(300), "--tokenizer=char", "--val_fraction=0.1")


@pytest.fixture
def run_train(data_dir, tmp_path):
    """run_train("--key=value", ...) trains in tmp_path/run and returns that folder."""
    def call(*args, out="run"):
        train.main([*TINY, f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={tmp_path / out}", *args])
        return tmp_path / out
    return call


def records(folder, key):
    """The values of key in a run's metrics.jsonl, by step."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in found if key in record}
