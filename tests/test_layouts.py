"""Published layouts: weights made up in each of them against the equations, and there and back."""

import json
from dataclasses import asdict

import pytest
import torch

import model as model_py
from configurator import UserError
from lab import convert, reference
from lab.layouts import module_names, to_layout, to_ours
from model import Backpack, BackpackConfig, Block
from train import save_checkpoint

D, LAYERS, HEADS, K, T, V = 24, 2, 3, 4, 16, 40
SIZES = {"block_size": T, "vocab_size": V, "n_layer": LAYERS, "n_head": HEADS, "n_embd": D}
SIZES["n_sense"] = K
CONFIG = {"n_head": HEADS, "vocab_size": V, "scale_attn_by_inverse_layer_idx": True}
CONFIG |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def random_hf():
    """Tensors as in the published pytorch_model.bin; published_logits tells whether they are right."""
    torch.manual_seed(0)
    model = Backpack(BackpackConfig(**SIZES))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    found = to_layout(model.state_dict(), model.config, "backpack-gpt2", V)
    for i in range(LAYERS):
        attention = f"backpack.gpt2_model.h.{i}.attn"
        found[f"{attention}.bias"] = torch.ones(1, 1, T, T).tril()
        found[f"{attention}.masked_bias"] = torch.tensor(-1e4)
    return found


# from Hugging Face's names to those of lab/reference.py, one after the other
RENAMED = [
    ("backpack.sense_weight_net.c_attn", "sense_qk"),  # a Linear, all others with "c_" are Conv1D
    ("backpack.gpt2_model.h.", "blocks."),
    ("backpack.gpt2_model.", ""),
    ("backpack.sense_network.ln.", "sense_network.ln_0."),
    ("backpack.sense_network.block.", "sense_network."),
    ("backpack.sense_network.final_mlp.", "sense_network.mlp_out."),
    ("c_attn", "qkv"),
    ("c_fc", "fc"),
    ("c_proj", "proj"),
]


def published_logits(w, ids):
    """Logits (T,V) of tensors in Hugging Face's layout, from the paper's equations; ids: a list."""
    renamed = {}
    for name, tensor in w.items():
        for theirs, ours in RENAMED:
            is_conv1d = ours in ("qkv", "fc", "proj") and theirs in name
            name = name.replace(theirs, ours)
            if is_conv1d and name.endswith(".weight"):
                tensor = tensor.T  # (in,out) -> (out,in)
        renamed[name] = tensor
    return reference.logits(ids, renamed, BackpackConfig(**SIZES))


def source(folder, tensors, config=CONFIG):
    """A folder with weights and a config.json, as others publish them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def imported(tmp_path, folder, *args):
    """The model of the run that lab.convert makes of a source."""
    convert.main([f"--source={folder}", f"--dest={tmp_path / 'run'}", *args])
    return Backpack.from_checkpoint(tmp_path / "run")


def refused(tmp_path, folder, message, *args):
    """The import ends with one line that has this message, and leaves nothing behind."""
    with pytest.raises(UserError, match=message) as error:
        imported(tmp_path, folder, *args)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def save_run(folder, model, spec=None):
    """A run of this model, as train.py saves it."""
    folder.mkdir(exist_ok=True)
    meta = {"tokenizer": spec, "vocab_size": model.config.vocab_size}
    ckpt = {"model": model.state_dict(), "config": asdict(model.config), "settings": {}, "step": 0}
    save_checkpoint(folder / "ckpt.pt", ckpt | {"meta": meta})
    return folder


def tensors_of(folder):
    return pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")


def assert_same_logits(model, ids, logits):
    found, _ = model(torch.tensor([ids]))
    assert torch.allclose(found[0], logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_hugging_faces_backpack(tmp_path, capsys):
    w = random_hf()
    ids = [3, 1, 39, 3, 0, 7]
    model = imported(tmp_path, source(tmp_path / "hf", w))
    assert_same_logits(model, ids, published_logits(w, ids))
    for name in ("lm_head", "backpack.word_embeddings"):
        assert torch.equal(w[f"{name}.weight"], model.wte.weight)
    # aliases and masks are left out
    assert "backpack-gpt2: 44 tensors; dropped 7" in capsys.readouterr().out


@torch.no_grad()
def test_levanters_sum_is_divided_by_the_number_of_senses(tmp_path):
    w = random_hf()
    ids = [5, 1, 2, 2]
    del w["lm_head.weight"]
    model = imported(tmp_path, source(tmp_path / "levanter", w))
    assert_same_logits(model, ids, published_logits(w, ids) / K)


@torch.no_grad()
@pytest.mark.parametrize("kept", ["gpt2_model.w", "embeddings"])
def test_a_file_saved_again_keeps_one_name_of_a_tensor(tmp_path, kept):
    """... and may be Hugging Face's or Levanter's then, so that it has to be said whose it is."""
    w = random_hf()
    ids = [5, 1, 2, 2]
    names = [n for n in w if not ("wte" in n or "wpe" in n or "embeddings" in n or "lm_head" in n)]
    names += [n for n in w if kept in n]
    folder = source(tmp_path / "hf", {})
    (folder / "pytorch_model.bin").unlink()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({n: w[n].clone() for n in names}, folder / "model.safetensors")
    with pytest.raises(UserError, match="Hugging Face's or Levanter's, .* give --layout=backpack"):
        imported(tmp_path, folder)
    model = imported(tmp_path, folder, "--layout=backpack-gpt2")
    assert_same_logits(model, ids, published_logits(w, ids))


@pytest.mark.parametrize(
    "layout, changes",
    [
        ("gpt2", {"n_sense": 0}),
        ("lightning-gpt2", {"n_sense": 0}),
        ("lightning", {"sense_mlp_ratio": 1}),
        ("levanter", {"sense_out_ratio": 2}),
        ("backpack-gpt2", {"sense_out_ratio": 3}),
        ("hf", {"n_qk": 5, "bias": False, "sense_mlp_ratio": 2, "sense_out_ratio": 3}),
    ],
)
def test_there_and_back(layout, changes, tmp_path):
    """A run -> the layout -> a run -> the layout: all that the layout can express comes back."""
    torch.manual_seed(0)
    config = BackpackConfig(**SIZES | {"vocab_size": V - 3, "inverse_layer_scale": False} | changes)
    save_run(tmp_path / "a", Backpack(config))
    convert.main([f"--source={tmp_path / 'a'}", f"--to={layout}", f"--dest={tmp_path / 'there'}"])
    convert.main([f"--source={tmp_path / 'there'}", f"--dest={tmp_path / 'b'}"])
    convert.main([f"--source={tmp_path / 'b'}", f"--to={layout}", f"--dest={tmp_path / 'again'}"])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    a = Backpack.from_checkpoint(tmp_path / "a")
    b = Backpack.from_checkpoint(tmp_path / "b")
    x = torch.tensor([[1, 36, 3, 3]])
    assert b.config == config
    assert torch.equal(a(x)[0], b(x)[0])


@torch.no_grad()
def test_transformers_own_gpt2_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": V - 3, "n_sense": 0, "init_std": 0.2}
    model = Backpack(BackpackConfig(**sizes)).eval()
    x = torch.tensor([[1, 36, 3, 3]])
    save_run(tmp_path / "run", model)
    convert.main([f"--source={tmp_path / 'run'}", "--to=gpt2", f"--dest={tmp_path / 'gpt2'}"])
    gpt2 = transformers.GPT2LMHeadModel
    theirs = gpt2.from_pretrained(tmp_path / "gpt2", attn_implementation="eager").eval()
    assert torch.allclose(theirs(x).logits, model(x)[0], atol=1e-5)


contextualize = model_py.contextualize
FORKS = {
    "a changed block": (Block, "forward", lambda block, x, *_: x + block.mlp(block.ln_2(x))),
    "a gate on alpha": (model_py, "contextualize", lambda *args: 0.5 * contextualize(*args)),
    "bigram senses": (Backpack, "senses", lambda model, ids: model.sense_network(model.wte(ids.roll(1)))),
}


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_is_not_taken_for_the_published_network(fork, tmp_path, monkeypatch, capsys):
    weights = source(tmp_path / "in", random_hf())
    imported(tmp_path, weights)
    assert "another network" not in capsys.readouterr().out
    monkeypatch.setattr(*FORKS[fork])
    convert.main([f"--source={weights}", f"--dest={tmp_path / 'fork'}"])
    assert "this model.py computes another network than the one that these" in capsys.readouterr().out
    args = [f"--source={tmp_path / 'fork'}", "--to=levanter", f"--dest={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="this model.py computes another network"):
        convert.main(args)
    assert not (tmp_path / "out").exists()


def test_fused_norms_belong_to_the_sublayer_before():
    """As in the authors' code; a shift by one is the classic mistake."""
    found = {theirs: ours for ours, theirs, _ in module_names("lightning", 12)}
    for theirs, ours in (
        ("gpt2_model.ln_0", "blocks.0.ln_1"),
        ("gpt2_model.layers.0.norm1", "blocks.0.ln_2"),
        ("gpt2_model.layers.0.norm2", "blocks.1.ln_1"),
        ("gpt2_model.layers.11.norm2", "ln_f"),
        ("content_model.ln_0", "sense_network.ln_0"),
        ("content_model.layers.0.norm2", "sense_network.ln_2"),
        ("content_model.final_mlp.fc2", "sense_network.mlp_out.proj"),
    ):
        assert found[f"model.transformer.{theirs}"] == ours


@pytest.mark.parametrize(
    "layout, changes, message",
    [
        ("gpt2", {}, "n_sense=4"),
        ("backpack-gpt2", {"n_sense": 0}, "n_sense=0"),
        ("lightning", {"n_qk": 3}, "n_qk=3"),
        ("levanter", {"bias": False}, "bias=False"),
        ("backpack-gpt2", {"sense_mlp_ratio": 1}, "sense_mlp_ratio=1"),
        ("backpack-gpt2", {"gate": torch.ones(1)}, "gate"),
    ],
)
def test_what_a_layout_can_not_say_is_refused(layout, changes, message):
    gate = changes.pop("gate", None)  # a fork's own weight
    config = BackpackConfig(**SIZES | changes)
    state = Backpack(config).state_dict()
    if gate is not None:
        state["gate"] = gate
    with pytest.raises(UserError, match=f"{layout} has no place for .*{message}.*: --to=hf has"):
        to_layout(state, config, layout, V)


LN_F = "backpack.gpt2_model.ln_f.bias"
FC = "backpack.gpt2_model.h.0.mlp.c_fc"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (LN_F, None, rf"missing tensors \(1\): {LN_F}"),
        ("extra", torch.ones(1), r"no place for tensors \(1\): extra"),
        ("lm_head.weight", torch.ones(V, D), "lm_head.weight should repeat .*, but differs"),
        (f"{FC}.weight", torch.ones(7), r"mlp.fc.weight: found shape \[7\], expected a matrix"),
        (LN_F, torch.ones(0), r"ln_f.bias: found shape \[0\], expected a vector"),
    ],
)
def test_tensors_that_do_not_fit_the_layout(name, tensor, message):
    w = random_hf() | {name: tensor}
    if tensor is None:
        del w[name]
    with pytest.raises(UserError, match=message):
        to_ours(w, "backpack-gpt2")


# of a setting of GPT2Config, another value than the usual one, where doubling it would be none
OTHERS = {"activation_function": "gelu_fast", "n_inner": 20}


def another(key, value):
    """Another value for a setting; None: there is none."""
    if key in OTHERS:
        return OTHERS[key]
    if type(value) is bool:
        return not value
    return 2 * value if type(value) in (int, float) else None


@torch.no_grad()
def test_every_setting_of_gpt2_is_heeded_or_refused(tmp_path):
    """The logits are those of transformers, or the import ends with one line."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}
    sizes |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1}
    x = torch.tensor([[1, 5, 9, 3]])
    cases = [("activation_function", "gelu"), ("activation_function", "gelu_pytorch_tanh")]
    usual = transformers.GPT2Config(**sizes).to_dict()
    # of what all configs have, few things change the numbers
    own = usual.keys() - transformers.PretrainedConfig().to_dict().keys()
    for key in sorted(own | {"add_cross_attention", "tie_word_embeddings", "bos_token_id"}):
        if another(key, usual[key]) is not None:
            cases.append((key, another(key, usual[key])))
    found = []
    for key, new in cases:
        # the other implementations of transformers 4 don't scale by layer
        config = transformers.GPT2Config(**sizes | {key: new}, attn_implementation="eager")
        net = transformers.GPT2LMHeadModel(config).eval()
        folder = tmp_path / f"{key} {new}"
        folder.mkdir()
        source(folder / "theirs", net.state_dict(), json.loads(config.to_json_string(use_diff=False)))
        try:
            ours = imported(folder, folder / "theirs")
        except UserError:
            found.append(key)
        else:
            assert torch.allclose(ours(x)[0], net(x)[0], atol=1e-4), key
    refused = ["activation_function", "add_cross_attention", "layer_norm_epsilon", "n_inner"]
    assert found == refused + ["scale_attn_weights", "tie_word_embeddings"]
