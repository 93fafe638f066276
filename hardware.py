"""The machine: choice of a device and a number type, and what a network costs there in FLOPs and memory."""

import re
import sys
from pathlib import Path
from typing import Literal

import torch

from configurator import UserError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def pick_device(name):
    """The torch.device of a name; "auto": cuda, else mps, else cpu. UserError: there is none such."""
    mps = torch.backends.mps.is_available()
    have = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in have if have[kind])
    kind, _, index = name.partition(":")
    if kind not in have or (index and not index.isdigit()):
        raise UserError(f"device={name!r}: expected auto, cpu, mps, cuda or cuda:N")
    if not have[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        hint = "--device=auto picks one that it has"
        raise UserError(f"device={name!r}: this machine has no such device; {hint}")
    # with an index, which torch.cuda.set_device needs
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)


def pick_dtype(name, device):
    """The number type of matrix products; "auto": on a GPU 16 bits, bfloat16 if it has that natively."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return getattr(torch, name)


def autocast(device, dtype):
    """A context in which matrix products are in this number type."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- FLOPs

# dense 16-bit TFLOP/s from the vendors' data sheets; the first name found in the device's name applies
PEAK_TFLOPS = """B200 2250, H200 989, H100 NVL 835, H100 PCIe 756, H100 989, A100 312, L40S 362, L40 181, \
L4 121, A10G 70, A10 125, A6000 155, RTX 6000 Ada 364, RTX 5090 210, RTX 4090 165, RTX 3090 71, \
V100-SXM2 125, V100 112, T4 65, MI300X 1307"""


def peak_flops(device, dtype):
    """The device's peak FLOP/s in a 16-bit type; None: unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    for entry in PEAK_TFLOPS.split(", "):
        name, tflops = entry.rsplit(" ", 1)
        if name in torch.cuda.get_device_name(device):
            return 1e12 * float(tflops)
    return None


def flops_per_token(model, distinct_share, losses=1):
    """{part: FLOPs of a training step per token}; distinct_share: distinct tokens over all.

    losses: how many a step has; with transformer_share two.
    """
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
    products["logits and loss"] = losses * size["wte.weight"]
    return {part: 3 * 2 * n for part, n in products.items()}


# ---- memory


def activation_bytes(model, n_tokens, n_distinct, device, dtype, losses=1):
    """What autograd keeps from forward to backward of a micro-batch, in bytes, without grad_checkpoint.

    n_tokens, n_distinct: of the micro-batch; losses: 2 with transformer_share. An estimate.
    """
    c, a = model.config, dtype.itemsize  # a: bytes of a number in matrix products
    D, K, T = c.n_embd, c.n_sense, c.block_size
    norm, mask = 4 * D, (D if c.dropout else 0)  # the input of a norm is float32; a mask is bool
    # of each block: inputs of 2 norms; normed x (1), q, k, v (3), y (1), normed x (1), MLP (4 + 4)
    token = c.n_layer * (2 * norm + 14 * a * D + 2 * mask) + 2 * norm
    distinct = 0
    if K:
        token += a * (2 * K * model.n_qk + D)  # q, k and their input
        inner = c.sense_mlp_ratio + (c.sense_out_ratio or c.sense_mlp_ratio)
        distinct = 3 * norm + 3 * mask + a * D * (2 + 2 * inner + K)  # the two MLPs, C
    if device.type == "cpu" and c.dropout:  # there attention keeps its weights, and more
        token += 13 * c.n_layer * c.n_head * T
    if device.type == "cpu" and K and T <= 128:  # and sum_senses in one block the weights of senses
        token += 8 * K * T
    loss = losses * (4 * model.wte.weight.numel() + a * D * n_tokens)  # gradients of E and o
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    copies = a * (matrices - model.wte.weight.numel()) if a < 4 else 0  # weights in 16 bits
    return n_tokens * token + n_distinct * distinct + loss + copies


def peak_memory(device):
    """The most bytes this process has used so far, on the GPU, or else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return 0
    if sys.platform == "linux":  # getrusage, below, also counts what the parent process held
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if peak:
            return 1024 * int(peak[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
