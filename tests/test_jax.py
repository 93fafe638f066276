"""lab/jax_train.py beside model.py and train.py, on a CPU that plays eight devices."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, records

import model as model_file
import sample
import train
from configurator import UserError
from model import Backpack, load_checkpoint

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")
# nothing here runs long enough to be worth the time that optimizing takes
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
jax.config.update("jax_num_cpu_devices", 8)

from lab import jax_train, look  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Runs of the same shapes compile once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


JAX = ["--n_layer=1", "--tokens_per_step=128", "--transformer_share=0.0", "--device=auto"]


@pytest.fixture
def run_jax(tiny_argv, tmp_path):
    """run_jax("--key=value", ...) trains by JAX in tmp_path/run, in this process; returns that folder."""

    def call(*args, out="run"):
        jax_train.main(tiny_argv(*JAX, *args, out=out))
        return tmp_path / out

    return call


@pytest.fixture(scope="module")
def whole(cache, data_dir, tmp_path_factory):
    """A run on eight devices, with two micro-batches of one sequence on each."""
    out = tmp_path_factory.mktemp("jax") / "whole"
    where = [f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={out}"]
    jax_train.main([*TINY, *JAX, *where, "--batch_size=1"])
    return out


def mesh_of(n):
    return jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


# ---- the network


SMALL = jax_train.Settings(
    block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=16, n_sense=4, init_std=0.2, dtype="float32"
)
LONG = {"block_size": 300, "vocab_size": 20000, "n_layer": 1}  # several blocks of queries and of the loss
OTHER = {"bias": False, "exact_gelu": True, "inverse_layer_scale": False, "n_qk": 3, "sense_out_ratio": 2}


@pytest.mark.parametrize(
    "changes, n_devices",
    [({}, 8), (LONG, 1), (OTHER, 1), ({"n_sense": 0, "n_layer": 1, "grad_checkpoint": True}, 8)],
    ids=["plain", "long", "other", "transformer"],
)
def test_logits_loss_and_gradients_are_those_of_model_py(changes, n_devices):
    s = replace(SMALL, **changes)
    torch.manual_seed(1)
    model = Backpack(train.network_config(s))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=s.init_std)  # norms and biases, too
    tokens = np.random.default_rng(1).integers(s.vocab_size, size=2000)
    starts = np.arange(0, 2000, s.block_size)[:n_devices] if n_devices > 1 else np.array([0, 1800])
    x, y, distinct = train.get_batch(tokens, starts, s.block_size, torch.device("cpu"))
    logits, _ = model(x)
    _, loss = model(x, y, distinct)
    loss.backward()

    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    ids, where = (tensor.numpy() for tensor in distinct)
    o = jax.jit(lambda *args: jax_train.backpack(*args, s))(w, ids, where)
    assert np.abs(o @ w["wte.weight"][: s.vocab_size].T - logits.detach().numpy()).max() < 1e-4
    mesh = mesh_of(n_devices)
    batch = jax_train.load_batch(tokens, starts.reshape(1, n_devices, -1), s, mesh)
    grad = jax.jit(jax.value_and_grad(jax_train.make_loss(s, mesh)))
    its_loss, grads = grad(w, *(part[0] for part in batch))
    assert its_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, p in model.named_parameters():
        expected = p.grad.numpy()
        assert np.abs(grads[name] - expected).max() <= 1e-4 * np.abs(expected).max(), name


def test_bfloat16_is_near():
    """Products are in bfloat16, what is kept is not."""
    s = replace(SMALL, n_layer=1)
    model = Backpack(train.network_config(s))
    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    tokens = np.random.default_rng(1).integers(s.vocab_size, size=100)
    mesh = mesh_of(1)
    batch = jax_train.load_batch(tokens, np.array([[[0, 17, 40]]]), s, mesh)
    args = w, *(part[0] for part in batch)
    results = []
    for dtype in ("float32", "bfloat16"):
        loss = jax_train.make_loss(replace(s, dtype=dtype), mesh)
        results.append(jax.jit(jax.value_and_grad(loss))(*args))
    (loss, grads), (rounded, its_grads) = results
    assert 0 < abs(rounded - loss) < 0.01
    for name, grad in grads.items():
        assert its_grads[name].dtype == np.float32
        off = np.linalg.norm(its_grads[name] - grad)
        assert 0 < off < 0.05 * np.linalg.norm(grad), name


def test_neither_weights_nor_logits_are_whole():
    s = replace(SMALL, block_size=2048, vocab_size=40000, n_layer=1, n_sense=16)
    shapes = {name: p.shape for name, p in Backpack(train.network_config(s)).named_parameters()}
    w = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    rows = jax.ShapeDtypeStruct((2, 2048), np.int32)
    ids = jax.ShapeDtypeStruct((1024,), np.int32)
    loss = jax.jit(jax.value_and_grad(jax_train.make_loss(s, mesh_of(1))))
    memory = loss.lower(w, rows, ids, rows).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 2 * 2048 * 40000  # logits (N,V)
    assert memory < 4 * 2 * 16 * 2048 * 2048  # weights (B,K,T,T)


# ---- training


def test_eight_devices_one_and_sharded_parameters_are_train_py(run_jax, whole, run_train, monkeypatch):
    """The same windows and the same AdamW, with two micro-batches a step or with one."""
    theirs = run_train("--n_layer=1", "--tokens_per_step=128", "--transformer_share=0.0", out="theirs")
    shapes = []
    save = jax_train.save

    def save_and_look(s, w, *args):
        shapes.append(w["sense_network.mlp_out.proj.weight"].addressable_shards[0].data.shape)
        save(s, w, *args)

    with monkeypatch.context() as patch:
        patch.setattr(jax_train, "save", save_and_look)
        sharded = run_jax("--batch_size=1", "--shard", out="sharded")
    assert set(shapes) == {(4 * 16 // 8, 4 * 16)}  # of (K*D,4*D)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        one = run_jax(out="one")
    for run in (whole, sharded, one):
        for key in ("loss", "val_loss", "grad_norm", "lr"):
            expected = records(theirs, key)
            assert len(expected) > 3
            assert records(run, key) == pytest.approx(expected, rel=1e-5), (run.name, key)


def test_resume_is_bit_for_bit(run_jax, whole, monkeypatch):
    lr_at = train.lr_at

    def killed(s, step):
        if step == 10:
            raise KeyboardInterrupt
        return lr_at(s, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_at", killed)
        with pytest.raises(KeyboardInterrupt):
            run_jax("--batch_size=1")
    cut = run_jax("--batch_size=1", "--init_from=auto")
    a = load_checkpoint(whole)
    b = load_checkpoint(cut)
    assert a["step"] == b["step"] == 12
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    assert all(torch.equal(x, y) for x, y in zip(a["jax"], b["jax"], strict=True))
    for key in ("loss", "val_loss", "lr", "grad_norm"):
        assert records(whole, key) == records(cut, key)


def test_others_read_its_runs_and_it_theirs(run_jax, whole, run_train, capsys):
    sample.main([f"--run={whole}", "--num_samples=1", "--max_new_tokens=10", "--device=cpu"])
    assert "step 12, sample 1 of 1" in capsys.readouterr().out
    look.main([f"--run={whole}", "--word=a", "--device=cpu"])
    assert len(capsys.readouterr().out.splitlines()) > 4
    sizes = "--n_layer=1", "--tokens_per_step=128", "--transformer_share=0.0", "--max_iters=4", "--full_val"
    theirs = run_train(*sizes, f"--init_from={whole}", out="theirs")
    mine = run_jax(*sizes, "--batch_size=1", f"--init_from={theirs}", out="mine")
    for key in ("loss", "val_loss"):
        assert records(theirs, key)[4] < records(whole, key)[4]
    assert records(mine, "val_loss")[0] == pytest.approx(records(theirs, "val_loss")[4], rel=1e-5)
    with pytest.raises(UserError, match="weights only, which can't go on"):
        train.main([f"--out_dir={whole}", "--init_from=resume", "--max_iters=20"])
    with pytest.raises(UserError, match="no run of lab.jax_train"):
        jax_train.main([f"--out_dir={theirs}", "--init_from=resume"])
    with pytest.raises(
        UserError, match="mine has ckpt.pt and config.json and metrics.jsonl: --init_from=resume"
    ):
        run_jax(out="mine")


# ---- refused


def test_a_setting_without_effect_is_refused(run_jax, pairs, tmp_path):
    """All of them, with what to write instead."""
    others = "dropout=0.1", "muon_lr=0.02", "log_senses=True", "device=cpu", "compile=False"
    with pytest.raises(UserError) as error:
        run_jax(*(f"--{other}" for other in others))
    assert "--dropout=0.0 " in str(error.value)
    assert "--compile=None" in str(error.value)
    assert "\n" not in str(error.value)

    with pytest.raises(UserError, match="has no freeze: add --freeze=$"):
        run_jax("--freeze=blocks")
    with pytest.raises(UserError, match="pairs has prompts and answers"):
        run_jax("--dataset=pairs")
    with pytest.raises(UserError, match="float16"):
        run_jax("--dtype=float16")
    with pytest.raises(UserError, match="a multiple of 8 devices x 1 sequences x 8 tokens"):
        run_jax("--tokens_per_step=72")
    with pytest.raises(UserError, match="log_interval=0 must be more than 0"):
        run_jax("--log_interval=0")
    assert not list(tmp_path.glob("run*"))


def without_second_residual(self, e):
    x = self.ln_0(e)
    x = x + self.mlp(self.ln_1(x))
    return self.mlp_out(self.ln_2(x)).unflatten(-1, (self.n_sense, -1))


def test_a_fork_of_model_py_is_refused(run_jax, tmp_path, monkeypatch):
    monkeypatch.setattr(model_file.SenseNetwork, "forward", without_second_residual)
    with pytest.raises(UserError, match="this model.py is another network"):
        run_jax("--batch_size=1")
    assert not list(tmp_path.glob("run*"))
