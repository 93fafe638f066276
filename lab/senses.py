"""What senses say, how alike they are, and how they add up to a logit: the figures of lab.look."""

import re

import torch
from torch.nn import functional as F

from configurator import check
from lab.words import begins_with_mark, is_unspaced, token_string, word_ids


def text_ids(r, text, most):
    """The token ids of a text (T,). UserError: it has none, or more than most."""
    ids = r.tokenizer.encode(text)
    check(0 < len(ids) <= most, f"the text has {len(ids)} tokens: expected 1 to {most}")
    return torch.tensor(ids, device=r.device)


def word_senses(model, tokenizer, word):
    """The senses of a word (K,D): of several tokens, their mean (section 5.2)."""
    ids = word_ids(tokenizer, word)
    C = model.senses(torch.tensor(ids, device=model.wte.weight.device))  # (n,K,D)
    return C.mean(0)


def all_senses(model):
    """Yield the senses of all tokens, some tokens at a time (n,K,D): together they could fill the memory."""
    ids = torch.arange(model.config.vocab_size, device=model.wte.weight.device)  # (V,)
    for part in ids.split(1024):
        yield model.senses(part)


# -----------------------------------------------------------------------------
# what senses say


def top_tokens(scores, n, shown=None, largest=True):
    """topk of scores (...,V), (...,n) each, over the tokens where shown (V,) is True; None: over all.

    There are fewer than n if fewer are shown.
    """
    if shown is None:
        shown = torch.ones(scores.size(-1), dtype=torch.bool, device=scores.device)
    worst = -torch.inf if largest else torch.inf
    scores = scores.masked_fill(~shown, worst)
    n = min(n, int(shown.sum()))
    return scores.topk(n, largest=largest)


def says(model, C, n, shown=None):
    """What senses C (...,D) say (section 5.1): top_tokens of their highest logits, and of their lowest."""
    logits = model.logits(C)  # (...,V)
    return top_tokens(logits, n, shown), top_tokens(logits, n, shown, largest=False)


def readable_tokens(tokenizer, V):
    """(V,): True for the tokens that a reader can place: words with a space before them, Names, signs.

    In a script without spaces nothing tells a word from a part of one, so all that begins with a letter of
    it is shown. If no token can be placed, or if tokens are characters, all are.
    """
    shown = torch.zeros(V, dtype=torch.bool)
    for i in range(V):
        token = token_string(tokenizer, i)
        is_text = token.isprintable() and "\ufffd" not in token and token.strip() != ""
        is_part = token[:1].isalnum() and not token[:1].isupper() and not is_unspaced(token)
        shown[i] = is_text and not is_part and not begins_with_mark(token)
    if tokenizer.end is None or not shown.any():
        shown[:] = True
    return shown


# -----------------------------------------------------------------------------
# how alike they are


def directions(model):
    """Where tokens point (V,D): E less the mean of its rows, with norm 1. Products say how alike two are."""
    E = model.wte.weight[: model.config.vocab_size]
    return F.normalize(E - E.mean(0), dim=-1)


def has_letters(tokenizer, id):
    """Whether a token has three letters; one is enough in a script without spaces, where it may be a word."""
    text = token_string(tokenizer, id)
    least = 1 if is_unspaced(text) else 3
    return len(re.findall(r"[^\W\d_]", text)) >= least


def coherence(model, tokenizer, top):
    """How alike the tokens top (K,n) are that each sense says, so how readable it is: (K,).

    The mean product of two of their directions. A token of few letters (see has_letters) is like no other.
    """
    n = top.size(1)
    is_word = torch.tensor([has_letters(tokenizer, i) for i in top.flatten().tolist()])  # (K*n,)
    is_word = is_word.view(-1, n).to(top.device)  # (K,n)
    e = directions(model)[top]  # (K,n,D)
    e = e * is_word[..., None]
    products = e @ e.mT  # (K,n,n)
    with_itself = is_word.sum(1)  # (K,), as directions have norm 1
    of_two = products.sum((1, 2)) - with_itself  # (K,)
    return of_two / max(1, n * (n - 1))


def similarity(model, C):
    """cos(C(x)_l, C_l) of the senses of all tokens x with C (K,D): (V,K) (section 5.2)."""
    parts = []
    for some in all_senses(model):  # (n,K,D)
        parts.append(F.cosine_similarity(some, C, dim=-1))  # (n,K)
    return torch.cat(parts)


# -----------------------------------------------------------------------------
# how they add up


def attribution(model, idx, direction):
    """Why the token after idx (T,) gets its logit: weights and parts, both (T,K), in the exact sum

        direction . o = sum_j sum_l alpha[l,j] (direction . C(x_j)_l)

    direction (D,): E[y] for the logit of y, E[y] - E[z] for its difference to that of z. Several
    directions (n,D) give parts (n,T,K).
    """
    alpha = model.contextualization(idx[None])  # (1,K,T,T)
    of_last = alpha[0, :, -1].T  # (T,K)
    said = torch.einsum("tkd,...d->...tk", model.senses(idx), direction)  # (T,K) or (n,T,K)
    return of_last, of_last * said


def add_up(parts, logits):
    """Whether parts (...,T,K) add up to the model's own logits (...).

    They don't in a fork of model.py whose logits come from more than these senses and weights.
    """
    gap = (parts.sum((-2, -1)) - logits).abs()
    return bool((gap <= 1e-4 * parts.abs().sum((-2, -1))).all())


def loudest(model, idx, parts, n=8, shown=None):
    """The n largest parts (T,K) of what idx (T,) says, for or against: [(j, l, ids)].

    ids: the three tokens that sense l of the token at position j says most.
    """
    largest = parts.flatten().abs().topk(min(n, parts.numel())).indices
    C = model.senses(idx)  # (T,K,D)
    found = []
    for place in largest.tolist():
        j, l = divmod(place, parts.size(1))
        high, _ = says(model, C[j, l], 3, shown)
        found.append((j, l, high.indices.tolist()))
    return found
