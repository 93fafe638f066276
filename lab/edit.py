"""Edits of senses: make, list, combine, and learn them. They change what a model says and leave its weights alone.

    python edits.py --edits=my.json --edit="scale nurse 10 0; swap MacBook: Apple -> HP"    adds two, lists all
    python edits.py --edits=my.json --remove=2                                             drops the second
    python edits.py --edits=my.json --teach=examples.jsonl      learns some vectors: {"prompt", "good", "bad"} a line
    python sample.py --edits=my.json --start="The nurse said that"

    scale WORD SENSE FACTOR            multiplies the weights of a sense (or of all) where WORD stands  (paper, 6.2)
    swap WORD: FROM -> TO              all that the senses of WORD say of FROM they say of TO (6.3)
    topic WORD[,WORD...] STRENGTH      senses that say these words get more weight, 1 to 3, annealed (6.1, app. D)
    replace WORD SENSE by WORD SENSE   a sense becomes another one; in a file also "vector": [...]

A word is one token, a space before it; "word" in double quotes is just what they enclose. A file is a JSON list of
edits, as --edit writes them. Vectors (swap, replace) come first, each upon those before it; then weights, which
multiply.
"""
import contextlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoints import CheckpointError, load_checkpoint
from configurator import UserError, configure, run
from devices import pick_device
from model import Backpack, Edits
from teach import other_text, read_examples, teach
from tokenizer import load_tokenizer, word_id, word_ids

FORMS = {"scale": "{word} {sense} {factor}", "swap": "{word}: {from} -> {to}", "topic": "{words} {strength}",
         "replace": "{word} {sense} by {by} {by_sense}"}  # an edit as text; in a file its words are the keys
STRENGTHS = {1: (1.5, 1.5, 1.3, 1.0), 2: (2.2, 2.2, 1.5, 1.0), 3: (3.3, 3.3, 3.0, 1.0)}  # weights of the quantiles
QUANTILES = (0.95, 0.8, 0.6)                                                           # ... from these on, and below


def parse(text):
    """Edits as text, with ; between them -> a list of dicts. Raises UserError."""
    found = []
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, rest = part.partition(" ")
        match = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>\\S+)", FORMS.get(name, "(?!)")), rest.strip())
        if not match:
            forms = "; ".join(f"{name} {form}".translate({123: None, 125: None}) for name, form in FORMS.items())
            raise UserError(f"edit {part!r}: expected one of: {forms}")
        found.append({"edit": name} | match.groupdict())
        for key in {"sense", "factor", "strength", "by_sense"} & match.groupdict().keys():
            with contextlib.suppress(ValueError):  # what stays text is "all", or refused by make_edits
                found[-1][key] = json.loads(match[key])
    return found


def describe(edit):
    """An edit as the text that parse reads; of a vector just its norm."""
    if "vector" in edit:
        return f"replace {edit['word']} {edit['sense']} by a vector of norm {np.linalg.norm(edit['vector']):.2f}"
    return f"{edit['edit']} {FORMS[edit['edit']].format(**edit)}"


def summary(edits):
    """A few edits in words, many as their number."""
    return "; ".join(map(describe, edits)) if len(edits) < 5 else f"{len(edits)} edits"


def read_edits(path):
    """The list of edits in a JSON file; without a path none. Raises UserError."""
    if not path:
        return []
    try:
        edits = json.loads(Path(path).read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or f'not JSON: {error}'}") from None
    edits = edits if isinstance(edits, list) else [edits]
    for n, edit in enumerate(edits, 1):
        name = edit.get("edit") if isinstance(edit, dict) else None
        need = re.findall(r"\{(\w+)\}", FORMS.get(name, ""))
        if name == "replace" and "vector" in edit:
            need = ["word", "sense", "vector"]
        if not need or set(need) - edit.keys():
            raise UserError(f"{path}, edit {n}: " + (f"{name} needs {', '.join(need)}" if need else
                            f"expected {{\"edit\": one of {', '.join(FORMS)}, ...}}"))
        for key in {"word", "words", "from", "to", "by"} & edit.keys():
            if not isinstance(edit[key], str):
                raise UserError(f"{path}, edit {n}: {key}={edit[key]!r} must be text")
    return edits


def make_edits(model, tokenizer, edits):
    """A list of edits -> Edits for model.edits, or None for none. Raises UserError for what doesn't fit the model."""
    K, E = model.config.n_sense, model.wte.weight.detach()
    if not edits:
        return None
    if not K:
        raise UserError("this run is a plain Transformer (n_sense=0): it has no senses to edit")

    def sense(edit, key="sense"):
        if type(edit[key]) is not int or not 0 <= edit[key] < K:
            raise UserError(f"{describe(edit)}: {key}={edit[key]!r} must be from 0 to {K - 1}")
        return edit[key]

    def number(edit, key, ok, what):
        if type(edit[key]) not in (int, float) or not ok(edit[key]):
            raise UserError(f"{describe(edit)}: {key}={edit[key]!r} must be {what}")
        return edit[key]

    with torch.no_grad():
        of_words = [(word_id(tokenizer, edit["word"]), edit) for edit in edits if edit["edit"] != "topic"]
        tokens = sorted({token for token, _ in of_words})
        index = {token: i for i, token in enumerate(tokens, 1)}

        def senses(ids):
            return model.sense_network(model.wte(torch.tensor(ids, device=E.device)))              # (n,K,D)

        scale, offset = E.new_ones(len(tokens) + 1, K), E.new_zeros(len(tokens) + 1, K, E.size(1))
        own = senses([0, *tokens])                                                                 # (n,K,D)

        def now(token):
            """Its senses (K,D), as the edits before have left them."""
            i = index.get(token)
            return senses([token])[0] if i is None else scale[i, :, None] * own[i] + offset[i]

        for token, edit in of_words:
            i = index[token]
            if edit["edit"] == "swap":
                words = (E[word_id(tokenizer, edit[key])] for key in ("from", "to"))
                scale[i], offset[i] = 0.0, swapped(now(token), *words)
            elif edit["edit"] == "replace":
                if "vector" in edit:
                    new = torch.as_tensor(edit["vector"], dtype=E.dtype, device=E.device)
                    if new.shape != E.shape[1:]:
                        raise UserError(f"{describe(edit)}: expected {E.size(1)} numbers, not {tuple(new.shape)}")
                else:
                    new = now(word_id(tokenizer, edit["by"]))[sense(edit, "by_sense")]
                scale[i, sense(edit)], offset[i, sense(edit)] = 0.0, new
        for token, edit in of_words:
            if edit["edit"] == "scale":
                which = slice(None) if edit["sense"] == "all" else sense(edit)
                factor = number(edit, "factor", lambda value: 0 <= value < np.inf, "a number, at least 0")
                scale[index[token], which] *= factor
                offset[index[token], which] *= factor
        w, f = E.new_zeros(0, model.config.vocab_size, K), E.new_zeros(0)                          # (m,V,K), (m,)
        for edit in edits:
            if edit["edit"] == "topic":
                strength = number(edit, "strength", lambda value: value in STRENGTHS, "1, 2 or 3")
                w = torch.cat([w, topic_weights(model, tokenizer, edit["words"], strength)[None]])
                f = torch.cat([f, E.new_tensor([max(STRENGTHS[strength]) / 7.5])])
        row = torch.zeros(model.config.vocab_size, dtype=torch.long, device=E.device)              # (V,)
        row[tokens] = torch.arange(1, len(tokens) + 1, device=E.device)
    return Edits(row=row, scale=scale, offset=offset, w=w, f=f)


def swapped(C, E_from, E_to):
    """Senses C (...,D) whose association with one word is turned into one with another (section 6.3).

    C + (C . E_r / |E_r|^2) (E_a / phi - E_r) with phi = |E_a|^2 / |E_r|^2, as the authors' code has it: where E_a and
    E_r are at right angles, the logit of a grows by what that of r was, and that of r is 0.
    """
    phi = E_to.square().sum() / E_from.square().sum()
    return C + (C @ E_from / E_from.square().sum())[..., None] * (E_to / phi - E_from)


@lru_cache(1)
@torch.no_grad()
def sense_peaks(model):
    """max over the vocabulary of E C(x)_l, (V,K): how loud the loudest word of each sense is."""
    ids = torch.arange(model.config.vocab_size, device=model.wte.weight.device)
    return torch.cat([model._logits(model.sense_network(model.wte(part))).amax(-1)
                      for part in tqdm(ids.split(64), "loudest word of each sense", leave=False, delay=2)])


@torch.no_grad()
def topic_weights(model, tokenizer, words, strength):
    """w (V,K) of a topic for Edits: senses by how loud they say the first token of each word (appendix D)."""
    E, ids = model.wte.weight, torch.arange(model.config.vocab_size, device=model.wte.weight.device)
    b = E[sorted({word_ids(tokenizer, word)[0] for word in words.split(",")})].sum(0)              # (D,)
    scores = torch.cat([model.sense_network(model.wte(part)) @ b for part in ids.split(1024)]) / sense_peaks(model)
    if tokenizer.end is not None:
        scores[tokenizer.end] = 0.0
    *weights, rest = STRENGTHS[strength]
    w = torch.full_like(scores, rest)                                                              # (V,K)
    for weight, quantile in list(zip(weights, QUANTILES))[::-1]:
        w[scores >= scores.flatten().quantile(quantile)] = weight
    return w


@dataclass
class Settings:
    out_dir: str = "out/shakespeare_char"  # the run: a folder of train.py, or a checkpoint file
    edits: str | None = None         # a JSON file of edits: listed, and written where it changes
    edit: str = ""                   # edits to add: "scale nurse 10 0; swap MacBook: Apple -> HP; topic sports 2"
    remove: int | None = None        # the number of an edit to take out
    teach: str | None = None         # learn vectors from a file of {"prompt", "good", "bad"} a line
    n_vector: int = 10               # how many
    enough: float = 0.5              # teaching stops when each good end has this probability
    max_kl: float = 0.002            # ... or before other text is changed by more than this, in nats a token
    kl_weight: float = 1.0           # of that in the loss
    elsewhere: float = 1000.0        # how much use in other text speaks against a vector
    learning_rate: float = 0.03
    steps: int = 150                 # at most
    dataset: str | None = None       # other text: its val.bin; None: of the run's dataset
    data_dir: str = "data"           # where it lies
    n_window: int = 64               # of that, this many windows
    seed: int = 1337
    device: str = "auto"             # auto, cpu, mps, cuda, cuda:N


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    for key, least in (("n_vector", 1), ("n_window", 2), ("steps", 1), ("max_kl", 0), ("learning_rate", 0)):
        if getattr(s, key) < least:
            raise UserError(f"{key}={getattr(s, key)} must be at least {least}")
    edits = read_edits(s.edits) if s.edits and Path(s.edits).exists() else []
    device, ckpt = pick_device(s.device), load_checkpoint(s.out_dir)
    model, tokenizer = Backpack.from_checkpoint(ckpt, device), load_tokenizer(ckpt["meta"]["tokenizer"])
    if s.remove is not None:
        if not 1 <= s.remove <= len(edits):
            raise UserError(f"remove={s.remove}: there are {len(edits)} edits")
        del edits[s.remove - 1]
    edits += parse(s.edit)
    make_edits(model, tokenizer, edits)  # refuses what doesn't fit
    if s.teach:
        examples, text = read_examples(s.teach), other_text(s, ckpt, s.n_window, device)
        edits += teach(model, tokenizer, examples, text, s)
    for n, edit in enumerate(edits, 1):
        print(f"{n:3}  {describe(edit)}" + (f", adds {edit['adds']}" if "adds" in edit else ""))
    if s.edits and (s.edit or s.teach or s.remove is not None):
        temporary = Path(s.edits + ".tmp")
        temporary.write_text("[" + ",\n ".join(json.dumps(edit, ensure_ascii=False) for edit in edits) + "]\n")
        temporary.replace(s.edits)


if __name__ == "__main__":
    run(main, CheckpointError)
