"""Runs that are stopped, killed, resumed or shared among ranks, beside one process that is left alone."""

import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, files_in, lines, make_dataset, records, start, train_as_a_script

import train
from configurator import UserError
from model import load_checkpoint

KILLS = int(os.environ.get("KILLS", 2))


def assert_equal(a, b, where):
    """Equality of nested values, of tensors bit for bit."""
    if isinstance(a, (dict, list)):
        assert len(a) == len(b), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key], f"{where} {key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_state(folder, other):
    a = load_checkpoint(folder)
    b = load_checkpoint(other)
    for key in ("model", "optimizer", "scaler", "step", "rng", "best", "meta", "config"):
        assert_equal(a[key], b[key], key)
    for key in ("loss", "val_loss", "lr", "grad_norm"):
        assert records(folder, key) == records(other, key)


def append(text, folder):
    """Write to the log of a run what comes after its checkpoint, so that a resume cuts it off."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text)


def step_of(folder):
    return load_checkpoint(folder)["step"] if (folder / "ckpt.pt").exists() else -1


# ---- signals


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """What the shell of the tests ignores, as nohup and & do, train would ignore, too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_in_step(monkeypatch, step, *numbers):
    """This process receives these signals in the middle of a step."""
    lr_at = train.lr_at

    def lr_at_with_signals(s, now):
        if now == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return lr_at(s, now)

    monkeypatch.setattr(train, "lr_at", lr_at_with_signals)


@pytest.mark.parametrize(
    "name, arg",
    [
        ("SIGTERM", "--muon_lr=0.02"),
        ("SIGINT", "--muon_lr=0"),
        ("SIGHUP", "--freeze=wte,wpe,blocks,ln_f"),
        ("SIGUSR1", "--dataset=pairs"),
    ],
)
def test_a_signal_saves_and_resume_is_bit_for_bit(run_train, pairs, monkeypatch, capsys, name, arg):
    args = "--dropout=0.1", arg
    whole = run_train(*args)
    with monkeypatch.context() as patch:
        signal_in_step(patch, 5, signal.Signals[name])
        cut = run_train(*args, out="cut")
    assert "stopped by a signal after step 6" in capsys.readouterr().out
    assert step_of(cut) == 6
    append('{"step": 13, "loss": 99.0}\n', cut)
    train.main([f"--out_dir={cut}", "--init_from=resume"])  # the checkpoint has all other settings
    assert_same_state(whole, cut)


def test_a_signal_during_an_evaluation_saves_at_once(run_train, monkeypatch):
    whole = run_train()
    get_batch = train.get_batch
    evaluated = []

    def signal_at_step_8(tokens, *args):
        if Path(tokens.filename).name == "val.bin":
            evaluated.append(tokens)
            if len(evaluated) == 5:  # two batches at step 0, two at step 4
                os.kill(os.getpid(), signal.SIGTERM)
        return get_batch(tokens, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "get_batch", signal_at_step_8)
        cut = run_train(out="cut")
    assert len(evaluated) == 5
    assert step_of(cut) == 8
    assert list(records(cut, "val_loss")) == [0, 4]
    append('{"step": 9, "lo', cut)
    run_train("--init_from=resume", out="cut")
    assert_same_state(whole, cut)


def test_a_second_ctrl_c_ends_at_once(run_train, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, 5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_train()
    assert step_of(tmp_path / "run") == 4


def test_a_signal_that_was_ignored_stays_ignored(run_train, monkeypatch):
    """As SIGHUP is under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_in_step(monkeypatch, 5, signal.SIGHUP)
    assert step_of(run_train()) == 12


# ---- kills, and --init_from=auto


def test_kill_9_at_any_moment(run_train, tiny_argv, tmp_path):
    """KILLS=100 kills more often. Each start comes to its next checkpoint at least."""
    steps = max(120, 30 * KILLS)
    args = [f"--max_iters={steps}", "--eval_interval=10", "--dropout=0.1", "--log_interval=10"]
    whole = run_train(*args)
    cut = tmp_path / "cut"
    argv = tiny_argv(*args, "--init_from=auto", out="cut")
    chance = random.Random(0)
    for _ in range(KILLS):
        before = step_of(cut)
        process = start(argv, tmp_path / "log")
        while step_of(cut) == before:
            assert process.is_alive()
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert step_of(cut) < steps
    train.main(argv)
    assert_same_state(whole, cut)


def test_auto_after_a_kill_before_the_first_checkpoint(run_train, tmp_path, capsys):
    whole = run_train()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "metrics.jsonl").touch()
    (cut / "ckpt.partial").write_bytes(b"half of it")
    run_train("--init_from=auto", out="cut")
    assert_same_state(whole, cut)
    files = files_in(cut)
    assert files.keys() == {"ckpt.pt", "config.json", "metrics.jsonl"}
    run_train("--init_from=auto", out="cut")
    assert "is finished: step 12 of 12" in capsys.readouterr().out
    assert files_in(cut) == files


def test_auto_after_a_kill_between_two_checkpoints(run_train, monkeypatch):
    """The first evaluation writes ckpt.pt and best.pt."""
    whole = run_train("--save_best")
    save_checkpoint = train.save_checkpoint
    saved = []

    def killed(path, ckpt):
        if saved:
            raise KeyboardInterrupt
        save_checkpoint(path, ckpt)
        saved.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run_train("--save_best", out="cut")
    cut = run_train("--save_best", "--init_from=auto", out="cut")
    assert_same_state(whole, cut)
    assert files_in(cut).keys() == files_in(whole).keys()


# ---- ranks


def start_ranks(argv, log, body=train_as_a_script, ranks="01"):
    """These ranks of two, as torchrun starts them; rank 0 writes to log.0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [start(argv, f"{log}.{r}", body, RANK=r, LOCAL_RANK=r, **group) for r in ranks]


def finish(ranks):
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0


def test_two_ranks_are_one(run_train, pairs, tiny_argv, tmp_path):
    """Also where micro-batches have unlike numbers of targets, and a block is frozen."""
    args = "--dataset=pairs", "--muon_lr=0.02", "--freeze=blocks.0"
    one = run_train("--batch_size=4", *args)
    finish(start_ranks(tiny_argv("--batch_size=2", *args, out="two"), tmp_path / "log"))
    two = tmp_path / "two"
    printed = (tmp_path / "log.0").read_text()
    assert "2 ranks x 2 micro-batches" in printed
    assert printed.count("step 12/12  val loss") == 1
    for key in ("loss", "val_loss", "grad_norm"):
        assert records(two, key) == pytest.approx(records(one, key), rel=1e-4)
    other = load_checkpoint(two)["model"]
    for name, p in load_checkpoint(one)["model"].items():
        # a bias of keys has no gradient but rounding, which Adam makes steps of
        if not name.endswith(("qkv.bias", "_qk.bias")):
            assert torch.allclose(p, other[name], atol=1e-4), name


def test_a_signal_to_one_rank_stops_both(tiny_argv, tmp_path):
    argv = tiny_argv("--max_iters=99999", "--eval_interval=99999", "--batch_size=4")
    run = tmp_path / "run"
    ranks = start_ranks(argv, tmp_path / "log")
    while not (run / "metrics.jsonl").exists() or not records(run, "loss"):
        assert ranks[0].is_alive()
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    finish(ranks)
    said = re.search(r"stopped by a signal after step (\d+)", (tmp_path / "log.0").read_text())
    assert step_of(run) == int(said[1]) > 0
    assert (tmp_path / "log.1").read_text() == ""


def test_a_rank_that_waits_for_others_can_be_stopped(tiny_argv, tmp_path):
    (waiting,) = start_ranks(tiny_argv(), tmp_path / "log", ranks="0")
    waiting.join(2)  # which it spends waiting
    waiting.terminate()
    waiting.join(100)
    assert waiting.exitcode == -signal.SIGTERM


def overflow_on_rank_1(argv, log, environment):
    """In the second step rank 1 has an inf among the gradients of one of its optimizers."""
    loss = train.Backpack.loss
    steps = []

    def spoiled(self, o, targets):
        steps.append(self.training)
        if environment["RANK"] == "1" and self.training and sum(steps) == 2:
            self.wte.weight.register_hook(lambda grad: grad * math.inf)
        return loss(self, o, targets)

    train.Backpack.loss = spoiled
    train_as_a_script(argv, log, environment)


def test_an_overflow_on_one_rank_skips_the_step_on_all(tiny_argv, tmp_path):
    args = "--dtype=float16", "--muon_lr=0.01", "--batch_size=4", "--eval_interval=1"
    argv = tiny_argv(*args, "--transformer_share=0", "--max_iters=2", "--warmup_iters=0")
    finish(start_ranks(argv, tmp_path / "log", overflow_on_rank_1))
    ckpt = load_checkpoint(tmp_path / "run")
    val_loss = records(tmp_path / "run", "val_loss")
    assert val_loss[0] > val_loss[1] == val_loss[2]
    assert all(state["step"] == 1 for state in ckpt["optimizer"][0]["state"].values())
    assert ckpt["scaler"]["scale"] == 65536 / 2


def test_torchrun_goes_on_when_a_rank_is_killed(run_train, tiny_argv, tmp_path):
    args = "--max_iters=160", "--eval_interval=20", "--batch_size=4"
    argv = tiny_argv(*args, "--init_from=auto", out="cut")
    cut = tmp_path / "cut"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=1".split()
    command = [sys.executable, *torchrun, ROOT / "train.py", *argv]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log)
    while step_of(cut) < 20:
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    assert launcher.wait() == 0, (tmp_path / "log").read_text()
    assert list(records(cut, "loss")) == list(range(1, 161))
    one = run_train(*args)
    assert records(cut, "val_loss") == pytest.approx(records(one, "val_loss"), rel=1e-3)


# ---- what is given at resume


def test_what_is_given_takes_effect(run_train, capsys):
    """beta1, beta2 and weight_decay act upon the moments of the checkpoint; other settings stay."""
    out = run_train("--max_iters=4", "--weight_decay=0.3")
    before = load_checkpoint(out)["optimizer"][0]["state"]
    new = "--beta1=0.5", "--beta2=0.9", "--weight_decay=0.2"
    train.main([f"--out_dir={out}", "--init_from=resume", "--max_iters=5", *new])
    assert "resuming with beta1=0.5 (until now 0.9)" in capsys.readouterr().out
    ckpt = load_checkpoint(out)
    assert ckpt["settings"]["beta1"] == 0.5
    assert ckpt["settings"]["grad_clip"] == 1
    matrices, rest = ckpt["optimizer"][0]["param_groups"]
    assert matrices["weight_decay"] == 0.2
    assert rest["weight_decay"] == 0
    for i, state in ckpt["optimizer"][0]["state"].items():
        g = (state["exp_avg"] - 0.5 * before[i]["exp_avg"]) / 0.5
        square = 0.9 * before[i]["exp_avg_sq"] + 0.1 * g**2
        assert torch.allclose(state["exp_avg_sq"], square, atol=1e-6, rtol=1e-3)


def test_group_keys_that_are_no_setting_are_kept(run_train):
    """An optimizer may keep what it has learned in its groups, as schedule-free ones do."""
    out = run_train("--max_iters=4", "--muon_lr=0.01")
    ckpt = torch.load(out / "ckpt.pt")
    ckpt["optimizer"][1]["param_groups"][0] |= {"momentum": 0.5, "learned": 7}
    torch.save(ckpt, out / "ckpt.pt")
    run_train("--init_from=resume", "--max_iters=8")
    group = load_checkpoint(out)["optimizer"][1]["param_groups"][0]
    assert group["momentum"] == 0.5
    assert group["learned"] == 7


def test_a_run_goes_on_in_another_number_type(run_train):
    run_train("--max_iters=4")
    for n, dtype in ((8, "float16"), (12, "bfloat16")):
        out = run_train("--init_from=resume", f"--max_iters={n}", f"--dtype={dtype}")
        assert step_of(out) == n


@pytest.mark.parametrize(
    "muon_lr, arg, message",
    [
        (0, "--n_layer=3", "n_layer=3, but .* has 2"),
        (0, "--block_size=4", "block_size=4, but .* has 8"),
        (0, "--muon_lr=0.02", "was trained by AdamW, not by AdamW and Muon"),
        (0.02, "--muon_lr=0", "was trained by AdamW and Muon, not by AdamW"),
        (0, "--freeze=wte", "can't go on with freeze=wte .until now .: --init_from="),
        (0, "--dataset=other", "another tokenizer than .*: prepare it with --tokenizer="),
        (0, "--dataset=nothing", "no dataset at"),
        (0, "--device=cuda:99", "this machine has no such device"),
    ],
)
def test_a_resume_that_fails_changes_nothing(run_train, data_dir, tmp_path, muon_lr, arg, message):
    if arg == "--dataset=other":
        texts = [f"{text} Ä" for text in lines(50)]
        make_dataset(data_dir, "other", texts, "--tokenizer=char", "--val_fraction=0.2")
    out = run_train("--max_iters=6", f"--muon_lr={muon_lr}")
    append('{"step": 7, "loss": 99.0}\n', out)
    files = files_in(out)
    with pytest.raises(UserError, match=message):
        run_train("--init_from=resume", "--max_iters=20", arg)
    assert files_in(out) == files


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "config.json", "metrics.jsonl"])
def test_scratch_over_a_run_is_refused(run_train, tmp_path, name):
    """Also over a single file of such a name, which may be of something else."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("of somebody")
    hint = "--init_from=resume goes on with a run, --overwrite replaces it"
    with pytest.raises(UserError, match=f"run has {name}: {hint}"):
        run_train()
    assert files_in(tmp_path / "run") == {name: b"of somebody"}


def test_overwrite_replaces_a_run(run_train):
    out = run_train("--save_best=True")
    other = run_train("--seed=6", out="other")
    run_train("--overwrite", "--seed=6")
    assert_same_state(out, other)
    assert files_in(out).keys() == files_in(other).keys()  # no best.pt of the run before
