"""Training in one process: steps, evaluation, speed, what a run keeps. Stopped runs: test_resume.py."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, files_in, records
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
import train
from configurator import UserError
from model import Backpack, BackpackConfig, load_checkpoint


def tokens_of(data_dir, split):
    ids = np.fromfile(data_dir / f"tiny/{split}.bin", "<u2")
    return torch.from_numpy(ids.astype(np.int64))


# ---- learning


@pytest.mark.parametrize("n_sense", [0, 4])
def test_a_run_learns_and_leaves_its_folder(run_train, capsys, n_sense):
    more = "--max_iters=40", "--eval_interval=10", "--schedule=cosine"
    out = run_train(*more, f"--n_sense={n_sense}")
    assert files_in(out).keys() == {"ckpt.pt", "config.json", "metrics.jsonl"}
    val_loss = records(out, "val_loss")
    assert list(records(out, "loss")) == list(range(1, 41))
    assert list(val_loss) == [0, 10, 20, 30, 40]
    assert val_loss[40] < val_loss[0] - 0.5
    ckpt = load_checkpoint(out)
    assert ckpt["step"] == 40
    assert any("sense" in name for name in ckpt["model"]) == bool(n_sense)
    assert json.loads((out / "config.json").read_text())["n_sense"] == n_sense
    line = r"step 40/40  loss [\d.]+  lr \S+  norm \S+  [\d,]+ tokens/s  0:00:00 left"
    assert re.search(line, capsys.readouterr().out)


def test_use_of_senses_is_logged_and_changes_nothing(run_train, data_dir):
    plain = run_train("--dropout=0.1", out="plain")
    out = run_train("--dropout=0.1", "--log_senses", out="senses")
    assert records(out, "loss") == records(plain, "loss")
    assert records(out, "val_loss") == records(plain, "val_loss")
    # 8 of the 16 windows of 8 tokens that the evaluation takes, evenly spread over val.bin
    tokens = tokens_of(data_dir, "val")
    starts = torch.arange(0, len(tokens) - 1, 8)
    starts = starts[np.linspace(0, len(starts) - 1, 16).astype(int)][::2]
    x = tokens[starts[:, None] + torch.arange(8)]
    model = Backpack.from_checkpoint(out / "ckpt.pt").eval().requires_grad_(False)
    alpha = model.contextualization(x)  # (B,K,T,T)
    C = model.senses(x)  # (B,T,K,D)
    for k in range(4):
        entropy = -torch.nan_to_num(alpha[:, k] * alpha[:, k].log()).sum(-1).mean().item()
        assert records(out, "positions_in_sight")[12][k] == pytest.approx(math.exp(entropy), rel=1e-5)
    lengths = torch.stack([(alpha[:, k] @ C[:, :, k]).norm(dim=-1) for k in range(4)])  # (K,B,T)
    expected = (lengths / lengths.sum(0)).mean((1, 2)).tolist()
    assert records(out, "sense_share")[12] == pytest.approx(expected, rel=1e-5)


def test_the_best_checkpoint_is_kept(run_train):
    """With a learning rate so high that the last is not the best."""
    out = run_train("--save_best", "--eval_interval=2", "--learning_rate=0.2", "--warmup_iters=0")
    val_loss = records(out, "val_loss")
    best = min(val_loss, key=val_loss.get)
    assert best < 12
    assert load_checkpoint(out / "best.pt")["step"] == best
    assert load_checkpoint(out)["best"] == val_loss[best]


def test_one_step_is_adamw_on_the_drawn_windows(run_train, data_dir):
    """The first step by hand: windows by (seed, step), mean loss, clipping, decay of matrices alone."""
    out = run_train("--max_iters=1", "--warmup_iters=0", "--grad_clip=0.5", "--transformer_share=0")
    trained = load_checkpoint(out)
    torch.manual_seed(5)
    model = Backpack(BackpackConfig(**trained["config"]))
    tokens = tokens_of(data_dir, "train")
    starts = np.random.default_rng((5, 0)).integers(len(tokens) - 8, size=8)
    idx = torch.stack([tokens[i : i + 9] for i in starts])
    loss = F.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert records(out, "loss")[1] == pytest.approx(loss.item(), rel=1e-6)
    assert records(out, "grad_norm")[1] == pytest.approx(norm, rel=1e-5)
    for name, p in model.named_parameters():
        g = p.grad * min(1, 0.5 / (norm + 1e-6))
        decays = p.dim() == 2 and not name.startswith(("wte", "wpe"))
        # the first step of both moments gives g / |g|
        want = p * (1 - 1e-2 * 0.1 * decays) - 1e-2 * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5  # where rounding of g can't turn the quotient
        assert torch.allclose(want[clear], trained["model"][name][clear], atol=2e-6), name
        assert clear.float().mean() >= 0.5 or name.startswith(("wte", "wpe")), name


def test_accumulation_follows_the_mean_of_the_step(run_train):
    whole = run_train()
    parts = run_train("--batch_size=2", out="parts")
    assert records(parts, "loss") == pytest.approx(records(whole, "loss"), rel=1e-5)
    assert records(parts, "grad_norm") == pytest.approx(records(whole, "grad_norm"), rel=1e-4)


def test_a_target_that_a_fork_leaves_out_has_no_weight(run_train, data_dir, monkeypatch):
    """The loss of a step is the mean of those that are left, however many each micro-batch has."""
    cut_windows = train.cut_windows

    def cut_and_leave_out(*args):
        x, y = cut_windows(*args)
        return x, np.where(y % 3 == 0, -100, y)

    monkeypatch.setattr(train, "cut_windows", cut_and_leave_out)
    steps = "--max_iters=1", "--warmup_iters=0", "--transformer_share=0"
    out = run_train("--batch_size=2", *steps)
    torch.manual_seed(5)
    model = Backpack(BackpackConfig(**load_checkpoint(out)["config"]))
    tokens = tokens_of(data_dir, "train")
    starts = np.random.default_rng((5, 0)).integers(len(tokens) - 8, size=8)
    idx = torch.stack([tokens[i : i + 9] for i in starts])
    y = idx[:, 1:].flatten()
    losses = F.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), y, reduction="none")
    assert records(out, "loss")[1] == pytest.approx(losses[y % 3 > 0].mean().item(), rel=1e-6)


def test_rate_and_share_of_a_step():
    sizes = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 4, "max_iters": 14}
    s = train.Settings(**sizes, transformer_share=0.7)
    linear = [train.lr_at(s, step) for step in (0, 3, 4, 9, 14)]
    assert linear == pytest.approx([0.25, 1, 1, 0.55, 0.1])
    s.schedule = "cosine"
    cosine = [train.lr_at(s, step) for step in (4, 6.5, 9, 14)]
    assert cosine == pytest.approx([1, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.55, 0.1])
    shares = [train.share_at(s, step, torch.device("cpu")).item() for step in (0, 7, 14)]
    assert shares == pytest.approx([0.7, 0.35, 0])
    s.n_sense = 0
    assert train.share_at(s, 7, torch.device("cpu")) is None


def test_senses_are_computed_once_for_each_distinct_token(run_train, monkeypatch):
    """In training and in evaluation: a micro-batch has 16 tokens."""
    rows = []
    forward = model_file.SenseNetwork.forward

    def count(self, e):
        rows.append(len(e))
        return forward(self, e)

    monkeypatch.setattr(model_file.SenseNetwork, "forward", count)
    run_train("--batch_size=2", "--max_iters=1", "--warmup_iters=0")
    assert len(rows) == 4 + 2 * 8
    assert all(1 < n < 16 for n in rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_trains(run_train, dtype):
    exact = records(run_train(), "val_loss")
    out = run_train(f"--dtype={dtype}", out=dtype)
    assert records(out, "val_loss") != exact
    assert records(out, "val_loss") == pytest.approx(exact, rel=0.05)
    ckpt = load_checkpoint(out)
    assert all(p.dtype == torch.float32 for p in ckpt["model"].values())
    assert bool(ckpt["scaler"]) == (dtype == "float16")


def test_compile_trains_with_one_graph(run_train, monkeypatch):
    """COMPILE=inductor compiles in earnest, which takes a CPU a minute."""
    args = "--batch_size=2", "--max_iters=6", "--freeze=wte,blocks.0"
    exact = run_train(*args)
    backend = os.environ.get("COMPILE", "aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = run_train(*args, "--compile=True", out="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert records(out, "loss") == pytest.approx(records(exact, "loss"), rel=1e-4)
    assert load_checkpoint(out)["model"].keys() == load_checkpoint(exact)["model"].keys()


# ---- evaluation


@pytest.mark.parametrize("full", [True, False])
def test_evaluation_is_the_mean_over_disjoint_windows(run_train, data_dir, full):
    """The last window is shorter, and bits are counted per byte of the targets, which are ASCII here."""
    out = run_train(f"--full_val={full}", "--batch_size=4")
    model = Backpack.from_checkpoint(out)
    tokens = tokens_of(data_dir, "val")
    starts = list(range(0, len(tokens) - 1, 8))
    if not full:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, 2 * 64 // 8)]
    losses = []
    for i in starts:
        y = tokens[i + 1 : i + 9]
        x = tokens[i : i + len(y)]
        losses.append(F.cross_entropy(model(x[None])[0][0], y, reduction="none"))
    assert len(losses[-1]) == 7
    want = torch.cat(losses).mean().item()
    assert records(out, "val_loss")[12] == pytest.approx(want, rel=1e-5)
    assert records(out, "bits_per_byte")[12] == pytest.approx(want / math.log(2), rel=1e-5)


def test_targets_and_their_bytes():
    tokenizer = SimpleNamespace(byte_counts=lambda: np.array([1, 2, 3, 0]))
    tokens = np.array([0, 1, 2, 3])
    assert train.count_targets(tokens, np.array([0]), 8, tokenizer) == (3, 2 + 3 + 0)
    assert train.count_targets(tokens, np.array([0, 2]), 2, None) == (3, 0)


def test_eval_only_writes_nothing(run_train, capsys):
    out = run_train()
    before = files_in(out)
    run_train("--init_from=resume", "--eval_only=True")
    run_train(f"--init_from={out}", "--eval_only=True", out="other")
    printed = capsys.readouterr().out
    assert f"step 12: val loss {records(out, 'val_loss')[12]:.4f}" in printed
    assert files_in(out) == before
    assert not (out.parent / "other").exists()


# ---- speed


def flops_by_hand(c, T, n_distinct):
    """Those of forward, by parts: 2 for each number of a matrix and each row that it multiplies."""
    D = c.n_embd
    K = c.n_sense
    parts = {
        "blocks": c.n_layer * T * (3 * D * D + D * D + 8 * D * D),
        "attention": c.n_layer * T * T * 2 * D,  # of all pairs of positions
        "logits": T * D * math.ceil(c.vocab_size / 8) * 8,
    }
    if K:
        parts["query_key"] = T * D * 2 * D
        parts["senses"] = n_distinct * (4 * D * D + 4 * D * D + D * 4 * D + 4 * D * K * D)
        parts["weights_and_sum"] = K * T * T * (D // K + D)
    return {name: 2 * n for name, n in parts.items()}


@pytest.mark.parametrize(
    "n_sense, frozen, saved",
    [
        (0, "wte", ["logits"]),
        (4, "", []),
        # a weight that is frozen has no gradient, and nothing below has one if nothing below trains
        (4, "wte,wpe,blocks,ln_f", ["logits", "blocks", "blocks", "attention", "attention", "query_key"]),
        (4, "wpe,sense_network,sense_qk", ["senses", "query_key"]),
    ],
)
def test_flops_are_those_counted_by_hand(n_sense, frozen, saved):
    """Backward takes twice what forward takes: the gradient of each matrix and of each input."""
    c = BackpackConfig(16, 61, n_layer=1, n_head=2, n_embd=24, n_sense=n_sense, grad_checkpoint=True)
    model = Backpack(c)
    if frozen:
        train.freeze(model, frozen)
    x = torch.arange(16)[None] // 2  # 8 tokens are distinct
    batch = x, x, x.unique(return_inverse=True)
    parts = flops_by_hand(c, 16, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = train.count_flops(model, *batch, None)
    assert counted == 3 * sum(parts.values()) - sum(parts[name] for name in saved)


def test_flops_have_nothing_that_is_computed_again():
    """The sum of 200 positions is two blocks of queries, and the first has 128 keys."""
    c = BackpackConfig(200, 61, n_layer=1, n_head=2, n_embd=24, n_sense=4)
    x = torch.arange(200)[None] % 61
    parts = flops_by_hand(c, 200, 61)
    parts["weights_and_sum"] = 2 * 4 * (128 * 128 + 72 * 200) * (6 + 24)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = train.count_flops(Backpack(c), x, x, x.unique(return_inverse=True), None)
    assert counted == 3 * sum(parts.values())


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("a GPU of tomorrow", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train.peak_flops(torch.device("cuda")) == peak


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that go to the host."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_waits_once_and_an_evaluation_at_its_end(run_train, monkeypatch):
    """Of two runs that differ by 5 steps, or by 3 evaluations, the longer waits 5, or 3, times more."""
    monkeypatch.setattr(train, "save_checkpoint", lambda path, ckpt: None)  # saving waits, too
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: np.True_)
    monkeypatch.setattr(torch.amp.GradScaler, "state_dict", lambda scaler: {})
    tolist = torch.Tensor.tolist

    def waits(n_steps, eval_interval):
        counter = Waits()

        def counted(tensor):
            counter.n += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        steps = f"--max_iters={n_steps}", f"--eval_interval={eval_interval}"
        with counter:
            run_train("--dtype=float16", "--batch_size=4", "--overwrite", *steps)
        return counter.n

    assert waits(10, 100) - waits(5, 100) == 5
    assert waits(10, 3) - waits(10, 100) == 3


# ---- what can go wrong


@pytest.mark.parametrize("args", [["--eval_interval=1"], ["--eval_interval=4"], ["--max_iters=1"]])
def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(run_train, tmp_path, args):
    """At an evaluation, in a step, and in the last step, too."""
    wild = "--learning_rate=1e6", "--warmup_iters=0", "--grad_clip=0"
    with pytest.raises(UserError, match=r"step \d+: .*the last checkpoint stays"):
        run_train(*wild, *args)
    ckpt = load_checkpoint(tmp_path / "run")
    assert all(p.isfinite().all() for p in ckpt["model"].values())


def test_weights_that_are_not_finite_are_not_saved(run_train, monkeypatch):
    """Also where no text shows it, as in a row of E that no token has."""
    out = run_train("--max_iters=4")
    before = files_in(out)
    step = torch.optim.AdamW.step

    def spoil(self, *args, **kwargs):
        step(self, *args, **kwargs)
        (E,) = [p for p in self.param_groups[1]["params"] if p.shape == (32, 16)]
        E.data[-1] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(UserError, match="some weights are not finite; the last checkpoint stays"):
        run_train("--init_from=resume", "--max_iters=5", "--eval_interval=5")
    assert files_in(out)["ckpt.pt"] == before["ckpt.pt"]


def test_fifty_skipped_steps_in_a_row_end_a_run(run_train, monkeypatch, tmp_path):
    infinite = torch.tensor(math.inf)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: infinite)
    with pytest.raises(UserError, match="step 0: gradient norm inf"):
        run_train()
    with pytest.raises(UserError, match="step 49: gradient norm inf"):
        run_train("--dtype=float16", "--max_iters=60", "--eval_interval=60", "--overwrite")
    assert load_checkpoint(tmp_path / "run")["step"] == 0


def test_a_full_disk_leaves_the_old_checkpoint(run_train):
    """/dev/full takes no byte, and the temporary name leads there."""
    out = run_train("--max_iters=4")
    before = files_in(out)
    (out / "ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="could not write .*ckpt.pt, what was there stays: "):
        run_train("--init_from=resume", "--max_iters=8")
    assert files_in(out)["ckpt.pt"] == before["ckpt.pt"]
    assert not (out / "ckpt.partial").is_symlink()


def test_out_of_memory_is_one_line(run_train, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr(Backpack, "loss", full)
    with pytest.raises(UserError, match="out of memory: lower batch_size, or .*--grad_checkpoint"):
        run_train()


def test_a_compile_that_fails_is_one_line(run_train, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=broken))
    with pytest.raises(UserError, match="torch.compile fails here: --compile=False goes without") as error:
        run_train("--compile=True")
    assert "\n" not in str(error.value)


@pytest.mark.skipif("COMPILE" not in os.environ, reason="takes long; COMPILE=inductor runs it")
def test_a_machine_without_a_compiler(tiny_argv, tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    no_compiler = os.environ | cache | {"CXX": "/nonexistent", "CC": "/nonexistent"}
    argv = tiny_argv("--n_layer=1", "--n_sense=0", "--compile=True")
    command = [sys.executable, ROOT / "train.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=no_compiler)
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: torch.compile fails here: --compile=False goes without (")
    assert done.stderr.count("\n") == 1


def test_wandb(run_train, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = run_train("--wandb=True", "--max_iters=4")
    (log,) = out.glob("wandb/offline-run-*/*.wandb")
    assert load_checkpoint(out)["wandb_id"] in log.name

    import wandb

    def fail(**settings):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", fail)
    message = "wandb does not start: No API key configured.; WANDB_MODE=offline needs no key"
    with pytest.raises(UserError, match=message):
        run_train("--wandb=True", out="other")


# ---- weights of other runs


def test_finetuning_starts_from_the_other_runs_weights(run_train):
    out = run_train()
    args = "--dropout=0.2", "--learning_rate=1e-3"
    tuned = run_train(f"--init_from={out}", *args, out="tuned")
    last = records(out, "val_loss")[12]
    assert records(tuned, "val_loss")[0] == pytest.approx(last, rel=1e-6)
    assert load_checkpoint(tuned)["config"]["dropout"] == 0.2
    from_file = run_train(f"--init_from={out / 'ckpt.pt'}", *args, out="from_file")
    assert records(from_file, "loss") == records(tuned, "loss")


def test_weights_alone_evaluate_and_finetune_but_do_not_resume(run_train, tmp_path, capsys):
    ckpt = load_checkpoint(run_train())
    shared = {key: ckpt[key] for key in ("model", "config", "settings", "step", "meta")}
    (tmp_path / "small").mkdir()
    train.save_checkpoint(tmp_path / "small/ckpt.pt", shared)
    run_train("--init_from=resume", "--eval_only=True", out="small")
    assert "step 12: val loss" in capsys.readouterr().out
    with pytest.raises(UserError, match="has weights only, .*: finetune them with --init_from="):
        run_train("--init_from=resume", "--max_iters=20", out="small")
    run_train(f"--init_from={tmp_path / 'small'}", out="tuned")


def test_a_tokenizer_that_is_not_there_costs_only_the_bits_per_byte(run_train, monkeypatch, capsys):
    """As on a node without a network, to which only the .bin files of GPT-2's tokens were copied."""

    def missing(spec):
        raise UserError("pip could not download it")

    monkeypatch.setattr(train, "load_tokenizer", missing)
    out = run_train("--max_iters=4")
    assert set(records(out, "bits_per_byte").values()) == {None}
    assert "no bits per byte without the tokenizer: pip could not download it" in capsys.readouterr().out


# ---- mistakes that people make


@pytest.mark.parametrize(
    "args, message",
    [
        ("--dataset=nothing", "python prepare_data.py --dataset=nothing makes it"),
        ("--vocab_size=5", "vocab_size=5, but tiny has 29 tokens"),
        ("--block_size=99999 --tokens_per_step=99999", "is too short for block_size=99999"),
        ("--n_embd=15", "n_embd=15 must be divisible by n_head=2"),
        ("--n_sense=3", "n_embd=16 must be divisible by n_sense=3"),
        ("--tokens_per_step=60", "tokens_per_step=60 must be a multiple of block_size=8"),
        ("--batch_size=3", "batch_size=3 must divide the 8 sequences"),
        ("--warmup_iters=12", "warmup_iters=12 leaves no steps"),
        ("--min_lr=1", "min_lr=1.0 is above learning_rate=0.01"),
        ("--grad_clip=-5", "grad_clip=-5.0 must not be negative"),
        ("--eval_interval=0", "eval_interval=0 must be more than 0"),
        ("--device=cuda:99", "device='cuda:99': this machine has no such device"),
        ("--dtype=int8", "dtype='int8' in --dtype=int8: expected auto or float32 or"),
        ("--schedule=linaer", "expected linear or cosine"),
        (
            "--freeze=wte,block",
            "no module 'block', the network has wte, wpe, blocks, ln_f, sense_network, sense_qk",
        ),
        ("--n_sense=0 --freeze=wte,wpe,blocks,ln_f", "leaves nothing to train: the network has wte, wpe"),
        ("--n_layers=3", "did you mean 'n_layer'"),
        ("--init_from=nowhere", "no checkpoint at nowhere"),
        ("--init_from=resume", "no checkpoint at"),
    ],
)
def test_mistakes_end_before_anything_is_written(run_train, tmp_path, args, message):
    with pytest.raises((UserError, OSError)) as error:
        run_train(*args.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_launchers_set(run_train, monkeypatch):
    """Variables that are empty or of one process don't matter; processes alone are refused."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    run_train("--max_iters=4")
    for name, value, message in [
        ("RANK", "1", "RANK=1, but WORLD_SIZE=1: start with torchrun"),
        ("WORLD_SIZE", "2", "WORLD_SIZE=2, but no MASTER_ADDR: start with torchrun"),
        ("RANK", "", "WORLD_SIZE=2, but no RANK: start with torchrun"),
        ("SLURM_STEP_NUM_TASKS", "4", "WORLD_SIZE=2, but no RANK: start with torchrun"),
        ("WORLD_SIZE", "1", "srun started 4 tasks that would train alone"),
    ]:
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=message):
            run_train("--overwrite")
