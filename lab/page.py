"""
The page of `python -m lab.look --html=FILE`: the model itself, to look into and to edit in a browser.

It is page.html with data: the weights in half precision, the tokenizer, a finished first example, and the
guided minute of tour.json, if this model does what that says. The engine in page.html is the network written
a second time, so it has to prove itself: the page carries logits of three texts, and shows nothing that it
computed unless it computes these. A run whose page would have more than LIMIT bytes, or whose network or
tokenizer the engine doesn't know, gets a page of tables, report.html: of frequent words and one text.
"""

import base64
import copy
import json
import math
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from lab.change import next_p
from lab.control import MARGIN, STRENGTHS, EditedBackpack, quiet_inverse, sense_peaks
from lab.edits import make_edits, peaks_progress, summary
from lab.files import read_json, read_text, write_text
from lab.layouts import tensor_names
from lab.senses import (
    add_up,
    attribution,
    has_letters,
    loudest,
    readable_tokens,
    says,
    text_ids,
    word_senses,
)
from lab.words import token_string, token_text, word_ids
from tokenizer import byte_characters, keeps_marks

FOLDER = Path(__file__).parent
LIMIT = 14_000_000  # bytes of a page
TABLE_LIMIT = 5_000_000  # bytes of the words on a page of tables
TOO_LARGE = "the model is too large to be part of a page"
# the modules that the engine of page.html knows
KNOWN_CLASSES = {"Backpack", "Block", "SelfAttention", "MLP", "SenseNetwork", "Projection"}
KNOWN_CLASSES |= {"ModuleList", "Embedding", "Linear", "LayerNorm", "Dropout"}


def write_page(path, r, words, text):
    """Write the page of a run, of open_run, with its edits; words and a text to begin with."""
    write_text(path, make_page(r, words, text))
    print(f"wrote {path}, {Path(path).stat().st_size / 1e6:.1f} MB: open it in a browser")


@torch.no_grad()
def make_page(r, words=(), text=""):
    """The HTML that write_page writes."""
    why = why_tables(r)
    if why:
        return make_table_page(r, words, text, why)
    base = copy.deepcopy(r.base).half()  # the model that the page has
    weights = [p.cpu().numpy().ravel() for p in base.state_dict().values()]
    base.float()
    peaks = sense_peaks(base, peaks_progress).cpu().numpy()  # (V,K)
    html = read_text(FOLDER / "page.html")
    html = html.replace("/*WEIGHTS*/", packed(np.concatenate(weights)))
    html = html.replace("/*PEAKS*/", packed(peaks))
    inverse = quiet_inverse(base.wte.weight[: base.config.vocab_size])  # (D,D)
    html = html.replace("/*INVERSE*/", packed(inverse.cpu().contiguous().numpy()))
    html = with_data(html, page_data(r, base, words, text))
    if len(html.encode()) > LIMIT:
        return make_table_page(r, words, text, TOO_LARGE)
    return html


def why_tables(r):
    """Why a run gets a page of tables; "" if page.html can have the model in it."""
    config = r.base.config
    if 2 * r.base.num_params() > LIMIT:  # base64 adds a third, zlib takes less off
        return TOO_LARGE
    if r.tokenizer.spec["kind"] == "library":
        return "the page that runs a model doesn't know its tokenizer"
    if config.exact_gelu:
        return "the page that runs a model doesn't know its GELU, which is exact"
    known = {ours for ours, _, _ in tensor_names("backpack-gpt2", config.n_layer, config.bias)}
    classes = {type(module).__name__ for module in r.base.modules()}
    unknown = sorted(classes - KNOWN_CLASSES) + sorted(r.base.state_dict().keys() ^ known)
    if unknown:
        return f"the page that runs a model doesn't know all of this network: {', '.join(unknown[:5])}"
    return ""


def packed(array):
    """An array's bytes as base64 of their zlib stream; of 16-bit numbers first all low bytes."""
    data = array.view(np.uint8)
    if array.itemsize == 2:
        data = data.reshape(-1, 2).T
    return base64.b64encode(zlib.compress(data.tobytes(), 9)).decode()


def with_data(html, data):
    text = json.dumps(data, separators=(",", ":"))
    # HTML reads the data first: without a < nothing in it can end the script or open another
    return html.replace("/*DATA*/null", text.replace("<", "\\u003c"))


def bits(values):
    """True and False of each token as a string of 1 and 0."""
    return "".join("1" if value else "0" for value in values)


def rounded(tensor, digits):
    """A tensor as lists of rounded numbers."""
    return tensor.double().cpu().numpy().round(digits).tolist()


# -----------------------------------------------------------------------------
# the page with the model in it


def page_data(r, base, words, text):
    """What page.html has to know besides the weights, as JSON; base: the model with these weights."""
    config = r.base.config
    tour = read_json(FOLDER / "tour.json")
    if bears_out(r, tour):
        for part in (tour, tour["fails"]):  # the tokens whose probabilities the tour shows
            part["ids"] = [word_ids(r.tokenizer, part["edit"][key])[0] for key in ("from", "to")]
    else:
        tour = None
    if not text:
        text = tour["text"] if tour else r.tokenizer.decode([config.vocab_size // 2])
    shown = readable_tokens(r.tokenizer, config.vocab_size)  # (V,)
    sizes = f"{r.base.num_params():,} parameters, {config.vocab_size:,} tokens"
    return {
        "config": asdict(config),
        "tensors": [[name, p.numel()] for name, p in r.base.state_dict().items()],
        "strengths": STRENGTHS,
        "margin": MARGIN,
        "kind": r.tokenizer.spec["kind"],
        "keeps_marks": keeps_marks(r.tokenizer.spec),
        "tokens": token_names(r.tokenizer),
        "shown": bits(shown),
        "lettered": bits(has_letters(r.tokenizer, i) for i in range(config.vocab_size)),
        "end": r.tokenizer.end,
        "run": str(r.path),
        "about": f"{r.path}: {sizes}, step {r.ckpt['step']}.",
        "words": ",".join(words),
        "first": {"text": text, "edits": r.edits, "look": first_look(r, text, shown)},
        "probes": make_probes(r, base, text, [tour["edit"]] if tour else []),
        "tour": tour,
    }


def token_names(tokenizer):
    """The tokens as page.html reads them: characters, or bytes of a BPE, each as a printable character."""
    if tokenizer.end is None:
        return list(tokenizer.spec["chars"])
    character = {byte: c for c, byte in byte_characters().items()}
    names = []
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.codec.decode_single_token_bytes(i)
        names.append("".join(character[byte] for byte in piece))
    names[tokenizer.end] = tokenizer.decode([tokenizer.end])
    return names


def token_name(tokenizer, id):
    """A token as the page prints it."""
    if id == tokenizer.end:
        return "end of text"
    return token_text(tokenizer, id)


def make_probes(r, base, text, edits, n_ids=64):
    """Logits of some tokens after each of three texts, which the engine of page.html has to compute, too.

    The texts: that with which the page begins, with the edits of the run; the same repeated, with edits;
    and random tokens. base has the page's weights, which are in half precision: what differs is then of
    the network, and not of rounding.
    """
    V = base.config.vocab_size
    block_size = base.config.block_size
    first = text_ids(r, text, block_size)  # (T,)
    longer = first.repeat(block_size)[: min(24, block_size)]  # few, as they cost time before one can begin
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(V, (min(8, block_size),), generator=generator).to(r.device)
    ids = torch.arange(V)[:: math.ceil(V / n_ids)]  # (n,)
    probes = {"ids": ids.tolist(), "texts": []}
    for idx, listed in ((first, r.edits), (longer, edits), (random, [])):
        model = EditedBackpack(base, make_edits(base, r.tokenizer, listed))
        logits = model(idx[None])[0][0, -1, ids]  # (n,)
        said = {"idx": idx.tolist(), "edits": listed, "logits": rounded(logits, 5)}
        probes["texts"].append(said)
    return probes


def first_look(r, text, shown, n=8):
    """What page.html shows of a text before the weights are unpacked: what its worker's look() says.

    shown (V,): see readable_tokens.
    """
    idx = text_ids(r, text, r.model.config.block_size)  # (T,)
    logits = r.model(idx[None])[0][0, -1]  # (V,)
    p = logits.softmax(-1)  # (V,)
    before = next_p(r.base, idx)  # (V,)
    y = p.argmax().item()
    alpha, parts = attribution(r.model, idx, r.model.wte.weight[y])  # (T,K) each
    edited = r.model.edits.row[idx] > 0 if r.edits else torch.zeros_like(idx, dtype=torch.bool)
    return {
        "tokens": [token_name(r.tokenizer, i) for i in idx.tolist()],
        "ids": idx.tolist(),
        "at": len(idx) - 1,
        "before": likeliest(r, before, n),
        "after": likeliest(r, p, n) if r.edits else None,
        "y": y,
        "K": r.model.config.n_sense,
        "logit": logits[y].item(),
        "names": [token_name(r.tokenizer, y), None],
        "changed": edited.tolist(),
        "alpha": rounded(alpha.flatten(), 4),
        "parts": rounded(parts.flatten(), 5),
        "loudest": loud_names(r, idx, parts, shown),
    }


def loud_names(r, idx, parts, shown):
    """What the page calls the largest parts (T,K) of a logit: [[j, l, tokens]]."""
    names = []
    for j, l, ids in loudest(r.model, idx, parts, 12, shown.to(r.device)):
        names.append([j, l, [token_name(r.tokenizer, i) for i in ids]])
    return names


def likeliest(r, p, n):
    """The n likeliest tokens of p (V,)."""
    values, ids = p.topk(min(n, len(p)))
    tokens = []
    for value, id in zip(values.tolist(), ids.tolist()):
        tokens.append({"id": id, "token": token_name(r.tokenizer, id), "p": round(value, 5)})
    return tokens


def bears_out(r, tour):
    """Whether the model as trained does all that a tour says of it."""
    try:
        turns = all(is_turned(r, text, tour["edit"]) for text in [tour["text"], *tour["others"]])
        stays = all(is_unchanged(r, text, tour["edit"]) for text in tour["without"])
        fails = not is_turned(r, **tour["fails"])
        return turns and stays and fails and is_said_by_word(r, **tour)
    except (UserError, ValueError):  # a word is not one token here, or a text is too long
        return False


def next_under(r, text, edit):
    """The probabilities (V,) of the token after a text, without an edit and with it."""
    idx = torch.tensor(r.tokenizer.encode(text), device=r.device)  # (T,)
    edited = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, [edit]))
    return next_p(r.base, idx), next_p(edited, idx)


def is_turned(r, text, edit):
    """Whether a swap turns the next token: FROM was likely, it loses half, and TO is likeliest."""
    before, after = next_under(r, text, edit)
    old = word_ids(r.tokenizer, edit["from"])[0]
    new = word_ids(r.tokenizer, edit["to"])[0]
    works = before[old] > 0.5 and after[old] <= before[old] / 2 and after.argmax() == new
    return bool(works)


def is_unchanged(r, text, edit):
    before, after = next_under(r, text, edit)
    return torch.allclose(before, after, atol=1e-6)


def is_said_by_word(r, text, edit, **_):
    """Whether the largest part of the logit of FROM is of the word that a swap changes."""
    idx = torch.tensor(r.tokenizer.encode(text), device=r.device)  # (T,)
    old = word_ids(r.tokenizer, edit["from"])[0]
    _, parts = attribution(r.base, idx, r.base.wte.weight[old])  # (T,K)
    loudest = idx[parts.amax(1).argmax()]
    return loudest.item() == word_ids(r.tokenizer, edit["word"])[0]


# -----------------------------------------------------------------------------
# the page of tables


@torch.no_grad()
def make_table_page(r, words, text, why):
    """report.html: what words say, and the attribution of a text at each position; why: see why_tables.

    Words: those asked for, then all tokens in the order in which a BPE learned them, so frequent ones
    first, until they have TABLE_LIMIT bytes.
    """
    tokens = [token_string(r.tokenizer, i) for i in range(r.model.config.vocab_size)]
    frequent = [f'"{token}"' for token in tokens if token.strip(" ").isalpha()]
    title = str(r.path)
    if r.edits:
        title += f" with {summary(r.edits)}"
    data = {
        "title": title,
        "why": why,
        "tokens": [token_name(r.tokenizer, i) for i in range(len(tokens))],
        "asked": words,
        "text": table_of_text(r, text) if text else None,
        "words": {},
    }
    size = len(json.dumps(data))
    for word in dict.fromkeys([*words, *frequent]):  # each once
        entry = table_of_word(r, word)
        size += len(json.dumps({word: entry}, separators=(",", ":")))
        if size > TABLE_LIMIT:
            break
        data["words"][word] = entry
    return with_data(read_text(FOLDER / "report.html"), data)


def table_of_word(r, word, n=8):
    """Of each sense of a word: its highest tokens, their logits, and its lowest tokens."""
    high, low = says(r.model, word_senses(r.model, r.tokenizer, word), n)  # (K,n) each
    return [high.indices.tolist(), rounded(high.values, 1), low.indices[:, :3].tolist()]


def table_of_text(r, text, n=8):
    """Of each position of a text: the likeliest next tokens, and the parts of their logits."""
    idx = text_ids(r, text, min(64, r.model.config.block_size))  # (T,)
    logits = r.model(idx[None])[0][0]  # (T,V)
    is_sum = True
    steps = []
    for i, p in enumerate(logits.softmax(-1), 1):
        ids = p.topk(min(n, len(p))).indices.tolist()
        if i < len(idx) and idx[i].item() not in ids:
            ids.append(idx[i].item())  # what the text goes on with
        alpha, parts = attribution(r.model, idx[:i], r.model.wte.weight[ids])  # (i,K), (n,i,K)
        steps.append(
            {
                "ids": ids,
                "p": rounded(p[ids], 4),
                "alpha": rounded(alpha, 3),
                "parts": rounded(parts, 2),
            }
        )
        is_sum = is_sum and add_up(parts, logits[i - 1, ids])
    return {"ids": idx.tolist(), "steps": steps, "is_sum": is_sum}
