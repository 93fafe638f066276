"""Files written whole or not at all, JSON of an expected shape, and a lock on folders."""

import contextlib
import json
import os
from pathlib import Path

from configurator import SURROGATE, UserError, short

KINDS = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number"}


def read_text(path):
    """The text of a file in UTF-8, with \\n for \\r\\n. UserError: it is missing or not in UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise UserError(f"{path} is not UTF-8: {what}; convert it first") from None
    return text.replace("\r\n", "\n")


def _refuse(name):
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(parse_constant=_refuse)


def parse_json(text, shape, where):
    """The value that a JSON text says, if it has this shape; see expect. where: named in errors."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where} is not JSON: {reason}") from None
    return expect(value, shape, where)


def read_json(path, shape):
    """The value in a JSON file, if it has this shape. UserError: it is missing, damaged or otherwise."""
    return parse_json(read_text(path), shape, path)


def read_jsonl(path, shape, is_log=False):
    """The values on the lines of a JSONL file; blank lines count for nothing. UserError: as read_json.

    is_log: leave out a last line that does not end, as of a run that was killed.
    """
    lines = read_text(path).split("\n")
    lines = enumerate(lines[:-1] if is_log else lines, 1)
    return [parse_json(text, shape, f"{path}, line {n}") for n, text in lines if text.strip()]


def expect(value, shape, where):
    """value, if it has this shape. UserError: it has not; the message has where, found and expected.

    A shape is a type (float: any finite number; str: text that UTF-8 can express), [shape] for a list,
    {key: shape} for a dict that has these keys (one that ends in "?" may be missing or None), or a set of
    texts, one of which it must be.
    """
    if isinstance(shape, set):
        if not (type(value) is str and value in shape):
            names = " or ".join(sorted(shape))
            raise UserError(f"{where}: found {short(value)}, expected {names}")
        return value
    kind = shape if isinstance(shape, type) else type(shape)
    fine = type(value) is kind or (kind is float and type(value) is int)
    if kind is str and fine:
        fine = value.isascii() or not SURROGATE.search(value)
    elif kind in (int, float) and fine:
        fine = abs(value) < (2**63 if kind is int else 1e300)
    if not fine:
        raise UserError(f"{where}: found {short(value)}, expected {KINDS[kind]}")
    if isinstance(shape, list):
        for n, part in enumerate(value, 1):
            expect(part, shape[0], f"{where}, entry {n}")
    elif isinstance(shape, dict):
        for key, part in shape.items():
            name, optional = key.rstrip("?"), key.endswith("?")
            if name not in value and not optional:
                raise UserError(f"{where}: found {short(value)}, expected {name!r} in it")
            if not (optional and value.get(name) is None):
                expect(value[name], part, f"{where}, {name}")
    return value


@contextlib.contextmanager
def replacing(path):
    """A binary file to write; it takes the place of path once all of it is on disk.

    UserError: that failed, as on a full disk; path is as before, and nothing is left behind.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        kept = "; the old one is whole" if path.is_file() else ""
        hint = "make room or choose another place"
        raise UserError(f"could not write {path} ({reason}){kept}: {hint}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def expect_place(path):
    """Ask before long work whose result goes to path. UserError: replacing could not write it there."""
    real = Path(os.path.realpath(path))
    folder = next(parent for parent in real.parents if parent.exists())
    what = "found a folder" if real.is_dir() else f"{folder} is no folder"
    if folder.is_dir() and not real.is_dir():
        what = "" if os.access(folder, os.W_OK) else f"{folder} must not be written"
    if what:
        raise UserError(f"{path}: {what}: choose another place")


def write_text(path, text):
    """Write a text file as UTF-8, whole or not at all; see replacing."""
    with replacing(path) as file:
        file.write(text.encode())


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
