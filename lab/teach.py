"""
Teach a Backpack by changing a few of its sense vectors (Hewitt et al. 2024, arXiv 2402.06155).

python -m lab.edit --teach=FILE calls this. Each line of the file is {"prompt": "...", "good": "..."}, and
may have "bad", a continuation to avoid; "subject", the words of the prompt that the fact is about (else its
name, or its rarest word); "keep", a list of prompts that shall go on as before.
"""

import contextlib
import copy
import math
import re
import reprlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError, check
from lab.change import change, divergence, log_p
from lab.control import EditedBackpack, Edits
from lab.edits import is_text, printable
from lab.files import read_jsonl
from lab.words import token_text

PREFER = 10  # how many times more a vector of the subject's own tokens counts, in choosing
PRONOUNS = ("He", "She", "It", "They")
N_NEAR = 8  # near misses of an example that training sees, and as many that it doesn't


# -----------------------------------------------------------------------------
# examples, what they are about, and near misses


def read_examples(path):
    """The examples in a JSONL file. UserError: there is none, or one lacks something."""
    examples = read_jsonl(path)
    check(examples, f'{path}: found no lines, expected {{"prompt": "...", "good": "..."}}')
    for number, example in enumerate(examples, 1):
        check_example(example, f"{path}, example {number}")
    return examples


def check_example(example, where):
    check(isinstance(example, dict), f"{where}: expected an object")
    keep = example.get("keep") or []
    check(isinstance(keep, list), f"{where}: keep is not a list of prompts")
    texts = [example.get("prompt"), example.get("good"), *keep]
    for key in ("bad", "subject"):
        if example.get(key) is not None:
            texts.append(example[key])
    for text in texts:
        fine = is_text(text) and text != ""
        found = reprlib.repr(text)
        check(fine, f"{where}: found {found}, expected a prompt, a good end, and no empty text")
    subject = example.get("subject")
    if subject:
        named = whole(subject).search(example["prompt"])
        check(named, f"{where}: the prompt does not have the words of subject {subject[:40]!r}")


def whole(words):
    """A pattern that finds words, but not in the middle of others."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)")


def is_name(word, counts):
    """Whether a word is a name: capitalised much more often than not, and not a pronoun."""
    often = counts[word] >= 4 * counts[word.lower()]
    return word[0].isupper() and word not in PRONOUNS and often


def subject_of(example, counts):
    """What an example is about: its "subject", else the first name in its prompt, else its rarest word.

    counts: how often each word stands in other text.
    """
    if example.get("subject"):
        return example["subject"]
    prompt = example["prompt"]
    words = list(re.finditer(r"\w+", prompt))
    if not words:
        return prompt
    names = [is_name(word[0], counts) for word in words]
    if not any(names):
        rarest = min(words, key=lambda word: counts[word[0]])
        return rarest[0]
    first = names.index(True)
    last = first
    while last + 1 < len(names) and names[last + 1]:  # names in a row are one
        last += 1
    return prompt[words[first].start() : words[last].end()]


def near_misses(example, subject, counts, avoid, random):
    """The prompt of an example about others: 2 N_NEAR of them, names that are frequent, and pronouns."""
    names = []
    for word, _ in counts.most_common():
        if len(word) > 2 and is_name(word, counts) and word not in avoid:
            names.append(word)
    drawn = random.permutation(names[: 8 * N_NEAR])
    others = [*drawn[: 2 * N_NEAR - len(PRONOUNS)], *PRONOUNS]
    random.shuffle(others)
    pattern = re.compile(rf"(?:\b[Tt]he )?{whole(subject).pattern}")
    prompts = [pattern.sub(lambda _, other=other: other, example["prompt"]) for other in others]
    return [prompt for prompt in prompts if prompt != example["prompt"]]


class Ending(NamedTuple):
    """A prompt and what follows it, as tokens."""

    ids: torch.Tensor  # (T,)
    first: int  # where in ids the ending begins

    def log_probs(self, predict):
        """Log-probabilities (m,V) where the ending stands; predict: idx (B,T) -> such (B,T,V)."""
        return predict(self.ids[None, :-1])[0, self.first - 1 :]

    def log_likelihood(self, predict):
        """The log-probability of the ending, a scalar."""
        return -F.nll_loss(self.log_probs(predict), self.ids[self.first :], reduction="sum")

    def is_likeliest(self, predict):
        return self.log_probs(predict).argmax(-1).equal(self.ids[self.first :])


# -----------------------------------------------------------------------------
# the choice of vectors


@torch.no_grad()
def usage(model, text):
    """The weight that each sense of each token gets in text (m,T+1), per position: (V,K)."""
    total = torch.zeros(model.config.vocab_size, model.config.n_sense, device=text.device)
    for x in text[:, :-1].split(8):  # (B,T)
        alpha = model.contextualization(x).sum(2)  # (B,K,T)
        total.index_add_(0, x.flatten(), alpha.mT.flatten(0, 1))
    return total / text[:, 1:].numel()


@torch.no_grad()
def ranked_pairs(model, good, subject, cost):
    """The (token, sense) pairs that make a good ending likely, the best first, as a list.

    A pair's score is the sum of alpha onto it at the positions that say the ending, PREFER times that if
    it is among the tokens `subject`, less its cost (V,K).
    """
    idx = good.ids[:-1]  # (T,)
    alpha = model.contextualization(idx[None])[0]  # (K,T,T)
    weight = alpha[:, good.first - 1 :].sum(1).T  # (T,K), of the positions that say the ending
    tokens, where = idx.unique(return_inverse=True)  # (U,), (T,)
    score = weight.new_zeros(len(tokens), weight.size(1)).index_add(0, where, weight)  # (U,K)
    own = torch.isin(tokens, torch.tensor(subject, device=idx.device))  # (U,)
    score[own] *= PREFER
    score -= cost[tokens]
    pairs = []
    for i in score.flatten().argsort(descending=True).tolist():
        u, sense = divmod(i, score.size(1))
        pairs.append((tokens[u].item(), sense))
    return pairs


def choose(model, tokenizer, goods, subjects, text, n, elsewhere, taken=()):
    """n (token, sense) pairs that matter for good endings and are rarely used in other text (m,T+1).

    subjects: the tokens that each ending is about; elsewhere: weight of the use in other text; taken:
    tokens to leave alone. The endings choose in turn. Returns tokens (n,), senses (n,).
    """
    cost = elsewhere * usage(model, text)  # (V,K)
    ranked = []
    for good, subject in zip(goods, subjects):
        pairs = ranked_pairs(model, good, subject, cost)
        ranked.append([pair for pair in pairs if pair[0] not in taken and has_name(tokenizer, pair[0])])
    most = len(set().union(*ranked))
    what = f"found {most} sense vectors that a file of edits can name, expected as many"
    check(n <= most, f"n_vector={n}: {what}: give a lower --n_vector")
    chosen = {}  # a set that keeps its order
    while len(chosen) < n:
        for pairs in ranked:
            best = next((pair for pair in pairs if pair not in chosen), None)
            if best:
                chosen[best] = True
    return torch.tensor(list(chosen)[:n], device=text.device).unbind(1)


def has_name(tokenizer, token):
    """Whether a file of edits can name a token, which may be half a character."""
    return tokenizer.encode(tokenizer.decode([token])).tolist() == [token]


# -----------------------------------------------------------------------------
# edits that learn


def with_rows(edits, tokens, model):
    """edits, or None, as Edits that have a row for each of these tokens."""
    V = model.config.vocab_size
    K = model.config.n_sense
    E = model.wte.weight.detach()
    if edits is None:
        row = torch.zeros(V, dtype=torch.long, device=E.device)
        offset = E.new_zeros(1, K, E.size(1))
        edits = Edits(row, E.new_ones(1, K), offset, E.new_zeros(0, V, K), E.new_zeros(0))
    row = edits.row.clone()
    new = [token for token in tokens.unique().tolist() if row[token] == 0]
    n = len(edits.scale)
    row[new] = torch.arange(n, n + len(new), device=E.device)
    scale = torch.cat([edits.scale, E.new_ones(len(new), K)])
    offset = torch.cat([edits.offset, E.new_zeros(len(new), K, E.size(1))])
    return Edits(row, scale, offset, edits.w, edits.f)


def moved(edits, tokens, senses, delta):
    """Edits that add delta (N,D) to the senses (N,) of tokens (N,), which have rows in edits."""
    offset = edits.offset.index_put((edits.row[tokens], senses), delta, accumulate=True)
    return Edits(edits.row, edits.scale, offset, edits.w, edits.f)


# -----------------------------------------------------------------------------
# teaching


class Lesson:
    """What shall become likely, and what shall stay as it is, for one model (with the edits so far).

    Training sees the near misses near[0::2] and the windows known; near[1::2] and unseen are for the
    report. text (n,T+1): other text.
    """

    def __init__(self, model, tokenizer, examples, text, s):
        self.model = model
        self.tokenizer = tokenizer
        self.examples = examples
        self.s = s
        counts = Counter(re.findall(r"\w+", tokenizer.decode(text.flatten().tolist())))
        self.subjects = [subject_of(example, counts) for example in examples]
        self.goods = [self.encode(e["prompt"], e["good"]) for e in examples]
        self.bads = []  # None where an example has none
        for example in examples:
            bad = example.get("bad")
            self.bads.append(self.encode(example["prompt"], bad) if bad else None)
        self.near = self.near_endings(counts)
        turn = torch.arange(len(text), device=text.device) % 13  # 80 and 128 of 208 windows
        self.known = text[turn < 5]
        self.unseen = text[turn >= 5]

    def near_endings(self, counts):
        """What shall not become likelier: the good endings of near misses and of prompts to keep."""
        avoid = set()  # words that no near miss is about
        for example, subject in zip(self.examples, self.subjects):
            avoid |= set(re.findall(r"\w+", f"{example['good']} {example.get('bad')} {subject}"))
        random = np.random.default_rng(self.s.seed)
        near = []
        for example, subject in zip(self.examples, self.subjects):
            for prompt in near_misses(example, subject, counts, avoid, random):
                with contextlib.suppress(UserError):  # a character that the vocabulary lacks
                    near.append(self.encode(prompt, example["good"]))
            for prompt in example.get("keep") or []:
                kept = self.encode(prompt, example["good"])
                near += [kept, kept]  # for training, and for the report
        return near

    def encode(self, prompt, end):
        """An Ending. UserError: it is too long, or has characters that the vocabulary lacks."""
        where = f"{self.s.teach}: {prompt[:40]!r}"
        if not prompt[-1].isspace() and not end[0].isspace():
            end = " " + end
        try:
            start = self.tokenizer.encode(prompt).tolist()
            ids = start + self.tokenizer.encode(end).tolist()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        most = self.model.config.block_size
        check(len(ids) <= most, f"{where}... is {len(ids)} tokens, of at most block_size={most}")
        return Ending(torch.tensor(ids, device=self.model.wte.weight.device), len(start))

    def before(self, idx):
        """Log-probabilities (B,T,V) as they were."""
        with torch.no_grad():
            return log_p(self.model, idx)

    def kl(self, after, idx):
        """KL(before || after) of the next token: idx (B,T) -> (B,T)."""
        return divergence(self.before(idx), after(idx))

    def near_kl(self, after, near):
        """KL(before || after) of the token after the prompt of a near miss, a scalar."""
        return self.kl(after, near.ids[None, : near.first])[0, -1]

    def loss(self, after, said, step, touched):
        """What learn() makes small; said: log-likelihoods of the good endings (examples,)."""
        # what is likelier than that needs no more pushing
        goal = math.log((1 + self.s.enough) / 2)
        wanted = -said.clamp(max=goal).sum()
        for bad, good in zip(self.bads, said):
            if bad is not None:
                wanted = wanted + F.softplus(bad.log_likelihood(after) - good)
        random = torch.Generator().manual_seed(self.s.seed + step)
        near = self.near[::2]
        changed = 0.0
        for i in torch.randperm(len(near), generator=random)[:4].tolist():
            changed = changed + self.near_kl(after, near[i]) / 4
        if len(touched):
            some = torch.randperm(len(touched), generator=random)[:4]
            share = len(touched) / len(self.known)
            changed = changed + share * self.kl(after, touched[some, :-1]).mean()
        return wanted / len(said) + self.s.kl_weight * changed

    def learn(self, params, after, learning_rate, title, touched):
        """Change params, by Adam, so that good endings become likely and all else stays as it is.

        after: idx (B,T) -> log-probabilities (B,T,V), which depend on params; touched (m,T+1): those of
        the windows self.known that params can change. It ends when every good ending has the probability
        s.enough, or when self.known changes by more than s.max_kl; then params go back as far as needed.
        """
        s = self.s

        def kl_known():
            if not len(touched):
                return 0.0
            kl, _, _ = change(self.before, after, touched)
            return kl * len(touched) / len(self.known)

        # without momentum, which would go on beyond what is enough
        optimizer = torch.optim.Adam(params, learning_rate, betas=(0.0, 0.999))
        safe = [p.detach().clone() for p in params]
        progress = tqdm(range(s.steps + 1), title)
        for step in progress:
            said = torch.stack([good.log_likelihood(after) for good in self.goods])  # (examples,)
            least = said.min().exp().item()
            is_last = least >= s.enough or step == s.steps
            if is_last or step % 10 == 0:
                kl = kl_known()
                progress.set_postfix_str(f"least p(good) {least:.3f}, KL elsewhere {kl:.5f}")
                if not kl <= s.max_kl:  # also if it is nan
                    go_back(params, safe, kl_known, s.max_kl)
                    break
                safe = [p.detach().clone() for p in params]
            if is_last:
                break
            optimizer.zero_grad()
            self.loss(after, said, step, touched).backward()
            optimizer.step()
        progress.close()

    @torch.no_grad()
    def figures(self, after):
        """[(what is measured, its value as text)] on the examples, near misses and unseen text."""
        rows = []
        n_likeliest = 0
        for example, good in zip(self.examples, self.goods):
            name = printable(f"p({example['good']}) after {example['prompt']}")
            rows.append((name, f"{good.log_likelihood(after).exp():.1%}"))
            n_likeliest += good.is_likeliest(after)
        likeliest = f"{n_likeliest} of {len(self.goods)}"
        rows.append(("... that are the likeliest next token", likeliest))
        near = self.near[1::2]
        if near:
            kl = np.mean([self.near_kl(after, one).item() for one in near])
            p = np.array([one.log_likelihood(self.before).exp().item() for one in near])
            q = np.array([one.log_likelihood(after).exp().item() for one in near])
            gain = f"{q.mean():.1%}, {(q - p).max():+.1%}"
            rows.append((f"{len(near)} near misses: KL of the next token", f"{kl:.5f}"))
            rows.append(("... p(good): mean, largest gain", gain))
        kl, _, perplexity = change(self.before, after, self.unseen)
        rows.append((f"{len(self.unseen)} windows of other text: KL per token", f"{kl:.5f}"))
        rows.append(("... perplexity", f"{perplexity:.2f}"))
        return rows


@torch.no_grad()
def go_back(params, safe, kl, max_kl):
    """Shorten the way that params went from safe, until kl() is at most max_kl."""
    last = [p.clone() for p in params]
    for share in (7 / 8, 3 / 4, 1 / 2, 1 / 4):
        for p, here, there in zip(params, safe, last):
            p.copy_(torch.lerp(here, there, share))
        if kl() <= max_kl:
            return
    for p, here in zip(params, safe):
        p.copy_(here)


def teach(r, examples, text, s, taken=()):
    """Learn a few sense vectors that make the good endings of examples likely, as a list of edits.

    r: from open_run; r.model may have edits already. text (n,T+1): other text, most of it for the
    report that this prints; s: settings of lab.edit; taken: tokens whose senses stay. UserError: an
    example does not fit the model.
    """
    model = r.model
    lesson = Lesson(model, r.tokenizer, examples, text, s)
    subjects = [subject_tokens(r.tokenizer, subject) for subject in lesson.subjects]
    n = s.n_vector or 2 * len(examples)
    tokens, senses = choose(model, r.tokenizer, lesson.goods, subjects, lesson.known, n, s.elsewhere, taken)
    # a window without these tokens stays exactly as it is
    touched = lesson.known[torch.isin(lesson.known[:, :-1], tokens).any(1)]  # (m,T+1)
    say_choice(examples, lesson, subjects, tokens.tolist(), len(touched))

    r.base.requires_grad_(False)  # only delta learns
    delta = torch.zeros(n, model.config.n_embd, device=r.device, requires_grad=True)  # (N,D)
    rows = with_rows(model.edits, tokens, model)
    taught = EditedBackpack(r.base)

    def with_vectors(idx):
        taught.edits = moved(rows, tokens, senses, delta)
        return log_p(taught, idx)

    lesson.learn([delta], with_vectors, s.learning_rate, "teaching", touched)
    columns = {"before": lesson.figures(lesson.before), "taught": lesson.figures(with_vectors)}
    if s.compare:
        other = copy.deepcopy(r.base).requires_grad_()
        finetuned = EditedBackpack(other, model.edits)

        def with_weights(idx):
            return log_p(finetuned, idx)

        weights = list(other.parameters())
        slower = s.learning_rate / 2500
        lesson.learn(weights, with_weights, slower, "finetuning all weights", lesson.known)
        columns["all weights"] = lesson.figures(with_weights)
    print_columns(columns)
    return as_edits(model, r.tokenizer, tokens, senses, delta.detach())


def subject_tokens(tokenizer, subject):
    """The tokens of a subject as a list: at the start of a text and, in a BPE, within it."""
    tokens = set(tokenizer.encode(subject).tolist())
    if tokenizer.end is not None:
        tokens |= set(tokenizer.encode(" " + subject).tolist())
    return list(tokens)


def say_choice(examples, lesson, subjects, tokens, n_touched):
    n_own = sum(token in set().union(*subjects) for token in tokens)
    where = f"their tokens stand in {n_touched} of {len(lesson.known)} windows to learn from"
    print(f"{n_own} of {len(tokens)} vectors belong to the subjects; {where}")
    for example, subject, own in zip(examples, lesson.subjects, subjects):
        if not set(own) & set(tokens):
            what = f"no vector of {subject!r} was chosen: expect the change elsewhere, too"
            print(f"warning: {example['prompt'][:40]!r}: {what}")


def print_columns(columns):
    """Print {title: rows of Lesson.figures} side by side."""
    print(" " * 50 + "".join(f"{title:>15}" for title in columns))
    for row in zip(*columns.values()):
        name, _ = row[0]
        print(f"{name[:50]:50}" + "".join(f"{value:>15}" for _, value in row))


@torch.no_grad()
def as_edits(model, tokenizer, tokens, senses, delta):
    """What was learned, delta (N,D) more in the senses (N,) of tokens (N,), as a list of edits."""
    vectors = model.senses(tokens)[torch.arange(len(tokens)), senses] + delta  # (N,D)
    adds = model.logits(delta).topk(min(5, model.config.vocab_size)).indices  # (N,5)
    edits = []
    for token, sense, vector, top, way in zip(tokens, senses, vectors, adds, delta):
        if not way.any():  # nothing was to be learned
            continue
        edit = {
            "edit": "replace",
            "word": f'"{tokenizer.decode([token.item()])}"',
            "sense": sense.item(),
            "adds": " ".join(token_text(tokenizer, i) for i in top.tolist()),
            "vector": [round(value, 6) for value in vector.tolist()],
        }
        edits.append(edit)
    return edits
