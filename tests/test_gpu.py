"""What a GPU must show before it trains for days: `python -m pytest tests/test_gpu.py`, within ten minutes.

Other tests prove the mathematics on a CPU. Here is what only a GPU can show: that its numbers agree with
the CPU's, that it runs the kernels it should, waits for nothing it needn't wait for, and resumes exactly.
"""

import json
import re
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, records, start
from test_loss import assert_loss_is_exact
from test_model import build, ids, recomputed
from test_resume import assert_same_state
from torch.autograd import DeviceType

import sample
import train
from model import load_checkpoint

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
def test_losses_are_those_of_a_cpu(run_train, dtype, compiled):
    steps = "--max_iters=60", "--eval_interval=60"
    exact = run_train(*steps)
    out = run_train(*steps, GPU, f"--dtype={dtype}", f"--compile={compiled}", out="gpu")
    for key in ("loss", "val_loss"):
        assert records(out, key) == pytest.approx(records(exact, key), rel=TOLERANCE[dtype])
    assert records(out, "loss")[60] < records(out, "loss")[1] - 0.5


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_loss_head_is_right(dtype, backend):
    torch.set_float32_matmul_precision("high")  # as train.py does
    # 6,144 rows are two chunks on a GPU
    assert_loss_is_exact("cuda", getattr(torch, dtype), backend, B=48)


@pytest.mark.parametrize("n_sense", [0, 3])
def test_cached_generation_is_recomputation(n_sense):
    model = build(n_sense=n_sense).cuda()
    idx = ids(2, 5).cuda()
    want = recomputed(model, idx, 40)
    tables = [None, model.sense_table()] if n_sense else [None]
    for table in tables:
        assert torch.equal(model.generate(idx, 40, temperature=0, sense_table=table), want)
    logits = model(idx)[0].cpu()
    assert torch.allclose(logits, model.cpu()(idx.cpu())[0], atol=1e-3)


def test_a_run_of_a_gpu_samples_on_both_devices(run_train, capsys):
    out = run_train(GPU)
    capsys.readouterr()
    for device in ("cuda", "cpu"):
        sample.main([f"--run={out}", f"--device={device}", "--max_new_tokens=100"])
    printed = capsys.readouterr().out
    assert printed.count(", sample ") == 6
    assert "tokens/s on cuda:0" in printed
    assert "tokens/s on cpu" in printed


# ---- speed


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_one_graph_for_any_number_of_distinct_tokens(run_train, monkeypatch, grad_checkpoint):
    """With accumulation, dropout, 16 bits and transformer_share, which is in TINY."""
    get_batch = train.get_batch
    counts = set()

    def count(*args):
        batch = get_batch(*args)
        counts.add(len(batch[2][0]))
        return batch

    monkeypatch.setattr(train, "get_batch", count)
    options = "--batch_size=2", "--dropout=0.1", f"--dtype={FAST}", "--compile=True"
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_train(GPU, *options, f"--grad_checkpoint={grad_checkpoint}")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(counts) >= 5


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A data_dir whose dataset "words" has a vocabulary of GPT-2's size, few of which are in a batch."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "words").mkdir()
    tokens = np.random.default_rng(0).zipf(1.3, 200_000) % 50257
    tokens[60_000:].astype("<u2").tofile(folder / "words/train.bin")
    tokens[:60_000].astype("<u2").tofile(folder / "words/val.bin")
    spec = {"kind": "char", "chars": "".join(map(chr, range(1000, 51257)))}
    meta = {"dtype": "uint16", "vocab_size": 50257, "tokenizer": spec}
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

    # cuDNN's are called ..._sdpa_..._fprop, _bprop, with and without "flash"
    assert matching("(flash|sdpa).*(fwd|fprop)"), sorted(names)
    assert matching("(flash|sdpa).*(bwd|bprop)"), sorted(names)
    assert not matching("fmha_cutlass")  # memory-efficient attention
    products = matching("gemm|cutlass_|nvjet|xmma")
    assert products, sorted(names)
    # kernels of cuBLAS have in their names how many numbers they load at once: 8 of 16 bits, or fewer
    slow = [name for name in products if re.search(r"(align|ldg)[124](?!\d)", name)]
    assert not slow, slow


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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_signal_saves_and_resume_is_bit_for_bit(tiny_argv, tmp_path, compiled):
    """With --deterministic=True, each in a process of its own."""
    args = [GPU, "--deterministic=True", "--dropout=0.1", f"--compile={compiled}"]
    args += ["--max_iters=600", "--eval_interval=300"]
    log = tmp_path / "log"
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"

    def finish(process):
        process.join()
        assert process.exitcode == 0, log.read_text()

    finish(start(tiny_argv(*args, out="whole"), log))
    process = start(tiny_argv(*args, out="cut"), log)
    while not (cut / "metrics.jsonl").exists() or len(records(cut, "loss")) < 20:
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    process.terminate()
    finish(process)
    step = int(re.search(r"stopped by a signal after step (\d+)", log.read_text())[1])
    assert 20 <= step < 600
    assert load_checkpoint(cut)["step"] == step
    finish(start(tiny_argv(*args, "--init_from=resume", out="cut"), log))
    assert_same_state(whole, cut)
