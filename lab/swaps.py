"""Words after which a swap changes the next token, and how far: `python -m lab.experiments --swaps`."""

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError, printable
from lab.change import next_p, validation_tokens
from lab.edit import describe, make_edits
from lab.look import attribution, directions
from tokenizer import word_id


def turnable(r, tokens, is_word, length=24):
    """[(ids (T,), word, FROM)]: starts of documents, and the token there that says most of the next, FROM.

    FROM has a probability of at least 0.3; it and the token word are words.
    """
    if r.tokenizer.end is None:
        raise UserError("no token ends the documents of this dataset: --swaps needs one")
    found, at = [], np.flatnonzero(tokens == r.tokenizer.end) + 1
    length = min(length, r.model.config.block_size)
    for document in tqdm(np.split(tokens, at), "documents", leave=False):
        start = document[: min(length, len(document) - 1)].astype(np.int64)
        if len(start) < 4:
            continue
        ids = torch.from_numpy(start).to(r.device)
        p, y = r.model(ids[None])[0][0].softmax(-1).max(-1)  # (T,) each
        for n in range(4, len(ids) + 1):
            if p[n - 1] >= 0.3 and is_word[y[n - 1]]:
                _, parts = attribution(r.model, ids[:n], r.model.wte.weight[y[n - 1]])  # (n,K)
                word = ids[parts.sum(1).argmax()].item()
                if is_word[word] and word != y[n - 1]:
                    found.append((ids[:n], word, y[n - 1].item()))
    return found


def swaps(r, s):
    """Of words that decide the next token FROM, the swaps to tokens like FROM that go furthest."""
    model, tokenizer, best = r.model, r.tokenizer, {}
    tokens, V = validation_tokens(r, s.dataset, s.data_dir), model.config.vocab_size
    texts = [tokenizer.decode([i]) for i in range(V)]
    is_word = [text[0] == " " and text[1:].isalpha() for text in texts]
    is_word = torch.tensor(is_word, device=r.device)  # (V,)
    is_word[:500] = False  # the, of, was, ...: a BPE learns frequent tokens first
    E = directions(model)  # (V,D)
    for ids, word, old in turnable(r, tokens, is_word):
        before = next_p(model, ids)  # (V,)
        for new in (E @ E[old]).masked_fill(~is_word, -1.0).topk(6).indices[1:].tolist():
            names = [texts[i].strip() for i in (word, old, new)]
            edit = {"edit": "swap", "word": names[0], "from": names[1], "to": names[2]}
            after = next_p(model, ids, make_edits(model, tokenizer, [edit]))  # (V,)
            p = [x[y].item() for x in (before, after) for y in (old, new)]
            turned = after.argmax() == new and p[2] <= p[0] / 2 and p[1] < 0.1
            if turned and (word not in best or p[3] > best[word][0][3]):
                best[word] = p, ids, edit
    print("% of FROM and TO before, after; samples with TO in their next 8 tokens; text; swap")
    for p, ids, edit in sorted(best.values(), key=lambda row: -row[0][3])[: s.top]:
        model.edits = make_edits(model, tokenizer, [edit])
        random = torch.Generator(r.device).manual_seed(s.seed)
        samples = model.generate(ids.repeat(s.num_samples, 1), 8, temperature=0.8, generator=random)
        model.edits = None
        to = word_id(tokenizer, edit["to"])
        follow = (samples[:, len(ids) :] == to).any(1).float().mean().item()
        print("{:4.0f} {:3.0f}  {:3.0f} {:3.0f}  ".format(*(100 * x for x in p)), end="")
        print(f"{follow:4.0%}  {printable(tokenizer.decode(ids.tolist()))[-60:]}")
        print(" " * 24 + describe(edit))
    if not best:
        print("none: no swap of a word made another token the likeliest here")
