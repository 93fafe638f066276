"""Look into a Backpack: what senses say, which words have like senses, why it predicts a token.

    python -m lab.look --word=nurse,river                  what each sense says, high and low
    python -m lab.look --word=nurse,river,king --sense=3   one sense of several words
    python -m lab.look --roles                             what each sense does, over all words
    python -m lab.look --similar=river                     nearest words, by sense and overall
    python -m lab.look --text="The nurse said that" --target=he --against=she
    python -m lab.look --word=nurse --plot=nurse.svg       draws words, similar words or a text
    python -m lab.look --text="The nurse said" --html=page.html   both, to click through

This is the newest run in out/ unless --run=FOLDER says otherwise. A word is looked up with a space
before it; one of several tokens has the mean of their senses (paper, section 5.2); "word" in double
quotes is taken as it is. In print, a dot stands for a space.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from configurator import UserError, configure, read_text, replacing, run, write_text
from lab.edit import summary
from sample import open_run
from tokenizer import require, token_text, word_id, word_ids

TEMPLATE = Path(__file__).parent / "report.html"


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    word: str = ""  # words, separated by commas: what their senses say
    sense: int | None = None  # [0, 1e4] with word or similar: this sense only
    similar: str = ""  # words, separated by commas: which tokens have senses like theirs
    roles: bool = False  # what each sense does, whatever the word
    text: str = ""  # why does the model continue it as it does?
    target: str | None = None  # with text: a token that may come next; None: the likeliest
    against: str | None = None  # ... and one to compare it with
    top: int = 6  # [1, 1000] tokens, or parts, to show
    edits: str | None = None  # a JSON file of edits (lab/edit.py): look at the edited model
    edit: str = ""  # more: "scale river 4 0; swap Chicago: Illinois -> Texas; topic sports 2"
    plot: str | None = None  # draw the view into this .png, .svg or .pdf (needs matplotlib)
    html: str | None = None  # write a page: the words asked for, frequent ones, and the text
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N


# ---- senses and their figures


def split_words(text):
    """Words separated by commas; a comma in double quotes separates nothing."""
    return [word.strip() for word in re.findall(r'"[^"]+"|[^\s,][^,]*', text)]


def word_senses(model, tokenizer, word):
    """The senses of a word (K,D): the mean over its tokens (section 5.2)."""
    ids = torch.tensor(word_ids(tokenizer, word), device=model.wte.weight.device)
    return model.senses(ids).mean(0)


def says(model, C, n):
    """What senses C (...,D) say (section 5.1): topk, (...,n), of their highest and lowest logits."""
    logits = model.logits(C)  # (...,V)
    return logits.topk(n), logits.topk(n, largest=False)


def similarity(model, C):
    """cos(C(x)_l, C_l) of the senses of all tokens with C (K,D): (V,K) (section 5.2)."""
    ids = torch.arange(model.config.vocab_size, device=C.device)  # (V,)
    parts = [F.cosine_similarity(model.senses(part), C, dim=-1) for part in ids.split(1024)]
    return torch.cat(parts)


def attribution(model, idx, direction):
    """Why the token after idx (T,) gets its logit: weights and parts, both (T,K), in the exact sum

        direction . o = sum_j sum_l alpha[l,j] (direction . C(x_j)_l)

    direction (D,): E[y] for the logit of y, E[y] - E[z] for the difference to that of z; several
    directions (...,D) give parts (...,T,K).
    """
    alpha = model.contextualization(idx[None])[0, :, -1].T  # (T,K)
    return alpha, alpha * torch.einsum("tkd,...d->...tk", model.senses(idx), direction)


# ---- views: each prints, and returns what a picture shows


def ranked(tokenizer, values, ids):
    """[(token, score)] of one row of topk."""
    return [(token_text(tokenizer, i), v) for v, i in zip(values.tolist(), ids.tolist())]


def fill(pairs, digits=1, width=70):
    """'token score' of each pair, as many as fit into this width."""
    pieces = [f"  {token[:20]} {score:.{digits}f}" for token, score in pairs]
    while len("".join(pieces)) > width:
        pieces.pop()
    return "".join(pieces)


def show_words(model, tokenizer, words, senses, n):
    """The highest (+) and lowest (-) tokens of senses; one sense of several words, side by side."""
    panels, columns = [], {}
    side_by_side = len(senses) == 1 and len(words) > 1
    for word in words:
        ids = word_ids(tokenizer, word)
        name = " ".join(token_text(tokenizer, i) for i in ids)
        print(name if len(ids) == 1 else f"{name}: the mean of {len(ids)} tokens")
        high, low = says(model, word_senses(model, tokenizer, word), n)  # (K,n) each
        for l in senses:
            highest = ranked(tokenizer, high.values[l], high.indices[l])
            lowest = ranked(tokenizer, low.values[l], low.indices[l])
            panels.append((f"{word}, sense {l}", highest))
            columns[word] = {"+": highest, "-": lowest}
            if not side_by_side:
                print(f"{l:3} +{fill(highest)}\n    -{fill(lowest)}")
    if side_by_side:
        width = max(10, 76 // len(words))
        print(f"\nsense {senses[0]}: highest tokens, then the lowest")
        print("  " + "".join(f"{word[: width - 2]:{width}}" for word in words))
        for sign in "+-":
            for row in zip(*(columns[word][sign] for word in words)):
                cells = [f"{token[: width - 7]} {score:.1f}" for token, score in row]
                print(f"{sign} " + "".join(f"{cell:{width}}" for cell in cells))
    return panels


def show_similar(model, tokenizer, word, senses, n):
    """The tokens nearest to a word by each sense, by the mean of all cosines and by the least."""
    cosines = similarity(model, word_senses(model, tokenizer, word))  # (V,K)
    cosines[word_ids(tokenizer, word)] = -1.0
    columns = {f"sense {l}": cosines[:, l] for l in senses}
    if len(senses) > 1:
        columns |= {"all (mean)": cosines.mean(1), "least": cosines.amin(1)}
    print(word)
    panels = []
    for name, column in columns.items():
        nearest = ranked(tokenizer, *column.topk(n))
        print(f"{name:>11}{fill(nearest, 2, 69)}")
        panels.append((f"{word}, {name}", nearest))
    return panels


def show_roles(model, tokenizer, n, most=1000):
    """What a sense does whatever the word, over the words a BPE learned first: the frequent ones."""
    V = model.config.vocab_size
    words = [i for i in range(V) if re.fullmatch(" ?[a-z]{4,}", tokenizer.decode([i]))]
    idx = torch.tensor(words[:most] or [0], device=model.wte.weight.device)  # (N,)
    tops = [says(model, model.senses(part), min(10, V))[0].indices for part in idx.split(64)]
    top = torch.cat(tops)  # (N,K,10)
    own = (top == idx[:, None, None]).any(-1).float().mean(0)  # (K,)
    print(f"{len(idx)} words: how many have themselves among a sense's ten highest tokens,")
    print("and which tokens are most often among these, in % of the words")
    for l in range(top.size(1)):
        tokens, count = top[:, l].unique(return_counts=True)
        order = count.argsort(descending=True)[:n]
        often = ranked(tokenizer, 100 * count[order] / len(idx), tokens[order])
        print(f"{l:3} {own[l]:6.0%}  {fill(often, 0, 68)}")


def text_ids(model, tokenizer, text, most):
    """The token ids of --text (T,). UserError: none, or more than most."""
    ids = tokenizer.encode(text)
    if not 0 < len(ids) <= most:
        raise UserError(f"--text has {len(ids)} tokens: expected 1 to {most}")
    return torch.tensor(ids, device=model.wte.weight.device)


def grid(numbers, names):
    """Print numbers (T,K) as integers, without the small ones: 16 of them beside a name."""
    for first in range(0, numbers.size(1), 16):
        rows = numbers[:, first : first + 16].round().int().tolist()
        print(" " * 15 + "".join(f"{first + l:4}" for l in range(len(rows[0]))))
        for name, row in zip(names, rows):
            print(f"{name[:14]:>14} " + "".join(f"{value or '':>4}" for value in row))


def show_text(model, tokenizer, text, target, against, n):
    """What comes next, the largest parts of a logit or of a difference, and all weights and parts."""
    idx = text_ids(model, tokenizer, text, model.config.block_size)  # (T,)
    p = model(idx[None])[0][0, -1].softmax(-1)  # (V,)
    y = word_id(tokenizer, target) if target else p.argmax().item()
    direction, what = model.wte.weight[y], f"logit of {token_text(tokenizer, y)}"
    if against:
        z = word_id(tokenizer, against)
        direction = direction - model.wte.weight[z]
        what += f" less that of {token_text(tokenizer, z)}"
    alpha, parts = attribution(model, idx, direction)  # (T,K), (T,K)

    names = [token_text(tokenizer, i) for i in idx.tolist()]
    print("next, %:" + fill(ranked(tokenizer, *(100 * p).topk(n))))
    print(f"\n{what}: {parts.sum():+.3f}")
    print(f"exactly the sum of {parts.numel()} parts; the largest for and against it:")
    order = parts.flatten().sort(descending=True).indices.tolist()
    for i in order[:n] + order[-n:][::-1]:
        j, l = divmod(i, parts.size(1))
        where = f"sense {l:<3} of {names[j]} (position {j}), weight {alpha[j, l]:.3f}"
        print(f"  {parts[j, l]:+8.3f}  {where}")
    rows = parts.abs().sum(1).topk(min(30, len(idx))).indices.sort().values.tolist()
    shown = [names[j] for j in rows]
    print(f"\nweights in %: tokens down ({len(rows)} of {len(idx)} positions), senses across")
    grid(100 * alpha[rows], shown)
    print(f"\nparts of the {what}, in tenths")
    grid(10 * parts[rows], shown)
    return f"{what}: {parts.sum():+.2f}", parts, names


# ---- pictures and the page


def draw_bars(file, title, panels):
    """Draw a panel of bars for each (name, [(token, score)])."""
    across = min(4, len(panels))
    down, n = -(-len(panels) // across), len(panels[0][1])
    size = 3 * across, down * (0.5 + 0.2 * n)
    figure, axes = pyplot().subplots(down, across, figsize=size, squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, bars) in zip(axes.flat, panels):
        tokens, scores = zip(*bars[::-1])
        colors = ["#1f6fb4" if score > 0 else "#c44e52" for score in scores]
        axis.barh(range(n), scores, color=colors, height=0.7)
        axis.set_yticks(range(n), [token[:18] for token in tokens])
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
    save(figure, file, title)


def draw_parts(file, title, parts, names):
    """Draw parts (T,K) of a logit as a heat map: senses over the tokens read."""
    values = parts.T.cpu().numpy()
    size = max(6, 0.42 * len(names) + 2), 1.6 + 0.26 * len(values)
    figure, axes = pyplot().subplots(figsize=size)
    most = abs(values).max()
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set(xticks=range(len(names)), yticks=range(len(values)), ylabel="sense")
    axes.set_xticklabels(names, rotation=60, ha="right", rotation_mode="anchor")
    figure.colorbar(image, label="part of the logit")
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
    figure.suptitle(title, fontweight="bold")
    # matplotlib refuses to draw 2**16 pixels in a row
    dpi = min(150, 2**15 / max(figure.get_size_inches()))
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format=Path(path).suffix[1:])


def page(model, tokenizer, title, words, text, n, limit=5_000_000):
    """The page of report.html: what words say, and the attribution of a text at each position.

    Words: those asked for, then all tokens in the order in which a BPE learned them, so frequent ones
    come first, until the page has `limit` bytes.
    """
    tokens = [tokenizer.decode([i]) for i in range(model.config.vocab_size)]
    names = [token_text(tokenizer, i) for i in range(len(tokens))]
    data = {"title": title, "tokens": names, "words": {}, "asked": words, "text": None}
    if text:
        idx = text_ids(model, tokenizer, text, min(64, model.config.block_size))  # (T,)
        steps = []
        for i, p in enumerate(model(idx[None])[0][0].softmax(-1), 1):  # p (V,)
            ids = p.topk(min(n, len(p))).indices.tolist()
            if i < len(idx) and idx[i].item() not in ids:
                ids.append(idx[i].item())
            alpha, parts = attribution(model, idx[:i], model.wte.weight[ids])  # (i,K), (n,i,K)
            step = {"ids": ids, "p": rounded(p[ids], 4)}
            step |= {"alpha": rounded(alpha, 3), "parts": rounded(parts, 2)}
            steps.append(step)
        data["text"] = {"ids": idx.tolist(), "steps": steps}
    frequent = [f'"{token}"' for token in tokens if token.strip(" ").isalpha()]
    size = len(json.dumps(data))
    for word in dict.fromkeys([*words, *frequent]):
        high, low = says(model, word_senses(model, tokenizer, word), n)  # (K,n) each
        entry = [high.indices.tolist(), rounded(high.values, 1), low.indices[:, :3].tolist()]
        size += len(json.dumps({word: entry}, separators=(",", ":")))
        if size > limit:
            break
        data["words"][word] = entry
    # HTML reads the data first: without a < nothing in it can end the script or open another
    data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return read_text(TEMPLATE).replace("/*DATA*/null", data)


def rounded(tensor, digits):
    """A tensor as lists of rounded numbers."""
    return tensor.double().cpu().numpy().round(digits).tolist()


@torch.no_grad()
def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    words, alike = split_words(s.word), split_words(s.similar)
    if not s.html and sum(map(bool, (words, alike, s.text, s.roles))) != 1:
        raise UserError("give one of --word=..., --similar=..., --text=..., --roles; or --html=...")
    if s.plot and (s.roles or s.html or Path(s.plot).suffix not in (".png", ".svg", ".pdf")):
        raise UserError(f"plot={s.plot!r} draws --word, --similar or --text as .png, .svg or .pdf")
    r = open_run(s.run, s.device, s.edits, s.edit)
    model, tokenizer = r.model, r.tokenizer
    K, V = model.config.n_sense, model.config.vocab_size
    senses = range(K) if s.sense is None else [s.sense]
    if senses[0] not in range(K):
        raise UserError(f"sense={s.sense}: expected 0 to {K - 1}, as this run has {K} senses")
    top = min(s.top, V)
    with_edits = f" with {summary(r.edits)}" if r.edits else ""
    if s.html:
        text = page(model, tokenizer, f"{r.path}{with_edits}", words + alike, s.text, min(8, V))
        write_text(s.html, text)
        print(f"{s.html}: {Path(s.html).stat().st_size / 1e6:.1f} MB, open it in a browser")
    elif s.roles:
        show_roles(model, tokenizer, top)
    elif s.text:
        title, *shown = show_text(model, tokenizer, s.text, s.target, s.against, top)
        if s.plot:
            draw_parts(s.plot, title + with_edits, *shown)
    else:
        if words:
            title = f"What the senses of {', '.join(words)} say"
            panels = show_words(model, tokenizer, words, senses, top)
        else:
            title = f"Tokens nearest to {', '.join(alike)}"
            panels = []
            for word in alike:
                panels += show_similar(model, tokenizer, word, senses, top)
        if s.plot:
            draw_bars(s.plot, title + with_edits, panels)


if __name__ == "__main__":
    run(main)
