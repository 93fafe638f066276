"""What training needs of a device: the estimate of its memory, and how often a step waits for it."""

import json
import math
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import lines, records
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import hardware
import model
import train
from hardware import activation_bytes, flops_per_token, peak_flops
from model import Backpack, BackpackConfig
from tokenizer import load_tokenizer, train_bpe

CPU = torch.device("cpu")


def as_on_a_gpu(*args, plain=model.sum_senses):
    """sum_senses with each position by itself."""
    with patch.object(torch.compiler, "is_compiling", return_value=True):
        return plain(*args)


def kept_by_autograd(net, x, distinct, dtype, share):
    """Bytes of all that autograd keeps of a forward pass, but for the weights."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    share = torch.tensor(0.5) if share else None
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, hardware.autocast(CPU, dtype):
        loss = net(x, x, distinct=distinct, transformer_share=share)[1]
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("n_sense, share", [(16, True), (0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size, dropout", [(256, 0.0), (256, 0.1), (64, 0.0)])
def test_activation_bytes(n_sense, share, dtype, block_size, dropout, monkeypatch):
    """Within 20% of what autograd keeps; at 256 tokens on the path of the sum that a GPU takes."""
    if block_size > 128:
        monkeypatch.setattr(model, "sum_senses", as_on_a_gpu)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 128, "n_sense": n_sense, "dropout": dropout}
    net = Backpack(BackpackConfig(block_size, 512, **sizes))
    x = torch.randint(400, (2, block_size))
    distinct = x.unique(return_inverse=True)
    kept = kept_by_autograd(net, x, distinct, dtype, share)
    size = x.numel(), len(distinct[0])
    estimate = activation_bytes(net, *size, CPU, dtype, 1 + share)
    assert estimate == pytest.approx(kept, rel=0.2)


def test_flops_count_the_second_loss():
    net = Backpack(BackpackConfig(8, 50, n_layer=1, n_head=2, n_embd=16, n_sense=4))
    one, two = flops_per_token(net, 0.5), flops_per_token(net, 0.5, losses=2)
    assert two.pop("logits and loss") == 2 * one.pop("logits and loss") == 2 * 6 * 56 * 16
    assert one == two


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA GeForce RTX 5090", 210),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA A10G", 70),
        ("a GPU of tomorrow", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert peak == (tflops and tflops * 1e12)


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: values that go to the host."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_waits_once_and_an_evaluation_at_its_end(run_train, monkeypatch, dtype):
    """Of two runs that differ by 5 steps, or by 3 evaluations, the longer waits 5, or 3, times more."""
    monkeypatch.setattr(model, "sum_senses", as_on_a_gpu)

    def waits(*args, out):
        counter, tolist = Waits(), torch.Tensor.tolist

        def counted(tensor):
            counter.n += 1
            return tolist(tensor)

        with monkeypatch.context() as patch, counter:
            patch.setattr(torch.Tensor, "tolist", counted)
            for name in ("cpu", "numpy"):
                patch.setattr(torch.Tensor, name, None)
            patch.setattr(train, "save_checkpoint", lambda path, value: None)
            patch.setattr(torch.Tensor, "isfinite", lambda tensor: np.True_)
            patch.setattr(torch.amp.GradScaler, "state_dict", lambda scaler: {})
            run_train(f"--dtype={dtype}", "--batch_size=2", *args, out=out)
        return counter.n

    few = waits("--max_iters=5", "--eval_interval=100", out="few")
    steps = waits("--max_iters=10", "--eval_interval=100", out="steps")
    evaluations = waits("--max_iters=10", "--eval_interval=3", out="evaluations")
    assert steps - few == 5 and evaluations - steps == 3


# ---- what is told


def test_bits_per_byte_of_the_tokens_evaluated(run_train, data_dir):
    """All of val.bin but its first token, counted as text."""
    out = run_train("--full_val=True")
    meta = json.loads((data_dir / "tiny/meta.json").read_text())
    text = load_tokenizer(meta["tokenizer"]).decode(np.fromfile(data_dir / "tiny/val.bin", "<u2"))
    for step, loss in records(out, "val_loss").items():
        bits = loss * (len(text) - 1) / math.log(2)
        want = bits / len(text[1:].encode())
        assert records(out, "bits_per_byte")[step] == pytest.approx(want, rel=1e-9)


def test_bits_per_byte_are_unknown_without_a_tokenizer(run_train, monkeypatch):
    def missing(spec):
        raise train.UserError("no network")

    monkeypatch.setattr(train, "load_tokenizer", missing)
    assert set(records(run_train(), "bits_per_byte").values()) == {None}


def test_byte_counts_of_a_bpe_add_up_to_the_text():
    tokenizer = load_tokenizer(train_bpe(lines(50) + ["naïve café ☕ 🙂"], 300))
    counts, text = tokenizer.byte_counts(), "document 7 in a café: ☕🙂 été"
    assert counts[tokenizer.encode(text)].sum() == len(text.encode())
    assert counts[tokenizer.end] == 0 and len(counts) == tokenizer.vocab_size


def test_the_backpacks_own_loss_stands_beside_the_mixture(run_train):
    """With a share of 1 the first step's loss is the Transformer's alone; without, the Backpack's."""
    still = ["--learning_rate=1e-12", "--max_iters=2", "--eval_interval=100"]
    plain = records(run_train(*still, "--transformer_share=0", out="plain"), "loss")
    mixed = run_train(*still, "--transformer_share=1", out="mixed")
    assert records(mixed, "backpack_loss") == pytest.approx(plain, rel=1e-6)
    assert records(mixed, "loss")[1] != pytest.approx(plain[1], rel=1e-3)


def test_what_changes_is_said(run_train, capsys):
    run_train("--batch_size=32", "--schedule=cosine", "--max_iters=4")
    assert (
        "batch_size=32 is cut to 8, all the sequences of a step and rank" in capsys.readouterr().out
    )
    run_train("--init_from=resume", "--schedule=cosine", "--max_iters=12", "--beta2=0.9")
    printed = capsys.readouterr().out
    assert "resuming with beta2=0.9 (until now 0.999)" in printed
    assert re.search(r"at step 4 the learning rate rises from 0.00e\+00 to \d\.\d\de-03", printed)


def test_one_graph_for_any_number_of_distinct_tokens():
    """The path that CUDA takes, with all that training may switch on; two blocks of queries."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_sense": 4, "dropout": 0.1}
    net = Backpack(BackpackConfig(160, 50, **sizes, grad_checkpoint=True))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for n in (3, 7, 12, 30, 45):
        for step in range(2):  # two micro-batches of a step
            x = torch.randint(n, (2, 160))
            x[0, :n] = torch.arange(n)
            distinct = x.unique(return_inverse=True)
            torch._dynamo.mark_dynamic(distinct[0], 0)
            share = torch.full((), 0.5 / (n + step))
            with hardware.autocast(CPU, torch.bfloat16):
                loss = compiled(x, x, distinct=distinct, transformer_share=share)[1]
            loss.backward()
    assert counter.frame_count == 1
    assert all(p.grad.isfinite().all() for p in net.parameters())
