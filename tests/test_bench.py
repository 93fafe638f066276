import contextlib
import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.autograd import DeviceType

from configurator import UserError, configure
from lab import bench
from model import Backpack, BackpackConfig


@pytest.fixture
def args(tmp_path, data_dir):
    lines = [arg[2:] for arg in TINY if "device" not in arg] + [
        "dataset = 'tiny'",
        "muon_lr = 0.02",
    ]
    (tmp_path / "c.py").write_text("\n".join(lines))
    return [
        f"--config={tmp_path / 'c.py'}",
        f"--data_dir={data_dir}",
        "--device=cpu",
        "--block_size=16",
    ]


def test_the_dense_reference_is_the_same_model():
    config = BackpackConfig(
        block_size=150, vocab_size=300, n_layer=2, n_head=2, n_embd=24, n_sense=3, init_std=0.2
    )
    torch.manual_seed(0)
    ours, dense = Backpack(config).double(), bench.Dense(config).double()
    dense.load_state_dict(ours.state_dict())
    idx = torch.randint(300, (3, 150))
    (a := ours(idx, idx)[1]).backward()
    (b := dense(idx, idx)[1]).backward()
    assert abs(a - b) < 1e-10
    for (name, p), q in zip(ours.named_parameters(), dense.parameters()):
        assert (p.grad - q.grad).abs().max() <= 1e-10 * max(1, q.grad.abs().max()), name


def test_the_command_prints_a_block_and_writes_json(args, tmp_path, capsys):
    files = f"--json={tmp_path / 'b.json'}", f"--profile={tmp_path / 't.json'}"
    bench.main(
        [
            *args,
            "--block_size=64",
            "--runs=2",
            "--warmup=1",
            "--generate=3",
            "--memory=False",
            *files,
        ]
    )
    out, result = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())

    machine, config, size, training, *rest = out.splitlines()
    assert "(cpu)" in machine and f"torch {torch.__version__}, Python 3." in machine
    assert config.endswith("c.py, tiny, torch.float32, eager, dropout 0.0")
    assert size.startswith("batch of (8, 64) tokens, ") and result["batch"] == [8, 64]
    speed = 8 * 64 / np.median(result["seconds"]["training"]["backpack"])
    assert training.startswith(f"training: {speed:,.0f} tokens/s, MFU unknown, device busy unknown")
    longest = [float(line.split("%")[0]) for line in rest[:4]]
    assert 100 > longest[0] >= longest[1] >= longest[2] >= longest[3] > 0 and sum(longest) <= 100

    measured = {"training": {"backpack"}}
    for what in ("step", "forward"):
        for other in ("transformer", "dense"):
            measured[f"{what}, {other}"] = {"backpack", other}
    measured["token"] = {"backpack", "senses token by token", "transformer", "recomputed", "dense"}
    assert {name: set(times) for name, times in result["seconds"].items()} == measured
    for name, times in result["seconds"].items():
        assert all(len(runs) == 2 for runs in times.values()) and f"\n{name} " in out
    assert result["flop floor"] > 1 and "backpack / transformer" in out
    parts = {"Transformer", "sense network", "alpha and sum", "logits and loss", "clip and step"}
    assert {part for part, (_, took) in result["parts"].items() if took > 0} == parts

    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    expected = {"LinearCrossEntropy", "LinearCrossEntropyBackward", "aten::_fused_adamw_"}
    assert expected <= {event.get("name") for event in events}


def test_a_run_is_measured_in_its_own_shape(run_train, data_dir, tmp_path, capsys):
    where = f"--config={run_train()}", f"--data_dir={data_dir}", f"--json={tmp_path / 'b.json'}"
    bench.main([*where, "--device=cpu", "--runs=1", "--dense=False", "--batch_size=3"])
    out, result = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "batch of (3, 8) tokens" in out and "peak memory, transformer: " in out
    assert len(result["bytes"]) == 2
    assert all(0 < activations < peak for peak, activations in result["bytes"].values())


def test_the_block_of_a_gpu(args, monkeypatch):
    """Its kernels count, not the operators and annotations around them; on a fake."""

    def row(key, device_type, time, is_user_annotation=False):
        times = {"self_device_time_total": time, "self_cpu_time_total": 9e9}
        about = {"device_type": device_type, "is_user_annotation": is_user_annotation}
        return SimpleNamespace(key=key, **about, **times)

    gpu, rows = DeviceType.CUDA, [row("aten::mm", DeviceType.CPU, 9e9)]
    rows += [row("a step", gpu, 9e9, is_user_annotation=True)]
    rows += [row(name, gpu, 1e6 * time) for name, time in zip("abcde", (1, 5, 2, 4, 3))]
    trace = SimpleNamespace(key_averages=lambda: rows)
    monkeypatch.setattr(torch.profiler, "profile", lambda: contextlib.nullcontext(trace))
    monkeypatch.setattr(bench, "seconds", lambda device, function: function() or 10.0)
    monkeypatch.setattr(bench.hardware, "peak_flops", lambda *args: 1000.0)
    s, _ = configure(bench.Settings, [*args, "--runs=2", "--warmup=0"])
    took, lines = bench.training(s, bench.Variant(s, "backpack"), flops=50)
    assert took == [10.0, 10.0]
    # 8 x 16 tokens in 10 seconds; 15 seconds of kernels in 20
    assert lines[0] == "training: 13 tokens/s, MFU 64.0%, device busy 75.0%; longest parts:"
    assert lines[1:] == ["  33.3%  b", "  26.7%  d", "  20.0%  e", "  13.3%  c"]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(subprocess, "getoutput", lambda command: "570.86.15\n570.86.15")
    line = bench.machine(torch.device("cuda:0"))
    assert line.startswith("NVIDIA H100 80GB HBM3 (cuda:0), driver 570.86.15, CUDA None, torch 2.")


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--n_sense=0", "n_sense=0 has no senses"),
        ("--dataset=nothing", "no dataset at"),
        ("--n_sense=5", "divisible by n_sense=5"),
        ("--batch_size=0", r"batch_size=0 .*expected a number in \[1, 65536\]"),
        ("--dropout=1", r"dropout=1.0 .*expected a number in \[0, 1\)"),
        ("--runs=0", r"runs=0 .*expected a number in \[1, "),
    ],
)
def test_bad_settings(args, arg, message):
    with pytest.raises(UserError, match=message) as error:
        bench.main([*args, arg])
    assert "\n" not in str(error.value)
