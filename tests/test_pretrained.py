"""The run in the repository: it samples, is small, and its attribution is exact."""

import numpy as np
import pytest
import torch
from conftest import ROOT

import sample
import train
from lab.look import attribution, says
from tokenizer import word_ids

FOLDER = ROOT / "pretrained/simplewiki"


@pytest.fixture(scope="module")
def run():
    r = sample.open_run(FOLDER, "cpu")
    return r.model, r.tokenizer


def test_it_samples_and_is_small(capsys):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10e6
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
    """A sentence of ours (an untrained model has ln 8192 = 9 nats per token), and the senses of river."""
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
        idx = torch.from_numpy(random.integers(8192, size=random.integers(1, 129)))
        y = int(random.integers(8192))
        logit = model(idx[None])[0][0, -1, y]
        assert abs(attribution(model, idx, model.wte.weight[y])[1].sum() - logit) < 1e-4
