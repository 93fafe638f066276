"""Prompts and answers: their dataset, the targets that count, and the exact mean over a step."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import records
from torch.nn import functional as F

import prepare_data
import train
from configurator import UserError
from model import Backpack, BackpackConfig, load_checkpoint
from tokenizer import END, load_tokenizer


def prepare(folder, rows, *args):
    """Make the dataset folder/qa of these rows, of bytes and a token that ends an answer."""
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = [f"--data_dir={folder}", "--dataset=qa", f"--input={folder / 'qa.jsonl'}"]
    tokenizer = [] if "--tokenizer=char" in args else ["--tokenizer=bpe", "--vocab_size=257"]
    prepare_data.main([*where, "--column=prompt,answer", *tokenizer, *args])
    return folder / "qa"


def documents(folder, split):
    """[(prompt ids, answer ids with the end)] of a dataset, by its mask, a token at a time."""
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    ids = np.fromfile(folder / f"{split}.bin", dtype)
    mask = np.fromfile(folder / f"{split}_mask.bin", np.uint8)
    assert len(ids) == len(mask)
    found = []
    for i, (token, is_answer) in enumerate(zip(ids.tolist(), mask.tolist())):
        if not is_answer and (i == 0 or mask[i - 1]):
            found.append(([], []))
        found[-1][is_answer].append(token)
    return found


# ---- the dataset


def test_every_prompt_and_answer_comes_back(tmp_path):
    """As they are, also where they name the end of a document; a prompt is for one split only."""
    rows = [{"prompt": f"{i % 150}+1=", "answer": f" {i}\n"} for i in range(300)]
    rows += [{"prompt": END, "answer": ""}, {"prompt": "naïve?", "answer": f"{END} 日本"}]
    folder = prepare(tmp_path, [*rows, {"prompt": "nothing", "answer": None}], "--val_fraction=0.2")
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(meta["tokenizer"])
    assert meta["documents"] == len(rows)
    found = {}
    for split in ("train", "val"):
        found[split] = []
        for prompt, answer in documents(folder, split):
            assert answer.pop() == tokenizer.end
            found[split].append((tokenizer.decode(prompt), tokenizer.decode(answer)))
    assert sorted(found["train"] + found["val"]) == sorted((row["prompt"], row["answer"]) for row in rows)
    assert not {prompt for prompt, _ in found["train"]} & {prompt for prompt, _ in found["val"]}
    assert len(found["val"]) > 20


def test_a_dataset_of_text_in_its_place_has_no_masks(tmp_path):
    folder = prepare(tmp_path, [{"prompt": f"{i}", "answer": "yes"} for i in range(30)])
    assert (folder / "train_mask.bin").exists()
    (tmp_path / "t.txt").write_text("a text")
    where = [f"--data_dir={tmp_path}", "--dataset=qa", f"--input={tmp_path / 't.txt'}"]
    prepare_data.main([*where, "--tokenizer=char", "--overwrite"])
    assert {path.name for path in folder.iterdir()} == {"meta.json", "train.bin", "val.bin"}


@pytest.mark.parametrize(
    "row, arg, message",
    [
        (
            {"prompt": "", "answer": "no"},
            "--vocab_size=257",
            "a prompt has no tokens: '', with the answer 'no'",
        ),
        ({"prompt": "a"}, "--vocab_size=257", 'row 2: expected {"prompt": "...", "answer": "..."}'),
        ({"prompt": "a", "answer": 3}, "--vocab_size=257", "this is no text"),
        ({"prompt": "a", "answer": ""}, "--tokenizer=char", "an answer needs a token that ends it"),
        ({"prompt": "a", "answer": ""}, "--column=prompt,answer,b", "expected one field, or two of your own"),
        ({"prompt": "a", "answer": ""}, "--input=t.txt,qa.jsonl", "but some input is plain text"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, row, arg, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a text")
    with pytest.raises(UserError) as error:
        prepare(tmp_path, [{"prompt": "1", "answer": "2"}, row], arg)
    assert message in str(error.value)
    assert not (tmp_path / "qa/train.bin").exists()


# ---- targets


def test_only_the_answer_of_one_document_counts():
    tokens = np.array([5, 6, 7, 0, 8, 9, 0, 4, 0])
    answers = np.array([0, 0, 1, 1, 0, 1, 1, 0, 1], np.uint8)
    starts = train.document_starts(answers)
    assert starts.tolist() == [0, 4, 7]
    x, y = train.cut_windows(tokens, starts, 4, answers)
    assert y.tolist() == [[-100, 7, 0, -100], [9, 0, -100, -100], [0, -100, -100, -100]]
    assert x[:2].tolist() == [[5, 6, 7, 0], [8, 9, 0, 4]]
    # a document that is longer than a window is cut off
    assert train.cut_windows(tokens, starts, 2, answers)[1].tolist() == [[-100, 7], [9, 0], [0, -100]]


def losses_of_answers(model, found, T):
    """(the loss of each target of these documents, the ids of these targets), a document by itself."""
    losses = []
    targets = []
    for prompt, answer in found:
        ids = torch.tensor(prompt + answer)[: T + 1]
        logits = model(ids[None, :-1])[0][0]
        y = ids[len(prompt) :]
        losses.append(F.cross_entropy(logits[len(prompt) - 1 :], y, reduction="none"))
        targets += y.tolist()
    return torch.cat(losses), targets


@pytest.mark.parametrize("batch_size", [8, 2])
def test_a_step_is_the_mean_over_its_targets_and_an_evaluation_too(run_train, pairs, batch_size):
    """Micro-batches have from 2 targets to 7."""
    steps = "--max_iters=1", "--warmup_iters=0", "--transformer_share=0", "--full_val"
    out = run_train("--dataset=pairs", f"--batch_size={batch_size}", *steps)
    ckpt = load_checkpoint(out)
    torch.manual_seed(5)
    model = Backpack(BackpackConfig(**ckpt["config"]))
    found = documents(pairs, "train")
    starts = np.cumsum([0] + [len(prompt + answer) for prompt, answer in found]).tolist()
    assert max(b - a for a, b in pairwise(starts)) > 9  # some don't fit
    drawn = np.random.default_rng((5, 0)).choice(starts[:-1], size=8)
    losses, _ = losses_of_answers(model, [found[starts.index(i)] for i in drawn], 8)
    losses.mean().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert records(out, "loss")[1] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert records(out, "grad_norm")[1] == pytest.approx(norm, rel=1e-5)

    losses, targets = losses_of_answers(Backpack.from_checkpoint(out), documents(pairs, "val"), 8)
    assert records(out, "val_loss")[1] == pytest.approx(losses.mean().item(), rel=1e-5)
    end = load_tokenizer(ckpt["meta"]["tokenizer"]).end
    n_bytes = sum(target != end for target in targets)  # the end is no text
    bits = losses.sum().item() / n_bytes / math.log(2)
    assert records(out, "bits_per_byte")[1] == pytest.approx(bits, rel=1e-5)


def test_windows_that_end_before_any_answer_are_refused(run_train, pairs, capsys):
    with pytest.raises(UserError, match="block_size=1 ends before any answer of pairs begins"):
        run_train("--dataset=pairs", "--block_size=1")
    run_train("--dataset=pairs", "--max_iters=4")
    assert "are longer than block_size=8" in capsys.readouterr().out
