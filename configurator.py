"""Settings of every script: `[config/file.py ...] [--key=value ...]` and --help.

A script's settings are a dataclass: names, types, defaults, and on each line a comment, which --help
prints. A config file is Python that assigns to these names. Later sources override earlier ones. Here
is also what all scripts need of the machine: locked folders, signals, one-line errors, and the choice
of a device, which alone imports torch.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import signal
import sys
import types
import typing
from pathlib import Path

# by these a scheduler stops a run: it may send them to all processes, and repeatedly; Windows has no SIGHUP
STOP_SIGNALS = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


class UserError(ValueError):
    """An error the user can fix: printed as one line, exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """An error in the command line or a config file: exit code 2."""

    exit_code = 2


def configure(settings, argv, doc=""):
    """Settings from config files and the command line.

    settings: the dataclass; argv: the arguments, without the program's name; doc: what --help prints
    first. Returns (values, sources): a namespace of all settings, and {key: where it was set} for those
    that were set. UsageError: an unknown key, a wrong type, a bad file. SystemExit(0) after --help.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(settings, doc))
        raise SystemExit(0)
    values = {f.name: f.default for f in dataclasses.fields(settings)}
    hints, sources = typing.get_type_hints(settings), {}
    for arg, following in zip(argv, [*argv[1:], ""]):
        if arg.startswith("--"):
            source, given = "command line", _read_flag(arg, following, hints)
        else:
            source, given = arg, read_config(arg)
        for key, value in given.items():
            if key not in values:
                near = difflib.get_close_matches(key, values, n=1, cutoff=0.5)
                hint = f": did you mean {near[0]!r}?" if near else ";"
                raise UsageError(f"unknown key {key!r} ({source}){hint} --help lists all")
            values[key], sources[key] = _typed(key, value, hints[key], source), source
    return types.SimpleNamespace(**values), sources


def read_config(path):
    """{name: value} of a config file, except for modules, functions and _private names."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such config file (settings are given as --key=value)")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # a config file may raise anything
        line = getattr(error, "lineno", None)
        line = line or inspect.getinnerframes(error.__traceback__)[-1].lineno
        raise UsageError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return {
        key: value
        for key, value in names.items()
        if not (key.startswith("_") or callable(value) or isinstance(value, types.ModuleType))
    }


def _read_flag(arg, following, hints):
    """{key: text} of --key=value; --key alone is True if the key is a bool. following: the next arg."""
    key, equals, text = arg[2:].partition("=")
    if equals:
        return {key: text}
    is_bool = key in hints and bool in (typing.get_args(hints[key]) or (hints[key],))
    # a bool may stand before a config file
    spaced = following.lower() in ("true", "false") if is_bool else following[:2] not in ("", "--")
    if key in hints and spaced:
        raise UsageError(f"{arg} {following}: write {arg}={following}")
    if key in hints and not is_bool:
        raise UsageError(f"{arg}: expected --key=value, as in {arg}=...")
    return {key: "True"}  # configure refuses unknown keys


def _typed(key, value, hint, source):
    """The value in its declared type; the command line's text is read as Python, unless it is a str."""
    allowed = typing.get_args(hint) or (hint,)
    if source == "command line":
        if str in allowed:
            return None if value == "None" and type(None) in allowed else value
        with contextlib.suppress(ValueError, SyntaxError):  # if it stays text, it is refused below
            value = ast.literal_eval(value)
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise UsageError(f"{key}={value!r} ({source}): expected {names}")
    return value


def help_text(settings, doc=""):
    """doc, and a line per setting: its default, and its comment in the source."""
    comments = {}
    for cls in reversed(settings.__mro__[:-1]):
        # ruff format puts a default whose line is too long on a line of its own, in parentheses
        pattern = r"^    (\w+):[^#\n]*?(?:\(\n[^#\n]*)?#\s*(.*)$"
        comments |= dict(re.findall(pattern, inspect.getsource(cls), re.M))
    rows = [(f"--{f.name}={f.default}", f.name) for f in dataclasses.fields(settings)]
    width = max(len(flag) for flag, _ in rows if len(flag) < 34)
    lines = [f"{flag:{width}}  {comments.get(name, '')}".rstrip() for flag, name in rows]
    title = "settings and their defaults, as [config/file.py ...] [--key=value ...]:"
    return "\n".join([doc.strip(), "", title, *lines])


def changed(values, sources):
    """A line for each setting that was set: its value, and where it was set."""
    lines = [f"  {key} = {getattr(values, key)!r}  ({source})" for key, source in sources.items()]
    return "\n".join(lines)


@contextlib.contextmanager
def hold(folder):
    """Lock a folder for this process, making it if needed. UserError: another process has it.

    The lock is on folder/.lock, which is removed at the end, and so are folders that were made here and
    are still empty. A process that dies in any way gives up its lock.
    """
    from filelock import FileLock, Timeout  # installed with torch

    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        hint = "wait until it ends, or name another folder"
        raise UserError(f"{folder} is in use by another process: {hint}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows can't remove an open file
            (folder / ".lock").unlink()
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def caught_signals():
    """A list that each signal to stop is added to; only a second Ctrl-C ends the run at once."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    numbers = {signal.SIGINT, *STOP_SIGNALS}
    if signal.getsignal(STOP_SIGNALS[1]) is signal.SIG_IGN:  # nohup: to survive the terminal
        numbers.discard(STOP_SIGNALS[1])
    before = {n: signal.signal(n, on_signal) for n in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main):
    """Run a script's main(argv); an error of the user's or with a file is one line and an exit code."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # under torchrun
        print(f"{Path(sys.argv[0]).name}{rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# ---- device and number type


def pick_device(name):
    """The torch.device of a name; "auto": cuda, else mps, else cpu. UserError: there is none such."""
    import torch

    mps = torch.backends.mps.is_available()
    have = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in have if have[kind])
    kind, _, index = name.partition(":")
    if kind not in have or (index and not index.isdigit()):
        raise UserError(f"device={name!r}: expected auto, cpu, mps, cuda or cuda:N")
    if not have[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        hint = "--device=auto picks one that it has"
        raise UserError(f"device={name!r}: this machine has no such device; {hint}")
    # with an index, which torch.cuda.set_device needs
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)


def pick_dtype(name, device):
    """The number type of matrix products; "auto": on a GPU 16 bits, bfloat16 if it has that natively."""
    import torch

    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={name!r}: expected auto, float32, bfloat16 or float16")
    return getattr(torch, name)


def autocast(device, dtype):
    """A context in which matrix products are in this number type."""
    import torch

    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# dense 16-bit TFLOP/s from the vendors' data sheets; the first name found in the device's name applies
PEAK_TFLOPS = """B200 2250, H200 989, H100 PCIe 756, H100 989, A100 312, L40S 362, L4 121, A10G 70, \
A10 125, A6000 155, RTX 4090 165, RTX 3090 71, V100 112, T4 65, MI300X 1307"""


def peak_flops(device, dtype):
    """The device's peak FLOP/s in a 16-bit type; None: unknown."""
    import torch

    if device.type != "cuda" or dtype == torch.float32:
        return None
    for entry in PEAK_TFLOPS.split(", "):
        name, tflops = entry.rsplit(" ", 1)
        if name in torch.cuda.get_device_name(device):
            return 1e12 * float(tflops)
    return None


def peak_memory(device):
    """The most bytes this process has used so far, on the GPU, or else in RAM."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return 0
    if sys.platform == "linux":  # getrusage, below, also counts what the parent process held
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if peak:
            return 1024 * int(peak[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
