"""The page of `python -m lab.look --html=FILE`: the model itself, to look into and edit in a browser.

It is page.html with data: the weights in half precision, the tokenizer, a finished first example, and a
guided minute of tour.json, if this model bears out what that says. A run whose page would have more than
LIMIT bytes gets a page of tables, report.html, of frequent words and one text.
"""

import base64
import json
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from files import read_json, read_text, write_text
from lab.change import next_p
from lab.control import STRENGTHS, sense_peaks
from lab.edit import make_edits, peaks_progress, summary
from lab.look import attribution, says, text_ids, word_senses
from tokenizer import byte_characters, token_text, word_ids

FOLDER = Path(__file__).parent
LIMIT = 14_000_000  # bytes of a page
EDIT = {"edit": str, "word": str, "from": str, "to": str}
TOUR = {
    "text": str,
    "edit": EDIT,
    "others": [str],
    "without": [str],
    "fails": {"text": str, "edit": EDIT},
}


def packed(array):
    """An array's bytes as base64 of their zlib stream; of 16-bit numbers first all low bytes."""
    data = array.view(np.uint8).reshape(-1, 2).T if array.itemsize == 2 else array
    return base64.b64encode(zlib.compress(np.ascontiguousarray(data).tobytes(), 9)).decode()


def token_names(tokenizer):
    """The tokens as page.html reads them: characters, or bytes of a BPE, each as a printable character."""
    if tokenizer.end is None:
        return list(tokenizer.spec["chars"])
    character = {byte: c for c, byte in byte_characters().items()}
    pieces = [tokenizer.codec.decode_single_token_bytes(i) for i in range(tokenizer.vocab_size)]
    names = ["".join(character[byte] for byte in piece) for piece in pieces]
    names[tokenizer.end] = tokenizer.decode([tokenizer.end])
    return names


def rounded(tensor, digits):
    """A tensor as lists of rounded numbers."""
    return tensor.double().cpu().numpy().round(digits).tolist()


def first_look(r, text, n=8):
    """What page.html shows of a text before the weights are unpacked, as its worker's look() says it."""
    model, E = r.model, r.model.wte.weight
    idx = text_ids(model, r.tokenizer, text, model.config.block_size)  # (T,)
    both = [next_p(model, idx), next_p(model, idx, model.edits) if r.edits else None]
    y = (both[0] if both[1] is None else both[1]).argmax().item()
    alpha, parts = attribution(model, idx, E[y])  # (T,K) each
    before, after = (p if p is None else top_tokens(r, p, n) for p in both)
    row = torch.zeros_like(idx) if model.edits is None else model.edits.row[idx]
    look = {"tokens": [token_text(r.tokenizer, i) for i in idx.tolist()], "ids": idx.tolist()}
    look |= {
        "at": len(idx) - 1,
        "before": before,
        "after": after,
        "y": y,
        "K": model.config.n_sense,
    }
    look |= {"names": [token_text(r.tokenizer, y), None], "changed": (row > 0).tolist()}
    return look | {"alpha": rounded(alpha.flatten(), 4), "parts": rounded(parts.flatten(), 5)}


def top_tokens(r, p, n):
    return [
        {"id": i, "token": token_text(r.tokenizer, i), "p": round(p[i].item(), 5)}
        for i in p.topk(min(n, len(p))).indices.tolist()
    ]


def borne_out(r, tour):
    """Whether the model does all that a tour says of it."""
    model, tokenizer = r.model, r.tokenizer

    def turned(text, edit):
        """(FROM is likely, then loses half, and TO is first; whether nothing changed)."""
        change, idx = make_edits(model, tokenizer, [edit]), torch.tensor(tokenizer.encode(text))
        before, after = (next_p(model, idx.to(r.device), edits) for edits in (None, change))
        old, new = (word_ids(tokenizer, edit[key])[0] for key in ("from", "to"))
        works = before[old] > 0.5 and after.argmax() == new and after[old] <= before[old] / 2
        return works.item(), torch.allclose(before, after, atol=1e-6)

    try:
        works = all(turned(text, tour["edit"])[0] for text in [tour["text"], *tour["others"]])
        stays = all(turned(text, tour["edit"])[1] for text in tour["without"])
        idx = torch.tensor(tokenizer.encode(tour["text"]), device=r.device)
        old, word = (word_ids(tokenizer, tour["edit"][key])[0] for key in ("from", "word"))
        darkest = attribution(model, idx, model.wte.weight[old])[1].flatten().argmax()
        says_so = idx[darkest // model.config.n_sense] == word
        return works and stays and says_so.item() and not turned(**tour["fails"])[0]
    except ValueError:  # a word is no token here, or a text too long
        return False


@torch.no_grad()
def page(r, words=(), text=""):
    """The page of a run opened by open_run, with its edits; words and a text to begin with."""
    model, tokenizer, edits = r.model, r.tokenizer, r.model.edits
    states = {name: p.half().cpu().numpy() for name, p in model.state_dict().items()}
    states = {name: p for name, p in states.items() if not name.startswith("edits.")}
    if sum(p.nbytes for p in states.values()) > LIMIT:  # base64 adds a third, zlib takes less off
        return table_page(r, words, text)
    weights = packed(np.concatenate([p.ravel() for p in states.values()]))
    peaks = packed(sense_peaks(model, peaks_progress).cpu().numpy())
    model.edits = None
    tour = read_json(FOLDER / "tour.json", TOUR)
    if borne_out(r, tour):
        for part in (tour, tour["fails"]):  # the tokens that the tour shows
            part["ids"] = [word_ids(tokenizer, part["edit"][key])[0] for key in ("from", "to")]
    else:
        tour = None
    model.edits = edits
    text = text or (tour["text"] if tour else tokenizer.decode([model.config.vocab_size // 2]))
    sizes = f"{model.num_params():,} parameters, {model.config.vocab_size:,} tokens"
    about = f"{r.path}: {sizes}, step {r.ckpt['step']}."
    data = {"config": asdict(model.config), "about": about, "run": str(r.path), "tour": tour}
    data |= {
        "tensors": [[name, p.size] for name, p in states.items()],
        "kind": tokenizer.spec["kind"],
    }
    data |= {"tokens": token_names(tokenizer), "end": tokenizer.end, "words": ",".join(words)}
    data |= {
        "strengths": STRENGTHS,
        "first": {"text": text, "edits": r.edits, "look": first_look(r, text)},
    }
    html = (
        read_text(FOLDER / "page.html").replace("/*WEIGHTS*/", weights).replace("/*PEAKS*/", peaks)
    )
    html = with_data(html, data)
    return html if len(html.encode()) <= LIMIT else table_page(r, words, text)


def write_page(path, r, words, text):
    write_text(path, page(r, words, text))
    print(f"wrote {path}, {Path(path).stat().st_size / 1e6:.1f} MB: open it in a browser")


def with_data(html, data):
    # HTML reads the data first: without a < nothing in it can end the script or open another
    data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return html.replace("/*DATA*/null", data)


@torch.no_grad()
def table_page(r, words, text, n=8, limit=5_000_000):
    """The page of report.html: what words say, and the attribution of a text at each position.

    Words: those asked for, then all tokens in the order in which a BPE learned them, so frequent ones
    come first, until the page has `limit` bytes.
    """
    model, tokenizer = r.model, r.tokenizer
    tokens = [tokenizer.decode([i]) for i in range(model.config.vocab_size)]
    names, n = [token_text(tokenizer, i) for i in range(len(tokens))], min(n, len(tokens))
    title = str(r.path) + (f" with {summary(r.edits)}" if r.edits else "")
    data = {"title": title, "tokens": names, "words": {}, "asked": words, "text": None}
    if text:
        idx = text_ids(model, tokenizer, text, min(64, model.config.block_size))  # (T,)
        steps = []
        for i, p in enumerate(model(idx[None])[0][0].softmax(-1), 1):  # p (V,)
            ids = p.topk(n).indices.tolist()
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
    return with_data(read_text(FOLDER / "report.html"), data)
