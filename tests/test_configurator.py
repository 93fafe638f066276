"""Settings from the command line and config files, errors of the user, and the choice of a device."""

import dataclasses
import inspect
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import configurator
import prepare_data
import sample
import train
from configurator import UsageError, UserError, changed, configure, run
from hardware import peak_memory, pick_device, pick_dtype
from model import BackpackConfig, CheckpointError


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
    long_name: float = 0.5  # a comment on a default that has a line of its own
    last: int = 3


def get(*argv):
    return vars(configure(Settings, list(argv))[0])


DEFAULTS = {
    "n_layer": 2,
    "rate": 0.1,
    "name": "a",
    "maybe": None,
    "label": None,
    "flag": False,
    "maybe_flag": None,
    "long_name": 0.5,
    "last": 3,
}


def test_defaults_and_purity():
    assert get() == get() == DEFAULTS
    assert get("--n_layer=3") == DEFAULTS | {"n_layer": 3} and get() == DEFAULTS


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
        ("--name=None", "name", "None"),
    ],
)
def test_values_are_typed(arg, key, value):
    got = get(arg)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--n_layer=1.5", "n_layer=1.5 (command line): expected int"),
        ("--n_layer=two", "n_layer='two'"),
        ("--n_layer=True", "expected int"),
        ("--rate=fast", "expected float"),
        ("--rate=None", "expected float"),
        ("--flag=1", "expected bool"),
        ("--flag=true", "expected bool"),
        ("--maybe=x", "expected int or None"),
        ("--n_layer=[1]", "expected int"),
        ("--n_layers=3", "did you mean 'n_layer'?"),
        ("--zzzzz=3", "unknown key 'zzzzz'"),
        ("--n_layer", "--n_layer: expected --key=value, as in --n_layer=..."),
        ("--maybe", "as in --maybe=..."),
        ("--n_layrs", "did you mean 'n_layer'?"),
        ("-n_layer=3", "no such config file (settings are given as --key=value)"),
        ("nowhere.py", "no such config file"),
    ],
)
def test_errors_say_what_is_wrong(arg, message):
    with pytest.raises(UsageError) as error:
        get(arg)
    assert (
        message in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layer", "3"], "--n_layer 3: write --n_layer=3"),
        (["--name", "a b"], "write --name=a b"),
        (["--n_layer", "--flag"], "--n_layer: expected --key=value"),
        (["--flag", "True"], "--flag True: write --flag=True"),
    ],
)
def test_a_value_after_a_space_is_refused(argv, message, capsys, monkeypatch):
    """The message has the right spelling, and the exit code is 2."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run(lambda argv: get(*argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("script.py: ") and message in error and error.count("\n") == 1


def test_config_file(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("import math\n_half = 2\nn_layer = 2 * _half\nrate = 1\nflag = True\n")
    values, sources = configure(Settings, [str(file), "--n_layer=7"])
    assert (values.n_layer, values.rate, values.flag) == (7, 1.0, True) and type(
        values.rate
    ) is float
    assert sources == {"n_layer": "command line", "rate": str(file), "flag": str(file)}
    assert configure(Settings, ["--n_layer=7", str(file)])[0].n_layer == 4  # the later one wins
    lines = changed(values, sources).splitlines()
    assert configure(Settings, ["--flag", str(file)])[0].n_layer == 4  # a bool needs no value
    assert "  n_layer = 7  (command line)" in lines and f"  rate = 1.0  ({file})" in lines


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_layr = 3", "unknown key 'n_layr'"),
        ("n_layer = '3'", "n_layer='3'"),
        ("n_layer = 3.0", "expected int"),
        ("n_layer = (", "line 1: SyntaxError"),
        ("x_ = 1\nn_layer = 1 / 0", "line 2: ZeroDivisionError"),
        ("maybe = 'None'", "expected int or None"),
    ],
)
def test_config_file_errors(tmp_path, text, message):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UsageError) as error:
        get(str(tmp_path / "c.py"))
    assert message in str(error.value) and "c.py" in str(error.value)


def test_help_names_every_key_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        configure(Settings, ["--help"], "what it does")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("what it does")
    assert (
        "--n_layer=2" in out
        and "how many blocks" in out
        and "how fast" in out
        and "--label=None" in out
    )
    (line,) = [line for line in out.splitlines() if "--long_name" in line]
    assert line.split(maxsplit=1) == [
        "--long_name=0.5",
        "a comment on a default that has a line of its own",
    ]
    assert "--last=3" in out.splitlines()[-1].split() and len(out.splitlines()[-1].split()) == 1


@pytest.mark.parametrize("script", [train, sample, prepare_data])
def test_every_setting_of_every_script_has_help(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(script.Settings):
        assert f"--{field.name}={field.default}" in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_help_has_comments_of_long_lines():
    """Every comment on a setting's line, or on the line of its default, is in the help."""
    for script in (train, sample, prepare_data):
        text = configurator.help_text(script.Settings)
        for line in inspect.getsource(script.Settings).splitlines():
            code, mark, comment = line.partition("  # ")
            if mark and code.strip():
                assert comment in text, line


def test_a_config_file_that_exits(tmp_path):
    (tmp_path / "config.py").write_text("a = 1\nexit()\n")
    with pytest.raises(UsageError, match="config.py, line 2: SystemExit"):
        configurator.read_config(tmp_path / "config.py")


def test_run_turns_user_errors_into_a_line_and_a_code(capsys, monkeypatch):
    def fail(error):
        def main(argv):
            raise error

        return main

    errors = (UserError("fix it"), 1), (UsageError("say it"), 2), (CheckpointError("torn"), 1)
    for error, code in (*errors, (FileNotFoundError("gone"), 1)):
        with pytest.raises(SystemExit) as stop:
            run(fail(error))
        assert stop.value.code == code and str(error) in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt) as stop:
        run(fail(KeyboardInterrupt()))
    sys.excepthook(stop.type, stop.value, stop.tb)
    assert capsys.readouterr().err == ""
    sys.excepthook(KeyError, KeyError("planted"), None)
    assert "KeyError: 'planted'" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")  # an error of one rank alone names it
    with pytest.raises(SystemExit):
        run(fail(UserError("no such device")))
    assert "rank 3: no such device" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run(fail(ZeroDivisionError()))


def shipped_configs(root):
    """The configs that git tracks: config/mine.py is the user's own. Without git, all there are."""
    try:
        found = subprocess.run(
            ["git", "ls-files", "config/*.py"], cwd=root, capture_output=True, text=True
        )
        names = found.stdout.split()
    except FileNotFoundError:
        names = []
    return [root / name for name in names] or sorted((root / "config").glob("*.py"))


@pytest.mark.parametrize("file", shipped_configs(ROOT), ids=lambda file: file.stem)
def test_every_shipped_config_fits(file):
    s, _ = configure(train.Settings, [str(file)])
    fields = {f.name: getattr(s, f.name) for f in dataclasses.fields(BackpackConfig)}
    BackpackConfig(**fields | {"vocab_size": 50257})
    for world in (1, 4, 8) if "backpack" in file.stem or "gpt2" in file.stem else (1,):
        assert train.setting_problems(s, world) == []
    head = file.read_text().split("\n\n")[0]
    assert f"train.py config/{file.name}" in head and "hardware: " in head
    assert "(paper)" in head or "(measured" in head or "UNTESTED" in head
    assert s.out_dir == f"out/{file.stem}"


def test_a_config_of_the_user_is_not_a_shipped_one(tmp_path):
    (tmp_path / "config").mkdir()
    for name in ("shipped.py", "mine.py"):
        (tmp_path / "config" / name).write_text("not Python")
    assert len(shipped_configs(tmp_path)) == 2
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "config/shipped.py"], cwd=tmp_path, check=True)
    assert shipped_configs(tmp_path) == [tmp_path / "config/shipped.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("status", [None, "Name: python\n"])
def test_peak_memory_of_a_process(monkeypatch, status):
    """At least what it holds; also if the kernel doesn't report VmHWM."""
    held = np.ones(25_000_000)  # 200 MB
    if status:
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path: status)
    assert held.nbytes < peak_memory(torch.device("cpu")) < 2**40


def test_devices_and_number_types():
    cpu = pick_device("cpu")
    assert cpu == torch.device("cpu") and pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match="device='gpu': expected auto, cpu, mps, cuda or cuda:N"):
        pick_device("gpu")
    with pytest.raises(UserError, match="device='cuda:99': this machine has no such device"):
        pick_device("cuda:99")
    code = "import sys, configurator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@dataclasses.dataclass
class Views:
    word: str = ""  # what to show
    similar: str = ""  # what to compare
    sense: int | None = None  # [0, 9] with word or similar: only this one


def test_a_setting_without_effect_is_refused():
    assert configure(Views, ["--similar=a", "--sense=3"])[0].sense == 3
    for argv in (["--sense=3"], ["--word=", "--sense=3"]):
        with pytest.raises(
            UsageError, match="sense=3 .* has no effect without --word or --similar"
        ):
            configure(Views, argv)
