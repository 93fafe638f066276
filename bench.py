"""What a Backpack costs beside its own Transformer and the paper's dense formula: one process, the same real tokens.

    python bench.py --config=config/shakespeare_char.py
    python bench.py --config=config/backpack_micro.py --dataset=NAME --batch_size=8 --runs=7 --json=bench.json

Variants run in turn; figures are medians of --runs after --warmup, ratios the median of the ratios run by run. The FLOP
floor is what the ratio would be if every FLOP took the same time.
"""
import json
import multiprocessing
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from batches import load_data, take
from configurator import UserError, configure, run
from devices import autocast, flops_per_token, peak_memory, pick_device, pick_dtype
from model import Backpack, BackpackConfig
from train import MODEL_KEYS
from train import Settings as TrainSettings


@dataclass
class Settings:
    config: str = "config/shakespeare_char.py"  # the network and the dataset
    dataset: str | None = None       # None: the config's
    data_dir: str = "data"
    batch_size: int | None = None    # sequences at once; None: the config's
    block_size: int | None = None    # None: the config's
    n_sense: int | None = None       # None: the config's
    runs: int = 7
    warmup: int = 2
    generate: bool = True            # also time generation, of as many tokens as fit the context
    memory: bool = True              # also the peak memory of training steps, in a new process for each variant
    device: str = "auto"             # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"              # float32, bfloat16, float16; auto: 16 bits on a GPU
    compile: bool = False            # torch.compile for training steps
    json: str | None = None          # also write the figures to this file


class Dense(Backpack):
    """The paper's formula as it is written: senses at every position, a (B,K,T,D) product, whole logits, no cache."""

    def _sum(self, h, idx, mask=None, cache=None, distinct=None):
        return (self._alpha(h, mask) @ self.senses(idx).transpose(1, 2)).sum(1)      # (B,K,T,D) -> (B,T,D)

    def _loss(self, o, targets):
        return F.cross_entropy(self._logits(o).flatten(0, 1), targets.flatten())


VARIANTS = {"backpack": Backpack, "transformer": Backpack, "dense": Dense}


def setup(s, variant):
    """What is measured of a variant: its model, batch() -> what step (training) and forward take, its device."""
    own = configure(TrainSettings, [s.config])[0]
    for key in ("dataset", "data_dir", "batch_size", "block_size", "n_sense"):
        if getattr(s, key) is not None:
            setattr(own, key, getattr(s, key))
    (data, _), meta = load_data(own)
    own.vocab_size = own.vocab_size or meta["vocab_size"]
    if len(data) <= own.block_size:
        raise UserError(f"{own.dataset} has {len(data)} tokens, block_size={own.block_size} needs more")
    own.n_sense = 0 if variant == "transformer" else own.n_sense
    device = pick_device(s.device)
    dtype, rng = pick_dtype(s.dtype, device), np.random.default_rng(0)
    try:
        model = VARIANTS[variant](BackpackConfig(**{key: getattr(own, key) for key in MODEL_KEYS}))
    except ValueError as error:
        raise UserError(str(error)) from None
    model.to(device)
    net = torch.compile(model) if s.compile and variant != "dense" else model
    optimizer = torch.optim.AdamW(model.param_groups(0.1), 1e-4, fused=device.type in ("cuda", "cpu"))

    def batch():
        x, y, distinct, _ = take(data, rng.integers(len(data) - own.block_size, size=own.batch_size), own, device)
        if s.compile:
            torch._dynamo.mark_dynamic(distinct[0], 0)
        return x, y, distinct

    def forward(x, y, distinct):
        with autocast(device, dtype):
            return net(x, y, distinct=distinct)[1]

    def step(x, y, distinct):
        forward(x, y, distinct).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(model=model, batch=batch, forward=torch.no_grad()(forward), step=step, device=device)


def seconds(device, function, *args):
    """How long function(*args) takes, the device's queue empty before and after."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    began = time.perf_counter()
    function(*args)
    wait()
    return time.perf_counter() - began


def interleaved(s, device, functions, arguments):
    """{name: seconds of each counted run}, the functions taking turns on the same arguments()."""
    times = {name: [] for name in functions}
    for i in range(s.warmup + s.runs):
        args = arguments()
        for name, function in functions.items():
            took = seconds(device, function, *args)
            if i >= s.warmup:
                times[name].append(took)
    return times


def recompute(model, idx, n):
    """Greedy generation with no cache: the whole prefix for every token; the last position's logits, for Dense all."""
    with torch.no_grad():
        for _ in range(n):
            o = model._output(idx)
            logits = model._logits(o if isinstance(model, Dense) else o[:, -1:])
            idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), 1)
    return idx


def peak_of(s, variant, queue):
    """In a process of its own: peak bytes of two training steps, and before them."""
    made = setup(s, variant)
    before = peak_memory(made.device)
    for _ in range(2):
        made.step(*made.batch())
    queue.put((before, peak_memory(made.device)))


def measure(s):
    """All figures, as a dictionary that can be written as JSON."""
    made = {variant: setup(s, variant) for variant in VARIANTS}
    one = made["backpack"]
    if not one.model.config.n_sense:
        raise UserError("n_sense=0 has no senses to measure: give a Backpack's config")
    x, _, distinct = one.batch()
    share = len(distinct[0]) / x.numel()
    flops = [flops_per_token(made[name].model, share) for name in ("backpack", "transformer")]
    result = {"device": str(one.device), "torch": torch.__version__, "threads": torch.get_num_threads(),
              "batch": list(x.shape), "distinct": len(distinct[0]), "flop floor": flops[0] / flops[1], "seconds": {}}
    for name in ("step", "forward"):
        functions = {variant: getattr(made[variant], name) for variant in VARIANTS}
        result["seconds"][name] = interleaved(s, one.device, functions, one.batch)
    T = x.size(1)
    if s.generate and T >= 16:
        prompt, n = x[:1, : T // 8], T - T // 8
        greedy = {v: partial(made[v].model.generate, prompt, n, temperature=0) for v in ("backpack", "transformer")}
        greedy |= {"recomputed": partial(recompute, one.model, prompt, n),
                   "dense": partial(recompute, made["dense"].model, prompt, n)}
        result["seconds"][f"generate {n}"] = interleaved(s, one.device, greedy, tuple)
    if s.memory:
        made.clear()
        spawn, result["bytes"] = multiprocessing.get_context("spawn"), {}
        for variant in VARIANTS:
            queue = spawn.Queue()
            process = spawn.Process(target=peak_of, args=(s, variant, queue))
            process.start()
            before, peak = queue.get()
            process.join()
            result["bytes"][variant] = {"before": before, "peak": peak}
    return result


def table(result):
    """The figures as lines of text: medians, and ratios of the Backpack to each other variant."""
    def ratio(times, other):
        return float(np.median(np.array(times["backpack"]) / np.array(times[other])))
    lines = [f"{result['device']}, torch {result['torch']}, {result['threads']} threads; batch {result['batch']}, "
             f"{result['distinct']} distinct tokens; FLOP floor of a step {result['flop floor']:.2f}"]
    for name, times in result["seconds"].items():
        lines.append(f"{name:14}" + "".join(f"  {v} {np.median(t) * 1e3:,.1f} ms" for v, t in times.items()))
        lines.append(" " * 14 + "".join(f"  backpack / {v} {ratio(times, v):.3f}" for v in times if v != "backpack"))
    for variant, found in result.get("bytes", {}).items():
        lines.append(f"peak memory of a step, {variant}: {found['peak'] / 1e9:.2f} GB, of it "
                     f"{(found['peak'] - found['before']) / 1e9:.2f} GB beyond what is held before the first step")
    return "\n".join(lines)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    result = measure(s)
    print(table(result))
    if s.json:
        with open(s.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    run(main)
