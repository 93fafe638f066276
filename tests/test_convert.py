"""lab.convert: what it reads of others and executes nothing of, and what it writes where."""

import contextlib
import json
import math
import pickle
from pathlib import Path
from typing import Tuple  # noqa: UP035

import pytest
import torch
from conftest import files_in, records
from test_layouts import CONFIG, SIZES, D, V, imported, random_hf, refused, save_run, source

from configurator import UserError
from lab import convert, export
from lab.files import filling
from lab.layouts import to_layout
from lab.run import open_run
from model import Backpack, BackpackConfig, load_checkpoint
from prepare_data import given_tokenizer

# -----------------------------------------------------------------------------
# what others publish


class Config:  # pickled by name, as OmegaConf's in the authors' files
    def __init__(self):
        self.lr = 1


class Evil:
    def __reduce__(self):
        return print, ("EXECUTED",)


@torch.no_grad()
def test_lightning_is_read_and_nothing_executed(tmp_path, capsys):
    torch.manual_seed(0)
    model = Backpack(BackpackConfig(**SIZES | {"sense_mlp_ratio": 1})).half().float().eval()
    tensors = to_layout(model.state_dict(), model.config, "lightning", V)
    content = {
        "state_dict": {name: tensor.half() for name, tensor in tensors.items()},
        "hyper_parameters": Config(),
        "evil": Evil(),
        "optimizer_states": [{"state": {0: {"step": 3}}}],
    }
    torch.save(content, tmp_path / "mini.ckpt")
    ours = imported(tmp_path, tmp_path / "mini.ckpt", "--n_head=3", "--dtype=float32")
    assert "EXECUTED" not in capsys.readouterr().out
    x = torch.tensor([[1, 2, 3]])
    assert torch.equal(ours(x)[0], model(x)[0])
    assert load_checkpoint(tmp_path / "run")["model"]["wte.weight"].dtype == torch.float32


class Program(torch.nn.Module):
    """In TorchScript, it makes a file 16 bytes long when it is loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.x = torch.ones(1)

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[str, bool]):  # noqa: UP006  # TorchScript knows no other
        self.path = state[0]
        self.training = state[1]
        self.x = torch.from_file(self.path, True, 4)


def read_by_convert(path, *args):
    convert.main([f"--source={path}", f"--dest={path.parent / 'run'}", *args])


READERS = {  # of weights that may be foreign: the name of a file, and what reads it
    "a file": ("x.ckpt", read_by_convert),
    "a pickle that is trusted": ("x.bin", lambda path: read_by_convert(path, "--trust_pickle")),
    "a folder": ("pytorch_model.bin", lambda path: read_by_convert(path.parent)),
    "a checkpoint": ("x.pt", read_by_convert),
    "a folder with a checkpoint": ("ckpt.pt", lambda path: read_by_convert(path.parent)),
    "a run": ("ckpt.pt", lambda path: open_run(path.parent, "cpu")),
    "a tokenizer": ("ckpt.pt", lambda path: given_tokenizer(path.parent)),
}


@pytest.mark.filterwarnings("ignore:.*orch")
@pytest.mark.parametrize("reader", READERS)
def test_a_program_of_torch_jit_is_not_run(tmp_path, reader):
    name, read = READERS[reader]
    victim = tmp_path / "victim"
    victim.write_text("mine")
    torch.jit.save(torch.jit.script(Program(str(victim))), tmp_path / name)
    with pytest.raises((UserError, OSError), match="torch.jit|TorchScript"):
        read(tmp_path / name)
    assert victim.read_text() == "mine"
    if reader == "a file":  # is there a danger at all?
        torch.load(tmp_path / name, weights_only=False)
        assert victim.stat().st_size == 16


@torch.no_grad()
@pytest.mark.parametrize("n_sense", [0, 4])
def test_gpt2_and_gpt2_with_new_senses(tmp_path, n_sense):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 50257, "inverse_layer_scale": False, "n_sense": 0}
    model = Backpack(BackpackConfig(**sizes)).eval()
    tensors = to_layout(model.state_dict(), model.config, "gpt2", 50257)
    tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    folder = source(tmp_path / "theirs", tensors, {"n_head": 3})
    ours = imported(tmp_path, folder, f"--n_sense={n_sense}")
    x = torch.tensor([[50256, 5, 6]])
    assert torch.allclose(ours.hidden(x), model.hidden(x), atol=1e-5)
    if not n_sense:
        assert torch.allclose(ours(x)[0], model(x)[0], atol=1e-5)
    assert load_checkpoint(tmp_path / "run")["meta"]["tokenizer"] == {"kind": "gpt2"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is damaged or holds no tensors"),
        (pickle.dumps({"a": Config()}), "is damaged or holds no tensors"),
        ({"a": Config()}, "found more than tensors: --trust_pickle loads it, and executes"),
        ({"a": torch.ones(2).to_sparse()}, "found more than tensors"),
        ({"a": torch.ones(2).cfloat()}, "'a': found a tensor of torch.complex64"),
        ({"a": torch.ones(1, 1).expand(10**9, D)}, "'a': found a tensor of"),
        ({7: torch.ones(2)}, ", 7: found a tensor"),
        ({"a": torch.ones(2)}, "unknown layout: .* the first tensors are a"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, message):
    folder = source(tmp_path / "hf", content)
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    refused(tmp_path, folder, message)


def test_a_flipped_bit_is_noticed(tmp_path):
    file = source(tmp_path / "hf", random_hf()) / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4  # within a tensor
    file.write_bytes(content)
    refused(tmp_path, file.parent, "a checksum is wrong")


@pytest.mark.parametrize(
    "changes, args, message",
    [
        ([1], (), "config.json: expected an object"),
        ({"n_head": "x"}, (), "n_head='x' of .*: expected int"),
        ({"n_head": 5}, (), "n_embd=24 must be divisible by n_head=5"),
        ({"n_head": None}, (), "no tensor shows the number of heads .*: give --n_head"),
        ({"vocab_size": 10**6}, (), "wte.weight has 40 rows, fewer than a vocabulary of 1000000"),
        ({}, ("--tokenizer=gpt2",), "the tokenizer has 50257 tokens, but wte.weight 40 rows"),
        ({"layout": "what"}, (), "unknown layout 'what'"),
        ({"scale_attn_by_inverse_layer_idx": 1}, (), "inverse_layer_scale=1 of .*: expected bool"),
        ({"activation_function": "relu"}, (), "found 'relu', expected one of gelu_new, gelu_py"),
        ({"activation_function": []}, (), r"found \[\], expected one of gelu_new"),
        ({"edits": {"list": [1]}}, (), "config.json, edits, edit 1: found 1, expected an object"),
        ({}, ("--layout=hf",), "layout hf: backpack.wte.weight is missing"),
        ({}, ("--n_sense=4",), "n_sense=4 is for gpt2 and lightning-gpt2 and nanogpt, found backpack-gpt2"),
    ],
)
def test_settings_that_describe_no_network(tmp_path, changes, args, message):
    config = CONFIG | changes if isinstance(changes, dict) else changes
    refused(tmp_path, source(tmp_path / "hf", random_hf(), config), message, *args)


@pytest.mark.parametrize(
    "value, message", [(math.nan, "infinite numbers or nan"), (1e6, "too large for dtype=float16")]
)
def test_numbers_that_no_run_may_have(tmp_path, value, message):
    w = random_hf()
    w["backpack.gpt2_model.ln_f.bias"].fill_(value)
    refused(tmp_path, source(tmp_path / "hf", w), f"ln_f.bias: found .*{message}", "--dtype=float16")


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network\nat all")

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(UserError, match="some/id: not here, and not on the Hub: .* no network$"):
        convert.main(["--source=some/id", f"--dest={tmp_path / 'run'}"])


# -----------------------------------------------------------------------------
# what is written


def test_a_copy_to_share_has_weights_only(run_train, tmp_path):
    run = run_train()
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 1, "lo')  # as a run leaves it that was killed
    convert.main([f"--source={run}", f"--dest={tmp_path / 'copy'}"])
    assert files_in(tmp_path / "copy").keys() == {"ckpt.pt", "config.json", "metrics.jsonl"}
    ours = load_checkpoint(tmp_path / "copy")
    ckpt = load_checkpoint(run)
    assert ours.keys() == {"model", "config", "settings", "step", "meta", "source"}
    assert all(torch.equal(ours["model"][key], w.half()) for key, w in ckpt["model"].items())
    for key in ("config", "settings", "step", "meta"):
        assert ours[key] == ckpt[key]
    assert records(tmp_path / "copy", "val_loss").keys() == {0, 4, 8, 12}
    with pytest.raises(UserError, match="run is a run: --n_head can't change it"):
        convert.main([f"--source={run}", f"--dest={tmp_path / 'c'}", "--n_head=3"])
    with pytest.raises(UserError, match="n_sense=3 is for a Transformer, but .*run has 4 senses already"):
        convert.main([f"--source={run}", f"--dest={tmp_path / 'c'}", "--n_sense=3"])
    with pytest.raises(UserError, match="is the folder of the source"):
        convert.main([f"--source={run / 'ckpt.pt'}", f"--dest={run}"])


def test_new_senses_on_a_transformer_of_ours_train_while_it_is_frozen(run_train, tmp_path):
    run = run_train("--n_sense=0")
    senses = tmp_path / "senses"
    convert.main([f"--source={run}", f"--dest={senses}", "--n_sense=4"])
    below = load_checkpoint(run)["model"]
    start = load_checkpoint(senses)["model"]
    frozen = "--freeze=wte,wpe,blocks,ln_f"
    ckpt = load_checkpoint(run_train(f"--init_from={senses}", "--n_sense=4", frozen, out="tuned"))
    for name, p in ckpt["model"].items():
        assert torch.equal(p, below[name] if name in below else start[name]) == (name in below), name
    n_trained = sum(p.numel() for name, p in ckpt["model"].items() if name not in below)
    moments = ckpt["optimizer"][0]["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == n_trained


def test_nothing_is_replaced_unasked(tmp_path):
    folder = source(tmp_path / "hf", random_hf())
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "metrics.jsonl", "notes.txt"):
        (out / name).write_text("of the user")
    before = files_in(out)
    with pytest.raises(UserError, match="run has config.json, metrics.jsonl, .* --overwrite"):
        imported(tmp_path, folder)
    assert files_in(out) == before
    imported(tmp_path, folder, "--overwrite")
    # the log was of another run
    assert files_in(out).keys() == {"ckpt.pt", "config.json", "notes.txt"}
    assert json.loads((out / "config.json").read_text())["n_embd"] == D
    before = files_in(out)
    with pytest.raises(UserError, match="run has a run: give another --dest"):
        convert.main([f"--source={folder}", "--to=levanter", f"--dest={out}", "--overwrite"])
    assert files_in(out) == before


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", Backpack(BackpackConfig(**SIZES)))
    args = [f"--source={run}", "--to=hf", f"--dest={tmp_path / 'hf'}"]
    convert.main(args)
    before = files_in(tmp_path / "hf")

    def disk_full(*args):
        raise OSError("no space")

    monkeypatch.setattr(export, "card", disk_full)
    with pytest.raises(OSError, match="no space"):
        convert.main([*args, "--overwrite"])
    assert files_in(tmp_path / "hf") == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


def test_what_is_read_is_not_replaced(tmp_path):
    """Neither the source, nor edits or a tokenizer that lie where the result would go."""
    run = save_run(tmp_path / "run", Backpack(BackpackConfig(**SIZES)))
    out = tmp_path / "out"
    out.mkdir()
    (out / "edits.json").write_text("[]")
    (out / "tokenizer.json").write_text("{}")
    (tmp_path / "link").symlink_to(run)
    before = files_in(out) | files_in(run)
    for args, message in (
        ([f"--dest={tmp_path / 'link'}"], "is the folder of the source"),
        ([f"--dest={out}", f"--edits={out / 'edits.json'}", "--to=hf"], "is the folder of the edits"),
        ([f"--dest={out}", f"--tokenizer={out}"], "is the folder of the tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main([f"--source={run}", "--overwrite", *args])
    assert files_in(out) | files_in(run) == before


def test_a_folder_that_was_half_filled_is_nothing(tmp_path, monkeypatch):
    """Wherever it stops while files take their places, there is the old, none, or the new."""
    old = {"main": b"old", "part": b"old", "log": b"old", "notes": b"of the user"}
    new = {"main": b"new", "part": b"new", "more": b"new"}
    real = Path.replace
    found = []
    for steps in range(4):
        folder = tmp_path / f"{steps}"
        folder.mkdir()
        for name, content in old.items():
            (folder / name).write_bytes(content)
        left = [None] * steps

        def replace(path, target, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return real(path, target)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", replace)
            with filling(folder, ["main"], ["log"]) as made:
                for name, content in new.items():
                    (made / name).write_bytes(content)
        found.append(files_in(folder))
    assert [files.get("main") for files in found] == [None, None, None, b"new"]
    assert found[-1] == new | {"notes": b"of the user"}
    assert all(files["notes"] == b"of the user" and "log" not in files for files in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


def test_a_commit_of_the_hub_is_recorded(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    folder = source(tmp_path / ("3f" * 20), random_hf())
    asked = []

    def download(source, revision, allow_patterns):
        asked.append((source, revision))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    convert.main(["--source=owner/name", "--revision=v1", f"--dest={tmp_path / 'run'}"])
    assert set(asked) == {("owner/name", "v1")}
    for about in (load_checkpoint(tmp_path / "run"), json.loads((tmp_path / "run/config.json").read_text())):
        assert about["source"]["name"] == "owner/name"
        assert about["source"]["commit"] == "3f" * 20
    with pytest.raises(UserError, match="is not of the Hub: --revision has no effect"):
        convert.main([f"--source={folder}", "--revision=v1", f"--dest={tmp_path / 'other'}"])
