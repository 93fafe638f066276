"""
What a Backpack costs beside its own Transformer and the paper's dense formula, on the same real tokens.

    python -m lab.bench --config=config/backpack_micro.py --dataset=NAME --json=bench.json
    python -m lab.bench --run=out/mine

It prints a block to paste into an issue: the machine, training, and all variants, which run in one process
and take turns, without dropout. Figures are medians of --runs; ratios are medians of the ratios run by run.
FLOPs are counted by torch on what is timed; the FLOP floor is the ratio if each of them took the same time.
"""

import json
import multiprocessing
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from configurator import Dtype, check, configure, pick_device, pick_dtype, run
from lab.control import is_near
from lab.files import expect_place, replacing, write_text
from model import Backpack, contextualize, load_checkpoint, sum_senses

import train  # isort: skip  # after configurator: see lab/configurator.py

WARMUP = 2  # runs that don't count


@dataclass
class Settings:
    config: str = "config/shakespeare_char.py"  # has the network, the dataset and the batch size
    run: str | None = None  # a run that has them instead
    dataset: str | None = None  # None: the config's
    data_dir: str = "data"
    batch_size: int | None = None  # sequences of a step; None: the config's
    block_size: int | None = None  # None: the config's
    runs: int = 7  # timed runs of each variant
    dense: bool = True  # also measure the paper's formula: slow
    generate: int = 1  # sequences generated at once, to the full context; 0: none
    memory: bool = True  # also measure peak memory, in a new process for each variant
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: Dtype = "auto"  # auto: 16 bits on a GPU
    compile: bool | None = None  # torch.compile for training steps; None: on a GPU
    json: str | None = None  # also write the figures to this file
    profile: str | None = None  # also write torch's trace of the training steps to this file


# -----------------------------------------------------------------------------
# what is measured


class Dense(Backpack):
    """The paper's formula as written: senses at every position, a (B,K,T,D) product, whole logits."""

    def forward(self, idx, targets=None, distinct=None, transformer_share=None):
        h = self.hidden(idx)  # (B,T,D)
        alpha = contextualize(*self.query_key(h))  # (B,K,T,T)
        C = self.senses(idx).transpose(1, 2)  # (B,K,T,D)
        o = (alpha @ C).sum(1)  # (B,K,T,D), (B,T,D)
        if targets is None:
            return self.logits(o), None
        loss = self.loss(o, targets)
        if transformer_share is not None:
            loss = torch.lerp(loss, self.loss(h, targets), transformer_share)
        return None, loss

    def loss(self, o, targets):
        return F.cross_entropy(self.logits(o).flatten(0, 1), targets.flatten())


def train_settings(s):
    """The train.Settings of the config or the run, and what was given here in their place."""
    if s.run:
        ckpt = load_checkpoint(s.run)
        saved = ckpt["settings"] | ckpt["config"]
        names = {f.name for f in fields(train.Settings)}
        t = train.Settings(**{name: saved[name] for name in names & saved.keys()})
    else:
        t, _ = configure(train.Settings, [s.config])
    for name in ("dataset", "batch_size", "block_size"):
        if getattr(s, name) is not None:
            setattr(t, name, getattr(s, name))
    t.data_dir = s.data_dir
    t.dropout = 0.0
    return t


class Variant:
    """A model with its data: "backpack", "transformer" (the same with n_sense=0) or "dense"."""

    def __init__(self, s, name):
        t = train_settings(s)
        if name == "transformer":
            t.n_sense = 0
        self.tokens, _, meta = train.load_data(Path(t.data_dir) / t.dataset)
        t.vocab_size = t.vocab_size or meta["vocab_size"]
        fits = meta["vocab_size"] == t.vocab_size
        check(fits, f"{t.dataset} has {meta['vocab_size']} tokens, the network {t.vocab_size}")
        enough = len(self.tokens) > t.block_size
        check(enough, f"{t.dataset} is too short for block_size={t.block_size}")
        self.settings = t
        self.device = pick_device(s.device)
        self.dtype = pick_dtype(s.dtype, self.device)
        mixed = self.dtype != torch.float32
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=mixed)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as train.py
        torch.manual_seed(0)  # the same weights for the Backpack and the dense formula
        config = train.network_config(t)
        self.model = Dense(config) if name == "dense" else Backpack(config)
        self.model.to(self.device)
        self.net = self.model
        if name != "dense" and (s.compile or (s.compile is None and self.device.type == "cuda")):
            self.net = torch.compile(self.model)
        self.optimizers = train.make_optimizers(self.model, t)
        self.share = train.share_at(t, 0, self.device)
        self.rng = np.random.default_rng(0)

    def batch(self):
        """x (B,T), y (B,T), (ids (U,), where (B,T)): see train.get_batch."""
        T = self.settings.block_size
        starts = self.rng.integers(len(self.tokens) - T, size=self.settings.batch_size)
        return train.get_batch(self.tokens, starts, T, self.device)

    @torch.no_grad()
    def forward(self, x, y, distinct):
        """The loss of training, without what backward needs."""
        with self.autocast:
            self.model(x, y, distinct, self.share)

    def step(self, x, y, distinct):
        """A step of training, as in train.py."""
        if self.net is not self.model:
            torch._dynamo.mark_dynamic(distinct[0], 0)  # one graph for any number of tokens
        with self.autocast:
            _, loss = self.net(x, y, distinct, self.share)
        loss.backward()
        self.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()


# -----------------------------------------------------------------------------
# how


def seconds(device, function, *args):
    """How long function(*args) takes, with nothing left to do on the device before and after."""

    def wait():
        if device.type != "cpu":
            torch.accelerator.synchronize()

    wait()
    start = time.perf_counter()
    function(*args)
    wait()
    return time.perf_counter() - start


def take_turns(s, timers, arguments=tuple):
    """{name: [what each counted run returned]} of functions that return seconds, on the same arguments."""
    times = {name: [] for name in timers}
    order = list(timers)
    for i in range(WARMUP + s.runs):
        args = arguments()
        for name in order:
            took = timers[name](*args)
            if i >= WARMUP:
                times[name].append(took)
        order.reverse()  # so that none always runs after the same other one
    return times


def attention_flops(q, k, v, *args, **kwargs):
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(grad, q, k, v, *args, **kwargs):
    return sdpa_backward_flop_count(grad, q, k, v)


# torch counts the attention of GPUs only
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(function, *args):
    """The FLOPs of function(*args): of all matrix products, and of attention as if it were not causal."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function(*args)
    return counter.get_total_flops()


def peak_memory(device):
    """The most bytes that this process has used so far, on the GPU, or else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM" in status.read_text():
        # what getrusage says also counts what the parent process held
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(s, name):
    """Peak bytes of two training steps, and those that came with them; in a process of its own."""
    variant = Variant(s, name)
    before = peak_memory(variant.device)
    for _ in range(2):
        variant.step(*variant.batch())
    peak = peak_memory(variant.device)
    return peak, peak - before


def machine(device):
    """The device's name and the versions of the software, as one line."""
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader || echo unknown"
        driver = subprocess.getoutput(query).split()[-1]
        name = torch.cuda.get_device_name(device)
        return f"{name} ({device}), driver {driver}, CUDA {torch.version.cuda}, {software}"
    cpuinfo = Path("/proc/cpuinfo")
    found = None
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    name = found[1] if found else platform.processor()
    return f"{name} ({device}), {torch.get_num_threads()} threads, {software}"


# -----------------------------------------------------------------------------
# the measurements


def training(s, one):
    """Steps as in train.py, each with its batch and a wait at its end: (seconds of each, lines of text)."""
    x, y, distinct = one.batch()
    flops = 3 * count_flops(one.forward, x, y, distinct)  # backward has twice those of forward
    step = partial(seconds, one.device, lambda: one.step(*one.batch()))
    took = take_turns(s, {"step": step})["step"]
    speed = x.numel() / np.median(took)
    peak = train.peak_flops(one.device)
    of_peak = f"{flops / np.median(took) / peak:.1%}" if peak else "an unknown share"

    with torch.profiler.profile() as trace:
        for _ in took:
            step()
    if s.profile:
        with replacing(s.profile) as file:
            trace.export_chrome_trace(file.name)
    rows = [row for row in trace.key_averages() if not row.is_user_annotation]
    kernels = [row for row in rows if row.device_type == DeviceType.CUDA]
    if kernels:
        times = {row.key: row.self_device_time_total for row in kernels}
        # kernels take no longer under the profiler, though steps do
        busy = f"{sum(times.values()) / 1e6 / sum(took):.1%}"
    else:
        times = {row.key: row.self_cpu_time_total for row in rows}  # of operators
        busy = "unknown"
    about = f"{of_peak} of peak FLOP/s, device busy {busy}"
    lines = [f"training: {speed:,.0f} tokens/s, {about}; longest parts:"]
    for name in sorted(times, key=times.get, reverse=True)[:4]:
        lines.append(f"  {times[name] / sum(times.values()):5.1%}  {name[:80]}")
    return took, lines


def parts(s, one):
    """{part of a Backpack's training step: (FLOPs, seconds) of its forward and backward, alone}."""
    model = one.model
    x, y, (ids, where) = one.batch()
    with torch.no_grad(), one.autocast:
        h = model.hidden(x)  # (B,T,D)
        C = model.senses(ids).float()  # (U,K,D)

    def alone(function, *inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with one.autocast:
            out = function(*inputs)
        out.backward(torch.ones_like(out))

    def sum_of(h, C):
        return sum_senses(*model.query_key(h), C, where)

    functions = {
        "Transformer": partial(alone, lambda: model.hidden(x)),
        "sense network": partial(alone, lambda: model.senses(ids)),
        "alpha and sum": partial(alone, sum_of, h, C),
        "logits and loss": partial(alone, lambda o: model.loss(o, y), h),
        "clip and step": one.update,  # with the gradients of those above
    }
    flops = {}
    timers = {}
    for name, function in functions.items():
        flops[name] = count_flops(function)
        timers[name] = partial(seconds, one.device, function)
    times = take_turns(s, timers)
    return {name: (flops[name], float(np.median(times[name]))) for name in functions}


def generation(s, variants):
    """Greedy continuation of T/8 tokens to T: ({variant: seconds per token of each run}, a line of text)."""
    one = variants["backpack"]
    x, _, _ = one.batch()
    x = x[torch.arange(s.generate) % len(x)]  # (generate,T)
    n_new = x.size(1) * 7 // 8
    tables = []
    with one.autocast:
        building = seconds(one.device, lambda: tables.append(one.model.sense_table()))

    def per_token(model, table=None):
        with one.autocast:
            return seconds(one.device, generate, model, table) / n_new

    def generate(model, table):
        model.generate(x[:, :-n_new], n_new, temperature=0, sense_table=table)

    timers = {
        "backpack": partial(per_token, one.model, tables[0]),
        "transformer": partial(per_token, variants["transformer"].model),
    }
    size = 0 if tables[0] is None else tables[0].nbytes / 1e9
    about = f"token: mean of {n_new}, {s.generate} at once; sense table {size:.2f} GB"
    return take_turns(s, timers), f"{about} in {building:.1f} s"


@torch.no_grad()
def same_logits(model, dense, x):
    """Whether the dense formula, with the same weights, says what the model says. In a fork it need not.

    It adds the same noise to both, as what is new in a fork may have no effect before it is trained.
    """
    for p, q in zip(model.parameters(), dense.parameters()):
        noise = 0.02 * torch.randn_like(p)
        p += noise
        q += noise
    own, _ = model(x)  # (B,T,V)
    found, _ = dense(x)
    return is_near(own, found)


def measure(s):
    """All figures, as a dict that can be written as JSON."""
    one = Variant(s, "backpack")
    check(one.model.config.n_sense, "n_sense=0 has no senses to measure: give a Backpack's config")
    variants = {"backpack": one, "transformer": Variant(s, "transformer")}
    x, y, distinct = one.batch()
    kind = "eager" if one.net is one.model else "compiled"
    what = f"{s.run or s.config}, {one.settings.dataset}, {one.dtype}, {kind}"
    about = [machine(one.device), what]
    if s.dense:
        dense = Variant(s, "dense")
        if same_logits(one.model, dense.model, x[:1]):
            variants["dense"] = dense
        else:
            about.append("the dense formula is left out: its logits are not the model's")
    peaks = {}
    if s.memory:  # first, while a GPU's memory is free
        for name in variants:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peaks[name] = process.submit(peak_of, s, name).result()
    flops = {}
    for name, variant in variants.items():
        flops[name] = count_flops(variant.forward, x, y, distinct)
    floor = flops["backpack"] / flops["transformer"]
    size = f"batch of {tuple(x.shape)} tokens, {len(distinct[0])} of them distinct"
    about.append(f"{size}, FLOP floor {floor:.3f}")

    took, lines = training(s, one)
    result = {
        "about": about + lines,
        "batch": list(x.shape),
        "distinct": len(distinct[0]),
        "flop floor": floor,
        "seconds": {"training": {"backpack": took}},
        "parts": parts(s, one),
        "bytes": peaks,
    }
    for what in ("step", "forward"):
        for name in list(variants)[1:]:  # in pairs: what runs after the dense formula is slower
            timers = {}
            for v in ("backpack", name):
                timers[v] = partial(seconds, one.device, getattr(variants[v], what))
            result["seconds"][f"{what}, {name}"] = take_turns(s, timers, one.batch)
    if s.generate and x.size(1) >= 64:
        result["seconds"]["token"], line = generation(s, variants)
        result["about"].append(line)
    return result


def table(result):
    """The figures as text: medians, and the ratio of the Backpack to each other variant."""
    lines = list(result["about"])
    for what, times in result["seconds"].items():
        ours = np.array(times["backpack"])
        for name, runs in times.items():
            line = f"{what:20} {name:21} {np.median(runs) * 1e3:9,.1f} ms"
            if name != "backpack":
                line += f", backpack / {name} {np.median(ours / np.array(runs)):.3f}"
            lines.append(line)
    all_flops = sum(flops for flops, _ in result["parts"].values())
    all_seconds = sum(took for _, took in result["parts"].values())
    for part, (flops, took) in result["parts"].items():
        line = f"{part:16} {flops / 1e9:9.2f} GFLOP, {flops / all_flops:5.1%}"
        lines.append(f"{line}  {took * 1e3:9,.1f} ms alone, {took / all_seconds:5.1%}")
    for name, (peak, grown) in result["bytes"].items():
        line = f"peak memory, {name}: {peak / 1e9:.2f} GB, {grown / 1e9:.2f} of them for the steps"
        ours, ours_grown = result["bytes"]["backpack"]
        lines.append(f"{line}; backpack's are {ours / peak:.3f}, {ours_grown / grown:.3f} of these")
    return "\n".join(lines)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    for path in (s.json, s.profile):
        if path:
            expect_place(path, [".json"])
    result = measure(s)
    print(table(result))
    if s.json:
        write_text(s.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
