"""
Edits of senses as data: text <-> dicts <-> JSON files, and what they do to a model.

An edit is a dict such as {"edit": "scale", "word": "river", "sense": 4, "factor": 0.0}. A file of them may
come from anywhere, so check_edit looks at each before anything uses it.
"""

import math
import re
import reprlib
from functools import cached_property, partial

import torch
from tqdm import tqdm

from configurator import UserError, check
from lab.control import (
    MARGIN,
    STRENGTHS,
    Edits,
    exchanged,
    quiet_inverse,
    same_sum,
    sense_peaks,
    swapped,
    topic_weights,
)
from lab.files import read_json
from lab.words import is_quoted, token_text, word_forms, word_id, word_ids

FORMS = {  # an edit as text; the names in braces are the keys of its dict
    "scale": "{word} {sense} {factor}",
    "swap": "{word}: {from} -> {to} [margin {margin}]",  # as text also without what is in brackets
    "paper_swap": "{word}: {from} -> {to}",
    "topic": "{words} {strength}",
    "replace": "{word} {sense} by {by} {by_sense}",  # or by a "vector", in a file
}
OPTIONAL = re.compile(r" \[(.+)\]")
LARGEST = 1e6  # of the numbers that edits make, so that logits stay finite


# -----------------------------------------------------------------------------
# what is an edit


def is_text(value):
    """JSON can write halves of surrogate pairs, which are no text: UTF-8 can't express them."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_number(value):
    return type(value) in (int, float) and abs(value) < LARGEST  # nan is not


def is_index(value):
    return type(value) is int and value >= 0


def is_factor(value):
    return is_number(value) and value >= 0


def is_strength(value):
    return is_number(value) and value in STRENGTHS


def is_vector(value):
    return isinstance(value, list) and all(is_number(x) for x in value)


VALUES = {  # of each key: whether a value will do, and what is expected
    "word": (is_text, "text"),
    "words": (is_text, "text"),
    "from": (is_text, "text"),
    "to": (is_text, "text"),
    "by": (is_text, "text"),
    "adds": (is_text, "text"),
    "sense": (is_index, "the number of a sense"),
    "by_sense": (is_index, "the number of a sense"),
    "factor": (is_factor, f"a number from 0 to {LARGEST:g}"),
    "margin": (is_factor, f"a number from 0 to {LARGEST:g}"),
    "strength": (is_strength, "1, 2, 3 or 4"),
    "vector": (is_vector, "a list of numbers"),
}


def keys_of(form):
    """The keys of a form's dict, besides "edit"."""
    return re.findall(r"\{(\w+)\}", FORMS[form])


def check_edit(edit, where):
    """UserError, if edit isn't a dict in one of the FORMS; where: what it is, for the message."""
    check(isinstance(edit, dict), f"{where}: found {reprlib.repr(edit)}, expected an object")
    form = edit.get("edit")
    names = ", ".join(FORMS)
    check(is_text(form) and form in FORMS, f'{where}: expected an "edit" that is one of {names}')
    keys = keys_of(form)
    if form == "replace" and "vector" in edit:
        keys = ["word", "sense", "vector"]
    for key in keys:
        check(key in edit, f"{where}: {form} lacks {key!r}")
    if "adds" in edit:
        keys.append("adds")  # what lab.teach notes beside a vector
    for key in keys:
        if form == "scale" and key == "sense" and edit[key] == "all":
            continue
        is_fine, expected = VALUES[key]
        found = reprlib.repr(edit[key])
        check(is_fine(edit[key]), f"{where}: {key} is {found}, expected {expected}")


def check_edits(value, where):
    """A list of edits, or a single one, as a list. UserError: something in it is no edit."""
    if isinstance(value, dict):
        value = [value]
    check(isinstance(value, list), f"{where}: found {reprlib.repr(value)}, expected a list of edits")
    edits = [named_as_today(edit) for edit in value]
    for number, edit in enumerate(edits, 1):
        check_edit(edit, f"{where}, edit {number}")
    return edits


def named_as_today(edit):
    """Files from before 2026-12 have no "margin" in a swap, as each was the paper's."""
    if isinstance(edit, dict) and edit.get("edit") == "swap" and "margin" not in edit:
        return edit | {"edit": "paper_swap"}
    return edit


def read_edits(path):
    """The edits in a JSON file; [] without a path. UserError or OSError: it has none, or bad ones."""
    if not path:
        return []
    return check_edits(read_json(path), path)


# -----------------------------------------------------------------------------
# edits as text


def parse(text):
    """Edits as text, separated by ; -> a list of dicts. UserError: one that can't be read."""
    edits = []
    for part in re.findall(r'(?:"[^"]*"|[^;])+', text):  # in double quotes a ; is part of a word
        if part.strip():
            edits.append(parse_one(part.strip()))
    return edits


def parse_one(text):
    where = f"edit {reprlib.repr(text)}"
    form, _, rest = text.partition(" ")
    if form not in FORMS:
        forms = "; ".join(f"{name} {capitals(FORMS[name])}" for name in FORMS)
        raise UserError(f"{where}: expected {forms}")
    pattern = OPTIONAL.sub(r"(?: \1)?", FORMS[form])
    pattern = re.sub(r"\{(\w+)\}", r'(?P<\1>"[^"]+"|\\S+)', pattern)
    match = re.fullmatch(pattern, rest.strip())
    check(match, f"{where}: expected {form} {capitals(FORMS[form])}")
    edit = {"edit": form}
    for key, value in match.groupdict().items():
        is_word = VALUES[key][0] is is_text
        edit[key] = value if is_word else as_number(value or str(MARGIN))
    check_edit(edit, where)
    return edit


def capitals(form):
    """A form with WORD for {word}."""
    return re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), form)


def as_number(text):
    """The number that a text says; a text that says none stays as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def describe(edit):
    """An edit as the text that parse reads, on one line; of a vector only its norm."""
    if "vector" in edit:
        norm = math.hypot(*edit["vector"])
        return printable(f"replace {edit['word']} {edit['sense']} by a vector of norm {norm:.4g}")
    form = OPTIONAL.sub(r" \1", FORMS[edit["edit"]])
    return printable(f"{edit['edit']} {form.format(**edit)}")


def summary(edits):
    """A few edits as text; more as their number."""
    if len(edits) > 4:
        return f"{len(edits)} edits"
    return "; ".join(describe(edit) for edit in edits)


def printable(text):
    """text on one line, with escapes for what could move a terminal's cursor or look like another line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def unreached(tokenizer, edits, text):
    """Lines about the edits whose word stands in a text, but only as tokens that they leave alone.

    At the start of a text, a word has no space before it, and is often made of other tokens.
    """
    ids = set(tokenizer.encode(text).tolist())
    lines = []
    for edit in edits:
        word = edit.get("word", "").removeprefix("\u00b7").removeprefix(" ")
        is_there = word and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)
        # a "word" in double quotes stands for a token, wherever that is
        if not is_there or is_quoted(word) or ids & set(word_forms(tokenizer, word)):
            continue
        pieces = "|".join(token_text(tokenizer, i) for i in tokenizer.encode(word))
        where = "without a space before it, as at the start of a text"
        alone = f"leaves {printable(word)} alone {where}: there it is {pieces}"
        lines.append(f"{describe(edit)[:100]} {alone}")
    return lines


# -----------------------------------------------------------------------------
# what edits do to a model


class ChangedSenses:
    """The senses of tokens as edits leave them, one upon the other: scale C + offset of each token."""

    def __init__(self, model):
        self.model = model
        self.E = model.wte.weight.detach()
        self.scale = {}  # token: (K,)
        self.offset = {}  # token: (K,D)

    def now(self, token):
        """The senses of a token (K,D)."""
        C = self.model.senses(torch.tensor(token, device=self.E.device))  # (K,D)
        if token not in self.scale:
            return C
        return self.scale[token][:, None] * C + self.offset[token]

    @cached_property
    def inverse(self):
        """quiet_inverse (D,D) of the embeddings."""
        return quiet_inverse(self.E[: self.model.config.vocab_size])

    def multiply(self, token, sense, factor):
        """Multiply a sense of a token, or with slice(None) all of them."""
        if token not in self.scale:
            self.scale[token] = self.E.new_ones(self.model.config.n_sense)
            self.offset[token] = self.E.new_zeros(self.model.config.n_sense, self.E.size(1))
        self.scale[token][sense] *= factor
        self.offset[token][sense] *= factor

    def replace(self, token, sense, vector):
        """Replace a sense by vector (D,), or with slice(None) all of them by (K,D)."""
        self.multiply(token, sense, 0.0)
        self.offset[token][sense] = vector

    def check(self, tokenizer):
        """UserError: some numbers are too large, or nan, as of a swap from a word whose embedding is 0."""
        for token in self.scale:
            numbers = torch.cat([self.scale[token], self.offset[token].flatten()])
            largest = numbers.abs().max().item()
            name = token_text(tokenizer, token)
            what = f"the edits of {name} make numbers of {largest:g}"
            check(largest < LARGEST, f"{what}: expected less than {LARGEST:g}")

    def tensors(self):
        """row (V,), scale (n,K) and offset (n,K,D) of Edits."""
        K = self.model.config.n_sense
        row = torch.zeros(self.model.config.vocab_size, dtype=torch.long, device=self.E.device)
        row[list(self.scale)] = torch.arange(1, len(self.scale) + 1, device=self.E.device)
        scale = torch.stack([self.E.new_ones(K), *self.scale.values()])
        offset = torch.stack([self.E.new_zeros(K, self.E.size(1)), *self.offset.values()])
        return row, scale, offset


def apply(edit, changed, tokenizer):
    """Let an edit change senses. UserError: it names a word or a sense that isn't there."""
    K, D = changed.now(0).shape
    for key in ("sense", "by_sense"):
        if edit.get(key, "all") != "all":
            check(edit[key] < K, f"{key} is {edit[key]}, expected 0 to {K - 1}")
    # a Name is edited in both its forms: within a text, and at its start
    tokens = word_forms(tokenizer, edit["word"])
    if edit["edit"] == "scale":
        sense = slice(None) if edit["sense"] == "all" else edit["sense"]
        for token in tokens:
            changed.multiply(token, sense, edit["factor"])
    elif edit["edit"] in ("swap", "paper_swap"):
        from_token = word_id(tokenizer, edit["from"])
        to_token = word_id(tokenizer, edit["to"])
        E_from = changed.E[from_token]  # (D,)
        E_to = changed.E[to_token]  # (D,)
        rule = swapped
        if edit["edit"] == "swap":
            check(from_token != to_token, "FROM and TO are the same token")
            speaks = any((changed.now(token) @ E_from > 0).any() for token in tokens)
            check(speaks, "no sense of WORD says FROM, so there is nothing to swap")
            rule = partial(exchanged, margin=edit["margin"], inverse=changed.inverse)
        for token in tokens:
            changed.replace(token, slice(None), rule(changed.now(token), E_from, E_to))
    else:
        if "vector" in edit:
            check(len(edit["vector"]) == D, f"found {len(edit['vector'])} numbers, expected {D}")
            vector = changed.E.new_tensor(edit["vector"])  # (D,)
        else:
            vector = changed.now(word_id(tokenizer, edit["by"]))[edit["by_sense"]]  # (D,)
        for token in tokens:
            changed.replace(token, edit["sense"], vector)


@torch.no_grad()
def make_edits(model, tokenizer, edits, with_topics=True):
    """A list of edits -> Edits for EditedBackpack(model, ...); of [] None.

    model: without edits. with_topics=False only checks the topics, whose weights take some seconds.
    UserError: an edit does not fit the model.
    """
    if not edits:
        return None
    edits = check_edits(edits, "edits")
    check(model.config.n_sense, "a plain Transformer (n_sense=0) has no senses to edit")
    changed = ChangedSenses(model)
    topics = []  # of each its strength, and the first tokens of its words
    # vectors first, in order, and then weights, so that all factors of a sense multiply
    for edit in sorted(edits, key=lambda edit: edit["edit"] == "scale"):
        try:
            if edit["edit"] == "topic":
                first_tokens = {word_ids(tokenizer, word)[0] for word in edit["words"].split(",")}
                topics.append((edit["strength"], sorted(first_tokens)))
            else:
                apply(edit, changed, tokenizer)
        except UserError as error:
            raise UserError(f"{describe(edit)[:100]}: {error}") from None
    changed.check(tokenizer)
    row, scale, offset = changed.tensors()
    w = scale.new_zeros(0, len(row), scale.size(1))  # (0,V,K)
    f = scale.new_zeros(0)
    if topics and with_topics:
        fork = "this model.py does not sum senses as EditedBackpack.output in lab/control.py does"
        check(same_sum(model), f"{fork}, which topics need: change it there, too")
        peaks = sense_peaks(model, peaks_progress)  # (V,K)
        w = [topic_weights(model, bag, strength, peaks, tokenizer.end) for strength, bag in topics]
        w = torch.stack(w)  # (m,V,K)
        f = scale.new_tensor([STRENGTHS[strength][2] for strength, _ in topics])  # (m,)
    return Edits(row, scale, offset, w, f)


def peaks_progress(parts):
    return tqdm(parts, "for topics: the highest logit of each sense", leave=False, delay=2)
