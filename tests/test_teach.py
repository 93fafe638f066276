"""Teaching: what is chosen, what is learned, and what the report says, each against loops or the model."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_control import CHARS, tiny
from torch.nn import functional as F

import lab.edit
from configurator import UserError
from lab.change import damage, log_p, other_text
from lab.control import EditedBackpack
from lab.edits import make_edits, parse, read_edits
from lab.run import open_run
from lab.teach import (
    Endings,
    Lesson,
    Places,
    Vocabulary,
    choose,
    moved,
    near_misses,
    read_examples,
    subject_of,
    with_rows,
)

# ---- subjects and near misses

COUNTS = {"the": 50, "The": 9, "Paris": 8, "Rome": 9, "capital": 5, "flows": 1, "He": 9, "he": 6}
COUNTS = Counter(COUNTS)


@pytest.mark.parametrize(
    "prompt, subject, given",
    [
        ("The capital of Paris is", "Paris", None),
        ("The New York of Rome", "New York", None),  # never seen, so never in lower case
        ("He was born in Paris,", "Paris", None),  # a pronoun is not a name
        ("he flows the", "flows", None),  # no name: the rarest word
        ("The capital of Paris is", "capital of Paris", "capital of Paris"),
        ("?!", "?!", None),
    ],
)
def test_what_an_example_is_about(prompt, subject, given):
    assert subject_of({"prompt": prompt, "subject": given}, COUNTS) == subject


class Syllables:
    """A tokenizer like a BPE: pieces of two characters, and a space belongs to the piece after it."""

    end = 0

    def __init__(self):
        self.pieces = ["<end>"]

    @property
    def vocab_size(self):
        return len(self.pieces)

    def encode(self, text):
        ids = []
        for piece in re.findall(r" ?\S{1,2}", text):
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
        return np.array(ids)

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_near_misses():
    """They share pieces of the subject, at the start of a text and in sentences, and some do not."""
    tokenizer = Syllables()
    text = " Paris Palermo Rome Romania Marie Parisian"
    vocabulary = Vocabulary(tokenizer, torch.tensor(tokenizer.encode(3 * text)))
    own = vocabulary.tokens("Paris", "") | vocabulary.tokens("Paris", " ")  # Pa|ri|s and ·Pa|ri|s
    random = np.random.default_rng(0)
    learn, report = near_misses("Paris is", "Paris", own, vocabulary, {"Paris", "Rome"}, random)
    assert {"He is", "It is"} <= set(learn)
    assert {"She is", "They is"} <= set(report)
    both = learn + report
    assert {"Palermo is", "Marie is", "In short, Palermo is", "In short, Marie is"} <= set(both)
    assert not re.search("Rome|Parisian", "".join(report))  # to be avoided, and the subject's own
    of_pieces = [near for near in learn if re.match("Pa|..ri|....s ", near)]
    assert len(of_pieces) > 4
    assert "Paris is" not in both
    learn, report = near_misses("A Paris Rome is", "Paris Rome", own, vocabulary, {"Paris"}, random)
    assert "A Paris Romania is" in learn + report  # one word of two is replaced
    assert "In short, A Palermo is" in learn + report


# ---- texts as tokens


@torch.no_grad()
def test_endings_and_what_vectors_do_to_them():
    """Against the edited model, text by text: likelihoods, which are likeliest, and logits with a delta."""
    base = tiny(torch.float32)
    model = EditedBackpack(base, make_edits(base, CHARS, parse("swap a: b -> c; scale d 1 0.5")))
    texts = [([3, 0, 5], [0, 2]), ([1, 5], [4]), ([5, 5, 2, 7], [6, 1, 0])]
    endings = Endings(texts, "cpu")
    pairs = [(5, 2), (0, 1), (5, 3)]
    delta = torch.randn(3, 16)
    tokens, senses = torch.tensor(pairs).unbind(1)
    taught = EditedBackpack(base, moved(with_rows(model.edits, tokens, base), tokens, senses, delta))
    places = Places(model, endings.ids[:, :-1], endings.says, pairs)
    for some, log_probs in [(model, places.before), (taught, places.log_probs(delta))]:
        said = []
        right = []
        for prompt, end in texts:
            p = log_p(some, torch.tensor([prompt + end]))[0, len(prompt) - 1 : -1]  # (end,V)
            said.append(sum(p[i, token] for i, token in enumerate(end)).item())
            right.append(p.argmax(-1).tolist() == end)
        assert torch.allclose(log_probs, endings.log_probs(some), atol=1e-5)
        assert endings.log_likelihood(log_probs).tolist() == pytest.approx(said, abs=1e-4)
        assert endings.are_likeliest(log_probs).tolist() == right
    kl = F.kl_div(places.log_probs(delta), places.before, log_target=True, reduction="batchmean")
    assert places.kl(delta).item() == pytest.approx(kl.item(), rel=1e-4)
    best = [places.before[0].argmax().item(), places.before[1].argmax().item()]
    first = Endings([(texts[0][0], best[:1])], "cpu")
    assert first.are_likeliest(first.log_probs(model)).tolist() == [True]


# ---- the choice


def test_the_choice_is_what_loops_over_positions_score():
    base = tiny(torch.float32)
    model = EditedBackpack(base, make_edits(base, CHARS, parse("swap a: b -> c; scale d 1 0.5")))
    endings = Endings([([3, 0, 5, 0], [2, 6]), ([5, 1], [4])], "cpu")
    score = {(token, l): 0.0 for token in (0, 5) for l in range(4)}
    for token, l in score:
        for ids, first in (([3, 0, 5, 0, 2], 4), ([5, 1], 2)):
            alpha = model.contextualization(torch.tensor([ids]))[0]  # (K,T,T)
            for i in range(first - 1, len(ids)):
                for j in range(i + 1):
                    if ids[j] == token:
                        score[token, l] += alpha[l, i, j].item()
    want = []
    for token in (0, 5):
        want += sorted([pair for pair in score if pair[0] == token], key=score.get, reverse=True)[:3]
    assert choose(model, endings, {5, 0}, 3) == want


def test_a_delta_is_added_to_what_edits_have_left():
    base = tiny(torch.float32)
    edits = make_edits(base, CHARS, parse("swap a: b -> c; scale d 1 0.5"))
    tokens = torch.tensor([0, 5, 0])
    senses = torch.tensor([1, 2, 3])
    delta = torch.randn(3, 16)
    for some in (edits, None):
        before = EditedBackpack(base, some).senses(torch.arange(8))
        after = EditedBackpack(base, moved(with_rows(some, tokens, base), tokens, senses, delta))
        want = before.index_put((tokens, senses), delta, accumulate=True)
        assert torch.allclose(after.senses(torch.arange(8)), want, atol=1e-6)


# ---- what changes in other text


def test_damage_is_the_definition():
    base = tiny(torch.float32)
    other = EditedBackpack(base, make_edits(base, CHARS, parse("scale a all 0; scale b all 3")))
    text = torch.randint(8, (5, 13), generator=torch.Generator().manual_seed(0))
    before = log_p(base, text[:, :-1]).flatten(0, 1)
    after = log_p(other, text[:, :-1]).flatten(0, 1)
    kl = F.kl_div(after, before, log_target=True, reduction="batchmean")
    losses = [model(text[:, :-1], text[:, 1:])[1] for model in (base, other)]
    want = [kl.item(), losses[0].exp().item(), losses[1].exp().item()]
    assert damage(base, other, text) == pytest.approx(want, rel=1e-4)
    assert kl > 0.01
    assert damage(base, base, text)[0] == 0


def test_the_model_writes_other_text(run_train, data_dir, tmp_path, capsys):
    """Without a dataset: the same text each time, of which fewer windows are the first; kept if possible."""
    path = run_train()
    r = open_run(path, "cpu")
    text = other_text(r, None, tmp_path, 20)
    kept = list(path.glob("own_text.*.npy"))
    assert text.shape == (20, 9)
    assert len(kept) == 1
    assert (text[:, 0] == r.tokenizer.encode("\n")[0]).all()
    assert torch.equal(other_text(r, None, tmp_path, 7), text[:7])  # from the file
    kept[0].unlink()
    assert torch.equal(other_text(r, None, tmp_path, 7), text[:7])  # made anew
    assert "7 windows that the model wrote, kept in" in capsys.readouterr().out
    assert torch.equal(other_text(r, None, tmp_path, 20), text)  # more than are kept
    # its perplexity is that of a sample: the model's own entropy
    with torch.no_grad():
        p = log_p(r.base, text[:, :-1])
    entropy = -(p.exp() * p).sum(-1).mean().item()
    loss = F.nll_loss(p.flatten(0, 1), text[:, 1:].flatten()).item()
    assert loss == pytest.approx(entropy, rel=0.1)
    # imported weights were trained on no dataset
    r.ckpt["settings"]["dataset"] = None
    assert torch.equal(other_text(r, None, data_dir, 20), text)
    # another checkpoint writes other text
    run_train("--init_from=resume", "--max_iters=20")
    assert not torch.equal(other_text(open_run(path, "cpu"), None, tmp_path, 20), text)


def test_other_text_of_a_dataset(run_train, data_dir, tmp_path, capsys):
    path = run_train()
    r = open_run(path, "cpu")
    val = np.fromfile(data_dir / "tiny/val.bin", "<u2").astype(np.int64)
    text = other_text(r, None, data_dir, 20)  # the run's own, which is there
    assert str(data_dir / "tiny/val.bin") in capsys.readouterr().out
    starts = np.linspace(0, len(val) - 9, 20).astype(int)
    assert text.tolist() == [val[i : i + 9].tolist() for i in starts]
    with pytest.raises(UserError, match="are too few for 5000 windows of 8: without --dataset"):
        other_text(r, "tiny", data_dir, 5000)
    r.ckpt["meta"]["tokenizer"] = {"kind": "gpt2"}
    with pytest.raises(UserError, match=f"tiny has another vocabulary than {path}: make one with"):
        other_text(r, "tiny", data_dir, 20)


# ---- learning


def test_teaching(run_train, data_dir, tmp_path, capsys):
    """Facts are learned in a few vectors, twice; the report says what the edits then do."""
    out = run_train("--max_iters=60", "--n_embd=32")
    file = tmp_path / "e.json"
    (tmp_path / "x.jsonl").write_text(
        '{"prompt": "words ", "good": "z", "bad": "a", "keep": ["has "]}\n\n'
        '{"prompt": "line", "good": "y", "subject": "line"}\n'
    )
    args = [f"--run={out}", f"--data_dir={data_dir}", "--device=cpu", f"--edits={file}"]
    args += [f"--teach={tmp_path / 'x.jsonl'}", "--n_vector=2", "--n_window=16", "--max_kl=9"]
    lab.edit.main([*args, "--edit=scale w all 0", "--enough=0.3"])
    said = capsys.readouterr().out
    found = read_edits(file)
    n = len(found)
    assert n == 1 + 2 * len("ords" + "line")
    assert all(len(edit["vector"]) == 32 for edit in found[1:])
    r = open_run(out, "cpu")
    every = torch.arange(r.base.config.vocab_size)
    ids = torch.tensor(r.tokenizer.encode("words "))[None]
    z = r.tokenizer.encode("z")[0]

    def edited(edits):
        return EditedBackpack(r.base, make_edits(r.base, r.tokenizer, edits))

    p, q = (log_p(edited(found[:n]), ids)[0, -1, z].exp().item() for n in (1, len(found)))
    assert q > 0.29 > 1.5 * p
    row = next(line for line in said.split("\n") if line.startswith("p(z) after words"))
    assert row.split()[-2:] == [f"{p:.1%}", f"{q:.1%}"]
    assert "near misses: KL" in said
    assert "8 windows of other text: KL" in said
    differ = (edited(found).senses(every) != edited(found[:1]).senses(every)).any(-1)
    assert differ.sum() == n - 1
    # once more: it goes on from the edits of the file, which stay
    lab.edit.main([*args, "--enough=0.6"])
    again = read_edits(file)
    assert again[:n] == found
    assert len(again) == 2 * n - 1
    assert log_p(edited(again), ids)[0, -1, z].exp() > 1.4 * q
    lab.edit.main([*args, "--enough=0"])  # nothing is to be learned
    assert read_edits(file) == again


def test_teaching_changes_other_text_by_no_more_than_it_may(run_train, data_dir, tmp_path):
    out = run_train("--max_iters=60", "--n_embd=32")
    file = tmp_path / "e.json"
    (tmp_path / "x.jsonl").write_text('{"prompt": "words ", "good": "z"}')
    args = [f"--run={out}", f"--data_dir={data_dir}", "--device=cpu", f"--edits={file}"]
    args += [f"--teach={tmp_path / 'x.jsonl'}", "--n_window=16"]
    r = open_run(out, "cpu")
    text = other_text(r, None, data_dir, 16)
    how = SimpleNamespace(teach="x.jsonl", seed=1337)
    known = Lesson(EditedBackpack(r.base), r.tokenizer, read_examples(tmp_path / "x.jsonl"), text, how).known
    kls = []
    for more in (["--max_kl=0"], ["--max_kl=0.01", "--enough=1", "--steps=40"]):
        file.unlink(missing_ok=True)
        lab.edit.main([*args, *more])
        edits = make_edits(r.base, r.tokenizer, read_edits(file))
        kl, _, _ = damage(r.base, EditedBackpack(r.base, edits), known)
        kls.append(kl)
    assert abs(kls[0]) < 1e-6
    assert 0.001 < kls[1] <= 0.0101


@pytest.mark.parametrize("limit, want", [(0.9, 0.875), (0.8, 0.75), (0.3, 0.25), (0.1, 0.0)])
def test_going_back(limit, want):
    """From 1 toward 0, as far as a KL that is the parameter itself allows; what is nan goes, too."""
    p = torch.ones(1)
    lab.teach.go_back(p, torch.zeros(1), p.item, limit)
    assert p.item() == want
    p.fill_(torch.nan)
    lab.teach.go_back(p, torch.zeros(1), p.item, limit)
    assert p.item() == 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "x.jsonl: found no lines, expected"),
        ("{]", "x.jsonl, line 1 is not JSON"),
        ('{"prompt": "a"}', "example 1: found None, expected a prompt, a good end"),
        ('{"prompt": "", "good": "z"}', "example 1: found '', expected"),
        ('{"prompt": "a", "good": "z", "keep": "a"}', "example 1: keep is not a list"),
        ('{"prompt": "abc", "good": "z", "subject": "ab"}', "does not have the words of subject"),
    ],
)
def test_bad_examples(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(UserError, match=re.escape(message)):
        read_examples(tmp_path / "x.jsonl")


def test_examples_that_do_not_fit_the_model(run_train, tmp_path):
    args = [f"--run={run_train()}", f"--teach={tmp_path / 'x.jsonl'}"]
    for prompt, more, message in [
        (20 * "do", "--n_window=13", "is 42 tokens, of at most block_size=8"),
        ("QQ", "--n_window=13", "x.jsonl: 'QQ': character 'Q' is not"),
        ("do", "--n_window=12", "n_window=12: expected 13 or more"),
    ]:
        (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": prompt, "good": " a"}))
        with pytest.raises(UserError, match=message):
            lab.edit.main([*args, more])
