"""What swaps do that nobody chose: python -m lab.experiments --swaps.

A place is drawn at random from validation text, among those whose likeliest next token has a probability of
at least 0.3 and is a word: FROM. WORD is the token with the largest part in its logit, and TO a random one
of the 20 words nearest to FROM. Then WORD is swapped, in two ways, and both are judged on the same text.
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from configurator import check
from lab.change import divergence, next_p, validation_tokens
from lab.control import EditedBackpack
from lab.edits import describe, make_edits
from lab.senses import directions
from lab.words import is_word, token_string, token_text, word_forms, word_ids, word_tokens
from model import contextualize
from train import get_batch

N_WINDOW = 100  # windows that a swap is judged on
N_CONTEXT = 20  # other contexts of its word, at most
N_PLACE = 256  # positions drawn from the windows, as a mean over all takes long


class Swap(NamedTuple):
    """A place, and the tokens of the swap that is drawn for it."""

    window: int
    position: int
    word: int
    old: int  # FROM
    new: int  # TO


class Result(NamedTuple):
    """What an edit did; losses are means over the places of kl."""

    edit: dict
    takes: bool  # TO is the likeliest in its place
    halves: bool  # FROM has lost half of its probability there
    likeliest: int  # there, with the edit
    share: float  # of the word in the logit of FROM, before
    turned: list  # of each other context, whether TO is the likeliest
    stays: bool  # a window without the word has the very same logits
    kl: float  # mean over positions at or after the word, in nats
    kl_random: float  # mean over random windows, which may not have the word
    loss_before: float
    loss_after: float


# -----------------------------------------------------------------------------
# the text, and the swaps that are drawn


class Text:
    """Validation windows as the model reads them: ids x (N,T), next ids y, and o (N,T,D) of the logits.

    Of each position also likeliest (N,T), the next token, its probability p, and word, the token that says
    most of it.
    """

    def __init__(self, r, tokens, most=500):
        T = r.base.config.block_size
        N = min(most, (len(tokens) - 1) // T)
        check(N > 0, f"{len(tokens):,} validation tokens are fewer than a window of {T}")
        starts = np.linspace(0, len(tokens) - T - 1, N).astype(int)  # (N,)
        self.x, self.y, _ = get_batch(tokens, starts, T, r.device)
        self.h = r.base.wte.weight.new_empty(N, T, r.base.config.n_embd)  # of the Transformer
        self.o = torch.empty_like(self.h)
        self.likeliest = torch.empty_like(self.x)
        self.word = torch.empty_like(self.x)
        self.p = self.o.new_empty(N, T)
        for n in tqdm(range(N), "windows", leave=False):
            self.read(r.base, n)

    def read(self, model, n):
        x = self.x[n]  # (T,)
        h = model.hidden(x[None])  # (1,T,D)
        alpha = contextualize(*model.query_key(h))[0]  # (K,T,T)
        C = model.senses(x)  # (T,K,D)
        self.h[n] = h[0]
        self.o[n] = torch.einsum("kts,skd->td", alpha, C)
        p = model.logits(self.o[n]).softmax(-1)  # (T,V)
        self.p[n], self.likeliest[n] = p.max(-1)
        e = model.wte.weight[self.likeliest[n]]  # (T,D)
        said = torch.einsum("skd,td->kts", C, e)  # (K,T,T)
        parts = (alpha * said).sum(0)  # (T,T)
        future = torch.ones_like(parts).triu(1).bool()
        parts = parts.masked_fill(future, -torch.inf)
        self.word[n] = x[parts.argmax(1)]

    def weights(self, model, ids, windows, positions):
        """The weights (n,K,ids) that some positions give to all occurrences of each of the tokens ids."""
        a = self.h.new_empty(len(windows), model.config.n_sense, len(ids))
        T = self.x.size(1)
        for n in windows.unique():
            here = windows == n
            q, k = model.query_key(self.h[n : n + 1])  # (1,K,T,d) each
            at = positions[here]  # (n,)
            seen = torch.arange(T, device=at.device) <= at[:, None]  # (n,T)
            alpha = contextualize(q[:, :, at], k, seen[None, None])[0]  # (K,n,T)
            for i, id in enumerate(ids):
                a[here, :, i] = (alpha * (self.x[n] == id)).sum(-1).T
        return a

    def after(self, tokens, windows):
        """The places [[window, position]] in some windows that are at or after one of tokens (ids,)."""
        windows = torch.tensor(windows, device=self.x.device)
        found = torch.isin(self.x[windows], tokens).cumsum(1) > 0  # (windows,T)
        rows, positions = found.nonzero(as_tuple=True)
        return torch.stack([windows[rows], positions], 1).tolist()


def name(tokenizer, token):
    """A token as edits name it; None: they can't, as of a half of a character."""
    text = token_string(tokenizer, token)
    if is_word(tokenizer, token):
        return text[1:]
    if token == tokenizer.end or '"' in text or not text.strip():
        return None
    is_itself = word_ids(tokenizer, f'"{text}"') == [token]
    return f'"{text}"' if is_itself else None


def draw_swaps(r, text, n, rng):
    """n Swaps at places drawn without replacement; fewer if there are no more."""
    words = word_tokens(r.tokenizer, r.base.config.vocab_size)
    words = torch.tensor(words, device=r.device)
    E = directions(r.base)  # (V,D)
    fine = (text.p >= 0.3) & torch.isin(text.likeliest, words)  # (N,T)
    fine[:, :3] = False
    places = fine.nonzero().tolist()
    swaps = []
    for i in rng.permutation(len(places)):
        window, position = places[i]
        word = text.word[window, position].item()
        old = text.likeliest[window, position].item()
        alike = E[words] @ E[old]  # (words,)
        nearest = alike.topk(min(21, len(words))).indices
        nearest = words[nearest[1:]].tolist()  # the first is old itself
        new = rng.choice(nearest).item()
        if name(r.tokenizer, word):
            swaps.append(Swap(window, position, word, old, new))
        if len(swaps) == n:
            break
    return swaps


# -----------------------------------------------------------------------------
# what a swap does


class Seen:
    """Some places [[window, position]], as the model sees them without the edit."""

    def __init__(self, r, text, ids, places):
        places = torch.tensor(places, dtype=torch.long, device=r.device).view(-1, 2)  # (n,2)
        windows, positions = places.T  # (n,) each
        self.model = r.base
        self.y = text.y[windows, positions]  # (n,), the next tokens
        self.o = text.o[windows, positions]  # (n,D)
        self.a = text.weights(r.base, ids, windows, positions)  # (n,K,ids)
        self.before = r.base.logits(self.o).log_softmax(-1)  # (n,V)

    def after(self, moved):
        """Log-probabilities (n,V) when the senses of the word's tokens move by moved (ids,K,D).

        Logits are linear in o and in the senses, so this is what the edited model says.
        """
        o = self.o + torch.einsum("nki,ikd->nd", self.a, moved)  # (n,D)
        return self.model.logits(o).log_softmax(-1)

    def kl(self, after):
        """The mean KL, in nats, to log-probabilities (n,V); 0 without any place."""
        return divergence(self.before, after).sum().item() / max(1, len(self.y))

    def loss(self, log_p):
        """The mean loss of log-probabilities (n,V)."""
        return -log_p.gather(1, self.y[:, None]).mean().item()


def some(places, n, rng):
    """n of places, drawn at random, or all if there are fewer."""
    return [places[i] for i in rng.permutation(len(places))[:n]]


class Judge:
    """Judges edits that make one Swap, all on the same places."""

    def __init__(self, r, text, swap, random_windows, rng):
        self.r = r
        self.swap = swap
        self.ids = word_forms(r.tokenizer, name(r.tokenizer, swap.word))
        self.tokens = torch.tensor(self.ids, device=r.device)  # (ids,)
        self.idx = text.x[swap.window, : swap.position + 1]  # (T,)
        self.place = Seen(r, text, self.ids, [[swap.window, swap.position]])
        # elsewhere: where FROM is the likeliest, and the word says most of it
        same = (text.likeliest == swap.old) & torch.isin(text.word, self.tokens)  # (N,T)
        same[swap.window, swap.position] = False
        places = same.nonzero().tolist()
        self.contexts = Seen(r, text, self.ids, some(places, N_CONTEXT, rng))
        # where other text can change: at the word and after it
        has_word = torch.isin(text.x, self.tokens).any(1)  # (N,)
        windows = has_word.nonzero().flatten().tolist()
        windows = some(windows, N_WINDOW, rng)
        places = text.after(self.tokens, windows)
        self.near = Seen(r, text, self.ids, some(places, N_PLACE, rng))
        places = text.after(self.tokens, random_windows)
        self.random = Seen(r, text, self.ids, some(places, N_PLACE, rng))
        n_random = len(random_windows) * text.x.size(1)
        self.rate = len(places) / n_random  # at all other positions nothing changes
        # a window where nothing may change; none if the word is in all of them
        windows = (~has_word).nonzero().flatten().tolist()
        self.without = text.x[some(windows, 1, rng)]  # (1,T) or (0,T)

    def share(self):
        """The part of the word in the logit of FROM."""
        e = self.r.base.wte.weight[self.swap.old]  # (D,)
        said = self.r.base.senses(self.tokens) @ e  # (ids,K)
        part = torch.einsum("nki,ik->n", self.place.a, said)
        logit = self.place.o @ e
        return (part / logit).item()

    def stays(self, edited):
        """Whether text without the word has the very same logits."""
        for x in self.without:
            before, _ = self.r.base(x[None])
            after, _ = edited(x[None])
            if not torch.equal(before, after):
                return False
        return True

    def result(self, edit):
        """What an edit does, as a Result."""
        model = self.r.base
        edited = EditedBackpack(model, make_edits(model, self.r.tokenizer, [edit]))
        moved = edited.senses(self.tokens) - model.senses(self.tokens)  # (ids,K,D)
        before = next_p(model, self.idx)  # (V,)
        after = next_p(edited, self.idx)  # (V,)
        p = self.place.after(moved)[0].exp()  # (V,)
        same = torch.allclose(p, after, atol=1e-3)
        check(same, "this model.py does not sum senses as lab/unchosen.py does: change it there, too")
        near = self.near.after(moved)  # (n,V)
        of_random = self.random.after(moved)  # (n,V)
        turned = self.contexts.after(moved).argmax(-1) == self.swap.new  # (contexts,)
        likeliest = after.argmax().item()
        halves = after[self.swap.old] <= before[self.swap.old] / 2
        return Result(
            edit=edit,
            takes=likeliest == self.swap.new,
            halves=halves.item(),
            likeliest=likeliest,
            share=self.share(),
            turned=turned.tolist(),
            stays=self.stays(edited),
            kl=self.near.kl(near),
            kl_random=self.rate * self.random.kl(of_random),
            loss_before=self.near.loss(self.near.before),
            loss_after=self.near.loss(near),
        )


def unchosen(r, s):
    """Print what the paper's swap and ours do for words that nobody chose."""
    check(r.tokenizer.end is not None, "--swaps needs a dataset whose documents end with a token")
    measure(r, s, Text(r, validation_tokens(r, s.dataset, s.data_dir)))


def measure(r, s, text):
    """Draw swaps, judge them, and print the figures of each edit."""
    rng = np.random.default_rng(s.seed)
    swaps = draw_swaps(r, text, s.n_swap, rng)
    check(swaps, "--swaps found no word with a probability of 0.3 or more in the validation text")
    random_windows = some(range(len(text.x)), N_WINDOW, rng)
    results = {"paper_swap": [], f"swap, margin {s.margin:g}": []}
    for swap in tqdm(swaps, "swaps", leave=False):
        judge = Judge(r, text, swap, random_windows, rng)
        keys = {"word": swap.word, "from": swap.old, "to": swap.new}
        words = {key: name(r.tokenizer, token) for key, token in keys.items()}
        edits = [{"edit": "paper_swap", **words}, {"edit": "swap", **words, "margin": s.margin}]
        for rows, edit in zip(results.values(), edits):
            rows.append(judge.result(edit))
    print(f"{len(swaps)} swaps at random places of {len(text.x)} windows, seed {s.seed}")
    for title, rows in results.items():
        show(title, rows)
        show_failures(r, swaps, rows)


def line(name, figure, more=""):
    """Print a figure and its name."""
    print(f"{name:38} {figure:>8}  {more}".rstrip())


def show_kl(rows):
    """Print the KL of edits, from rows that have kl and kl_random."""
    for name, values in [
        ("KL at or after the word, nats", [row.kl for row in rows]),
        ("KL in random windows", [row.kl_random for row in rows]),
    ]:
        line(name, f"{np.median(values):.5f}", f"median; mean {np.mean(values):.5f}")


def show(title, rows):
    """The figures of an edit, one a line."""

    def of(values):
        return f"{np.mean(values):.1%}"

    elsewhere = [np.mean(row.turned) for row in rows if row.turned]
    n_contexts = sum(len(row.turned) for row in rows)
    print(f"\n{title}")
    line("TO is the likeliest in the place", of([row.takes for row in rows]))
    line("FROM loses half there", of([row.halves for row in rows]))
    if elsewhere:
        more = f"mean over {len(elsewhere)} words, {n_contexts} contexts"
        line("TO is the likeliest in other contexts", of(elsewhere), more)
    line("text without the word is unchanged", of([row.stays for row in rows]))
    show_kl(rows)
    before = np.exp(np.mean([row.loss_before for row in rows]))
    after = np.exp(np.mean([row.loss_after for row in rows]))
    line("perplexity at or after the word", f"{after:.2f}", f"before: {before:.2f}")


def show_failures(r, swaps, rows, most=5):
    """Where TO is not the likeliest, sorted by why, with some examples."""
    stay = []
    third = []
    for swap, row in zip(swaps, rows):
        if row.likeliest == swap.old:
            stay.append(row)
        elif not row.takes:
            third.append(row)
    for reason, failures in [("FROM stays the likeliest", stay), ("a third token is the likeliest", third)]:
        if not failures:
            continue
        share = np.mean([row.share for row in failures])
        print(f"{reason}: {len(failures)}; the word had {share:.0%} of the logit of FROM")
        for row in failures[:most]:
            likeliest = token_text(r.tokenizer, row.likeliest)
            print(f"    {row.share:4.0%} {likeliest:16} {describe(row.edit)}")
