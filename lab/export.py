"""A run as a folder for transformers or in a published layout: what convert.py --to= writes."""
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from checkpoints import load_checkpoint
from configurator import UserError
from edits import describe, make_edits, read_edits
from layouts import to_layout
from model import Backpack
from tokenizer import END, for_transformers, load_tokenizer, require

BESIDE = ("model.py", "weighted_sum.py", "checkpoints.py", "modeling_backpack.py")  # as they are


def export(s, dtype=None):
    """Write the run s.out_dir in the layout s.to into the folder s.dest, whole or not at all. Raises UserError."""
    run, dest, safetensors = Path(s.out_dir), Path(s.dest), require("safetensors.torch", "--to")
    ckpt = load_checkpoint(run)
    if (dest / "ckpt.pt").exists():
        raise UserError(f"{dest} has a run: give another --dest")
    if dest.is_dir() and any(dest.iterdir()) and not s.overwrite:
        raise UserError(f"{dest} is not empty: --overwrite=True replaces what an export writes there")
    if s.edits and s.to != "hf":
        raise UserError(f"the layout {s.to} has no place for edits: --to=hf has")
    model, spec, state = Backpack.from_checkpoint(ckpt), ckpt["meta"]["tokenizer"], ckpt["model"]
    listed = read_edits(s.edits)
    tokenizer = load_tokenizer(spec) if spec or listed else None
    if edits := make_edits(model, tokenizer, listed):
        state = state | {f"edits.{name}": tensor for name, tensor in edits.state_dict().items()}
    if s.to == "hf":
        tensors = {f"backpack.{name}": tensor for name, tensor in state.items()}
        described = asdict(model.config) | {
            "model_type": "nanobackpack", "architectures": ["BackpackForCausalLM"],
            "dtype": s.dtype if dtype else "float32",  # to load as, whatever it is in the file: as from_checkpoint does
            "auto_map": {"AutoConfig": "modeling_backpack.BackpackConfig",
                         "AutoModelForCausalLM": "modeling_backpack.BackpackForCausalLM"}}
        if listed:
            described["edits"] = {"rows": len(edits.scale), "topics": len(edits.f), "list": listed}
    else:
        rows = ckpt["config"].get("source_rows", model.config.vocab_size)
        tensors = to_layout(state, model.config, s.to, rows)
        described = {theirs: getattr(model.config, ours) for theirs, ours in (
            ("n_layer", "n_layer"), ("n_head", "n_head"), ("n_embd", "n_embd"), ("n_positions", "block_size"),
            ("num_senses", "n_sense"), ("scale_attn_by_inverse_layer_idx", "inverse_layer_scale"))}
        described |= {"model_type": s.to, "layout": s.to, "vocab_size": rows, "activation_function": "gelu_new",
                      "layer_norm_epsilon": 1e-5,
                      "sense_intermediate_scale": model.config.sense_out_ratio or model.config.sense_mlp_ratio}
    tensors = {name: (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous().clone()
               for name, tensor in tensors.items()}
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as folder:
        folder = Path(folder)
        safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(described, indent=1))
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which safetensors makes private
        ends = write_tokenizer(folder, tokenizer, model.config.block_size) if tokenizer else {}
        if s.to == "hf":
            (folder / "generation_config.json").write_text(json.dumps(ends, indent=1))
            (folder / "README.md").write_text(card(run, ckpt, model, listed))
            for name in BESIDE:
                shutil.copy(Path(__file__).parent / name, folder)
        dest.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            file.replace(dest / file.name)
    print(f"{dest}: {len(tensors)} tensors in the layout {s.to}" + "".join(f"\n  {describe(edit)}" for edit in listed))


def write_tokenizer(folder, tokenizer, block_size):
    """tokenizer.json and tokenizer_config.json for transformers; returns the ids of its special tokens."""
    roles = ("eos_token", "bos_token", "pad_token") if tokenizer.end is not None else ()
    (folder / "tokenizer.json").write_text(for_transformers(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(roles, END) | {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left",
        "model_max_length": block_size, "model_input_names": ["input_ids", "attention_mask"]}, indent=1))
    return {f"{role}_id": tokenizer.end for role in roles}


def card(run, ckpt, model, edits):
    """The model card's text, from what the run says of itself."""
    config, meta, c, evaluated = ckpt["config"], ckpt["meta"], model.config, []
    if (run / "metrics.jsonl").exists():
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        evaluated = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        evaluated = evaluated[:: -(-len(evaluated) // 12) or 1] + evaluated[-1:]
    parts = [f"# {run.name}: a Backpack language model" if c.n_sense else f"# {run.name}: a Transformer language model",
             f"**Network**: {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {c.n_sense} senses per token, "
             f"{c.block_size} positions, {c.vocab_size:,} tokens; {model.num_params():,} parameters."]
    if config.get("source_sha256"):
        parts.append(f"**Source**: {config['source']}, layout {config['source_layout']}; sha256 " + ", ".join(
            f"{sha} ({file})" for file, sha in config["source_sha256"].items()))
    if "train_tokens" in meta:
        parts.append(f"**Data**: {config['dataset']}, {meta['train_tokens']:,} tokens to train, {meta['val_tokens']:,} "
                     f"to validate, {meta['documents']:,} documents.")
    if ckpt["step"]:
        recipe = ("init_from", "max_iters", "learning_rate", "schedule", "warmup_iters", "min_lr", "weight_decay",
                  "beta1", "beta2", "grad_clip", "dropout", "transformer_share", "init_std", "seed")
        parts.append(f"**Training**: {ckpt['step']:,} steps of {config['tokens_per_step']:,} tokens; "
                     + ", ".join(f"{key} {config[key]}" for key in recipe if key in config) + ".")
    if evaluated:
        parts.append("**Validation loss**, nats a token, by step: " + ", ".join(
            f"{loss:.3f} ({step:,})" for step, loss in dict(evaluated).items()) + ".")
    if edits:
        parts.append("**Edits** of its senses, applied here: " + "; ".join(map(describe, edits)) + ".")
    return CARD + "\n\n".join(parts) + USE


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [backpack]
---
"""

USE = """

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    found = model(**tokenizer("The river", return_tensors="pt"), output_senses=True, output_contextualization=True)

Each token has sense vectors that depend on nothing else, `found.senses`; the logits are linear in their sum with the
weights `found.contextualization` (Hewitt et al., ACL 2023, arXiv 2305.16765).

**Limits**: it says what its training text made likely, true or not, with the biases of that text. It takes no more
tokens at once than it has positions.
"""
