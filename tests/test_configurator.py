import dataclasses

import pytest
from conftest import ROOT

import prepare_data
import sample
import train
from configurator import UsageError, UserError, configure, run
from model import BackpackConfig


@dataclasses.dataclass
class Base:
    n_layer: int = 2      # how many blocks


@dataclasses.dataclass
class Settings(Base):
    rate: float = 0.1     # how fast
    name: str = "a"
    maybe: int | None = None
    label: str | None = None
    flag: bool = False


def get(*argv):
    return vars(configure(Settings, list(argv))[0])


DEFAULTS = {"n_layer": 2, "rate": 0.1, "name": "a", "maybe": None, "label": None, "flag": False}


def test_defaults_and_purity():
    assert get() == get() == DEFAULTS
    assert get("--n_layer=3") == DEFAULTS | {"n_layer": 3} and get() == DEFAULTS


@pytest.mark.parametrize("arg, key, value", [
    ("--rate=1", "rate", 1.0), ("--rate=1e-3", "rate", 0.001), ("--n_layer=1_000", "n_layer", 1000),
    ("--name=3", "name", "3"), ("--name=", "name", ""), ("--name=a=b", "name", "a=b"), ("--maybe=4", "maybe", 4),
    ("--maybe=None", "maybe", None), ("--label=None", "label", None), ("--label=1", "label", "1"),
    ("--flag=True", "flag", True), ("--name=None", "name", "None")])
def test_values_are_typed(arg, key, value):
    got = get(arg)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("arg, message", [
    ("--n_layer=1.5", "n_layer=1.5 (command line): expected int"), ("--n_layer=two", "n_layer='two'"),
    ("--n_layer=True", "expected int"), ("--rate=fast", "expected float"), ("--rate=None", "expected float"),
    ("--flag=1", "expected bool"), ("--flag=true", "expected bool"), ("--maybe=x", "expected int or None"),
    ("--n_layer=[1]", "expected int"), ("--n_layers=3", "did you mean 'n_layer'?"),
    ("--zzzzz=3", "unknown key 'zzzzz'"),
    ("--flag", "expected --key=value"), ("nowhere.py", "no such config file")])
def test_what_is_wrong_is_said(arg, message):
    with pytest.raises(UsageError) as error:
        get(arg)
    assert message in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2


def test_config_file(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("import math\n_half = 2\nn_layer = 2 * _half\nrate = 1\nflag = True\n")
    values, sources = configure(Settings, [str(file), "--n_layer=7"])
    assert (values.n_layer, values.rate, values.flag) == (7, 1.0, True) and type(values.rate) is float
    assert sources == {"n_layer": "command line", "rate": str(file), "flag": str(file)}
    assert configure(Settings, ["--n_layer=7", str(file)])[0].n_layer == 4  # the later wins


@pytest.mark.parametrize("text, message", [
    ("n_layr = 3", "unknown key 'n_layr'"), ("n_layer = '3'", "n_layer='3'"), ("n_layer = 3.0", "expected int"),
    ("n_layer = (", "line 1: SyntaxError"), ("x_ = 1\nn_layer = 1 / 0", "line 2: ZeroDivisionError"),
    ("maybe = 'None'", "expected int or None")])
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
    assert "--n_layer=2" in out and "how many blocks" in out and "how fast" in out and "--label=None" in out


@pytest.mark.parametrize("script", [train, sample, prepare_data])
def test_every_setting_of_every_script_has_help(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(script.Settings):
        assert f"--{field.name}={field.default}" in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_run_turns_user_errors_into_a_line_and_a_code(capsys, monkeypatch):
    def fail(error):
        def main(argv):
            raise error
        return main
    for error, code in ((UserError("mend it"), 1), (UsageError("say it"), 2), (KeyError("mine"), 1)):
        with pytest.raises(SystemExit) as stop:
            run(fail(error), KeyError)
        assert stop.value.code == code and str(error) in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")  # what goes wrong on one rank alone is said, too
    with pytest.raises(SystemExit):
        run(fail(UserError("no such device")))
    assert "rank 3: no such device" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        run(fail(ZeroDivisionError()))


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.py")), ids=lambda file: file.stem)
def test_every_shipped_config_fits(file):
    s, _ = configure(train.Settings, [str(file)])
    fields = {f.name: getattr(s, f.name) for f in dataclasses.fields(BackpackConfig)}
    BackpackConfig(**fields | {"vocab_size": 50257})
    for world in (1, 4, 8) if "backpack" in file.stem or "gpt2" in file.stem else (1,):
        assert not [p for p in train.problems_with(s, (), None, None, world) if "checkpoint" not in p]
    head = file.read_text().split("\n\n")[0]
    assert f"train.py config/{file.name}" in head and "hardware: " in head
    assert "(paper)" in head or "(measured" in head or "UNTESTED" in head
    assert s.out_dir == f"out/{file.stem}"
