"""What a Backpack costs beside its own Transformer and the paper's dense formula, on the same real tokens.

    python -m lab.bench --config=config/backpack_micro.py --dataset=NAME --json=bench.json

It prints a block to paste into an issue: the machine, training, and all variants, which run in one process
and take turns. Figures are medians of --runs after --warmup; ratios are medians of the ratios run by run.
The FLOP floor is the ratio if every FLOP took the same time.
"""

import json
import multiprocessing
import platform
import re
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F

import hardware
import train
from configurator import UserError, configure, run
from files import write_text
from model import Backpack, BackpackConfig, contextualize, load_checkpoint, sum_senses
from optimizers import make_optimizers
from sample import sense_table


@dataclass
class Settings:
    config: str = "config/shakespeare_char.py"  # network and dataset: a config file, or a run
    dataset: str | None = None  # None: the config's
    data_dir: str = "data"  # where datasets lie
    batch_size: int | None = None  # [1, 65536] sequences of a step; None: the config's
    block_size: int | None = None  # [1, 1e6] None: the config's
    n_sense: int | None = None  # [0, 65536] None: the config's
    dropout: float = 0.0  # [0, 1) whatever the config's
    runs: int = 7  # [1, 1e6] timed runs of each variant
    warmup: int = 2  # [0, 1e6] runs before them that don't count
    dense: bool = True  # also measure the dense formula and recomputing in generation: slow
    generate: int = 1  # [0, 65536] sequences generated at once, to the full context; 0: none
    memory: bool = True  # also measure peak memory, in a new process for each variant
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: hardware.Dtype = "auto"  # auto: 16 bits on a GPU
    compile: bool | None = None  # torch.compile for training steps; None: on a GPU
    json: str | None = None  # also write the figures to this file
    profile: str | None = None  # also write torch's trace of the training steps to this file


class Dense(Backpack):
    """The paper's formula as written: senses at every position, a (B,K,T,D) product, whole logits."""

    def sum(self, h, idx, mask=None, cache=None, distinct=None, sense_table=None):
        alpha = contextualize(*self.query_key(h), mask)  # (B,K,T,T)
        return (alpha @ self.senses(idx).transpose(1, 2)).sum(1)  # (B,K,T,D), (B,T,D)

    def loss(self, o, targets):
        return F.cross_entropy(self.logits(o).flatten(0, 1), targets.flatten())


class Variant:
    """A model with its data: "backpack", "transformer" (the same with n_sense=0) or "dense"."""

    def __init__(self, s, name):
        from_file = s.config.endswith(".py")
        self.settings, _ = configure(train.Settings, [s.config] if from_file else [])
        own = vars(self.settings)
        if not from_file:
            ckpt = load_checkpoint(s.config)
            own |= ckpt["settings"] | ckpt["config"]
        for key in ("dataset", "data_dir", "batch_size", "block_size", "dropout", "n_sense"):
            own[key] = own[key] if getattr(s, key) is None else getattr(s, key)
        own["n_sense"] = 0 if name == "transformer" else own["n_sense"]
        self.tokens, _, meta = train.load_data(own["data_dir"], own["dataset"])
        own["vocab_size"] = own["vocab_size"] or meta["vocab_size"]
        if len(self.tokens) <= own["block_size"]:
            raise UserError(f"{own['dataset']} is too short for block_size={own['block_size']}")
        self.device = hardware.pick_device(s.device)
        self.dtype = hardware.pick_dtype(s.dtype, self.device)
        self.amp = hardware.autocast(self.device, self.dtype)
        if self.device.type == "cuda":  # as train.py
            torch.set_float32_matmul_precision("high")
        try:
            config = BackpackConfig(**{key: own[key] for key in train.MODEL_KEYS})
        except ValueError as error:
            raise UserError(str(error)) from None
        self.model = (Dense if name == "dense" else Backpack)(config).to(self.device)
        compiled = self.device.type == "cuda" if s.compile is None else s.compile
        self.net = torch.compile(self.model) if compiled and name != "dense" else self.model
        self.optimizers = make_optimizers(self.model, self.settings)
        self.rng = np.random.default_rng(0)

    def batch(self):
        """x (B,T), y (B,T), distinct."""
        T, B = self.settings.block_size, self.settings.batch_size
        starts = self.rng.integers(len(self.tokens) - T, size=B)
        return train.get_batch(self.tokens, starts, T, self.device, self.settings.vocab_size)

    def flops_per_token(self, distinct_share):
        losses = 1 if train.share_at(self.settings, 0) is None else 2
        return sum(hardware.flops_per_token(self.model, distinct_share, losses).values())

    def forward(self, x, y, distinct):
        with torch.no_grad(), self.amp:
            self.model(x, y, distinct=distinct)

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    def step(self, x, y, distinct):
        if self.net is not self.model:
            torch._dynamo.mark_dynamic(distinct[0], 0)  # one graph for any number of tokens
        share = train.share_at(self.settings, 0, self.device)
        with self.amp:
            loss = self.net(x, y, distinct=distinct, transformer_share=share)[1]
        loss.backward()
        self.update()


def seconds(device, function, *args):
    """How long function(*args) takes, the device's queue being empty before and after."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    function(*args)
    wait()
    return time.perf_counter() - start


def take_turns(s, timers, arguments=tuple):
    """{name: what each counted run returned} of functions that return seconds, on the same arguments."""
    times, order = {name: [] for name in timers}, list(timers)
    for _ in range(s.warmup + s.runs):
        args = arguments()
        for name in order:
            times[name].append(timers[name](*args))
        order.reverse()  # so that none always runs after the same other one
    return {name: runs[s.warmup :] for name, runs in times.items()}


def machine(device):
    """The device's name and the versions of the software, as one line."""
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader || echo unknown"
        driver, name = subprocess.getoutput(query).split()[-1], torch.cuda.get_device_name(device)
        return f"{name} ({device}), driver {driver}, CUDA {torch.version.cuda}, {software}"
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", about.read_text() if about.exists() else "")
    name = found[1] if found else platform.processor()
    return f"{name} ({device}), {torch.get_num_threads()} threads, {software}"


def training(s, one, flops):
    """Steps as in train.py, each with its batch and a wait at its end: (seconds of each, what was seen)."""
    step = partial(seconds, one.device, lambda: one.step(*one.batch()))
    took = take_turns(s, {"step": step})["step"]
    with torch.profiler.profile() as trace:
        for _ in took:
            step()
    if s.profile:
        write_text(s.profile, "")  # torch says nothing if it can't be written
        trace.export_chrome_trace(s.profile)
    rows = [row for row in trace.key_averages() if not row.is_user_annotation]
    kernels = [row for row in rows if row.device_type == DeviceType.CUDA]
    times = {row.key: row.self_device_time_total for row in kernels}
    times = times or {row.key: row.self_cpu_time_total for row in rows}  # on a CPU: operators
    total, peak = sum(times.values()), hardware.peak_flops(one.device, one.dtype)
    speed = one.settings.batch_size * one.settings.block_size / np.median(took)
    mfu = f"{speed * flops / peak:.1%}" if peak else "unknown"
    # kernels take no longer under the profiler, though steps do
    busy = f"{total / 1e6 / sum(took):.1%}" if kernels else "unknown"
    lines = [f"training: {speed:,.0f} tokens/s, MFU {mfu}, device busy {busy}; longest parts:"]
    longest = sorted(times, key=times.get, reverse=True)[:4]
    return took, lines + [f"  {times[name] / total:5.1%}  {name[:80]}" for name in longest]


def parts(s, one):
    """{part of a Backpack's training step: (FLOPs per token, seconds forward and backward alone)}."""
    model, (x, y, (ids, where)) = one.model, one.batch()
    flops = hardware.flops_per_token(model, len(ids) / x.numel()) | {"clip and step": 0}
    with torch.no_grad(), one.amp:
        h, C = model.hidden(x)[0], model.senses(ids).float()  # (B,T,D), (U,K,D)

    def alone(function, *inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with one.amp:
            out = function(*inputs)
        out.backward(torch.ones_like(out))

    timed = partial(partial, seconds, one.device, alone)
    timers = {
        "Transformer": timed(lambda: model.hidden(x)[0]),
        "sense network": timed(lambda: model.senses(ids)),
        "alpha and sum": timed(lambda h, C: sum_senses(*model.query_key(h), C, where), h, C),
        "logits and loss": timed(lambda o: model.loss(o, y), h),
    }
    updates = []

    def update():
        updates.append(seconds(one.device, one.update))
        return ()

    times = take_turns(s, timers, update)
    update()
    times["clip and step"] = updates[1:]  # the first had no gradients
    return {name: (flops[name], float(np.median(runs))) for name, runs in times.items()}


def generation(s, variants):
    """Greedy continuation of T/8 tokens to T: ({variant: seconds per token of each run}, what was done)."""
    one = variants["backpack"]
    x = one.batch()[0]
    x, T = x[torch.arange(s.generate) % len(x)], x.size(1)
    first, tables = T // 8, []
    with one.amp:
        building = seconds(one.device, lambda: tables.append(sense_table(one.model)))

    def cached(model, table=None):
        stream = model.stream(x[:, :first], T - first, temperature=0, sense_table=table)
        with one.amp:
            return [seconds(one.device, next, stream) for _ in range(T - first)]

    @torch.no_grad()
    def recomputed(model, logits_of):
        def token(t):
            model.logits(model.output(x[:, :t])[0][:, logits_of]).argmax(-1)

        with one.amp:
            lengths = np.linspace(first, T - 1, 16).astype(int)
            return [seconds(one.device, token, t) for t in lengths]

    timers = {
        "backpack": partial(cached, one.model, tables[0]),
        "senses token by token": partial(cached, one.model),
        "transformer": partial(cached, variants["transformer"].model),
    }
    if s.dense:  # the formula has logits at all positions
        timers["recomputed"] = partial(recomputed, one.model, -1)
        timers["dense"] = partial(recomputed, variants["dense"].model, slice(None))
    times = take_turns(s, timers)
    size = 0 if tables[0] is None else tables[0].nbytes / 1e9
    line = f"token: mean of {T - first}, {s.generate} at once; sense table {size:.2f} GB in {building:.1f} s"
    return {name: np.mean(runs, 1).tolist() for name, runs in times.items()}, line


def peak_of(s, name):
    """Peak bytes of two training steps, in a process of its own, and those of activations alone."""
    variant = Variant(s, name)
    # imports and weights; gradients and AdamW's two moments are to come
    held = hardware.peak_memory(variant.device) + 12 * variant.model.num_params()
    for _ in range(2):
        variant.step(*variant.batch())
    peak = hardware.peak_memory(variant.device)
    return peak, peak - held


def measure(s):
    """All figures, as a dict that can be written as JSON."""
    names = ["backpack", "transformer"] + ["dense"] * s.dense
    one, peaks = Variant(s, "backpack"), {}
    if not one.model.config.n_sense:
        raise UserError("n_sense=0 has no senses to measure: give a Backpack's config")
    for name in names if s.memory else []:  # first, while a GPU's memory is free
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks[name] = process.submit(peak_of, s, name).result()
    variants = {"backpack": one} | {name: Variant(s, name) for name in names[1:]}
    x, _, (ids, _) = one.batch()
    flops = {v: variants[v].flops_per_token(len(ids) / x.numel()) for v in names[:2]}
    floor = flops["backpack"] / flops["transformer"]
    how = f"{one.dtype}, {'eager' if one.net is one.model else 'compiled'}, dropout {s.dropout}"
    size = f"batch of {tuple(x.shape)} tokens, {len(ids)} of them distinct, FLOP floor {floor:.3f}"
    took, lines = training(s, one, flops["backpack"])
    result = {
        "about": [machine(one.device), f"{s.config}, {one.settings.dataset}, {how}", size, *lines],
        "batch": list(x.shape),
        "distinct": len(ids),
        "flop floor": floor,
        "seconds": {"training": {"backpack": took}},
        "parts": parts(s, one),
        "bytes": peaks,
    }
    for what in ("step", "forward"):
        for name in names[1:]:  # in pairs: what runs after the dense formula is slower
            pair = {"backpack": one, name: variants[name]}
            timers = {v: partial(seconds, one.device, getattr(pair[v], what)) for v in pair}
            result["seconds"][f"{what}, {name}"] = take_turns(s, timers, one.batch)
    if s.generate and x.size(1) >= 64:
        result["seconds"]["token"], line = generation(s, variants)
        result["about"].append(line)
    return result


def table(result):
    """The figures as text: medians, and the ratio of the Backpack to each other variant."""
    lines = list(result["about"])
    for name, times in result["seconds"].items():
        for v, runs in times.items():
            line = f"{name:20} {v:21} {np.median(runs) * 1e3:9,.1f} ms"
            ratio = np.median(np.array(times["backpack"]) / np.array(runs))
            lines.append(f"{line}, backpack / {v} {ratio:.3f}" if v != "backpack" else line)
    flops, took = np.sum(list(result["parts"].values()), axis=0)
    for part, (f, t) in result["parts"].items():
        line = f"{part:16} {f / 1e6:9.2f} MFLOP per token, {f / flops:5.1%}"
        lines.append(f"{line}  {t * 1e3:9,.1f} ms alone, {t / took:5.1%}")
    for name, (peak, kept) in result["bytes"].items():
        ours = result["bytes"]["backpack"]
        line = f"peak memory, {name}: {peak / 1e9:.2f} GB, activations {kept / 1e9:.2f} GB"
        lines.append(f"{line}; backpack's are {ours[0] / peak:.3f}, {ours[1] / kept:.3f} of these")
    return "\n".join(lines)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    result = measure(s)
    print(table(result))
    if s.json:
        write_text(s.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
