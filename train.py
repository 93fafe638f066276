"""
Train a Backpack, or with --n_sense=0 the Transformer inside it, on a dataset of prepare_data.py.

$ python train.py config/shakespeare_char.py                      a CPU, a Mac or one GPU
$ torchrun --nproc_per_node=4 train.py config/backpack_small.py   several GPUs, also on many nodes
$ python train.py --out_dir=out/run --init_from=resume            go on where a run stopped
$ python train.py --out_dir=out/tuned --init_from=out/run         start from another run's weights
"""

import datetime
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import configurator  # isort: skip  # before torch, for which it sets the environment
import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from configurator import Dtype, UserError, check, pick_device, pick_dtype
from model import Backpack, BackpackConfig, load_checkpoint
from tokenizer import load_tokenizer, nanogpt_meta

# -----------------------------------------------------------------------------
# settings: all of BackpackConfig, and these. The defaults are the paper's recipe for its "small"


@dataclass
class Settings(BackpackConfig):
    vocab_size: int | None = None  # None: the dataset's
    # files
    dataset: str = "openwebtext"  # a folder of data_dir that prepare_data.py made
    data_dir: str = "data"
    out_dir: str = "out/backpack_small"  # the run: ckpt.pt, config.json, metrics.jsonl
    init_from: str = "scratch"  # resume (the run in out_dir), auto (resume or scratch), or a PATH
    overwrite: bool = False  # start from scratch over the run in out_dir
    # optimization
    tokens_per_step: int = 524288  # over all ranks and micro-batches
    batch_size: int = 16  # sequences per rank and micro-batch
    max_iters: int = 100000
    learning_rate: float = 6e-4  # the highest, after warm-up
    min_lr: float = 0.0  # the last
    schedule: Literal["linear", "cosine"] = "linear"  # decay from one to the other
    warmup_iters: int = 5000
    muon_lr: float = 0.0  # of matrices, by Muon; 0: AdamW for them, too
    weight_decay: float = 0.1  # of matrices
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    freeze: str = ""  # modules that don't train, by name or class: wte,blocks.0,LayerNorm
    transformer_share: float = 0.0  # of the Transformer's own loss at the start, falling to 0 (ours)
    # evaluation and logging
    eval_interval: int = 1000  # steps between evaluations, each with a checkpoint
    eval_iters: int = 4  # evaluate on so many times tokens_per_step of val.bin
    full_val: bool = False  # ... on all of it
    eval_only: bool = False  # evaluate, print and exit; writes nothing
    save_best: bool = False  # keep the checkpoint of the lowest validation loss, too: best.pt
    log_senses: bool = False  # at evaluations, log each sense's share of the sum and how far it looks
    log_interval: int = 10
    wandb: bool = False  # log to Weights & Biases, too (WANDB_MODE=offline needs no key)
    wandb_project: str = "nanoBackpack"
    # machine
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: Dtype = "auto"  # of matrix products: float32, bfloat16, float16; auto: 16 bits on a GPU
    compile: bool | None = None  # torch.compile; None: on a GPU
    deterministic: bool = False  # on a GPU: resume bit for bit, but slower
    seed: int = 1337  # of weights, batches and dropout

    def __post_init__(self):
        """Sizes are checked in network_config, when those of a checkpoint are known."""


def network_config(s):
    """The part of the settings that describes the network."""
    try:
        return BackpackConfig(**{f.name: getattr(s, f.name) for f in fields(BackpackConfig)})
    except ValueError as error:
        raise UserError(str(error)) from None


def check_settings(s):
    """UserError: a number with which no training can go on."""
    check(s.warmup_iters < s.max_iters, f"warmup_iters={s.warmup_iters} leaves no steps to decay")
    for key in ("batch_size", "learning_rate", "eval_interval", "eval_iters", "log_interval"):
        check(getattr(s, key) > 0, f"{key}={getattr(s, key)} must be more than 0")
    for key in ("min_lr", "muon_lr", "weight_decay", "grad_clip"):
        check(getattr(s, key) >= 0, f"{key}={getattr(s, key)} must not be negative")
    check(s.min_lr <= s.learning_rate, f"min_lr={s.min_lr} is above learning_rate={s.learning_rate}")


# -----------------------------------------------------------------------------
# data: train.bin and val.bin are token ids, one after another; of prompts and answers, train_mask.bin and
# val_mask.bin have a byte for each id: 1 in an answer and at its end


def load_data(folder):
    """(token ids of train.bin, of val.bin, meta.json) of a dataset; the ids are memory-mapped.

    It may be one of nanoGPT's, which has no meta.json.
    """
    hint = f"python prepare_data.py --dataset={folder.name} makes it"
    check((folder / "train.bin").exists(), f"no dataset at {folder}: {hint}")
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text())
    else:
        meta = nanogpt_meta(folder)
    train, val = [np.memmap(folder / f"{split}.bin", meta["dtype"], "r") for split in ("train", "val")]
    largest = max(train[:10_000_000].max(), val.max())  # more would take long
    vocab_size = meta["vocab_size"]
    check(largest < vocab_size, f"{folder} has a token {largest}, but a vocabulary of {vocab_size} tokens")
    # characters would have small ids; a dataset may have lost its description on the way
    described = any((folder / name).exists() for name in ("meta.json", "meta.pkl"))
    hint = "are these GPT-2's tokens? Copy the dataset's meta.json or meta.pkl, too"
    check(described or largest > vocab_size // 2, f"{folder} has no token above {largest}: {hint}")
    return train, val, meta


def load_answers(folder, meta):
    """The masks of train.bin and of val.bin, memory-mapped; None each, if all tokens are to be learned."""
    if not meta.get("answers"):
        return None, None
    return [np.memmap(folder / f"{split}_mask.bin", np.uint8, "r") for split in ("train", "val")]


def document_starts(answers):
    """Where prompts begin (n,), of the mask of their answers: at 0, and where an answer is over."""
    return np.append(0, np.flatnonzero(answers[:-1] > answers[1:]) + 1)


def cut_windows(tokens, starts, T, answers=None):
    """The windows of T tokens that begin at starts (n,): x (n,T), and y (n,T), the token after each.

    y is -100 beyond the end of the text. answers: the mask of prompts and answers; with it, only the answer
    of the document that begins with a window counts, and y is -100 elsewhere.
    """
    # x and y are one window of T+1 tokens; the last one of a text may reach beyond its end
    at = starts[:, None] + np.arange(T + 1)  # (n,T+1)
    counts = at < len(tokens)
    at = np.minimum(at, len(tokens) - 1)
    if answers is not None:
        is_answer = answers[at] == 1
        # where an answer ends, the next document begins
        is_over = is_answer[:, :-1] & ~is_answer[:, 1:]  # (n,T)
        counts &= is_answer
        counts[:, 1:] &= is_over.cumsum(1) == 0
    window = tokens[at].astype(np.int64)
    return window[:, :-1], np.where(counts, window, -100)[:, 1:]


def get_batch(tokens, starts, T, device, answers=None):
    """The windows of cut_windows as tensors on a device: x (B,T), y (B,T), (ids (U,), where (B,T)).

    ids: the distinct tokens of x; where: which of these stands at each position.
    """
    x, y = cut_windows(tokens, starts, T, answers)
    # found here, as a GPU would have to be waited for; by counting, which is faster than np.unique
    present = np.bincount(x.ravel()) > 0
    ids = np.flatnonzero(present)
    where = (present.cumsum() - 1)[x]
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in (x, y, ids, where)]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]  # the host need not wait for the copy
    x, y, ids, where = [tensor.to(device, non_blocking=True) for tensor in tensors]
    return x, y, (ids, where)


def evaluation_starts(s, n_tokens, answers=None):
    """Where the windows to evaluate on begin (n,): disjoint, and the same for any number of ranks."""
    starts = np.arange(0, n_tokens - 1, s.block_size)
    if answers is not None:
        starts = document_starts(answers)
    n_windows = s.eval_iters * s.tokens_per_step // s.block_size
    if s.full_val or n_windows >= len(starts):
        return starts
    return starts[np.linspace(0, len(starts) - 1, n_windows).astype(int)]


def count_targets(tokens, starts, T, tokenizer, answers=None):
    """How many targets the windows that begin at starts (n,) have, and bytes of text (0: unknown)."""
    bytes_of = tokenizer.byte_counts() if tokenizer else None  # (V,)
    n_targets = 0
    n_bytes = 0
    for some in np.split(starts, range(1024, len(starts), 1024)):  # as all windows may fill the memory
        _, y = cut_windows(tokens, some, T, answers)
        targets = y[y >= 0]
        n_targets += len(targets)
        if bytes_of is not None:
            n_bytes += int(bytes_of[targets].sum())
    return n_targets, n_bytes


# -----------------------------------------------------------------------------
# optimizers and schedules


def orthogonal(M):
    """Matrices M (...,m,n) = U S V^T -> about U V^T, by five Newton-Schulz steps."""
    wide = M.size(-2) <= M.size(-1)
    X = M if wide else M.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values in [0, 1]
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X  # they come to 0.7 ... 1.2
    return X if wide else X.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (kellerjordan.github.io/posts/muon).

    A matrix of `blocks` matrices, one below the other, is orthogonalized block by block. torch.optim.Muon
    does the same for one block, in bfloat16, which most CPUs only emulate: there it is 60 times slower.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, blocks=1):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "blocks": blocks}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                update = orthogonal(update.unflatten(0, (group["blocks"], -1)))  # (blocks,m,n)
                m, n = update.shape[-2:]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.flatten(0, 1), alpha=-group["lr"] * max(1, m / n) ** 0.5)


def freeze(model, names):
    """Modules with these names or classes, separated by commas, won't train. UserError: one isn't there."""
    there = ", ".join(name for name, child in model.named_children() if list(child.parameters()))
    for name in names.split(","):
        found = [m for path, m in model.named_modules() if path and name in (path, type(m).__name__)]
        parameters = [p for module in found for p in module.parameters()]
        check(parameters, f"freeze={names}: no module {name!r}, the network has {there}")
        for p in parameters:
            p.requires_grad_(False)
    trains = any(p.requires_grad for p in model.parameters())
    check(trains, f"freeze={names} leaves nothing to train: the network has {there}")


def make_optimizers(model, s):
    """A list: AdamW and, with muon_lr, Muon for the matrices. One that would train nothing is left out."""
    matrices, rest = model.param_groups(s.weight_decay)
    # fused: one kernel for all parameters instead of several for each
    options = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "fused": True}
    if not s.muon_lr:
        return [torch.optim.AdamW([matrices, rest], **options)]
    groups = [matrices]
    if s.n_sense:
        # the matrix that makes the senses is one for each sense, stacked
        senses = model.sense_network.mlp_out.proj.weight
        matrices["params"] = [p for p in matrices["params"] if p is not senses]
        if senses.requires_grad:
            groups.append({**matrices, "params": [senses], "blocks": s.n_sense})
    optimizers = [torch.optim.AdamW([rest], **options), Muon(groups, s.muon_lr)]
    return [o for o in optimizers if any(group["params"] for group in o.param_groups)]


def lr_at(s, step):
    """Linear warm-up to learning_rate, then linear or cosine decay to min_lr at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    share = 1 - done if s.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return s.min_lr + share * (s.learning_rate - s.min_lr)


def share_at(s, step, device):
    """The share of the Transformer's own loss in that of a step, a scalar tensor; None: it has none."""
    if not s.transformer_share or not s.n_sense:
        return None
    # torch.tensor(...) would make the host wait for a GPU
    return torch.full((), s.transformer_share * (1 - step / s.max_iters), device=device)


# -----------------------------------------------------------------------------
# checkpoints and logs


def save_checkpoint(path, ckpt):
    """At any moment path holds a whole checkpoint, the old one or the new one."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(ckpt, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's word for a full disk is RuntimeError
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"could not write {path}, what was there stays: {reason}") from None


def cut_metrics(path, step):
    """Cut off what a run logged after its checkpoint of this step, and the evaluation that comes again."""
    # truncated in place, as a copy could be half-written
    with open(path, "a+b") as file:
        file.seek(0)
        end = 0
        for line in file:
            if not line.endswith(b"\n"):  # the run was killed while it wrote
                break
            record = json.loads(line)
            if record["step"] > step or (record["step"] == step and "loss" not in record):
                break
            end += len(line)
        file.truncate(end)


def find_checkpoint(s, given, say):
    """The checkpoint that init_from names, whose settings s adopts; None: there is none.

    given: the settings of the command line and config files. UserError: out_dir has a run, or ckpt.pt does
    not fit.
    """
    out = Path(s.out_dir)
    if s.init_from == "auto":
        s.init_from = "resume" if (out / "ckpt.pt").exists() else "scratch"
    resume = s.init_from == "resume"
    if not resume and not s.eval_only:
        names = ("ckpt.pt", "best.pt", "config.json", "metrics.jsonl")
        found = [n for n in names if (out / n).exists() and (out / n).stat().st_size]
        hint = "--init_from=resume goes on with a run, --overwrite replaces it"
        check(s.overwrite or not found, f"{out} has {' and '.join(found)}: {hint}")
    if s.init_from == "scratch":
        return None
    init = out if resume else Path(s.init_from)
    ckpt = load_checkpoint(init)
    adopt_settings(s, given, ckpt, init, say)
    return ckpt


def adopt_vocabulary(s, ckpt, meta):
    """Take vocab_size from meta, of the dataset. UserError: a checkpoint, or s, has another vocabulary."""
    if ckpt:
        init = s.out_dir if s.init_from == "resume" else s.init_from
        same_tokenizer = meta["tokenizer"] == ckpt["meta"]["tokenizer"]
        hint = f"prepare it with --tokenizer={init}"
        check(same_tokenizer, f"{s.dataset} has another tokenizer than {init}: {hint}")
    vocab_size = meta["vocab_size"]
    s.vocab_size = s.vocab_size or vocab_size
    check(s.vocab_size == vocab_size, f"vocab_size={s.vocab_size}, but {s.dataset} has {vocab_size} tokens")


def adopt_settings(s, given, ckpt, init, say):
    """Settings that were not given become those of a checkpoint: all at resume, else the network's sizes."""
    resume = s.init_from == "resume"
    saved = ckpt["config"] | (ckpt.get("settings", {}) if resume else {})
    # what a command asks for is not inherited
    for key in saved.keys() & vars(s).keys() - {"init_from", "overwrite", "out_dir", "eval_only"}:
        if key not in given:
            setattr(s, key, saved[key])
        elif resume and getattr(s, key) != saved[key]:
            changed = f"{key}={getattr(s, key)} (until now {saved[key]})"
            hint = f"--init_from={init} with another --out_dir starts from its weights"
            check(key != "freeze", f"{init} can't go on with {changed}: {hint}")
            say(f"resuming with {changed}")
    for key in ckpt["config"].keys() - {"dropout", "grad_checkpoint", "init_std"}:
        value = getattr(s, key)
        check(value == ckpt["config"][key], f"{key}={value}, but {init} has {ckpt['config'][key]}")


def load_optimizers(optimizers, ckpt, out):
    """Load the states of a run's optimizers; what the settings say of them holds, the rest goes on."""
    before = ckpt["optimizer_names"]
    now = [type(optimizer).__name__ for optimizer in optimizers]
    check(before == now, f"{out} was trained by {' and '.join(before)}, not by {' and '.join(now)}")
    for optimizer, state in zip(optimizers, ckpt["optimizer"]):
        keys = {"initial_lr", "betas", "weight_decay"}
        new = [{key: group[key] for key in keys & group.keys()} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, settings in zip(optimizer.param_groups, new):
            group.update(settings)


def catch_signals(stop):
    """Append to the list stop, when a signal asks the run to end; a second Ctrl-C ends it at once."""

    def handler(number, frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has fewer
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)


@torch.no_grad()
def sense_use(model, x):
    """How a Backpack uses its senses in windows x (B,T), as figures to log: a number for each sense.

    sense_share: the share of its part in the lengths of all K parts of the sum o. positions_in_sight:
    the exponential of the mean entropy of alpha, 1 if it always looks at one position.
    """
    alpha = model.contextualization(x)  # (B,K,T,T)
    parts = torch.einsum("blij,bjld->bild", alpha, model.senses(x)).norm(dim=-1)  # (B,T,K)
    share = (parts / parts.sum(-1, keepdim=True)).mean((0, 1))  # (K,)
    sight = torch.special.entr(alpha).sum(-1).mean((0, 2)).exp()  # (K,)
    return {"sense_share": share.tolist(), "positions_in_sight": sight.tolist()}


def start_wandb(s, run_id):
    """A run of Weights & Biases; run_id: of one to go on with, or None."""
    import wandb

    where = {"project": s.wandb_project, "name": Path(s.out_dir).name, "dir": s.out_dir}
    try:
        return wandb.init(**where, config=vars(s), id=run_id, resume="allow")
    except wandb.Error as error:
        hint = "WANDB_MODE=offline needs no key"
        raise UserError(f"wandb does not start: {str(error).splitlines()[0]}; {hint}") from None


# -----------------------------------------------------------------------------
# speed

# peak TFLOP/s of dense 16-bit products, from data sheets; the first name in the device's name applies
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "RTX 6000 Ada": 364,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "V100-SXM2": 125, "V100": 112, "T4": 65,
    "MI300X": 1307,
}  # fmt: skip


def peak_flops(device):
    """The peak FLOP/s of a GPU in 16 bits; None: unknown."""
    if device.type == "cuda":
        for name, tflops in PEAK_TFLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return tflops * 1e12
    return None


def counted(model, batch):
    """The FLOPs of a forward pass as torch counts them and, if gradients are enabled, of backward."""
    with FlopCounterMode(display=False) as counter:
        _, loss = model(*batch)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


def count_flops(model, *batch):
    """FLOPs of a micro-batch: those of forward and twice that for backward, less what is frozen saves there.

    What backward computes again (the sum of senses, grad_checkpoint) does not count, as usual for MFU.
    """
    is_frozen = not all(p.requires_grad for p in model.parameters())
    device = model.wte.weight.device
    # shapes are enough to count by: FakeTensors have no memory
    with FakeTensorMode() as fake, device:
        batch = tree_map_only(torch.Tensor, fake.from_tensor, batch)
        copy = type(model)(replace(model.config, grad_checkpoint=False))
        with torch.no_grad():
            forward = counted(copy, batch)
        if not is_frozen:
            return 3 * forward
        unfrozen = counted(copy, batch)
        for p, original in zip(copy.parameters(), model.parameters()):
            p.requires_grad_(original.requires_grad)
        frozen = counted(copy, batch)
    return 3 * forward - (unfrozen - frozen)


# -----------------------------------------------------------------------------

HINT = "try a lower learning_rate or a longer warm-up; the last checkpoint stays"


def train(argv):
    s, given = configurator.configure(Settings, argv, __doc__)

    # ---- processes: torchrun sets these variables
    rank = int(os.environ.get("RANK") or 0)
    world = int(os.environ.get("WORLD_SIZE") or 1)
    local_rank = int(os.environ.get("LOCAL_RANK") or 0)
    if world > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            check(os.environ.get(name), f"WORLD_SIZE={world}, but no {name}: start with torchrun")
    check(rank < world, f"RANK={rank}, but WORLD_SIZE={world}: start with torchrun")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    together = tasks == 1 or os.environ.get("RANK")
    check(together, f"srun started {tasks} tasks that would train alone: let each node start torchrun")
    master = rank == 0  # this process prints, logs and saves
    print0 = partial(print, flush=True) if master else lambda text: None

    # ---- checkpoint to start from
    out = Path(s.out_dir)
    ckpt = find_checkpoint(s, given, print0)
    resume = s.init_from == "resume"
    if resume and not s.eval_only:
        if ckpt["step"] >= s.max_iters:
            print0(f"{out} is finished: step {ckpt['step']} of {s.max_iters}")
            return
        hint = f"finetune them with --init_from={out} and another --out_dir"
        check("optimizer" in ckpt, f"{out} has weights only, which can't go on: {hint}")
    check_settings(s)
    check(not s.wandb or find_spec("wandb"), "wandb=True needs the package: pip install wandb")

    # ---- data: a step is accum micro-batches of B windows of T tokens on each rank
    folder = Path(s.data_dir) / s.dataset
    train_data, val_data, meta = load_data(folder)
    train_answers, val_answers = load_answers(folder, meta)
    adopt_vocabulary(s, ckpt, meta)
    config = network_config(s)
    T = s.block_size
    check(len(train_data) > T and len(val_data) > 1, f"{s.dataset} is too short for block_size={T}")
    sequences = s.tokens_per_step // (T * world)  # of a rank in a step
    divides = sequences > 0 and s.tokens_per_step % (T * world) == 0
    sizes = f"block_size={T} x {world} ranks"
    check(divides, f"tokens_per_step={s.tokens_per_step} must be a multiple of {sizes}")
    B = min(s.batch_size, sequences)
    accum = sequences // B
    check(accum * B == sequences, f"batch_size={B} must divide the {sequences} sequences of a rank")
    if train_answers is not None:
        train_starts = document_starts(train_answers)
        n_long = (np.diff(train_starts, append=len(train_data)) > T + 1).sum()
        if n_long:
            print0(f"{n_long:,} of {len(train_starts):,} documents are longer than block_size={T}: cut off")
    val_starts = evaluation_starts(s, len(val_data), val_answers)
    try:
        tokenizer = load_tokenizer(meta["tokenizer"])
    except UserError as error:  # on a node without a network, GPT-2's may not be there
        print0(f"no bits per byte without the tokenizer: {error}")
        tokenizer = None
    n_val_targets, n_bytes = count_targets(val_data, val_starts, T, tokenizer, val_answers)
    check(n_val_targets, f"block_size={T} ends before any answer of {s.dataset} begins")
    # a loss in nats per target, times this, is in bits per byte: comparable whatever the vocabulary
    bits = n_val_targets / n_bytes / math.log(2) if n_bytes else None

    # ---- machine
    own_gpu = world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{local_rank}" if own_gpu else s.device)
    dtype = pick_dtype(s.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world > 1:
        # without a prefix of its own, a restarted group reads addresses of the dead one in the store;
        # on several nodes the counts may differ (README says what to set there)
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        prefix = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else ""
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(prefix, store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        patience = datetime.timedelta(hours=1)  # the others wait while rank 0 writes tens of GB
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    # not before the ranks have met: a rank that still waits for others can be stopped as usual
    stop = []
    if not s.eval_only:
        catch_signals(stop)

    # ---- model, compiled and wrapped; then the optimizers
    torch.manual_seed(s.seed)
    # made on the CPU, so that a seed gives the same weights on every device
    model = Backpack(config)
    if ckpt:
        model.load_state_dict(ckpt["model"])
    if s.freeze:
        freeze(model, s.freeze)  # before the optimizers and DDP look at what trains
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print0(f"freeze={s.freeze}: {n_trained:,} parameters train")
    model.to(device)
    net = model
    if s.compile or (s.compile is None and device.type == "cuda"):
        torch._dynamo.config.optimize_ddp = False  # one graph
        net = torch.compile(net)
    if world > 1:
        # gradients lie where they are exchanged from, and so in memory only once
        net = DDP(net, gradient_as_bucket_view=True)
    optimizers = make_optimizers(model, s)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # a group may have a rate of its own
    # without a scale, small gradients would be 0 in float16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step = ckpt["step"] if resume else 0
    best = math.inf
    wandb_id = None
    if resume and not s.eval_only:
        load_optimizers(optimizers, ckpt, out)
        if ckpt["scaler"]:  # else the run was not in float16 until now
            scaler.load_state_dict(ckpt["scaler"])
        best = ckpt["best"]
        wandb_id = ckpt["wandb_id"]
    del ckpt  # its memory
    print0(f"{model.num_params():,} parameters on {device} in {dtype}")
    print0(f"{world} ranks x {accum} micro-batches of {B} x {T} tokens")

    def all_mean(*figures):
        """Scalar tensors -> numbers, their means over ranks. This waits for the device."""
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no more
        figures = torch.stack([figure.to(wide) for figure in figures])
        if world > 1:
            dist.all_reduce(figures)
        return (figures / world).tolist()

    @torch.no_grad()
    def evaluate():
        """(mean loss per target, whether a signal came in between); the ranks share the windows."""
        model.eval()
        total = torch.zeros((), device=device)
        for i in range(rank * B, len(val_starts), world * B):
            if stop:
                break
            x, y, distinct = get_batch(val_data, val_starts[i : i + B], T, device, val_answers)
            with autocast:  # the plain model, as shapes vary here
                _, loss = model(x, y, distinct)
            total += loss * (y >= 0).sum()
        model.train()
        total, stopping = all_mean(total, torch.full_like(total, len(stop)))
        return total * world / n_val_targets, stopping

    def draw(step):
        """Where the windows of a step begin (accum,world,B), how many targets they have, and a seed.

        A resumed run draws the same.
        """
        rng = np.random.default_rng((s.seed, step))
        if train_answers is None:
            starts = rng.integers(len(train_data) - T, size=(accum, world, B))
        else:
            starts = rng.choice(train_starts, size=(accum, world, B))
        n_targets, _ = count_targets(train_data, starts.ravel(), T, None, train_answers)
        return starts, n_targets, int(rng.integers(2**62))

    def described(val_loss):
        perplexity = math.exp(min(val_loss, 700))  # more would overflow
        text = f"val loss {val_loss:.4f}, perplexity {perplexity:.2f}, {n_val_targets:,} tokens"
        return f"{text}, {val_loss * bits:.4f} bits per byte" if bits else text

    # ---- evaluation only
    if s.eval_only:
        val_loss, _ = evaluate()
        print0(f"step {step}: {described(val_loss)}")
        return

    # ---- log and checkpoints
    metrics = None
    wandb_run = None
    if master:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            cut_metrics(out / "metrics.jsonl", step)
        else:
            (out / "best.pt").unlink(missing_ok=True)
        metrics = open(out / "metrics.jsonl", "a" if resume else "w", buffering=1)
        if s.wandb:
            wandb_run = start_wandb(s, wandb_id)
            wandb_id = wandb_run.id

    def log(text, **figures):
        print0(f"step {step}/{s.max_iters}  {text}")
        if metrics:
            metrics.write(json.dumps({"step": step, **figures}) + "\n")
        if wandb_run:
            wandb_run.log(figures, step=step)

    def save(name="ckpt.pt"):
        finite = all(p.isfinite().all() for p in model.parameters())
        check(finite, f"step {step}: some weights are not finite; the last checkpoint stays")
        # all ranks: state_dict() of a sharded model is a collective call
        ckpt = {
            "model": model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in optimizers],
            "optimizer_names": [type(optimizer).__name__ for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "config": asdict(config),
            "settings": vars(s),
            "meta": meta,  # has the tokenizer: a run samples without its dataset
            "step": step,
            "rng": {"seed": s.seed, "step": step},  # batches and dropout depend on nothing else
            "best": best,
            "wandb_id": wandb_id,
        }
        if master:
            save_checkpoint(out / name, ckpt)
            about = vars(s) | {"torch": torch.__version__}
            (out / "config.json").write_text(json.dumps(about, indent=1))

    # ---- training loop; its last pass only evaluates and saves
    starts, n_targets, dropout_seed = draw(step)
    batch = get_batch(train_data, starts[0, rank], T, device, train_answers)
    peak = peak_flops(device)
    flops = None  # of a rank in a step
    if peak:
        flops = accum * count_flops(model, *batch, share_at(s, 0, device))
    began = time.time()
    first_step = step
    t0 = began  # since this time and this step tokens/s are measured
    step0 = step
    skipped = 0
    stopping = False
    while not stopping:
        if step % s.eval_interval == 0 or step == s.max_iters:
            val_loss, stopping = evaluate()
            if stopping:
                break
            check(math.isfinite(val_loss), f"step {step}: validation loss {val_loss}; {HINT}")
            best = min(best, val_loss)
            save()
            if s.save_best and val_loss == best:
                save("best.pt")
            senses = {}
            if s.log_senses and s.n_sense and master:
                # one micro-batch, spread over the windows, as all of alpha is held in memory
                some_starts = val_starts[:: math.ceil(len(val_starts) / B)]
                x, _, _ = get_batch(val_data, some_starts, T, device)
                senses = sense_use(model.eval(), x)
                model.train()
            log(
                described(val_loss),
                val_loss=val_loss,
                bits_per_byte=val_loss * bits if bits else None,
                **senses,
            )
            t0 = time.time()
            step0 = step
        if step == s.max_iters:
            break

        # one schedule for all rates
        lr = lr_at(s, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr / s.learning_rate

        # forward and backward; gradients add up over the micro-batches
        share = share_at(s, step, device)
        total = torch.zeros((), device=device)
        torch.manual_seed(dropout_seed + rank)
        for i in range(accum):
            x, y, distinct = batch
            torch._dynamo.mark_dynamic(distinct[0], 0)  # one graph for any number of distinct tokens
            if world > 1:
                net.require_backward_grad_sync = i == accum - 1  # as DDP's no_sync() does
            with autocast:
                _, loss = net(x, y, distinct, share)
            # so that every target of the step counts the same; DDP and all_mean take means over ranks
            loss = loss * ((y >= 0).sum() * (world / max(1, n_targets)))
            scaler.scale(loss).backward()
            total += loss.detach()
            # the next micro-batch is made while the GPU is busy with this one
            if i == accum - 1:
                starts, n_targets, dropout_seed = draw(step + 1)
            batch = get_batch(train_data, starts[(i + 1) % accum, rank], T, device, train_answers)

        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        # the step's only wait for the device: means over ranks, and whether one was told to stop
        loss, norm, stopping = all_mean(total, norm, torch.full_like(total, len(stop)))
        check(math.isfinite(loss), f"step {step}: loss {loss}; {HINT}")
        skipped = 0 if math.isfinite(norm) else skipped + 1
        # in float16 gradients may overflow now and then: the scaler goes on with a lower scale
        allowed = 49 if scaler.is_enabled() else 0
        check(skipped <= allowed, f"step {step}: gradient norm {norm}; {HINT}")
        for optimizer in optimizers if not skipped else []:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        step += 1

        # the optimizers' states are there from the second step on
        if device.type == "cuda" and step == first_step + 2:
            print0(f"peak memory of a step: {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")
        if step % s.log_interval == 0 or step == s.max_iters:
            seconds = (time.time() - t0) / (step - step0)  # of a step
            t0 = time.time()
            step0 = step
            speed = s.tokens_per_step / seconds
            mfu = flops / seconds / peak if flops else None
            left = datetime.timedelta(seconds=int((s.max_iters - step) * seconds))
            text = f"loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s"
            if mfu:
                text += f"  mfu {mfu:.1%}"
            figures = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": speed, "mfu": mfu}
            log(f"{text}  {left} left", **figures, seconds=time.time() - began)
    if stopping:
        save()
        print0(f"stopped by a signal after step {step}: --init_from=resume goes on")
    if wandb_run:
        wandb_run.finish()
    if world > 1:
        dist.barrier()  # nobody leaves before the checkpoint is whole
        dist.destroy_process_group()


def main(argv):
    try:
        train(argv)
    except torch.OutOfMemoryError as error:
        hint = "lower batch_size, or recompute activations with --grad_checkpoint"
        raise UserError(f"out of memory: {hint} ({str(error).splitlines()[0]})") from None
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"torch.compile fails here: --compile=False goes without ({reason})") from None


if __name__ == "__main__":
    configurator.run(main)
