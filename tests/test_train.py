import contextlib
import json
import math
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
from conftest import ROOT, TINY, records
from torch.nn import functional as F

import configurator
import model as model_file
import sample
import train
from configurator import UserError
from model import Backpack, CheckpointError, load_checkpoint
from train import save_checkpoint


def same(a, b):
    """Equality of checkpoints, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_state(folder, other):
    a, b = load_checkpoint(folder), load_checkpoint(other)
    for key in ("model", "optimizer", "muon", "scaler", "step", "rng", "best", "meta"):
        assert same(a.get(key), b.get(key)), key
    assert a["config"] == b["config"]
    settings = (
        {k: v for k, v in c["settings"].items() if k not in train.CALL_KEYS} for c in (a, b)
    )
    assert next(settings) == next(settings)
    for key in ("loss", "val_loss", "lr", "grad_norm"):
        assert records(folder, key) == records(other, key)


def test_a_run_learns_and_leaves_its_folder(run_train, capsys):
    out = run_train("--max_iters=40", "--save_best=True", "--eval_interval=10")
    assert {f.name for f in out.iterdir()} == {"ckpt.pt", "best.pt", "config.json", "metrics.jsonl"}
    loss, val = records(out, "loss"), records(out, "val_loss")
    assert (
        list(loss) == list(range(1, 41))
        and list(val) == [0, 10, 20, 30, 40]
        and val[40] < val[0] - 0.5
    )
    ckpt = load_checkpoint(out)
    assert {"model", "optimizer", "config", "step", "rng", "meta"} <= ckpt.keys() and ckpt[
        "step"
    ] == 40
    assert not any(name.startswith(("module.", "_orig_mod")) for name in ckpt["model"])
    assert load_checkpoint(out / "best.pt")["step"] == min(val, key=val.get)
    assert json.loads((out / "config.json").read_text())["n_sense"] == 4
    printed = capsys.readouterr().out
    assert re.search(
        r"step 40/40  loss [\d.]+ \(the Backpack's own [\d.]+\)  lr \S+  norm \S+  [\d,]+ tokens/s"
        r"  mfu unknown  \S+ GB  0:00:00 left",
        printed,
    )
    assert (
        "parameters, 0.00 GB with gradients\n" not in printed
        and "with gradients and moments" in printed
        and "max_iters = 40  (command line)" in printed
    )


def test_the_baseline_trains(run_train):
    out = run_train("--n_sense=0", "--schedule=cosine", "--min_lr=1e-3")
    assert not any("sense" in name for name in load_checkpoint(out)["model"])
    assert records(out, "val_loss")[12] < records(out, "val_loss")[0]


def test_transformer_share_falls_linearly_to_0(run_train):
    still = ["--learning_rate=1e-12", "--warmup_iters=0", "--eval_interval=100"]
    own, four, eight = (
        run_train(*still, f"--transformer_share={share}", f"--max_iters={n}", out=f"{share}_{n}")
        for share, n in ((0, 4), (1, 4), (1, 8))
    )
    own, four, eight = (records(out, "loss") for out in (own, four, eight))
    for k in range(4):  # the same batches through the same weights
        part = (four[k + 1] - own[k + 1]) / (eight[k + 1] - own[k + 1])
        assert part == pytest.approx((1 - k / 4) / (1 - k / 8), rel=0.01)


def test_accumulation_reports_and_follows_the_mean_of_the_step(run_train):
    whole, parts = run_train(), run_train("--batch_size=2", out="parts")
    assert records(whole, "loss") == pytest.approx(records(parts, "loss"), rel=1e-5)
    assert records(whole, "grad_norm") == pytest.approx(records(parts, "grad_norm"), rel=1e-4)


def test_senses_are_computed_once_for_each_distinct_token_of_a_micro_batch(run_train, monkeypatch):
    """In training and in evaluation."""
    rows, forward = [], model_file.SenseNetwork.forward
    monkeypatch.setattr(
        model_file.SenseNetwork, "forward", lambda self, e: rows.append(e) or forward(self, e)
    )
    run_train("--batch_size=2", "--max_iters=1", "--eval_interval=1")
    trained = [len(e) for e in rows if torch.is_grad_enabled() and e.requires_grad]
    assert len(trained) == 4 and len(rows) > len(trained) and all(1 < len(e) < 2 * 8 for e in rows)


def test_one_step_is_adamw_on_the_drawn_windows(run_train, data_dir):
    """The first step by hand: windows by (seed, step), mean loss, clipping, decay of matrices alone."""
    out = run_train("--max_iters=1", "--warmup_iters=0", "--grad_clip=0.5", "--transformer_share=0")
    torch.manual_seed(5)
    config = load_checkpoint(out)["config"]
    model = Backpack(model_file.BackpackConfig(**config))
    tokens = np.fromfile(data_dir / "tiny/train.bin", "<u2").astype(np.int64)
    starts = np.random.default_rng((5, 0)).integers(len(tokens) - 8, size=8)
    idx = torch.from_numpy(np.stack([tokens[i : i + 9] for i in starts]))
    loss = F.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert records(out, "loss")[1] == pytest.approx(loss.item(), rel=1e-6)
    assert records(out, "grad_norm")[1] == pytest.approx(norm.item(), rel=1e-5)
    for name, p in model.named_parameters():
        g = p.grad * min(1, 0.5 / (norm.item() + 1e-6))
        decay = 0.1 if p.dim() == 2 and "wte" not in name and "wpe" not in name else 0
        want = p * (1 - 1e-2 * decay) - 1e-2 * g / (
            g.abs() + 1e-8
        )  # both moments' first step gives g / |g|
        clear = g.abs() > 1e-5  # where g's rounding cannot turn the quotient
        assert torch.allclose(want[clear], load_checkpoint(out)["model"][name][clear], atol=2e-6), (
            name
        )
        assert clear.float().mean() >= 0.5 or name.startswith(("wte", "wpe")), name


def test_learning_rate():
    s = type(
        "S",
        (),
        {
            "learning_rate": 1.0,
            "min_lr": 0.1,
            "warmup_iters": 4,
            "max_iters": 14,
            "schedule": "linear",
        },
    )
    assert [train.lr_at(s, i) for i in (0, 3, 4, 9, 14)] == pytest.approx([0.25, 1, 1, 0.55, 0.1])
    s.schedule = "cosine"
    assert [train.lr_at(s, i) for i in (4, 9, 14)] == pytest.approx([1, 0.55, 0.1])
    assert train.lr_at(s, 6) > 0.9


@pytest.mark.parametrize("full", [True, False])
def test_evaluation_is_the_mean_over_disjoint_windows(run_train, data_dir, full, capsys):
    out = run_train()
    capsys.readouterr()
    run_train(
        "--init_from=resume",
        "--eval_only=True",
        f"--full_val={full}",
        "--batch_size=8",
        "--tokens_per_step=64",
    )
    loss, count = re.search(
        r"val loss ([\d.]+), perplexity [\d.]+, [\d.]+ bits per byte, ([\d,]+) tokens",
        capsys.readouterr().out,
    ).groups()
    model, tokens = (
        Backpack.from_checkpoint(out),
        torch.from_numpy(np.fromfile(data_dir / "tiny/val.bin", "<u2").astype(np.int64)),
    )
    windows = list(range(0, len(tokens) - 1, 8))
    if not full:
        windows = [windows[int(i)] for i in np.linspace(0, len(windows) - 1, 2 * 64 // 8)]
    losses = torch.cat(
        [
            F.cross_entropy(
                model(tokens[None, i : i + 8][:, : len(tokens[i + 1 : i + 9])])[0][0],
                tokens[i + 1 : i + 9],
                reduction="none",
            )
            for i in windows
        ]
    )
    assert int(count.replace(",", "")) == len(losses) and (len(losses) == len(tokens) - 1) == full
    assert float(loss) == pytest.approx(losses.mean().item(), abs=1e-4)


def test_eval_only_writes_nothing(run_train):
    out = run_train()
    before = {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in out.iterdir()}
    run_train("--init_from=resume", "--eval_only=True")
    run_train(f"--init_from={out}", "--eval_only=True", out="other")
    assert before == {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in out.iterdir()}
    assert not (out.parent / "other").exists()


@pytest.mark.parametrize("number, muon_lr", [(signal.SIGTERM, 0.02), (signal.SIGINT, 0)])
def test_a_signal_saves_and_resume_is_bit_for_bit(run_train, monkeypatch, number, muon_lr, capsys):
    args = "--dropout=0.1", f"--muon_lr={muon_lr}"
    whole, take, draws = run_train(*args), train.get_batch, []

    def kill_in_step_6(tokens, starts, *args):
        draws.append(len(starts))
        if len(draws) == 1 + 2 * 2 + 6:  # a probe and two evaluations of two batches came before
            os.kill(os.getpid(), number)
        return take(tokens, starts, *args)

    monkeypatch.setattr(train, "get_batch", kill_in_step_6)
    cut = run_train(*args, out="cut")
    assert (
        "stopped by a signal after step 6" in capsys.readouterr().out
        and load_checkpoint(cut)["step"] == 6
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(train, "get_batch", take)
    train.main([f"--out_dir={cut}", "--init_from=resume"])  # all settings come from the checkpoint
    assert_same_state(whole, cut)


def test_what_came_after_the_checkpoint_is_cut(run_train):
    constant = "--min_lr=1e-2", "--warmup_iters=0", "--transformer_share=0"
    whole, cut = run_train(*constant), run_train(*constant, "--max_iters=8", out="cut")
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 99.0}\n{"step": 10, "lo')
    run_train(*constant, "--init_from=resume", out="cut")
    assert_same_state(whole, cut)


def test_a_finished_run_resumes_to_nothing(run_train, capsys):
    before = (run_train() / "ckpt.pt").stat().st_mtime_ns
    out = run_train("--init_from=resume")
    assert (
        "is finished: step 12 of 12" in capsys.readouterr().out
        and (out / "ckpt.pt").stat().st_mtime_ns == before
    )


def command(data_dir, out, *args, launcher=(sys.executable,)):
    return subprocess.Popen(
        [
            *launcher,
            str(ROOT / "train.py"),
            *TINY,
            f"--data_dir={data_dir}",
            "--dataset=tiny",
            f"--out_dir={out}",
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(*args):
    return (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *args,
    )


def wait(process, code=0):
    output, _ = process.communicate(timeout=100)
    assert process.returncode == code, output
    return output


KILLS = int(os.environ.get("KILLS", 2))


def test_kill_9_at_any_moment(run_train, data_dir, tmp_path):
    # each start gets to its next checkpoint at least, so that many kills need many steps
    steps = max(300, 60 * KILLS)
    args = [f"--max_iters={steps}", "--eval_interval=20", "--dropout=0.1", "--log_interval=20"]
    whole, cut, rng, kills = run_train(*args), tmp_path / "cut", random.Random(0), 0
    while kills < KILLS:
        had = (cut / "ckpt.pt").exists()
        process = command(data_dir, cut, *args, f"--init_from={'resume' if had else 'scratch'}")
        before = load_checkpoint(cut)["step"] if had else -1
        while (
            not (cut / "ckpt.pt").exists() or load_checkpoint(cut)["step"] == before
        ):  # until it has begun
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        wait(process, -signal.SIGKILL)
        kills += 1
    assert 0 <= load_checkpoint(cut)["step"] < steps
    wait(command(data_dir, cut, *args, "--init_from=resume"))
    assert_same_state(whole, cut)


def test_two_processes_are_one(run_train, data_dir, tmp_path):
    one = run_train("--batch_size=4", "--muon_lr=0.02")
    args = "--batch_size=2", "--muon_lr=0.02"
    output = wait(command(data_dir, tmp_path / "two", *args, launcher=torchrun()))
    assert "2 ranks x 2 micro-batches" in output and output.count("step 12/12  val loss") == 1
    for key in ("loss", "val_loss", "grad_norm"):
        assert records(one, key) == pytest.approx(records(tmp_path / "two", key), rel=1e-4)
    a, b = (load_checkpoint(folder)["model"] for folder in (one, tmp_path / "two"))
    assert (
        a.keys() == b.keys()
    )  # a bias of keys has no gradient but rounding, which Adam makes steps of
    assert all(
        torch.allclose(a[key], b[key], atol=1e-4)
        for key in a
        if not key.endswith(("qkv.bias", "_qk.bias"))
    )


def test_torchrun_recovers_from_a_killed_worker(run_train, data_dir, tmp_path):
    args, cut = ["--max_iters=300", "--eval_interval=20", "--batch_size=4"], tmp_path / "cut"
    process = command(data_dir, cut, *args, launcher=torchrun("--max_restarts=2"))
    while not (cut / "ckpt.pt").exists() or load_checkpoint(cut)["step"] < 20:
        time.sleep(0.05)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    wait(process)
    assert load_checkpoint(cut)["step"] == 300 and list(records(cut, "loss")) == list(range(1, 301))
    one = run_train(*args)
    assert records(one, "val_loss") == pytest.approx(records(cut, "val_loss"), rel=1e-3)


def test_a_restart_takes_no_other_launch_for_its_own(run_train, monkeypatch):
    """torchrun starts again what failed, whatever the reason, also where a folder had a run before."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    out = run_train("--max_iters=4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(UserError, match="has ckpt.pt and metrics.jsonl of another run"):
        run_train("--max_iters=6")
    run_train("--max_iters=6", "--overwrite=True")
    assert list(records(out, "loss")) == [1, 2, 3, 4, 5, 6]  # from scratch
    last = records(out, "loss")[6]
    run_train("--max_iters=8", "--overwrite=True")  # its own: it goes on
    assert list(records(out, "loss")) == list(range(1, 9)) and records(out, "loss")[6] == last
    (out / "ckpt.pt").unlink()  # it died before its first checkpoint
    run_train("--max_iters=6")
    assert list(records(out, "loss")) == [1, 2, 3, 4, 5, 6]


def test_signals_that_come_twice_save_a_step(run_train, data_dir, tmp_path):
    """Schedulers signal the agent and its workers, and torchrun's agent passes its signal on to them."""
    args, cut = ["--max_iters=100000", "--eval_interval=100000", "--batch_size=4"], tmp_path / "cut"
    process = command(data_dir, cut, *args, launcher=torchrun())
    while not (cut / "metrics.jsonl").exists() or len(records(cut, "loss")) < 20:
        time.sleep(0.05)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        for pid in map(int, [*workers, *[process.pid] * (number == signal.SIGTERM)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    output, _ = process.communicate(timeout=100)
    step = int(re.search(r"stopped by a signal after step (\d+)", output)[1])
    assert step >= 20 and load_checkpoint(cut)["step"] == step


def test_a_signal_during_evaluation_saves(run_train, monkeypatch, capsys):
    whole, take = run_train(), train.get_batch

    def kill_in_evaluation(tokens, starts, *args):
        if len(tokens) < 3000 and records(tmp, "loss").get(8):
            os.kill(os.getpid(), signal.SIGTERM)
        return take(tokens, starts, *args)

    tmp = whole.parent / "cut"
    monkeypatch.setattr(train, "get_batch", kill_in_evaluation)
    run_train(out="cut")
    assert "stopped by a signal after step 8" in capsys.readouterr().out and 8 not in records(
        tmp, "val_loss"
    )
    monkeypatch.setattr(train, "get_batch", take)
    run_train("--init_from=resume", out="cut")
    assert_same_state(whole, tmp)


@pytest.mark.parametrize("args", [[], ["--device=cuda"], ["--device=cuda:0", "--dtype=float16"]])
def test_set_up_on_a_single_gpu(run_train, monkeypatch, args):
    """Nothing but the missing GPU ends the set-up, with the error of torch's build for CPUs."""
    chosen = []
    for name, value in (("is_available", True), ("device_count", 1), ("is_bf16_supported", True)):
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value, **k: value)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        run_train(*[a for a in ["--device=auto"] if not args], *args)
    assert chosen == [0]


def test_out_of_memory_is_said_so(run_train, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr(Backpack, "loss", full)
    monkeypatch.setattr(torch, "compile", lambda model: model.forward)
    for compiled in (False, True):
        with pytest.raises(UserError, match="batch_size=8 x 8 tokens don't fit in memory: lower"):
            run_train(f"--compile={compiled}", "--overwrite=True")


def test_one_step_in_16_bits(run_train, data_dir):
    """Loss and every parameter's gradient beside those of float32."""
    out = run_train("--max_iters=4")
    tokens = torch.from_numpy(np.fromfile(data_dir / "tiny/val.bin", "<u2").astype("int64"))[
        :120
    ].view(-1, 8)

    def step(dtype, scale):
        model = Backpack.from_checkpoint(out)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:], transformer_share=torch.tensor(0.4))[1]
        (scale * loss).backward()
        return loss, {name: p.grad / scale for name, p in model.named_parameters()}

    loss, exact = step(torch.float32, 1)
    for dtype, scale, tolerance in ((torch.bfloat16, 1, 0.03), (torch.float16, 65536, 0.006)):
        rounded, found = step(dtype, scale)
        assert rounded.dtype == torch.float32 and abs(rounded - loss) < 2e-3
        for name, grad in exact.items():
            if (
                grad.norm() > 1e-3 * exact["wte.weight"].norm()
            ):  # a bias of keys has none but rounding
                assert (found[name] - grad).norm() < tolerance * grad.norm(), (name, dtype)


def test_two_compiled_processes_are_one(run_train, data_dir, tmp_path):
    one = run_train("--batch_size=4", "--max_iters=4")
    wait(
        command(
            data_dir,
            tmp_path / "two",
            "--batch_size=2",
            "--max_iters=4",
            "--compile=True",
            launcher=torchrun(),
        )
    )
    for key in ("loss", "val_loss", "grad_norm"):
        assert records(one, key) == pytest.approx(records(tmp_path / "two", key), rel=1e-4)


def test_an_overflow_on_one_rank_skips_the_step_on_all(data_dir, tmp_path):
    """In the second step rank 1 has an inf among its gradients: no rank updates; the scale is halved."""
    script = tmp_path / "overflow.py"
    script.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
loss, calls = train.Backpack.loss, []
def spoil(self, o, targets):
    calls.append(self.training)
    if os.environ["RANK"] == "1" and self.training and sum(calls) == 2:
        self.wte.weight.register_hook(lambda grad: grad * float("inf"))  # of one optimizer's only
    return loss(self, o, targets)
train.Backpack.loss = spoil
train.main(sys.argv[1:])
""")
    args = [
        *TINY,
        f"--data_dir={data_dir}",
        "--dataset=tiny",
        "--dtype=float16",
        "--muon_lr=0.01",
        "--batch_size=4",
        "--eval_interval=1",
        "--transformer_share=0",
    ]
    done = subprocess.run(
        [*torchrun(), str(script), *args, "--max_iters=2", f"--out_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    ckpt, losses = load_checkpoint(tmp_path / "run"), records(tmp_path / "run", "val_loss")
    assert ckpt["step"] == 2 and losses[0] > losses[1] == losses[2]
    assert all(state["step"] == 1 for state in ckpt["optimizer"]["state"].values())
    assert ckpt["scaler"]["scale"] == 65536 / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_trains(run_train, dtype):
    exact, out = run_train(), run_train(f"--dtype={dtype}", out=dtype)
    assert records(exact, "val_loss") != records(out, "val_loss")
    assert records(exact, "val_loss") == pytest.approx(records(out, "val_loss"), rel=0.05)
    assert all(p.dtype == torch.float32 for p in load_checkpoint(out)["model"].values())
    assert bool(load_checkpoint(out)["scaler"]) == (dtype == "float16")
    assert (
        "Infinity" not in (out / "metrics.jsonl").read_text()
        and "NaN" not in (out / "metrics.jsonl").read_text()
    )


def test_compile_trains_and_never_compiles_again(run_train, monkeypatch, capsys):
    exact = run_train("--batch_size=2", "--max_iters=6")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs, share_at = [], train.share_at  # called before each micro-step

    def count(*args):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return share_at(*args)

    monkeypatch.setattr(train, "share_at", count)
    out = run_train("--batch_size=2", "--max_iters=6", "--compile=True", out="compiled")
    assert "without torch.compile" not in capsys.readouterr().out
    assert (
        len(graphs) == 1 + 6 * 4 and graphs[0] == 0 and len(set(graphs[1:])) == 1
    )  # all in the probe
    assert records(exact, "loss") == pytest.approx(records(out, "loss"), rel=1e-4)
    assert load_checkpoint(exact)["model"].keys() == load_checkpoint(out)["model"].keys()


def test_compile_falls_back_in_one_line(run_train, monkeypatch, capsys):
    def broken(module):
        def call(*args, **kwargs):
            raise RuntimeError("no C compiler\nsecond line")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    out, exact = run_train("--compile=True", out="compiled"), run_train()
    assert (
        "training without torch.compile, which fails here: RuntimeError: 'no C compiler"
        in capsys.readouterr().out
    )
    assert records(exact, "loss") == records(out, "loss")


def test_wandb_offline(run_train, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    out = run_train("--wandb=True", "--wandb_mode=offline")
    (logged,) = out.glob("wandb/offline-run-*/*.wandb")
    for _ in range(
        100
    ):  # wandb's own process writes it, on a busy machine after finish() has returned
        if logged.stat().st_size > 1000:
            break
        time.sleep(0.1)
    assert logged.stat().st_size > 1000 and load_checkpoint(out)["wandb_id"] in logged.name


def test_wandb_is_not_imported_unless_asked():
    optional = {"wandb", "tokenizers", "datasets", "tiktoken"}
    code = f"import sys, train, sample; assert not {optional} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_finetuning_starts_from_the_other_runs_weights(run_train, capsys):
    out = run_train()
    tuned = run_train(f"--init_from={out}", "--dropout=0.2", "--learning_rate=1e-3", out="tuned")
    assert records(tuned, "val_loss")[0] == pytest.approx(records(out, "val_loss")[12], rel=1e-6)
    ckpt = load_checkpoint(tuned)
    assert (
        ckpt["step"] == 12
        and ckpt["config"]["dropout"] == 0.2
        and ckpt["optimizer"]["state"][0]["step"] == 12
    )
    assert not same(load_checkpoint(out)["model"], ckpt["model"])
    from_file = run_train(
        f"--init_from={out / 'ckpt.pt'}", "--dropout=0.2", "--learning_rate=1e-3", out="from_file"
    )
    assert same(load_checkpoint(from_file)["model"], ckpt["model"])


def test_weights_alone_evaluate_and_finetune_but_do_not_resume(run_train, tmp_path, capsys):
    out, small = run_train(), tmp_path / "small"
    ckpt = load_checkpoint(out)
    half = {name: p.half() for name, p in ckpt["model"].items()}
    kept = {key: ckpt[key] for key in ("config", "settings", "step", "meta")}
    save_checkpoint(small / "ckpt.pt", kept | {"model": half})
    assert (small / "ckpt.pt").stat().st_size < 0.3 * (out / "ckpt.pt").stat().st_size
    whole, half = Backpack.from_checkpoint(out), Backpack.from_checkpoint(small)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    idx = torch.arange(8)[None]
    assert torch.allclose(whole(idx)[0], half(idx)[0], atol=0.02)
    capsys.readouterr()
    run_train("--init_from=resume", "--eval_only=True", out="small")
    assert "step 12: val loss" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"has weights only: finetune them with --init_from=.*small"
    ):
        run_train("--init_from=resume", "--max_iters=20", out="small")
    assert load_checkpoint(run_train(f"--init_from={small}", out="tuned"))["step"] == 12


@pytest.mark.parametrize("args", [["--eval_interval=1"], ["--eval_interval=4"], ["--max_iters=1"]])
def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(run_train, tmp_path, args):
    """At an evaluation, in a step, and in the last step, too."""
    with pytest.raises(UserError, match=r"step \d+: (validation loss|loss|the weights)") as error:
        run_train("--learning_rate=1e6", "--warmup_iters=0", "--grad_clip=0", *args)
    ckpt = load_checkpoint(tmp_path / "run")
    assert all(p.isfinite().all() for p in ckpt["model"].values())
    assert f"The checkpoint in {tmp_path / 'run'}, of step {ckpt['step']}, stays" in str(
        error.value
    )
    assert all(map(np.isfinite, records(tmp_path / "run", "val_loss").values()))


def test_weights_that_are_not_finite_are_not_saved(run_train, monkeypatch):
    """Where no validation text says so: a row of E that no token has."""
    out, before = run_train("--max_iters=4"), None
    before = (out / "ckpt.pt").read_bytes()
    step = torch.optim.AdamW.step

    def spoil(self, *args, **kwargs):
        step(self, *args, **kwargs)
        with torch.no_grad():
            next(p for p in self.param_groups[1]["params"] if p.dim() == 2)[-1] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(
        UserError, match="the weights are no longer finite. The checkpoint in .*, of step 4, stays"
    ):
        run_train("--init_from=resume", "--max_iters=5", "--eval_interval=5")
    assert (out / "ckpt.pt").read_bytes() == before


def test_a_full_disk_leaves_the_old_checkpoint(run_train):
    """/dev/full takes no byte: the temporary name leads there."""
    out = run_train("--max_iters=4")
    before = (out / "ckpt.pt").read_bytes()
    (out / ".ckpt.pt.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"could not write .*ckpt.pt \(.*No space left on device"):
        run_train("--init_from=resume", "--max_iters=8")
    assert (out / "ckpt.pt").read_bytes() == before
    assert not (out / ".ckpt.pt.partial").is_symlink()


def test_scratch_over_a_run(run_train):
    out = run_train()
    before = (out / "ckpt.pt").read_bytes()
    with pytest.raises(
        UserError, match="--init_from=resume goes on with it, --overwrite=True replaces it"
    ):
        run_train()
    assert (out / "ckpt.pt").read_bytes() == before
    other = run_train(out="other")
    with pytest.raises(UserError, match="has ckpt.pt and metrics.jsonl of another run"):
        run_train(f"--init_from={other}")
    assert (out / "ckpt.pt").read_bytes() == before
    (out / "ckpt.pt").rename(out / "best.pt")
    with pytest.raises(
        UserError,
        match="has best.pt and metrics.jsonl of another run: --overwrite=True replaces it",
    ):
        run_train()
    assert (out / "best.pt").read_bytes() == before and len(records(out, "loss")) == 12
    run_train("--overwrite=True", "--seed=6")
    assert (out / "ckpt.pt").read_bytes() != before and len(records(out, "loss")) == 12
    assert not (out / "best.pt").exists()


def test_a_run_folder_is_held_by_one_process(run_train, data_dir, tmp_path):
    holder = (
        "import sys, time; from files import hold\n"
        "with hold(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "run"], stdout=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.readline()
    with pytest.raises(UserError, match="run is in use by another process"):
        run_train()
    process.kill()
    process.wait()
    assert {f.name for f in run_train().iterdir()} == {"ckpt.pt", "config.json", "metrics.jsonl"}


def test_what_is_given_at_resume_takes_effect(run_train):
    """beta1, beta2 and weight_decay act upon the moments of the checkpoint; other settings stay."""
    out = run_train("--max_iters=4", "--weight_decay=0.3")
    moments = load_checkpoint(out)["optimizer"]["state"]
    run_train(
        "--init_from=resume", "--max_iters=5", "--beta1=0.5", "--beta2=0.9", "--weight_decay=0.2"
    )
    ckpt = load_checkpoint(out)
    decay, rest = ckpt["optimizer"]["param_groups"]
    assert (
        decay["betas"] == rest["betas"] == (0.5, 0.9)
        and decay["weight_decay"] == 0.2
        and rest["weight_decay"] == 0
    )
    assert ckpt["settings"]["grad_clip"] == 1 and ckpt["settings"]["beta1"] == 0.5
    for i, state in ckpt["optimizer"][
        "state"
    ].items():  # the gradient is the same in both moments' new parts
        g = (state["exp_avg"] - 0.5 * moments[i]["exp_avg"]) / 0.5
        assert torch.allclose(
            state["exp_avg_sq"], 0.9 * moments[i]["exp_avg_sq"] + 0.1 * g**2, atol=1e-6, rtol=1e-3
        )
    run_train("--init_from=resume", "--max_iters=6")
    assert load_checkpoint(out)["optimizer"]["param_groups"][0]["weight_decay"] == 0.2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dataset=nothing"], "make it with python prepare_data.py --dataset=nothing"),
        (["--vocab_size=5"], "tiny has token id 28, outside a vocabulary of 5"),
        (
            ["--block_size=99999", "--tokens_per_step=99999", "--batch_size=1"],
            "tiny is too short for block_size=99999",
        ),
        (["--n_embd=15"], "n_embd=15 must be divisible by n_head=2"),
        (["--n_sense=3"], "divisible by n_sense=3"),
        (["--tokens_per_step=60"], "tokens_per_step=60 must be a multiple of block_size=8"),
        (["--grad_clip=-5"], "grad_clip=-5.0 (command line): expected a number in [0, 1e9]"),
        (["--batch_size=3"], "batch_size=3 must divide the 8 sequences"),
        (["--batch_size=0"], "batch_size=0"),
        (["--device=cuda:99"], "this machine has no such device"),
        (["--device=gpu"], "device='gpu': expected"),
        (["--dtype=int8"], "dtype='int8' (command line): expected auto or float32 or"),
        (["--schedule=step"], "expected linear or cosine"),
        (["--max_iters=0"], "max_iters=0 (command line): expected a number in [1, 1e9]"),
        (["--n_layers=3"], "did you mean 'n_layer'"),
        (["--n_layer=3.5"], "expected int"),
    ],
)
def test_bad_settings(run_train, tmp_path, args, message):
    with pytest.raises(UserError) as error:
        run_train(*args)
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and not (tmp_path / "run").exists()
    )


def test_all_problems_are_told_together(run_train):
    with pytest.raises(UserError) as error:
        run_train(
            "--dataset=nothing",
            "--n_embd=15",
            "--tokens_per_step=60",
            "--device=cuda:99",
            "--min_lr=1",
        )
    text = str(error.value)
    assert text.startswith("5 problems\n- ") and text.count("\n- ") == 5


def test_wandb_missing(run_train, monkeypatch):
    find = train.importlib.util.find_spec
    monkeypatch.setattr(
        train.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    with pytest.raises(UserError, match="wandb=True, but the package is not installed"):
        run_train("--wandb=True")


def test_data_that_is_damaged(run_train, data_dir, tmp_path):
    for name in ("train.bin", "val.bin", "meta.json"):
        (tmp_path / "data/tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/tiny" / name).write_bytes((data_dir / "tiny" / name).read_bytes())
    (tmp_path / "data/tiny/meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json is not JSON"):
        run_train(f"--data_dir={tmp_path / 'data'}")
    tokens = np.fromfile(data_dir / "tiny/train.bin", "<u2")
    tokens[100] = 999
    with pytest.raises(UserError, match="token id 999, outside a vocabulary"):
        train.get_batch(tokens, np.array([95]), 8, torch.device("cpu"), 60)


def test_checkpoints_that_are_not_good(run_train, tmp_path):
    out = run_train()
    good = (out / "ckpt.pt").read_bytes()
    for content, message in (
        (good[:-2000], "is truncated, damaged or not from train.py"),
        (b"", "truncated"),
        (b"hello", "truncated"),
        (None, "no checkpoint at"),
    ):
        (out / "ckpt.pt").unlink()
        if content is not None:
            (out / "ckpt.pt").write_bytes(content)
        for call in (
            lambda: run_train("--init_from=resume"),
            lambda: sample.main([f"--run={out}"]),
        ):
            with pytest.raises(CheckpointError, match=message) as error:
                call()
            assert "\n" not in str(error.value)
        (out / "ckpt.pt").write_bytes(good)
    ckpt = load_checkpoint(out)
    del ckpt["settings"]["dataset"]
    torch.save(ckpt, out / "ckpt.pt")  # it would have gone on with the default
    with pytest.raises(UserError, match="run, settings: found .*, expected .dataset. in it"):
        run_train("--init_from=resume")
    torch.save({"weights": 1}, out / "ckpt.pt")
    with pytest.raises(CheckpointError, match="it lacks model, config"):
        run_train("--init_from=resume")
    torch.save(torch.nn.Linear(2, 2), out / "ckpt.pt")  # a pickled object: refused, not executed
    with pytest.raises(CheckpointError, match="not from train.py"):
        run_train("--init_from=resume")


def test_an_optimizer_state_that_does_not_fit(run_train):
    """Moments of another shape crashed the process; those that share memory were written over each other."""
    out = run_train("--max_iters=4")
    ckpt = load_checkpoint(out)
    good = ckpt["optimizer"]["state"][0]["exp_avg"]
    for change in (good[:-1].clone(), None):
        ckpt["optimizer"]["state"][0]["exp_avg"] = change
        torch.save(ckpt, out / "ckpt.pt")
        with pytest.raises(UserError, match="the state of its optimizer does not fit its weights"):
            run_train("--init_from=resume")
    del ckpt["optimizer"]["state"][0]
    torch.save(ckpt, out / "ckpt.pt")
    with pytest.raises(UserError, match="the state of its optimizer does not fit its weights"):
        run_train("--init_from=resume")


@pytest.mark.parametrize("before, after", [(0, 0.02), (0.02, 0)])
def test_another_optimizer_at_resume(run_train, before, after):
    run_train("--max_iters=4", f"--muon_lr={before}")
    with pytest.raises(UserError, match=f"was trained with{'' if before else 'out'} Muon"):
        run_train("--init_from=resume", f"--muon_lr={after}")


def test_tensors_of_a_checkpoint_that_share_memory(run_train):
    """An expanded tensor is one number in the file; the update of a parameter wrote beyond it."""
    out = run_train("--max_iters=4")
    ckpt = load_checkpoint(out)
    for tensors in (ckpt["model"], ckpt["optimizer"]["state"][5]):
        name = next(name for name, tensor in tensors.items() if tensor.dim())
        tensors[name] = torch.zeros(()).expand(tensors[name].shape)
    torch.save(ckpt, out / "ckpt.pt")
    run_train("--init_from=resume", "--max_iters=6")
    assert len(set(load_checkpoint(out)["model"]["wte.weight"].flatten().tolist())) > 10


def test_text_to_validate_may_be_shorter_than_a_window(run_train, data_dir, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    (short / "train.bin").write_bytes((data_dir / "tiny/train.bin").read_bytes())
    meta = json.loads((data_dir / "tiny/meta.json").read_text())
    for n, ok in ((5, True), (1, False)):
        (short / "meta.json").write_text(json.dumps(meta | {"val_tokens": n}))
        np.fromfile(data_dir / "tiny/val.bin", "<u2")[:n].tofile(short / "val.bin")
        if not ok:
            with pytest.raises(
                UserError, match=r"short is too short for block_size=8: of \[\d+, 1\] tokens"
            ):
                run_train(f"--data_dir={tmp_path}", "--dataset=short", out="one")
            continue
        out = run_train(f"--data_dir={tmp_path}", "--dataset=short", "--max_iters=4")
        ids = torch.from_numpy(np.fromfile(short / "val.bin", "<u2").astype("int64"))[None]
        loss = Backpack.from_checkpoint(out)(ids[:, :-1], ids[:, 1:])[1]
        assert abs(records(out, "val_loss")[4] - loss) < 1e-5


def test_a_checkpoint_of_another_shape_or_tokenizer(run_train, data_dir, tmp_path):
    out = run_train()
    with pytest.raises(UserError, match="n_layer=3, but .* has 2"):
        run_train("--init_from=resume", "--n_layer=3", "--max_iters=20")
    with pytest.raises(UserError, match="n_embd=32, but .* has 16"):
        run_train(f"--init_from={out}", "--n_embd=32", out="other")
    with pytest.raises(UserError, match="lies in out_dir"):
        run_train(f"--init_from={out}")
    ckpt = torch.load(out / "ckpt.pt")
    ckpt["meta"]["tokenizer"]["chars"] = ckpt["meta"]["tokenizer"]["chars"][::-1]
    torch.save(ckpt, out / "ckpt.pt")
    for source in (out, out / "ckpt.pt"):
        with pytest.raises(
            UserError, match="was not made with the checkpoint's tokenizer: .* --tokenizer="
        ) as error:
            run_train(f"--init_from={source}", out="other")
        assert str(error.value).endswith(f"--tokenizer={out}")


def test_the_whole_command_line_fails_with_one_line(tmp_path):
    for args, code in (
        (["--dataset=nothing", "--device=cpu"], 1),
        (["--n_layers=3"], 2),
        (["nowhere.py"], 2),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *args], capture_output=True, text=True, cwd=tmp_path
        )
        assert (
            done.returncode == code
            and done.stderr.startswith("train.py: ")
            and done.stderr.count("\n") == 1
        )
    assert not list(Path(tmp_path).iterdir())


def test_a_run_under_nohup_survives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with configurator.caught_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_with_a_field_of_another_branch(run_train):
    out = run_train()
    ckpt = torch.load(out / "ckpt.pt")
    ckpt["config"]["rope"] = True
    torch.save(ckpt, out / "ckpt.pt")
    with pytest.raises(
        CheckpointError, match="does not fit model.py: .* unexpected keyword argument 'rope'"
    ):
        run_train("--init_from=resume", "--max_iters=20")
