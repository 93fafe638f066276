"""Edits of senses: list, add, remove and learn them. They leave the weights of the model alone.

    python -m lab.edit --edits=my.json --edit="scale river 4 0; swap Denver: Colorado -> Texas"
    python -m lab.edit --edits=my.json                         lists all, numbered
    python -m lab.edit --edits=my.json --remove=2              drops the second
    python -m lab.edit --edits=my.json --teach=pretrained/simplewiki/facts.jsonl   learns vectors
    python sample.py --edits=my.json --start="He was born in Denver,"

    scale WORD SENSE FACTOR           multiplies the weight of a sense (or "all") of WORD (paper, 6.2)
    swap WORD: FROM -> TO             what the senses of WORD say of FROM, they say of TO (6.3)
    topic WORD[,WORD...] STRENGTH     gives more weight to senses that say these words: 1 to 3 (6.1),
                                      or 4 (ours): to few senses, and less to all others
    replace WORD SENSE by WORD SENSE  replaces one sense by another; in a file also by a "vector"

A WORD is one token and gets a space before it; a Name is edited without one, too, as at the start of a
text, if that is a token. "WORD" in double quotes is taken as it is. A file is a JSON list of edits. Swaps
and replacements come first, in order; then weights are multiplied.
"""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import UserError, configure, printable, run
from files import expect, expect_place, parse_json, read_jsonl, read_text, write_text
from lab.change import validation_tokens
from lab.control import STRENGTHS, Edits, sense_peaks, swapped, topic_weights
from lab.teach import teach
from sample import open_run
from tokenizer import word_forms, word_ids

FORMS = {  # an edit as text; in a file, the names in braces are its keys
    "scale": "{word} {sense} {factor}",
    "swap": "{word}: {from} -> {to}",
    "topic": "{words} {strength}",
    "replace": "{word} {sense} by {by} {by_sense}",
}
SHAPES = {  # of an edit's values; the sense of a scale may also be "all"
    "scale": {"word": str, "sense": int, "factor": float},
    "swap": {"word": str, "from": str, "to": str},
    "topic": {"words": str, "strength": float},
    "replace": {"word": str, "sense": int, "by": str, "by_sense": int},
}
OF_VECTOR = {"word": str, "sense": int, "vector": [float], "adds?": str}
LARGEST = 1e6  # of the numbers that edits make, so that logits stay finite


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    edits: str | None = None  # a JSON file of edits: listed, and written when it changes
    edit: str = ""  # to add: "scale river 4 0; swap Denver: Colorado -> Texas; topic sports 2"
    remove: int | None = None  # [1, 1e9] with edits: the number of an edit to remove
    teach: str | None = None  # learn vectors from a file of {"prompt", "good"}, see lab/teach.py
    n_vector: int | None = None  # [1, 1e4] with teach: how many to learn; None: two an example
    enough: float = 0.5  # [0, 1] with teach: end when all good ends are at least this probable
    max_kl: float = 0.002  # [0, 100] with teach: ... or before it changes other text more, in nats
    kl_weight: float = 30.0  # [0, 1e6] with teach: weight of that change in the loss
    elsewhere: float = 1000.0  # [0, 1e9] with teach: how much use elsewhere speaks against a vector
    learning_rate: float = 0.05  # (0, 100] with teach: of Adam
    steps: int = 150  # [1, 1e6] with teach: at most
    compare: bool = False  # with teach: also finetune a copy of all weights, and report on both
    dataset: str | None = None  # with teach: its val.bin is other text; None: the run's own
    data_dir: str = "data"  # with teach: where datasets lie
    n_window: int = 208  # [13, 1e5] with teach: windows of other text, 8 of 13 for the report
    seed: int = 1337  # [0, 4294967295] with teach: of all that is drawn
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N


def parse(text):
    """Edits as text, separated by ; -> a list of dicts. UserError: one that can't be read."""
    edits = []
    for part in re.split(r';(?=(?:[^"]*"[^"]*")*[^"]*$)', text):  # not in double quotes
        part = part.strip()
        if not part:
            continue
        where, (name, _, rest) = f"edit {part[:60]!r}", part.partition(" ")
        pattern = re.sub(r"\{(\w+)\}", r'(?P<\1>"[^"]+"|\\S+)', FORMS.get(name, ""))
        match = re.fullmatch(pattern, rest.strip())
        if name not in FORMS or not match:
            known = [name] if name in FORMS else FORMS
            forms = "; ".join(f"{name} {FORMS[name]}" for name in known)
            forms = re.sub(r"\{(\w+)\}", lambda key: key[1].upper(), forms)
            raise UserError(f"{where}: expected {forms}")
        edit = {"edit": name} | match.groupdict()
        for key in {"sense", "factor", "strength", "by_sense"} & edit.keys():
            text = edit[key]
            with contextlib.suppress(ValueError):  # it stays text, or what float has made of it
                edit[key] = float(text)
                edit[key] = int(text)
        edits.append(expect_edit(edit, where))
    return edits


def expect_edit(edit, where):
    """edit, if it is one of FORMS with values of the right types. UserError: it is not."""
    name = expect(edit, {"edit": set(FORMS)}, where)["edit"]
    shape = OF_VECTOR if name == "replace" and "vector" in edit else SHAPES[name]
    if name == "scale" and edit.get("sense") == "all":
        shape = shape | {"sense": str}
    expect(edit, shape, where)
    if name == "scale" and edit["factor"] < 0:
        raise UserError(f"{where}, factor: found {edit['factor']}, expected 0 or more")
    if name == "topic" and edit["strength"] not in STRENGTHS:
        raise UserError(f"{where}, strength: found {edit['strength']}, expected 1, 2, 3 or 4")
    return edit


def expect_edits(found, where):
    """A list of edits, or one, as a list. UserError: something in it is no edit."""
    edits = found if isinstance(found, list) else [found]
    return [expect_edit(edit, f"{where}, edit {n}") for n, edit in enumerate(edits, 1)]


def describe(edit):
    """An edit as the text that parse reads, on one line; of a vector only its norm."""
    if "vector" in edit:
        norm = math.hypot(*edit["vector"])
        text = f"replace {edit['word']} {edit['sense']} by a vector of norm {norm:.4g}"
    else:
        text = f"{edit['edit']} {FORMS[edit['edit']].format(**edit)}"
    return printable(text)  # a word may be a token of a line break or of control characters


def summary(edits):
    """A few edits as text; more as their number."""
    return "; ".join(map(describe, edits)) if len(edits) < 5 else f"{len(edits)} edits"


def read_edits(path):
    """The list of edits in a JSON file; [] without a path. UserError: no such file, or bad edits."""
    if not path:
        return []
    text = read_text(path)
    one = text.lstrip().startswith("{")
    return expect_edits(parse_json(text, dict if one else list, path), path)


def read_examples(path):
    """The examples of a .jsonl file. UserError: a line is not an example, or there is none."""
    shape = {"prompt": str, "good": str, "bad?": str, "subject?": str, "keep?": [str]}
    examples = read_jsonl(path, shape)
    for n, example in enumerate(examples, 1):
        subject = example.get("subject") or ""
        given = [example.get(key) for key in ("prompt", "good", "bad", "subject")]
        if "" in [*given, *(example.get("keep") or [])]:
            what = "found an empty text, expected a prompt, a good end and no other empty text"
            raise UserError(f"{path}, example {n}: {what}")
        whole = rf"(?<!\w){re.escape(subject)}(?!\w)"
        if subject and not re.search(whole, example["prompt"]):
            what = f"found subject {subject[:40]!r}, expected words of its prompt"
            raise UserError(f"{path}, example {n}: {what}")
    if not examples:
        raise UserError(f'{path}: found no lines, expected {{"prompt": "...", "good": "..."}}')
    return examples


@torch.no_grad()
def make_edits(model, tokenizer, edits, with_topics=True):
    """A list of edits -> Edits for model.edits; [] -> None. UserError: one doesn't fit the model.

    with_topics=False leaves topics out, whose weights take some seconds.
    """
    if not edits:
        return None
    K, V, E = model.config.n_sense, model.config.vocab_size, model.wte.weight.detach()
    if not K:
        raise UserError("this run is a plain Transformer (n_sense=0): it has no senses to edit")

    def sense(edit, key="sense"):
        if not 0 <= edit[key] < K:
            raise UserError(
                f"{describe(edit)[:100]}: found {key} {edit[key]}, expected 0 to {K - 1}"
            )
        return edit[key]

    def tokens_of(edit, key="word"):
        try:
            return word_forms(tokenizer, edit[key])
        except UserError as error:
            raise UserError(f"{describe(edit)[:100]}: {error}") from None

    def token_of(edit, key):
        return tokens_of(edit, key)[0]

    scale, offset = {}, {}  # of each edited token: (K,) and (K,D)

    def senses_now(token):
        """The senses of a token (K,D) as the edits so far leave them."""
        C = model.own_senses(torch.tensor(token, device=E.device))
        return scale[token][:, None] * C + offset[token] if token in scale else C

    # a word is edited in both its forms: within a text, and at its start
    changes = [(t, edit) for edit in edits if edit["edit"] != "topic" for t in tokens_of(edit)]
    for token, edit in changes:
        if token not in scale:
            scale[token], offset[token] = E.new_ones(K), E.new_zeros(K, E.size(1))
        if edit["edit"] == "swap":
            old, new = (E[token_of(edit, key)] for key in ("from", "to"))
            offset[token] = swapped(senses_now(token), old, new)
            scale[token] = E.new_zeros(K)
        elif edit["edit"] == "replace" and "vector" in edit:
            if len(edit["vector"]) != E.size(1):
                sizes = f"found {len(edit['vector'])} numbers, expected {E.size(1)}"
                raise UserError(f"{describe(edit)[:100]}: {sizes}")
            offset[token][sense(edit)] = E.new_tensor(edit["vector"])
            scale[token][sense(edit)] = 0.0
        elif edit["edit"] == "replace":
            new = senses_now(token_of(edit, "by"))[sense(edit, "by_sense")]
            offset[token][sense(edit)] = new
            scale[token][sense(edit)] = 0.0
    # scaling a sense is the same as scaling its weight; after all vectors, so that edits multiply
    for token, edit in changes:
        if edit["edit"] == "scale":
            which = slice(None) if edit["sense"] == "all" else sense(edit)
            scale[token][which] *= edit["factor"]
            offset[token][which] *= edit["factor"]

    for token, edit in changes:
        most = torch.cat([scale[token], offset[token].flatten()]).abs().max().item()
        if not most < LARGEST:  # nan is not
            what = f"found numbers of {most:g}, expected less than {LARGEST:g}"
            raise UserError(f"{describe(edit)[:100]}: {what}")

    w, f = [E.new_zeros(0, V, K)], []
    for edit in edits:
        if edit["edit"] == "topic":
            strength = edit["strength"]
            bag = sorted({word_ids(tokenizer, word)[0] for word in edit["words"].split(",")})
            if with_topics:
                peaks = sense_peaks(model, peaks_progress)
                w.append(topic_weights(model, bag, strength, peaks, tokenizer.end)[None])
                f.append(STRENGTHS[strength][2])
    row = torch.zeros(V, dtype=torch.long, device=E.device)
    row[list(scale)] = torch.arange(1, len(scale) + 1, device=E.device)
    return Edits(
        row=row,
        scale=torch.stack([E.new_ones(K), *scale.values()]),
        offset=torch.stack([E.new_zeros(K, E.size(1)), *offset.values()]),
        w=torch.cat(w),
        f=E.new_tensor(f),
    )


def peaks_progress(parts):
    return tqdm(parts, "highest logit of each sense", leave=False, delay=2)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    writes = s.edit or s.teach or s.remove is not None
    if s.edits and writes:
        expect_place(s.edits)
    elif writes:
        print("nothing is saved without --edits=FILE")
    is_new = (s.edit or s.teach) and s.edits and not Path(s.edits).exists()
    edits = [] if is_new else read_edits(s.edits)
    r = open_run(s.run, s.device)
    if s.remove is not None:
        if not 1 <= s.remove <= len(edits):
            raise UserError(f"remove={s.remove}: found {len(edits)} edits, expected one of these")
        del edits[s.remove - 1]
    edits += parse(s.edit)
    # raises for what doesn't fit, before anything is written
    r.model.edits = make_edits(r.model, r.tokenizer, edits, with_topics=bool(s.teach))
    if s.teach:
        examples = read_examples(s.teach)
        tokens = validation_tokens(r, s.dataset, s.data_dir)
        # a vector that is learned must not be scaled
        scaled = [e["word"] for e in edits if e["edit"] == "scale"]
        taken = {i for word in scaled for i in word_forms(r.tokenizer, word)}
        # the last word on their places; what stood there before may be used by others
        edits += teach(r, examples, tokens, s, taken)
        make_edits(r.model, r.tokenizer, edits, with_topics=False)
    for n, edit in enumerate(edits, 1):
        adds = f", adds {printable(edit['adds'])}" if "adds" in edit else ""
        print(f"{n:3}  {describe(edit)[:100]}{adds}")
    if s.edits and writes:
        lines = [json.dumps(edit, ensure_ascii=False) for edit in edits]
        write_text(s.edits, "[" + ",\n ".join(lines) + "]\n")
        print(f"wrote {s.edits}")


if __name__ == "__main__":
    run(main)
