"""What a Backpack costs beside its own Transformer and the paper's dense formula: one process, the same real tokens.

    python bench.py --config=config/backpack_micro.py --dataset=NAME --batch_size=8 --runs=7 --json=bench.json

Variants run in turn; figures are medians of --runs after --warmup, ratios the median of the ratios run by run. The FLOP
floor is the ratio if every FLOP of the formulas took the same time.
"""
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from batches import load_data, take
from checkpoints import CheckpointError, load_checkpoint
from configurator import UserError, configure, run
from devices import autocast, flops_per_token, peak_flops, peak_memory, pick_device, pick_dtype
from model import Backpack, BackpackConfig
from train import MODEL_KEYS, accumulate, transformer_share
from train import Settings as TrainSettings


@dataclass
class Settings:
    config: str = "config/shakespeare_char.py"  # the network and the dataset: a config file, or a run
    dataset: str | None = None       # None: the config's
    data_dir: str = "data"
    batch_size: int | None = None    # sequences of a micro-batch; None: the config's
    block_size: int | None = None    # None: the config's
    n_sense: int | None = None       # None: the config's
    dropout: float = 0.0             # whatever the config's
    accum: int = 1                   # micro-batches of a training step, which share senses
    runs: int = 7
    warmup: int = 2
    dense: bool = True               # also the dense formula and, for generation, recomputing the prefix: slow
    generate: int = 1                # sequences generated at once, each as long as the context; 0: no generation
    memory: bool = True              # also the peak memory of training steps, in a new process for each variant
    device: str = "auto"             # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"              # float32, bfloat16, float16; auto: 16 bits on a GPU
    compile: bool = False            # torch.compile for training steps
    json: str | None = None          # also write the figures to this file
    profile: str | None = None       # write torch's trace of a Backpack's step to this file; nothing else is measured


class Dense(Backpack):
    """The paper's formula as it is written: senses at every position, a (B,K,T,D) product, whole logits, no cache."""

    def _sum(self, h, idx, mask=None, cache=None, senses=None):
        return (self._alpha(*self._qk(h), mask) @ self.senses(idx).transpose(1, 2)).sum(1)         # (B,K,T,D), (B,T,D)

    def _loss(self, o, targets):
        return F.cross_entropy(self._logits(o).flatten(0, 1), targets.flatten())


def setup(s, variant):
    """What is measured of a variant: its model, batch() -> what step (training) and forward take, its device."""
    a_file = s.config.endswith(".py")
    own, _ = configure(TrainSettings, [s.config] if a_file else [])
    given = {k: getattr(s, k) for k in ("dataset", "data_dir", "batch_size", "block_size", "dropout", "n_sense")}
    known = ({} if a_file else load_checkpoint(s.config)["config"]) | {k: v for k, v in given.items() if v is not None}
    vars(own).update(known | ({"n_sense": 0} if variant == "transformer" else {}))
    (data, _), meta = load_data(own)
    own.vocab_size = own.vocab_size or meta["vocab_size"]
    if len(data) <= own.block_size:
        raise UserError(f"{own.dataset} has {len(data)} tokens, block_size={own.block_size} needs more")
    device = pick_device(s.device)
    dtype, rng = pick_dtype(s.dtype, device), np.random.default_rng(0)
    amp = autocast(device, dtype)
    try:
        model = (Dense if variant == "dense" else Backpack)(BackpackConfig(**{k: getattr(own, k) for k in MODEL_KEYS}))
    except ValueError as error:
        raise UserError(str(error)) from None
    net = torch.compile(model.to(device)) if s.compile and variant != "dense" else model.to(device)
    optimizer = torch.optim.AdamW(model.param_groups(0.1), 1e-4, fused=device.type in ("cuda", "cpu"))

    def batch():
        return take(data, rng.integers(len(data) - own.block_size, size=(s.accum, own.batch_size)), own, device)[:3]

    def forward(x, y, distinct):
        with torch.no_grad(), amp:
            model(x[0], y[0], senses=(model.senses(distinct[0]), distinct[1][0]) if variant == "backpack" else None)

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def step(x, y, distinct):
        accumulate(net, model, x, y, distinct if variant == "backpack" else None, amp, lambda loss: loss / s.accum,
                   transformer_share=transformer_share(own, 0))
        update()
    return SimpleNamespace(**locals())


def seconds(device, function, *args):
    """How long function(*args) takes, the device's queue empty before and after."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    began = time.perf_counter()
    function(*args)
    wait()
    return time.perf_counter() - began


def interleaved(s, functions, arguments=tuple):
    """{name: what each counted run returned}: the functions, which return seconds, take turns on the same arguments."""
    times, order = {name: [] for name in functions}, list(functions)
    for _ in range(s.warmup + s.runs):
        args = arguments()
        for name in order:
            times[name].append(functions[name](*args))
        order.reverse()  # none always comes after the same other one
    return {name: runs[s.warmup :] for name, runs in times.items()}


def parts(s, one):
    """{part of a training step of the Backpack: (FLOPs per token, seconds forward and backward, measured alone)}"""
    model, (x, y, (ids, where)) = one.model, one.batch()
    flops = flops_per_token(model, len(ids) / x.numel()) | {"clip and AdamW": 0}
    x, y, where = x[0], y[0], where[0]                                                             # (B,T)
    with torch.no_grad(), one.amp:
        h, C = model._hidden(x)[0], model.senses(ids).float()                                      # (B,T,D), (U,K,D)
    def alone(function, *inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with one.amp:
            out = function(*inputs)
        out.backward(torch.ones_like(out))
    functions, updates = {"Transformer": (lambda: model._hidden(x)[0],), "sense network": (lambda: model.senses(ids),),
                          "alpha and sum": (lambda h, C: model._sum(h, x, senses=(C, where)), h, C),
                          "logits and loss": (lambda o: model._loss(o, y), h)}, []
    times = interleaved(s, {name: partial(seconds, one.device, alone, *part) for name, part in functions.items()},
                        lambda: updates.append(seconds(one.device, one.update)) or ())
    times["clip and AdamW"] = [*updates[1:], seconds(one.device, one.update)]  # the first had no gradients
    often = {"sense network": 1, "clip and AdamW": 1}  # in a step; the others in every micro-batch
    return {name: (flops[name], float(np.median(t)) * often.get(name, s.accum)) for name, t in times.items()}


def generation(s, made):
    """Greedy continuation of T/8 tokens to T: seconds per token of each variant, the Backpack's also by position."""
    model, device, amp = made["backpack"].model, made["backpack"].device, made["backpack"].amp
    x = made["backpack"].batch()[0][0]
    x, T = x[torch.arange(s.generate) % len(x)], x.size(1)
    n, tables = T - T // 8, []
    with amp:
        building = seconds(device, lambda: tables.append(model.sense_table()))

    def cached(model, table=None):
        stream = model.stream(x[:, : T // 8], n, temperature=0, sense_table=table)
        with amp:
            return [seconds(device, next, stream) for _ in range(n)]

    @torch.no_grad()
    def recomputed(model):
        first = 0 if isinstance(model, Dense) else -1  # the logits of all positions, or of the last
        with amp:
            return [seconds(device, lambda t=t: model._logits(model._output(x[:, :t])[0][:, first:]).argmax(-1))
                    for t in np.linspace(T // 8, T - 1, 16).astype(int)]
    variants = {"backpack": partial(cached, model, tables[0]), "senses token by token": partial(cached, model),
                "transformer": partial(cached, made["transformer"].model)}
    if s.dense:
        variants |= {"recomputed": partial(recomputed, model), "dense": partial(recomputed, made["dense"].model)}
    times = {name: np.array(runs) for name, runs in interleaved(s, variants).items()}  # (runs, positions)
    early, late = (float(np.median(times["backpack"][:, at - T // 8 - T // 64 : at - T // 8 + T // 64 + 1]))
                   for at in (T * 100 // 512, T * 500 // 512))
    return {name: runs.mean(1).tolist() for name, runs in times.items()}, {
        "tokens": n, "sequences": s.generate, "late / early": late / early, "table seconds": building,
        "table GB": sum(table.nbytes for table in tables if table is not None) / 1e9}


def peak_of(s, variant):
    """In a process of its own: peak bytes of two training steps; what import, weights, gradients, AdamW don't take."""
    made = setup(s, variant)
    held = peak_memory(made.device) + 12 * made.model.num_params()
    for _ in range(2):
        made.step(*made.batch())
    return peak_memory(made.device), peak_memory(made.device) - held


def measure(s):
    """All figures, as a dictionary that can be written as JSON."""
    made = {name: setup(s, name) for name in ("backpack", "transformer", "dense")[: 2 + s.dense]}
    names, one = list(made), made["backpack"]
    if not one.model.config.n_sense:
        raise UserError("n_sense=0 has no senses to measure: give a Backpack's config")
    (x, _, (ids, _)), times = one.batch(), {}
    flops = [sum(flops_per_token(made[name].model, len(ids) / x.numel()).values()) for name in names[:2]]
    result = {"device": str(one.device), "dtype": str(one.dtype), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "batch": list(x.shape), "distinct": len(ids),
              "flop floor": flops[0] / flops[1], "seconds": times, "parts": parts(s, one)}
    for name in ("step", "forward"):
        for other in names[1:]:  # in pairs: what comes after the dense formula, which frees much memory, is slower
            pair = {v: partial(seconds, one.device, getattr(made[v], name)) for v in ("backpack", other)}
            times[f"{name}, {other}"] = interleaved(s, pair, one.batch)
    if peak := peak_flops(one.device, one.dtype):
        took = [np.median(runs) for runs in times["step, transformer"].values()]
        result["mfu"] = {v: f * x.numel() / t / peak for v, f, t in zip(names, flops, took)}
    if s.generate and x.size(2) >= 64:
        times["token"], result["generation"] = generation(s, made)
    if s.memory:
        made.clear()
        for variant in names:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                result.setdefault("bytes", {})[variant] = process.submit(peak_of, s, variant).result()
    return result


def table(result):
    """The figures as lines of text: medians, and ratios of the Backpack to each other variant."""
    lines = ["{device}, {dtype}, torch {torch}, {threads} threads\nstep: {batch} (micro-steps, sequences, tokens), "
             "{distinct} distinct tokens, FLOP floor {flop floor:.3f}".format(**result)]
    for name, times in result["seconds"].items():
        ratios = {v: np.median(np.array(times["backpack"]) / np.array(t)) for v, t in times.items() if v != "backpack"}
        lines += [f"{name:18}" + "".join(f"  {v} {np.median(t) * 1e3:,.1f} ms" for v, t in times.items()),
                  " " * 18 + "".join(f"  backpack / {v} {ratio:.3f}" for v, ratio in ratios.items())]
    if made := result.get("generation"):
        lines += ["token: mean of {tokens}, {sequences} sequences at once; at 500/512 of the context {late / early:.2f}"
                  " of the time at 100/512; sense table {table GB:.2f} GB in {table seconds:.1f} s".format(**made)]
    flops, took = (sum(part) for part in zip(*result["parts"].values()))
    lines += [f"{part:16} {f / 1e6:9.2f} MFLOP a token, {f / flops:5.1%}  {t * 1e3:9,.1f} ms alone, {t / took:5.1%}"
              for part, (f, t) in result["parts"].items()]
    lines += [f"mfu of {variant} {mfu:.1%}" for variant, mfu in result.get("mfu", {}).items()]
    for variant, (peak, beyond) in (memory := result.get("bytes", {})).items():
        lines += [f"peak memory, {variant}: {peak / 1e9:.2f} GB, activations {beyond / 1e9:.2f} GB; backpack's"
                  f" are {memory['backpack'][0] / peak:.3f}, {memory['backpack'][1] / beyond:.3f} of these"]
    return "\n".join(lines)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    if s.profile:
        one = setup(s, "backpack")
        one.step(*one.batch())
        with torch.profiler.profile() as trace:
            one.step(*one.batch())
        trace.export_chrome_trace(s.profile)
        return print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
    print(table(result := measure(s)))
    if s.json:
        Path(s.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main, CheckpointError)
