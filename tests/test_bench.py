import json

import pytest
import torch
from conftest import TINY

from configurator import UserError
from lab import bench
from model import Backpack, BackpackConfig


@pytest.fixture
def args(tmp_path, data_dir):
    lines = [arg[2:] for arg in TINY if "device" not in arg] + ["dataset = 'tiny'"]
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


def test_the_command_prints_a_table_and_writes_json(args, tmp_path, capsys):
    bench.main(
        [
            *args,
            "--block_size=64",
            "--runs=2",
            "--warmup=1",
            "--generate=3",
            f"--json={tmp_path / 'b.json'}",
        ]
    )
    out, result = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    measured = {
        f"{what}, {other}": {"backpack", other}
        for what in ("step", "forward")
        for other in ("transformer", "dense")
    }
    measured["token"] = {"backpack", "senses token by token", "transformer", "recomputed", "dense"}
    for name, variants in measured.items():
        times = result["seconds"][name]
        assert (
            times.keys() == variants
            and all(len(t) == 2 for t in times.values())
            and f"\n{name} " in out
        )
    assert (
        result["flop floor"] > 1 and "backpack / transformer" in out and result["batch"] == [8, 64]
    )
    assert (
        all(0 < activations < peak for peak, activations in result["bytes"].values())
        and len(result["bytes"]) == 3
    )
    assert {part for part, (_, took) in result["parts"].items() if took > 0} == {
        "Transformer",
        "sense network",
        "alpha and sum",
        "logits and loss",
        "clip and AdamW",
    }


def test_a_run_is_measured_in_its_own_shape(run_train, data_dir, capsys):
    bench.main(
        [
            f"--config={run_train()}",
            f"--data_dir={data_dir}",
            "--device=cpu",
            "--runs=1",
            "--dense=False",
            "--memory=False",
            "--batch_size=3",
        ]
    )
    assert "step: [3, 8] (sequences, tokens)" in capsys.readouterr().out


def test_profile_writes_a_trace(args, tmp_path, capsys):
    bench.main([*args, f"--profile={tmp_path / 't.json'}"])
    names = {
        event.get("name") for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    }
    assert {"LinearCrossEntropy", "LinearCrossEntropyBackward", "aten::_fused_adamw_"} <= names
    assert "self cpu" in capsys.readouterr().out.lower()


def test_bad_settings(args):
    with pytest.raises(UserError, match="n_sense=0 has no senses"):
        bench.main([*args, "--n_sense=0"])
    with pytest.raises(UserError, match="no dataset at"):
        bench.main([*args, "--dataset=nothing"])
    with pytest.raises(UserError, match="divisible by n_sense=5"):
        bench.main([*args, "--n_sense=5"])
