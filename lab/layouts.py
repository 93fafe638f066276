"""Names of tensors in published checkpoints: Hugging Face's and Levanter's Backpacks, GPT-2, and the
authors' Lightning files. The layout "hf" is our own, which lab.convert writes for transformers."""

import torch

from configurator import UserError, short
from tokenizer import GPT2_SIZE

LAYOUTS = ("backpack-gpt2", "levanter", "gpt2", "lightning", "lightning-gpt2", "hf")
TRANSFORMERS = ("gpt2", "lightning-gpt2")  # the layouts without senses

# our modules with a matrix, and their names in Hugging Face's layouts and in Lightning's
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
MAKES_SENSES = ("sense_network.mlp_out.proj.weight", "sense_network.mlp_out.proj.bias")


def module_names(layout, n_layer):
    """Yield (our module, the layout's, whether its matrix is transposed) for all that have weights."""
    senses = layout not in TRANSFORMERS
    if layout.startswith("lightning"):
        yield from _lightning_names(n_layer, senses)
    else:
        yield from _hugging_face_names(n_layer, senses)


def _hugging_face_names(n_layer, senses):
    base = "backpack.gpt2_model." if senses else ""
    for name in ("wte", "wpe", "ln_f"):
        yield name, f"{base}{name}", False
    for i in range(n_layer):
        for name in ("ln_1", "ln_2"):
            yield f"blocks.{i}.{name}", f"{base}h.{i}.{name}", False
        for ours, (theirs, _) in BLOCK.items():
            yield f"blocks.{i}.{ours}", f"{base}h.{i}.{theirs}", True  # Conv1D: [in, out]
    if senses:
        for ours, (theirs, _) in SENSE_NETWORK.items():
            yield f"sense_network.{ours}", f"backpack.sense_network.{theirs}", "mlp" in ours
        yield "sense_qk", "backpack.sense_weight_net.c_attn", False  # a Linear: [out, in]


def _lightning_names(n_layer, senses):
    base = "model.transformer."
    gpt2 = f"{base}gpt2_model." if senses else base
    yield "wte", f"{gpt2}embeddings.word_embeddings", False
    yield "wpe", f"{gpt2}embeddings.position_embeddings", False
    # fused norms: each is stored with the sub-layer before it
    first_norms = [f"blocks.{i}.ln_1" for i in range(n_layer)] + ["ln_f"]
    yield first_norms[0], f"{gpt2}ln_0", False
    for i in range(n_layer):
        yield f"blocks.{i}.ln_2", f"{gpt2}layers.{i}.norm1", False
        yield first_norms[i + 1], f"{gpt2}layers.{i}.norm2", False
        for ours, (_, theirs) in BLOCK.items():
            yield f"blocks.{i}.{ours}", f"{gpt2}layers.{i}.{theirs}", False
    if senses:
        for ours, (_, theirs) in SENSE_NETWORK.items():
            yield f"sense_network.{ours}", f"{base}content_model.{theirs}", False
        yield "sense_qk", f"{base}contextualization_attn.Wqkv", False


def tensor_names(layout, n_layer):
    """Yield (our tensor, the layout's, whether it is transposed) for all."""
    for ours, theirs, transposed in module_names(layout, n_layer):
        yield f"{ours}.weight", f"{theirs}.weight", transposed
        if ours not in ("wte", "wpe"):
            yield f"{ours}.bias", f"{theirs}.bias", False


def aliases(layout):
    """{a second name of a tensor: its first}; a file may have either or both."""
    senses = layout not in TRANSFORMERS
    if layout.startswith("lightning"):
        first = "model.transformer." + ("gpt2_model." if senses else "") + "embeddings."
        found = {"model.lm_head.weight": f"{first}word_embeddings.weight"}
        for place in ("", "content_model.") if senses else ():
            for name in ("word_embeddings.weight", "position_embeddings.weight"):
                found[f"model.transformer.{place}embeddings.{name}"] = first + name
        return found
    base, found = "backpack.gpt2_model." if senses else "", {}
    if layout != "levanter":
        found["lm_head.weight"] = f"{base}wte.weight"
    if senses:
        found["backpack.word_embeddings.weight"] = f"{base}wte.weight"
        found["backpack.position_embeddings.weight"] = f"{base}wpe.weight"
    return found


def detect(tensors):
    """The layout of a dict of tensors, detected from their names. UserError: unknown or ambiguous."""
    if any(".contextualization_attn." in name for name in tensors):
        return "lightning"
    if "model.transformer.layers.0.mixer.Wqkv.weight" in tensors:
        return "lightning-gpt2"
    if "backpack.sense_weight_net.c_attn.weight" in tensors:
        if "lm_head.weight" in tensors:
            return "backpack-gpt2"
        if {"backpack.word_embeddings.weight", "backpack.gpt2_model.wte.weight"} <= tensors.keys():
            return "levanter"  # a re-save of Hugging Face's keeps only one of these names
        raise UserError(
            "these tensors may be Hugging Face's or Levanter's, which divides the sum of senses by "
            "their number: give --layout=backpack-gpt2 or --layout=levanter"
        )
    if any(name.endswith("h.0.attn.c_attn.weight") for name in tensors):
        return "gpt2"
    if "backpack.blocks.0.attn.qkv.weight" in tensors:
        return "hf"
    some = ", ".join(list(tensors)[:6])
    raise UserError(
        f"unknown layout: expected one of {', '.join(LAYOUTS)}; the first of {len(tensors)} "
        f"tensors are {some}"
    )


def to_ours(tensors, layout):
    """A layout's tensors -> (state_dict of Backpack, a report of what was renamed and dropped).

    UserError: a tensor is missing, is left over, or differs from the one it should repeat.
    """
    tensors, state = dict(tensors), {}
    report = {"renamed": 0, "transposed": [], "dropped": []}
    if layout == "hf":
        if "backpack.wte.weight" not in tensors:
            raise UserError("layout hf: backpack.wte.weight is missing")
        for name, tensor in tensors.items():
            if ".edits." in name:  # made again from the list of edits
                report["dropped"].append(name)
            else:
                state[name.removeprefix("backpack.")] = tensor
        return expect_dimensions(state, layout), report | {"renamed": len(state)}
    if layout == "gpt2":  # some files have this prefix
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    n_layer = sum(name.endswith((".attn.c_attn.weight", ".mixer.Wqkv.weight")) for name in tensors)
    for alias, first in aliases(layout).items():
        if alias in tensors:
            tensor = tensors.pop(alias)
            original = tensors.setdefault(first, tensor)
            if tensor.shape != original.shape or not torch.equal(tensor, original):
                raise UserError(f"{alias} should repeat {first}, but differs from it")
            report["dropped"].append(alias)
    for name in [name for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias"))]:
        del tensors[name]  # a causal mask
        report["dropped"].append(name)
    missing = []
    for ours, theirs, transposed in tensor_names(layout, n_layer):
        if theirs not in tensors:
            missing.append(theirs)
            continue
        tensor = tensors.pop(theirs)
        state[ours] = tensor.T.contiguous() if transposed else tensor
        if transposed:
            report["transposed"].append(theirs)
    problems = []
    for names, what in (
        (missing, "tensors missing"),
        (list(tensors), "found no place for tensors"),
    ):
        if names:
            problems.append(f"{what} ({len(names)}): {', '.join(names[:4])}")
    if problems:
        raise UserError(f"layout {layout}: {'; '.join(problems)}")
    expect_dimensions(state, layout)
    if layout == "levanter":  # its output is divided by K; dividing the senses is the same
        K = state["sense_network.mlp_out.proj.bias"].numel() // state["ln_f.bias"].numel()
        state |= {name: state[name] / K for name in MAKES_SENSES}
    return state, report | {"renamed": len(state)}


def expect_dimensions(state, layout):
    """state, if all that are matrices in ours are matrices, the others vectors. UserError: they aren't."""
    for name, tensor in state.items():
        vector = name.endswith(".bias") or "ln_" in name
        if tensor.dim() != (1 if vector else 2) or not tensor.numel():
            what = f"found {name} of shape {list(tensor.shape)}, expected a "
            raise UserError(f"layout {layout}: {what}{'vector' if vector else 'matrix'}")
    return state


def to_layout(state, config, layout, rows):
    """The inverse: a state_dict of Backpack and its BackpackConfig as a layout's tensors.

    rows: how many of the embeddings to write. UserError: the layout cannot express the config.
    """
    K = config.n_sense
    expressible = {
        "n_sense": bool(K) == (layout not in TRANSFORMERS),
        "bias": config.bias,
        "n_qk": not K or config.n_qk in (None, config.n_embd // K),
        "sense_mlp_ratio": not K or layout == "lightning" or config.sense_mlp_ratio == 4,
    }
    wrong = [f"{key}={getattr(config, key)}" for key, ok in expressible.items() if not ok]
    if wrong:
        raise UserError(f"the layout {layout} has no place for {', '.join(wrong)}: --to=hf has")
    if layout == "levanter":
        state = state | {name: state[name] * K for name in MAKES_SENSES}
    tensors = {}
    for ours, theirs, transposed in tensor_names(layout, config.n_layer):
        tensor = state[ours][:rows] if ours == "wte.weight" else state[ours]
        tensors[theirs] = tensor.T.contiguous() if transposed else tensor
    if layout != "gpt2":  # GPT-2's files have one E, and that is what transformers expects
        tensors |= {alias: tensors[first] for alias, first in aliases(layout).items()}
    return tensors


# ---- config.json

# n_head of the published sizes (n_layer, n_embd), as no tensor shows it
HEADS = {(6, 384): 6, (8, 640): 8, (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}


def infer_config(state, described, layout, n_head=None, n_sense=0, vocab_size=None):
    """The fields of BackpackConfig for a state_dict in our names and its source's config.json, described.

    n_head, vocab_size: None: from the source, or of the published sizes. n_sense: of new senses.
    UserError: the number of heads is unknown, or model.py has no such network.
    """
    for key, value in {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}.items():
        found = described.get(key, value)
        if found != value:
            raise UserError(f"{key}: found {short(found)}, expected {value!r}, as model.py has")
    rows, D = state["wte.weight"].shape
    n_layer = sum(name.endswith("attn.qkv.weight") for name in state)
    sizes = {"n_sense": n_sense}
    if "sense_qk.weight" in state:
        sizes["n_sense"] = len(state["sense_network.mlp_out.proj.bias"]) // D
        sizes["sense_mlp_ratio"] = len(state["sense_network.mlp.fc.bias"]) // D
        out_ratio = len(state["sense_network.mlp_out.fc.bias"]) // D
        sizes["sense_out_ratio"] = None if out_ratio == sizes["sense_mlp_ratio"] else out_ratio
    heads = n_head or described.get("n_head") or HEADS.get((n_layer, D))
    if not heads:
        raise UserError(f"no tensor shows the number of heads (width {D}): give --n_head")
    vocab = vocab_size or described.get("vocab_size") or rows
    if rows in (GPT2_SIZE, GPT2_SIZE + 7):  # padded to a multiple of 8, or not
        vocab = GPT2_SIZE
    return sizes | {
        "block_size": len(state["wpe.weight"]),
        "vocab_size": vocab,
        "n_layer": n_layer,
        "n_head": heads,
        "n_embd": D,
        "inverse_layer_scale": described.get("scale_attn_by_inverse_layer_idx", layout != "gpt2"),
    }


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
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    }
