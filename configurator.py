"""Settings of every script: `[config/file.py ...] [--key=value ...]` and --help.

A script's settings are a dataclass: names, types and defaults, and the comment behind each is its help. A config file
is Python that assigns to these names; later sources win. Nothing here knows the scripts or imports torch.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import types
import typing
from pathlib import Path


class UserError(ValueError):
    """Something that the user can mend: told in one line, exit code 1."""
    exit_code = 1


class UsageError(UserError):
    """A command line or config file that can't be understood: exit code 2."""
    exit_code = 2


def configure(settings, argv, doc=""):
    """Settings from config files and command line, as a pure function of both.

    settings: a dataclass (the class); argv: arguments without the program's name; doc: what --help says first.
    Returns (values: SimpleNamespace with every key, sources: {key: where it was set} for those that were).
    Raises UsageError for an unknown key, a wrong type, a bad file; SystemExit(0) after printing --help.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(settings, doc))
        raise SystemExit(0)
    values = {f.name: f.default for f in dataclasses.fields(settings)}
    hints, sources = typing.get_type_hints(settings), {}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            if not equals:
                raise UsageError(f"{arg}: expected --key=value, as in --{_nearest(key, values) or 'seed'}=...")
            found, source = {key: text}, "command line"
        else:
            found, source = read_config(arg), arg
        for key, value in found.items():
            if key not in values:
                near = _nearest(key, values)
                raise UsageError(f"unknown key {key!r} ({source})" + (f": did you mean {near!r}?" if near else "")
                                 + " --help lists all")
            values[key], sources[key] = _typed(key, value, hints[key], source), source
    return types.SimpleNamespace(**values), sources


def read_config(path):
    """The names that a config file assigns; imported modules, functions and _private names are left out."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such config file (settings are given as --key=value)")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # whatever a config file may raise
        line = getattr(error, "lineno", None) or inspect.getinnerframes(error.__traceback__)[-1].lineno
        raise UsageError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return {k: v for k, v in names.items() if not (k.startswith("_") or callable(v) or isinstance(v, types.ModuleType))}


def _nearest(key, keys):
    return next(iter(difflib.get_close_matches(key, keys, n=1, cutoff=0.5)), None)


def _typed(key, value, hint, source):
    """value in the type that the setting is declared with; text of the command line is read as Python, but for str."""
    allowed = typing.get_args(hint) or (hint,)
    if source == "command line":
        if str in allowed:
            return None if value == "None" and type(None) in allowed else value
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # stays text, which the check below refuses
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise UsageError(f"{key}={value!r} ({source}): expected {names}")
    return value


def help_text(settings, doc=""):
    """Usage, doc, and a line for each key: default and the comment behind it in the source."""
    comments = {}
    for cls in reversed(settings.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    rows = [(f"--{f.name}={f.default}", comments.get(f.name, "")) for f in dataclasses.fields(settings)]
    width = max(len(key) for key, _ in rows if len(key) < 34)
    lines = [f"{key:{width}}  {comment}".rstrip() for key, comment in rows]
    title = "settings and their defaults, as [config/file.py ...] [--key=value ...]:"
    return "\n".join([doc.strip(), "", title, *lines])


def describe(values, sources):
    """One line for each setting that was changed, with its source."""
    return "\n".join(f"  {key} = {getattr(values, key)!r}  ({source})" for key, source in sources.items())


@contextlib.contextmanager
def hold(folder):
    """Hold a folder, made if need be, for this process alone. Raises UserError where another process holds it.

    The lock is on folder/.lock, which is removed in the end, as are folders that were made here and stayed empty. A
    process that dies, however it dies, holds nothing.
    """
    from filelock import FileLock, Timeout  # a package that torch needs, too
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder} is in use by another process: wait until it ends, or name another folder") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            (folder / ".lock").unlink()
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def run(main, *user_errors):
    """Run a script's main(argv): an error of the user, of a file or one of user_errors is a line and an exit code."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError, *user_errors) as error:
        rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # under torchrun
        print(f"{Path(sys.argv[0]).name}{rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
