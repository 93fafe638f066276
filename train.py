"""Train a Backpack, or with --n_sense=0 its plain Transformer, on a dataset of prepare_data.py.

    python train.py config/shakespeare_char.py                          a CPU, a Mac, one GPU
    torchrun --nproc_per_node=4 train.py config/backpack_small.py       GPUs of one node; many nodes as torchrun does
    python train.py config/shakespeare_char.py --init_from=resume       go on where a run stopped
    python train.py --out_dir=out/tuned --init_from=out/run             start from the weights of another run
"""
import contextlib
import datetime
import functools
import importlib.util
import json
import math
import os
import signal
import time
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from batches import documents, load_data, take
from checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from configurator import UserError, configure, describe, hold, run
from devices import autocast, flops_per_token, memory_need, peak_flops, peak_memory, pick_device, pick_dtype
from model import Backpack, BackpackConfig


@dataclass
class Settings(BackpackConfig):
    """All of BackpackConfig, and these. The defaults are the paper's recipe for its "small" Backpack."""
    vocab_size: int | None = None    # None: the dataset's
    dataset: str = "openwebtext"     # a folder of data_dir that prepare_data.py made
    data_dir: str = "data"
    out_dir: str = "out/backpack_small"  # the run: ckpt.pt, config.json, metrics.jsonl
    init_from: str = "scratch"       # scratch; resume: the run in out_dir; or PATH: the weights of another run
    overwrite: bool = False          # start from scratch over the run in out_dir
    tokens_per_step: int = 524288    # of all ranks and micro-steps together
    batch_size: int = 16             # sequences per rank and micro-step (fewer where a step has not as many)
    max_iters: int = 100000          # optimizer steps
    learning_rate: float = 6e-4
    schedule: str = "linear"         # after warm-up: linear (paper) or cosine decay to min_lr
    warmup_iters: int = 5000         # steps of linear warm-up
    min_lr: float = 0.0
    weight_decay: float = 0.1        # of matrices; not of biases, norms, embeddings
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0           # largest norm of the gradient; 0: any
    transformer_share: float = 0.0   # of the Transformer's own loss in training's, falling linearly to 0 (ours)
    eval_interval: int = 1000        # steps between evaluations, each with a checkpoint
    eval_iters: int = 4              # evaluate on this many times tokens_per_step, evenly spaced over val.bin
    full_val: bool = False           # evaluate on all of val.bin, in disjoint windows
    eval_only: bool = False          # evaluate, print, exit; writes nothing. With full_val also word perplexity
    save_best: bool = False          # also keep best.pt, the checkpoint of the lowest validation loss
    log_interval: int = 10           # steps between progress lines
    device: str = "auto"             # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"              # float32, bfloat16, float16 (with a loss scaler); auto: 16 bits on a GPU
    compile: bool | None = None      # torch.compile; None: on a GPU
    deterministic: bool = False      # on a GPU: resume bit for bit, slower
    seed: int = 1337                 # of weights, batches and dropout
    wandb: bool = False              # log to Weights & Biases
    wandb_mode: str = "online"       # or offline
    wandb_project: str = "nanoBackpack"


MODEL_KEYS = [f.name for f in fields(BackpackConfig)]
FREE_KEYS = {"dropout", "grad_checkpoint", "init_std"}          # of these, what may differ from a checkpoint's
RUN_FILES = ("ckpt.pt", "best.pt", "metrics.jsonl")             # what a run from scratch replaces, if told to overwrite
STOP_SIGNALS = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # schedulers repeat them; Windows has no HUP
CALL_KEYS = {"init_from", "overwrite", "out_dir", "eval_only"}  # what a resumed run does not take from its checkpoint


def start_values(s, sources):
    """The checkpoint to start from, or None; settings that weren't given become the checkpoint's."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (Path(s.out_dir) / "ckpt.pt").exists():
        s.init_from = "resume"  # torchrun started this worker group again
    if s.init_from == "scratch":
        return None
    ckpt = load_checkpoint(s.out_dir if s.init_from == "resume" else s.init_from, mmap=True)  # once for all ranks
    for key, value in ckpt["config"].items():
        if key not in sources and (key in MODEL_KEYS or (s.init_from == "resume" and key not in CALL_KEYS)):
            setattr(s, key, value)
    return ckpt


def problems_with(s, data, meta, ckpt, world):
    """Everything in settings, data and checkpoint that would not work together, a line each."""
    problems, out, init = [], Path(s.out_dir), Path(s.out_dir if s.init_from == "resume" else s.init_from)
    if data:
        if len(data[0]) <= s.block_size or len(data[1]) < 2:
            problems.append(f"{s.dataset} is too short for block_size={s.block_size}: of {[*map(len, data)]} tokens")
        if (top := max(int(part[:10**8].max()) for part in data)) >= s.vocab_size:  # take() checks what lies further on
            problems.append(f"{s.dataset} has token id {top}, outside a vocabulary of {s.vocab_size}")
    if ckpt:
        if s.init_from == "resume" and "optimizer" not in ckpt and not s.eval_only:
            problems.append(f"{out} has weights only: finetune them with --init_from={out} and another --out_dir")
        problems += [f"{key}={getattr(s, key)}, but the checkpoint has {ckpt['config'][key]}" for key in MODEL_KEYS
                     if key not in FREE_KEYS and key in ckpt["config"] and getattr(s, key) != ckpt["config"][key]]
        if meta and meta["tokenizer"] != ckpt["meta"]["tokenizer"]:
            problems.append(f"{s.dataset} was not made with the checkpoint's tokenizer: prepare it with "
                            f"--tokenizer={init if init.is_dir() else init.parent}")
    found = [name for name in RUN_FILES if (out / name).exists() and (out / name).stat().st_size]
    if s.init_from != "resume" and found and not (s.overwrite or s.eval_only):
        hint = "--init_from=resume goes on with it, " if "ckpt.pt" in found else ""
        problems.append(f"{out} has {' and '.join(found)} of another run: {hint}--overwrite=True replaces it")
    if s.init_from not in ("scratch", "resume") and out.resolve() in (init.resolve(), init.resolve().parent):
        problems.append(f"init_from={s.init_from} lies in out_dir: give another --out_dir")
    if s.block_size < 1 or s.tokens_per_step < 1 or s.tokens_per_step % (s.block_size * world):
        problems.append(f"tokens_per_step={s.tokens_per_step} must be a multiple of block_size={s.block_size} times "
                        f"{world} ranks")
    elif s.batch_size < 1 or (mine := s.tokens_per_step // s.block_size // world) % min(s.batch_size, mine):
        problems.append(f"batch_size={s.batch_size} must divide the {s.tokens_per_step // s.block_size // world} "
                        f"sequences that tokens_per_step={s.tokens_per_step} gives a rank")
    positive = ("max_iters", "eval_interval", "eval_iters", "log_interval", "learning_rate")
    problems += [f"{key}={getattr(s, key)} must be more than 0" for key in positive if getattr(s, key) <= 0]
    if not s.grad_clip >= 0:
        problems.append(f"grad_clip={s.grad_clip} must be at least 0 (0: no clipping)")
    if not 0 <= s.transformer_share <= 1:
        problems.append(f"transformer_share={s.transformer_share} must be from 0 to 1")
    if s.schedule not in ("linear", "cosine"):
        problems.append(f"schedule={s.schedule!r}: expected linear or cosine")
    if s.wandb and not importlib.util.find_spec("wandb"):
        problems.append("wandb=True, but the package is not installed: pip install wandb")
    return problems


def learning_rate(s, step):
    """Linear warm-up, then linear or cosine decay to min_lr at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    share = 1 - done if s.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return s.min_lr + share * (s.learning_rate - s.min_lr)


def transformer_share(s, step):
    """The part of the Transformer's own loss in a step's loss, a tensor (); None: no part."""
    return torch.tensor(s.transformer_share * (1 - step / s.max_iters)) if s.transformer_share and s.n_sense else None


def accumulate(net, model, x, y, distinct, amp, scale=lambda loss: loss, last=True, transformer_share=None):
    """Backward through micro-batches x, y (n,B,T), their senses computed once; returns the sum of their losses.

    net: the model or what wraps it; distinct: (ids (U,), where (n,B,T)) of x, None for a Transformer; last: the step
    ends here. Micro-batches before the last leave the senses' gradients in a copy; the last hands on their sum, so that
    all parameters have gradients in the one backward in which DDP lets ranks meet.
    """
    total = 0.0
    if distinct:
        with amp:
            C = model.senses(distinct[0]).float()  # (U,K,D), float as gradients of many micro-batches add up
        copy = C.detach().requires_grad_()
        C.register_hook(lambda grad: grad if copy.grad is None else grad + copy.grad)
        for tensor in (C, copy) if net is not model else ():
            torch._dynamo.mark_dynamic(tensor, 0)  # U changes: torch.compile shall make one graph for all
    for i, end in enumerate([False] * (len(x) - 1) + [True]):
        senses = (C if end else copy, distinct[1][i]) if distinct else None
        if isinstance(net, DistributedDataParallel):
            net.require_backward_grad_sync = end and last  # as DDP's no_sync(): gradients meet once a step
        with amp:
            loss = net(x[i], y[i], senses=senses, transformer_share=transformer_share)[1]
        scale(loss).backward()
        total += loss.detach()
    return total


def load_optimizer(optimizer, saved):
    """Take up the moments of a checkpoint; the settings stay the optimizer's. Raises CheckpointError."""
    groups = optimizer.state_dict()["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = [{"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in params]
    try:
        found = [{name: tuple(value.shape) for name, value in saved["state"][i].items()} for i in range(len(params))]
    except (KeyError, TypeError, AttributeError):
        found = None
    if saved["state"] and found != shapes:
        raise CheckpointError("the checkpoint's optimizer state does not fit its weights: --init_from=PATH takes these")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for p, state in optimizer.state.items():  # in memory of their own, not views or pages of the file
        for name, value in state.items():
            state[name] = torch.empty_like(p if value.dim() else value).copy_(value)


def cut_metrics(path, step):
    """Drop what a stopped run wrote after its checkpoint: later steps, half a line, the evaluation to be repeated."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] < step or (record["step"] == step and "loss" in record):
            kept.append(line + "\n")
    path.with_suffix(".tmp").write_text("".join(kept))
    path.with_suffix(".tmp").replace(path)


def main(argv):
    s, sources = configure(Settings, argv, __doc__)
    rank, world, local_rank = (int(os.environ.get(*k)) for k in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    with hold(s.out_dir) if rank == 0 and not s.eval_only else contextlib.nullcontext():
        start(s, sources, rank, world, local_rank)


def start(s, sources, rank, world, local_rank):
    # ---- set-up: processes, device, checks
    say = functools.partial(print, flush=True) if rank == 0 else lambda text: None
    say(f"train.py\n{describe(s, sources)}")
    ckpt = start_values(s, sources)
    if s.init_from == "resume" and ckpt["step"] >= s.max_iters and not s.eval_only:
        return say(f"{s.out_dir} is finished: step {ckpt['step']} of {s.max_iters}")
    problems, data, meta = [], (), None
    try:
        data, meta = load_data(s)
        s.vocab_size = s.vocab_size or meta["vocab_size"]
    except UserError as error:
        problems.append(str(error))
    try:
        config = BackpackConfig(**{key: getattr(s, key) for key in MODEL_KEYS} | {"vocab_size": s.vocab_size or 1})
    except ValueError as error:
        problems.append(str(error))
    try:
        own_gpu = world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available()
        device = pick_device(f"cuda:{local_rank}" if own_gpu else s.device)
        dtype = pick_dtype(s.dtype, device)
    except UserError as error:
        problems.append(str(error))
    problems += problems_with(s, data, meta, ckpt, world)
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n- ".join([f"{len(problems)} problems", *problems]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world > 1:
        # torch 2.13 gives a restarted worker group the key-value store of the one that died, dead addresses in it; on
        # one node the number of restarts sets them apart (on many, each agent has its own count: see README)
        store, *_ = next(dist.rendezvous("env://"))
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "", store)
        dist.init_process_group(  # the timeout: others wait while rank 0 writes a checkpoint of tens of GB
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
            timeout=datetime.timedelta(hours=1), device_id=device if device.type == "cuda" else None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        train(s, config, data, meta, ckpt, device, dtype, rank, world, say)
    except torch.OutOfMemoryError as error:
        raise UserError(f"batch_size={s.batch_size} sequences of {s.block_size} tokens don't fit the memory of {device}"
                        f": lower batch_size, or --grad_checkpoint=True ({str(error).splitlines()[0]})") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if world > 1:  # not after an error: it would wait for ranks that are gone
        dist.destroy_process_group()


def train(s, config, data, meta, ckpt, device, dtype, rank, world, say):
    (train_data, val_data), out, master = data, Path(s.out_dir), rank == 0
    sequences = s.tokens_per_step // s.block_size // world  # a rank's part of a step
    B = min(s.batch_size, sequences)
    accum = sequences // B
    together = 1 if s.dropout else accum  # micro-steps with the same senses: dropout wants a new mask in each

    # ---- model, optimizer
    probe = np.linspace(0, len(train_data) - s.block_size - 1, together * B).astype(int)  # from all over the text
    x, y, distinct, _ = take(train_data, probe.reshape(together, B), s, device)
    n, states, kept = memory_need(config, B, dtype, len(distinct[0]), together > 1)
    say(f"{n:,} parameters: {states / 1e9:.2f} GB with gradients and AdamW, and about {kept / 1e9:.2f} GB for a "
        f"micro-batch of {B} x {s.block_size} tokens\n{world} ranks x {accum} micro-steps on {device} in {dtype}")
    torch.manual_seed(s.seed)
    changes = {key: getattr(s, key) for key in FREE_KEYS}
    model = Backpack.from_checkpoint(ckpt, device, **changes) if ckpt else Backpack(config).to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.param_groups(s.weight_decay), s.learning_rate, (s.beta1, s.beta2),
                                  fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, wandb_id = ckpt["step"] if s.init_from == "resume" else 0, math.inf, None
    saved = step if s.init_from == "resume" else None
    if s.init_from == "resume" and not s.eval_only:
        load_optimizer(optimizer, ckpt["optimizer"])
        scaler.load_state_dict(ckpt["scaler"])
        best, wandb_id = ckpt["best"], ckpt["wandb_id"]
    del ckpt

    net = model
    if s.compile or (s.compile is None and device.type == "cuda"):
        try:  # it compiles at the first call
            net = torch.compile(model)
            accumulate(net, model, x[:2], y[:2], distinct if s.n_sense else None, autocast(device, dtype),
                       transformer_share=transformer_share(s, step))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, an old GPU, ...: whatever it is, training works without
            say(f"training without torch.compile, which fails here: {type(error).__name__}: {str(error)[:200]!r}")
            net = model
        model.zero_grad()
    ddp = net if world == 1 else DistributedDataParallel(
        net, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def all_sum(*numbers):
        """The numbers, each summed over ranks."""
        total = torch.tensor(numbers, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        if world > 1:
            dist.all_reduce(total)
        return total.tolist()

    stop = []  # the signals that came

    # ---- evaluate: all ranks together, on the same windows of val.bin every time and for any number of ranks
    windows = np.arange(0, len(val_data) - 1, s.block_size)[:, None] + [0, 1, s.block_size + 1]
    if not s.full_val and (some := s.eval_iters * s.tokens_per_step // s.block_size) < len(windows):
        windows = windows[np.linspace(0, len(windows) - 1, some).astype(int)]
    @torch.no_grad()
    def evaluate(windows):
        """(mean loss over windows (n,3), each with its start, what it predicts first, its stop; number of tokens;
        whether a signal to stop has cut it short on any rank)"""
        model.eval()
        loss, mine = np.zeros(2), windows[rank::world]
        for i in range(0, len(mine), B):
            if stop:
                break
            x, y, _, count = take(val_data, mine[i : i + B, 0], s, device, *mine[i : i + B, 1:].T)
            with autocast(device, dtype):  # the plain model: one graph less to compile, and no rule for shapes
                loss += np.array([model(x, y)[1].item(), 1]) * count
        model.train()
        total, count, stopping = all_sum(*loss, len(stop))
        return total / max(count, 1), int(count), stopping > 0

    if s.eval_only:
        loss, count, _ = evaluate(windows)
        say(f"step {step}: val loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}, {count:,} tokens")
        if s.full_val and (found := documents(val_data, meta["tokenizer"], s.block_size)):
            loss, count, _ = evaluate(found[0])
            say(f"by document: word perplexity {math.exp(min(loss * count / found[1], 700)):.2f}, {found[1]:,} words")
        return

    # ---- the run's folder and logs
    wandb_run = None
    if master:
        out.mkdir(parents=True, exist_ok=True)
        if s.init_from == "resume":
            cut_metrics(out / "metrics.jsonl", step)
        else:
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        (out / "config.json").write_text(json.dumps(vars(s) | {"torch": torch.__version__}, indent=1))
        (out / "meta.json").write_text(json.dumps(meta))
        metrics = open(out / "metrics.jsonl", "a", buffering=1)
        if s.wandb:
            import wandb
            wandb_run = wandb.init(project=s.wandb_project, name=out.name, dir=out, config=vars(s), mode=s.wandb_mode,
                                   id=wandb_id, resume="allow" if wandb_id else None)
            wandb_id = wandb_run.id

    def log(**record):
        if master:
            metrics.write(json.dumps(record) + "\n")
        if wandb_run:
            wandb_run.log(record, step=record["step"])

    def diverged(what):
        at = f"is of step {saved}" if saved is not None else "was not yet written"
        return UserError(f"step {step}: {what}. The checkpoint in {out} {at}, and stays; try a lower learning_rate or "
                         "a longer warmup_iters")

    def checkpoint(name="ckpt.pt"):
        nonlocal saved
        if not all(p.isfinite().all() for p in model.parameters()):  # the same on all ranks, so that all stop
            raise diverged("the weights are no longer finite")
        saved = step
        if master:
            save_checkpoint(out / name, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "config": vars(s), "step": step, "meta": meta, "best": best, "wandb_id": wandb_id,
                "rng": {"seed": s.seed, "step": step}})  # batches and dropout are functions of these

    def on_signal(number, frame):
        stop.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C ends the run at once

    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, on_signal)

    # ---- loop; its last pass only evaluates and saves
    flops = sum(flops_per_token(model, len(distinct[0]) / x.numel()).values())
    peak, begin, times, stopping, run_began = peak_flops(device, dtype), step, deque(maxlen=s.log_interval), False, None
    while not stopping:
        if step % s.eval_interval == 0 or step == s.max_iters:
            loss, count, stopping = evaluate(windows)
            if stopping:
                break
            if not math.isfinite(loss):
                raise diverged(f"validation loss {loss}")
            log(step=step, val_loss=loss)
            say(f"step {step}/{s.max_iters}  val loss {loss:.4f}  ({count:,} tokens)")
            if loss < best:
                best = loss
                if s.save_best:
                    checkpoint("best.pt")
            checkpoint()
        if step == s.max_iters:
            break

        began = time.perf_counter()
        run_began = run_began or began
        rng = np.random.default_rng((s.seed, step))  # the batch of all ranks, whatever their number
        starts = rng.integers(len(train_data) - s.block_size, size=(accum, world, B))
        torch.manual_seed(int(rng.integers(2**62)) + rank)  # dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        total = 0.0
        for first in range(0, accum, together):
            x, y, distinct, _ = take(train_data, starts[first : first + together, rank], s, device)
            total += accumulate(ddp, model, x, y, distinct if s.n_sense else None, autocast(device, dtype),
                                lambda loss: scaler.scale(loss / accum), first + together == accum,
                                transformer_share(s, step))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf).item()
        # one wait for the device a step: the exact mean over micro-steps and ranks; and was any rank told to stop?
        loss, stopping = all_sum(total.item() / accum / world, len(stop))
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise diverged(f"loss {loss}, gradient norm {norm}, stopped before the update")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP: gradients stay in its buckets
        step += 1
        times.append(time.perf_counter() - began)
        if step % s.log_interval == 0 or step == s.max_iters:
            lr, memory, speed = group["lr"], peak_memory(device), s.tokens_per_step * len(times) / sum(times)
            mfu = speed * flops / peak / world if peak else None
            seconds = time.perf_counter() - run_began
            left = datetime.timedelta(seconds=int(seconds / (step - begin) * (s.max_iters - step)))
            log(step=step, loss=loss, lr=lr, grad_norm=norm if math.isfinite(norm) else None, tokens_per_second=speed,
                mfu=mfu, memory=memory, seconds=seconds)
            say(f"step {step}/{s.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  "
                f"mfu {f'{mfu:.1%}' if mfu else 'unknown'}  {memory / 1e9:.2f} GB  {left} left")
    if stopping:
        checkpoint()
        say(f"stopped by a signal after step {step}: go on with --init_from=resume")
    if wandb_run:
        wandb_run.finish()
    if world > 1:
        dist.barrier()  # no rank leaves before the last checkpoint is whole


if __name__ == "__main__":
    run(main, CheckpointError)
