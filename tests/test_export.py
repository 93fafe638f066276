"""Exports for transformers: the same numbers as model.py's, in all that transformers does with a model."""

import importlib.util
import json
import os
import re

import pytest
import torch
from conftest import ROOT, lines
from test_layouts import SIZES, imported, refused, save_run, source, tensors_of
from torch.nn import functional as F

import model as model_py
from configurator import UserError
from lab import convert
from lab.control import EditedBackpack
from lab.edits import make_edits, parse, read_edits
from model import Backpack, BackpackConfig, contextualize, load_checkpoint
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


def test_the_matrix_of_the_logits_may_be_saved_twice(ours, exported, tmp_path):
    """As tools do that know nothing of tied weights; but then it is E."""
    config = json.loads((exported / "config.json").read_text())
    tensors = tensors_of(exported)
    folder = source(tmp_path / "twice", tensors | {"lm_head.weight": torch.ones(300, 24)}, config)
    refused(tmp_path, folder, "lm_head.weight is not backpack.wte.weight", "--tokenizer=none")
    source(folder, tensors | {"lm_head.weight": tensors["backpack.wte.weight"]}, config)
    again = imported(tmp_path, folder, "--tokenizer=none")
    x = torch.tensor([[5, 9, 1, 7, 7, 2]])
    assert torch.equal(again(x)[0], ours(x)[0])


def trainer(model, texts, folder, max_steps):
    """transformers' Trainer: batches of 4 on the CPU, of which nothing is saved or reported."""
    how = {"use_cpu": True, "report_to": [], "save_strategy": "no", "learning_rate": 1e-2}
    how |= {"output_dir": folder, "max_steps": max_steps, "per_device_train_batch_size": 4}
    args = transformers.TrainingArguments(**how)
    return transformers.Trainer(model=model, args=args, train_dataset=texts, eval_dataset=texts)


def test_trainer(ours, theirs, tmp_path):
    x = torch.randint(300, (8, 20), generator=torch.Generator().manual_seed(0))
    labels = x.clone()
    labels[:, 0] = -100  # nothing predicts the first token, but transformers 4 counts it
    texts = [{"input_ids": row, "labels": label} for row, label in zip(x, labels)]
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
    assert model.config.vocab_size == 303
    assert torch.allclose(model(x).logits[..., :300], before, atol=1e-5)
    edits = model.backpack.edits
    if edits is not None:  # the new tokens are not edited
        assert not edits.row[300:].any()
        assert (edits.w[:, 300:] == 1).all()
    new = torch.tensor([[5, 302]])
    with torch.enable_grad():
        model(new, labels=new).loss.backward()
    assert model.get_input_embeddings().weight.grad[302].any()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(new).logits, model(new).logits)
    model.resize_token_embeddings(8)
    assert torch.allclose(model(x % 8).logits, again(x % 8).logits[..., :8], atol=1e-5)


@torch.no_grad()
def test_the_network_and_its_arguments(ours, exported, theirs):
    """Each is heeded or refused."""
    x = torch.tensor([[5, 9, 1, 7, 7, 2]])
    want, _ = ours(x)
    o = theirs.base_model(input_ids=x, attention_mask=torch.ones_like(x)).last_hidden_state
    assert torch.allclose(o @ theirs.get_output_embeddings().weight.T, want, atol=1e-5)
    assert torch.equal(theirs.base_model(x, return_dict=False)[0], theirs.base_model(x)[0])
    assert theirs.get_output_embeddings().bias is None
    assert torch.allclose(load(exported, transformers.AutoModel)(x).last_hidden_state, o, atol=1e-6)
    states = theirs(x, output_hidden_states=True).hidden_states
    assert len(states) == ours.config.n_layer + 1
    first = ours.wte(x) + ours.wpe(torch.arange(6))
    assert torch.allclose(states[0], first)
    assert torch.allclose(states[1], ours.blocks[0](first), atol=1e-6)
    assert torch.allclose(states[-1], ours.hidden(x), atol=1e-6)
    assert torch.allclose(theirs(x, logits_to_keep=2).logits, want[:, -2:], atol=1e-5)
    kept = torch.tensor([1, 3])
    assert torch.allclose(theirs(x, logits_to_keep=kept).logits, want[:, kept], atol=1e-5)
    cache = theirs(x[:, :2]).past_key_values
    later = theirs(x[:, 2:], past_key_values=cache, labels=x[:, 2:], output_contextualization=True)
    assert torch.allclose(later.logits, want[:, 2:], atol=1e-5)
    assert torch.allclose(later.contextualization, ours.contextualization(x)[:, :, 2:], atol=1e-6)
    inputs = theirs.get_input_embeddings()(x)
    assert torch.allclose(theirs(inputs_embeds=inputs).logits, want, atol=1e-5)
    assert theirs(x, return_dict=False)[0].shape == want.shape
    foreign = transformers.DynamicCache()
    foreign.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    for arguments, message in (
        ({"output_sense": True}, "output_sense"),
        ({"output_attentions": True}, "output_contextualization gives alpha"),
        ({"attention_mask": torch.ones(1, 3)}, r"found shape \[1, 3\], expected \[1, 6\]"),
        ({"attention_mask": torch.ones(1, 40), "input_ids": x.repeat(1, 7)[:, :40]}, "40 tokens are more"),
        ({"past_key_values": foreign}, "expected those that this model returned"),
        ({"inputs_embeds": inputs}, "either input_ids or inputs_embeds"),
        ({"seq_idx": x}, "need position_ids"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            theirs(**{"input_ids": x} | arguments)


@torch.no_grad()
def test_embeddings_and_packed_rows_are_refused_where_edits_need_to_know_more(edited):
    model = load(edited)
    x = torch.tensor([[5, 9, 1]])
    with pytest.raises(ValueError, match="has edits, which belong to token ids"):
        model(inputs_embeds=model.get_input_embeddings()(x))
    with pytest.raises(ValueError, match="topics take one text a row"):
        model(x, position_ids=torch.tensor([[0, 1, 0]]))


@torch.no_grad()
def test_packed_rows_are_separate_texts(ours, theirs):
    """Also beyond block_size together."""
    x = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    found = theirs(x, position_ids=positions).logits
    assert torch.allclose(found[:, :25], ours(x[:, :25])[0], atol=1e-5)
    assert torch.allclose(found[:, 25:], ours(x[:, 25:])[0], atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_no_bit(exported, padded):
    model = load(exported).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    x = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x)
    mask[0, : 3 * padded] = 0
    calls = []
    model.backpack.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def loss_and_gradient():
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(x, attention_mask=mask, labels=x).loss
        loss.backward()
        return loss, model.lm_head.weight.grad.clone()

    before = loss_and_gradient()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    for a, b in zip(loss_and_gradient(), before):
        assert torch.equal(a, b)
    assert len(calls) == 3  # computed again in backward
    with pytest.raises(ValueError, match="would extend the cache again"):
        model(x, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_logits(ours, theirs, tmp_path, how):
    import accelerate

    if how == "cpu":
        model = accelerate.cpu_offload(theirs, execution_device="cpu")
    else:
        model = accelerate.disk_offload(theirs, tmp_path, execution_device="cpu")
    assert model.backpack.wte.weight.is_meta
    x = torch.tensor([[5, 9, 1, 7, 7, 2]])
    assert torch.allclose(model(x).logits, ours(x)[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif("COMPILE" not in os.environ, reason="takes 5 s; COMPILE=eager runs it")
def test_an_export_compiles_whole(theirs):
    compiled = torch.compile(theirs, fullgraph=True, backend=os.environ["COMPILE"])
    x = torch.tensor([[5, 9, 1, 7, 7, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.allclose(compiled(x, mask).logits, theirs(x, mask).logits, atol=1e-5)


# -----------------------------------------------------------------------------
# tools that look into a model or train it; most are in no requirements file

X = torch.tensor([[5, 9, 1, 7, 7, 2, 3]])
Y = torch.tensor([[8, 2, 6, 4, 1, 5, 0]])
TOKEN = 11
EXAMPLES = re.findall(r"```python\n(import (\w+).*?)```", (ROOT / "lab/README.md").read_text(), re.S)


@pytest.fixture
def parts(ours):
    """Of X: alpha (K,T,T), its senses (T,K,D); and E (V,D)."""
    with torch.no_grad():
        alpha = contextualize(*ours.query_key(ours.hidden(X)))
        return alpha[0], ours.senses(X)[0], ours.wte.weight[: ours.config.vocab_size]


def sum_of_senses(alpha, C):
    """o (T,D), as the paper's equation has it."""
    o = torch.zeros(len(C), C.size(2))
    for i in range(len(C)):
        for j in range(len(C)):
            for sense in range(C.size(1)):
                o[i] += alpha[sense, i, j] * C[j, sense]
    return o


def example(tool, exported, folder):
    """Run what lab/README.md shows of a tool; returns the module with the names that this leaves."""
    pytest.importorskip(tool)
    (code,) = [code for code, name in EXAMPLES if name == tool]
    path = folder / "example.py"
    path.write_text(code)  # nnsight reads the source
    spec = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(model=load(exported), x=X, y=Y, t=TOKEN)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_hooks_find_the_parts(ours, theirs, parts):
    """Each module is called once, and the rest of the model goes on from what its hook returns."""
    alpha, C, E = parts
    calls = []
    for name, want in (("alpha", alpha), ("sense_network", C), ("wte", ours.wte(X)[0])):
        module = getattr(theirs.backpack, name)

        def halve(module, args, output, want=want):
            calls.append(module)
            assert torch.allclose(output[0], want, atol=1e-6)
            return output / 2

        with module.register_forward_hook(halve):
            found = theirs(X, use_cache=False).logits[0]
        if name != "wte":  # in which the model is not linear
            assert torch.allclose(found, sum_of_senses(alpha / 2, C) @ E.T, atol=1e-4)
    assert len(calls) == 3
    with theirs.backpack.o.register_forward_hook(lambda module, args, o: 2 * o):
        assert torch.allclose(theirs(X).logits[0], 2 * sum_of_senses(alpha, C) @ E.T, atol=1e-4)
    # training spares whole weights, and senses of equal tokens
    shapes = []
    theirs.train()
    for module in (theirs.backpack.alpha, theirs.backpack.sense_network):
        module.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert torch.allclose(theirs(X).logits[0], sum_of_senses(alpha, C) @ E.T, atol=1e-4)
    assert shapes == [(6, *C.shape[1:])]


@torch.no_grad()
def test_pyvene_swaps_the_senses_of_a_position(exported, ours, parts, tmp_path):
    found = example("pyvene", exported, tmp_path)
    alpha, C, E = parts
    C[4] = ours.senses(Y[0, 4])
    assert torch.allclose(found.output.logits[0], sum_of_senses(alpha, C) @ E.T, atol=1e-4)


def test_nnsight_takes_the_weight_of_a_sense_away(exported, parts, tmp_path):
    found = example("nnsight", exported, tmp_path)
    alpha, C, E = parts
    alpha[3] = 0
    assert torch.allclose(found.output.logits[0], sum_of_senses(alpha, C) @ E.T, atol=1e-4)


def test_captum_splits_a_logit_over_senses(exported, parts, tmp_path):
    found = example("captum", exported, tmp_path)
    alpha, C, E = parts
    for j in range(X.size(1)):
        for sense in range(C.size(1)):
            want = alpha[sense, -1, j] * C[j, sense] @ E[TOKEN]
            assert abs(found.senses[0, j, sense] - want) < 1e-4


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_with_lora(exported, tmp_path, packing):
    """With gradient checkpointing, which is trl's default."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    how = {"use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 1, "max_length": 32}
    loop = trl.SFTTrainer(
        model=load(exported),
        args=trl.SFTConfig(output_dir=tmp_path, packing=packing, **how),
        train_dataset=datasets.Dataset.from_list([{"text": "document one"}] * 8),
        processing_class=transformers.AutoTokenizer.from_pretrained(exported),
        peft_config=peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    loop.train()
    learned = [name for name, p in loop.model.named_parameters() if "lora_B" in name and p.any()]
    for layer in ("sense_qk", "sense_network.mlp_out.proj", "blocks.0.attn.qkv"):
        assert any(f".{layer}.lora_B" in name for name in learned), layer


# -----------------------------------------------------------------------------
# what lies in the folder


def test_special_ids_are_in_the_config(run, theirs):
    end = load_tokenizer(load_checkpoint(run)["meta"]["tokenizer"]).end
    for role in ("pad", "bos", "eos"):
        assert getattr(theirs.config, f"{role}_token_id") == end


def test_the_model_card_of_a_trained_run(run_train, tmp_path, monkeypatch):
    to = ["--to=hf", f"--dest={tmp_path / 'hf'}", "--license=mit"]
    convert.main([f"--source={run_train()}", *to])
    card = (tmp_path / "hf/README.md").read_text()
    assert "# run: a Backpack language model" in card
    assert "2 layers, 2 heads, width 16, 4 senses" in card
    assert "**Data**: tiny, " in card
    assert "12 steps of 64 tokens; init_from scratch, " in card
    assert " (12)." in card  # the last validation loss
    assert "\nlicense: mit\n" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("max_new_tokens=20", "max_new_tokens=2"), names)  # it has 8 positions
    assert names["output"].senses.shape == (1, 6, 4, 16)


def test_a_fork_is_not_exported_in_silence(run, tmp_path, monkeypatch):
    to = [f"--source={run}", "--to=hf", f"--dest={tmp_path / 'hf'}"]
    with monkeypatch.context() as patch:
        sum_block = model_py.sum_block
        patch.setattr(model_py, "sum_block", lambda *args: 2 * sum_block(*args))
        with pytest.raises(UserError, match="this model.py sums senses otherwise"):
            convert.main(to)
    logits = Backpack.logits
    monkeypatch.setattr(Backpack, "logits", lambda self, o: 2 * logits(self, o))
    with pytest.raises(UserError, match="the export's logits are not the model's"):
        convert.main(to)
    assert list(tmp_path.iterdir()) == []
