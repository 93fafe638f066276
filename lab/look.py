"""Look into a Backpack: what senses say, which words have similar senses, why it predicts a token.

    python -m lab.look --word=nurse,river                  what each sense says, high and low
    python -m lab.look --word=nurse,river,king --sense=3   one sense of several words, or some: 3,5
    python -m lab.look --roles                             what each sense does, over all words
    python -m lab.look --similar=river                     nearest words, by sense and overall
    python -m lab.look --who=Canada                        which senses of which words say a word most
    python -m lab.look --text="The nurse said that" --target=he --against=she
    python -m lab.look --word=nurse --plot=nurse.svg       draws any of these views
    python -m lab.look --text="The nurse said" --html=page.html   all this and edits, in a browser

This is the newest run in out/ unless --run=FOLDER says otherwise. A word is looked up with a space
before it; one of several tokens has the mean of their senses (paper, section 5.2); "word" in double
quotes is taken as it is. In print, a dot stands for a space. The number beside a sense says how alike its
ten highest tokens are (see coherence): the most readable senses come first.
"""

import re
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from configurator import UserError, configure, run, short
from files import expect_place
from lab.draw import draw_bars, draw_parts, expect_picture
from lab.edit import summary
from sample import open_run
from tokenizer import token_text, word_forms, word_id, word_ids


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    word: str = ""  # words, separated by commas: what their senses say
    sense: str = ""  # with word or similar: these senses only, such as 4 or 4,10,12
    similar: str = ""  # words, separated by commas: which tokens have senses like theirs
    who: str = ""  # the senses of all words that raise this one most
    roles: bool = False  # what each sense does, whatever the word
    text: str = ""  # why does the model continue it as it does?
    target: str | None = None  # with text: a token that may come next; None: the likeliest
    against: str | None = None  # with text: another token, to see why the first is likelier
    top: int = 6  # [1, 1000] tokens, or parts, to show
    pieces: bool = False  # also show tokens that are parts of words or no text
    edits: str | None = None  # a JSON file of edits (lab/edit.py): look at the edited model
    edit: str = ""  # more: "scale river 4 0; swap Denver: Colorado -> Texas; topic sports 2"
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


def says(model, C, n, shown=None):
    """What senses C (...,D) say (section 5.1): topk, (...,n), of their highest and lowest logits.

    shown (V,): True for the tokens to choose from; None: all.
    """
    logits = model.logits(C)  # (...,V)
    shown = torch.ones(logits.size(-1), dtype=torch.bool) if shown is None else shown
    hide, n = ~shown.to(logits.device), min(n, int(shown.sum()))
    high, low = (logits.masked_fill(hide, sign * torch.inf) for sign in (-1, 1))
    return high.topk(n), low.topk(n, largest=False)


def whole_words(tokenizer, V):
    """(V,): True for tokens that a reader can place: words with a space before them, Names, signs.

    None for a vocabulary of characters, or without such tokens.
    """
    texts = [tokenizer.decode([i]) for i in range(V)]
    text = [t.isprintable() and "\ufffd" not in t and t.strip() != "" for t in texts]
    begins = [t[:1] == " " or t[:1].isupper() or not t[:1].isalnum() for t in texts]
    fine = [a and b for a, b in zip(text, begins)]
    return torch.tensor(fine) if tokenizer.end is not None and any(fine) else None


def directions(model):
    """E less the mean of its rows, these then of norm 1: (V,D). Their products tell how alike tokens are."""
    E = model.wte.weight[: model.config.vocab_size]
    return F.normalize(E - E.mean(0), dim=-1)


def coherence(model, tokenizer, top):
    """How alike the tokens are that each sense says, a measure of how readable it is: top (K,n) -> (K,).

    The mean product of two of their directions; those of fewer than three letters are unlike all others.
    """
    n = top.size(1)
    letters = [len(re.findall(r"[^\W\d_]", tokenizer.decode([i]))) for i in top.flatten().tolist()]
    counts = torch.tensor(letters, device=top.device).view_as(top) > 2  # (K,n)
    e = directions(model)[top] * counts[..., None]  # (K,n,D)
    return ((e @ e.mT).sum((1, 2)) - counts.sum(1)) / max(1, n * (n - 1))


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


def fill(pairs, digits=1, indent=12, width=80):
    """'token score' of each pair, on as many lines of this width as they need."""
    lines = [""]
    for token, score in pairs:
        piece = f"  {token[:20]} {score:.{digits}f}"
        if indent + len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return ("\n" + " " * indent).join(lines)


def show_words(model, tokenizer, words, senses, n, shown=None):
    """The highest (+) and lowest (-) tokens of senses; one sense of several words, side by side.

    senses: those to show; []: all, the most readable first.
    """
    panels, columns = [], {}
    side_by_side = len(senses) == 1 and len(words) > 1
    for word in words:
        pieces = [token_text(tokenizer, i) for i in word_ids(tokenizer, word)]
        C = word_senses(model, tokenizer, word)  # (K,D)
        high, low = says(model, C, max(n, 10), shown)  # (K,n or 10) each
        alike = coherence(model, tokenizer, high.indices[:, :10])  # (K,)
        order = senses or alike.argsort(descending=True).tolist()
        if not side_by_side:
            several = f": the mean of {len(pieces)} tokens" * (len(pieces) > 1)
            print(" ".join(pieces) + several)
        for rank, l in enumerate(order):
            highest = ranked(tokenizer, high.values[l, :n], high.indices[l, :n])
            lowest = ranked(tokenizer, low.values[l, :n], low.indices[l, :n])
            if senses or rank < (6 if len(words) == 1 else 3):  # as many as a picture bears
                panels.append((f"{word}, sense {l}", highest))
            columns[word] = {"+": highest, "-": lowest}
            if not side_by_side:
                print(f"{l:3}  {alike[l]:.2f}  +{fill(highest)}\n           -{fill(lowest)}")
    if side_by_side:
        width = max(10, 76 // len(words))
        print(f"sense {senses[0]}: highest tokens, then the lowest")
        print("  " + "".join(f"{word[: width - 2]:{width}}" for word in words))
        for sign in "+-":
            for row in zip(*(columns[word][sign] for word in words)):
                cells = [f"{token[: width - 7]} {score:.1f}" for token, score in row]
                print(f"{sign} " + "".join(f"{cell:{width}}" for cell in cells))
    return panels


def show_similar(model, tokenizer, words, senses, n, shown=None):
    """The tokens nearest to each word by each sense, by the mean of all cosines and by the least."""
    panels = []
    for word in words:
        cosines = similarity(model, word_senses(model, tokenizer, word))  # (V,K)
        cosines[word_ids(tokenizer, word)] = -torch.inf
        if shown is not None:
            cosines[~shown] = -torch.inf
        columns = {f"sense {l}": cosines[:, l] for l in senses or range(cosines.size(1))}
        if len(senses) != 1:
            columns |= {"all (mean)": cosines.mean(1), "least": cosines.amin(1)}
        print(word)
        for name, column in columns.items():
            nearest = ranked(tokenizer, *column.topk(min(n, int(column.isfinite().sum()))))
            print(f"{name:>11}{fill(nearest, 2)}")
            panels.append((f"{word}, {name}", nearest))
    return panels


def show_who(model, tokenizer, word, n, shown=None):
    """The n (token, sense) pairs of the vocabulary that raise a word most."""
    e = model.wte.weight[word_id(tokenizer, word)]  # (D,)
    ids = torch.arange(model.config.vocab_size, device=e.device)
    scores = torch.cat([model.senses(part) @ e for part in ids.split(1024)])  # (V,K)
    if shown is not None:
        scores[~shown] = -torch.inf
    top = scores.flatten().topk(min(n, int(scores.isfinite().sum())))
    pairs = [divmod(i, model.config.n_sense) for i in top.indices.tolist()]
    names = [f"{token_text(tokenizer, i)}, sense {l}" for i, l in pairs]
    bars = list(zip(names, top.values.tolist()))
    print("\n".join(f"{score:6.1f}  {name}" for name, score in bars))
    return [(f"who says {word}", bars)]


def show_roles(model, tokenizer, n, shown=None, most=1000):
    """What a sense does whatever the word, over the words a BPE learned first: the frequent ones."""
    ids = range(model.config.vocab_size)
    words = [i for i in ids if re.fullmatch(" [a-z]{4,}", tokenizer.decode([i]))]
    if not words:
        raise UserError("--roles wants words of four letters or more, and no token here is one")
    idx = torch.tensor(words[:most], device=model.wte.weight.device)  # (N,)
    tops = [says(model, model.senses(part), 10, shown)[0].indices for part in idx.split(64)]
    top, panels = torch.cat(tops), []  # (N,K,10)
    own = (top == idx[:, None, None]).any(-1).float().mean(0)  # (K,)
    print(f"{len(idx)} words: how many have themselves among a sense's ten highest tokens,")
    print("and which tokens are most often among these, in % of the words")
    for l in range(top.size(1)):
        tokens, count = top[:, l].unique(return_counts=True)
        order = count.argsort(descending=True)[:n]
        often = ranked(tokenizer, 100 * count[order] / len(idx), tokens[order])
        print(f"{l:3} {own[l]:6.0%}  {fill(often, 0)}")
        panels.append((f"sense {l}", often))
    return panels


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

    def likeliest(word):  # after a space, a Name is a token without one
        return max(word_forms(tokenizer, word), key=lambda i: p[i].item())

    y = likeliest(target) if target else p.argmax().item()
    direction, what = model.wte.weight[y], f"logit of {token_text(tokenizer, y)}"
    if against:
        z = likeliest(against)
        direction = direction - model.wte.weight[z]
        what += f" less that of {token_text(tokenizer, z)}"
    alpha, parts = attribution(model, idx, direction)  # (T,K), (T,K)

    names = [token_text(tokenizer, i) for i in idx.tolist()]
    print("next, %:" + fill(ranked(tokenizer, *(100 * p).topk(n)), indent=8))
    print(f"\n{what}: {parts.sum():+.3f}")
    print(f"exactly the sum of {parts.numel()} parts; the largest for and against it:")
    order = parts.flatten().sort(descending=True).indices.tolist()
    for i in order[:n] + order[max(n, len(order) - n) :][::-1]:
        j, l = divmod(i, parts.size(1))
        where = f"sense {l:<3} of {names[j]} (position {j}), weight {alpha[j, l]:.3f}"
        print(f"  {parts[j, l]:+8.3f}  {where}")
    rows = parts.abs().sum(1).topk(min(30, len(idx))).indices.sort().values.tolist()
    shown = [names[j] for j in rows]
    print(f"\nweights in %: tokens down ({len(rows)} of {len(idx)} positions), senses across")
    grid(100 * alpha[rows], shown)
    print(f"\nparts of the {what}, in tenths")
    grid(10 * parts[rows], shown)
    title = f"{text!r}\n{what}: {parts.sum():+.2f}"
    return title, parts, names, "difference" if against else "logit"


@torch.no_grad()
def main(argv):
    s, sources = configure(Settings, argv, __doc__)
    words, alike = split_words(s.word), split_words(s.similar)
    views = {"word": words, "similar": alike, "who": s.who, "text": s.text, "roles": s.roles}
    asked = [name for name, value in views.items() if value]
    if not s.html and len(asked) != 1:
        names = "--word=..., --similar=..., --who=..., --text=..., --roles; or --html=..."
        raise UserError(f"give one of {names}")
    here = {"word", "text", "html"} if s.html else {"target", "against", "plot", "top", *asked}
    here |= {"run", "edits", "edit", "device"}
    here |= set() if s.html or s.text else {"sense", "pieces"}
    for key in sources.keys() - here:
        view = "the page" if s.html else asked[0]
        raise UserError(f"{key} has no effect on {view}: leave it out")
    if s.plot:
        expect_picture(s.plot)
    if s.html:
        expect_place(s.html)
    r = open_run(s.run, s.device, s.edits, s.edit)
    model, tokenizer = r.model, r.tokenizer
    K, V = model.config.n_sense, model.config.vocab_size
    senses = [part.strip() for part in s.sense.split(",")] if s.sense else []
    for l in senses:
        if not l.isdecimal() or int(l) >= K:
            what = f"found {short(l)}, expected 0 to {K - 1} of {K} senses"
            raise UserError(f"sense={short(s.sense)}: {what}")
    senses = [int(l) for l in senses]
    shown = None if s.pieces else whole_words(tokenizer, V)  # (V,)
    with_edits = f" with {summary(r.edits)}" if r.edits else ""
    if s.html:
        from lab.page import write_page

        return write_page(s.html, r, words, s.text)
    if s.text:
        title, *parts = show_text(model, tokenizer, s.text, s.target, s.against, min(s.top, V))
        return draw_parts(s.plot, title + with_edits, *parts) if s.plot else None
    if s.who:
        title, panels = f"Logit of {s.who}", show_who(model, tokenizer, s.who, s.top, shown)
    elif s.roles:
        title = "Tokens that are among a sense's ten highest, in % of the words"
        panels = show_roles(model, tokenizer, s.top, shown)
    elif words:
        title = f"What the senses of {', '.join(words)} say: logits at weight 1"
        panels = show_words(model, tokenizer, words, senses, s.top, shown)
    else:
        title = f"Tokens nearest to {', '.join(alike)}, by cosine"
        panels = show_similar(model, tokenizer, alike, senses, s.top, shown)
    if s.plot:
        draw_bars(s.plot, title + with_edits, panels)


if __name__ == "__main__":
    run(main)
