"""
Edits of senses: list, add, remove and learn them. They leave the weights of the model alone.

    python -m lab.edit --edits=my.json --edit="scale river 4 0; swap Denver: Colorado -> Texas"
    python -m lab.edit --edits=my.json                         lists all, numbered
    python -m lab.edit --edits=my.json --remove=2              drops the second
    python -m lab.edit --edits=my.json --teach=pretrained/simplewiki/facts.jsonl   learns vectors
    python sample.py --edits=my.json --start="He was born in Denver,"

    scale WORD SENSE FACTOR           multiplies the weight of a sense (or "all") of WORD (paper, 6.2)
    swap WORD: FROM -> TO             what the senses of WORD say of FROM, they say of TO, and vice versa;
                                      TO gets 14 logits on top, or as many as "margin 20" behind it says,
                                      since other words go on speaking for FROM (ours)
    paper_swap WORD: FROM -> TO       the paper's formula, which takes away more than it gives (6.3)
    topic WORD[,WORD...] STRENGTH     gives more weight to senses that say these words: 1 to 3 (6.1),
                                      or 4 (ours): to few senses, and less to all others
    replace WORD SENSE by WORD SENSE  replaces one sense by another; in a file also by a "vector"

A WORD is one token and gets a space before it; a Name is edited without one, too, as at the start of a
text, if that is a token. "WORD" in double quotes is taken as it is. A file is a JSON list of edits. Swaps
and replacements come first, in order; then weights are multiplied.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from configurator import check, configure, run
from lab.change import other_text
from lab.control import EditedBackpack
from lab.edits import describe, make_edits, parse, printable, read_edits, unreached
from lab.files import expect_place, write_text
from lab.run import open_run
from lab.teach import read_examples, teach
from lab.words import word_forms


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    edits: str | None = None  # a JSON file of edits: listed, and written when it changes
    edit: str = ""  # to add: "scale river 4 0; swap Denver: Colorado -> Texas; topic sports 2"
    remove: int | None = None  # with edits: the number of an edit to remove
    teach: str | None = None  # learn vectors from a file of {"prompt", "good"}, see lab/teach.py
    n_vector: int = 2  # with teach: how many senses of each token of a subject learn
    enough: float = 0.5  # with teach: end when all good ends are at least this probable
    max_kl: float = 0.002  # with teach: ... or before it changes other text more, in nats
    kl_weight: float = 30.0  # with teach: weight of that change in the loss
    learning_rate: float = 0.05  # with teach: of Adam
    steps: int = 300  # with teach: at most
    dataset: str | None = None  # with teach: its val.bin is other text; None: see lab/change.py
    data_dir: str = "data"  # with teach: where datasets lie
    n_window: int = 208  # with teach: windows of other text, 8 of 13 for the report
    seed: int = 1337  # with teach: of all that is drawn
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N


def learn(r, edits, s):
    """The edits that --teach adds to a list of edits."""
    examples = read_examples(s.teach)
    check(s.n_window >= 13, f"n_window={s.n_window}: expected 13 or more, to learn from and to report on")
    r.model = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, edits))
    # a vector that is learned must not be scaled
    taken = set()
    for edit in edits:
        if edit["edit"] == "scale":
            taken |= set(word_forms(r.tokenizer, edit["word"]))
    text = other_text(r, s.dataset, s.data_dir, s.n_window)  # (n,T+1)
    return teach(r, examples, text, s, taken)


def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    changes = bool(s.edit or s.teach or s.remove is not None)
    if changes and s.edits:
        expect_place(s.edits)
    elif changes:
        print("nothing is saved without --edits=FILE")
    is_new = (s.edit or s.teach) and s.edits and not Path(s.edits).exists()
    edits = [] if is_new else read_edits(s.edits)
    r = open_run(s.run, s.device)
    if s.remove is not None:
        found = f"remove={s.remove}: found {len(edits)} edits, expected the number of one"
        check(1 <= s.remove <= len(edits), found)
        del edits[s.remove - 1]
    edits += parse(s.edit)
    # raises for what does not fit the model, before anything is written
    make_edits(r.base, r.tokenizer, edits, with_topics=False)
    if s.teach:
        # last, so that they have the last word on their senses
        edits += learn(r, edits, s)
        make_edits(r.base, r.tokenizer, edits, with_topics=False)
    for number, edit in enumerate(edits, 1):
        adds = f", adds {printable(edit['adds'])}" if "adds" in edit else ""
        print(f"{number:3}  {describe(edit)[:100]}{adds}")
    # as they stand at the start of a line
    names = [edit["word"] for edit in edits if edit.get("word", "")[:1].isupper()]
    for line in unreached(r.tokenizer, edits, "\n".join(names)):
        print(line)
    if changes and s.edits:
        lines = [json.dumps(edit, ensure_ascii=False) for edit in edits]
        write_text(s.edits, "[" + ",\n ".join(lines) + "]\n")
        print(f"wrote {s.edits}")


if __name__ == "__main__":
    run(main)
