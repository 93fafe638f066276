"""Train a Backpack, or with --n_sense=0 its plain Transformer, on a dataset of prepare_data.py.

python train.py config/shakespeare_char.py                      a CPU, a Mac or one GPU
torchrun --nproc_per_node=4 train.py config/backpack_small.py   several GPUs, also on many nodes
python train.py config/shakespeare_char.py --init_from=resume   go on where a run stopped
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import configurator
from configurator import UserError, autocast, changed, configure, hold, pick_device, pick_dtype
from model import Backpack, BackpackConfig, CheckpointError, load_checkpoint

# ---- settings


@dataclass
class Settings(BackpackConfig):
    """All of BackpackConfig, and these. The defaults are the paper's recipe for its "small"."""

    vocab_size: int | None = None  # None: the dataset's
    dataset: str = "openwebtext"  # a folder of data_dir that prepare_data.py made
    data_dir: str = "data"  # where datasets lie
    out_dir: str = "out/backpack_small"  # the run: ckpt.pt, config.json, metrics.jsonl
    init_from: str = "scratch"  # scratch; resume: the run in out_dir; PATH: another run's weights
    overwrite: bool = False  # start from scratch over the run in out_dir
    tokens_per_step: int = 524288  # batch size in tokens per optimizer step, over all ranks
    batch_size: int = 16  # sequences per rank and micro-batch (fewer if a step has fewer)
    max_iters: int = 100000  # optimizer steps
    learning_rate: float = 6e-4  # the highest, after warm-up
    schedule: str = "linear"  # decay to min_lr after warm-up: linear (paper) or cosine
    warmup_iters: int = 5000  # steps of linear warm-up
    min_lr: float = 0.0  # at the end
    weight_decay: float = 0.1  # of matrices; not of biases, norms and embeddings
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    transformer_share: float = (
        0.0  # of the Transformer's own loss in training's, falling to 0 (ours)
    )
    eval_interval: int = 1000  # steps between evaluations, each with a checkpoint
    eval_iters: int = 4  # evaluate on this many times tokens_per_step, evenly spaced over val.bin
    full_val: bool = False  # evaluate on all of val.bin, in disjoint windows
    eval_only: bool = False  # evaluate, print and exit; writes nothing
    save_best: bool = False  # also keep best.pt, the checkpoint of the lowest validation loss
    log_interval: int = 10  # steps between progress lines
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"  # float32, bfloat16, float16 (with a loss scaler); auto: 16 bits on a GPU
    compile: bool | None = None  # torch.compile; None: on a GPU
    deterministic: bool = False  # on a GPU: resume bit for bit, slower
    seed: int = 1337  # of weights, batches and dropout
    wandb: bool = False  # log to Weights & Biases
    wandb_mode: str = "online"  # or offline
    wandb_project: str = "nanoBackpack"  # the project to log to


MODEL_KEYS = [f.name for f in fields(BackpackConfig)]
FREE_KEYS = ("dropout", "grad_checkpoint", "init_std")  # these may differ from a checkpoint's
CALL_KEYS = ("init_from", "overwrite", "out_dir", "eval_only")  # never taken from a checkpoint
RUN_FILES = ("ckpt.pt", "best.pt", "metrics.jsonl")  # what --overwrite replaces


def take_settings(s, sources, ckpt):
    """Settings that were not given become the checkpoint's: all at resume, else the network's."""
    saved = ckpt["config"] | (ckpt["settings"] if s.init_from == "resume" else {})
    for key, value in saved.items():
        if key in vars(s) and key not in sources and key not in CALL_KEYS:
            setattr(s, key, value)


def setting_problems(s, world):
    """A line for each setting, or pair of settings, that cannot work."""
    problems, tokens, T = [], s.tokens_per_step, s.block_size

    def need(ok, message):
        if not ok:
            problems.append(message)

    mine, rest = divmod(tokens, max(1, T) * world)  # sequences of a rank in a step
    whole = tokens > 0 and not rest
    parts = f"block_size={T} times {world} ranks"
    need(whole, f"tokens_per_step={tokens} must be a multiple of {parts}")
    fits = s.batch_size > 0 and (not whole or not mine % min(s.batch_size, mine))
    need(fits, f"batch_size={s.batch_size} must divide the {mine} sequences of a rank in a step")
    need(s.grad_clip >= 0, f"grad_clip={s.grad_clip} must be at least 0 (0: no clipping)")
    one = world == 1 or not s.device.startswith("cuda:")
    need(one, f"device={s.device} is for one process: torchrun gives each rank its own")
    share = s.transformer_share
    need(0 <= share <= 1, f"transformer_share={share} must be from 0 to 1")
    need(s.schedule in ("linear", "cosine"), f"schedule={s.schedule!r}: expected linear or cosine")
    installed = not s.wandb or importlib.util.find_spec("wandb")
    need(installed, "wandb=True, but the package is not installed: pip install wandb")
    for key in ("max_iters", "eval_interval", "eval_iters", "log_interval", "learning_rate"):
        need(getattr(s, key) > 0, f"{key}={getattr(s, key)} must be more than 0")
    return problems


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
        if key not in FREE_KEYS and getattr(s, key, None) != value:
            mine = getattr(s, key, "unknown here")
            problems.append(f"{key}={mine}, but the checkpoint has {value}")
    if resume and "optimizer" not in ckpt and not s.eval_only:
        hint = f"finetune them with --init_from={out} and another --out_dir"
        problems.append(f"{out} has weights only: {hint}")
    found = [name for name in RUN_FILES if (out / name).exists() and (out / name).stat().st_size]
    if found and not (resume or s.overwrite or s.eval_only):
        hint = "--init_from=resume goes on with it, " if "ckpt.pt" in found else ""
        hint += "--overwrite=True replaces it"
        problems.append(f"{out} has {' and '.join(found)} of another run: {hint}")
    if ckpt and not resume and out.resolve() in (init.resolve(), init.resolve().parent):
        problems.append(f"init_from={s.init_from} lies in out_dir: give another --out_dir")
    return problems


# ---- data


def load_data(data_dir, dataset):
    """(train, val) token ids, memory-mapped, and meta.json of a dataset. UserError: it is not there."""
    folder = Path(data_dir) / dataset
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["dtype"] not in ("uint16", "uint32"):
            what = f"dtype={meta['dtype']!r}, expected uint16 or uint32"
            raise UserError(f"{folder / 'meta.json'}: {what}: make the dataset again")
        meta["vocab_size"], meta["tokenizer"]  # KeyError: not ours
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        return *(np.memmap(folder / f"{split}.bin", dtype, "r") for split in ("train", "val")), meta
    except FileNotFoundError:
        hint = f"make it with python prepare_data.py --dataset={dataset}"
        raise UserError(f"no dataset at {folder}: {hint}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is no dataset of prepare_data.py: {error!r}") from None


def get_batch(tokens, starts, block_size, device, vocab_size):
    """The windows of tokens that begin at starts (B,): x, y, distinct, on the device.

    x (B,T): token ids; y (B,T): the token after each, -100 beyond the end; distinct: (ids (U,), where
    (B,T)), the distinct tokens of x and which stands where. UserError: an id outside the vocabulary.
    """
    at = starts[:, None] + np.arange(block_size + 1)  # (B,T+1)
    ids = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)  # (B,T+1)
    if ids.max() >= vocab_size:
        raise UserError(f"the data has token id {ids.max()}, outside a vocabulary of {vocab_size}")
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
    return torch.tensor(s.transformer_share * (1 - step / s.max_iters), device=device)


def flops_per_token(model, distinct_share):
    """{part: FLOPs of a training step per token}; distinct_share: distinct tokens over all."""
    # at full context: 2 for each product in forward, twice as many in backward
    c, pairs = model.config, (model.config.block_size + 1) / 2  # keys that a query sees, on average
    size = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}

    def weights(part):
        return sum(n for name, n in size.items() if name.startswith(part))

    products = {"Transformer": weights("blocks") + 2 * c.n_layer * c.n_embd * pairs}
    if c.n_sense:
        products["sense network"] = distinct_share * weights("sense_network")
        of_pairs = c.n_sense * (model.n_qk + c.n_embd) * pairs
        products["alpha and sum"] = weights("sense_qk") + of_pairs
    products["logits and loss"] = size["wte.weight"]
    return {part: 3 * 2 * n for part, n in products.items()}


# ---- checkpoints and logs


def save_checkpoint(path, value):
    """Write to a temporary name, sync, rename: at any moment path holds a whole checkpoint."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason, hint = str(error).splitlines()[0], "make room and go on with --init_from=resume"
        raise CheckpointError(
            f"could not save {path} ({reason}): the one before it is whole; {hint}"
        ) from None


def load_optimizer(optimizer, saved):
    """Load the moments of a checkpoint; the settings stay the optimizer's. CheckpointError: no fit."""
    state, groups = saved["state"], optimizer.state_dict()["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        fits = not state or all(
            {name: v.shape for name, v in state[i].items()}
            == {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            for i, p in enumerate(params)
        )
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        what = "the checkpoint's optimizer state does not fit its weights"
        raise CheckpointError(f"{what}: start a new run from its weights with --init_from=PATH")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for p, moments in optimizer.state.items():  # in memory of their own, not pages of the file
        for name, value in moments.items():
            moments[name] = torch.empty_like(p if value.dim() else value).copy_(value)


def cut_metrics(path, step):
    """Drop what a stopped run logged after its checkpoint: later steps, half a line, its evaluation."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record["step"] < step or (record["step"] == step and "loss" in record):
                kept.append(line + "\n")
    path.with_suffix(".tmp").write_text("".join(kept))
    path.with_suffix(".tmp").replace(path)


def main(argv):
    s, sources = configure(Settings, argv, __doc__)
    master = int(os.environ.get("RANK", 0)) == 0
    writes = master and not s.eval_only
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
    if restarts != "0" and (out / "ckpt.pt").exists():
        s.init_from = "resume"  # torchrun has started this worker group again
    resume, ckpt, problems = s.init_from == "resume", None, []
    init = out if resume else Path(s.init_from)
    if s.init_from != "scratch":
        ckpt = load_checkpoint(init, mmap=True)  # in memory once for all ranks
        take_settings(s, sources, ckpt)
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
    # windows of val.bin to evaluate on: the same every time, for any number of ranks
    val_starts = np.arange(0, len(val_data) - 1, T)
    n_eval = s.eval_iters * s.tokens_per_step // T
    if not s.full_val and n_eval < len(val_starts):
        val_starts = val_starts[np.linspace(0, len(val_starts) - 1, n_eval).astype(int)]

    # ---- model
    torch.manual_seed(s.seed)
    changes = {key: getattr(s, key) for key in FREE_KEYS}
    model = Backpack.from_checkpoint(ckpt, device, **changes) if ckpt else Backpack(config)
    model.to(device).train()
    say(
        f"{model.num_params():,} parameters, {16 * model.num_params() / 1e9:.2f} GB with gradients "
        f"and AdamW\n{world} ranks x {accum} micro-batches of {B} x {T} tokens on {device} in {dtype}"
    )

    # ---- optimizer
    groups, betas = model.param_groups(s.weight_decay), (s.beta1, s.beta2)
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(groups, s.learning_rate, betas, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, wandb_id = ckpt["step"] if resume else 0, math.inf, None
    saved = step if resume else None  # the step of the last checkpoint
    if resume and not s.eval_only:
        load_optimizer(optimizer, ckpt["optimizer"])
        scaler.load_state_dict(ckpt["scaler"])
        best, wandb_id = ckpt["best"], ckpt["wandb_id"]
    del ckpt

    # ---- compile, wrap
    def micro_step(net, batch, share):
        """Forward and backward of a micro-batch; returns its loss, on the device."""
        x, y, distinct = batch
        if compiled:
            # one graph for any number of distinct tokens
            torch._dynamo.mark_dynamic(distinct[0], 0)
        with autocast(device, dtype):
            loss = net(x, y, distinct=distinct if s.n_sense else None, transformer_share=share)[1]
        scaler.scale(loss / accum).backward()
        return loss.detach()

    probe = np.linspace(0, len(train_data) - T - 1, B).astype(int)  # from all over the text
    batch = get_batch(train_data, probe, T, device, s.vocab_size)
    distinct_share = len(batch[2][0]) / batch[0].numel()
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
    def all_sum(*numbers):
        """The numbers, each summed over ranks."""
        where = "cpu" if device.type == "mps" else device  # MPS has no float64
        total = torch.tensor(numbers, dtype=torch.float64, device=where)
        if world > 1:
            dist.all_reduce(total)
        return total.tolist()

    @torch.no_grad()
    def evaluate():
        """(mean loss, number of tokens, whether a signal cut it short); all ranks take part."""
        model.eval()
        losses, counts, mine = [torch.zeros((), device=device)], [0], val_starts[rank::world]
        for i in range(0, 0 if stop else len(mine), B):
            starts = mine[i : i + B]
            x, y, distinct = get_batch(val_data, starts, T, device, s.vocab_size)
            counts.append(int(np.minimum(T, len(val_data) - 1 - starts).sum()))
            with autocast(device, dtype):  # the plain model: shapes vary, and it need not compile
                losses.append(model(x, y, distinct=distinct)[1] * counts[-1])
            if stop:
                break
        model.train()
        total = torch.stack(losses).cpu().double().sum().item()  # evaluation's only device sync
        total, count, stopping = all_sum(total, sum(counts), len(stop))
        return total / max(count, 1), int(count), stopping > 0

    if s.eval_only:
        loss, count, stopping = evaluate()
        if stopping:
            raise UserError("evaluation was stopped by a signal")
        perplexity = math.exp(min(loss, 700))
        say(f"step {step}: val loss {loss:.4f}, perplexity {perplexity:.2f}, {count:,} tokens")
        return None

    # ---- the run's folder, logs and checkpoints
    settings = {key: value for key, value in vars(s).items() if key not in MODEL_KEYS}
    wandb_run = metrics = None
    if master:
        if resume:
            cut_metrics(out / "metrics.jsonl", step)
        else:
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        described = asdict(config) | settings | {"torch": torch.__version__}
        (out / "config.json").write_text(json.dumps(described, indent=1))
        metrics = open(out / "metrics.jsonl", "a", buffering=1)
    if master and s.wandb:
        import wandb

        options = {"dir": out, "config": vars(s), "mode": s.wandb_mode, "id": wandb_id}
        wandb_run = wandb.init(project=s.wandb_project, name=out.name, resume="allow", **options)
        wandb_id = wandb_run.id

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
            parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
            states = {name: part.state_dict() for name, part in parts.items()}
            about = {"config": asdict(config), "settings": settings, "meta": meta, "step": step}
            rng = {"seed": s.seed, "step": step}  # batches and dropout are functions of these
            about |= {"rng": rng, "best": best, "wandb_id": wandb_id}
            save_checkpoint(out / name, states | about)
        saved = step if name == "ckpt.pt" else saved

    # ---- loop; its last pass only evaluates and saves
    flops = sum(flops_per_token(model, distinct_share).values())
    peak = configurator.peak_flops(device, dtype)
    first_step, began, times, stopping = step, None, deque(maxlen=s.log_interval), False
    while not stopping:
        if step % s.eval_interval == 0 or step == s.max_iters:
            loss, count, stopping = evaluate()
            if stopping:
                break
            if not math.isfinite(loss):
                raise diverged(f"validation loss {loss}")
            log(val_loss=loss)
            say(f"step {step}/{s.max_iters}  val loss {loss:.4f}  ({count:,} tokens)")
            best = min(best, loss)
            if s.save_best and loss == best:
                save("best.pt")
            save()
        if step == s.max_iters:
            break

        start = time.perf_counter()
        began = began or start
        rng = np.random.default_rng((s.seed, step))  # one draw for all ranks, whatever their number
        starts = rng.integers(len(train_data) - T, size=(accum, world, B))
        torch.manual_seed(int(rng.integers(2**62)) + rank)  # dropout
        for group in optimizer.param_groups:
            group["lr"] = lr_at(s, step)
        total = 0.0
        for i in range(accum):
            batch = get_batch(train_data, starts[i, rank], T, device, s.vocab_size)
            if world > 1:  # as DDP's no_sync(): gradients meet once a step
                net.require_backward_grad_sync = i == accum - 1
            total += micro_step(net, batch, share_at(s, step, device))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf).item()
        # the exact mean over micro-batches and ranks; and has any rank been told to stop?
        loss, stopping = all_sum(total.item() / accum / world, len(stop))
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise diverged(f"loss {loss}, gradient norm {norm}, stopped before the update")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP: gradients stay in its buckets
        step += 1

        times.append(time.perf_counter() - start)
        if step % s.log_interval == 0 or step == s.max_iters:
            speed = s.tokens_per_step * len(times) / sum(times)
            memory = configurator.peak_memory(device)
            mfu = speed * flops / peak / world if peak else None
            seconds = time.perf_counter() - began
            left = seconds / (step - first_step) * (s.max_iters - step)
            gradient = {"grad_norm": norm if math.isfinite(norm) else None}
            costs = {"tokens_per_second": speed, "mfu": mfu, "memory": memory, "seconds": seconds}
            log(loss=loss, lr=group["lr"], **gradient, **costs)
            say(
                f"step {step}/{s.max_iters}  loss {loss:.4f}  lr {group['lr']:.2e}  "
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
