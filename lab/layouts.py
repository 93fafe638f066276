"""
Names of tensors in published checkpoints: the Backpacks of Hugging Face and Levanter, GPT-2, the files of
the paper's authors (by PyTorch Lightning), and nanoGPT's. The layout "hf" is our own, which lab.convert
writes for transformers: our names after "backpack.".
"""

import torch

from configurator import UserError, check
from lab import reference
from lab.control import is_near

LAYOUTS = ("backpack-gpt2", "levanter", "gpt2", "lightning", "lightning-gpt2", "hf")
READ_ONLY = ("nanogpt",)
WITHOUT_SENSES = ("gpt2", "lightning-gpt2", "nanogpt")

# our modules that have a matrix: their names in Hugging Face's layouts, and in Lightning's
BLOCK = {
    "attn.qkv": ("attn.c_attn", "mixer.Wqkv"),
    "attn.proj": ("attn.c_proj", "mixer.out_proj"),
    "mlp.fc": ("mlp.c_fc", "mlp.fc1"),
    "mlp.proj": ("mlp.c_proj", "mlp.fc2"),
}
SENSE_NETWORK = {
    "ln_0": ("ln", "ln_0"),
    "ln_1": ("block.ln_1", "layers.0.norm1"),
    "ln_2": ("block.ln_2", "layers.0.norm2"),
    "mlp.fc": ("block.mlp.c_fc", "layers.0.mlp.fc1"),
    "mlp.proj": ("block.mlp.c_proj", "layers.0.mlp.fc2"),
    "mlp_out.fc": ("final_mlp.c_fc", "final_mlp.fc1"),
    "mlp_out.proj": ("final_mlp.c_proj", "final_mlp.fc2"),
}
# the output of Levanter's model is divided by the number of senses; dividing these does the same
MAKES_SENSES = ("sense_network.mlp_out.proj.weight", "sense_network.mlp_out.proj.bias")


# -----------------------------------------------------------------------------
# names


def module_names(layout, n_layer):
    """Yield (our module, the layout's, whether its matrix is transposed) for all that have weights."""
    with_senses = layout not in WITHOUT_SENSES
    if layout.startswith("lightning"):
        yield from lightning_names(n_layer, with_senses)
    else:
        for ours, theirs, is_conv1d in hugging_face_names(n_layer, with_senses):
            yield ours, theirs, is_conv1d and layout != "nanogpt"  # which has Linear throughout


def hugging_face_names(n_layer, with_senses):
    """See module_names. Conv1D keeps its matrix as (in,out), Linear as (out,in)."""
    base = "backpack.gpt2_model." if with_senses else ""
    for name in ("wte", "wpe", "ln_f"):
        yield name, f"{base}{name}", False
    for i in range(n_layer):
        for name in ("ln_1", "ln_2"):
            yield f"blocks.{i}.{name}", f"{base}h.{i}.{name}", False
        for ours, (theirs, _) in BLOCK.items():
            yield f"blocks.{i}.{ours}", f"{base}h.{i}.{theirs}", True
    if with_senses:
        for ours, (theirs, _) in SENSE_NETWORK.items():
            is_conv1d = "mlp" in ours
            yield f"sense_network.{ours}", f"backpack.sense_network.{theirs}", is_conv1d
        yield "sense_qk", "backpack.sense_weight_net.c_attn", False


def lightning_names(n_layer, with_senses):
    """See module_names."""
    base = "model.transformer."
    gpt2 = f"{base}gpt2_model." if with_senses else base
    yield "wte", f"{gpt2}embeddings.word_embeddings", False
    yield "wpe", f"{gpt2}embeddings.position_embeddings", False
    # norms are fused with the sub-layer before them, and stored there
    first_norms = [f"blocks.{i}.ln_1" for i in range(n_layer)] + ["ln_f"]
    yield first_norms[0], f"{gpt2}ln_0", False
    for i in range(n_layer):
        yield f"blocks.{i}.ln_2", f"{gpt2}layers.{i}.norm1", False
        yield first_norms[i + 1], f"{gpt2}layers.{i}.norm2", False
        for ours, (_, theirs) in BLOCK.items():
            yield f"blocks.{i}.{ours}", f"{gpt2}layers.{i}.{theirs}", False
    if with_senses:
        for ours, (_, theirs) in SENSE_NETWORK.items():
            yield f"sense_network.{ours}", f"{base}content_model.{theirs}", False
        yield "sense_qk", f"{base}contextualization_attn.Wqkv", False


def tensor_names(layout, n_layer, with_bias=True):
    """Yield (our tensor, the layout's, whether it is transposed) for all."""
    for ours, theirs, transposed in module_names(layout, n_layer):
        yield f"{ours}.weight", f"{theirs}.weight", transposed
        if with_bias and ours not in ("wte", "wpe"):
            yield f"{ours}.bias", f"{theirs}.bias", False


def aliases(layout):
    """{a second name of a tensor: its first}; a file may have either or both."""
    with_senses = layout not in WITHOUT_SENSES
    first = {ours: f"{theirs}.weight" for ours, theirs, _ in module_names(layout, 0)}
    wte = first["wte"]
    wpe = first["wpe"]
    if layout == "lightning":
        base = "model.transformer."
        return {
            "model.lm_head.weight": wte,
            f"{base}embeddings.word_embeddings.weight": wte,
            f"{base}embeddings.position_embeddings.weight": wpe,
            f"{base}content_model.embeddings.word_embeddings.weight": wte,
            f"{base}content_model.embeddings.position_embeddings.weight": wpe,
        }
    if layout == "lightning-gpt2":
        return {"model.lm_head.weight": wte}
    found = {}
    if layout != "levanter":
        found["lm_head.weight"] = wte
    if with_senses:
        found["backpack.word_embeddings.weight"] = wte
        found["backpack.position_embeddings.weight"] = wpe
    return found


def detect(tensors):
    """The layout of a dict of tensors, by their names. UserError: unknown or ambiguous."""
    if any(".contextualization_attn." in name for name in tensors):
        return "lightning"
    if "model.transformer.layers.0.mixer.Wqkv.weight" in tensors:
        return "lightning-gpt2"
    if "backpack.sense_weight_net.c_attn.weight" in tensors:
        if "lm_head.weight" in tensors:
            return "backpack-gpt2"
        # a safetensors file that was saved from Hugging Face's keeps only one of these two names
        if {"backpack.word_embeddings.weight", "backpack.gpt2_model.wte.weight"} <= tensors.keys():
            return "levanter"
        raise UserError(
            "these tensors may be Hugging Face's or Levanter's, which divides the sum of senses by "
            "their number: give --layout=backpack-gpt2 or --layout=levanter"
        )
    for name, tensor in tensors.items():
        if name.endswith("h.0.attn.c_attn.weight"):
            rows, columns = expect_dimensions("a matrix", tensor).shape
            return "gpt2" if rows < columns else "nanogpt"  # (D,3D) of Conv1D, (3D,D) of Linear
    if "backpack.blocks.0.attn.qkv.weight" in tensors:
        return "hf"
    layouts = ", ".join(LAYOUTS)
    some = ", ".join(list(tensors)[:6])
    raise UserError(f"unknown layout: expected one of {layouts}; the first tensors are {some}")


# -----------------------------------------------------------------------------
# tensors


def to_ours(tensors, layout):
    """A layout's tensors -> (state_dict of Backpack, names of the tensors that were dropped).

    UserError: a tensor is missing, is left over, is a vector instead of a matrix, or differs from the
    one it should repeat.
    """
    if layout == "hf":
        return from_hf(tensors)
    tensors = dict(tensors)
    if layout in ("gpt2", "nanogpt"):
        # some files have these prefixes, the first one from torch.compile
        tensors = {
            name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor
            for name, tensor in tensors.items()
        }
    dropped = []
    for alias, first in aliases(layout).items():
        if alias in tensors:
            tensor = tensors.pop(alias)
            repeated = tensors.setdefault(first, tensor)
            same = tensor.shape == repeated.shape and torch.equal(tensor, repeated)
            check(same, f"{alias} should repeat {first}, but differs from it")
            dropped.append(alias)
    masks = [name for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias"))]
    for name in masks:
        del tensors[name]
    dropped += masks

    state = {}
    missing = []
    n_layer = sum(name.endswith((".attn.c_attn.weight", ".mixer.Wqkv.weight")) for name in tensors)
    with_bias = layout != "nanogpt" or "ln_f.bias" in tensors
    for ours, theirs, transposed in tensor_names(layout, n_layer, with_bias):
        if theirs not in tensors:
            missing.append(theirs)
            continue
        tensor = expect_dimensions(ours, tensors.pop(theirs))
        state[ours] = tensor.T.contiguous() if transposed else tensor
    check(not missing, f"layout {layout}: missing tensors ({len(missing)}): {first_few(missing)}")
    left = list(tensors)
    check(not left, f"layout {layout}: no place for tensors ({len(left)}): {first_few(left)}")
    if layout == "levanter":
        K = state["sense_network.mlp_out.proj.weight"].size(0) // state["wte.weight"].size(1)
        for name in MAKES_SENSES:
            state[name] = state[name] / K
    return state, dropped


def from_hf(tensors):
    """to_ours for our own layout, whose names are those of the modules, also of a fork's new ones."""
    check("backpack.wte.weight" in tensors, "layout hf: backpack.wte.weight is missing")
    expect_dimensions("wte.weight", tensors["backpack.wte.weight"])
    state = {}
    dropped = []
    for name, tensor in tensors.items():
        if name == "lm_head.weight":  # E again, where a tool saved both
            tied = torch.equal(tensor, tensors["backpack.wte.weight"])
            check(tied, f"layout hf: {name} is not backpack.wte.weight, with which a Backpack ties it")
            dropped.append(name)
        elif name.startswith("backpack.edits."):  # made again from the list of edits
            dropped.append(name)
        else:
            state[name.removeprefix("backpack.")] = tensor
    return state, dropped


def first_few(names):
    return ", ".join(names[:4])


def expect_dimensions(name, tensor):
    """tensor, if it has as many dimensions as ours of this name. UserError: it has not."""
    is_vector = name.endswith(".bias") or "ln_" in name
    kind = "vector" if is_vector else "matrix"
    fits = tensor.numel() and tensor.dim() == (1 if is_vector else 2)
    check(fits, f"{name}: found shape {list(tensor.shape)}, expected a {kind}")
    return tensor


def to_layout(state, config, layout, rows):
    """The inverse: a state_dict of Backpack and its BackpackConfig as a layout's tensors.

    rows: how many rows of the embedding to write. UserError: the layout has no place for the network.
    """
    K = config.n_sense
    hint = "--to=hf has"
    names = list(tensor_names(layout, config.n_layer))
    ours = {name for name, _, _ in names}
    differing = sorted(ours ^ state.keys())
    sizes = f"n_sense={K}, bias={config.bias}"
    what = f"a network with {sizes}, which differs in {first_few(differing)}"
    check(not differing, f"the layout {layout} has no place for {what}: {hint}")
    same = not K or config.n_qk in (None, config.n_embd // K)
    check(same, f"the layout {layout} has no place for n_qk={config.n_qk}: {hint}")
    ratio = config.sense_mlp_ratio
    same = not K or layout == "lightning" or ratio == 4
    check(same, f"the layout {layout} has no place for sense_mlp_ratio={ratio}: {hint}")
    if layout == "levanter":
        state = state | {name: state[name] * K for name in MAKES_SENSES}
    tensors = {}
    for ours, theirs, transposed in names:
        tensor = state[ours]
        if ours == "wte.weight":
            tensor = tensor[:rows]
        tensors[theirs] = tensor.T.contiguous() if transposed else tensor
    if layout != "gpt2":  # GPT-2's files have one E, which is what transformers expects
        for alias, first in aliases(layout).items():
            tensors[alias] = tensors[first]
    return tensors


# -----------------------------------------------------------------------------
# config.json

GPT2_ROWS = (50257, 50264, 50304)  # GPT-2's tokens, and padded to a multiple of 8, or of 64 (nanoGPT)

# n_head of the published sizes (n_layer, n_embd), as no tensor shows it
HEADS = {(6, 384): 6, (8, 640): 8, (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}

# whether GELU is exact, by the names of transformers
GELU = {"gelu_new": False, "gelu_pytorch_tanh": False, "gelu": True}

# settings of others that model.py has no choice of
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def infer_config(state, described, layout, n_head=None, n_sense=0):
    """Fields of BackpackConfig, from a state_dict in our names and what its config.json says, described.

    n_head: None: the source's, or that of the published sizes. n_sense: of new senses. UserError: the
    number of heads is unknown, or model.py has no such network.
    """
    for key, value in FIXED.items():
        found = described.get(key, value)
        check(found == value, f"{key}: found {found!r}, expected {value!r}, as model.py has")
    activation = described.get("activation_function", "gelu" if layout == "nanogpt" else "gelu_new")
    known = ", ".join(GELU)
    check(activation in list(GELU), f"activation_function: found {activation!r}, expected one of {known}")
    rows, D = state["wte.weight"].shape
    n_layer = sum(name.endswith("attn.qkv.weight") for name in state)
    n_head = n_head or described.get("n_head") or HEADS.get((n_layer, D))
    check(n_head, f"no tensor shows the number of heads (width {D}): give --n_head")
    scaled = described.get("scale_attn_by_inverse_layer_idx", layout not in ("gpt2", "nanogpt"))
    config = {
        "block_size": len(state["wpe.weight"]),
        "vocab_size": described.get("vocab_size") or rows,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": D,
        "n_sense": n_sense,
        "inverse_layer_scale": scaled,
        "bias": "ln_f.bias" in state,
        "exact_gelu": GELU[activation],
    }
    if "sense_qk.weight" in state:
        config["n_sense"] = len(state["sense_network.mlp_out.proj.bias"]) // D
        ratio = len(state["sense_network.mlp.fc.bias"]) // D
        out_ratio = len(state["sense_network.mlp_out.fc.bias"]) // D
        config["sense_mlp_ratio"] = ratio
        config["sense_out_ratio"] = None if out_ratio == ratio else out_ratio
    return config


def published_config(config, layout, rows):
    """config.json with the keys of the published ones."""
    return {
        "model_type": layout,
        "layout": layout,
        "vocab_size": rows,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "num_senses": config.n_sense,
        "sense_intermediate_scale": config.sense_out_ratio or config.sense_mlp_ratio,
        "scale_attn_by_inverse_layer_idx": config.inverse_layer_scale,
        "activation_function": "gelu" if config.exact_gelu else "gelu_new",
        **FIXED,
    }


@torch.no_grad()
def is_network_of_layouts(model):
    """Whether a Backpack is the network that the published layouts are of. A fork's need not be."""
    V = model.config.vocab_size
    ids = torch.linspace(0, V - 1, min(8, model.config.block_size)).long()  # (T,)
    own, _ = model(ids[None])  # (1,T,V)
    return is_near(reference.logits(ids.tolist(), model.state_dict(), model.config), own[0])
