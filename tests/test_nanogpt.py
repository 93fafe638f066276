"""From nanoGPT: its datasets and its checkpoints."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY
from test_convert import Evil
from test_layouts import imported
from torch.nn import functional as F

import sample
import train
from configurator import UserError
from lab import convert
from model import load_checkpoint
from tokenizer import nanogpt_meta

CHARACTERS = "\n !abcdefghij"
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "dropout": 0.0}


def their_logits(w, sizes, ids):
    """nanoGPT's forward: the logits (T,V) of ids, a list; w: the tensors of its checkpoint."""

    def norm(x, name):
        return F.layer_norm(x, (x.size(-1),), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    T = len(ids)
    D = sizes["n_embd"]
    hidden = torch.ones(T, T).triu(1).bool()
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]  # (T,D)
    for layer in range(sizes["n_layer"]):
        h = f"transformer.h.{layer}"
        heads = []
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(D, dim=1)  # (T,D) each
        for part in torch.arange(D).chunk(sizes["n_head"]):
            scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))  # (T,T)
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(1) @ v[:, part])
        x = x + linear(torch.cat(heads, dim=1), f"{h}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def checkpoint(folder, V, bias, std=0.1, prefix=""):
    """A ckpt.pt as nanoGPT saves it, of random weights; returns them."""
    torch.manual_seed(0)
    D = SIZES["n_embd"]
    shapes = {"wte": (V, D), "wpe": (SIZES["block_size"], D), "ln_f": (D,)}
    for layer in range(SIZES["n_layer"]):
        shapes |= {f"h.{layer}.ln_1": (D,), f"h.{layer}.ln_2": (D,)}
        shapes |= {f"h.{layer}.attn.c_attn": (3 * D, D), f"h.{layer}.attn.c_proj": (D, D)}
        shapes |= {f"h.{layer}.mlp.c_fc": (4 * D, D), f"h.{layer}.mlp.c_proj": (D, 4 * D)}
    w = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1
        w[f"transformer.{name}.weight"] = std * torch.randn(shape) + is_norm
        if bias and name not in ("wte", "wpe"):
            w[f"transformer.{name}.bias"] = std * torch.randn(shape[0])
    w["lm_head.weight"] = w["transformer.wte.weight"]
    folder.mkdir(exist_ok=True)
    saved = {
        "model": {prefix + name: tensor for name, tensor in w.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": SIZES | {"vocab_size": V, "bias": bias},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "mine", "device": "cpu"},
    }
    torch.save(saved, folder / "ckpt.pt")
    return w


def dataset(folder, meta=None):
    """A dataset as nanoGPT prepares it, of random characters or, without meta, of GPT-2's tokens."""
    folder.mkdir()
    V = meta["vocab_size"] if meta else 50257
    ids = np.random.default_rng(0).integers(0, V, 3000).astype(np.uint16)
    ids[:2700].tofile(folder / "train.bin")
    ids[2700:].tofile(folder / "val.bin")
    if meta:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def meta_of(characters):
    itos = dict(enumerate(characters))
    return {"vocab_size": len(characters), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


@torch.no_grad()
@pytest.mark.parametrize(
    "V, bias, prefix", [(50304, False, "_orig_mod."), (50257, True, ""), (len(CHARACTERS), True, "")]
)
def test_its_checkpoint_has_the_same_logits(tmp_path, V, bias, prefix):
    w = checkpoint(tmp_path / "theirs", V, bias, prefix=prefix)
    ids = [3, 1, 9, 9, 0, 2]
    ours = imported(tmp_path, tmp_path / "theirs")
    want = their_logits(w, SIZES, ids)[:, :50257]
    assert torch.allclose(ours(torch.tensor([ids]))[0][0], want, atol=1e-5)
    assert ours.config.bias == bias
    spec = load_checkpoint(tmp_path / "run")["meta"]["tokenizer"]
    assert spec == ({"kind": "gpt2"} if V > 50000 else None)


def test_from_its_data_and_checkpoint_to_a_finetuned_run(tmp_path, capsys):
    """The user's path: train on his characters, import his weights, go on with them, sample."""
    folder = dataset(tmp_path / "mine", meta_of(CHARACTERS))
    checkpoint(tmp_path / "theirs", len(CHARACTERS), bias=False)
    data = [f"--data_dir={tmp_path}", "--dataset=mine", "--max_iters=3"]
    train.main([*TINY, *data, f"--out_dir={tmp_path / 'scratch'}"])
    assert "bits per byte" in capsys.readouterr().out
    spec = {"kind": "char", "chars": CHARACTERS}
    assert load_checkpoint(tmp_path / "scratch")["meta"]["tokenizer"] == spec
    source = f"--source={tmp_path / 'theirs/ckpt.pt'}"
    convert.main([source, f"--dest={tmp_path / 'run'}", f"--tokenizer={folder}"])
    out = ["--init_from=" + str(tmp_path / "run"), f"--out_dir={tmp_path / 'tuned'}"]
    schedule = "--tokens_per_step=64 --batch_size=8 --warmup_iters=1 --eval_iters=1 --device=cpu".split()
    train.main([*out, *data, *schedule])
    capsys.readouterr()
    args = ["--num_samples=1", "--max_new_tokens=5", "--start=abba", "--device=cpu"]
    sample.main([f"--run={tmp_path / 'tuned'}", *args])
    assert "abba" in capsys.readouterr().out


def test_a_dataset_without_meta_pkl_is_gpt2s(tmp_path):
    folder = dataset(tmp_path / "mine")
    assert train.load_data(folder)[2]["tokenizer"] == {"kind": "gpt2"}
    np.array([50257], np.uint16).tofile(folder / "val.bin")
    with pytest.raises(UserError, match="mine has a token 50257, but a vocabulary of 50257 tokens"):
        train.load_data(folder)


def test_a_vocabulary_without_characters_trains(tmp_path):
    dataset(tmp_path / "mine", {"vocab_size": 30})
    train.main([*TINY, f"--data_dir={tmp_path}", "--dataset=mine", f"--out_dir={tmp_path / 'run'}"])
    assert load_checkpoint(tmp_path / "run")["meta"]["tokenizer"] is None


class Writes:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "EOFError"),
        (b"\x80\x04K\x05.", "TypeError"),
        (pickle.dumps({"itos": {}}), "KeyError\\('vocab_size'"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: "a"}}), "KeyError.1"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "bc"}}), "its tokens are not characters"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "a"}}), "its tokens are not characters"),
        (pickle.dumps({"vocab_size": 10**18, "itos": ["a"]}), "IndexError"),
        (pickle.dumps({"vocab_size": 1, "itos": ["\ud800"]}), "UnicodeEncodeError"),
        (pickle.dumps(meta_of("ab") | {"more": Evil()}), "it asks for builtins.print"),
    ],
)
def test_a_pickle_of_others_does_nothing(tmp_path, capsys, content, message):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=f"meta.pkl is not a vocabulary of nanoGPT: .*{message}"):
        nanogpt_meta(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta_of("ab") | {"more": Writes(tmp_path / "made")}))
    with pytest.raises(UserError, match="it asks for posix.system"):
        nanogpt_meta(tmp_path)
    assert not (tmp_path / "made").exists()
    assert "EXECUTED" not in capsys.readouterr().out


def test_a_dataset_that_lost_its_description_is_refused(tmp_path):
    """Its characters would be tokens of GPT-2. One that is not in meta.pkl is refused, too."""
    for split in ("train", "val"):
        np.arange(60, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    with pytest.raises(UserError, match="has no token above 59: are these GPT-2's tokens"):
        train.load_data(tmp_path)
    meta = {"vocab_size": len(CHARACTERS), "itos": dict(enumerate(CHARACTERS))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    np.arange(9, dtype="<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match="has a token 59, but a vocabulary of 13 tokens"):
        train.load_data(tmp_path)
