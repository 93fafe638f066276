import hashlib
import json
import math
import pickle
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import TINY, lines, make_dataset, records
from torch.nn import functional as F

import sample
import train
from configurator import UserError
from files import hold
from lab import convert, experiments, export
from lab.edit import make_edits, parse, read_edits
from lab.layouts import LAYOUTS, module_names, to_layout, to_ours
from model import Backpack, BackpackConfig, CheckpointError, load_checkpoint
from tokenizer import load_tokenizer, train_bpe
from train import save_checkpoint

D, LAYERS, HEADS, K, T, V = 24, 2, 3, 4, 16, 40
CONFIG = {
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_embd": D,
    "vocab_size": V,
    "n_positions": T,
    "num_senses": K,
    "scale_attn_by_inverse_layer_idx": True,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}


def random_hf(rows=V, d=D):
    """Tensors as in the published pytorch_model.bin, with aliases and masks."""
    torch.manual_seed(0)
    base = "backpack.gpt2_model"
    found = {f"{base}.wte.weight": torch.randn(rows, d), f"{base}.wpe.weight": torch.randn(T, d)}

    def linear(name, n_in, n_out):
        found[f"{name}.weight"], found[f"{name}.bias"] = (
            torch.randn(n_in, n_out) / 4,
            torch.randn(n_out) / 4,
        )

    def norm(name):
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + torch.randn(d) / 4, torch.randn(d) / 4

    for i in range(LAYERS):
        h = f"{base}.h.{i}"
        norm(f"{h}.ln_1"), norm(f"{h}.ln_2")
        linear(f"{h}.attn.c_attn", d, 3 * d), linear(f"{h}.attn.c_proj", d, d)
        linear(f"{h}.mlp.c_fc", d, 4 * d), linear(f"{h}.mlp.c_proj", 4 * d, d)
        found[f"{h}.attn.bias"], found[f"{h}.attn.masked_bias"] = (
            torch.ones(1, 1, T, T).tril(),
            torch.tensor(-1e4),
        )
    net = "backpack.sense_network"
    norm(f"{base}.ln_f"), norm(f"{net}.ln"), norm(f"{net}.block.ln_1"), norm(f"{net}.block.ln_2")
    linear(f"{net}.block.mlp.c_fc", d, 4 * d), linear(f"{net}.block.mlp.c_proj", 4 * d, d)
    linear(f"{net}.final_mlp.c_fc", d, 4 * d), linear(f"{net}.final_mlp.c_proj", 4 * d, K * d)
    linear("backpack.sense_weight_net.c_attn", 2 * d, d)  # a Linear: [out, in]
    found["backpack.sense_weight_net.c_attn.bias"] = torch.randn(2 * d) / 4
    for alias in ("backpack.word_embeddings.weight", "lm_head.weight"):
        found[alias] = found["backpack.gpt2_model.wte.weight"]
    found["backpack.position_embeddings.weight"] = found["backpack.gpt2_model.wpe.weight"]
    return found


def reference(w, ids, mean=False):
    """Logits of the published architecture, from its equations; ids: a list. mean: as Levanter's."""

    def norm(x, name):
        return F.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def conv(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x, name):
        x = conv(x, f"{name}.c_fc")
        return conv(
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            f"{name}.c_proj",
        )

    later = torch.ones(len(ids), len(ids)).triu(1).bool()
    E = w["backpack.gpt2_model.wte.weight"]
    x = E[ids] + w["backpack.gpt2_model.wpe.weight"][: len(ids)]
    for i in range(LAYERS):
        h = f"backpack.gpt2_model.h.{i}"
        q, k, v = conv(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(D, -1)
        heads = []
        for a, b, c in zip(
            q.split(D // HEADS, -1), k.split(D // HEADS, -1), v.split(D // HEADS, -1)
        ):
            scores = a @ b.T / math.sqrt(D // HEADS) / (i + 1)
            heads.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ c)
        x = x + conv(torch.cat(heads, -1), f"{h}.attn.c_proj")
        x = x + mlp(norm(x, f"{h}.ln_2"), f"{h}.mlp")
    h = norm(x, "backpack.gpt2_model.ln_f")
    q, k = F.linear(
        h, *(w[f"backpack.sense_weight_net.c_attn.{kind}"] for kind in ("weight", "bias"))
    ).split(D, -1)
    net = "backpack.sense_network"
    r = norm(E[ids], f"{net}.ln") + E[ids]
    r = r + mlp(norm(r, f"{net}.block.ln_1"), f"{net}.block.mlp")
    C = mlp(norm(r, f"{net}.block.ln_2"), f"{net}.final_mlp")
    o = 0
    for a, b, c in zip(q.split(D // K, -1), k.split(D // K, -1), C.split(D, -1)):
        o = o + (a @ b.T / math.sqrt(D // K)).masked_fill(later, float("-inf")).softmax(-1) @ c
    return (o / K if mean else o) @ E.T


def source(folder, tensors, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def imported(tmp_path, folder, *args):
    convert.main([f"--source={folder}", f"--dest={tmp_path / 'run'}", *args])
    return Backpack.from_checkpoint(tmp_path / "run")


def save_run(folder, model):
    """A run of this model, as train.py saves it."""
    ckpt = {"model": model.state_dict(), "config": asdict(model.config), "settings": {}, "step": 0}
    save_checkpoint(folder / "ckpt.pt", ckpt | {"meta": {"tokenizer": None}})
    return folder


@pytest.mark.parametrize("form", ["bin", "safetensors", "layout"])
def test_hugging_face_logits(tmp_path, form, capsys):
    w, ids = random_hf(), [3, 1, 39, 3, 0, 7]
    folder = source(tmp_path / "hf", w)
    args = []
    if form != "bin":  # a re-save drops aliases, and it is then open whose layout it is
        (folder / "pytorch_model.bin").unlink()
        kept = {name: tensor.clone() for name, tensor in w.items() if "embeddings" not in name}
        if form == "layout":
            del kept["lm_head.weight"]
        pytest.importorskip("safetensors.torch").save_file(kept, folder / "model.safetensors")
        args = ["--layout=backpack-gpt2"]
        if form == "layout":
            with pytest.raises(UserError, match="Hugging Face's or Levanter's"):
                imported(tmp_path, folder)
    model = imported(tmp_path, folder, *args)
    assert torch.allclose(model(torch.tensor([ids]))[0][0], reference(w, ids), atol=1e-4, rtol=1e-4)
    shown, config = capsys.readouterr().out, json.loads((tmp_path / "run/config.json").read_text())
    assert "backpack-gpt2: 44 tensors, 12 transposed" in shown and "tokenizer: none" in shown
    file = next(f for f in folder.iterdir() if f.name != "config.json")
    assert config["source"]["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}


def test_levanters_sum_is_divided(tmp_path):
    w, ids = random_hf(), [5, 1, 2, 2]
    del w["lm_head.weight"]
    model = imported(tmp_path, source(tmp_path / "lev", w))
    assert torch.allclose(
        model(torch.tensor([ids]))[0][0], reference(w, ids, mean=True), atol=1e-4, rtol=1e-4
    )


def test_a_resave_may_keep_any_name_of_the_embeddings(tmp_path):
    """... and looks like Levanter's then, so it has to be said whose it is."""
    w, ids = random_hf(), [5, 1, 2, 2]
    for name in (
        "backpack.gpt2_model.wte.weight",
        "backpack.gpt2_model.wpe.weight",
        "lm_head.weight",
    ):
        del w[name]
    folder = source(tmp_path / "hf", w)
    with pytest.raises(UserError, match="may be Hugging Face's or Levanter's"):
        imported(tmp_path, folder)
    model = imported(tmp_path, folder, "--layout=backpack-gpt2")
    assert torch.allclose(
        model(torch.tensor([ids]))[0][0], reference(random_hf(), ids), atol=1e-4, rtol=1e-4
    )


def tensors_of(folder):
    return pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_of_tensors_and_settings(layout, tmp_path):
    """A run -> the layout -> a run -> the layout: all that the layout can express comes back."""
    changes = {
        "gpt2": {"n_sense": 0},
        "lightning-gpt2": {"n_sense": 0},
        "lightning": {"sense_mlp_ratio": 1},
        "levanter": {"sense_out_ratio": 2},
        "backpack-gpt2": {"sense_out_ratio": 3},
        "hf": {"n_qk": 5, "bias": False, "sense_mlp_ratio": 2, "sense_out_ratio": 3},
    }
    torch.manual_seed(0)
    sizes = {"block_size": T, "vocab_size": V - 3, "n_layer": LAYERS, "n_head": HEADS, "n_embd": D}
    sizes |= {"n_sense": K, "inverse_layer_scale": False}
    config = BackpackConfig(**sizes | changes[layout])
    save_run(tmp_path / "a", Backpack(config))
    there, again = tmp_path / "there", tmp_path / "again"
    convert.main([f"--source={tmp_path / 'a'}", f"--to={layout}", f"--dest={there}"])
    convert.main([f"--source={there}", f"--dest={tmp_path / 'b'}"])
    convert.main([f"--source={tmp_path / 'b'}", f"--to={layout}", f"--dest={again}"])
    theirs, ours = tensors_of(there), tensors_of(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    a, b = (Backpack.from_checkpoint(tmp_path / run) for run in "ab")
    x = torch.tensor([[1, 36, 3, 3]])
    assert a.config == b.config == config and torch.equal(a(x)[0], b(x)[0])


def test_a_layout_becomes_another_in_one_step(tmp_path):
    """Hugging Face's as Levanter's: without a run between them, and the same function."""
    w, ids = random_hf(), [5, 1, 2, 2]
    folder = source(tmp_path / "hf", w)
    convert.main([f"--source={folder}", "--to=levanter", f"--dest={tmp_path / 'levanter'}"])
    theirs = tensors_of(tmp_path / "levanter")
    logits = reference(w, ids)
    assert torch.allclose(reference(theirs, ids, mean=True), logits, atol=1e-4, rtol=1e-4)
    model = imported(tmp_path, tmp_path / "levanter")
    assert torch.allclose(model(torch.tensor([ids]))[0][0], logits, atol=1e-4, rtol=1e-4)
    for name in ("weight", "bias"):
        key = f"sense_network.mlp_out.proj.{name}"
        assert torch.equal(to_ours(w, "backpack-gpt2")[0][key], model.state_dict()[key])


@pytest.mark.parametrize(
    "layout, changes, key",
    [
        ("gpt2", {}, "n_sense=4"),
        ("backpack-gpt2", {"n_sense": 0}, "n_sense=0"),
        ("lightning", {"n_qk": 3}, "n_qk=3"),
        ("levanter", {"bias": False}, "bias=False"),
        ("backpack-gpt2", {"sense_mlp_ratio": 1}, "sense_mlp_ratio=1"),
        ("lightning", {"bias": False}, "bias=False"),
    ],
)
def test_what_a_layout_can_not_say_is_refused(layout, changes, key):
    config = BackpackConfig(
        **{
            "block_size": T,
            "vocab_size": V,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_embd": D,
            "n_sense": K,
        }
        | changes
    )
    with pytest.raises(UserError, match=f"the layout {layout} has no place for {key}: --to=hf has"):
        to_layout(Backpack(config).state_dict(), config, layout, V)


def test_a_narrow_last_sense_mlp(tmp_path):
    """sense_intermediate_scale of the published config.json: the last MLP's width only."""
    w, ids = random_hf(), [3, 1, 39]
    final = "backpack.sense_network.final_mlp"
    for name, dim in (("c_fc.weight", 1), ("c_fc.bias", 0), ("c_proj.weight", 0)):
        w[f"{final}.{name}"] = w[f"{final}.{name}"].narrow(dim, 0, 2 * D).clone()
    model = imported(tmp_path, source(tmp_path / "hf", w))
    assert model.config.sense_mlp_ratio == 4 and model.config.sense_out_ratio == 2
    assert torch.allclose(model(torch.tensor([ids]))[0][0], reference(w, ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_transformers_own_gpt2_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = BackpackConfig(T, V - 3, LAYERS, HEADS, D, n_sense=0, init_std=0.2)
    model, x = Backpack(config).eval(), torch.tensor([[1, 36, 3, 3]])
    save_run(tmp_path / "run", model)
    convert.main([f"--source={tmp_path / 'run'}", "--to=gpt2", f"--dest={tmp_path / 'gpt2'}"])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "gpt2", attn_implementation="eager"
    ).eval()
    assert torch.allclose(theirs(x).logits, model(x)[0], atol=1e-5)


def test_fused_norms_belong_to_the_sublayer_before():
    """As in the authors' code; a shift by one is the classic mistake."""
    found = {theirs: ours for ours, theirs, _ in module_names("lightning", 12)}
    base = "model.transformer."
    for theirs, ours in (
        ("gpt2_model.ln_0", "blocks.0.ln_1"),
        ("gpt2_model.layers.0.norm1", "blocks.0.ln_2"),
        ("gpt2_model.layers.0.norm2", "blocks.1.ln_1"),
        ("gpt2_model.layers.11.norm2", "ln_f"),
        ("content_model.ln_0", "sense_network.ln_0"),
        ("content_model.layers.0.norm2", "sense_network.ln_2"),
        ("content_model.final_mlp.fc2", "sense_network.mlp_out.proj"),
    ):
        assert found[base + theirs] == ours


class Weights(dict):  # what trust_pickle is for
    pass


class Config:  # pickled by name, as OmegaConf's in the authors' files
    def __init__(self):
        self.lr = 1


class Evil:
    def __reduce__(self):
        return print, ("EXECUTED",)


def test_lightning_is_read_and_nothing_executed(tmp_path, capsys):
    torch.manual_seed(0)
    model = Backpack(BackpackConfig(T, V, 6, 6, 384, 16, sense_mlp_ratio=1)).eval()
    tensors = to_layout(model.state_dict(), model.config, "lightning", V)
    torch.save(
        {
            "state_dict": {k: v.half() for k, v in tensors.items()},
            "hyper_parameters": Config(),
            "evil": Evil(),
            "optimizer_states": [{"state": {0: {"step": 3}}}],
        },
        tmp_path / "mini.ckpt",
    )
    ours = imported(tmp_path, tmp_path / "mini.ckpt", "--dtype=float32")
    out = capsys.readouterr().out
    assert "EXECUTED" not in out and "lightning: 92 tensors" in out
    assert (
        ours.config.n_head == 6 and ours.config.sense_mlp_ratio == 1 and ours.config.n_sense == 16
    )
    x = torch.tensor([[1, 2, 3]])
    assert torch.allclose(ours(x)[0], model.half().float()(x)[0], atol=1e-5)
    assert load_checkpoint(tmp_path / "run")["model"]["wte.weight"].dtype == torch.float32
    convert.main([f"--source={tmp_path / 'run'}", "--to=lightning", f"--dest={tmp_path / 'back'}"])
    back = imported(tmp_path, tmp_path / "back", "--overwrite=True")
    assert all(
        torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values())
    )


@pytest.fixture(scope="module")
def gpt2_data(tmp_path_factory):
    return make_dataset(
        tmp_path_factory.mktemp("gpt2"), "own", lines(200), "--tokenizer=gpt2", "--val_fraction=0.2"
    )


@pytest.mark.parametrize(
    "layout, rows, new", [("gpt2", 50257, 0), ("gpt2", 50257, 4), ("backpack-gpt2", 50264, 0)]
)
def test_finetuning_starts_at_the_imported_weights_loss(
    tmp_path, gpt2_data, capsys, layout, rows, new
):
    """GPT-2, GPT-2 with new senses, a Backpack: the same function and loss, which 50 steps lower."""
    torch.manual_seed(0)
    senses, plain = 4 if layout == "backpack-gpt2" else 0, layout == "gpt2"
    model = Backpack(
        BackpackConfig(T, 50257, LAYERS, 2, 16, senses, inverse_layer_scale=not plain)
    ).eval()
    tensors = to_layout(model.state_dict(), model.config, layout, rows)
    tensors = {f"transformer.{name}" if plain else name: tensor for name, tensor in tensors.items()}
    assert all(len(tensor) == rows for name, tensor in tensors.items() if "wte" in name)
    ours = imported(
        tmp_path, source(tmp_path / "theirs", tensors, {"n_head": 2}), f"--n_sense={new}"
    )
    x = torch.tensor([[50256, 5, 6]])
    assert torch.allclose(ours.hidden(x)[0], model.hidden(x)[0], atol=1e-5)
    assert new or torch.allclose(ours(x)[0], model(x)[0], atol=1e-5)
    keys = [
        f"--data_dir={gpt2_data}",
        "--dataset=own",
        "--tokens_per_step=64",
        "--batch_size=4",
        "--max_iters=50",
        "--learning_rate=1e-3",
        "--warmup_iters=0",
        "--eval_interval=50",
        "--log_interval=10",
        "--device=cpu",
        "--full_val=True",
        f"--init_from={tmp_path / 'run'}",
        f"--out_dir={tmp_path / 'tuned'}",
    ]
    train.main([*keys, "--eval_only=True"])
    printed = float(re.search(r"val loss (\S+),", capsys.readouterr().out)[1])
    train.main(keys)
    first, last = records(tmp_path / "tuned", "val_loss").values()
    val = torch.from_numpy(np.fromfile(gpt2_data / "own/val.bin", "<u2").astype("int64"))
    parts = [
        ours(part[None, :-1], part[None, 1:])[1].item() * (len(part) - 1)
        for part in (val[i : i + T + 1] for i in range(0, len(val) - 1, T))
    ]
    assert (
        abs(first - printed) < 1e-4
        and abs(first - sum(parts) / (len(val) - 1)) < 1e-4
        and last < first - 0.5
    )
    sample.main(
        [f"--run={tmp_path / 'tuned'}", "--start=words", "--max_new_tokens=2", "--num_samples=1"]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop("backpack.gpt2_model.ln_f.bias"),
            "tensors missing (1): backpack.gpt2_model.ln_f.bias",
        ),
        (lambda w: w.update(extra=torch.ones(1)), "found no place for tensors (1): extra"),
        (lambda w: w.update({"lm_head.weight": torch.ones(V, D)}), "lm_head.weight should repeat"),
        (
            lambda w: w.update({"backpack.gpt2_model.h.0.mlp.c_fc.bias": torch.ones(7)}),
            "blocks.0.mlp.fc.bias: found shape [7], expected [96]",
        ),
        (
            lambda w: [w.pop(k) for k in list(w) if "c_attn" in k],
            "unknown layout: expected one of backpack-gpt2,",
        ),
    ],
)
def test_bad_tensors(tmp_path, change, message):
    w = random_hf()
    change(w)
    with pytest.raises((UserError, CheckpointError)) as error:
        imported(tmp_path, source(tmp_path / "hf", w))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.tmp").exists()


def test_bad_sources(tmp_path):
    folder = source(tmp_path / "hf", random_hf())
    data = (folder / "pytorch_model.bin").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4  # within a tensor: only the archive's checksum can tell
    for content in (data[:5000], b"", pickle.dumps({"a": Config()}), flipped):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match="is damaged or holds no tensors"):
            imported(tmp_path, folder)
    torch.save(Weights(random_hf()), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="--trust_pickle loads it, and executes"):
        imported(tmp_path, folder)
    assert not (tmp_path / "run").exists()
    imported(tmp_path, folder, "--trust_pickle=True")
    shutil.rmtree(tmp_path / "run")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no .*safetensors"):
        imported(tmp_path, folder)
    source(folder, random_hf(), CONFIG | {"activation_function": "relu"})
    with pytest.raises(
        UserError, match="activation_function: found 'relu', expected 'gelu_new', as"
    ):
        imported(tmp_path, folder)
    source(folder, random_hf(), {})
    with pytest.raises(UserError, match="give --n_head"):
        imported(tmp_path, folder)
    with pytest.raises(UserError, match="n_embd=24 must be divisible by n_head=5"):
        imported(tmp_path, folder, "--n_head=5")
    with pytest.raises(UserError, match="has 40 rows, fewer than a vocabulary of 50257"):
        imported(tmp_path, folder, "--n_head=3", "--tokenizer=gpt2")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        imported(tmp_path, folder)
    source(folder, random_hf())
    with pytest.raises(UserError, match="layout hf: backpack.wte.weight is missing"):
        imported(tmp_path, folder, "--layout=hf")
    for args, message in (
        (["--layout=what"], r"layout='what' \(command line\): expected auto or backpack-gpt2 or"),
        (["--n_head=0"], r"n_head=0 \(command line\): expected a number in \[1, 1000\]"),
        ([], "give --source"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main(args)
    source(folder, random_hf())
    imported(tmp_path, folder)
    with pytest.raises(
        UserError, match="run has ckpt.pt, config.json: give another --dest, or --overwrite"
    ):
        imported(tmp_path, folder)
    with pytest.raises(UserError, match="run has no tokenizer"):
        sample.main([f"--run={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ([1], "config.json: found [1], expected an object"),
        ({"n_head": "x"}, "config.json, n_head: found 'x', expected an integer"),
        ({"n_head": 10**9}, "n_head=1000000000 (of this source): expected a number in [1, 1000]"),
        ({"vocab_size": [1]}, "config.json, vocab_size: found [1], expected an integer"),
        (
            {"vocab_size": 10**9},
            "vocab_size=1000000000 (of this source): expected a number in [1, 1e7]",
        ),
        ({"vocab_size": 10**7}, "wte.weight has 40 rows, fewer than a vocabulary of 10000000"),
        ({"layout": {}}, "config.json, layout: found {}, expected backpack-gpt2 or gpt2 or hf or"),
        (
            {"scale_attn_by_inverse_layer_idx": 1},
            "inverse_layer_scale=1 (of this source): expected bool",
        ),
        (
            {"layer_norm_epsilon": None},
            "layer_norm_epsilon: found None, expected 1e-05, as model.py",
        ),
        ({"edits": {"list": [1]}}, "config.json, edits, edit 1: found 1, expected an object"),
    ],
)
def test_bad_configs(tmp_path, changes, message):
    config = CONFIG | changes if isinstance(changes, dict) else changes
    with pytest.raises(UserError) as error:
        imported(tmp_path, source(tmp_path / "hf", random_hf(), config))
    found = str(error.value)
    assert message in found and "\n" not in found
    assert not (tmp_path / "run").exists()


WTE, BIAS = "backpack.gpt2_model.wte.weight", "backpack.gpt2_model.ln_f.bias"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (
            BIAS,
            torch.full((D,), math.nan),
            "bin and config.json: ln_f.bias: found infinite numbers or",
        ),
        (BIAS, torch.full((D,), 1e6), "ln_f.bias: found numbers too large for dtype=float16: try"),
        (BIAS, torch.ones(1, D), r"found ln_f.bias of shape \[1, 24\], expected a vector"),
        (BIAS, torch.ones(0), r"found ln_f.bias of shape \[0\]"),
        (BIAS, torch.ones(D).cfloat(), "ln_f.bias': found a tensor of torch.complex64"),
        (BIAS, torch.ones(D).to(torch.float8_e5m2), "bin: found more than tensors: --trust_pickle"),
        (BIAS, torch.ones(D).to_sparse(), "bin: found more than tensors: --trust_pickle"),
        (WTE, torch.ones(1, 1).expand(10**7, D), "wte.weight': found a tensor of"),
        (
            WTE,
            torch.ones(V, 10**5),
            r"bin and config.json: sense_mlp_ratio=0 \(of this source\): expected a",
        ),
        (7, torch.ones(2), ", 7: found a tensor of torch.float32 and torch.strided, expected"),
    ],
)
def test_bad_numbers(tmp_path, name, tensor, message):
    """None of these becomes a run; the message names the file or the tensor."""
    w = random_hf()
    w[name] = tensor
    for alias in ("backpack.word_embeddings.weight", "lm_head.weight"):
        w[alias] = w[WTE]
    folder = source(tmp_path / "hf", w)
    with pytest.raises(UserError, match=message) as error:
        imported(tmp_path, folder, "--dtype=float16")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 100_000, "tokenizer.json is not JSON: nested too deeply"),
        ("[]", "tokenizer.json: found [], expected an object"),
        ({"model": None}, "tokenizer.json, model: found None, expected an object"),
        ({"model": {"type": "Unigram", "vocab": []}}, "found 'Unigram', expected BPE or WordLevel"),
        ({"model": {"type": "BPE", "vocab": []}}, "vocab: found [], expected an object"),
        ({"model": {"type": "BPE", "vocab": {}}}, "found other words, expected GPT-2's ByteLevel"),
        ({"model": {"type": "WordLevel", "vocab": {"a": "b"}}}, "found 'b', expected an integer"),
        ({"model": {"type": "WordLevel", "vocab": {"ab": 1}}}, "found 2 tokens, expected 40"),
        ({"model": {"type": "WordLevel", "vocab": {"\ud800": 1}}}, "chars: found"),
    ],
)
def test_bad_tokenizers(tmp_path, content, message):
    folder = source(tmp_path / "hf", random_hf())
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError) as error:
        imported(tmp_path, folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; --tokenizer=none imports without it")
    imported(tmp_path, folder, "--tokenizer=none")


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_a_tokenizer_for_transformers_gives_the_same_ids(kind):
    from tokenizers import Tokenizer

    spec = {
        "gpt2": {"kind": "gpt2"},
        "char": {"kind": "char", "chars": "".join(sorted(set("".join(lines(99)))))},
    }
    ours = load_tokenizer(spec.get(kind) or train_bpe(lines(99), 400))
    theirs = Tokenizer.from_str(export.for_transformers(ours))
    for text in lines(60) + (["It's 2,000 naïve 漢字 🙂\n\n  x\t "] if kind != "char" else []):
        assert theirs.encode(text).ids == ours.encode(text).tolist()
        assert theirs.decode(theirs.encode(text).ids) == text


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a run's model, its folder for transformers, loaded)"""
    transformers = pytest.importorskip("transformers")
    folder = make_dataset(
        tmp_path_factory.mktemp("hf"),
        "own",
        map("\n".join, zip(lines(100), lines(100, 100))),
        "--tokenizer=bpe",
        "--vocab_size=300",
        "--val_fraction=0.2",
    )
    train.main(
        [
            *TINY,
            f"--data_dir={folder}",
            "--dataset=own",
            f"--out_dir={folder / 'run'}",
            "--block_size=32",
        ]
    )
    convert.main([f"--source={folder / 'run'}", "--to=hf", f"--dest={folder / 'hf'}"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)
    return Backpack.from_checkpoint(folder / "run"), folder / "hf", model.eval()


@torch.no_grad()
def test_transformers_computes_what_model_py_does(exported, tmp_path):
    ours, folder, theirs = exported
    x = torch.tensor([[5, 9, 1, 7, 7, 2]])
    found = theirs(x, labels=x, output_senses=True, output_contextualization=True)
    assert torch.allclose(found.logits, ours(x)[0], atol=1e-5)
    assert torch.equal(found.senses, ours.senses(x)) and found.contextualization.shape == (
        1,
        4,
        6,
        6,
    )
    assert abs(found.loss - ours(x[:, :-1], x[:, 1:])[1]) < 1e-5
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    for use_cache in (True, False):
        greedy = theirs.generate(x, attention_mask=torch.ones_like(x), use_cache=use_cache, **how)
        assert torch.equal(greedy, ours.generate(x, 20, temperature=0))
    batch, mask = (
        torch.tensor([[0, 0, 5, 9], [3, 3, 8, 1]]),
        torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    )
    rows = theirs.generate(batch, attention_mask=mask, **how)
    assert torch.equal(rows[0, 2:], ours.generate(batch[:1, 2:], 20, temperature=0)[0])
    assert torch.equal(rows[1], ours.generate(batch[1:], 20, temperature=0)[0])
    best = theirs.generate(x, attention_mask=torch.ones_like(x), num_beams=3, use_cache=True, **how)
    assert torch.equal(
        best,
        theirs.generate(x, attention_mask=torch.ones_like(x), num_beams=3, use_cache=False, **how),
    )
    theirs.save_pretrained(tmp_path / "again")
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert torch.equal(again.eval()(x).logits, theirs(x).logits)


@torch.no_grad()
def test_an_export_has_its_edits_and_comes_back(exported, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = exported[1].parent / "run"
    (tmp_path / "e.json").write_text(
        json.dumps(parse('scale "d" 0 0; swap "o": "d" -> "c"; topic "w" 3'))
    )
    convert.main([f"--source={run}", f"--dest={tmp_path / 'small'}"])  # half precision in the file
    tokenizer = load_tokenizer(load_checkpoint(run)["meta"]["tokenizer"])
    x, seen = torch.from_numpy(tokenizer.encode("document two"))[None], []
    for name, args in (("plain", []), ("edited", [f"--edits={tmp_path / 'e.json'}"])):
        folder, saved, back_folder = (
            tmp_path / f"{name}{what}" for what in ("", " saved", " back")
        )
        convert.main([f"--source={tmp_path / 'small'}", "--to=hf", f"--dest={folder}", *args])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        theirs.eval().save_pretrained(saved)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
        convert.main([f"--source={saved}", f"--dest={back_folder}"])
        back, ours = (Backpack.from_checkpoint(run) for run in (back_folder, tmp_path / "small"))
        if args:
            back.edits = make_edits(back, tokenizer, read_edits(back_folder / "edits.json"))
            ours.edits = make_edits(ours, tokenizer, read_edits(tmp_path / "e.json"))
        assert theirs.dtype == torch.float32
        for logits in (back(x)[0], theirs(x).logits, theirs(x, use_cache=False).logits):
            assert torch.allclose(logits, ours(x)[0], atol=1e-5)
        seen.append(ours(x)[0])
        assert load_checkpoint(back_folder)["meta"]["tokenizer"] == tokenizer.spec
    assert not torch.allclose(*seen, atol=1e-2)
    assert 'swap "o": "d" -> "c"' in (tmp_path / "edited/README.md").read_text()
    # from folder to folder, too, but not into a layout that has no place for them
    convert.main([f"--source={tmp_path / 'edited'}", "--to=hf", f"--dest={tmp_path / 'again'}"])
    first, again = tensors_of(tmp_path / "edited"), tensors_of(tmp_path / "again")
    assert all(torch.allclose(again[key], first[key].to(again[key])) for key in first)
    for folder, more in ((tmp_path / "small", args), (tmp_path / "edited", [])):
        with pytest.raises(UserError, match="has no place for edits"):
            convert.main(
                [f"--source={folder}", "--to=backpack-gpt2", f"--dest={tmp_path / 'l'}", *more]
            )


def test_a_copy_to_share_has_weights_only(exported, tmp_path):
    run, copy = exported[1].parent / "run", tmp_path / "copy"
    convert.main([f"--source={run}", f"--dest={copy}"])
    assert {path.name for path in copy.iterdir()} == {"ckpt.pt", "config.json", "metrics.jsonl"}
    ours, ckpt = load_checkpoint(copy), load_checkpoint(run)
    assert ours.keys() == {"model", "config", "settings", "step", "meta", "source"}
    assert all(torch.equal(ours["model"][key], w.half()) for key, w in ckpt["model"].items())
    for key in ("config", "settings", "step", "meta"):
        assert ours[key] == ckpt[key]
    assert records(copy, "val_loss") == records(run, "val_loss")
    shutil.copytree(run, tmp_path / "stopped")
    log = tmp_path / "stopped/metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 1, "lo')  # as a run leaves it that was killed
    convert.main([f"--source={tmp_path / 'stopped'}", f"--dest={tmp_path / 'd'}"])
    assert records(tmp_path / "d", "val_loss") == records(run, "val_loss")
    log.write_text('{"step": "one"}\n')
    with pytest.raises(
        UserError, match="metrics.jsonl, line 1, step: found 'one', expected an int"
    ):
        convert.main([f"--source={tmp_path / 'stopped'}", f"--dest={tmp_path / 'e'}"])
    convert.main([f"--source={run / 'ckpt.pt'}", f"--dest={tmp_path / 'b'}", "--dtype=keep"])
    kept = load_checkpoint(tmp_path / "b")["model"]
    assert all(torch.equal(kept[key], w) for key, w in ckpt["model"].items())
    for wrong in (run, copy):
        with pytest.raises(UserError, match="folder of the source|give another --dest, or --over"):
            convert.main([f"--source={run}", f"--dest={wrong}"])
    with pytest.raises(UserError, match="is a run: --n_sense can't change it"):
        convert.main([f"--source={run}", f"--dest={tmp_path / 'c'}", "--n_sense=3"])
    assert load_checkpoint(run).keys() == ckpt.keys() and not (tmp_path / "c").exists()


def test_an_export_is_whole_or_not_there(exported, tmp_path, monkeypatch):
    args = [f"--source={exported[1].parent / 'run'}", "--to=hf", f"--dest={tmp_path / 'hf'}"]
    convert.main(args)
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(UserError, match="hf has README.md, .* --overwrite"):
        convert.main(args)
    monkeypatch.setattr(export, "card", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        convert.main([*args, "--overwrite=True"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    monkeypatch.undo()
    convert.main([*args, "--overwrite=True"])


def training_arguments(folder, max_steps):
    """Of transformers' Trainer: batches of 4 on the CPU, of which nothing is saved or reported."""
    how = {"use_cpu": True, "report_to": [], "save_strategy": "no", "learning_rate": 1e-2}
    how |= {"output_dir": folder, "max_steps": max_steps, "per_device_train_batch_size": 4}
    return pytest.importorskip("transformers").TrainingArguments(**how)


def test_trainer_of_transformers(exported, tmp_path):
    """Two steps, and an evaluation equal to ours."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=True)
    x = torch.randint(300, (8, 20), generator=torch.Generator().manual_seed(0))
    texts = [{"input_ids": row, "labels": row} for row in x]
    args = training_arguments(tmp_path, max_steps=2)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=texts, eval_dataset=texts)
    with torch.no_grad():
        assert abs(trainer.evaluate()["eval_loss"] - exported[0](x[:, :-1], x[:, 1:])[1]) < 1e-5
    before = model.backpack.sense_qk.weight.detach().clone()
    trainer.train()
    assert (model.backpack.sense_qk.weight - before).abs().max() > 1e-3


def test_a_classifier_for_transformers(exported, tmp_path):
    """A head on the last real token, wherever the padding is; a step of Trainer; saved and loaded."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(exported[1], trust_remote_code=True, num_labels=3).eval()
    ours, x = exported[0], torch.randint(1, 300, (4, 9))
    lengths = torch.tensor([9, 4, 1, 7])
    left = (torch.arange(9) >= 9 - lengths[:, None]).long()
    with torch.no_grad():
        want = torch.stack(
            [model.score(ours.output(row[None, 9 - n :])[0][0, -1]) for row, n in zip(x, lengths)]
        )
        found = model(x, attention_mask=left, labels=torch.tensor([0, 1, 2, 0]))
        assert torch.allclose(found.logits, want, atol=1e-5)
        assert abs(found.loss - F.cross_entropy(want, torch.tensor([0, 1, 2, 0]))) < 1e-5
        right = torch.stack([row.roll(n.item()) for row, n in zip(x, lengths)])
        assert torch.allclose(
            model(right, attention_mask=left.flip(1).bool()).logits, want, atol=1e-5
        )
        assert torch.allclose(model(x).logits[0], want[0], atol=1e-5)
    texts = [{"input_ids": row, "label": n % 3} for n, row in enumerate(x)]
    args = training_arguments(tmp_path, max_steps=1)
    parts = model.score, model.backpack.sense_qk, model.backpack.wte
    before = [part.weight.detach().clone() for part in parts]
    transformers.Trainer(model=model, args=args, train_dataset=texts).train()
    assert all((a.weight - b).abs().max() > 1e-3 for a, b in zip(parts, before))
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model.eval()(x).logits)


def test_a_pipeline_generates_to_the_last_position(exported):
    """Not 256 tokens more, which are its default; and the output embeddings are E."""
    transformers = pytest.importorskip("transformers")
    write = transformers.pipeline("text-generation", str(exported[1]), trust_remote_code=True)
    (found,) = write("document one", return_tensors=True, eos_token_id=-1)
    assert len(found["generated_token_ids"]) == 32
    E = exported[2].get_output_embeddings().weight
    assert E is exported[2].get_input_embeddings().weight and E[:300].equal(
        exported[0].wte.weight[:300]
    )


@torch.no_grad()
def test_more_tokens_for_transformers(exported, tmp_path):
    """What the model says of the old ones stays, edits too; the new ones are saved and learn like any."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "e.json").write_text(json.dumps(parse('scale "d" 0 0; topic "w" 3')))
    source, edited = f"--source={exported[1].parent / 'run'}", tmp_path / "edited"
    convert.main([source, "--to=hf", f"--dest={edited}", f"--edits={tmp_path / 'e.json'}"])
    x, new = torch.tensor([[5, 9, 1, 7]]), torch.tensor([[5, 303]])
    for folder in (exported[1], edited):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        before = model.eval()(x).logits
        model.resize_token_embeddings(303)  # 304, as rows are a multiple of 8
        assert model.config.vocab_size == 304
        assert torch.allclose(model(x).logits[..., :300], before, atol=1e-5)
        with torch.enable_grad():
            model(new, labels=new).loss.backward()
        assert model.get_input_embeddings().weight.grad[303].any()
        model.save_pretrained(tmp_path / f"{folder.name}-more")
        again = type(model).from_pretrained(tmp_path / f"{folder.name}-more")
        assert torch.equal(again.eval()(new).logits, model(new).logits)
        model.resize_token_embeddings(8)
        assert torch.allclose(model(x % 8).logits, again(x % 8).logits[..., :8], atol=1e-5)


def test_an_exported_folder_has_its_tokenizer_and_card(exported):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(load_checkpoint(exported[1].parent / "run")["meta"]["tokenizer"])
    theirs = transformers.AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    assert theirs("document 1 has").input_ids == ours.encode("document 1 has").tolist()
    assert theirs.eos_token_id == ours.end and theirs.padding_side == "left"
    card = (exported[1] / "README.md").read_text()
    for words in (
        "2 layers, 2 heads, width 16, 4 senses",
        "12 steps of 64 tokens",
        "muon_lr 0.0",
        "**Data**: own,",
        "**Limits**",
        f"{records(exported[1].parent / 'run', 'val_loss')[12]:.3f} (12)",
    ):
        assert words in card


@torch.no_grad()
def test_word_perplexity_is_what_the_exported_folder_gives_each_document(exported, capsys):
    """As lm-eval-harness scores: end-of-text first, windows of 32 tokens, the last one full, too."""
    folder, model = exported[1].parent, exported[2]
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    ids = np.fromfile(folder / "own/val.bin", "<u2").tolist()
    texts = tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    total, n_words, n_windows = 0.0, 0, 0
    for text in texts:
        tokens = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
        for i in range(0, len(tokens) - 1, 32):
            y = tokens[i + 1 : i + 33]
            x = tokens[: i + 33][:-1][-32:]
            log_p = model(torch.tensor([x])).logits[0].log_softmax(-1)[-len(y) :]
            total += sum(log_p[j, t].item() for j, t in enumerate(y))
            n_windows += 1
        n_words += len(text.split())
    experiments.main([f"--run={folder / 'run'}", f"--data_dir={folder}", "--words", "--device=cpu"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert len(texts) < n_windows and last.endswith(f", {n_words:,} words")
    printed = float(re.search(r"word perplexity ([\d,.]+), ", last)[1].replace(",", ""))
    assert abs(printed / math.exp(-total / n_words) - 1) < 1e-3


def test_figures_of_a_card_that_are_none(tmp_path):
    config = BackpackConfig(8, 40, n_layer=1, n_head=2, n_embd=16, n_sense=4)
    run = save_run(tmp_path / "run", Backpack(config))
    ckpt = load_checkpoint(run)
    ckpt["meta"]["train_tokens"] = "many"
    save_checkpoint(run / "ckpt.pt", ckpt)
    args = [f"--source={run}", "--to=hf", f"--dest={tmp_path / 'hf'}"]
    message = "run, meta, train_tokens: found 'many', expected an integer"
    with pytest.raises(UserError, match=message):
        convert.main(args)
    assert not (tmp_path / "hf").exists()


def test_what_lies_in_a_folder_stays(tmp_path):
    """An import into a folder of runs removes nothing; over a run, it removes the logs."""
    folder, out = source(tmp_path / "hf", random_hf()), tmp_path / "run"
    (out / "other").mkdir(parents=True)
    (out / "other/ckpt.pt").write_text("a run")
    imported(tmp_path, folder)
    assert (out / "other/ckpt.pt").read_text() == "a run"
    (out / "metrics.jsonl").write_text("of the run before")
    with hold(out), pytest.raises(UserError, match="run is in use by another process"):
        imported(tmp_path, folder, "--overwrite=True")
    assert (out / "metrics.jsonl").exists()
    imported(tmp_path, folder, "--overwrite=True")
    assert (out / "other/ckpt.pt").exists() and not (out / "metrics.jsonl").exists()
    before = (out / "config.json").read_text()
    with pytest.raises(UserError, match="has a run: give another --dest"):
        convert.main([f"--source={folder}", "--to=backpack-gpt2", f"--dest={out}"])
    assert (out / "config.json").read_text() == before


@pytest.mark.parametrize(
    "name", ["ckpt.pt", "best.pt", "edits.json", "metrics.jsonl", "config.json", "meta.json"]
)
def test_an_import_replaces_nothing_unasked(tmp_path, name):
    """Neither a run whose checkpoint is gone, nor the source, nor a dataset."""
    folder, file = source(tmp_path / "hf", random_hf()), tmp_path / "run" / name
    file.parent.mkdir()
    file.write_text("of the user")
    with pytest.raises(UserError, match=f"run has {name}: .* --overwrite"):
        imported(tmp_path, folder)
    assert file.read_text() == "of the user" and list(file.parent.iterdir()) == [file]
    imported(tmp_path, folder, "--overwrite=True")
    assert not file.exists() or file.read_bytes() != b"of the user"
    shutil.rmtree(file.parent)
    file.parent.mkdir()
    (file.parent / "metrics.jsonl").touch()  # as a run leaves it that ends before its first step
    imported(tmp_path, folder)


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network\nat all")),
    )
    with pytest.raises(
        UserError, match="source=some/id: not here, and not on the Hub: OSError: no network$"
    ):
        convert.main(["--source=some/id", f"--dest={tmp_path / 'run'}"])
    assert not list(tmp_path.iterdir())
