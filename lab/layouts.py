"""Names of tensors in published checkpoints: Hugging Face, Levanter, GPT-2, the authors' Lightning; and what convert.py
--to=hf makes."""
import torch

from configurator import UserError

LAYOUTS = ("backpack-gpt2", "levanter", "gpt2", "lightning", "lightning-gpt2", "hf")
TRANSFORMERS = ("gpt2", "lightning-gpt2")  # of these, those without senses


def names(layout, n_layer, senses):
    """[(our module, the layout's, whether its matrix is transposed)] of everything that has weights."""
    if layout.startswith("lightning"):
        base = "model.transformer." + ("gpt2_model." if senses else "")
        yield "wte", f"{base}embeddings.word_embeddings", False
        yield "wpe", f"{base}embeddings.position_embeddings", False
        yield ("blocks.0.ln_1" if n_layer else "ln_f"), f"{base}ln_0", False
        for i in range(n_layer):  # fused norms belong to the sub-layer before
            block, theirs = f"blocks.{i}", f"{base}layers.{i}"
            yield f"{block}.ln_2", f"{theirs}.norm1", False
            yield (f"blocks.{i + 1}.ln_1" if i + 1 < n_layer else "ln_f"), f"{theirs}.norm2", False
            for ours, other in (("attn.qkv", "mixer.Wqkv"), ("attn.proj", "mixer.out_proj"), ("mlp.fc", "mlp.fc1"),
                                ("mlp.proj", "mlp.fc2")):
                yield f"{block}.{ours}", f"{theirs}.{other}", False
        content = "model.transformer.content_model."
        for ours, other in (("ln_0", "ln_0"), ("ln_1", "layers.0.norm1"), ("ln_2", "layers.0.norm2"),
                            ("mlp.fc", "layers.0.mlp.fc1"), ("mlp.proj", "layers.0.mlp.fc2"),
                            ("mlp_out.fc", "final_mlp.fc1"), ("mlp_out.proj", "final_mlp.fc2")) if senses else ():
            yield f"sense_network.{ours}", content + other, False
        if senses:
            yield "sense_qk", "model.transformer.contextualization_attn.Wqkv", False
        return
    base = "backpack.gpt2_model." if senses else ""
    yield from (("wte", f"{base}wte", False), ("wpe", f"{base}wpe", False), ("ln_f", f"{base}ln_f", False))
    matrices = ("mlp.fc", "mlp.c_fc"), ("mlp.proj", "mlp.c_proj")
    for i in range(n_layer):
        for ours, other in (("ln_1", "ln_1"), ("ln_2", "ln_2")):
            yield f"blocks.{i}.{ours}", f"{base}h.{i}.{other}", False
        for ours, other in (("attn.qkv", "attn.c_attn"), ("attn.proj", "attn.c_proj"), *matrices):
            yield f"blocks.{i}.{ours}", f"{base}h.{i}.{other}", True  # Conv1D: [in, out]
    if senses:
        for ours, other in (("ln_0", "ln"), ("ln_1", "block.ln_1"), ("ln_2", "block.ln_2")):
            yield f"sense_network.{ours}", f"backpack.sense_network.{other}", False
        for ours, other in ((a, f"block.{b}") for a, b in matrices):
            yield f"sense_network.{ours}", f"backpack.sense_network.{other}", True
        for ours, other in (("mlp_out.fc", "final_mlp.c_fc"), ("mlp_out.proj", "final_mlp.c_proj")):
            yield f"sense_network.{ours}", f"backpack.sense_network.{other}", True
        yield "sense_qk", "backpack.sense_weight_net.c_attn", False


def parameters(layout, n_layer, senses):
    """[(our tensor, the layout's, whether it is transposed)] of all."""
    for ours, theirs, transposed in names(layout, n_layer, senses):
        yield f"{ours}.weight", f"{theirs}.weight", transposed
        if ours not in ("wte", "wpe"):
            yield f"{ours}.bias", f"{theirs}.bias", False


def aliases(layout, senses):
    """{a tensor that a layout writes again: where it stands already}; a file may have them or not."""
    if layout.startswith("lightning"):
        base = "model.transformer." + ("gpt2_model." if senses else "") + "embeddings."
        again = ["model.transformer.", "model.transformer.content_model."] if senses else []
        found = {f"{place}embeddings.{kind}_embeddings.weight": f"{base}{kind}_embeddings.weight"
                 for place in again for kind in ("word", "position")}
        return found | {"model.lm_head.weight": f"{base}word_embeddings.weight"}
    base = "backpack.gpt2_model." if senses else ""
    found = {"lm_head.weight": f"{base}wte.weight"} if layout != "levanter" else {}
    return found | ({"backpack.word_embeddings.weight": f"{base}wte.weight",
                     "backpack.position_embeddings.weight": f"{base}wpe.weight"} if senses else {})


def detect(tensors):
    """The layout of a dictionary of tensors, by their names. Raises UserError where these leave it open."""
    if any(".contextualization_attn." in name for name in tensors):
        return "lightning"
    if "model.transformer.layers.0.mixer.Wqkv.weight" in tensors:
        return "lightning-gpt2"
    if "backpack.sense_weight_net.c_attn.weight" in tensors:
        if "lm_head.weight" in tensors:
            return "backpack-gpt2"
        if {"backpack.word_embeddings.weight", "backpack.gpt2_model.wte.weight"} <= tensors.keys():
            return "levanter"  # a re-save of Hugging Face's keeps one of its names
        raise UserError("these tensors may be Hugging Face's or Levanter's, whose sum of senses is divided by their "
                        "number: say --layout=backpack-gpt2 or --layout=levanter")
    if any(name.endswith("h.0.attn.c_attn.weight") for name in tensors):
        return "gpt2"
    if "backpack.blocks.0.attn.qkv.weight" in tensors:
        return "hf"
    raise UserError(f"unknown layout: expected one of {', '.join(LAYOUTS)}; the first of {len(tensors)} tensors are "
                    f"{', '.join(list(tensors)[:6])}")


def to_ours(tensors, layout):
    """A layout's tensors as a state_dict of Backpack; a report {"renamed", "transposed", "dropped"}. Raises UserError
    for a tensor that is missing, left over, or unlike what it should repeat."""
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    tensors, state, report = dict(tensors), {}, {"renamed": 0, "transposed": [], "dropped": []}
    if layout == "hf":
        if "backpack.wte.weight" not in tensors:
            raise UserError("layout hf: backpack.wte.weight is missing")
        report["dropped"] = [name for name in tensors if ".edits." in name]
        state = {name.removeprefix("backpack."): t for name, t in tensors.items() if ".edits." not in name}
        return state, report | {"renamed": len(state)}
    senses = layout not in TRANSFORMERS
    if layout == "gpt2":  # some files have this prefix
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    n_layer = sum(name.endswith((".attn.c_attn.weight", ".mixer.Wqkv.weight")) for name in tensors)
    for again, first in aliases(layout, senses).items():
        if (tensor := tensors.pop(again, None)) is not None:
            if tensor.shape != (other := tensors.get(first, tensor)).shape or not torch.equal(tensor, other):
                raise UserError(f"{again} should repeat {first}, but is something else")
            report["dropped"].append(again)
            tensors.setdefault(first, tensor)
    masks = [name for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias"))]
    report["dropped"] += [name for name in masks if tensors.pop(name) is not None]
    missing = []
    for ours, theirs, transposed in parameters(layout, n_layer, senses):
        if (tensor := tensors.pop(theirs, None)) is None:
            missing.append(theirs)
            continue
        state[ours] = tensor.T.contiguous() if transposed else tensor
        report["transposed"] += [theirs] if transposed else []
    report["renamed"] = len(state)
    if missing or tensors:
        raise UserError(f"layout {layout}: " + "; ".join(
            f"{len(some)} tensors {what}: {', '.join(list(some)[:4])}" for some, what in
            ((missing, "missing"), (tensors, "too many")) if some))
    return state, report


def to_layout(state, config, layout, rows):
    """The other way: a state_dict of Backpack and its BackpackConfig as a layout's tensors, embeddings cut to `rows`.
    Raises UserError for what a layout can't say."""
    K, found = config.n_sense, {}
    if wrong := [f"{key}={getattr(config, key)}" for key, fits in (
            ("n_sense", bool(K) == (layout not in TRANSFORMERS)), ("bias", config.bias),
            ("n_qk", not K or config.n_qk in (None, config.n_embd // K)),
            ("sense_mlp_ratio", not K or layout == "lightning" or config.sense_mlp_ratio == 4),
            ("sense_mean", not K or config.sense_mean == (layout == "levanter"))) if not fits]:
        raise UserError(f"the layout {layout} has no place for {', '.join(wrong)}: --to=hf has")
    for ours, theirs, transposed in parameters(layout, config.n_layer, K > 0):
        tensor = state[ours][:rows] if ours == "wte.weight" else state[ours]
        found[theirs] = tensor.T.contiguous() if transposed else tensor
    again = aliases(layout, K > 0) if layout != "gpt2" else {}  # GPT-2's files have one E, and transformers wants that
    return found | {name: found[first] for name, first in again.items()}
