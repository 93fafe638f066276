"""Shared by all tests: the root on the path, a tiny dataset, and tiny training runs."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["WANDB_SILENT"] = "true"
# more threads would only slow such small tensors down, here and in the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

import configurator  # noqa: E402
import prepare_data  # noqa: E402
import train  # noqa: E402

SIZES = "--block_size=8 --n_layer=2 --n_head=2 --n_embd=16 --n_sense=4 --init_std=0.2"
STEPS = "--tokens_per_step=64 --batch_size=8 --max_iters=12 --warmup_iters=2 --learning_rate=1e-2"
EVALUATION = "--eval_interval=4 --eval_iters=2 --log_interval=1"
OTHERS = "--device=cpu --seed=5 --transformer_share=0.4"
TINY = f"{SIZES} {STEPS} {EVALUATION} {OTHERS}".split()


def lines(n, start=0):
    """n documents of made-up words: a few dozen characters each, all different."""
    return [
        f"document {i} has {i * 7919 % 1000} words and {'z' * (i % 5)}y\nits second line is {i * i}"
        for i in range(start, start + n)
    ]


def make_dataset(folder, name, texts, *args):
    """Make the dataset folder/name of these documents; returns folder, which is its data_dir."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(texts), encoding="utf-8")
    where = [f"--data_dir={folder}", f"--dataset={name}", f"--input={text}"]
    prepare_data.main([*where, "--num_proc=1", "--documents=blank_line", *args])
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_dataset(folder, "tiny", lines(300), "--tokenizer=char", "--val_fraction=0.1")


@pytest.fixture(scope="session")
def pairs(data_dir):
    """The dataset data_dir/pairs, of prompts like 12+50= and answers like 62; a token is a byte."""
    rows = [{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(0, 100, 3) for j in (2, 50, 99)]
    (data_dir / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = [f"--data_dir={data_dir}", "--dataset=pairs", f"--input={data_dir / 'sums.jsonl'}"]
    bpe = ["--tokenizer=bpe", "--vocab_size=257", "--column=prompt,answer"]
    prepare_data.main([*where, *bpe, "--val_fraction=0.1"])
    return data_dir / "pairs"


@pytest.fixture
def tiny_argv(data_dir, tmp_path):
    """tiny_argv(*args, out="run"): the command line of a tiny run in tmp_path/out."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    handlers = [signal.getsignal(number) for number in numbers]

    def command_line(*args, out="run"):
        where = [f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={tmp_path / out}"]
        return [*TINY, *where, *args]

    yield command_line
    for number, handler in zip(numbers, handlers):  # training has set its own
        signal.signal(number, handler)


@pytest.fixture
def run_train(tiny_argv, tmp_path):
    """run_train("--key=value", ...) trains in tmp_path/run, in this process; returns that folder."""

    def call(*args, out="run"):
        train.main(tiny_argv(*args, out=out))
        return tmp_path / out

    return call


def records(folder, key):
    """{step: value} of a key in a run's metrics.jsonl."""
    parsed = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in parsed if key in record}


def files_in(folder):
    """{name: content} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- training in other processes: these are forked from one that has imported torch already

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["torch._dynamo"])


def train_as_a_script(argv, log, environment):
    """What a process does that `start` has started."""
    os.environ.update(environment)
    sys.argv = ["train.py", *argv]
    sys.stdout = open(log, "w", buffering=1)
    sys.stderr = sys.stdout
    configurator.run(train.main)


def start(argv, log, body=train_as_a_script, **environment):
    """A process that trains as `python train.py *argv` does, and writes what it prints to log."""
    process = forkserver.Process(target=body, args=(argv, log, environment))
    process.start()
    return process
