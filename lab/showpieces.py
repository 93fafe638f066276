"""Words after which a swap changes the next token, and how far: python -m lab.experiments --showpieces."""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from configurator import check
from lab.change import next_p, validation_tokens
from lab.control import MARGIN, EditedBackpack
from lab.edits import describe, make_edits, printable
from lab.senses import attribution, directions
from lab.words import token_string, word_id, word_tokens


class Turn(NamedTuple):
    """A text that goes on with the token `new` instead of `old`, once the senses of a word are swapped."""

    ids: torch.Tensor  # (T,)
    edit: dict
    before: tuple  # the probabilities of old and new, in %
    after: tuple


def word_mask(tokenizer, V):
    """(V,): True for tokens that are words of letters, without the most frequent ones."""
    mask = torch.zeros(V, dtype=torch.bool)
    mask[word_tokens(tokenizer, V)] = True
    mask[:500] = False  # the, of, was, ...: a BPE learns frequent tokens first
    return mask


def sure_places(r, tokens, is_candidate, length=24):
    """[(ids (T,), word, next token)]: starts of documents after which the next token is rather sure.

    It has a probability of at least 0.3, and the token word says most of its logit; both are words.
    """
    model = r.base
    ends = np.flatnonzero(tokens == r.tokenizer.end) + 1
    length = min(length, model.config.block_size)
    found = []
    for document in tqdm(np.split(tokens, ends), "documents", leave=False):
        start = document[:-1][:length].astype(np.int64)  # its last token ends it
        if len(start) < 4:
            continue
        ids = torch.from_numpy(start).to(r.device)
        logits, _ = model(ids[None])
        p, likeliest = logits[0].softmax(-1).max(-1)  # (T,) each
        for n in range(4, len(ids) + 1):
            old = likeliest[n - 1].item()
            if p[n - 1] < 0.3 or not is_candidate[old]:
                continue
            _, parts = attribution(model, ids[:n], model.wte.weight[old])  # (n,K)
            word = ids[parts.sum(1).argmax()].item()
            if is_candidate[word] and word != old:
                found.append((ids[:n], word, old))
    return found


def try_swap(r, ids, word, old, new):
    """The Turn that swapping old for new in a word makes after ids (T,); None: it makes none."""
    names = [token_string(r.tokenizer, token).strip() for token in (word, old, new)]
    edit = {"edit": "swap", "word": names[0], "from": names[1], "to": names[2], "margin": MARGIN}
    edited = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, [edit]))
    before = next_p(r.base, ids)  # (V,)
    after = next_p(edited, ids)  # (V,)
    halved = after[old] <= before[old] / 2
    if after.argmax() != new or not halved or before[new] >= 0.1:
        return None
    pair = [old, new]
    return Turn(ids, edit, tuple(100 * before[pair]), tuple(100 * after[pair]))


def reach(turn):
    """How far a swap goes: the probability of the new token after it."""
    return turn.after[1]


def share_with(r, turn, s):
    """How many of s.num_samples samples have the new token among their next 8 tokens, from 0 to 1."""
    edited = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, [turn.edit]))
    generator = torch.Generator(r.device).manual_seed(s.seed)
    start = turn.ids.repeat(s.num_samples, 1)  # (n,T)
    samples = edited.generate(start, 8, temperature=0.8, generator=generator)[:, start.size(1) :]  # (n,8)
    is_new = samples == word_id(r.tokenizer, turn.edit["to"])
    return is_new.any(1).float().mean().item()


def showpieces(r, s):
    """Of words that decide the next token, the swaps to tokens like it that go furthest."""
    check(r.tokenizer.end is not None, "--showpieces needs a dataset whose documents end with a token")
    tokens = validation_tokens(r, s.dataset, s.data_dir)
    is_candidate = word_mask(r.tokenizer, r.base.config.vocab_size).to(r.device)  # (V,)
    E = directions(r.base)  # (V,D)
    best = {}  # of each word the Turn that goes furthest
    for ids, word, old in sure_places(r, tokens, is_candidate):
        alike = (E @ E[old]).masked_fill(~is_candidate, -1.0)  # (V,)
        for new in alike.topk(6).indices[1:].tolist():  # the first is old itself
            turn = try_swap(r, ids, word, old, new)
            if turn and (word not in best or reach(turn) > reach(best[word])):
                best[word] = turn
    print("% of FROM and TO before, after; samples with TO in their next 8 tokens; text; swap")
    turns = sorted(best.values(), key=reach, reverse=True)
    for turn in turns[: s.top]:
        numbers = "{:4.0f} {:3.0f}  {:3.0f} {:3.0f}".format(*turn.before, *turn.after)
        text = printable(r.tokenizer.decode(turn.ids.tolist()))
        print(f"{numbers}  {share_with(r, turn, s):4.0%}  {text[-60:]}")
        print(" " * 24 + describe(turn.edit))
    if not turns:
        print("none: no swap of a word made another token the likeliest here")
