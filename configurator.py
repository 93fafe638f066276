"""Settings of every script: `[config/file.py ...] [--key=value ...]` and --help.

A script's settings are a dataclass: names, types, defaults, and on each line a comment, which --help
prints; that of a number begins with the interval in which it must lie, and "with NAME:" in it says that
the setting has no effect without that one. A config file is Python that assigns to these names. Later
sources override earlier ones. Here is also how scripts end: by a signal, or by an error of one line.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
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


# torch's threads on a CPU spin while they wait for each other, which on a busy machine takes the time that
# the others need (5 to 18 times slower). With 1,000 turns a busy machine is as fast as with none, and a quiet
# one has 0.9 of its speed (0: 0.7). OpenMP reads this when torch is imported; yours goes first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _excepthook(kind, error, trace):
    if kind is not KeyboardInterrupt:  # which needs no traceback, also while torch is imported
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook


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
            values[key], sources[key] = checked(settings, key, value, source), source
    for key, source in sources.items():
        needs = re.match(r"(?:[\[(]\S+ \S+ )?with ([\w, ]+):", comments(settings).get(key, ""))
        names = re.split(", | or ", needs[1]) if needs else []
        if names and not any(values[name] for name in names):
            found = f"{key}={short(values[key])} ({source})"
            raise UsageError(f"{found} has no effect without --{' or --'.join(names)}")
    return types.SimpleNamespace(**values), sources


def read_config(path):
    """{name: value} of a config file, except for modules, functions and _private names."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such config file (settings are given as --key=value)")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # a config file may raise anything
        frames = inspect.getinnerframes(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)] or ["?"]
        line = getattr(error, "lineno", None) or lines[-1]
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise UsageError(f"{path}, line {line}: {what}") from None
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


SURROGATE = re.compile("[\ud800-\udfff]")  # Python's stand-ins for bytes that are not UTF-8


def checked(settings, key, value, source):
    """The value of a setting in its declared type and range; text of the command line is read as Python.

    source: where it was set. UsageError: another type, or outside the interval that --help shows.
    """
    hint = typing.get_type_hints(settings)[key]
    if typing.get_origin(hint) is typing.Literal:
        names = typing.get_args(hint)
        if value not in names:
            raise UsageError(f"{key}={short(value)} ({source}): expected {' or '.join(names)}")
        return value
    allowed = typing.get_args(hint) or (hint,)
    if source == "command line" and str in allowed:
        value = None if value == "None" and type(None) in allowed else value
    elif source == "command line":
        # if it stays text, it is refused below
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value) if abs(value) < 1e300 else value
    found = f"{key}={short(value)} ({source})"
    if type(value) not in allowed:
        names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise UsageError(f"{found}: expected {names}")
    if type(value) is str and (SURROGATE.search(value) or "\0" in value):
        raise UsageError(f"{found}: expected text in UTF-8")
    interval = re.match(r"([\[(])(\S+), (\S+)([\])])", comments(settings).get(key, ""))
    if interval and type(value) in (int, float):
        low, high = float(interval[2]), float(interval[3])
        above = low < value or (low == value and interval[1] == "[")
        below = value < high or (value == high and interval[4] == "]")
        if not (above and below):  # nan is neither
            raise UsageError(f"{found}: expected a number in {interval[0]}")
    return value


def short(value, most=60):
    """repr(value), cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


@functools.cache
def comments(settings):
    """{setting: its comment in the source}, of a dataclass and those that it inherits from."""
    found = {}
    for cls in reversed(settings.__mro__[:-1]):
        # ruff format puts a default whose line is too long on a line of its own, in parentheses
        pattern = r"^    (\w+):[^#\n]*?(?:\(\n[^#\n]*)?#\s*(.*)$"
        found |= dict(re.findall(pattern, inspect.getsource(cls), re.M))
    return found


def help_text(settings, doc=""):
    """doc, and a line per setting: its default and its comment in the source."""
    rows = [(f"--{f.name}={f.default}", f.name) for f in dataclasses.fields(settings)]
    width = max(len(flag) for flag, _ in rows if len(flag) < 34)
    said = comments(settings)
    lines = [f"{flag:{width}}  {said.get(name, '')}".rstrip() for flag, name in rows]
    title = "settings and their defaults, as [config/file.py ...] [--key=value ...]:"
    return "\n".join([doc.strip(), "", title, *lines])


def changed(values, sources):
    """A line for each setting that was set: its value, and where it was set."""
    lines = [f"  {key} = {getattr(values, key)!r}  ({source})" for key, source in sources.items()]
    return "\n".join(lines)


# ---- signals and errors


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


def printable(text):
    """text with escapes for what can't be printed, as it could clear a terminal or look like another line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def run(main):
    """Run a script's main(argv); an error of the user's or with a file is one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal can't show is no reason to stop
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # as of `| head`; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (UserError, OSError) as error:
        rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # under torchrun
        text = "\n- ".join(map(printable, str(error).split("\n- ")))
        print(f"{Path(sys.argv[0]).name}{rank}: {text}", file=sys.stderr, flush=True)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
