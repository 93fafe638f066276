"""
Control through senses, in tensors and token ids (paper, section 6); lab/edits.py adds words and files.

An export for transformers copies this file, so it imports nothing but torch and model.py.
"""

from functools import lru_cache

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from model import FOR_GENERATION, Backpack, contextualize, weigh

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

MARGIN = 14  # of a swap, in logits: with it nine of ten take (lab/notes/senses.md)


class Edits(nn.Module):
    """Changes of senses, which leave the weights of a model as they are.

    Vectors: C'(x)_l = scale C(x)_l + offset. row (V,) says which row of scale (n,K) and offset (n,K,D)
    belongs to a token; row 0 is for all tokens that are not edited.

    Topics: each of w (m,V,K) and f (m,) multiplies alpha[l,i,j] by b w[x_j,l] + 1 - b. The annealing b
    falls as the text up to i says what sense l of x_j would say (appendix D, as in the authors' code):

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

    def senses(self, ids, C):
        """The senses C (...,K,D) of token ids (...) -> as edited (...,K,D)."""
        row = self.row[ids]  # (...)
        scale = self.scale[row][..., None]  # (...,K,1)
        offset = self.offset[row]  # (...,K,D)
        return (scale * C + offset).to(C.dtype)

    def reweigh(self, alpha, e, ids, C, mask=None):
        """alpha (B,K,T,S) of the last T positions, as topics change it.

        Of all S positions: embeddings e (B,S,D), token ids (B,S), edited senses C (B,S,K,D).
        mask (B,1,T,S): False at padding.
        """
        T = alpha.size(2)
        real = torch.ones_like(ids) if mask is None else mask[:, 0, -1]  # (B,S)
        e = (e * real[..., None]).to(C.dtype)  # padding says nothing
        # a in the formula: what the new positions say, up to each, and all that was said before them
        could_say = C.flatten(1, 2).mT  # (B,D,S*K)
        said = (e[:, -T:] @ could_say).relu().cumsum(1)  # (B,T,S*K)
        said = said + (e[:, :-T] @ could_say).relu().sum(1, keepdim=True)
        said = said.unflatten(2, C.shape[1:3]).permute(0, 3, 1, 2)  # (B,K,T,S)
        later = 1 + (real.cumsum(1) - 1).to(C.dtype) / 100  # (B,S)
        changed = alpha
        for w, f in zip(self.w, self.f):
            b = torch.sigmoid(6 - f * said) * later[:, None, None]  # (B,K,T,S)
            b = torch.where(f == 0, 1.0, b)
            changed = changed * (b * w[ids].mT[:, :, None] + 1 - b)
        before = alpha.sum((1, 3), keepdim=True)  # (B,1,T,1)
        after = changed.sum((1, 3), keepdim=True)
        return torch.where((self.f == 0).any(), changed * before / after, changed)


class EditedBackpack(Backpack):
    """A Backpack with edits (None: without any). It has the modules, so the weights, of `model`."""

    def __init__(self, model, edits=None):
        nn.Module.__init__(self)  # Backpack's would make weights of its own
        vars(self).update(vars(model))
        self._modules = dict(model._modules)  # of its own, so that model does not get the edits
        self.edits = edits
        # whole weights and their sum pass through these, where forward hooks find them
        self.alpha = nn.Identity()  # (B,K,T,S)
        self.o = nn.Identity()  # (B,T,D)

    @property
    def has_topics(self):
        return self.edits is not None and len(self.edits.f) > 0

    def senses(self, ids):
        """Token ids of any shape (...) -> their edited sense vectors (...,K,D)."""
        C = super().senses(ids)
        return C if self.edits is None else self.edits.senses(ids, C)

    # Topics need alpha whole. Backpack never has it whole, nor does it take padding, so the sum is
    # written once more here; same_sum, below, tells whether both say the same.

    def whole_sum(self, idx, h, C, cache=None, mask=None):
        """alpha (B,K,T,S), as topics leave it, and o (B,T,D), from h (B,T,D) and C (B,T,K,D) of idx (B,T).

        cache: of the positions before, which this extends; mask (B,1,T,S): of padding_mask. With n_sense=0
        alpha is None and o is h.
        """
        if not self.config.n_sense:
            return None, self.o(h)
        q, k = self.query_key(h)  # (B,K,T,d) each
        ids = idx
        if cache is not None:
            k = cache.extend("sense key", k)  # (B,K,S,d)
            C = cache.extend("senses", C, dim=1)  # (B,S,K,D)
            if self.has_topics:
                ids = cache.extend("ids", idx, dim=1)  # (B,S)
        alpha = contextualize(q, k, mask)  # (B,K,T,S)
        if self.has_topics:
            alpha = self.edits.reweigh(alpha, self.wte(ids), ids, C, mask)
        alpha = self.alpha(alpha)
        return alpha, self.o(weigh(alpha, C))

    def output(self, idx, cache=None, mask=None, pos=None, sense_table=None):
        """o (B,T,D), which the logits are linear in, of idx (B,T).

        cache: of the positions before, which this extends; mask (B,1,T,S) and pos (B,T): of
        padding_mask, if texts are padded; sense_table (V,K,D): edited senses to look up.
        """
        with sdpa_kernel(FOR_GENERATION):  # a cache makes the number of keys grow
            h = self.hidden(idx, cache, mask, pos)  # (B,T,D)
        C = None
        if sense_table is not None:
            C = sense_table[idx]  # (B,T,K,D)
        elif self.config.n_sense:
            distinct, where = idx.unique(return_inverse=True)  # (U,), (B,T)
            C = self.senses(distinct)[where]  # (B,T,K,D)
        _, o = self.whole_sum(idx, h, C, cache, mask)
        if cache is not None:
            cache.past += idx.size(1)
        return o

    def forward(self, idx, targets=None):
        """Logits (B,T,V) and None; with targets (B,T) None and their mean loss: see Backpack."""
        if not self.has_topics:
            return super().forward(idx, targets)
        o = self.output(idx)  # (B,T,D)
        if targets is None:
            return self.logits(o), None
        return None, self.loss(o, targets)

    def contextualization(self, idx, mask=None, pos=None):
        """idx (B,T) -> alpha (B,K,T,T), to look at; its rows sum to 1 unless topics change them."""
        if mask is None and not self.has_topics:
            return super().contextualization(idx)
        h = self.hidden(idx, None, mask, pos)  # (B,T,D)
        alpha, _ = self.whole_sum(idx, h, self.senses(idx), None, mask)
        return alpha

    def step(self, idx, cache, sense_table=None):
        """Logits (B,V) of the token after idx (B,T), which goes on from what the cache holds."""
        if not self.has_topics:
            return super().step(idx, cache, sense_table)
        o = self.output(idx, cache, sense_table=sense_table)  # (B,T,D)
        return self.logits(o[:, -1])


def padding_mask(attention_mask, T):
    """mask (B,1,T,S) and pos (B,T) for EditedBackpack.output, where texts of a batch are padded.

    attention_mask (B,S): 0 at padding, of all positions so far; T: how many of these are new. mask is
    True where a query may look; pos counts a text's own tokens only.
    """
    real = attention_mask.bool()
    S = real.size(1)
    pos = (real.cumsum(1) - 1).clamp(min=0)[:, S - T :]  # (B,T)
    causal = real.new_ones(T, S).tril(S - T)
    itself = causal.triu(S - T)  # padding looks at itself, as a softmax over nothing is nan
    mask = (causal & real[:, None]) | itself  # (B,T,S)
    return mask[:, None], pos


@torch.no_grad()
def same_sum(model):
    """Whether EditedBackpack.output says what model says, on one text.

    It does not in a fork that changes the sum of senses in model.py and not here.
    """
    idx = some_ids(model)
    own, _ = model(idx)  # (1,T,V)
    return is_near(own, model.logits(EditedBackpack(model).output(idx)))


def some_ids(model):
    """Token ids (1,T) of a text on which two ways to compute a network can be compared."""
    ids = torch.arange(model.config.vocab_size, device=model.wte.weight.device)
    return ids.flip(0)[None, : min(32, model.config.block_size)]


def is_near(logits, found, tolerance=1e-3):
    """Whether logits and those found in another way differ by no more than rounding makes."""
    return bool((logits - found).abs().max() <= tolerance * logits.abs().max())


def swapped(C, E_from, E_to):
    """Senses C (...,D) whose association with one word is turned into one with another (paper, 6.3).

    C + (C . E_r / |E_r|^2) (E_a / phi - E_r) with phi = |E_a|^2 / |E_r|^2, as in the authors' code:
    where E_a and E_r are orthogonal, the logit of r becomes 0 and that of a gains what r's was.
    """
    phi = E_to.square().sum() / E_from.square().sum()
    share = (C @ E_from / E_from.square().sum())[..., None]  # (...,1)
    return C + share * (E_to / phi - E_from)


def quiet_inverse(E):
    """S^-1 (D,D) of embeddings E (V,D): S is their covariance, which tells how much a vector disturbs.

    v . S v is the variance, over the vocabulary, of the logits E v that a vector v adds.
    """
    E = E - E.mean(0)
    S = E.T @ E / len(E)
    size = S.diagonal().mean()
    return torch.linalg.inv(S + 0.001 * size * torch.eye(len(S)).to(S))  # has one if V < D, too


def exchanged(C, E_from, E_to, margin, inverse):
    """Senses C (K,D) that say of TO what they said of FROM, and of FROM what they said of TO (ours).

    Each sense that speaks for FROM, E_from . C_l > 0, becomes the C' with

        E_to . C'   = max(E_to . C_l, t E_from . C_l)        t = 1 + margin / sum of those E_from . C_l
        E_from . C' = min(E_from . C_l, E_to . C_l)

    As other words of a text go on speaking for FROM, TO gets a margin: together, at weight 1 (as in a text
    of this token alone), these senses say of TO what they said of FROM, and so many logits more. C' is the
    vector with these two logits that disturbs the other ones least: v = C' - C_l has the least v . S v, with
    inverse (D,D) = S^-1 as of quiet_inverse. So v = S^-1 (a E_from + b E_to), and the two equations give a
    and b. Other senses stay.
    """
    said_from = C @ E_from  # (K,)
    said_to = C @ E_to  # (K,)
    speaks = said_from > 0
    t = 1 + margin / said_from[speaks].sum()
    gain_from = (said_to - said_from).clamp(max=0)
    gain_to = (t * said_from - said_to).clamp(min=0)
    gains = torch.stack([gain_from, gain_to], 1)  # (K,2)
    words = torch.stack([E_from, E_to])  # (2,D)
    along = words @ inverse  # (2,D)
    a_and_b = gains @ torch.linalg.pinv(along @ words.T)  # (K,2)
    return torch.where(speaks[:, None], C + a_and_b @ along, C)


@lru_cache(1)
@torch.no_grad()
def sense_peaks(model, progress=iter):
    """The highest logit of each sense of each token, max over the vocabulary of E C(x)_l: (V,K).

    This takes V^2 K D products, so the last result is kept. progress: wraps the loop, like tqdm.
    """
    ids = torch.arange(model.config.vocab_size, device=model.wte.weight.device)  # (V,)
    parts = progress(ids.split(64))
    return torch.cat([model.logits(model.senses(part)).amax(-1) for part in parts])


@torch.no_grad()
def topic_weights(model, bag, strength, peaks, end=None):
    """w (V,K) of a topic for Edits: senses that raise the tokens of a bag get more weight (app. D).

    bag: distinct token ids; peaks (V,K): sense_peaks(model); end: the token that ends documents,
    whose senses stay as they are.
    """
    E = model.wte.weight
    ids = torch.arange(model.config.vocab_size, device=E.device)  # (V,)
    b = E[bag].sum(0)  # (D,)
    scores = torch.cat([model.senses(part) @ b for part in ids.split(1024)]) / peaks  # (V,K)
    if end is not None:
        scores[end] = 0.0
    w = torch.ones_like(scores)  # (V,K)
    quantiles, factors, _ = STRENGTHS[strength]
    for quantile, factor in sorted(zip(quantiles, factors)):
        w[scores >= scores.flatten().quantile(quantile)] = factor
    return w
