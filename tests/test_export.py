"""Exports for transformers: the same numbers as model.py's, in all that transformers does with a model."""

import json

import pytest
import torch
from conftest import lines
from test_layouts import SIZES, save_run, tensors_of
from torch.nn import functional as F

import model as model_py
from configurator import UserError
from lab import convert
from lab.control import EditedBackpack
from lab.edits import make_edits, parse, read_edits
from model import Backpack, BackpackConfig, load_checkpoint
from tokenizer import learn_bpe, load_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

EDITS = 'scale "d" 0 0; swap "o": "d" -> "c"; topic "w" 3'
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def load(folder, kind=transformers.AutoModelForCausalLM, **how):
    return kind.from_pretrained(folder, trust_remote_code=True, **how).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a vocabulary of 300 tokens, whose weights nothing has trained."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 300, "block_size": 32, "init_std": 0.2}
    spec = learn_bpe(lines(99), 300)
    folder = tmp_path_factory.mktemp("export") / "run"
    return save_run(folder, Backpack(BackpackConfig(**sizes)), spec)


@pytest.fixture(scope="module")
def exported(run):
    """Its folder for transformers."""
    folder = run.parent / "hf"
    convert.main([f"--source={run}", "--to=hf", f"--dest={folder}"])
    return folder


@pytest.fixture(scope="module")
def edited(run):
    """The same, with edits."""
    (run.parent / "edits.json").write_text(json.dumps(parse(EDITS)))
    folder = run.parent / "edited"
    edits = f"--edits={run.parent / 'edits.json'}"
    convert.main([f"--source={run}", "--to=hf", f"--dest={folder}", edits])
    return folder


@pytest.fixture(scope="module")
def ours(run):
    return Backpack.from_checkpoint(run)


@pytest.fixture
def theirs(exported):
    return load(exported)


@torch.no_grad()
def test_forward_and_generation(ours, theirs, tmp_path):
    x = torch.tensor([[5, 9, 1, 7, 7, 2]])
    found = theirs(x, labels=x, output_senses=True, output_contextualization=True)
    assert torch.allclose(found.logits, ours(x)[0], atol=1e-5)
    assert torch.equal(found.senses, ours.senses(x))
    assert torch.allclose(found.contextualization, ours.contextualization(x), atol=1e-6)
    assert abs(found.loss - ours(x[:, :-1], x[:, 1:])[1]) < 1e-5
    for use_cache in (True, False):
        assert torch.equal(
            theirs.generate(x, use_cache=use_cache, **GREEDY), ours.generate(x, 20, temperature=0)
        )
    beams = [theirs.generate(x, num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False)]
    assert torch.equal(*beams)
    batch = torch.tensor([[0, 0, 5, 9], [3, 3, 8, 1]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    rows = theirs.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(rows[0, 2:], ours.generate(batch[:1, 2:], 20, temperature=0)[0])
    assert torch.equal(rows[1], ours.generate(batch[1:], 20, temperature=0)[0])
    theirs.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, theirs(x).logits)


@torch.no_grad()
def test_edits_are_applied_and_come_back(run, ours, edited, tmp_path):
    """Also where transformers has saved the export again."""
    tokenizer = load_tokenizer(load_checkpoint(run)["meta"]["tokenizer"])
    x = torch.from_numpy(tokenizer.encode("document two"))[None]
    theirs = load(edited)
    theirs.save_pretrained(tmp_path / "saved")
    found = transformers.AutoTokenizer.from_pretrained(edited)
    assert found("document two").input_ids == x[0].tolist()
    assert found.eos_token_id == tokenizer.end
    found.save_pretrained(tmp_path / "saved")
    convert.main([f"--source={tmp_path / 'saved'}", f"--dest={tmp_path / 'back'}"])
    edits = read_edits(tmp_path / "back/edits.json")
    assert edits == parse(EDITS)
    assert load_checkpoint(tmp_path / "back")["meta"]["tokenizer"] == tokenizer.spec
    want, _ = EditedBackpack(ours, make_edits(ours, tokenizer, edits))(x)
    assert not torch.allclose(want, ours(x)[0], atol=1e-2)
    assert torch.allclose(theirs(x).logits, want, atol=1e-5)
    assert torch.allclose(theirs(x, use_cache=False).logits, want, atol=1e-5)
    first = theirs(x[:, :4])
    later = theirs(x[:, 4:], past_key_values=first.past_key_values)
    assert torch.allclose(later.logits, want[:, 4:], atol=1e-5)
    # from folder to folder, too, but not into a layout that has no place for them
    convert.main([f"--source={edited}", "--to=hf", f"--dest={tmp_path / 'again'}"])
    for name, tensor in tensors_of(tmp_path / "again").items():
        assert torch.equal(tensor, tensors_of(edited)[name])
    with pytest.raises(UserError, match="--to=levanter has no place for edits"):
        convert.main([f"--source={edited}", "--to=levanter", f"--dest={tmp_path / 'published'}"])


def trainer(model, texts, folder, max_steps):
    """transformers' Trainer: batches of 4 on the CPU, of which nothing is saved or reported."""
    how = {"use_cpu": True, "report_to": [], "save_strategy": "no", "learning_rate": 1e-2}
    how |= {"output_dir": folder, "max_steps": max_steps, "per_device_train_batch_size": 4}
    args = transformers.TrainingArguments(**how)
    return transformers.Trainer(model=model, args=args, train_dataset=texts, eval_dataset=texts)


def test_trainer(ours, theirs, tmp_path):
    x = torch.randint(300, (8, 20), generator=torch.Generator().manual_seed(0))
    texts = [{"input_ids": row, "labels": row} for row in x]
    loop = trainer(theirs, texts, tmp_path, max_steps=2)
    with torch.no_grad():
        want = ours(x[:, :-1], x[:, 1:])[1]
    assert abs(loop.evaluate()["eval_loss"] - want) < 1e-5
    before = theirs.backpack.sense_qk.weight.detach().clone()
    loop.train()
    assert (theirs.backpack.sense_qk.weight - before).abs().max() > 1e-3


def test_a_classifier(ours, exported, tmp_path):
    """A head on the last real token, wherever the padding is; a step of Trainer; saved and loaded."""
    model = load(exported, transformers.AutoModelForSequenceClassification, num_labels=3)
    x = torch.randint(1, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 1, 7])
    left = (torch.arange(9) >= 9 - lengths[:, None]).long()
    right = torch.stack([row.roll(n.item()) for row, n in zip(x, lengths)])
    y = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        plain = EditedBackpack(ours)
        texts = [row[None, 9 - n :] for row, n in zip(x, lengths)]
        want = torch.stack([model.score(plain.output(text)[0, -1]) for text in texts])
        found = model(x, attention_mask=left, labels=y)
        assert torch.allclose(found.logits, want, atol=1e-5)
        assert abs(found.loss - F.cross_entropy(want, y)) < 1e-5
        assert torch.allclose(model(right, attention_mask=left.flip(1)).logits, want, atol=1e-5)
        assert torch.allclose(model(x).logits[0], want[0], atol=1e-5)
    parts = [model.score, model.backpack.sense_qk, model.backpack.wte]
    before = [part.weight.detach().clone() for part in parts]
    texts = [{"input_ids": row, "label": n % 3} for n, row in enumerate(x)]
    trainer(model, texts, tmp_path, max_steps=1).train()
    assert all((part.weight - old).abs().max() > 1e-3 for part, old in zip(parts, before))
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model.eval()(x).logits)


def test_a_pipeline_generates_to_the_last_position(exported):
    """Not 256 tokens more, which are its default."""
    write = transformers.pipeline("text-generation", str(exported), trust_remote_code=True)
    (found,) = write("document one", return_tensors=True, eos_token_id=-1)
    assert len(found["generated_token_ids"]) == 32


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exported", "edited"])
def test_more_tokens(kind, request, tmp_path):
    """What the model says of the old ones stays, edits too; the new ones are saved and learn like any."""
    model = load(request.getfixturevalue(kind))
    x = torch.tensor([[5, 9, 1, 7]])
    before = model(x).logits
    model.resize_token_embeddings(303)
    assert model.config.vocab_size == 304  # as rows are a multiple of 8
    assert torch.allclose(model(x).logits[..., :300], before, atol=1e-5)
    edits = model.backpack.edits
    if edits is not None:  # the new tokens are not edited
        assert not edits.row[300:].any()
        assert (edits.w[:, 300:] == 1).all()
    new = torch.tensor([[5, 303]])
    with torch.enable_grad():
        model(new, labels=new).loss.backward()
    assert model.get_input_embeddings().weight.grad[303].any()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(new).logits, model(new).logits)
    model.resize_token_embeddings(8)
    assert torch.allclose(model(x % 8).logits, again(x % 8).logits[..., :8], atol=1e-5)


def test_the_model_card_of_a_trained_run(run_train, tmp_path):
    convert.main([f"--source={run_train()}", "--to=hf", f"--dest={tmp_path / 'hf'}"])
    card = (tmp_path / "hf/README.md").read_text()
    assert "# run: a Backpack language model" in card
    assert "2 layers, 2 heads, width 16, 4 senses" in card
    assert "**Data**: tiny, " in card
    assert "12 steps of 64 tokens; init_from scratch, " in card
    assert " (12)." in card  # the last validation loss


def test_a_fork_with_another_sum_is_not_exported_in_silence(run, tmp_path, monkeypatch):
    before = model_py.sum_block
    monkeypatch.setattr(model_py, "sum_block", lambda *args: 2 * before(*args))
    with pytest.raises(UserError, match="this model.py sums senses otherwise"):
        convert.main([f"--source={run}", "--to=hf", f"--dest={tmp_path / 'hf'}"])
