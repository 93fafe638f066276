"""What the machine offers a run and what a run needs of it: device, number type, peak speed, memory."""
import re
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from configurator import UserError
from model import Backpack

# dense 16-bit FLOP/s by the vendors' data sheets; the first name that occurs in the device's name counts
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "A10G": 70e12, "A10": 125e12, "A6000": 155e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "V100": 112e12, "T4": 65e12, "MI300X": 1307e12}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name):
    """torch.device for "auto" (cuda, else mps, else cpu) or a name. Raises UserError for one that is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in have if have[kind])
    kind, _, index = name.partition(":")
    if kind not in have or (index and not index.isdigit()):
        raise UserError(f"device={name!r}: expected auto, cpu, mps, cuda or cuda:N")
    if not have[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device={name!r}: this machine has no such device; --device=auto takes what there is")
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)  # set_device wants an index


def pick_dtype(name, device):
    """Number type of matrix products for "auto" (16 bits on a GPU: bfloat16 where it is native) or a name."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in DTYPES:
        raise UserError(f"dtype={name!r}: expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device, dtype):
    """The device's peak FLOP/s in a 16-bit type, or None where we don't know it."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device):
    """Most bytes held so far: of the GPU by this process, or by the process in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return 0
    if sys.platform == "linux":  # getrusage, below, counts what the parent process held, too
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flops_per_token(model, distinct_share):
    """FLOPs of a training step per token at full context by part: 2 for each product forward, twice as many backward.

    distinct_share: distinct tokens over all, of those that senses are computed for at once.
    """
    c, pairs = model.config, (model.config.block_size + 1) / 2           # positions that a query sees, on average
    size = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}

    def weights(part):
        return sum(size[name] for name in size if name.startswith(part))

    n = {"Transformer": weights("blocks") + 2 * c.n_layer * c.n_embd * pairs}
    if c.n_sense:
        n["sense network"] = distinct_share * weights("sense_network")
        n["alpha and sum"] = weights("sense_qk") + c.n_sense * (model.n_qk + c.n_embd) * pairs
    n["logits and loss"] = c.vocab_size * c.n_embd
    return {part: 3 * 2 * products for part, products in n.items()}


def memory_need(config, batch_size, dtype, n_distinct, accumulates=False):
    """(parameters, bytes of weights + gradients + AdamW's two moments, bytes kept for backward by a micro-batch).

    n_distinct: how many different tokens the senses are computed for; accumulates: for several micro-batches.
    The last is counted on fake tensors, which allocate nothing: all that autograd saves in a forward pass. What kernels
    need for a moment comes on top.
    """
    kept, summed = {}, 0

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        model = Backpack(config)
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, autocast(torch.device("cpu"), dtype):
            senses = None
            if config.n_sense:
                senses = model.senses(torch.zeros(n_distinct, dtype=torch.long)).float(), idx
                summed = accumulates * senses[0].nbytes
            model(idx, idx, senses=senses)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
    n = model.num_params()
    return n, 16 * n, summed + sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
