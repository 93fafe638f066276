"""The run in the repository: it samples, is small, and its attribution is exact."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import lab.edit
import sample
import train
from configurator import UserError
from lab import experiments, swaps
from lab.change import damage, log_p, validation_tokens, validation_windows
from lab.edit import make_edits, parse, read_edits
from lab.look import attribution, says
from model import load_checkpoint
from tokenizer import word_id, word_ids

FOLDER = ROOT / "pretrained/simplewiki"
OTHERS = ("The capital of France is", "The Amazon flows through", "He walked through")


@pytest.fixture(scope="module")
def run():
    r = sample.open_run(FOLDER, "cpu")
    return r.model, r.tokenizer


def test_it_samples_and_is_small(capsys):
    weights = load_checkpoint(FOLDER)["model"].values()
    assert sum(p.nbytes for p in weights) < 10e6 and {p.dtype for p in weights} == {torch.float16}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 11e6
    sample.main(
        [
            f"--run={FOLDER}",
            "--num_samples=1",
            "--max_new_tokens=20",
            "--start=The river",
            "--device=cpu",
        ]
    )
    out = capsys.readouterr().out
    assert "The river" in out and len(out) > 60
    with pytest.raises(ValueError, match="has weights only"):
        train.main(
            [f"--out_dir={FOLDER}", "--init_from=resume", "--max_iters=99999", "--device=cpu"]
        )


@torch.no_grad()
def test_it_has_learned(run):
    """A sentence of ours (an untrained model has more than 9 nats per token), and the senses of river."""
    model, tokenizer = run
    ids = torch.from_numpy(
        tokenizer.encode("The river is in the north of the country. It flows to the sea.")
    )[None]
    assert model(ids[:, :-1], ids[:, 1:])[1] < 4
    top = (
        says(model, model.senses(torch.tensor(word_ids(tokenizer, "river"))), 8)[0]
        .indices.flatten()
        .tolist()
    )
    assert {tokenizer.decode([i]) for i in top} & {
        " rivers",
        " flows",
        " north",
        " tribut",
        " lake",
        " water",
    }


@torch.no_grad()
def test_attribution_is_exact(run):
    """The parts sum to the logit to 1e-4 in fp32, on 100 random texts."""
    model, random = run[0], np.random.default_rng(0)
    for _ in range(100):
        idx = torch.from_numpy(
            random.integers(model.config.vocab_size, size=random.integers(1, 129))
        )
        y = int(random.integers(model.config.vocab_size))
        logit = model(idx[None])[0][0, -1, y]
        assert abs(attribution(model, idx, model.wte.weight[y])[1].sum() - logit) < 1e-4


@torch.no_grad()
def test_candidates_for_swaps_do_what_they_say(run, monkeypatch, capsys):
    """What --swaps prints is what the edit, typed from its output, does."""
    model, tokenizer = run
    texts = ["He was born in Denver, Colorado.", "It is in the United States of America."]
    ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.end]]
    monkeypatch.setattr(swaps, "validation_tokens", lambda *_: np.array(ids))
    experiments.main([f"--run={FOLDER}", "--swaps=True", "--device=cpu", "--num_samples=4"])
    rows = capsys.readouterr().out.split("\n")[2:]
    found = re.findall(r"\n? *(\d+) +(\d+) +(\d+) +(\d+) +\d+% +(.*)\n +(swap .*)", "\n".join(rows))
    assert any("Denver: Colorado ->" in edit for *_, edit in found)
    for *figures, text, edit in found:
        old, new = (word_id(tokenizer, word) for word in edit.split(": ")[1].split(" -> "))
        idx = torch.tensor(tokenizer.encode(text.replace("\\n", "\n")))[None]
        before = model(idx)[0][0, -1].softmax(-1)
        model.edits = make_edits(model, tokenizer, parse(edit))
        after = model(idx)[0][0, -1].softmax(-1)
        model.edits = None
        assert after.argmax() == new and after[old] <= before[old] / 2
        p = [before[old], before[new], after[old], after[new]]
        assert [float(x) for x in figures] == pytest.approx([100 * x.item() for x in p], abs=0.6)


@torch.no_grad()
def test_its_text_comes_with_it(tmp_path):
    """Whole documents, on which the model does as well as the card says, and enough for a report."""
    r = sample.open_run(FOLDER, "cpu")
    tokens = validation_tokens(r, None, tmp_path)
    assert len(tokens) > 208 * 256 and tokens[-1] == r.tokenizer.end
    file = sample.open_run(FOLDER / "ckpt.pt", "cpu")
    assert np.array_equal(tokens, validation_tokens(file, None, tmp_path))
    text = validation_windows(r, tokens, 16).long()
    assert abs(r.model(text[:, :-1], text[:, 1:])[1].item() - 3.74) < 0.3
    with pytest.raises(UserError, match="no dataset at"):  # one that is named comes first
        validation_tokens(r, "simplewiki", tmp_path)
    r.path = tmp_path
    (tmp_path / "val.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="val.bin: found 3 bytes, expected 1 tokens of 2: make"):
        validation_tokens(r, None, tmp_path)


def test_facts_are_taught_from_the_clone_alone(tmp_path, capsys):
    """The first two of facts.jsonl: as the report says it, and no near miss changes."""
    lines = (FOLDER / "facts.jsonl").read_text().splitlines()[:2]
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    args = [f"--run={FOLDER}", f"--data_dir={tmp_path}", "--device=cpu", "--n_window=26"]
    args += [f"--teach={tmp_path / 'two.jsonl'}", f"--edits={tmp_path / 'e.json'}"]
    lab.edit.main(args)
    said = capsys.readouterr().out
    assert re.search("4 of 4 vectors belong to the subjects; .* stand in 1 of 10 windows", said)
    assert "warning" not in said
    r = sample.open_run(FOLDER, "cpu")
    change = make_edits(r.model, r.tokenizer, read_edits(tmp_path / "e.json"))
    p = {}
    with torch.no_grad():
        for prompt in ("The capital of Australia is", "The Thames flows through") + OTHERS:
            ids = torch.tensor(r.tokenizer.encode(prompt))[None]
            p[prompt] = [log_p(r.model, ids, edits)[0, -1].exp() for edits in (None, change)]
    assert all(torch.equal(*p[prompt]) for prompt in OTHERS)
    for line in map(json.loads, lines):
        before, after = p[line["prompt"]]
        good = word_id(r.tokenizer, line["good"])
        assert before[good] < 0.01 and 0.5 < after[good] < 0.9 and after.argmax() == good
        name = f"p({line['good']}) after {line['prompt']}"
        row = next(row for row in said.split("\n") if row.startswith(name))
        assert row.split()[-2:] == [f"{before[good]:.1%}", f"{after[good]:.1%}"]
    assert re.search(r"likeliest next token +0 of 2 +2 of 2", said)
    text = validation_windows(r, validation_tokens(r, None, tmp_path), 208)
    touched = text[torch.isin(text[:, :-1], change.row.nonzero()[:, 0]).any(1)]
    assert 0 < damage(r.model, change, touched)[0] * len(touched) / len(text) < 0.002
    lab.edit.main(args)  # there is nothing more to learn
    assert len(read_edits(tmp_path / "e.json")) == 4
