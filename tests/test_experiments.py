"""The experiments: their figures against loops and against scipy, and that each of them runs."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset

import train
from configurator import UserError
from lab import experiments
from lab.run import open_run
from lab.words import word_id

PEOPLE = "nurse teacher doctor king".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, backpack and transformer, and their dataset, whose vocabulary has people, he and she."""
    folder = tmp_path_factory.mktemp("people")
    documents = []
    for i in range(240):
        he = ("he", "she")[i % 2]
        said = f"The {PEOPLE[i // 2 % 4]} said that {he} was a music fan {i}."
        documents.append(f"{said}\n{he.title()} saw the sport of food.")
    make_dataset(folder, "people", documents, "--tokenizer=bpe", "--vocab_size=330", "--val_fraction=0.2")
    for name, n_sense in (("backpack", 4), ("transformer", 0)):
        args = [f"--out_dir={folder / name}", f"--data_dir={folder}", "--dataset=people"]
        train.main([*TINY, *args, "--block_size=32", "--max_iters=40", f"--n_sense={n_sense}"])
    return folder


@torch.no_grad()
def test_he_or_she_in_a_batch_of_texts_of_unlike_lengths(folder):
    r = open_run(folder / "backpack", "cpu")
    prompts = ["The PROFESSION said that", "A PROFESSION knows that the", "PROFESSION"]
    found = experiments.he_she(r.base, r.tokenizer, prompts, PEOPLE)
    for i, noun in enumerate(PEOPLE):
        for j, prompt in enumerate(prompts):
            ids = r.tokenizer.encode(prompt.replace("PROFESSION", noun))
            p = r.base(torch.tensor(ids)[None])[0][0, -1].softmax(-1)
            he, she = (p[word_id(r.tokenizer, word)].item() for word in ("he", "she"))
            assert found[i, j].item() == pytest.approx(max(he / she, she / he), rel=1e-4)
    with pytest.raises(UserError, match="is 36 tokens, not 1 to 32"):
        experiments.he_she(r.base, r.tokenizer, ["#" * 36], PEOPLE)


def test_correlation_of_ranks_is_spearmans():
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(0).integers(5, size=(2, 40))
    ranks_x = stats.rankdata(x)
    ranks_y = stats.rankdata(y)
    found = experiments.correlation(ranks_x, ranks_y)
    assert found == pytest.approx(stats.spearmanr(x, y).statistic)
    samples = np.random.default_rng(1).integers(40, size=(3, 40))
    want = [np.corrcoef(ranks_x[row], ranks_y[row])[0, 1] for row in samples]
    assert np.allclose(experiments.correlation(ranks_x[samples], ranks_y[samples]), want)


def test_best_factor():
    pytest.importorskip("scipy")
    # the least of 20 (f - 0.3)^2 + 1 - f
    assert experiments.best_factor(lambda f: 20 * (f - 0.3) ** 2) == pytest.approx(0.325, abs=0.02)
    assert experiments.best_factor(lambda f: -9 * f) == 1


def test_every_experiment_runs(folder, tmp_path, capsys):
    pytest.importorskip("scipy")
    pairs = [("nurse", "teacher", 9), ("nurse", "king", 2), ("doctor", "music", 1), ("food", "sport", 4)]
    for file, (separator, columns) in experiments.SETS.items():
        rows = []
        for pair in 6 * pairs:
            row = ["-"] * 5
            for column, value in zip(columns, pair):
                row[column] = str(value)
            rows.append(separator.join(row))
        (tmp_path / file).write_text("\n".join(rows))
    stimuli = {"professions": PEOPLE, "topics": {"music": ["music", "c++ ("]}}
    (tmp_path / "s.json").write_text(json.dumps(stimuli))
    swap = {"edit": "swap", "word": "nurse", "from": "he", "to": "she"}
    (tmp_path / "e.json").write_text(json.dumps([swap] * 12))
    capsys.readouterr()
    args = [f"--run={folder / 'backpack'}", f"--data_dir={folder}", "--device=cpu", "--n_bootstrap=20"]
    args += [f"--lexical={tmp_path}", "--words", f"--damage={tmp_path / 'e.json'}"]
    args += ["--swaps", "--rates", "--n_swap=5", "--showpieces"]
    args += ["--topics", "--num_samples=3", "--max_new_tokens=10"]
    args += ["--bias", f"--transformer={folder / 'transformer'}", f"--prompts={tmp_path / 's.json'}"]
    experiments.main(args)
    out = capsys.readouterr().out
    for said in [
        r"SimVerb-3500.txt, all 24 pairs\nsense 0",
        r"RG65.csv, 24 of words of one token",
        r"sense \d over the embedding: [+-]\d",
        r"4 of 4 professions are one token",
        r"its Transformer as it is +\d",
        r"mean perplexity +\d",
        r"by document: word perplexity \d",
        r"text without the word is unchanged +100.0%",
        r"its logit is as the formula says +0.0000\d",
        r"4 +17 of 17",
    ]:
        assert re.search(said, out)
    assert "nan" not in out
    harm = [line.split() for line in out.split("edits   KL")[1].split("\n")[1:4]]
    assert [row[0] for row in harm] == ["1", "10", "12"]  # the same swap, anew
    assert float(harm[0][1]) > 0


def test_mistakes(folder, run_train, data_dir, tmp_path):
    with pytest.raises(UserError, match="give one of --lexical, --bias"):
        experiments.main([f"--run={folder / 'backpack'}"])
    with pytest.raises(FileNotFoundError, match="SimLex-999.txt"):
        experiments.main([f"--run={folder / 'backpack'}", "--lexical=nowhere"])
    with pytest.raises(UserError, match="transformer is a plain Transformer"):
        experiments.main([f"--run={folder / 'transformer'}", "--bias"])
    of_characters = [f"--run={run_train()}", f"--data_dir={data_dir}"]
    for task in ("--words", "--swaps", "--rates", "--showpieces"):
        with pytest.raises(UserError, match="there is no dataset at .*people: make one with"):
            experiments.main([f"--run={folder / 'backpack'}", f"--data_dir={tmp_path}", task])
        with pytest.raises(UserError, match=f"{task} needs a dataset whose documents end with a token"):
            experiments.main([*of_characters, task])


def test_pairs(tmp_path):
    text = "Word 1,Word 2,Human (mean)\r\nlove\u2028,word,6.77 \r\nwords , word,-1\r\nword,page,3\r\n"
    (tmp_path / "pairs.csv").write_bytes(text.encode("utf-8-sig"))
    pairs = experiments.read_pairs(tmp_path / "pairs.csv", ",", (0, 1, 2))
    assert pairs == [("love", "word", 6.77), ("words", "word", -1.0), ("word", "page", 3.0)]


@pytest.mark.parametrize("text", ["", "Word 1,Word 2,Score\ntiger,cat", "a,b,high"])
def test_bad_pairs(tmp_path, text):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match="line [12]: .* is not two words and a score"):
        experiments.read_pairs(tmp_path / "pairs.csv", ",", (0, 1, 2))


@pytest.mark.parametrize("text", ["[]", '{"professions": "nurse"}', '{"topics": {"music": "a"}}'])
def test_bad_stimuli(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match="s.json: .* lab/stimuli.json"):
        experiments.read_stimuli(tmp_path / "s.json")


@pytest.mark.parametrize("kind", ["backpack", "transformer"])
@torch.no_grad()
def test_word_perplexity_in_loops(folder, kind, tmp_path, capsys):
    """Each document alone, after the token that ends the one before, in windows of at most T tokens."""
    r = open_run(folder / kind, "cpu", senses=False)
    T = r.base.config.block_size
    shutil.copytree(folder / "people", tmp_path / "people")
    val = np.fromfile(tmp_path / "people/val.bin", "<u2")
    val = val[: np.flatnonzero(val == r.tokenizer.end)[20] + 1]  # 21 documents
    val.tofile(tmp_path / "people/val.bin")
    capsys.readouterr()
    experiments.main([f"--run={r.path}", f"--data_dir={tmp_path}", "--words", "--device=cpu"])
    shown = capsys.readouterr().out
    loss = 0.0
    n_words = 0
    for document in r.tokenizer.decode(val).split("<|endoftext|>")[:-1]:
        n_words += len(document.split())
        ids = [r.tokenizer.end, *r.tokenizer.encode(document).tolist()]
        last = max(0, len(ids) - 1 - T)  # where the last window starts
        for i in range(1, len(ids)):
            start = min((i - 1) // T * T, last)
            logits, _ = r.base(torch.tensor([ids[start:i]]))
            loss -= logits[0, -1].log_softmax(-1)[ids[i]].item()
    assert f", {n_words:,} words" in shown
    found = float(re.search(r"word perplexity ([\d.]+), ", shown)[1])
    assert found == pytest.approx(np.exp(loss / n_words), abs=0.006, rel=1e-5)
