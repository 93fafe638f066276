"""Teach a Backpack by changing a few of its sense vectors (Hewitt et al. 2024, arXiv 2402.06155).

python -m lab.edit --teach=FILE calls this. Each line of the file is {"prompt": "...", "good": "..."}, and
may have "bad", a continuation to avoid; "subject", the words of the prompt that the fact is about (else its
name, or its rarest word); "keep", a list of prompts that shall go on as before.
"""

import contextlib
import copy
import itertools
import math
import re
from collections import Counter

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError, printable
from lab.change import change, divergence, log_p, validation_windows
from lab.control import Edits
from tokenizer import token_text

PREFER = 10  # how many times more a vector of the subject's own tokens counts, in choosing
PRONOUNS = ("He", "She", "It", "They")
N_NEAR = 8  # near misses of an example that training sees, and as many that it doesn't


# ---- subjects and near misses


def is_name(word, counts):
    """Whether a word is a name: capitalised much more often than not, and no pronoun."""
    often = counts[word] >= 4 * counts[word.lower()]
    return word[0].isupper() and word not in PRONOUNS and often


def subject_of(example, counts):
    """What an example is about: its "subject", else the first name in its prompt, else its rarest word.

    counts: how often each word stands in other text.
    """
    if example.get("subject"):
        return example["subject"]
    words = list(re.finditer(r"\w+", example["prompt"]))
    names = [is_name(word[0], counts) for word in words]
    if True in names:
        first = names.index(True)
        beyond = [*names, False].index(False, first)  # names in a row are one
        return example["prompt"][words[first].start() : words[beyond - 1].end()]
    return min((w[0] for w in words), key=counts.__getitem__, default=example["prompt"])


def near_misses(example, subject, counts, avoid, random):
    """The prompt of an example about others: 2 N_NEAR of them, names that are frequent, and pronouns."""
    names = [w for w, _ in counts.most_common() if is_name(w, counts) and w not in avoid]
    names = [w for w in names if len(w) > 2][: 8 * N_NEAR]
    others = [*random.permutation(names)[: 2 * N_NEAR - len(PRONOUNS)], *PRONOUNS]
    random.shuffle(others)
    pattern = re.compile(rf"(?:\b[Tt]he )?(?<!\w){re.escape(subject)}(?!\w)")
    prompts = [pattern.sub(lambda _, w=w: w, example["prompt"]) for w in others]
    return [prompt for prompt in prompts if prompt != example["prompt"]]


# ---- the choice of vectors


@torch.no_grad()
def choose(model, tokenizer, wanted, text, n, elsewhere, taken=()):
    """n (token, sense) pairs that matter for what is wanted and are rarely used in other text.

    wanted: [(ids (T,), index of the first token to be said, the subject's tokens)]; text (m,T+1): other
    text; taken: tokens to leave alone. The score of a pair is the sum of alpha onto it at the positions
    that say what is wanted, PREFER times that for the subject's tokens, minus `elsewhere` times its mean
    per position of other text; the examples choose in turn. Returns tokens (n,), senses (n,).
    """
    K, V, device = model.config.n_sense, model.config.vocab_size, text.device
    cost = torch.zeros(V, K, device=device)
    for x in text[:, :-1].split(8):
        alpha = model.contextualization(x).sum(2) / text[:, 1:].numel()  # (B,K,T)
        cost.index_put_((x[..., None], torch.arange(K, device=device)), alpha.mT, accumulate=True)
    ranked = []  # of each example its pairs, the best first
    for ids, first, subject in wanted:
        alpha = model.contextualization(ids[None, :-1])[0, :, first - 1 :].sum(1).T  # (T,K)
        tokens, where = ids[:-1].unique(return_inverse=True)  # (U,), (T,)
        score = alpha.new_zeros(len(tokens), K).index_add(0, where, alpha)  # (U,K)
        own = torch.isin(tokens, torch.tensor(subject, device=device))  # (U,)
        score = score * (1 + (PREFER - 1) * own[:, None]) - elsewhere * cost[tokens]
        pairs = [divmod(i, K) for i in score.flatten().argsort(descending=True).tolist()]
        ranked.append([(tokens[u].item(), l) for u, l in pairs])
    # a token that is half a character can't be named in a file of edits
    found = {i for pairs in ranked for i, _ in pairs} - set(taken)
    named = {i for i in found if tokenizer.encode(tokenizer.decode([i])).tolist() == [i]}
    ranked = [[pair for pair in pairs if pair[0] in named] for pairs in ranked]
    most = len({pair for pairs in ranked for pair in pairs})
    if n > most:
        what = f"found {most} sense vectors that a file of edits can name, expected as many"
        raise UserError(f"n_vector={n}: {what}: give a lower --n_vector")
    chosen = {}  # as a set that keeps its order
    for pairs in itertools.cycle(ranked):
        chosen |= dict.fromkeys([pair for pair in pairs if pair not in chosen][:1])
        if len(chosen) == n:
            return torch.tensor(list(chosen), device=device).unbind(1)


def with_room(base, model, tokens):
    """The edits base, or none, with rows for tokens that base leaves as they are."""
    E, K, V = model.wte.weight.detach(), model.config.n_sense, model.config.vocab_size
    row, ones = torch.zeros(V, dtype=torch.long, device=E.device), E.new_ones(1, K)
    zeros = E.new_zeros(1, K, E.size(1))
    base = base or Edits(row, ones, zeros, E.new_zeros(0, V, K), E.new_zeros(0))
    row, new = base.row.clone(), [i for i in tokens.unique().tolist() if not base.row[i]]
    row[new] = torch.arange(len(new), device=E.device) + len(base.scale)
    scale = torch.cat([base.scale, *[ones] * len(new)])
    return Edits(row, scale, torch.cat([base.offset, *[zeros] * len(new)]), base.w, base.f)


def moved(edits, tokens, senses, delta):
    """Edits that add delta (N,D) to the senses (N,) of tokens (N,), which have rows in edits."""
    offset = edits.offset.index_put((edits.row[tokens], senses), delta, accumulate=True)
    return Edits(edits.row, edits.scale, offset, edits.w, edits.f)


# ---- teaching


def log_likelihood(each, ids):
    """The log-probability of ids (m,), a scalar; each (m,V): log-probabilities where they stand."""
    return -F.nll_loss(each, ids, reduction="sum")


class Lesson:
    """Examples, near misses and other text as token ids, for one model as the edits base leave it.

    Training sees the near misses near[0::2] and the windows known; near[1::2] and unseen are for the report.
    """

    def __init__(self, r, examples, tokens, s):
        self.model, self.tokenizer, self.base = r.model, r.tokenizer, r.model.edits
        self.s, self.examples, encode = s, examples, self.encode
        # how often each word stands in other text
        counts = Counter(re.findall(r"\w+", r.tokenizer.decode(tokens[:1_000_000].tolist())))
        self.goods = [encode(e["prompt"], e["good"]) for e in examples]
        self.bads = [encode(e["prompt"], e["bad"]) if e.get("bad") else None for e in examples]
        self.subjects = [subject_of(e, counts) for e in examples]
        words = [f"{e['good']} {e.get('bad')} {about}" for e, about in zip(examples, self.subjects)]
        avoid, random = set(re.findall(r"\w+", " ".join(words))), np.random.default_rng(s.seed)
        self.near = []  # (ids of prompt and good end, index of the end's first token)
        for example, about in zip(examples, self.subjects):
            for prompt in near_misses(example, about, counts, avoid, random):
                with contextlib.suppress(UserError):  # characters that the vocabulary lacks
                    self.near.append(encode(prompt, example["good"]))
            for prompt in example.get("keep") or []:  # for training and for the report
                self.near += 2 * [encode(prompt, example["good"])]
        text = validation_windows(r, tokens, s.n_window)  # (n,T+1)
        turn = torch.arange(len(text), device=r.device) % 13  # 80 and 128 of 208 windows
        self.known, self.unseen = text[turn < 5], text[turn > 4]

    def encode(self, prompt, end):
        """(ids (T,) of prompt and end, index of the end's first token). UserError: they are too long."""
        space, path = "" if prompt[-1].isspace() or end[0].isspace() else " ", self.s.teach
        try:
            start, ends = (self.tokenizer.encode(text).tolist() for text in (prompt, space + end))
        except UserError as error:  # a character that the vocabulary lacks
            raise UserError(f"{path}: {prompt[:40]!r}: {error}") from None
        if len(start + ends) > (most := self.model.config.block_size):
            what = f"is longer than block_size={most} tokens: expected less"
            raise UserError(f"{path}: {prompt[:40]!r}... {what}")
        return torch.tensor(start + ends, device=self.model.wte.weight.device), len(start)

    def before(self, idx):
        return log_p(self.model, idx, self.base)

    def end(self, after, encoded):
        """What is said where an end stands, and the end: log-probabilities (m,V), ids (m,).

        encoded: (ids (T,), index of the end's first token).
        """
        ids, first = encoded
        return after(ids[None, :-1])[0, first - 1 :], ids[first:]

    def kl(self, after, idx):
        """KL(before || after) of the next token: idx (B,T) -> (B,T)."""
        with torch.no_grad():
            before = self.before(idx)  # (B,T,V)
        return divergence(before, after(idx))

    def near_kl(self, after, encoded):
        """KL(before || after) of what follows a near miss, a scalar."""
        ids, first = encoded
        return self.kl(after, ids[None, :first])[0, -1]

    def learn(self, params, after, learning_rate, title, known):
        """Change params, by Adam, so that good ends become likely and all else stays as it is.

        after: a function of idx to log-probabilities, which depend on params; known (m,T+1): those of the
        windows self.known that they can change. It ends when every good end has the probability s.enough, or
        when self.known changes by more than s.max_kl: then params go back as far as needed.
        """
        s, share = self.s, len(known) / len(self.known)
        # without momentum, which would go on beyond what is enough
        optimizer = torch.optim.Adam(params, learning_rate, betas=(0.0, 0.999))

        def drawn(n):
            return torch.randperm(n, generator=random)[:4].tolist()

        def kl_known():
            return share * change(self.before, after, known)[0] if share else 0.0

        goal = math.log((1 + s.enough) / 2)  # what is said more than that needs no more pushing
        random, near = torch.Generator(), self.near[::2]
        safe = [p.detach().clone() for p in params]
        progress = tqdm(range(s.steps + 1), title)
        for step in progress:
            said = torch.stack(
                [log_likelihood(*self.end(after, good)) for good in self.goods]
            )  # (examples,)
            least = said.exp().min().item()
            if step % 10 == 0 or step == s.steps or least >= s.enough:
                kl = kl_known()
                is_over = not kl <= s.max_kl  # nan is, too
                what = f"least p(good) {least:.3f}, KL elsewhere {kl:.5f}"
                progress.set_postfix_str(what + ", so back a little" * is_over)
                if is_over:
                    self.go_back(params, safe, kl_known)
                if is_over or least >= s.enough or step == s.steps:
                    break
                safe = [p.detach().clone() for p in params]
            loss = -said.clamp(max=goal).sum()
            for bad, good in zip(self.bads, said):
                if bad:
                    loss = loss + F.softplus(log_likelihood(*self.end(after, bad)) - good)
            random.manual_seed(s.seed + step)
            kept = [self.near_kl(after, near[i]) / 4 for i in drawn(len(near))]
            if share:
                x = known[drawn(len(known)), :-1]  # (4,T)
                kept.append(share * self.kl(after, x).mean())
            loss = loss / len(self.goods) + s.kl_weight * sum(kept)
            for p, grad in zip(params, torch.autograd.grad(loss, params, allow_unused=True)):
                p.grad = grad
            optimizer.step()
        progress.close()

    @torch.no_grad()
    def go_back(self, params, safe, kl_known):
        """Shorten the way that params went from safe, until the windows known change by at most s.max_kl."""
        last = [p.clone() for p in params]
        for share in (7 / 8, 3 / 4, 1 / 2, 1 / 4, 0):
            for p, here, there in zip(params, safe, last):
                p.copy_(torch.lerp(here, there, share) if share else here)  # there may be nan
            if not share or kl_known() <= self.s.max_kl:
                break

    @torch.no_grad()
    def figures(self, after):
        """[(what is measured, its value as text)] on the examples, near misses and unseen text."""
        texts = [printable(f"p({e['good']}) after {e['prompt']}") for e in self.examples]
        ends = [self.end(after, good) for good in self.goods]
        rows = [(x, f"{log_likelihood(*end).exp():.1%}") for x, end in zip(texts, ends)]
        likeliest = sum(each.argmax(-1).equal(ids) for each, ids in ends)
        rows.append(("... that are the likeliest next token", f"{likeliest} of {len(ends)}"))
        if near := self.near[1::2]:
            pairs = [(self.end(self.before, one), self.end(after, one)) for one in near]
            kls = [divergence(x[0], y[0]).item() for (x, _), (y, _) in pairs]
            p, q = ([log_likelihood(*end).exp().item() for end in side] for side in zip(*pairs))
            gain = max(b - a for a, b in zip(p, q))
            rows.append((f"{len(near)} near misses: KL of the next token", f"{np.mean(kls):.5f}"))
            rows.append(("... p(good): mean, largest gain", f"{np.mean(q):.1%}, {gain:+.1%}"))
        kl, _, perplexity = change(self.before, after, self.unseen)
        rows.append((f"{len(self.unseen)} windows of other text: KL per token", f"{kl:.5f}"))
        return [*rows, ("... perplexity", f"{perplexity:.2f}")]


def teach(r, examples, tokens, s, taken=()):
    """Learn a few sense vectors that make the good ends of examples likely, as a list of edits.

    r: from open_run, with the edits that are there already in its model; tokens (N,): other text, most of
    it for the report that this prints; s: settings of lab/edit.py; taken: tokens whose senses stay.
    UserError: an example is longer than block_size.
    """
    model, tokenizer = r.model, r.tokenizer
    lesson = Lesson(r, examples, tokens, s)
    spaces = ("",) if tokenizer.end is None else ("", " ")
    about = [
        {i for space in spaces for i in tokenizer.encode(space + subject).tolist()}
        for subject in lesson.subjects
    ]
    wanted = [(*good, list(own)) for good, own in zip(lesson.goods, about)]
    n = s.n_vector or 2 * len(examples)
    chosen, senses = choose(model, tokenizer, wanted, lesson.known, n, s.elsewhere, taken)
    # a window without these tokens stays exactly as it is
    known = lesson.known[torch.isin(lesson.known[:, :-1], chosen).any(1)]  # (m,T+1)
    n_own = sum(i in set().union(*about) for i in chosen.tolist())
    where = f"their tokens stand in {len(known)} of {len(lesson.known)} windows to learn from"
    print(f"{n_own} of {n} vectors belong to the subjects; {where}")
    for example, subject, own in zip(examples, lesson.subjects, about):
        if not own & set(chosen.tolist()):
            what = f"no vector of {subject!r} was chosen: expect the change elsewhere, too"
            print(f"warning: {example['prompt'][:40]!r}: {what}")
    room, size = with_room(lesson.base, model, chosen), (n, model.config.n_embd)
    delta = torch.zeros(size, device=r.device, requires_grad=True)  # (N,D)

    def with_vectors(idx):
        return log_p(model, idx, moved(room, chosen, senses, delta))

    lesson.learn([delta], with_vectors, s.learning_rate, "teaching", known)
    afters = {"before": lesson.before, "taught": with_vectors}
    if s.compare:
        other = copy.deepcopy(model)
        weights = [p.requires_grad_() for p in other.parameters()]

        def with_weights(idx):
            return log_p(other, idx, lesson.base)

        title, slower = "finetuning all weights", s.learning_rate / 2500
        lesson.learn(weights, with_weights, slower, title, lesson.known)
        afters["all weights"] = with_weights
    columns = [lesson.figures(after) for after in afters.values()]
    print(" " * 50 + "".join(f"{name:>15}" for name in afters))
    for row in zip(*columns):
        print(f"{row[0][0][:50]:50}" + "".join(f"{value:>15}" for _, value in row))
    with torch.no_grad():
        vectors = model.senses(chosen)[torch.arange(n), senses] + delta  # (N,D)
        adds = model.logits(delta).topk(min(5, model.config.vocab_size)).indices.tolist()  # (N,5)
    rows, edits = (chosen.tolist(), senses.tolist(), adds, vectors.tolist()), []
    for i, sense, top, vector, moves in zip(*rows, delta.any(1).tolist()):
        edit = {"edit": "replace", "word": f'"{tokenizer.decode([i])}"', "sense": sense}
        edit["adds"] = " ".join(token_text(tokenizer, i) for i in top)
        edit["vector"] = [round(value, 6) for value in vector]
        edits += [edit] if moves else []  # not if nothing was to be learned
    return edits
