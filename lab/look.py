"""
Look into a Backpack: what senses say, which words have similar senses, why it predicts a token.

$ python -m lab.look --word=nurse,river                  what each sense says, high and low
$ python -m lab.look --word=nurse,river,king --sense=3   one sense of several words, or some: 3,5
$ python -m lab.look --roles                             what each sense does, over all words
$ python -m lab.look --similar=river                     nearest words, by sense and overall
$ python -m lab.look --who=Canada,Texas                  which senses of which words say a word most
$ python -m lab.look --text="The nurse said that" --target=he --against=she
$ python -m lab.look --word=nurse --plot=nurse.svg       draws any of these views
$ python -m lab.look --text="The nurse said" --html=page.html   all this and edits, in a browser

This is the newest run in out/ unless --run=FOLDER says otherwise. A word is looked up with a space
before it; one of several tokens has the mean of their senses (paper, section 5.2); "word" in double
quotes is taken as it is. In print, a dot stands for a space. The number beside a sense says how alike its
ten highest tokens are (see coherence in lab/senses.py): the most readable senses come first.
"""

import re
from dataclasses import dataclass

import torch

from configurator import check, configure, run
from lab.draw import draw_bars, draw_stack, expect_picture
from lab.edits import summary, unreached
from lab.files import expect_place
from lab.page import write_page
from lab.run import open_run
from lab.senses import (
    add_up,
    all_senses,
    attribution,
    coherence,
    loudest,
    readable_tokens,
    says,
    similarity,
    text_ids,
    top_tokens,
    word_senses,
)
from lab.words import quoted_hint, token_string, token_text, word_forms, word_id, word_ids


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    word: str = ""  # words, separated by commas: what their senses say
    sense: str = ""  # with word or similar: these senses only, such as 4 or 4,10,12
    similar: str = ""  # words, separated by commas: which tokens have senses like theirs
    who: str = ""  # words, separated by commas: the senses of all words that raise them most
    roles: bool = False  # what each sense does, whatever the word
    text: str = ""  # why does the model continue it as it does?
    target: str | None = None  # with text: a token that may come next; None: the likeliest
    against: str | None = None  # with text: another token, to see why the first is likelier
    top: int = 6  # tokens, or parts, to show
    pieces: bool = False  # also show tokens that are parts of words or no text
    edits: str | None = None  # a JSON file of edits (lab.edit): look at the edited model
    edit: str = ""  # more: "scale river 4 0; swap Denver: Colorado -> Texas; topic sports 2"
    plot: str | None = None  # draw the view into this .png, .svg or .pdf (needs matplotlib)
    html: str | None = None  # write a page: the words asked for, frequent ones, and the text
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N


def split_words(text):
    """Words separated by commas; a comma in double quotes separates nothing."""
    return [word.strip() for word in re.findall(r'"[^"]+"|[^\s,][^,]*', text)]


def sense_numbers(text, K):
    """The senses that --sense names, such as [3, 5]; [] if it names none. UserError: one is not there."""
    numbers = []
    for part in split_words(text):
        is_sense = part.isdecimal() and int(part) < K
        check(is_sense, f"sense={text!r}: found {part!r}, expected 0 to {K - 1} of {K} senses")
        numbers.append(int(part))
    return numbers


def short(text, most):
    """A text of at most so many characters, with an ellipsis in place of what is cut off."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def named(r, values, ids):
    """The values and ids (n,) of topk as [(token, value)]; long tokens are cut."""
    return [(short(token_text(r.tokenizer, i), 20), v) for v, i in zip(values.tolist(), ids.tolist())]


def fill(pairs, digits=1, indent=12, width=80):
    """'token score' of each pair, on as many lines of this width as they need."""
    lines = [""]
    for token, score in pairs:
        piece = f"  {token} {score:.{digits}f}"
        if indent + len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return ("\n" + " " * indent).join(lines)


# -----------------------------------------------------------------------------
# views: each prints, and returns the panels of a picture, [(title, [(token, score)])]


def show_words(r, words, senses, n, shown):
    """The highest (+) and lowest (-) tokens of the senses of words.

    senses: the numbers of those to show; []: all, the most readable first.
    """
    panels = []
    n_drawn = 6 if len(words) == 1 else 3  # of a word's senses, as many as a picture bears
    for word in words:
        pieces = [token_text(r.tokenizer, i) for i in word_ids(r.tokenizer, word)]
        heading = " ".join(pieces)
        if len(pieces) > 1:
            heading += f": the mean of {len(pieces)} tokens"
            hint = quoted_hint(r.tokenizer, word)
            if hint:
                heading += f"; {hint}"
        print(heading)
        C = word_senses(r.model, r.tokenizer, word)  # (K,D)
        high, low = says(r.model, C, max(n, 10), shown)  # (K,n or 10) each
        alike = coherence(r.model, r.tokenizer, high.indices[:, :10])  # (K,)
        order = senses or alike.argsort(descending=True).tolist()
        drawn = senses or order[:n_drawn]
        for l in order:
            highest = named(r, high.values[l, :n], high.indices[l, :n])
            lowest = named(r, low.values[l, :n], low.indices[l, :n])
            print(f"{l:3}  {alike[l]:.2f}  +{fill(highest)}")
            print(f"           -{fill(lowest)}")
            if l in drawn:
                panels.append((f"{word}, sense {l}", highest))
    return panels


def show_side_by_side(r, words, sense, n, shown):
    """The highest (+) and lowest (-) tokens of one sense of several words."""
    high = []  # of each word, [(token, score)]
    low = []
    for word in words:
        C = word_senses(r.model, r.tokenizer, word)[sense]  # (D,)
        highest, lowest = says(r.model, C, n, shown)  # (n,) each
        high.append(named(r, *highest))
        low.append(named(r, *lowest))
    print(f"sense {sense}: highest tokens, then the lowest")
    at_once = min(len(words), 4)  # as many as fit on a line
    width = 76 // at_once
    for first in range(0, len(words), at_once):
        part = slice(first, first + at_once)
        print("  " + "".join(short(word, width - 2).ljust(width) for word in words[part]))
        for sign, columns in (("+", high[part]), ("-", low[part])):
            for row in zip(*columns):
                cells = [f"{short(token, width - 7)} {score:.1f}".ljust(width) for token, score in row]
                print(f"{sign} " + "".join(cells))
    return [(f"{word}, sense {sense}", column) for word, column in zip(words, high)]


def show_similar(r, words, senses, n, shown):
    """The tokens nearest to each word by each sense, by the mean of all cosines and by the least."""
    panels = []
    for word in words:
        cosines = similarity(r.model, word_senses(r.model, r.tokenizer, word))  # (V,K)
        others = shown.clone()
        others[word_ids(r.tokenizer, word)] = False
        measures = {f"sense {l}": cosines[:, l] for l in senses or range(cosines.size(1))}
        if len(senses) != 1:
            measures["all (mean)"] = cosines.mean(1)
            measures["least"] = cosines.amin(1)
        print(word)
        for name, measure in measures.items():
            nearest = named(r, *top_tokens(measure, n, others))
            print(f"{name:>11}{fill(nearest, 2)}")
            panels.append((f"{word}, {name}", nearest))
    return panels


def show_who(r, words, n, shown):
    """The n senses of all tokens that raise each word most."""
    e = r.model.wte.weight[[word_id(r.tokenizer, word) for word in words]]  # (words,D)
    scores = torch.cat([C @ e.T for C in all_senses(r.model)])  # (V,K,words)
    K = scores.size(1)
    panels = []
    for i, word in enumerate(words):
        values, places = top_tokens(scores[..., i].flatten(), n, shown.repeat_interleave(K))  # (n,) each
        bars = []
        if len(words) > 1:
            print(word)
        for score, place in zip(values.tolist(), places.tolist()):
            token, l = divmod(place, K)
            name = f"{short(token_text(r.tokenizer, token), 20)}, sense {l}"
            print(f"{score:6.1f}  {name}")
            bars.append((name, score))
        panels.append((f"who says {word}", bars))
    return panels


def show_roles(r, n, shown, most=1000):
    """What a sense does whatever the word, over the words that a BPE learned first: the frequent ones."""
    ids = range(r.model.config.vocab_size)
    words = [i for i in ids if re.fullmatch(" [a-z]{4,}", token_string(r.tokenizer, i))]
    check(words, "--roles wants words of four letters or more, and no token here is one")
    idx = torch.tensor(words[:most], device=r.device)  # (N,)
    parts = []
    for part in idx.split(64):
        high, _ = says(r.model, r.model.senses(part), 10, shown)
        parts.append(high.indices)  # (64,K,10)
    top = torch.cat(parts)  # (N,K,10)
    has_itself = (top == idx[:, None, None]).any(2)  # (N,K)
    own = has_itself.float().mean(0)  # (K,)
    print(f"{len(idx)} words: how many have themselves among a sense's ten highest tokens,")
    print("and which tokens are most often among these, in % of the words")
    panels = []
    for l in range(top.size(1)):
        tokens, count = top[:, l].unique(return_counts=True)
        order = count.argsort(descending=True)[:n]
        often = named(r, 100 * count[order] / len(idx), tokens[order])
        print(f"{l:3} {own[l]:6.0%}  {fill(often, 0)}")
        panels.append((f"sense {l}", often))
    return panels


# -----------------------------------------------------------------------------
# the view of a text


def likeliest_form(r, p, word):
    """The token of a word; of a Name's two, with a space before it and without, the likelier: p (V,)."""
    return max(word_forms(r.tokenizer, word), key=lambda token: p[token].item())


def show_text(r, text, target, against, n, shown):
    """What comes next, the largest parts of a logit or of a difference, and all weights and parts.

    Returns what draw_stack needs: a title, the parts (T,K), the tokens, what their parts are called, and
    what they add up to.
    """
    idx = text_ids(r, text, r.model.config.block_size)  # (T,)
    logits = r.model(idx[None])[0][0, -1]  # (V,)
    p = logits.softmax(-1)  # (V,)
    y = likeliest_form(r, p, target) if target else p.argmax().item()
    what = f"logit of {token_text(r.tokenizer, y)}"
    value = logits[y]
    direction = r.model.wte.weight[y]  # (D,)
    if against:
        z = likeliest_form(r, p, against)
        what += f" less that of {token_text(r.tokenizer, z)}"
        value = value - logits[z]
        direction = direction - r.model.wte.weight[z]
    alpha, parts = attribution(r.model, idx, direction)  # (T,K) each

    tokens = [token_text(r.tokenizer, i) for i in idx.tolist()]
    print("next, %:" + fill(named(r, *top_tokens(100 * p, n)), indent=8))
    print(f"\n{what}: {value:+.3f}")
    print_largest(tokens, alpha, parts, value, n)
    # of a long text, the tokens that matter most
    of_tokens = parts.abs().sum(1)  # (T,)
    rows = of_tokens.topk(min(30, len(idx))).indices.sort().values
    names = [tokens[j] for j in rows]
    print(f"\nweights in %: tokens down ({len(rows)} of {len(idx)} positions), senses across")
    print_grid(100 * alpha[rows], names)
    print(f"\nparts of the {what}, in tenths")
    print_grid(10 * parts[rows], names)
    said = {}
    for j, l, ids in loudest(r.model, idx, parts, 12, shown):
        said[j, l] = " ".join(token_string(r.tokenizer, i).strip() for i in ids)
    ending = text if len(text) <= 60 else "\u2026" + text[-59:]
    return f"{ending}  \u2192  {what}", parts, tokens, said, what


def print_largest(tokens, alpha, parts, value, n):
    """The n largest parts for, and the n largest against, what the model says: alpha, parts (T,K).

    It says whether the parts add up to value, the model's own.
    """
    if add_up(parts, value):
        print(f"exactly the sum of {parts.numel()} parts; the largest for and against it:")
    else:
        fork = "attribution in lab/senses.py does not know all of this model"
        print(f"NOT the sum of these {parts.numel()} parts, {parts.sum():+.3f}: {fork}")
    order = parts.flatten().argsort(descending=True).tolist()
    strongest_against = order[n:][-n:]
    for i in order[:n] + strongest_against[::-1]:
        j, l = divmod(i, parts.size(1))
        place = f"sense {l:<3} of {tokens[j]} (position {j})"
        print(f"  {parts[j, l]:+8.3f}  {place}, weight {alpha[j, l]:.3f}")


def print_grid(numbers, names):
    """Print numbers (T,K) as integers, zeros as blanks: a row for each name, 16 columns at a time."""
    for senses in torch.arange(numbers.size(1)).split(16):
        heads = [f"{l:4}" for l in senses.tolist()]
        print(" " * 15 + "".join(heads))
        rows = numbers[:, senses].round().int().tolist()
        for name, row in zip(names, rows):
            cells = [f"{value or '':>4}" for value in row]
            print(f"{short(name, 14):>14} " + "".join(cells))


@torch.no_grad()
def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    words = split_words(s.word)
    alike = split_words(s.similar)
    said = split_words(s.who)
    asked = [words, alike, said, s.text, s.roles]
    views = "--word=..., --similar=..., --who=..., --text=..., --roles; or --html=..."
    n_views = sum(bool(view) for view in asked)
    check(n_views == 1 or s.html, f"give one of {views}")
    check(not (s.html and s.plot), "--plot draws a view, --html writes a page: give one of them")
    check(s.text or not (s.target or s.against), "--target and --against need --text=...")
    check(words or alike or not s.sense, "--sense needs --word=... or --similar=...")
    if s.plot:
        expect_picture(s.plot)
    if s.html:
        expect_place(s.html, [".html", ".htm"])
    r = open_run(s.run, s.device, s.edits, s.edit)
    with_edits = f" with {summary(r.edits)}" if r.edits else ""
    for line in unreached(r.tokenizer, r.edits, s.text):
        print(line)
    if s.html:
        write_page(s.html, r, words, s.text)
        return
    shown = torch.ones(r.model.config.vocab_size, dtype=torch.bool)
    if not s.pieces:
        shown = readable_tokens(r.tokenizer, len(shown))
    shown = shown.to(r.device)
    if s.text:
        title, *picture = show_text(r, s.text, s.target, s.against, s.top, shown)
        if s.plot:
            draw_stack(s.plot, title + with_edits, *picture)
        return

    senses = sense_numbers(s.sense, r.model.config.n_sense)
    if words:
        title = f"What the senses of {', '.join(words)} say: logits at weight 1"
        if len(words) > 1 and len(senses) == 1:
            panels = show_side_by_side(r, words, senses[0], s.top, shown)
        else:
            panels = show_words(r, words, senses, s.top, shown)
    elif alike:
        title = f"Tokens nearest to {', '.join(alike)}, by cosine"
        panels = show_similar(r, alike, senses, s.top, shown)
    elif said:
        title = f"Logit of {', '.join(said)}"
        panels = show_who(r, said, s.top, shown)
    else:
        title = "Tokens that are among a sense's ten highest, in % of the words"
        panels = show_roles(r, s.top, shown)
    if s.plot:
        draw_bars(s.plot, title + with_edits, panels)


if __name__ == "__main__":
    run(main)
