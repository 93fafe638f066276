"""Edits of senses: list, add, remove and learn them. They leave the weights of the model alone.

    python -m lab.edit --edits=my.json --edit="scale river 4 0; swap Chicago: Illinois -> Texas"
    python -m lab.edit --edits=my.json                         lists all, numbered
    python -m lab.edit --edits=my.json --remove=2              drops the second
    python -m lab.edit --edits=my.json --teach=examples.jsonl  learns a few vectors (lab/teach.py)
    python sample.py --edits=my.json --start="He was born in Chicago,"

    scale WORD SENSE FACTOR           multiplies the weight of a sense (or "all") of WORD (paper, 6.2)
    swap WORD: FROM -> TO             what the senses of WORD say of FROM, they say of TO (6.3)
    topic WORD[,WORD...] STRENGTH     gives more weight to senses that say these words: 1 to 3 (6.1)
    replace WORD SENSE by WORD SENSE  replaces one sense by another; in a file also by a "vector"

A WORD is one token and gets a space before it; "WORD" in double quotes is taken as it is. A file is
a JSON list of edits. Swaps and replacements come first, in order; then weights are multiplied.
"""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import UserError, configure, run
from lab.control import STRENGTHS, Edits, sense_peaks, swapped, topic_weights
from lab.teach import read_examples, teach, validation_windows
from sample import open_run
from tokenizer import word_id, word_ids

FORMS = {  # an edit as text; in a file, the names in braces are its keys
    "scale": "{word} {sense} {factor}",
    "swap": "{word}: {from} -> {to}",
    "topic": "{words} {strength}",
    "replace": "{word} {sense} by {by} {by_sense}",
}


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    edits: str | None = None  # a JSON file of edits: listed, and written when it changes
    edit: str = ""  # to add: "scale river 4 0; swap Chicago: Illinois -> Texas; topic sports 2"
    remove: int | None = None  # the number of an edit to remove
    teach: str | None = None  # learn vectors from a file of {"prompt", "good", "bad"}, one per line
    n_vector: int = 10  # how many to learn
    enough: float = 0.5  # stop teaching when every good continuation has this probability
    max_kl: float = 0.002  # ... or before other text changes by more than this, in nats per token
    kl_weight: float = 1.0  # weight of that change in the loss
    elsewhere: float = 1000.0  # how strongly use in other text speaks against a vector
    learning_rate: float = 0.03  # of Adam, in teaching
    steps: int = 150  # at most
    dataset: str | None = None  # other text comes from its val.bin; None: the run's own dataset
    data_dir: str = "data"  # where datasets lie
    n_window: int = 64  # windows of other text
    seed: int = 1337  # of all that is drawn
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N


def parse(text):
    """Edits as text, separated by ; -> a list of dicts. UserError: one that can't be read."""
    edits = []
    for part in re.split(r';(?=(?:[^"]*"[^"]*")*[^"]*$)', text):  # not in double quotes
        part = part.strip()
        if not part:
            continue
        name, _, rest = part.partition(" ")
        pattern = re.sub(r"\{(\w+)\}", r'(?P<\1>"[^"]+"|\\S+)', FORMS.get(name, ""))
        match = re.fullmatch(pattern, rest.strip())
        if name not in FORMS or not match:
            forms = "; ".join(f"{name} {form}" for name, form in FORMS.items())
            forms = forms.replace("{", "").replace("}", "")
            raise UserError(f"edit {part!r}: expected one of: {forms}")
        edit = {"edit": name} | match.groupdict()
        for key in {"sense", "factor", "strength", "by_sense"} & edit.keys():
            # what stays text is "all" or refused by make_edits
            with contextlib.suppress(ValueError):
                edit[key] = json.loads(edit[key])
        edits.append(edit)
    return edits


def describe(edit):
    """An edit as the text that parse reads; of a vector only its norm."""
    if "vector" in edit:
        norm = math.hypot(*edit["vector"])
        return f"replace {edit['word']} {edit['sense']} by a vector of norm {norm:.2f}"
    return f"{edit['edit']} {FORMS[edit['edit']].format(**edit)}"


def summary(edits):
    """A few edits as text; more as their number."""
    return "; ".join(map(describe, edits)) if len(edits) < 5 else f"{len(edits)} edits"


def read_edits(path):
    """The list of edits in a JSON file; [] without a path. UserError: no such file, or bad edits."""
    if not path:
        return []
    try:
        edits = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    edits = edits if isinstance(edits, list) else [edits]
    for n, edit in enumerate(edits, 1):
        name = edit.get("edit") if isinstance(edit, dict) else None
        if name not in FORMS:
            known = ", ".join(FORMS)
            raise UserError(f'{path}, edit {n}: expected {{"edit": one of {known}, ...}}')
        keys = re.findall(r"\{(\w+)\}", FORMS[name])
        if name == "replace" and "vector" in edit:
            keys = ["word", "sense", "vector"]
        if not edit.keys() >= set(keys):
            raise UserError(f"{path}, edit {n}: {name} needs {', '.join(keys)}")
        for key in {"word", "words", "from", "to", "by"} & edit.keys():
            if not isinstance(edit[key], str):
                raise UserError(f"{path}, edit {n}: {key}={edit[key]!r} must be text")
        vector = edit.get("vector", [])
        if not isinstance(vector, list) or not all(type(v) in (int, float) for v in vector):
            raise UserError(f"{path}, edit {n}: vector must be a list of numbers")
    return edits


@torch.no_grad()
def make_edits(model, tokenizer, edits):
    """A list of edits -> Edits for model.edits; [] -> None. UserError: one doesn't fit the model."""
    if not edits:
        return None
    K, V, E = model.config.n_sense, model.config.vocab_size, model.wte.weight.detach()
    if not K:
        raise UserError("this run is a plain Transformer (n_sense=0): it has no senses to edit")

    def sense(edit, key="sense"):
        if type(edit[key]) is not int or not 0 <= edit[key] < K:
            raise UserError(f"{describe(edit)}: {key}={edit[key]!r} must be from 0 to {K - 1}")
        return edit[key]

    scale, offset = {}, {}  # of each edited token: (K,) and (K,D)

    def senses_now(token):
        """The senses of a token (K,D) as the edits so far leave them."""
        C = model.own_senses(torch.tensor(token, device=E.device))
        return scale[token][:, None] * C + offset[token] if token in scale else C

    tokens = [
        None if edit["edit"] == "topic" else word_id(tokenizer, edit["word"]) for edit in edits
    ]
    for token, edit in zip(tokens, edits):
        if token is not None and token not in scale:
            scale[token], offset[token] = E.new_ones(K), E.new_zeros(K, E.size(1))
        if edit["edit"] == "swap":
            old, new = (E[word_id(tokenizer, edit[key])] for key in ("from", "to"))
            offset[token] = swapped(senses_now(token), old, new)
            scale[token] = E.new_zeros(K)
        elif edit["edit"] == "replace" and "vector" in edit:
            if len(edit["vector"]) != E.size(1):
                sizes = f"{E.size(1)} numbers, not {len(edit['vector'])}"
                raise UserError(f"{describe(edit)}: expected {sizes}")
            offset[token][sense(edit)] = E.new_tensor(edit["vector"])
            scale[token][sense(edit)] = 0.0
        elif edit["edit"] == "replace":
            new = senses_now(word_id(tokenizer, edit["by"]))[sense(edit, "by_sense")]
            offset[token][sense(edit)] = new
            scale[token][sense(edit)] = 0.0
    # scaling a sense is the same as scaling its weight; after all vectors, so that edits multiply
    for token, edit in zip(tokens, edits):
        if edit["edit"] == "scale":
            factor = edit["factor"]
            if type(factor) not in (int, float) or not 0 <= factor < math.inf:
                what = f"factor={factor!r} must be a number, at least 0"
                raise UserError(f"{describe(edit)}: {what}")
            which = slice(None) if edit["sense"] == "all" else sense(edit)
            scale[token][which] *= factor
            offset[token][which] *= factor

    w, f = [E.new_zeros(0, V, K)], []
    for edit in edits:
        if edit["edit"] == "topic":
            strength = edit["strength"]
            if type(strength) not in (int, float) or strength not in STRENGTHS:
                raise UserError(f"{describe(edit)}: strength={strength!r} must be 1, 2 or 3")
            bag = sorted({word_ids(tokenizer, word)[0] for word in edit["words"].split(",")})
            peaks = sense_peaks(model, peaks_progress)
            w.append(topic_weights(model, bag, strength, peaks, tokenizer.end)[None])
            f.append(max(STRENGTHS[strength]) / 7.5)
    row = torch.zeros(V, dtype=torch.long, device=E.device)
    row[list(scale)] = torch.arange(1, len(scale) + 1, device=E.device)
    return Edits(
        row=row,
        scale=torch.stack([E.new_ones(K), *scale.values()]),
        offset=torch.stack([E.new_zeros(K, E.size(1)), *offset.values()]),
        w=torch.cat(w),
        f=E.new_tensor(f),
    )


def need_tokenizer(r):
    """Raise UserError if a run of open_run has no tokenizer."""
    if r.tokenizer is None:
        raise UserError(f"{r.path} has no tokenizer: import it with --tokenizer=gpt2")


def peaks_progress(parts):
    return tqdm(parts, "highest logit of each sense", leave=False, delay=2)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    least = {"n_vector": 1, "n_window": 2, "steps": 1, "max_kl": 0, "learning_rate": 0}
    for key, value in least.items():
        if getattr(s, key) < value:
            raise UserError(f"{key}={getattr(s, key)} must be at least {value}")
    edits = read_edits(s.edits) if s.edits and Path(s.edits).exists() else []
    r = open_run(s.run, s.device)
    need_tokenizer(r)
    if s.remove is not None:
        if not 1 <= s.remove <= len(edits):
            raise UserError(f"remove={s.remove}: there are {len(edits)} edits")
        del edits[s.remove - 1]
    edits += parse(s.edit)
    # raises for what doesn't fit, before anything is written
    make_edits(r.model, r.tokenizer, edits)
    if s.teach:
        examples = read_examples(s.teach)
        text = validation_windows(r, s.dataset, s.data_dir, s.n_window)  # (n_window,T+1)
        edits += teach(r.model, r.tokenizer, examples, text, s)
    for n, edit in enumerate(edits, 1):
        print(f"{n:3}  {describe(edit)}" + (f", adds {edit['adds']}" if "adds" in edit else ""))
    if s.edits and (s.edit or s.teach or s.remove is not None):
        lines = [json.dumps(edit, ensure_ascii=False) for edit in edits]
        temporary = Path(s.edits + ".tmp")
        temporary.write_text("[" + ",\n ".join(lines) + "]\n")
        temporary.replace(s.edits)


if __name__ == "__main__":
    run(main)
