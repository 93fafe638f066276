"""Pictures of lab.look: bars of what senses say, a heat map of the parts of a logit (needs matplotlib)."""

from pathlib import Path

import numpy as np

from configurator import UserError
from files import expect_place, replacing
from tokenizer import require


def expect_picture(path):
    """Ask before the work that a picture shows. UserError: one can't be drawn there, or at all."""
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"plot={path!r}: expected a .png, .svg or .pdf")
    expect_place(path)
    pyplot()


def draw_bars(file, title, panels):
    """Draw a panel of bars for each (name, [(token, score)])."""
    across = min(3 if len(panels) % 3 == 0 else 4, len(panels))
    down, n = -(-len(panels) // across), max(len(bars) for _, bars in panels)
    size = 3 * across, 0.5 + down * (0.4 + 0.2 * n)
    figure, axes = pyplot().subplots(down, across, figsize=size, squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, bars) in zip(axes.flat, panels):
        tokens, scores = zip(*bars[::-1])
        colors = ["#1f6fb4" if score > 0 else "#c44e52" for score in scores]
        axis.barh(range(len(bars)), scores, color=colors, height=0.7)
        axis.set_yticks(range(len(bars)), [token[:18] for token in tokens])
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
    save(figure, file, title)


def draw_parts(file, title, parts, names, kind="logit"):
    """Draw parts (T,K) of a logit, or a difference, as a heat map of numbers: senses over the tokens read."""
    values = parts.T.cpu().numpy()  # (K,T)
    size = max(6, 0.5 * len(names) + 2), 1.8 + 0.26 * len(values)
    figure, axes = pyplot().subplots(figsize=size)
    most = max(abs(values).max(), 1e-9)
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set(xticks=range(len(names)), yticks=range(len(values)), ylabel="sense")
    axes.set_xticklabels(names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xticks([i + 0.5 for i in range(len(names) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(values) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for (l, j), value in np.ndenumerate(values):
        if abs(value) >= 0.05:  # else it would be +0.0
            color = "white" if abs(value) > 0.6 * most else "black"
            axes.text(j, l, f"{value:+.1f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label=f"part of the {kind}")
    save(figure, file, title)


def pyplot():
    require("matplotlib", "--plot").use("Agg")
    from matplotlib import pyplot

    pyplot.rc("figure.constrained_layout", use=True)
    pyplot.rc("svg", fonttype="none")  # text stays text
    pyplot.rc("text", parse_math=False)  # a $ in a word is a $
    pyplot.rc("font", size=9)
    pyplot.rc("axes.spines", top=False, right=False)
    return pyplot


def save(figure, path, title):
    figure.suptitle(title, fontweight="bold", fontsize=10)
    # matplotlib refuses to draw 2**16 pixels in a row
    dpi = min(150, 2**15 / max(figure.get_size_inches()))
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format=Path(path).suffix[1:])
    print(f"wrote {path}")
