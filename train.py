"""Train a Backpack, or with --n_sense=0 its plain Transformer, on a dataset of prepare_data.py.

python train.py config/shakespeare_char.py                      a CPU, a Mac or one GPU
torchrun --nproc_per_node=4 train.py config/backpack_small.py   several GPUs, also on many nodes
python train.py --out_dir=out/run --init_from=resume            go on where a run stopped
python train.py --out_dir=out/tuned --init_from=out/run         start from another run's weights
"""

import contextlib
import datetime
import importlib.util
import json
import math
import os
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import configurator  # isort: skip  # before torch, for which it sets the environment
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hardware
from configurator import UserError, changed, configure
from files import expect, hold, read_json, read_jsonl, replacing, write_text
from hardware import Dtype, activation_bytes, autocast, pick_device, pick_dtype
from model import Backpack, BackpackConfig, load_checkpoint
from optimizers import load_optimizer, make_optimizers
from tokenizer import load_tokenizer, vocabulary_size

# ---- settings


@dataclass
class Settings(BackpackConfig):
    """All of BackpackConfig, and these. The defaults are the paper's recipe for its "small"."""

    vocab_size: int | None = None  # [1, 1e7] None: the dataset's
    dataset: str = "openwebtext"  # a folder of data_dir that prepare_data.py made
    data_dir: str = "data"  # where datasets lie
    out_dir: str = "out/backpack_small"  # the run: ckpt.pt, config.json, metrics.jsonl
    init_from: str = "scratch"  # scratch; resume: the run in out_dir; PATH: another run's weights
    overwrite: bool = False  # start from scratch over the run in out_dir
    tokens_per_step: int = 524288  # [1, 1e9] batch size in tokens per step, over all ranks
    batch_size: int = 16  # [1, 1e6] sequences per rank and micro-batch
    max_iters: int = 100000  # [1, 1e9] optimizer steps
    learning_rate: float = 6e-4  # (0, 1e6] the highest, after warm-up
    schedule: Literal["linear", "cosine"] = "linear"  # decay to min_lr, linear (paper) or cosine
    warmup_iters: int = 5000  # [0, 1e9] steps of linear warm-up
    min_lr: float = 0.0  # [0, 1e6] at the end
    muon_lr: float = 0.0  # [0, 1e6] of matrices, by Muon (optimizers.py); 0: AdamW for them, too
    weight_decay: float = 0.1  # [0, 100] of matrices; not of biases, norms and embeddings
    beta1: float = 0.9  # [0, 1) of AdamW
    beta2: float = 0.999  # [0, 1) of AdamW
    grad_clip: float = 1.0  # [0, 1e9] largest gradient norm; 0: no clipping
    transformer_share: float = 0.0  # [0, 1] of the Transformer's own loss, falling to 0 (ours)
    eval_interval: int = 1000  # [1, 1e9] steps between evaluations, each with a checkpoint
    eval_iters: int = 4  # [1, 1e6] evaluate on so many times tokens_per_step, all over val.bin
    full_val: bool = False  # evaluate on all of val.bin, in disjoint windows
    eval_only: bool = False  # evaluate, print and exit; writes nothing
    save_best: bool = False  # also keep best.pt, the checkpoint of the lowest validation loss
    log_interval: int = 10  # [1, 1e9] steps between progress lines
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: Dtype = "auto"  # float32, bfloat16, float16 (with a loss scaler); auto: 16 bits on a GPU
    compile: bool | None = None  # torch.compile; None: on a GPU
    deterministic: bool = False  # on a GPU: resume bit for bit, slower
    seed: int = 1337  # [0, 4294967295] of weights, batches and dropout
    wandb: bool = False  # log to Weights & Biases
    wandb_mode: Literal["online", "offline"] = "online"  # or offline, which needs no key
    wandb_project: str = "nanoBackpack"  # the project to log to


MODEL_KEYS = [f.name for f in fields(BackpackConfig)]
FREE_KEYS = ("dropout", "grad_checkpoint", "init_std")  # these may differ from a checkpoint's
CALL_KEYS = ("init_from", "overwrite", "out_dir", "eval_only")  # never taken from a checkpoint
SCALER = {"scale": float, "growth_factor": float, "backoff_factor": float, "growth_interval": int}
RUN_FILES = ("ckpt.pt", "best.pt", "metrics.jsonl")  # what --overwrite replaces


def take_settings(s, sources, ckpt, init, say):
    """What was not given becomes the checkpoint's: all at resume, where it says what is new, else sizes."""
    resume, before = s.init_from == "resume", SimpleNamespace(**vars(s))
    if resume and "optimizer" in ckpt:  # else weights only, which train nothing here
        expect(ckpt["settings"], {"dataset": str}, f"{init}, settings")
    saved = ckpt["config"] | (ckpt["settings"] if resume else {})
    for key in (saved.keys() & vars(s).keys()) - set(CALL_KEYS):
        value = configurator.checked(Settings, key, saved[key], str(init))
        setattr(before, key, value)
        if key not in sources:
            setattr(s, key, value)
        elif resume and getattr(s, key) != value:
            say(f"resuming with {key}={getattr(s, key)} (until now {value})")
    old, new = lr_at(before, ckpt["step"]), lr_at(s, ckpt["step"])
    if resume and new > 1.01 * old:
        say(f"note: at step {ckpt['step']} the learning rate rises from {old:.2e} to {new:.2e}")


def setting_problems(s, world):
    """A line for each setting, or pair of settings, that cannot work."""
    tokens, T, lr = s.tokens_per_step, s.block_size, s.learning_rate
    mine, rest = divmod(tokens, T * world)  # sequences of a rank in a step
    fits = rest or not mine % min(s.batch_size, mine)
    one = world == 1 or not s.device.startswith("cuda:")
    installed = not s.wandb or importlib.util.find_spec("wandb")
    needs = {
        f"tokens_per_step={tokens} must be a multiple of block_size={T} times {world} ranks": not rest,
        f"batch_size={s.batch_size} must divide the {mine} sequences of a rank in a step": fits,
        f"device={s.device} is for one process: torchrun gives each rank its own": one,
        f"min_lr={s.min_lr} must be at most learning_rate={lr}": s.min_lr <= lr,
        "wandb=True, but the package is not installed: pip install wandb": installed,
    }
    return [message for message, ok in needs.items() if not ok]


def data_problems(s, data, ckpt, init):
    """A line for each thing in which the dataset does not fit the settings or the checkpoint."""
    problems, size = [], [len(data[0]), len(data[1])]
    if size[0] <= s.block_size or size[1] < 2:
        problems.append(f"{s.dataset} is too short for block_size={s.block_size}: of {size} tokens")
    # get_batch checks what lies further on
    top = max(int(part[: 10**8].max()) for part in data[:2])
    if top >= s.vocab_size:
        problems.append(f"{s.dataset} has token id {top}, outside a vocabulary of {s.vocab_size}")
    if ckpt and data[2]["tokenizer"] != ckpt["meta"]["tokenizer"]:
        hint = f"prepare it with --tokenizer={init if init.is_dir() else init.parent}"
        problems.append(f"{s.dataset} was not made with the checkpoint's tokenizer: {hint}")
    return problems


def run_problems(s, ckpt, init, out):
    """A line for each thing in which the checkpoint and the run's folder do not fit the settings."""
    problems, resume = [], s.init_from == "resume"
    for key, value in ckpt["config"].items() if ckpt else ():
        if key not in FREE_KEYS and getattr(s, key) != value:
            problems.append(f"{key}={getattr(s, key)}, but {init} has {value}")
    if resume and "optimizer" not in ckpt and not s.eval_only:
        hint = f"finetune them with --init_from={out}, and give another --out_dir"
        problems.append(f"{out} has weights only: {hint}")
    if resume and ckpt["step"] and bool(s.muon_lr) != ("muon" in ckpt) and "optimizer" in ckpt:
        trained = "with" if "muon" in ckpt else "without"
        problems.append(f"muon_lr={s.muon_lr}, but {out} was trained {trained} Muon")
    found = [name for name in RUN_FILES if (out / name).exists() and (out / name).stat().st_size]
    if found and not (resume or s.overwrite or s.eval_only):
        hint = "--init_from=resume goes on with it, " * ("ckpt.pt" in found) + "--overwrite=True"
        problems.append(f"{out} has {' and '.join(found)} of another run: {hint} replaces it")
    if ckpt and not resume and out.resolve() in (init.resolve(), init.resolve().parent):
        problems.append(f"init_from={s.init_from} lies in out_dir: give another --out_dir")
    return problems


# ---- data


def read_tokens(path, dtype, n=None):
    """The n token ids of a .bin file, or all, memory-mapped. UserError: it is not there, or cut."""
    dtype = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size if path.exists() else 0
    n = size // dtype.itemsize if n is None else n
    if size != n * dtype.itemsize or not n:
        what = f"found {size} bytes, expected {n or 'some'} tokens of {dtype.itemsize}"
        raise UserError(f"{path}: {what}: make it, or copy it, again")
    return np.memmap(path, dtype, "r")


def load_data(data_dir, dataset):
    """(train, val) token ids, memory-mapped, and meta.json of a dataset. UserError: it is not there."""
    folder = Path(data_dir) / dataset
    if not (folder / "meta.json").exists():
        hint = f"make it with python prepare_data.py --dataset={dataset}"
        raise UserError(f"no dataset at {folder}: {hint}")
    sizes = {"vocab_size": int, "train_tokens": int, "val_tokens": int}
    shape = sizes | {"dtype": {"uint16", "uint32"}, "tokenizer": dict}
    meta, parts = read_json(folder / "meta.json", shape), []
    rows = vocabulary_size(meta["tokenizer"], folder)
    if meta["vocab_size"] != rows:
        what = f"found vocab_size={meta['vocab_size']}, expected {rows} as its tokenizer has"
        raise UserError(f"{folder}: {what}: make the dataset again")
    for split in ("train", "val"):
        parts.append(read_tokens(folder / f"{split}.bin", meta["dtype"], meta[f"{split}_tokens"]))
    return *parts, meta


def get_batch(tokens, starts, block_size, device, vocab_size):
    """The windows of tokens that begin at starts (B,): x, y, distinct, on the device.

    x (B,T): token ids; y (B,T): the token after each, -100 beyond the end; distinct: (ids (U,), where
    (B,T)), the distinct tokens of x and which stands where. UserError: an id outside the vocabulary.
    """
    at = starts[:, None] + np.arange(block_size + 1)  # (B,T+1)
    ids = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)  # (B,T+1)
    if ids.max() >= vocab_size:
        name = getattr(tokens, "filename", "the data")
        raise UserError(f"{name} has token id {ids.max()}, outside a vocabulary of {vocab_size}")
    x, y = ids[:, :-1], np.where(at < len(tokens), ids, -100)[:, 1:]  # (B,T)
    # a table, as sorting would be slow; on the host, as a GPU would have to be waited for
    seen = np.zeros(vocab_size, dtype=bool)  # (V,)
    seen[x] = True
    arrays = (x, y, np.flatnonzero(seen), (seen.cumsum() - 1)[x])
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == "cuda":  # pinned memory: the copy runs beside the host's next steps
        tensors = [tensor.pin_memory() for tensor in tensors]
    x, y, ids, where = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return x, y, (ids, where)


def val_size(tokens, starts, block_size, meta):
    """The tokens that an evaluation predicts, and the bits per byte of a nat (None: no tokenizer)."""
    ends = np.minimum(starts + block_size, len(tokens) - 1)
    n_tokens, n_bytes = int((ends - starts).sum()), 0
    with contextlib.suppress(UserError):
        counts = load_tokenizer(meta["tokenizer"]).byte_counts()
        n_bytes = sum(int(counts[tokens[i + 1 : j + 1]].sum()) for i, j in zip(starts, ends))
    return n_tokens, n_tokens / n_bytes / math.log(2) if n_bytes else None


# ---- schedules


def lr_at(s, step):
    """Linear warm-up, then linear or cosine decay to min_lr at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    share = 1 - done if s.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return s.min_lr + share * (s.learning_rate - s.min_lr)


def share_at(s, step, device="cpu"):
    """The share of the Transformer's own loss in a step's loss, a scalar tensor; None: it has none."""
    if not (s.transformer_share and s.n_sense):
        return None
    return torch.full((), s.transformer_share * (1 - step / s.max_iters), device=device)


# ---- checkpoints and logs


def save_checkpoint(path, value):
    """At any moment path holds a whole checkpoint. UserError: this one could not be written."""
    with replacing(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from None


def cut_metrics(path, step):
    """Drop what a stopped run logged after its checkpoint: later steps, half a line, its evaluation."""
    records = read_jsonl(path, {"step": int}, is_log=True) if path.exists() else []
    kept = [r for r in records if r["step"] < step or (r["step"] == step and "loss" in r)]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def main(argv):
    s, sources = configure(Settings, argv, __doc__)
    writes = os.environ.get("RANK", "0") == "0" and not s.eval_only
    lock = hold(s.out_dir) if writes else contextlib.nullcontext()
    with lock, configurator.caught_signals() as stop:
        try:
            train(s, sources, stop)
        except torch.OutOfMemoryError as error:
            what = f"batch_size={s.batch_size} x {s.block_size} tokens don't fit in memory"
            reason, hint = str(error).splitlines()[0], "lower batch_size, or --grad_checkpoint"
            raise UserError(f"{what}: {hint} ({reason})") from None


def train(s, sources, stop):
    # ---- set-up: processes, checkpoint, data, device; all problems are reported together
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, master, out = int(os.environ.get("LOCAL_RANK", 0)), rank == 0, Path(s.out_dir)

    def say(text):
        if master:
            print(text, flush=True)

    say(f"train.py\n{changed(s, sources)}")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    launch, config_file = os.environ.get("TORCHELASTIC_RUN_ID", ""), out / "config.json"
    if restarts != "0" and config_file.is_file() and not s.eval_only:
        if read_json(config_file, {"launch?": str}).get("launch") == launch:
            # torchrun has started this worker group again, and what is in the folder is its own
            s.overwrite = True
            s.init_from = "resume" if (out / "ckpt.pt").exists() else s.init_from
    resume, ckpt, problems = s.init_from == "resume", None, []
    init = out if resume else Path(s.init_from)
    if s.init_from != "scratch":
        ckpt = load_checkpoint(init, mmap=True)  # in memory once for all ranks
        take_settings(s, sources, ckpt, init, say)
        if resume and ckpt["step"] >= s.max_iters and not s.eval_only:
            return say(f"{out} is finished: step {ckpt['step']} of {s.max_iters}")

    def attempt(function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            problems.append(str(error))

    data = attempt(load_data, s.data_dir, s.dataset)
    s.vocab_size = s.vocab_size or (data[2]["vocab_size"] if data else 1)
    config = attempt(BackpackConfig, **{key: getattr(s, key) for key in MODEL_KEYS})
    own_gpu = world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available()
    device = attempt(pick_device, f"cuda:{local_rank}" if own_gpu else s.device)
    dtype = attempt(pick_dtype, s.dtype, device) if device else None
    problems += data_problems(s, data, ckpt, init) if data else []
    problems += run_problems(s, ckpt, init, out) + setting_problems(s, world)
    if problems:
        title = [f"{len(problems)} problems"] if len(problems) > 1 else []
        raise UserError("\n- ".join(title + problems))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world > 1:
        # torch 2.13 gives a restarted worker group the key-value store of the one that died, with dead
        # addresses in it. On one node the restart count tells them apart; see README for several.
        store, *_ = next(dist.rendezvous("env://"))
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        store = dist.PrefixStore(restarts if one_node else "", store)
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        patience = datetime.timedelta(hours=1)  # others wait while rank 0 writes tens of GB
        options = {"rank": rank, "world_size": world, "timeout": patience, "device_id": gpu}
        dist.init_process_group(backend, store=store, **options)

    # ---- data: micro-batches of B windows of T tokens
    train_data, val_data, meta = data
    T, sequences = s.block_size, s.tokens_per_step // s.block_size // world
    B = min(s.batch_size, sequences)
    accum = sequences // B
    if B < s.batch_size:
        say(f"batch_size={s.batch_size} is cut to {B}, all the sequences of a step and rank")
    # windows of val.bin to evaluate on: the same every time, for any number of ranks
    val_starts = np.arange(0, len(val_data) - 1, T)
    n_eval = s.eval_iters * s.tokens_per_step // T
    if not s.full_val and n_eval < len(val_starts):
        val_starts = val_starts[np.linspace(0, len(val_starts) - 1, n_eval).astype(int)]
    n_val, bits_per_byte = val_size(val_data, val_starts, T, meta)

    # ---- model
    torch.manual_seed(s.seed)
    changes = {key: getattr(s, key) for key in FREE_KEYS}
    model = Backpack.from_checkpoint(ckpt, device, **changes) if ckpt else Backpack(config)
    model.to(device).train()

    # ---- optimizer
    optimizers = make_optimizers(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, wandb_id = ckpt["step"] if resume else 0, math.inf, None
    saved = step if resume else None  # the step of the last checkpoint
    if resume and not s.eval_only:
        best = ckpt.get("best") if type(ckpt.get("best")) is float else math.inf
        shape = {"optimizer": dict, "scaler": dict, "wandb_id?": str}
        wandb_id = expect(ckpt, shape, out).get("wandb_id")
        for name, optimizer in optimizers.items():
            load_optimizer(optimizer, ckpt.get(name), out)
        if ckpt["scaler"]:  # else the run was not in float16 until now
            scaler.load_state_dict(expect(ckpt["scaler"], SCALER, out))
    del ckpt

    # ---- compile, wrap
    def micro_step(net, batch, share):
        """Forward and backward of a micro-batch; returns its loss and the Backpack's own, on the device."""
        x, y, distinct = batch
        if compiled:
            # one graph for any number of distinct tokens
            torch._dynamo.mark_dynamic(distinct[0], 0)
        with autocast(device, dtype):
            own, loss = net(x, y, distinct=distinct if s.n_sense else None, transformer_share=share)
        scaler.scale(loss / accum).backward()
        return torch.stack((loss, loss if own is None else own)).detach()  # (2,)

    probe = np.linspace(0, len(train_data) - T - 1, B).astype(int)  # from all over the text
    batch = get_batch(train_data, probe, T, device, s.vocab_size)
    size, n = (batch[0].numel(), len(batch[2][0])), model.num_params()  # tokens, distinct ones
    losses = 2 if s.transformer_share and s.n_sense else 1
    kept = 0 if s.grad_checkpoint else activation_bytes(model, *size, device, dtype, losses)
    say(f"{n:,} parameters: {16 * n / 1e9:.2f} GB with gradients and moments")
    say(f"activations: about {kept / 1e9:.2f} GB" if kept else "activations: recomputed")
    say(f"{world} ranks x {accum} micro-batches of {B} x {T} tokens on {device} in {dtype}")
    net = model
    compiled = s.compile if s.compile is not None else device.type == "cuda"
    if compiled and not s.eval_only:
        torch._dynamo.config.optimize_ddp = False  # one graph, the one that is compiled here
        try:  # it compiles at the first call
            net = torch.compile(model)
            micro_step(net, batch, share_at(s, step, device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, an old GPU, ...: training works without it
            reason = f"{type(error).__name__}: {str(error)[:200]!r}"
            say(f"training without torch.compile, which fails here: {reason}")
            net = model
        model.zero_grad()
    if world > 1 and not s.eval_only:
        devices = [device] if device.type == "cuda" else None
        net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)

    # ---- evaluate
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no more

    def all_mean(*figures):
        """Figures, tensors or numbers, as numbers: the means over ranks. This waits for the device."""
        parts = [torch.full((), x, device=device) if type(x) is int else x for x in figures]
        mean = torch.stack([part.to(wide) for part in parts]) / world
        if world > 1:
            dist.all_reduce(mean)
        return mean.tolist()

    @torch.no_grad()
    def evaluate():
        """(mean loss, whether a signal cut it short); all ranks take part."""
        model.eval()
        losses, mine = [torch.zeros((), device=device)], val_starts[rank::world]
        for i in range(0, len(mine), B):
            if stop:
                break
            starts = mine[i : i + B]
            x, y, distinct = get_batch(val_data, starts, T, device, s.vocab_size)
            count = int(np.minimum(T, len(val_data) - 1 - starts).sum())
            with autocast(device, dtype):  # the plain model: shapes vary, and it need not compile
                losses.append(model(x, y, distinct=distinct)[1] * count)
        model.train()
        total, stopping = all_mean(torch.stack(losses).to(wide).sum(), len(stop))
        return world * total / n_val, stopping > 0

    def described(loss):
        bpb = f", {loss * bits_per_byte:.4f} bits per byte" if bits_per_byte else ""
        return (
            f"val loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}{bpb}, {n_val:,} tokens"
        )

    if s.eval_only:
        loss, stopping = evaluate()
        if stopping:
            raise UserError("evaluation was stopped by a signal")
        return say(f"step {step}: {described(loss)}")

    # ---- the run's folder, logs and checkpoints
    settings = {key: value for key, value in vars(s).items() if key not in MODEL_KEYS}
    wandb_run = metrics = None
    if master and s.wandb:
        import wandb

        options = {"config": vars(s), "mode": s.wandb_mode, "id": wandb_id, "resume": "allow"}
        try:
            wandb_run = wandb.init(project=s.wandb_project, name=out.name, dir=out, **options)
        except wandb.Error as error:
            what, hint = str(error).splitlines()[0], "--wandb_mode=offline needs no key"
            raise UserError(f"wandb does not start: {what}; {hint}") from None
        wandb_id = wandb_run.id
    if master:
        if resume:
            cut_metrics(out / "metrics.jsonl", step)
        else:
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        about = asdict(config) | settings | {"torch": torch.__version__, "launch": launch}
        write_text(config_file, json.dumps(about, indent=1))
        metrics = open(out / "metrics.jsonl", "a", buffering=1, encoding="utf-8")

    def log(**figures):
        if metrics:
            metrics.write(json.dumps({"step": step} | figures) + "\n")
        if wandb_run:
            wandb_run.log(figures, step=step)

    def diverged(what):
        kept = f"The checkpoint in {out}, of step {saved}, stays"
        kept = "No checkpoint was written" if saved is None else kept
        hint = "try a lower learning_rate or a longer warmup_iters"
        return UserError(f"step {step}: {what}. {kept}; {hint}")

    def save(name="ckpt.pt"):
        nonlocal saved
        if not all(p.isfinite().all() for p in model.parameters()):  # true of all ranks or of none
            raise diverged("the weights are no longer finite")
        if master:
            parts = {"model": model, "scaler": scaler} | optimizers
            states = {name: part.state_dict() for name, part in parts.items()}
            about = {"config": asdict(config), "settings": settings, "meta": meta, "step": step}
            rng = {"seed": s.seed, "step": step}  # batches and dropout are functions of these
            about |= {"rng": rng, "best": best, "wandb_id": wandb_id}
            save_checkpoint(out / name, states | about)
        saved = step if name == "ckpt.pt" else saved

    # ---- loop; its last pass only evaluates and saves
    flops = sum(hardware.flops_per_token(model, size[1] / size[0], losses).values())
    peak = hardware.peak_flops(device, dtype)
    began, times, stopping = time.perf_counter(), deque(maxlen=s.log_interval), False
    while not stopping:
        if step % s.eval_interval == 0 or step == s.max_iters:
            loss, stopping = evaluate()
            if stopping:
                break
            if not math.isfinite(loss):
                raise diverged(f"validation loss {loss}")
            log(val_loss=loss, bits_per_byte=loss * bits_per_byte if bits_per_byte else None)
            say(f"step {step}/{s.max_iters}  {described(loss)}")
            best = min(best, loss)
            if s.save_best and loss == best:
                save("best.pt")
            save()
        if step == s.max_iters:
            break

        start = time.perf_counter()
        rng = np.random.default_rng((s.seed, step))  # one draw for all ranks, whatever their number
        starts = rng.integers(len(train_data) - T, size=(accum, world, B))
        torch.manual_seed(int(rng.integers(2**62)) + rank)  # dropout
        lr = lr_at(s, step)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * (optimizer.defaults["lr"] / s.learning_rate)
        total = 0.0
        for i in range(accum):
            batch = get_batch(train_data, starts[i, rank], T, device, s.vocab_size)
            if world > 1:  # as DDP's no_sync(): gradients meet once a step
                net.require_backward_grad_sync = i == accum - 1
            total += micro_step(net, batch, share_at(s, step, device))
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        # the exact means over micro-batches and ranks; and has any rank been told to stop?
        loss, own, norm, stopping = all_mean(*total / accum, norm, len(stop))
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise diverged(f"loss {loss}, gradient norm {norm}, stopped before the update")
        for optimizer in optimizers.values():
            if math.isfinite(norm):  # else in float16 a gradient is too large: no part is updated
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=world == 1)  # DDP: gradients stay in its buckets
        scaler.update()
        step += 1

        times.append(time.perf_counter() - start)
        if step % s.log_interval == 0 or step == s.max_iters:
            speed = s.tokens_per_step * len(times) / sum(times)
            memory = hardware.peak_memory(device)
            mfu = speed * flops / peak / world if peak else None
            seconds = time.perf_counter() - began
            left = (s.max_iters - step) * s.tokens_per_step / speed
            gradient = {"grad_norm": norm if math.isfinite(norm) else None}
            costs = {"tokens_per_second": speed, "mfu": mfu, "memory": memory, "seconds": seconds}
            log(loss=loss, backpack_loss=own, lr=lr, **gradient, **costs)
            mixed = f" (the Backpack's own {own:.4f})" if losses == 2 else ""
            say(
                f"step {step}/{s.max_iters}  loss {loss:.4f}{mixed}  lr {lr:.2e}  "
                f"norm {norm:.2f}  {speed:,.0f} tokens/s  mfu {f'{mfu:.1%}' if mfu else 'unknown'}  "
                f"{memory / 1e9:.2f} GB  {datetime.timedelta(seconds=int(left))} left"
            )
    if stopping:
        save()
        say(f"stopped by a signal after step {step}: go on with --init_from=resume")
    if wandb_run:
        wandb_run.finish()
    if world > 1:  # no rank leaves before the checkpoint is whole; after an error none waits
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    configurator.run(main)
