"""A checkpoint as a folder for transformers, or in a published layout: what lab.convert --to= writes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch

from configurator import UserError, check
from lab.control import EditedBackpack, is_near, same_sum, some_ids
from lab.edits import describe, make_edits, read_edits
from lab.files import read_text, write_text
from lab.layouts import is_network_of_layouts, published_config, to_layout
from lab.tokenizer_json import for_transformers
from model import Backpack
from tokenizer import END, load_tokenizer, require

HERE = Path(__file__).parent


def cast(tensors, dtype):
    """The tensors with floating-point ones in a type given by name; "keep": as they are.

    UserError: some numbers are too large for it.
    """
    if dtype == "keep":
        return tensors
    made = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
            fits = tensor.isfinite().all()
            check(fits, f"{name}: found numbers too large for dtype={dtype}: try --dtype=keep")
        made[name] = tensor
    return made


def export(s, folder, ckpt, edits, metrics, dtype):
    """Write a checkpoint in the layout s.to into a new folder.

    edits: the list it came with; those of the file s.edits are added. metrics: the records of its
    training. dtype: see cast. UserError: a package is missing, or the layout can't express the model.
    """
    edits = edits + read_edits(s.edits)
    check(not edits or s.to == "hf", f"--to={s.to} has no place for edits: --to=hf has")
    model = Backpack.from_checkpoint(ckpt)
    tokenizer = load_tokenizer(ckpt["meta"]["tokenizer"])
    check(tokenizer or not edits, f"{s.source} has no tokenizer, which edits need")
    if s.to == "hf":
        fork = "this model.py sums senses otherwise than EditedBackpack.output in lab/control.py"
        check(same_sum(model), f"{fork}: an export needs the same there")
        saved = model.state_dict()
        for name, _ in model.named_buffers():  # transformers would load it as whatever lies in memory
            check(name in saved, f"the buffer {name} is not saved: register it with persistent=True")
        made = make_edits(model, tokenizer, edits)
        tensors, described = for_hf(ckpt, made, edits, dtype)
        if tokenizer:
            described |= special_ids(tokenizer)
    else:
        fork = "this model.py computes another network than the one that has this layout"
        check(is_network_of_layouts(model), f"{fork}: export it with --to=hf, which takes model.py along")
        rows = ckpt["source"].get("rows") or model.config.vocab_size
        tensors = to_layout(ckpt["model"], model.config, s.to, rows)
        described = published_config(model.config, s.to, rows)
    write_text(folder / "config.json", json.dumps(described, indent=1))
    write_tensors(folder / "model.safetensors", cast(tensors, dtype))
    if tokenizer:
        write_tokenizer(folder, tokenizer, model.config.block_size)
    if s.to == "hf":
        generation = {"max_length": model.config.block_size}  # a pipeline's default goes beyond
        if tokenizer:
            generation |= special_ids(tokenizer)
        write_text(folder / "generation_config.json", json.dumps(generation, indent=1))
        write_text(folder / "README.md", card(s, ckpt, model, tokenizer, edits, metrics))
        write_code(folder)
        compare_logits(folder, EditedBackpack(model, made), dtype)
    for edit in edits:
        print(f"with the edit {describe(edit)}")


def write_tensors(path, tensors):
    """Write a .safetensors file. UserError: the package is missing, or the disk is full."""
    safetensors = require("safetensors.torch", "writing weights for others")
    # it refuses tensors that share memory
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    try:
        safetensors.save_file(tensors, path, metadata={"format": "pt"})
    except Exception as error:  # its class is the library's, also for a full disk
        raise UserError(f"could not write {path.name}: {str(error).splitlines()[0]}") from None
    shutil.copymode(path.with_name("config.json"), path)  # safetensors makes it private


def write_code(folder):
    """Write the modules that transformers loads with the weights."""
    for path in (HERE.parent / "model.py", HERE / "control.py", HERE / "modeling_backpack.py"):
        # there they are one package
        text = read_text(path).replace("\nfrom model import", "\nfrom .model import")
        write_text(folder / path.name, text)


@torch.no_grad()
def compare_logits(folder, model, dtype):
    """Load an export as transformers does. UserError: it says something else than the model.

    The network is written once more in modeling_backpack.py, which a fork of model.py may not know of.
    """
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: the export's logits were not compared with the model's")
        return
    # modeling_backpack.py imports .model, as model.py lies beside it in the export
    sys.modules["lab.model"] = sys.modules["model"]
    from transformers.utils import logging

    from lab.modeling_backpack import BackpackForCausalLM

    logging.disable_progress_bar()
    exported = BackpackForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    idx = some_ids(model)
    own, _ = model(idx)  # (1,T,V)
    tolerance = 0.001 if dtype in ("keep", "float32") else 0.02  # bfloat16 has 3 digits
    same = is_near(own, exported(idx).logits, tolerance)
    fork = "this model.py computes another network than lab/modeling_backpack.py"
    check(same, f"the export's logits are not the model's: {fork}, so change that, too")


def for_hf(ckpt, made, edits, dtype):
    """(tensors, config.json) for transformers; made: the Edits of the list edits, or None."""
    tensors = {f"backpack.{name}": tensor for name, tensor in ckpt["model"].items()}
    vocab_size = ckpt["config"]["vocab_size"]
    tensors["backpack.wte.weight"] = tensors["backpack.wte.weight"][:vocab_size]  # without padding
    module = "modeling_backpack"
    described = ckpt["config"] | {
        "model_type": "nanobackpack",
        "architectures": ["BackpackForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.BackpackConfig",
            "AutoModel": f"{module}.BackpackModel",
            "AutoModelForCausalLM": f"{module}.BackpackForCausalLM",
            "AutoModelForSequenceClassification": f"{module}.BackpackForSequenceClassification",
        },
        # the type to load as; a file in half precision still computes in float32, as sample.py does
        "dtype": "float32" if dtype == "keep" else dtype,
    }
    if made:
        for name, tensor in made.state_dict().items():
            tensors[f"backpack.edits.{name}"] = tensor
        described["edits"] = {"rows": len(made.scale), "topics": len(made.f), "list": edits}
    return tensors, described


# -----------------------------------------------------------------------------
# the tokenizer


ROLES = ("eos_token", "bos_token", "pad_token")  # of the token that ends a document


def special_ids(tokenizer):
    """What config.json and generation_config.json say of special tokens; characters have none."""
    if tokenizer.end is None:
        return {}
    return {f"{role}_id": tokenizer.end for role in ROLES}


def write_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json."""
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.end is not None:
        described |= dict.fromkeys(ROLES, tokenizer.spec.get("end", END))
    write_text(folder / "tokenizer.json", for_transformers(tokenizer))
    write_text(folder / "tokenizer_config.json", json.dumps(described, indent=1))


# -----------------------------------------------------------------------------
# the model card

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [backpack]
{license}---
"""

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder!r}  # a path, or a name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer({prompt!r}, return_tensors="pt")
output = model(**inputs, output_senses=True, output_contextualization=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""

# of a model that came without a tokenizer
USE_IDS = """```python
import torch
from transformers import AutoModelForCausalLM

folder = {folder!r}  # a path, or a name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
input_ids = torch.tensor([[0, 1, 2]])
output = model(input_ids, output_senses=True, output_contextualization=True)
```
"""

ABOUT = """Each token has sense vectors that don't depend on context, `output.senses`; the logits are
linear in their sum, weighted by `output.contextualization` (Hewitt et al., ACL 2023, arXiv 2305.16765).
`AutoModelForSequenceClassification` puts a new head, to be trained, on the sum at a text's last token.

**Limits**: the model says what its training text made likely, true or not, with the biases of that
text. It takes no more tokens at once than it has positions.
"""

# settings of train.py that a card names
RECIPE = ("init_from", "max_iters", "learning_rate", "schedule", "warmup_iters", "min_lr")
RECIPE += ("muon_lr", "weight_decay", "beta1", "beta2", "grad_clip", "dropout")
RECIPE += ("transformer_share", "init_std", "seed")


def use(folder, tokenizer):
    """The lines of Python that load a folder and call the model."""
    if tokenizer is None:
        return USE_IDS.format(folder=folder)
    prompt = "The river"
    if tokenizer.spec["kind"] == "char":  # others might be unknown
        prompt = tokenizer.spec["chars"][-6:]
    return USE.format(folder=folder, prompt=prompt)


def card(s, ckpt, model, tokenizer, edits, metrics):
    """The text of README.md, from what a checkpoint and the records of its training say."""
    path = Path(s.source)
    c = model.config
    source = ckpt["source"]
    meta = ckpt["meta"]
    settings = ckpt["config"] | ckpt["settings"]
    name = path.parent.name if path.is_file() else path.name
    kind = "Backpack" if c.n_sense else "Transformer"
    parts = [
        f"# {name}: a {kind} language model",
        f"**Network**: {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {c.n_sense} senses "
        f"per token, {c.block_size} positions, {c.vocab_size:,} tokens; "
        f"{model.num_params():,} parameters.",
    ]
    if "sha256" in source:
        files = ", ".join(f"{sha} ({file})" for file, sha in source["sha256"].items())
        parts.append(f"**Source**: {source['name']}, layout {source['layout']}; sha256 {files}")
    if "train_tokens" in meta and "dataset" in settings:
        parts.append(
            f"**Data**: {settings['dataset']}, {meta['train_tokens']:,} tokens for training, "
            f"{meta['val_tokens']:,} for validation, {meta['documents']:,} documents."
        )
    if ckpt["step"] and "tokens_per_step" in settings:
        recipe = ", ".join(f"{key} {settings[key]}" for key in RECIPE if key in settings)
        tokens = settings["tokens_per_step"]
        parts.append(f"**Training**: {ckpt['step']:,} steps of {tokens:,} tokens; {recipe}.")
    losses = {record["step"]: record["val_loss"] for record in metrics if "val_loss" in record}
    if losses:
        every = len(losses) // 12 + 1
        shown = {*list(losses)[::every], max(losses)}  # about 12, and the last
        figures = ", ".join(f"{losses[step]:.3f} ({step:,})" for step in sorted(shown))
        parts.append(f"**Validation loss** in nats per token (step): {figures}.")
    if edits:
        applied = "; ".join(describe(edit) for edit in edits)
        parts.append(f"**Edits** of its senses, applied here: {applied}.")
    license = f"license: {s.license}\n" if s.license else ""
    header = HEADER.format(license=license)
    return header + "\n\n".join([*parts, use(Path(s.dest).name, tokenizer) + ABOUT])
