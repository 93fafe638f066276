"""What a GPU must show before it trains for days: `python -m pytest tests/test_gpu.py`, within ten minutes.

Other tests prove the mathematics on a CPU. Here is what only a GPU can show: that its numbers agree with
the CPU's, that it runs the kernels it should, waits for nothing it needn't wait for, and resumes exactly.
"""

import json
import re
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, records
from test_model import build, ids, loss_head
from test_train import assert_same_state, command
from torch.autograd import DeviceType
from torch.nn import functional as F

import sample
import train
from model import Backpack, load_checkpoint
from sample import sense_table

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available() is false", allow_module_level=True)

GPU = "--device=cuda"
BF16 = torch.cuda.is_bf16_supported(including_emulation=False)
FAST = "bfloat16" if BF16 else "float16"  # the number type that dtype=auto takes
TYPES = ["float32", "float16", *["bfloat16"] * BF16]


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    """train.py changes these for its process."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.cuda.empty_cache()


# ---- numbers

# Largest relative difference of a loss to float32's on a CPU, four times what rounding the factors of all
# matrix products to 10 bits (TF32, float16) or 7 bits (bfloat16) does on a CPU.
TOLERANCE = {"float32": 4e-3, "float16": 4e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_losses_are_those_of_a_cpu(run_train, capsys, dtype, compiled):
    steps = "--max_iters=60", "--eval_interval=60"
    exact = run_train(*steps)
    out = run_train(*steps, GPU, f"--dtype={dtype}", f"--compile={compiled}", out="gpu")
    assert "without torch.compile" not in capsys.readouterr().out
    for key in ("loss", "val_loss"):
        assert records(out, key) == pytest.approx(records(exact, key), rel=TOLERANCE[dtype])
    assert records(out, "loss")[60] < records(out, "loss")[1] - 0.5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_loss_head_is_right(dtype, compiled):
    """Value and gradients beside float64's, with the loss scale that float16 trains with."""
    loss, E, o, y = loss_head()
    whole = F.cross_entropy(F.linear(o.double(), E[:8190].double()).flatten(0, 1), y.flatten())
    exact = torch.autograd.grad(whole, (o, E))
    never = torch.ones(len(E), dtype=torch.bool).index_fill(0, y[y >= 0].unique(), False)

    torch.set_float32_matmul_precision("high")  # as train.py does
    loss.__self__.cuda()  # the model, with E
    o, y = o.detach().cuda().requires_grad_(), y.cuda()
    call = torch.compile(loss, fullgraph=True) if compiled else loss
    scale = 65536 if dtype == "float16" else 1
    with torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32"):
        value = call(o, y)
        with torch.no_grad():
            evaluated = call(o, y)
    found = [g.cpu() / scale for g in torch.autograd.grad(scale * value, (o, E))]
    for computed in (value, evaluated):
        assert computed.dtype == torch.float32 and abs(computed.item() - whole.item()) < 2e-3
    for got, want in zip(found, exact):
        assert (got - want).norm() < 0.01 * want.norm()
    assert (found[1] - exact[1])[never].norm() < 0.02 * exact[1][never].norm()
    assert not found[1][8190:].any() and not found[0][3, :50].any()  # no such token; no target


@pytest.mark.parametrize("n_sense", [0, 3])
def test_cached_generation_is_recomputation(n_sense):
    model, idx = build(n_sense=n_sense).cuda(), ids(2, 5).cuda()
    want, start = idx, 0
    for _ in range(40):
        if want.size(1) - start > 16:
            start = want.size(1) - 8
        want = torch.cat((want, model(want[:, start:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    for table in (None, sense_table(model)):
        got = model.generate(idx, 40, temperature=0, sense_table=table)
        assert torch.equal(got, want)
    assert torch.allclose(model(idx)[0].cpu(), model.cpu()(idx.cpu())[0], atol=1e-3)


def test_a_run_of_a_gpu_samples_on_both_devices(run_train, capsys):
    out, logits = run_train(GPU), []
    for device, shown in (("cuda", "cuda:0"), ("cpu", "cpu")):
        capsys.readouterr()
        sample.main([f"--run={out}", f"--device={device}", "--max_new_tokens=100"])
        printed = capsys.readouterr().out
        assert printed.count("--- sample") == 3 and f"tokens/s on {shown}" in printed
        model = Backpack.from_checkpoint(out, device)
        logits.append(model(ids(1, 8, n=20).to(device))[0].cpu())
    assert torch.allclose(*logits, atol=1e-3)


# ---- speed


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_one_graph_for_any_number_of_distinct_tokens(
    run_train, monkeypatch, capsys, grad_checkpoint
):
    """With accumulation, dropout, 16 bits and transformer_share, which is in TINY."""
    get_batch, counts = train.get_batch, set()

    def count(*args):
        batch = get_batch(*args)
        counts.add(len(batch[2][0]))
        return batch

    monkeypatch.setattr(train, "get_batch", count)
    options = "--batch_size=2", "--dropout=0.1", f"--dtype={FAST}", "--compile=True"
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_train(GPU, *options, f"--grad_checkpoint={grad_checkpoint}")
    assert "without torch.compile" not in capsys.readouterr().out
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len(counts) >= 5


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A data_dir whose dataset "words" has a vocabulary of GPT-2's size, few of which are in a batch."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "words").mkdir()
    tokens = np.random.default_rng(0).zipf(1.3, 200_000) % 50257
    parts = {"train": tokens[60_000:], "val": tokens[:60_000]}
    for split, part in parts.items():
        part.astype("<u2").tofile(folder / f"words/{split}.bin")
    spec = {"kind": "char", "chars": "".join(map(chr, range(1000, 51257)))}
    meta = {"dtype": "uint16", "vocab_size": 50257, "tokenizer": spec}
    meta |= {f"{split}_tokens": len(part) for split, part in parts.items()}
    (folder / "words/meta.json").write_text(json.dumps(meta))
    return folder


def train_micro(words, out, *args):
    """Train micro's shape for three steps of two micro-batches, with one evaluation at each end."""
    config = str(ROOT / "config/backpack_micro.py")
    where = f"--data_dir={words}", "--dataset=words", f"--out_dir={out}"
    steps = "--batch_size=16", f"--tokens_per_step={2 * 16 * 512}", "--max_iters=3"
    evaluation = "--eval_interval=3", "--eval_iters=1", "--log_interval=1", "--warmup_iters=1"
    train.main([config, *where, *steps, *evaluation, GPU, *args])


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="no flash attention")
@pytest.mark.parametrize(
    "dtype, dropout, compiled",
    [
        ("bfloat16", 0.1, True),
        ("bfloat16", 0.0, False),
        ("float16", 0.1, False),
        ("float16", 0.0, False),
    ],
)
def test_training_runs_the_fast_kernels(words, tmp_path, dtype, dropout, compiled):
    """Flash attention, be it torch's or cuDNN's, and no matrix product for sizes that 8 does not divide."""
    options = f"--dtype={dtype}", f"--dropout={dropout}", f"--compile={compiled}"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        train_micro(words, tmp_path / "run", *options)
    rows = trace.key_averages()
    names = {row.key.lower() for row in rows if row.device_type == DeviceType.CUDA}

    def matching(pattern):
        return sorted(name for name in names if re.search(pattern, name))

    assert matching("flash.*(fwd|fprop)") and matching("flash.*(bwd|bprop)"), sorted(names)
    assert not matching("fmha_cutlass")  # memory-efficient attention
    products = matching("gemm|cutlass_|nvjet|xmma")
    assert products, sorted(names)
    # kernels of cuBLAS have in their names how many numbers they load at once: 8 of 16 bits, or fewer
    slow = [name for name in products if re.search(r"(align|ldg)[124](?!\d)", name)]
    assert not slow, slow


@pytest.mark.parametrize("compiled", [False, True])
def test_activations_take_what_start_up_says(words, tmp_path, monkeypatch, capsys, compiled):
    """What is held after the last forward, without weights, gradients and moments; within 20%."""
    held, scale, before = [], torch.amp.GradScaler.scale, torch.cuda.memory_allocated()

    def look(self, loss):  # train.py calls it between forward and backward
        held.append(torch.cuda.memory_allocated() - before)
        return scale(self, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", look)
    train_micro(words, tmp_path / "run", f"--dtype={FAST}", f"--compile={compiled}")
    printed = capsys.readouterr().out
    n = int(re.search(r"([\d,]+) parameters", printed)[1].replace(",", ""))
    said = float(re.search(r"activations: about ([\d.]+) GB", printed)[1])
    assert said == pytest.approx((held[-1] - 16 * n) / 1e9, rel=0.2)


@pytest.mark.parametrize("dtype, compiled", [(FAST, True), ("float16", False)])
def test_the_host_waits_for_the_gpu_once_a_step(words, tmp_path, dtype, compiled):
    """And once in an evaluation, at its end."""
    options = "--n_layer=1", f"--dtype={dtype}", f"--compile={compiled}", "--eval_interval=100"

    def waits(*args):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_micro(words, tmp_path / "run", *options, "--overwrite=True", *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(w.message) for w in caught)

    waits("--max_iters=2")  # the first run in a process may wait for more
    four, nine = waits("--max_iters=4"), waits("--max_iters=9")
    assert nine - four == 5
    assert waits("--max_iters=4", "--eval_iters=3") == four


# ---- long runs


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("compiled", [False, True])
def test_a_signal_saves_and_resume_is_bit_for_bit(data_dir, tmp_path, compiled):
    """With --deterministic=True, each in a process of its own."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    args = [GPU, "--deterministic=True", "--dropout=0.1", f"--compile={compiled}"]
    args += ["--max_iters=600", "--eval_interval=300"]
    finish(command(data_dir, whole, *args))
    process = command(data_dir, cut, *args)
    while not (cut / "metrics.jsonl").exists() or len(records(cut, "loss")) < 20:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    step = int(re.search(r"stopped by a signal after step (\d+)", finish(process))[1])
    assert 20 <= step < 600 and load_checkpoint(cut)["step"] == step
    finish(command(data_dir, cut, *args, "--init_from=resume"))
    assert_same_state(whole, cut)
