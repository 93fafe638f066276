"""A checkpoint as a folder for transformers, or in a published layout: what lab.convert --to= writes."""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from configurator import UserError
from files import expect, read_json, read_text, write_text
from lab.edit import describe, make_edits, read_edits
from lab.layouts import published_config, to_layout
from model import Backpack
from tokenizer import END, UNKNOWN, byte_characters, load_tokenizer, require, vocabulary_size

HERE = Path(__file__).parent
# copied as they are
CODE = (HERE.parent / "model.py", HERE / "control.py", HERE / "modeling_backpack.py")
# what only some exports write, or did in November 2026: --overwrite removes those of the export before
OPTIONAL = {"modeling_backpack.py", "control.py", "model.py", "weighted_sum.py", "checkpoints.py"}
OPTIONAL |= {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def cast(tensors, dtype):
    """The tensors with floating-point ones in a type given by name; "keep": as they are.

    UserError: some numbers are too large for it.
    """
    if dtype == "keep":
        return tensors
    wanted = getattr(torch, dtype)
    made = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in made.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name}: found numbers too large for dtype={dtype}: try --dtype=keep")
    return made


def export(s, ckpt, edits, metrics, dtype):
    """Write a checkpoint in the layout s.to into the folder s.dest, each file whole.

    edits: the list it came with; those of the file s.edits are added. metrics: its training's records.
    dtype: see cast. UserError: a package is missing, or the layout can't express the model.
    """
    dest, safetensors = Path(s.dest), require("safetensors.torch", f"--to={s.to}")
    edits = edits + read_edits(s.edits)
    if edits and s.to != "hf":
        raise UserError(f"--to={s.to} has no place for edits: --to=hf has")
    model, spec = Backpack.from_checkpoint(ckpt), ckpt["meta"]["tokenizer"]
    tokenizer = load_tokenizer(spec) if spec or edits else None
    if s.to == "hf":
        tensors, described = for_hf(ckpt, model, make_edits(model, tokenizer, edits), edits, dtype)
    else:
        rows = ckpt["source"].get("rows") or model.config.vocab_size
        tensors = to_layout(ckpt["model"], model.config, s.to, rows)
        described = published_config(model.config, s.to, rows)
    # safetensors refuses tensors that share memory
    tensors = {name: t.contiguous().clone() for name, t in cast(tensors, dtype).items()}
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as folder:
        folder = Path(folder)
        write_text(folder / "config.json", json.dumps(described, indent=1))
        weights = folder / "model.safetensors"
        try:
            safetensors.save_file(tensors, weights, metadata={"format": "pt"})
        except Exception as error:  # its class is the library's, also for a full disk
            reason = str(error).splitlines()[0]
            raise UserError(f"could not write {weights.name} for {dest} ({reason})") from None
        shutil.copymode(folder / "config.json", weights)  # safetensors makes it private
        generation = {}
        if tokenizer:
            generation = write_tokenizer(folder, tokenizer, model.config.block_size)
        if s.to == "hf":
            generation["max_length"] = model.config.block_size  # a pipeline's default goes beyond
            write_text(folder / "generation_config.json", json.dumps(generation, indent=1))
            write_text(folder / "README.md", card(Path(s.source), ckpt, model, edits, metrics))
            for path in CODE:
                write_text(folder / path.name, read_text(path))
        made = {file.name for file in folder.iterdir()}
        for name in OPTIONAL - made:
            (dest / name).unlink(missing_ok=True)
        for name in sorted(made):
            (folder / name).replace(dest / name)
    print(f"{dest}: {len(tensors)} tensors in the layout {s.to}")
    for edit in edits:
        print(f"  {describe(edit)}")


def for_hf(ckpt, model, made, edits, dtype):
    """(tensors, config.json) for transformers; made: the Edits of the list edits, or None."""
    state = dict(ckpt["model"])
    described = ckpt["config"] | {
        "model_type": "nanobackpack",
        "architectures": ["BackpackForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_backpack.BackpackConfig",
            "AutoModelForCausalLM": "modeling_backpack.BackpackForCausalLM",
            "AutoModelForSequenceClassification": "modeling_backpack.BackpackForSequenceClassification",
        },
        # the type to load as; a file in half precision still computes in float32, as sample.py does
        "dtype": "float32" if dtype == "keep" else dtype,
    }
    if made:
        state |= {f"edits.{name}": tensor for name, tensor in made.state_dict().items()}
        described["edits"] = {"rows": len(made.scale), "topics": len(made.f), "list": edits}
    return {f"backpack.{name}": tensor for name, tensor in state.items()}, described


# ---- tokenizer.json, both ways


def write_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json; returns the ids of the special tokens."""
    roles = ("eos_token", "bos_token", "pad_token") if tokenizer.end is not None else ()
    described = dict.fromkeys(roles, END) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_text(folder / "tokenizer.json", for_transformers(tokenizer))
    write_text(folder / "tokenizer_config.json", json.dumps(described, indent=1))
    return {f"{role}_id": tokenizer.end for role in roles}


def for_transformers(tokenizer):
    """The text of a tokenizer.json that gives the same ids."""
    tokenizers, spec = require("tokenizers", "--to=hf"), tokenizer.spec
    if spec["kind"] == "bpe":
        return json.dumps(spec["model"])
    if spec["kind"] == "char":
        ids = {char: i for i, char in enumerate(spec["chars"])}
        codec = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, UNKNOWN))
        each = tokenizers.Regex(r"[\s\S]")
        codec.pre_tokenizer = tokenizers.pre_tokenizers.Split(each, "isolated")
        codec.decoder = tokenizers.decoders.Fuse()
        return codec.to_str()
    ranks = tokenizer.codec._mergeable_ranks
    character = {byte: char for char, byte in byte_characters().items()}

    def text(token):
        return "".join(character[byte] for byte in token)

    merges = []  # the pairs that make the tokens, found by merging each again, lowest rank first
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pair_ranks.index(min(pair_ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((text(parts[0]), text(parts[1])))
    vocab = {text(token): rank for token, rank in ranks.items()} | {END: tokenizer.end}
    codec = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    codec.add_special_tokens([END])
    return codec.to_str()


def from_transformers(path, vocab_size):
    """The inverse: a tokenizer's spec from tokenizer.json. UserError: damaged, or any other tokenizer."""
    of_model = {"type": {"BPE", "WordLevel"}, "vocab": dict}
    try:
        parsed = read_json(path, {"model": of_model, "pre_tokenizer?": dict})
        vocab, first = parsed["model"]["vocab"], parsed.get("pre_tokenizer")
        if parsed["model"]["type"] == "WordLevel":
            expect([*vocab.values()], [int], f"{path}, vocab")
            spec = {"kind": "char", "chars": "".join(sorted(vocab, key=vocab.get))}
        else:
            # transformers may add these
            added = dict.fromkeys(("post_processor", "truncation", "padding"))
            spec = {"kind": "bpe", "model": parsed | added}
            # tiktoken, with which we read it, has GPT-2's words only
            words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
            if first != words | {"use_regex": True} or parsed.get("normalizer"):
                raise UserError(f"{path}: found other words, expected GPT-2's ByteLevel")
        size = vocabulary_size(spec, path)
        if size != vocab_size:
            raise UserError(f"{path}: found {size} tokens, expected {vocab_size} as in the weights")
    except UserError as error:
        raise UserError(f"{error}; --tokenizer=none imports without it") from None
    return spec


# ---- the model card

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [backpack]
---
"""

USE = """    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = tokenizer("The river", return_tensors="pt")
    output = model(**inputs, output_senses=True, output_contextualization=True)

Each token has sense vectors that don't depend on context, `output.senses`; the logits are linear in
their sum, weighted by `output.contextualization` (Hewitt et al., ACL 2023, arXiv 2305.16765).
`AutoModelForSequenceClassification` puts a new head, to be trained, on the sum at a text's last token.

**Limits**: the model says what its training text made likely, true or not, with the biases of that
text. It takes no more tokens at once than it has positions.
"""
RECIPE = ("init_from", "max_iters", "learning_rate", "schedule", "warmup_iters", "min_lr")
RECIPE += ("muon_lr", "weight_decay", "beta1", "beta2", "grad_clip", "dropout", "transformer_share")
RECIPE += ("init_std", "seed")
SIZES = ("train_tokens?", "val_tokens?", "documents?")  # of the data, in a checkpoint's meta


def card(path, ckpt, model, edits, metrics):
    """The text of README.md, from what the checkpoint and its metrics say."""
    c, source = model.config, ckpt["source"]
    meta = expect(ckpt["meta"], dict.fromkeys(SIZES, int), f"{path}, meta")
    expect(ckpt["settings"], {"tokens_per_step?": int, "dataset?": str}, f"{path}, settings")
    values = ckpt["config"] | ckpt["settings"]
    name = path.parent.name if path.is_file() else path.name
    kind = "Backpack" if c.n_sense else "Transformer"
    parts = [
        f"# {name}: a {kind} language model",
        f"**Network**: {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {c.n_sense} senses per "
        f"token, {c.block_size} positions, {c.vocab_size:,} tokens; {model.num_params():,} parameters.",
    ]
    if source.get("sha256"):
        files = ", ".join(f"{sha} ({file})" for file, sha in source["sha256"].items())
        parts.append(f"**Source**: {source['name']}, layout {source['layout']}; sha256 {files}")
    sizes = [meta.get(key.rstrip("?")) for key in SIZES]
    if None not in sizes and values.get("dataset"):
        train, val, documents = (f"{n:,}" for n in sizes)
        text = f"{train} tokens for training, {val} for validation, {documents} documents."
        parts.append(f"**Data**: {values['dataset']}, {text}")
    tokens = values.get("tokens_per_step")
    if ckpt["step"] and tokens:
        recipe = ", ".join(f"{key} {values[key]}" for key in RECIPE if key in values)
        parts.append(f"**Training**: {ckpt['step']:,} steps of {tokens:,} tokens; {recipe}.")
    losses = {r["step"]: r["val_loss"] for r in metrics if r.get("val_loss") is not None}
    if losses:
        every = -(-len(losses) // 12)
        steps = sorted({*list(losses)[::every], max(losses)})  # about 12, and the last
        figures = ", ".join(f"{losses[step]:.3f} ({step:,})" for step in steps)
        parts.append(f"**Validation loss** in nats per token (step): {figures}.")
    if edits:
        applied = "; ".join(map(describe, edits))
        parts.append(f"**Edits** of its senses, applied here: {applied}.")
    return HEADER + "\n\n".join([*parts, USE])
