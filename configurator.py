"""
What all scripts share: settings, errors of one line, and the choice of a device.

A script's settings are a dataclass: names, types, defaults, and on each line a comment, which --help
prints. They come from [config/file.py ...] [--key=value ...]; later ones override earlier ones. A config
file is Python that assigns to these names.
"""

import ast
import difflib
import inspect
import os
import re
import runpy
import sys
import traceback
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

# torch's threads on a CPU spin while they wait for each other, which makes everything 5 to 18 times
# slower when the machine is busy. OpenMP reads this when torch is imported, so scripts import this file
# before it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class UserError(Exception):
    """A mistake that the user can mend: run() prints it as one line and exits with this code."""

    exit_code = 1


class UsageError(UserError):
    """The same, in the command line or in a config file."""

    exit_code = 2


def check(ok, message):
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


# -----------------------------------------------------------------------------
# settings


def configure(Settings, argv, doc=""):
    """Return (Settings(...), {key: value} of what argv sets); --help prints doc and all settings, and exits.

    UsageError: an unknown name, a value of another type, or a config file that can't be run.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(Settings, doc))
        sys.exit(0)
    types = get_type_hints(Settings)
    given = {}
    for arg in argv:
        if arg.startswith("--"):
            new = parse_flag(arg, types)
        else:
            new = read_config(arg)
        for key, value in new.items():
            if key not in types:
                near = difflib.get_close_matches(key, types, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "--help lists all settings"
                raise UsageError(f"unknown setting {key!r} in {arg}: {hint}")
            given[key] = typed(value, types[key], f"{key}={value!r} in {arg}")
    return Settings(**given), given


def parse_flag(arg, types):
    """--key=value as {key: value}; --key alone says True."""
    key, equals, text = arg[2:].partition("=")
    if not equals and types.get(key) not in (bool, bool | None, None):
        raise UsageError(f"{arg}: expected {arg}=VALUE, without a space")
    if not equals:
        return {key: True}
    if str in allowed_types(types.get(key, str)) and text != "None":
        return {key: text}
    try:
        return {key: ast.literal_eval(text)}
    except (ValueError, SyntaxError):
        return {key: text}  # of the wrong type, unless the setting takes text


def read_config(path):
    """The names that a config file assigns, without its modules, functions and _private ones."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such config file (settings are given as --key=value)")
    try:
        names = runpy.run_path(path)
    except Exception as error:
        line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UsageError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return {
        key: value
        for key, value in names.items()
        if not (key.startswith("_") or callable(value) or inspect.ismodule(value))
    }


def allowed_types(hint):
    """The types in the annotation of a setting: `int | None` -> (int, NoneType), Literal -> (str,)."""
    if get_origin(hint) is Literal:
        return (str,)
    return get_args(hint) or (hint,)


def typed(value, hint, where):
    """The value of a setting, if it is of the annotated type; whole numbers may stand for floats."""
    allowed = allowed_types(hint)
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
    if type(value) not in allowed:
        raise UsageError(f"{where}: expected {names}")
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise UsageError(f"{where}: expected {' or '.join(get_args(hint))}")
    return value


def help_text(Settings, doc):
    """doc, and for each setting its default and the comment that stands beside it in the source."""
    source = "".join(inspect.getsource(cls) for cls in reversed(Settings.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", source, re.M))
    lines = [doc.strip(), "", "settings and their defaults:"]
    for f in fields(Settings):
        lines.append(f"--{f.name}={f.default}".ljust(36) + comments.get(f.name, ""))
    return "\n".join(line.rstrip() for line in lines)


def run(main):
    """Call main(argv). A mistake of the user's, or a file that can't be used, is one line on stderr."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # of `| head`: what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        sys.exit("interrupted")


# -----------------------------------------------------------------------------
# the device, and the number type of its matrix products


def pick_device(name):
    """The torch.device of a name; auto: a GPU if there is one, else a Mac's, else the CPU."""
    import torch

    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    check(
        re.fullmatch(r"cpu|mps|cuda(:\d+)?", name),
        f"device={name!r}: expected auto, cpu, mps, cuda or cuda:N",
    )
    device = torch.device(name)
    present = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }
    index = device.index or 0
    check(
        index < present[device.type],
        f"device={name!r}: this machine has no such device; --device=auto picks one that it has",
    )
    if device.type == "cuda":
        device = torch.device("cuda", index)
        try:
            torch.ones(1, device=device)
        except RuntimeError as error:  # a driver that is too old, a GPU that this torch has no code for
            reason = str(error).splitlines()[0]
            hint = "README's limits say which build of torch is for which GPU"
            raise UserError(f"{device} can't be used: {reason}; {hint}") from None
    return device


def pick_dtype(name, device):
    """The torch.dtype of a name; auto: 16 bits on a GPU, bfloat16 if it has that natively, else float32."""
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        gpu = torch.cuda.get_device_name(device)
        check(native or name != "bfloat16", f"dtype=bfloat16, but {gpu} has none: --dtype=float16")
        if name == "auto":
            name = "bfloat16" if native else "float16"
    if name == "auto":
        name = "float32"
    return getattr(torch, name)
