"""lab.bench: the dense formula and the FLOPs that it compares with, and what it prints."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY

from configurator import UserError
from lab import bench
from model import Backpack, BackpackConfig


@pytest.fixture
def args(tmp_path, data_dir):
    config = [arg[2:] for arg in TINY if "device" not in arg]
    config += ["dataset = 'tiny'", "muon_lr = 0.02"]
    (tmp_path / "c.py").write_text("\n".join(config))
    return [f"--config={tmp_path / 'c.py'}", f"--data_dir={data_dir}", "--device=cpu"]


SIZES = {"block_size": 24, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_sense": 4}


def test_the_dense_formula_is_the_same_model():
    torch.manual_seed(0)
    config = BackpackConfig(**SIZES, init_std=0.2)
    ours = Backpack(config).double()
    dense = bench.Dense(config).double()
    dense.load_state_dict(ours.state_dict())
    idx = torch.randint(40, (3, 24))
    share = torch.tensor(0.4, dtype=torch.float64)
    for model in (ours, dense):
        model(idx, idx, transformer_share=share)[1].backward()
    for (name, p), q in zip(ours.named_parameters(), dense.named_parameters()):
        assert torch.allclose(p.grad, q[1].grad, atol=1e-10), name
    assert bench.same_logits(ours, dense, idx)
    with torch.no_grad():
        ours.sense_qk.weight.mul_(2)
    assert not bench.same_logits(ours, dense, idx)


def test_flops_are_those_of_the_products():
    """Forward, counted by hand: 2 for each weight and token, and for each pair of positions."""
    config = BackpackConfig(**SIZES)
    model = Backpack(config)
    x = torch.arange(48).remainder(10).view(2, 24)  # 10 distinct tokens
    T, D, K = 24, config.n_embd, config.n_sense

    def weights(*modules):
        return sum(p.numel() for m in modules for p in m.parameters() if p.dim() == 2)

    per_token = weights(model.blocks, model.sense_qk, model.wte)
    pairs = 2 * T * T * (config.n_layer * 2 * D + K * (model.n_qk + D))  # two sequences
    with torch.no_grad():
        found = bench.count_flops(model, x, x)
    assert found == 2 * (48 * per_token + pairs + 10 * weights(model.sense_network))


def test_the_command_prints_a_block_and_writes_json(args, tmp_path, capsys):
    how = ["--block_size=64", "--runs=2", "--generate=3", "--memory=False"]
    bench.main([*args, *how, f"--json={tmp_path / 'b.json'}", f"--profile={tmp_path / 't.json'}"])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "b.json").read_text())
    machine, what, size, training, first, *_ = out.splitlines()
    assert "(cpu)" in machine and f"torch {torch.__version__}, Python 3." in machine
    assert what.endswith("c.py, tiny, torch.float32, eager")
    assert size.startswith("batch of (8, 64) tokens, ")
    speed = 8 * 64 / np.median(result["seconds"]["training"]["backpack"])
    assert training.startswith(f"training: {speed:,.0f} tokens/s, ")
    assert 100 > float(first.split("%")[0]) > 0

    measured = {"training": {"backpack"}, "token": {"backpack", "transformer"}}
    for what in ("step", "forward"):
        for other in ("transformer", "dense"):
            measured[f"{what}, {other}"] = {"backpack", other}
    assert {name: set(times) for name, times in result["seconds"].items()} == measured
    for name, times in result["seconds"].items():
        assert all(len(runs) == 2 for runs in times.values()) and f"\n{name} " in out
    parts = {"Transformer", "sense network", "alpha and sum", "logits and loss", "clip and step"}
    assert {part for part, (_, took) in result["parts"].items() if took > 0} == parts
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "LinearCrossEntropyBackward" in {event.get("name") for event in events}


def test_a_run_is_measured_in_its_own_shape(run_train, data_dir, tmp_path, capsys):
    where = [f"--run={run_train()}", f"--data_dir={data_dir}", f"--json={tmp_path / 'b.json'}"]
    bench.main([*where, "--device=cpu", "--runs=1", "--dense=False", "--batch_size=3"])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "b.json").read_text())
    assert "batch of (3, 8) tokens" in out and "peak memory, transformer: " in out
    assert result["bytes"].keys() == {"backpack", "transformer"}
    assert all(0 < grown < peak for peak, grown in result["bytes"].values())


def test_mistakes(args, tmp_path):
    config = tmp_path / "c.py"
    before = config.read_text()
    for line, message in (
        ("n_sense = 0", "n_sense=0 has no senses"),
        ("vocab_size = 7", "tiny has .* tokens, the network 7"),
    ):
        config.write_text(f"{before}\n{line}")
        with pytest.raises(UserError, match=message):
            bench.main(args)
