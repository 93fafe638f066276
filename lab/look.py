"""Look into a Backpack: what the senses of a word say, which words are near, and why it predicted a token.

    python senses.py --out_dir=out/simplewiki --word=nurse,river                 what each sense says, high and low
    python senses.py --out_dir=out/simplewiki --word=nurse,river,king --sense=3  one sense of several words
    python senses.py --out_dir=out/simplewiki --roles=True                       what each sense does, over all words
    python senses.py --out_dir=out/simplewiki --similar=river                    nearest words, by sense and over all
    python senses.py --out_dir=out/simplewiki --text="The nurse said that" --target=he --against=she
    python senses.py --out_dir=out/simplewiki --word=nurse --plot=nurse.svg      or draw any of these; or --html=FILE

A word is looked up with a space before it, and one of several tokens has the mean of their senses (paper, section 5.2);
"word" in double quotes is just what they enclose. In print a dot stands for a space.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from checkpoints import CheckpointError, load_checkpoint
from configurator import UserError, configure, run
from devices import pick_device
from edits import make_edits, parse, read_edits, summary
from model import Backpack
from pictures import draw
from tokenizer import load_tokenizer, shown, word_id, word_ids


@dataclass
class Settings:
    out_dir: str = "out/shakespeare_char"  # the run: a folder of train.py, or a checkpoint file
    word: str = ""                   # words, with commas between them: what their senses say
    sense: int | None = None         # with word or similar: this sense only
    similar: str = ""                # words, with commas between them: which tokens have senses like theirs
    roles: bool = False              # what each sense does, whatever the word
    text: str = ""                   # why does the model go on as it does?
    target: str | None = None        # with text: a token that may come next; None: the likeliest
    against: str | None = None       # ... and one to compare it with
    top: int = 6                     # tokens, or parts, to show
    edits: str | None = None         # a JSON file of edits of senses (edits.py): look at the edited model
    edit: str = ""                   # more of them: "scale nurse 10 0; swap MacBook: Apple -> HP; topic sports 2"
    plot: str | None = None          # draw the view into this .png, .svg or .pdf (needs matplotlib)
    html: str | None = None          # write a page of its own: words (those asked for, then frequent ones) and the text
    device: str = "auto"             # auto, cpu, mps, cuda, cuda:N


def word_senses(model, tokenizer, word):
    """The senses of a word (K,D): of several tokens, their mean (section 5.2)."""
    return model.senses(torch.tensor(word_ids(tokenizer, word), device=model.wte.weight.device)).mean(0)


def says(model, C, n):
    """What senses C (...,D) say (section 5.1, table 19): the highest tokens, scores and ids (...,n), and the lowest."""
    logits = model._logits(C)                                                                      # (...,V)
    return logits.topk(n), logits.topk(n, largest=False)


def similarity(model, C):
    """cos(C(x)_l, C_l) of every token's senses and C (K,D): (V,K) (section 5.2)."""
    ids = torch.arange(model.config.vocab_size, device=C.device)
    return torch.cat([F.cosine_similarity(model.senses(part), C, dim=-1) for part in ids.split(1024)])


def attribution(model, idx, direction):
    """Why the token after idx (T,) gets its logit: weights and parts, both (T,K), of sense l of x_j in

        direction . o = sum_j sum_l alpha[l,j] (direction . C(x_j)_l)

    which is exact. direction (D,): E[y] for the logit of y, E[y] - E[z] for what it is ahead of that of z; several
    (...,D) give parts (...,T,K).
    """
    alpha = model.contextualization(idx[None])[0, :, -1].T                                         # (T,K)
    return alpha, alpha * torch.einsum("tkd,...d->...tk", model.senses(idx), direction)


def grid(numbers, names):
    """Lines of a table: numbers (T,K) as integers, the small ones left out; 80 columns hold a name and 16 of them."""
    for first in range(0, numbers.size(1), 16):
        part = numbers[:, first : first + 16].round().int().tolist()
        yield " " * 15 + "".join(f"{first + l:4}" for l in range(len(part[0])))
        for name, row in zip(names, part):
            yield f"{name[:14]:>14} " + "".join(f"{n or '':>4}" for n in row)


def fill(pairs, digits=1):
    """'token score' of each pair, as many as a line of 80 columns has room for."""
    line = ""
    for name, score in pairs:
        if len(line) + len(piece := f"  {name[:20]} {score:.{digits}f}") > 72:
            break
        line += piece
    return line


def view_words(model, tokenizer, words, senses, n):
    """Lines: the highest (+) and lowest (-) tokens of senses; of one sense, several words side by side."""
    found = {word: says(model, word_senses(model, tokenizer, word), n) for word in words}
    for word in words:
        ids = word_ids(tokenizer, word)
        yield " ".join(shown(tokenizer, i) for i in ids) + ("" if len(ids) == 1 else f": the mean of {len(ids)} tokens")
        for l in senses if len(senses) > 1 or len(words) == 1 else ():
            for sign, (values, tokens) in zip(("+", "-"), found[word]):
                names = [shown(tokenizer, i) for i in tokens[l].tolist()]
                yield f"{l if sign == '+' else '':>3} {sign}" + fill(zip(names, values[l].tolist()))
    if len(senses) == 1 and len(words) > 1:
        width = max(10, 76 // len(words))
        titles = "".join(f"{word[:width - 2]:{width}}" for word in words)
        yield f"\nsense {senses[0]}: highest tokens, then the lowest\n  {titles}"
        for sign, part in zip("+-", (0, 1)):
            for i in range(n):
                row = [[numbers[senses[0], i].item() for numbers in found[word][part]] for word in words]
                yield f"{sign} " + "".join(f"{shown(tokenizer, t)[:width - 7]} {v:.1f}".ljust(width) for v, t in row)


def nearest(model, tokenizer, word, senses, n):
    """[(name, [(token, cosine)])]: the tokens nearest to a word by each sense, and by the mean of all cosines."""
    cosines = similarity(model, word_senses(model, tokenizer, word))                               # (V,K)
    cosines[word_ids(tokenizer, word)] = -1.0
    columns = [(f"sense {l}", cosines[:, l]) for l in senses]
    columns += [("all (mean)", cosines.mean(1)), ("least", cosines.amin(1))] if len(senses) > 1 else []
    return [(name, [(shown(tokenizer, i), v) for v, i in zip(*(x.tolist() for x in column.topk(n)))])
            for name, column in columns]


def explain(model, tokenizer, text, target, against):
    """(ids (T,), target id, id against or None, weights (T,K), parts (T,K), log-probabilities (V,)) of a text."""
    idx = torch.tensor(tokenizer.encode(text), device=model.wte.weight.device)
    if not 0 < len(idx) <= model.config.block_size:
        raise UserError(f"--text has {len(idx)} tokens: expected 1 to block_size={model.config.block_size}")
    log_p = model(idx[None])[0][0, -1].log_softmax(-1)                                             # (V,)
    y = word_id(tokenizer, target) if target else log_p.argmax().item()
    z = word_id(tokenizer, against) if against else None
    E = model.wte.weight
    return idx, y, z, *attribution(model, idx, E[y] - (E[z] if z is not None else 0)), log_p


def view_text(model, tokenizer, found, n):
    """Lines: what comes next, the largest parts of a logit or difference, and all weights and parts as tables."""
    idx, y, z, alpha, parts, log_p = found
    names, (p, top) = [shown(tokenizer, i) for i in idx.tolist()], log_p.exp().topk(n)
    yield "next, %:" + fill((shown(tokenizer, i), v) for v, i in zip((100 * p).tolist(), top.tolist()))
    what = f"logit of {shown(tokenizer, y)}" + (f" less that of {shown(tokenizer, z)}" if z is not None else "")
    yield f"\n{what}: {parts.sum():+.3f}\nexactly the sum of {parts.numel()} parts; the largest for and against it:"
    order = parts.flatten().sort(descending=True).indices.tolist()
    for half in (order[:n], order[-n:][::-1]):
        for j, l in (divmod(i, parts.size(1)) for i in half):
            yield f"  {parts[j, l]:+8.3f}  sense {l:<3} of {names[j]} (position {j}), weight {alpha[j, l]:.3f}"
    rows = parts.abs().sum(1).topk(min(30, len(idx))).indices.sort().values.tolist()
    yield f"\nweights in %: who is looked at through which sense ({len(rows)} of {len(idx)} positions)"
    yield from grid(100 * alpha[rows], [names[j] for j in rows])
    yield f"\nparts of the {what}, in tenths"
    yield from grid(10 * parts[rows], [names[j] for j in rows])


def view_roles(model, tokenizer, n, most=1000):
    """Lines: what a sense does whatever the word, over the words that a BPE learned first, which are frequent."""
    ids = [i for i in range(model.config.vocab_size) if re.fullmatch(" ?[a-z]{4,}", tokenizer.decode([i]))][:most]
    idx = torch.tensor(ids or [0], device=model.wte.weight.device)                                 # (N,)
    top = torch.cat([says(model, model.senses(part), 10)[0].indices for part in idx.split(64)])    # (N,K,10)
    own = (top == idx[:, None, None]).any(-1).float().mean(0)                                      # (K,)
    yield f"of {len(idx)} words, in %: those whose ten highest tokens have the word itself; and tokens that most have"
    for l in range(top.size(1)):
        found, count = top[:, l].unique(return_counts=True)
        order = count.argsort(descending=True)[:n]
        shares = zip(found[order].tolist(), (100 * count[order] / len(idx)).tolist())
        yield f"{l:3} {own[l]:6.0%}  " + "".join(f"  {shown(tokenizer, i)} {share:.0f}" for i, share in shares)


def page(model, tokenizer, title, words, text, n, limit=5_000_000):
    """The page of report.html: the attribution of a text, position by position, and what words say, those asked for and
    then all tokens in the order in which a BPE learned them, frequent ones first, until it has `limit` bytes."""
    ids = range(model.config.vocab_size)
    frequent = [f'"{token}"' for token in map(tokenizer.decode, ([i] for i in ids)) if token.strip(" ").isalpha()]
    data = {"title": title, "tokens": [shown(tokenizer, i) for i in ids], "words": {}, "asked": words, "text": None}
    if text:
        idx, *_ = explain(model, tokenizer, text, None, None)
        if len(idx) > 64:
            raise UserError(f"--text has {len(idx)} tokens: a page has room for 64")
        steps = []
        for i, p in enumerate(model(idx[None])[0][0].softmax(-1), 1):                              # (V,)
            some = p.topk(min(n, len(p))).indices.tolist()
            some += [idx[i].item()] if i < len(idx) and idx[i].item() not in some else []
            alpha, parts = attribution(model, idx[:i], model.wte.weight[some])                     # (i,K), (n,i,K)
            steps.append({"ids": some, "p": [round(v, 4) for v in p[some].tolist()], "alpha": _rounded(alpha, 3),
                          "parts": [_rounded(part, 2) for part in parts]})
        data["text"] = {"ids": idx.tolist(), "steps": steps}
    size = len(json.dumps(data))
    for word in dict.fromkeys([*words, *frequent]):
        (high, top), (low, bottom) = says(model, word_senses(model, tokenizer, word), n)           # (K,n) each
        entry = [top.tolist(), _rounded(high, 1), bottom[:, :3].tolist()]
        size += len(json.dumps({word: entry}, separators=(",", ":")))
        if size > limit:
            break
        data["words"][word] = entry
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return (Path(__file__).parent / "report.html").read_text().replace("/*DATA*/null", text)


def _rounded(tensor, digits):
    return [[round(v, digits) for v in row] for row in tensor.tolist()]


@torch.no_grad()
def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    device, ckpt = pick_device(s.device), load_checkpoint(s.out_dir)
    model, tokenizer = Backpack.from_checkpoint(ckpt, device), load_tokenizer(ckpt["meta"]["tokenizer"])
    K, listed = model.config.n_sense, read_edits(s.edits) + parse(s.edit)
    if not K:
        raise UserError(f"{s.out_dir} is a plain Transformer (n_sense=0): it has no senses")
    for key, least, most in (("sense", 0, K - 1), ("top", 1, model.config.vocab_size)):
        if getattr(s, key) is not None and not least <= getattr(s, key) <= most:
            raise UserError(f"{key}={getattr(s, key)} must be from {least} to {most}")
    words, alike = ([m.strip() for m in re.findall(r'"[^"]+"|[^,]+', text)] for text in (s.word, s.similar))
    if sum(map(bool, (words, alike, s.text, s.roles))) != 1 and not s.html:
        raise UserError("give one of --word=..., --similar=..., --text=..., --roles=True, or --html=FILE with any")
    model.edits, senses = make_edits(model, tokenizer, listed), range(K) if s.sense is None else [s.sense]
    with_edits = f" with {summary(listed)}" if listed else ""
    panels, heat, title = [], None, ""
    if s.html:
        Path(s.html).write_text(page(model, tokenizer, s.out_dir + with_edits, words + alike, s.text, 8))
        return print(f"{s.html}: {Path(s.html).stat().st_size / 1e6:.1f} MB, open it in a browser")
    if s.roles:
        print(*view_roles(model, tokenizer, s.top), sep="\n")
    if words:
        title = "What the senses say of " + ", ".join(words) + with_edits
        print(*view_words(model, tokenizer, words, senses, s.top), sep="\n")
        for word in words if s.plot else ():
            scores, ids = (part.tolist() for part in says(model, word_senses(model, tokenizer, word), s.top)[0])
            panels += [(f"{word}, sense {l}", [(shown(tokenizer, i), v) for v, i in zip(scores[l], ids[l])])
                       for l in senses]
    for word in alike:
        found = nearest(model, tokenizer, word, senses, s.top)
        print(word, *(f"{name:>11}{fill(pairs, 2)}" for name, pairs in found), sep="\n")
        title = f"Tokens nearest to {', '.join(alike)}{with_edits}"
        panels += [(f"{word}, {name}", pairs) for name, pairs in found]
    if s.text:
        found = explain(model, tokenizer, s.text, s.target, s.against)
        print(*view_text(model, tokenizer, found, s.top), sep="\n")
        idx, y, z, _, parts, _ = found
        heat = parts.T.cpu().numpy(), [shown(tokenizer, i) for i in idx.tolist()]
        title = f"Logit of {shown(tokenizer, y)}" + (f" less that of {shown(tokenizer, z)}" if z is not None else "")
        title += f": {parts.sum():+.2f}{with_edits}"
    if s.plot:
        draw(s.plot, title, panels, heat)


if __name__ == "__main__":
    run(main, CheckpointError)
