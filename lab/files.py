"""Files of the lab: UTF-8 and JSON that people give it, and new files that appear whole or not at all."""

import contextlib
import json
import os
import secrets
import tempfile
from pathlib import Path

from configurator import UserError, check


def read_text(path):
    """The text of a file. OSError: it can't be read. UserError: it is not in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8: byte {error.start} is 0x{byte:02x}") from None


def parse_json(text, where):
    """The value that a JSON text says. UserError: it is not JSON; where: what it is, for the message."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is not JSON that we can read: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def read_json(path):
    """The value in a JSON file. Errors: those of read_text and parse_json."""
    return parse_json(read_text(path), path)


def read_jsonl(path):
    """The values on the lines of a JSONL file, of which blank ones count for nothing."""
    values = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            values.append(parse_json(line, f"{path}, line {number}"))
    return values


def read_metrics(folder):
    """The records of a run's metrics.jsonl, as they were logged. UserError: it has none."""
    path = Path(folder) / "metrics.jsonl"
    check(path.is_file(), f"{path}: no such file; a folder that train.py made has it")
    # a run that was killed may have left half a line at the end
    whole, _, _ = read_text(path).rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


# what runs and exports have, in kinds that other results may have, too
RUN_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "meta.json")


def expect_place(path, suffixes=None):
    """Ask, before long work, whether its result may go to path. UserError: it may not.

    It replaces nothing but a regular file, so no link, either. suffixes: the endings that a file of this
    kind has.
    """
    path = Path(path)
    if suffixes:
        endings = " or ".join(suffixes)
        check(path.suffix.lower() in suffixes, f"{path}: expected a name that ends in {endings}")
        check(path.name not in RUN_FILES, f"{path}: a file of this name belongs to a run or an export")
    check(not path.is_symlink(), f"{path} is a link, and not a file to replace: give the name of the file")
    check(path.is_file() or not path.exists(), f"{path} is there, and is not a file to replace")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    check(folder.is_dir(), f"{path}: {folder} is not a folder")
    check(os.access(folder, os.W_OK), f"{path}: nothing may be written in {folder}")


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, which takes the place of path once all of it is on disk.

    UserError: that failed, as on a full disk. Then path is as before, and nothing is left behind.
    """
    expect_place(path)
    path = Path(path)
    # "x" opens no file that is there, and follows no link
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file, contextlib.ExitStack() as stack:
            stack.callback(temporary.unlink, missing_ok=True)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def filling(folder, whole, leftovers):
    """A new folder; once all files in it are whole, they take their places in folder.

    whole: names of files without which folder is nothing that can be loaded; leftovers: names of files
    that describe what was there before. Both go first, and of the new files the whole ones come last: at
    any moment there is what was before, nothing to load, or what is new.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        made = Path(made)
        yield made
        folder.mkdir(exist_ok=True)
        for name in [*whole, *leftovers]:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(made.iterdir(), key=lambda path: path.name in whole):
            path.replace(folder / path.name)


def write_text(path, text):
    """Write a file in UTF-8, whole or not at all: see replacing."""
    with replacing(path) as file:
        file.write(text.encode())
