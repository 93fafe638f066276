"""Control through senses, with tensors and token ids (paper, section 6); lab/edit.py adds words.

An export for transformers copies this file, so it imports nothing but torch.
"""

from functools import lru_cache

import torch
from torch import nn

# The scores of all senses of all tokens are split at quantiles, and a topic multiplies the weight of a
# sense by the factor of its part. Annealing fades that factor as the text takes up the topic; f sets how
# fast (appendix D). Strength 4 is ours, as small models repeat themselves under the paper's factors: it
# gives a few senses much more weight, keeps the sum of a position's weights, and doesn't anneal.
PAPERS = (0.95, 0.8, 0.6)
STRENGTHS = {  # quantiles, the factor above each, f
    1: (PAPERS, (1.5, 1.5, 1.3), 1.5 / 7.5),
    2: (PAPERS, (2.2, 2.2, 1.5), 2.2 / 7.5),
    3: (PAPERS, (3.3, 3.3, 3.0), 3.3 / 7.5),
    4: ((0.99,), (12.0,), 0.0),
}


class Edits(nn.Module):
    """Changes of senses that leave the model's weights alone; assign it to model.edits.

    Vectors: C'(x)_l = scale C(x)_l + offset. row (V,) says which row of scale (n,K) and offset
    (n,K,D) belongs to a token; row 0 is for tokens that stay as they are. Topics: each row of w
    (m,V,K) and f (m,) multiplies alpha[l,i,j] by b w[x_j,l] + 1 - b. The annealing b falls as the
    text up to i says what sense l of x_j would say (appendix D, as in the authors' code):

        a = sum over t <= i of relu(E_{x_t} . C'(x_j)_l)      b = sigmoid(6 - f a) (1 + j/100)

    Where an f is 0, b is 1, and alpha is divided so that its sum over l and j stays K (strength 4).
    """

    def __init__(self, row, scale, offset, w, f):
        super().__init__()
        self.register_buffer("row", row)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.register_buffer("w", w)
        self.register_buffer("f", f)

    @property
    def has_topics(self):
        return len(self.f) > 0

    def senses(self, ids, C):
        """ids (...) and their senses C (...,K,D) -> edited senses C' (...,K,D)."""
        row = self.row[ids]  # (...)
        return (self.scale[row][..., None] * C + self.offset[row]).to(C.dtype)

    def reweigh(self, alpha, wte, idx, C, mask=None, cache=None):
        """alpha (B,K,T,S) as topics change it.

        wte: the token embedding; idx (B,T): tokens of the queries; C (B,S,K,D): edited senses of
        the keys; mask (B,1,T,S): False at padding; cache: of the positions before idx.
        """
        C = C.transpose(1, 2)  # (B,K,S,D)
        T, S = idx.size(1), C.size(2)
        ids = idx
        if cache is not None:  # a cache holds tensors (B,heads,S,width)
            ids = cache.extend("ids", idx[:, None, :, None])[:, 0, :, 0]  # (B,S)
        real = torch.ones_like(ids) if mask is None else mask[:, 0, -1]  # (B,S), 0 at padding
        e = (wte(ids) * real[..., None])[:, None].to(C.dtype)  # (B,1,S,D)
        said = (e[:, :, S - T :] @ C.mT).relu().cumsum(2)  # (B,K,T,S)
        if cache is not None:
            # text before the first query counts too: for earlier keys its sum is cached
            of_new = (e[:, :, : S - T] @ C[:, :, S - T :].mT).relu().sum(2)  # (B,K,T)
            before = cache.extend("said", of_new[..., None])[..., 0]  # (B,K,S)
            said = said + before[:, :, None]  # (B,K,T,S)
            before.copy_(said[:, :, -1])
        later = 1 + (real.cumsum(1) - 1).to(C.dtype) / 100  # (B,S)
        changed = alpha
        for w, f in zip(self.w, self.f):
            b = torch.sigmoid(6 - f * said) * later[:, None, None]  # (B,K,T,S)
            b = torch.where(f == 0, 1.0, b)
            changed = changed * (b * w[ids].mT[:, :, None] + 1 - b)
        kept = alpha.sum((1, 3), keepdim=True) / changed.sum((1, 3), keepdim=True)  # (B,1,T,1)
        return changed * torch.where((self.f == 0).any(), kept, 1.0)


def swapped(C, E_from, E_to):
    """Senses C (...,D) with their association with one word turned into one with another (6.3).

    C + (C . E_r / |E_r|^2) (E_a / phi - E_r) with phi = |E_a|^2 / |E_r|^2, as in the authors' code:
    where E_a and E_r are orthogonal, the logit of r becomes 0 and that of a gains what r's was.
    """
    phi = E_to.square().sum() / E_from.square().sum()
    share = (C @ E_from / E_from.square().sum())[..., None]  # (...,1)
    return C + share * (E_to / phi - E_from)


@lru_cache(1)
@torch.no_grad()
def sense_peaks(model, progress=iter):
    """The highest logit of each sense of each token, max over the vocabulary of E C(x)_l: (V,K).

    This takes V^2 K D products, so the last result is kept. progress: wraps the loop, like tqdm.
    """
    ids = torch.arange(model.config.vocab_size, device=model.wte.weight.device)  # (V,)
    parts = progress(ids.split(64))
    return torch.cat([model.logits(model.own_senses(part)).amax(-1) for part in parts])


@torch.no_grad()
def topic_weights(model, bag, strength, peaks, end=None):
    """w (V,K) of a topic for Edits: senses that raise the tokens of a bag get more weight (app. D).

    bag: distinct token ids; peaks (V,K): sense_peaks(model); end: the token that ends documents,
    whose senses stay as they are.
    """
    E = model.wte.weight
    ids = torch.arange(model.config.vocab_size, device=E.device)  # (V,)
    b = E[bag].sum(0)  # (D,)
    scores = torch.cat([model.own_senses(part) @ b for part in ids.split(1024)]) / peaks  # (V,K)
    if end is not None:
        scores[end] = 0.0
    w = torch.ones_like(scores)  # (V,K)
    quantiles, factors, _ = STRENGTHS[strength]
    for quantile, factor in sorted(zip(quantiles, factors)):
        w[scores >= scores.flatten().quantile(quantile)] = factor
    return w
