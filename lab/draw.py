"""Pictures of the lab: bars, a heat map of the parts of a logit, curves of runs (needs matplotlib)."""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.files import expect_place, replacing
from tokenizer import require

STYLE = {  # of matplotlib
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nanoBackpack",  # the same picture has the same names inside
    "text.parse_math": False,  # a $ in a word is a $
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

# of the curves of a run; in grey, their dashes tell them apart
COLORS = ("black", "#d55e00", "#0072b2", "#e69f00", "#009e73")
DASHES = ("-", "--", "-.", ":")
NUMBER = "{x:,.10g}"  # 20,000 and 0.5


def expect_picture(path):
    """Ask before the work that a picture shows. UserError: it can't be drawn there, or at all."""
    expect_place(path, [".png", ".svg", ".pdf"])
    pyplot()


def draw_bars(file, title, panels):
    """Draw a panel of bars for each (name, [(token, score)])."""
    across = 3 if len(panels) % 3 == 0 else 4
    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    most = max(len(bars) for _, bars in panels)
    size = (3 * across, 0.5 + down * (0.4 + 0.2 * most))
    figure, axes = pyplot().subplots(down, across, squeeze=False, sharex=True, figsize=size)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, bars) in zip(axes.flat, panels):
        bars = bars[::-1]  # the first one at the top
        tokens = [token[:18] for token, _ in bars]
        scores = [score for _, score in bars]
        colors = ["#1f6fb4" if score > 0 else "#c44e52" for score in scores]
        axis.barh(range(len(bars)), scores, color=colors, height=0.7)
        axis.set_yticks(range(len(bars)), tokens)
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
    save(figure, file, title)


def draw_parts(file, title, parts, tokens, kind):
    """Draw the parts (T,K) of a logit, or whatever kind it is, as a heat map: senses over the tokens read."""
    values = parts.T.cpu().numpy()  # (K,T)
    K, T = values.shape
    size = (max(6, 0.5 * T + 2), 1.8 + 0.26 * K)
    figure, axes = pyplot().subplots(figsize=size)
    most = max(abs(values).max(), 1e-9)
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(T), tokens, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(K))
    axes.set_ylabel("sense")
    # white lines between the cells
    axes.set_xticks(np.arange(T - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(K - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for (l, j), value in np.ndenumerate(values):
        if abs(value) >= 0.05:  # else it would be +0.0
            color = "white" if abs(value) > 0.6 * most else "black"
            axes.text(j, l, f"{value:+.1f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label=f"part of the {kind}")
    save(figure, file, title)


class Panel(NamedTuple):
    """Curves of one quantity, a run each."""

    title: str  # the quantity and its unit
    x_label: str
    curves: dict  # {name of a run: (x (n,), y (n,) or (n,lines))}
    y_scale: str = "linear"  # or log
    x_scale: str = "linear"


def draw_curves(file, panels, title=""):
    """Draw Panels, in all of which a run has the same color and dashes."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    styles = {}
    for name, color, dashes in zip(names, itertools.cycle(COLORS), itertools.cycle(DASHES)):
        styles[name] = {"color": color, "linestyle": dashes}
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    size = (1.5 + 4 * across, 0.3 + 3 * down + 0.2 * len(names))
    figure, axes = pyplot().subplots(down, across, squeeze=False, figsize=size)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels):
        for name, (x, y) in panel.curves.items():
            width = 1.5 if np.ndim(y) == 1 else 0.6
            points = "o" if np.size(y) <= 50 else None  # few can be seen, and one is no line
            axis.plot(x, y, **styles[name], linewidth=width, marker=points, markersize=2 * width)
        axis.set(xlabel=panel.x_label, xscale=panel.x_scale, yscale=panel.y_scale)
        axis.set_title(panel.title, loc="left", fontsize=9)
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.xaxis.set_major_formatter(NUMBER)
        label_powers(axis.xaxis)
        label_powers(axis.yaxis)
    # below the panels, where it hides no curve and has room for names of any length
    lines = [axes[0, 0].plot([], [], **style)[0] for style in styles.values()]
    figure.legend(lines, names, loc="outside lower left", frameon=False, handlelength=3.5)
    save(figure, file, title)


def label_powers(axis):
    """Plain numbers along a logarithmic axis, at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(NUMBER)


def pyplot():
    """matplotlib.pyplot in our style, to draw into files. UserError: it is not installed."""
    matplotlib = require("matplotlib", "--plot")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot

    return pyplot


def save(figure, path, title):
    figure.suptitle(title, fontweight="bold", fontsize=10)
    # matplotlib refuses to draw 2**16 pixels in a row
    dpi = min(150, 2**15 / max(figure.get_size_inches()))
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format=Path(path).suffix[1:])
    print(f"wrote {path}")
