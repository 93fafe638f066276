import json

import pytest
import torch
from conftest import TINY

import bench
from configurator import UserError
from model import Backpack, BackpackConfig


@pytest.fixture
def args(tmp_path, data_dir):
    lines = [arg[2:] for arg in TINY if "device" not in arg] + ["dataset = 'tiny'"]
    (tmp_path / "c.py").write_text("\n".join(lines))
    return [f"--config={tmp_path / 'c.py'}", f"--data_dir={data_dir}", "--device=cpu", "--block_size=16"]


def test_the_dense_reference_is_the_same_model():
    config = BackpackConfig(block_size=150, vocab_size=300, n_layer=2, n_head=2, n_embd=24, n_sense=3, init_std=0.2)
    torch.manual_seed(0)
    ours, dense = Backpack(config).double(), bench.Dense(config).double()
    dense.load_state_dict(ours.state_dict())
    idx = torch.randint(300, (3, 150))
    (a := ours(idx, idx)[1]).backward()
    (b := dense(idx, idx)[1]).backward()
    assert abs(a - b) < 1e-10
    for (name, p), q in zip(ours.named_parameters(), dense.parameters()):
        assert (p.grad - q.grad).abs().max() <= 1e-10 * max(1, q.grad.abs().max()), name


def test_recomputation_generates_what_the_cache_does():
    model = Backpack(BackpackConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=16, n_sense=2,
                                    init_std=0.3))
    idx = torch.randint(50, (1, 4))
    assert torch.equal(bench.recompute(model, idx, 28), model.generate(idx, 28, temperature=0))


def test_the_command_prints_a_table_and_writes_json(args, tmp_path, capsys):
    bench.main([*args, "--runs=2", "--warmup=1", f"--json={tmp_path / 'b.json'}"])
    out, result = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    for name in ("step", "forward", "generate 14"):
        times = result["seconds"][name]
        assert {"backpack", "transformer", "dense"} <= times.keys() and all(len(t) == 2 for t in times.values())
        assert name in out
    assert result["flop floor"] > 1 and "backpack / transformer" in out
    assert all(0 < found["before"] <= found["peak"] for found in result["bytes"].values()) and len(result["bytes"]) == 3


def test_bad_settings(args):
    with pytest.raises(UserError, match="n_sense=0 has no senses"):
        bench.main([*args, "--n_sense=0"])
    with pytest.raises(UserError, match="no dataset at"):
        bench.main([*args, "--dataset=nothing"])
    with pytest.raises(UserError, match="divisible by n_sense=5"):
        bench.main([*args, "--n_sense=5"])
