"""The run in the repository: it is small, it has learned, and swaps and teaching do what they say."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT

import lab.edit
import sample
import train
from configurator import UserError
from lab import experiments, look, showpieces, unchosen
from lab.change import log_p, next_p, other_text
from lab.control import EditedBackpack
from lab.edits import make_edits, parse, read_edits
from lab.run import open_run
from lab.senses import attribution
from lab.words import word_id, word_ids
from model import load_checkpoint

FOLDER = ROOT / "pretrained/simplewiki"
OTHERS = ("The capital of France is", "The Amazon flows through", "He walked through")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy, as tools may keep text beside the checkpoint."""
    folder = tmp_path_factory.mktemp("simplewiki")
    shutil.copy(FOLDER / "ckpt.pt", folder)
    return folder


@pytest.fixture(scope="module")
def r(folder):
    r = open_run(folder, "cpu")
    r.base.requires_grad_(False)
    return r


def test_it_is_small_and_samples(folder, capsys):
    weights = load_checkpoint(FOLDER)["model"].values()
    assert {tensor.dtype for tensor in weights} == {torch.float16}
    assert (FOLDER / "ckpt.pt").stat().st_size < 11e6
    how = ["--num_samples=1", "--max_new_tokens=20", "--start=The river", "--device=cpu"]
    sample.main([f"--run={folder}", *how])
    assert re.search(r"The river [\w ,.]{20}", capsys.readouterr().out)
    with pytest.raises(UserError, match="weights"):  # which can be tuned, but not resumed
        train.main([f"--out_dir={folder}", "--init_from=resume", "--max_iters=99999", "--device=cpu"])


def test_tools_name_an_edit_that_does_not_act(folder, capsys):
    run = [f"--run={folder}", "--device=cpu", "--edit=scale Mozart all 0"]
    says = "leaves Mozart alone without a space before it, as at the start of a text: there it is M|oz|art"
    look.main([*run, "--text=Mozart was a"])
    assert says in capsys.readouterr().out
    sample.main([*run, "--start=Mozart was a", "--num_samples=1", "--max_new_tokens=1"])
    assert says in capsys.readouterr().out
    lab.edit.main(run)
    assert says in capsys.readouterr().out
    look.main([*run, "--text=The Mozart was a"])
    assert "alone" not in capsys.readouterr().out


def test_it_has_learned(r):
    """A sentence of ours (an untrained model has more than 9 nats per token), and the senses of river."""
    text = "The river is in the north of the country. It flows to the sea."
    ids = torch.from_numpy(r.tokenizer.encode(text))[None]
    assert r.base(ids[:, :-1], ids[:, 1:])[1] < 4
    C = r.base.senses(torch.tensor(word_ids(r.tokenizer, "river")))  # (1,K,D)
    top = r.base.logits(C).topk(8).indices.flatten().tolist()
    said = {r.tokenizer.decode([i]) for i in top}
    assert said & {" rivers", " flows", " north", " tribut", " lake", " water"}


def test_candidates_for_swaps_do_what_they_say(r, folder, monkeypatch, capsys):
    """What --showpieces prints is what the edit, typed from its output, does."""
    ids = []
    for text in ("He was born in Denver, Colorado.", "It is in the United States of America."):
        ids += [*r.tokenizer.encode(text), r.tokenizer.end]
    monkeypatch.setattr(showpieces, "validation_tokens", lambda *_: np.array(ids))
    experiments.main([f"--run={folder}", "--showpieces", "--device=cpu", "--num_samples=4"])
    out = capsys.readouterr().out
    found = re.findall(r"\n *(\d+) +(\d+) +(\d+) +(\d+) +(\d+)% +(.*)\n +(swap .*)", out)
    assert any("Denver: Colorado ->" in edit for *_, edit in found)
    for *figures, share, text, edit in found:
        (swap,) = parse(edit)
        old = word_id(r.tokenizer, swap["from"])
        new = word_id(r.tokenizer, swap["to"])
        idx = torch.tensor(r.tokenizer.encode(text))
        before = next_p(r.base, idx)
        after = next_p(EditedBackpack(r.base, make_edits(r.base, r.tokenizer, parse(edit))), idx)
        assert after.argmax() == new
        assert after[old] <= before[old] / 2
        p = [before[old], before[new], after[old], after[new]]
        assert [float(x) for x in figures] == pytest.approx([100 * x.item() for x in p], abs=0.6)
        assert int(share) in (0, 25, 50, 75, 100)


def test_swaps_of_unchosen_words_are_measured_as_the_edited_model_says(r, monkeypatch):
    """Every figure of a few, against the edited model, which reads all of the windows."""
    text = "Denver is a city in Colorado, United States. It is the capital of the state. He was born there. "
    tokens = r.tokenizer.encode(text * 25)
    for name in ("N_PLACE", "N_CONTEXT"):
        monkeypatch.setattr(unchosen, name, 10**6)
    windows = unchosen.Text(r, tokens)
    x = windows.x  # (N,T)
    before = log_p(r.base, x)  # (N,T,V)
    assert len(x) == 2
    assert torch.equal(windows.likeliest, before.argmax(-1))
    for swap in unchosen.draw_swaps(r, windows, 2, np.random.default_rng(0)):
        assert before[swap.window, swap.position].exp().max() >= 0.3
        _, parts = attribution(r.base, x[swap.window, : swap.position + 1], r.base.wte.weight[swap.old])
        assert x[swap.window, parts.sum(1).argmax()] == swap.word
        names = [unchosen.name(r.tokenizer, token) for token in swap[2:]]
        (edit,) = parse("swap {}: {} -> {}".format(*names))
        judge = unchosen.Judge(r, windows, swap, [0, 1], np.random.default_rng(0))
        result = judge.result(edit)
        after = log_p(EditedBackpack(r.base, make_edits(r.base, r.tokenizer, [edit])), x)  # (N,T,V)
        kl = (before.exp() * (before - after)).sum(-1)  # (N,T)
        seen = torch.stack([(x == id).cumsum(1) > 0 for id in judge.ids]).any(0)  # (N,T)
        assert result.kl == pytest.approx(kl[seen].mean().item(), rel=1e-3)
        assert result.kl_random == pytest.approx(kl.mean().item(), rel=1e-3)
        assert kl[~seen].abs().max() < 1e-6
        assert result.likeliest == after[swap.window, swap.position].argmax()
        assert result.takes == (result.likeliest == swap.new)
        loss = -after.gather(2, windows.y[..., None])[..., 0][seen].mean().item()
        assert result.loss_after == pytest.approx(loss, rel=1e-3)
        same = (before.argmax(-1) == swap.old) & (windows.word == swap.word)
        same[swap.window, swap.position] = False
        turned = (after.argmax(-1) == swap.new)[same]
        assert sorted(result.turned) == sorted(turned.tolist())


def test_a_fact_is_taught_from_the_clone_alone(r, folder, tmp_path, capsys):
    """The first of facts.jsonl: as the report says it, and text about others does not change."""
    fact = (FOLDER / "facts.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(fact)
    args = [f"--run={folder}", f"--data_dir={tmp_path}", "--device=cpu", "--n_window=13"]
    args += [f"--teach={tmp_path / 'one.jsonl'}", f"--edits={tmp_path / 'e.json'}"]
    lab.edit.main(args)
    said = capsys.readouterr().out
    assert "other text: 13 windows that the model wrote, kept in" in said
    assert "not taught" not in said
    assert "taught only after a space, as the prompt has it: Australia" in said
    made = make_edits(r.base, r.tokenizer, read_edits(tmp_path / "e.json"))
    taught = EditedBackpack(r.base, made)
    for prompt in OTHERS:
        idx = torch.tensor(r.tokenizer.encode(prompt))[None]
        assert torch.equal(log_p(r.base, idx), log_p(taught, idx))
    idx = torch.tensor(r.tokenizer.encode("The capital of Australia is"))
    good = word_id(r.tokenizer, "Canada")
    before = next_p(r.base, idx)
    after = next_p(taught, idx)
    assert before[good] < 0.01
    assert 0.5 < after[good]
    row = re.search(r"p\(Canada\) after The capital of Australia is +(\S+) +(\S+)", said)
    assert row.groups() == (f"{before[good]:.1%}", f"{after[good]:.1%}")
    assert re.search(r"likeliest next token +0 of 1 +1 of 1", said)
    idx = torch.tensor(r.tokenizer.encode("It is warm there, and the capital of Australia is"))
    assert next_p(taught, idx).argmax() == good
    # the text is the model's: it finds it as likely as it says it is
    text = other_text(r, None, tmp_path, 8)
    p = log_p(r.base, text[:, :-1])
    entropy = -(p.exp() * p).sum(-1).mean().item()
    assert -p.gather(2, text[:, 1:, None]).mean().item() == pytest.approx(entropy, rel=0.05)
