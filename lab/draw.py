"""Pictures of the lab: bars, the parts of a logit as they add up, curves of runs (needs matplotlib)."""

import colorsys
import contextlib
import itertools
import logging
import math
import re
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.files import expect_place, replacing
from tokenizer import require

STYLE = {  # of matplotlib
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,  # as files have it: letters that are measured at another one are wider or narrower
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nanoBackpack",  # the same picture has the same names inside
    "text.parse_math": False,  # a $ in a word is a $
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

INK = "#1c2430"
LINE = "#9aa3af"

# of the curves of a run; in grey, their dashes tell them apart
COLORS = ("black", "#d55e00", "#0072b2", "#e69f00", "#009e73")
DASHES = ("-", "--", "-.", ":")
NUMBER = "{x:,.10g}"  # 20,000 and 0.5

RTL = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]"  # letters and marks of Hebrew, Arabic and their like
RTL_WORDS = re.compile(f"\u00b7?{RTL}+(?: +{RTL}+)*")  # the dot stands for a space before a word


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
    words = [token for _, bars in panels for token, _ in bars]
    names = [name for name, _ in panels]
    plt = pyplot(title, *names, *words)
    figure, axes = plt.subplots(down, across, squeeze=False, sharex=True, figsize=size)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, bars) in zip(axes.flat, panels):
        bars = bars[::-1]  # the first one at the top
        tokens = [isolated(token) for token, _ in bars]
        scores = [score for _, score in bars]
        colors = ["#1f6fb4" if score > 0 else "#c44e52" for score in scores]
        axis.barh(range(len(bars)), scores, color=colors, height=0.7)
        axis.set_yticks(range(len(bars)), tokens)
        axis.set_title(isolated(name), loc="left", fontsize=9, fontweight="bold")
    save(figure, file, title)


def sense_color(l):
    """The color of sense l, as --html has it: hues that lie far apart for senses that are neighbours."""
    hue = (210 + 137.5 * l) % 360
    return colorsys.hls_to_rgb(hue / 360, 0.74, 0.6)


def draw_stack(file, title, parts, tokens, names, what, most=12):
    """Draw how the parts (T,K) of a logit, or of what it is, add up to it.

    Each token has a row, which begins where the one above it ended: first the parts with the sign of the
    sum, the largest first, and below them, and back, those against it. names: {(j, l): the words that a sense
    says}, for parts that get a label. Only `most` tokens, those with the largest parts, have their own row.
    """
    values = parts.cpu().numpy()  # (T,K)
    side = -1 if values.sum() < 0 else 1
    order = np.abs(values).sum(1).argsort()[::-1]
    own = sorted(order[:most].tolist())
    others = order[most:]
    rows = []
    if len(others):
        rows.append((f"others ({len(others)})", values[others].sum(0), {}))
    for j in own:
        called = {l: words for (i, l), words in names.items() if i == j}
        rows.append((tokens[j], values[j], called))

    plt = pyplot(title, what, *tokens, *names.values())
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(rows)))
    labels = []
    end = 0.0
    for y, (_, of_token, called) in enumerate(rows):
        axes.plot([end, end], [y - 0.7, y + 0.3], color=LINE, linewidth=0.8, zorder=0)
        end = draw_row(axes, y, end, of_token, called, side, labels)
    bottom = len(rows)
    axes.plot([end, end], [bottom - 0.7, bottom + 0.3], color=LINE, linewidth=0.8, zorder=0)
    axes.barh(bottom, end, 0.6, color=INK)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(bottom + 1), [token for token, _, _ in rows] + [isolated(what)])
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.tick_params(length=0)
    axes.set_ylim(bottom + 0.6, -0.7)
    axes.spines[["left", "bottom"]].set_visible(False)
    sums = [of_token.sum() for _, of_token, _ in rows] + [end]
    for y, value in enumerate(sums):
        weight = "bold" if y == bottom else "normal"
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "weight": weight}
        axes.text(1.09, y, f"{value:+.2f}".replace("-", "\u2212"), **place)
    about = "a color is a sense: its number, and what it says most; below it, what speaks against"
    axes.set_xlabel(about, color="#5d6775", fontsize=8)
    figure.canvas.draw()  # now sizes are known
    for text, bar in labels:
        shorten(text, bar)
    save(figure, file, title)


def draw_row(axes, y, start, values, called, side, labels):
    """Draw the parts (K,) of a token from start on, and return where they end: see draw_stack.

    side: the sign of what all parts of all tokens add up to; labels: gets each (text, bar).
    """
    left = start
    for l in (-side * values).argsort().tolist():
        value = values[l]
        is_for = side * value > 0
        place, height = (y, 0.6) if is_for else (y + 0.41, 0.18)
        (bar,) = axes.barh(place, value, height, left, color=sense_color(l), edgecolor="white", linewidth=0.5)
        if l in called and is_for:
            name = f"{l}: {isolated(called[l])}"
            text = axes.text(left + value / 2, y, name, ha="center", va="center", fontsize=7.5, color=INK)
            labels.append((text, bar))
        left += value
    return left


def shorten(text, bar):
    """Take words off the end of a label until it fits into its bar; if none does, it goes."""
    room = 0.96 * abs(bar.get_window_extent().width)
    words = text.get_text().split(" ")
    while words and text.get_window_extent().width > room:
        words.pop()
        text.set_text(" ".join(words).rstrip(": "))
    if not words:
        text.remove()


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
    figure, axes = pyplot(title, *names).subplots(down, across, squeeze=False, figsize=size)
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


def pyplot(*texts):
    """matplotlib.pyplot in our style, with fonts for these texts, to draw into files.

    UserError: it is not installed.
    """
    matplotlib = require("matplotlib", "--plot")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    matplotlib.rcParams["font.family"] = fonts_for("".join(texts))
    # fonts_for says so, once for all; and a font that has no bold is bold enough
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib import pyplot

    return pyplot


def isolated(text):
    """A text in which words that are read from the right leave what stands beside them in its place."""
    return RTL_WORDS.sub("\u2068\\g<0>\u2069", text)  # Unicode's first strong isolate, and its end


def fonts_for(text):
    """Names of fonts for a text: matplotlib's own, and of those installed as few as have what it lacks.

    It prints which characters none of them has.
    """
    from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager, get_font

    names = ["sans-serif"]
    own = get_font(fontManager.findfont(FontProperties(family=names)))
    missing = {ord(character) for character in text if character.isprintable()}
    missing -= own.get_charmap().keys()
    if not missing:
        return names
    # fonts that were installed since matplotlib made its list; some files are none that it can use
    listed = {font.fname for font in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - listed):
        with contextlib.suppress(Exception):
            fontManager.addfont(path)
    has = {}  # of each font, the characters that it has of these
    for font in fontManager.ttflist:
        is_plain = font.style == "normal" and font.weight == 400
        # the last resort has a box for every character
        if is_plain and not font.name.startswith("Last Resort"):
            has[font.name] = missing & get_font(font.fname).get_charmap().keys()
    bold = {font.name for font in fontManager.ttflist if font.weight == 700}
    while missing:
        best = max(has, key=lambda name: (len(missing & has[name]), "Sans" in name, name in bold))
        if not missing & has[best]:
            break
        names.append(best)
        missing -= has[best]
    if missing:
        characters = "".join(map(chr, sorted(missing)[:20]))
        hint = "Noto Sans, or Noto Sans CJK for Chinese, Japanese and Korean"
        packages = "Debian's fonts-noto-core and fonts-noto-cjk"
        print(f"no font here has {characters}: install one, such as {hint} ({packages})")
    return names


def save(figure, path, title):
    lines = textwrap.fill(title, int(11 * figure.get_figwidth()))  # so many letters fit
    figure.suptitle(isolated(lines), fontweight="bold", fontsize=10)
    # matplotlib refuses to draw 2**16 pixels in a row
    dpi = min(figure.dpi, 2**15 / max(figure.get_size_inches()))
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format=Path(path).suffix[1:])
    print(f"wrote {path}")
