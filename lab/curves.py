"""
Compare runs: the settings in which they differ, how far they came, and curves of what they logged.

$ python -m lab.curves out/a out/b                                       a table
$ python -m lab.curves out/a out/b --plot=curves.svg                     and a picture of the validation loss
$ python -m lab.curves out/* --plot=curves.png --figures=val_loss,loss --x=seconds

A run that was trained with --log_senses has sense_share and positions_in_sight, a line for each sense.
"""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from configurator import check, configure, run
from lab.draw import Panel, draw_curves, expect_picture
from lab.files import read_json, read_metrics

# settings that say where a run lies and not what it is
PLACES = {"out_dir", "data_dir", "overwrite"}
TITLES = {  # of figures; any other one has its own name
    "val_loss": "validation loss, nats per token",
    "bits_per_byte": "validation loss, bits per byte",
    "loss": "training loss, nats per token",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens per second",
    "sense_share": "share of a sense in the sum",
    "positions_in_sight": "positions in sight of a sense, exp(entropy of α)",
    "mfu": "share of the device's peak FLOP/s",
}
X_LABELS = {"steps": "step", "seconds": "seconds of training and evaluation"}


@dataclass
class Settings:
    plot: str | None = None  # draw curves into this .png, .svg or .pdf (needs matplotlib)
    figures: str = "val_loss"  # what to draw, separated by commas: any figures of metrics.jsonl
    x: Literal["steps", "seconds"] = "steps"  # over what to draw them
    first_step: int = 0  # draw nothing before this step, as a high start flattens what follows


# -----------------------------------------------------------------------------
# what a run has logged


def logged(records, figure):
    """(steps (n,), values (n,) or (n,K)) of the records that have a figure; mfu is null without a GPU."""
    having = [record for record in records if record.get(figure) is not None]
    steps = [record["step"] for record in having]
    values = [record[figure] for record in having]
    return np.array(steps), np.array(values)


def seconds_at(records, steps):
    """The seconds that a run had worked at each of the steps (n,); evaluations log none themselves."""
    timed, seconds = logged(records, "seconds")
    passed = np.diff(seconds, prepend=0)
    # train.py counts from 0 again where a run was resumed
    passed = np.where(passed < 0, seconds, passed)
    return np.interp(steps, [0, *timed], [0, *passed.cumsum()])


def make_panel(runs, figure, s):
    """The curves of a figure of {name: records}, for the runs that have it. UserError: none has."""
    curves = {}
    for name, records in runs.items():
        steps, values = logged(records, figure)
        shown = steps >= s.first_step
        if shown.any():
            x = seconds_at(records, steps) if s.x == "seconds" else steps
            curves[name] = (x[shown], values[shown])
    names = {key for records in runs.values() for record in records for key in record}
    there = ", ".join(sorted(names - {"step"}))
    check(curves, f"no run has {figure!r} from step {s.first_step} on; in metrics.jsonl are: {there}")
    return Panel(TITLES.get(figure, figure), X_LABELS[s.x], curves)


# -----------------------------------------------------------------------------
# the table


def results(records):
    """How far a run came, as {column: text}: its last figures, the best loss, the median speed."""
    columns = {"step": f"{records[-1]['step']:,}" if records else "0"}
    steps, losses = logged(records, "val_loss")
    if len(losses):
        best = losses.argmin()
        columns |= {
            "val_loss": f"{losses[-1]:.4f}",
            "best": f"{losses[best]:.4f}",
            "at step": f"{steps[best]:,}",
        }
    _, bits = logged(records, "bits_per_byte")
    if len(bits):
        columns["bits_per_byte"] = f"{bits[-1]:.4f}"
    _, speeds = logged(records, "tokens_per_second")
    if len(speeds):
        columns["tokens/s"] = f"{statistics.median(speeds):,.0f}"
    return columns


def differences(configs):
    """Of {name: settings}, those settings in which the runs differ, as {name: {setting: text}}."""
    rows = {name: {} for name in configs}
    for key in dict.fromkeys(itertools.chain(*configs.values())):
        texts = {name: str(config.get(key, "-")) for name, config in configs.items()}
        if key not in PLACES and len(set(texts.values())) > 1:
            for name, text in texts.items():
                rows[name][key] = text
    return rows


def print_table(rows):
    """Print {name: {column: text}}, a row a line; a - where a row lacks a column."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["run", *columns]]
    for name, row in rows.items():
        lines.append([name, *(row.get(column, "-") for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


def main(argv):
    folders = [arg for arg in argv if not arg.startswith("-")]
    s, _ = configure(Settings, [arg for arg in argv if arg.startswith("-")], __doc__)
    check(folders, "name the folders of one or more runs: python -m lab.curves out/a out/b")
    if s.plot:
        expect_picture(s.plot)
    runs = {folder: read_metrics(folder) for folder in folders}
    panels = [make_panel(runs, figure, s) for figure in s.figures.split(",")]
    settings = differences({folder: read_json(Path(folder) / "config.json") for folder in folders})
    print_table({folder: results(records) | settings[folder] for folder, records in runs.items()})
    if s.plot:
        draw_curves(s.plot, panels)


if __name__ == "__main__":
    run(main)
