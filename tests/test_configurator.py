"""Settings from the command line and config files, errors of one line, and the choice of a device."""

import dataclasses
import subprocess
import sys
from typing import Literal

import pytest
import torch
from conftest import ROOT

import prepare_data
import sample
import train
from configurator import UsageError, UserError, configure, pick_device, pick_dtype, run


@dataclasses.dataclass
class Base:
    n_layer: int = 2  # how many blocks


@dataclasses.dataclass
class Settings(Base):
    rate: float = 0.1  # how fast
    name: str = "a"
    maybe: int | None = None
    label: str | None = None
    flag: bool = False
    maybe_flag: bool | None = None
    kind: Literal["one", "two"] = "one"  # which, after # a mark


def get(*argv):
    return vars(configure(Settings, list(argv))[0])


@pytest.mark.parametrize(
    "arg, key, value",
    [
        ("--rate=1", "rate", 1.0),
        ("--rate=1e-3", "rate", 0.001),
        ("--n_layer=1_000", "n_layer", 1000),
        ("--name=3", "name", "3"),
        ("--name=", "name", ""),
        ("--name=a=b", "name", "a=b"),
        ("--maybe=4", "maybe", 4),
        ("--maybe=None", "maybe", None),
        ("--label=None", "label", None),
        ("--label=1", "label", "1"),
        ("--flag=True", "flag", True),
        ("--flag", "flag", True),
        ("--maybe_flag", "maybe_flag", True),
        ("--maybe_flag=False", "maybe_flag", False),
        ("--kind=two", "kind", "two"),
    ],
)
def test_values_are_typed(arg, key, value):
    assert get(arg) == vars(Settings()) | {key: value}
    assert type(get(arg)[key]) is type(value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layer=1.5"], "n_layer=1.5 in --n_layer=1.5: expected int"),
        (["--n_layer=two"], "expected int"),
        (["--n_layer=True"], "expected int"),
        (["--rate=fast"], "expected float"),
        (["--rate=None"], "expected float"),
        (["--flag=1"], "expected bool"),
        (["--flag=true"], "expected bool"),
        (["--maybe=x"], "expected int or None"),
        (["--kind=three"], "expected one or two"),
        (["--n_layers=3"], "unknown setting 'n_layers' in --n_layers=3: did you mean 'n_layer'?"),
        (["--zzzzz=3"], "unknown setting 'zzzzz' in --zzzzz=3: --help lists all settings"),
        (["--"], "unknown setting ''"),
        (["--n_layer", "3"], "--n_layer: expected --n_layer=VALUE, without a space"),
        (["--flag", "True"], "True: no such config file (settings are given as --key=value)"),
        (["-n_layer=3"], "no such config file (settings are given as --key=value)"),
        (["nowhere.py"], "nowhere.py: no such config file"),
    ],
)
def test_mistakes_in_the_command_line(argv, message):
    with pytest.raises(UsageError) as error:
        get(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_config_file(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("import math\n_half = 2\nn_layer = 2 * _half\nrate = 1\nflag = True\n")
    s, given = configure(Settings, [str(file), "--n_layer=7"])
    assert given == {"n_layer": 7, "rate": 1.0, "flag": True}
    assert s == Settings(**given)
    assert get("--n_layer=7", str(file))["n_layer"] == 4  # the later one wins


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_layr = 3", "unknown setting 'n_layr'"),
        ("n_layer = 3.0", "expected int"),
        ("n_layer = (", "line 1: SyntaxError"),
        ("x_ = 1\nn_layer = 1 / 0", "line 2: ZeroDivisionError"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UsageError, match=f"config.py.*{message}|{message}.*config.py"):
        get(str(tmp_path / "config.py"))


def test_help_has_every_setting_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        configure(Settings, ["--help"], "what it does")
    printed = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert printed[0] == "what it does"
    rows = [" ".join(line.split()) for line in printed]
    assert "--n_layer=2 how many blocks" in rows
    assert "--label=None" in rows
    assert rows[-1] == "--kind=one which, after # a mark"


@pytest.mark.parametrize("script", [train, sample, prepare_data])
def test_every_setting_of_every_script_has_help(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    printed = capsys.readouterr().out
    for field in dataclasses.fields(script.Settings):
        assert f"\n--{field.name}={field.default}" in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize(
    "error, code",
    [(UserError("fix it"), 1), (UsageError("say it"), 2), (FileNotFoundError("gone"), 1)],
)
def test_mistakes_are_a_line_and_a_code(capsys, monkeypatch, error, code):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"script.py: {error}\n"


def test_a_reader_may_leave_early():
    """As `| head -1` does: no traceback, whatever is still printed."""
    code = "from configurator import run; run(lambda argv: print('long line ' * 99999))"
    pipe = subprocess.PIPE
    script = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe)
    script.stdout.close()
    assert script.stderr.read() == b""
    assert script.wait() == 1


def shipped_configs():
    """The configs that git tracks, as config/mine.py is the user's own; without git, all there are."""
    command = ["git", "ls-files", "config/*.py"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        names = found.stdout.split()
    except FileNotFoundError:
        names = []
    return [ROOT / name for name in names] or sorted((ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("file", shipped_configs(), ids=lambda file: file.stem)
def test_every_shipped_config_fits(file):
    s, _ = configure(train.Settings, [str(file)])
    s.vocab_size = 50257
    train.network_config(s)
    assert s.warmup_iters < s.max_iters
    for n_ranks in (1, 4, 8):
        if n_ranks == 1 or file.stem.startswith(("backpack", "gpt2")):
            sequences, rest = divmod(s.tokens_per_step, s.block_size * n_ranks)
            assert rest == 0
            assert sequences % min(s.batch_size, sequences) == 0
    head = file.read_text().split("\n\n")[0]
    assert f"train.py config/{file.name}" in head
    assert "hardware: " in head
    assert any(word in head for word in ("(paper)", "(measured", "UNTESTED"))
    assert s.out_dir == f"out/{file.stem}"


def test_devices_and_number_types(monkeypatch):
    cpu = pick_device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    for name, message in (("gpu", "expected auto, cpu, mps"), ("cuda:99", "has no such device")):
        with pytest.raises(UserError, match=f"device='{name}': .*{message}"):
            pick_device(name)

    # two GPUs that aren't there
    gpu = torch.device("cuda:0")
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    assert pick_device("auto") == pick_device("cuda") == gpu
    assert pick_device("cuda:1") == torch.device("cuda:1")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert pick_dtype("auto", gpu) == dtype
    with pytest.raises(UserError, match="Tesla T4 has none: --dtype=float16"):
        pick_dtype("bfloat16", gpu)

    def no_code(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nMore.")

    monkeypatch.setattr(torch, "ones", no_code)
    with pytest.raises(UserError, match="^cuda:0 can't be used: CUDA error: no kernel"):
        pick_device("auto")
