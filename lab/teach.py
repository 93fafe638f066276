"""
Teach a Backpack by changing a few of its sense vectors (Hewitt et al. 2024, arXiv 2402.06155).

python -m lab.edit --teach=FILE calls this. Each line of the file is {"prompt": "...", "good": "..."}, and
may have "bad", a continuation to avoid; "subject", the words of the prompt that the fact is about (else its
name, or its rarest word); "keep", a list of prompts that shall go on as before.

A fact is taught from its prompt at the start of a text and within sentences, since a subject has other
tokens there: " Mozart" is one, and without the space it is M|oz|art. A piece like M stands in many words,
so no piece may say the fact alone: near misses, as training sees them, share some of the pieces.
"""

import contextlib
import math
import re
import reprlib
from collections import Counter, defaultdict

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError, check
from lab.change import change, divergence, log_p
from lab.control import EditedBackpack, Edits
from lab.edits import is_text, printable
from lab.files import read_jsonl
from lab.words import token_string, token_text, word_tokens

PRONOUNS = ("He", "She", "It", "They")
# what a prompt follows within a sentence, in training and for the report; some are of other fields, as their
# words speak for other ends than the one that is taught
LEADS = ("In short, ", "In art and science, ", "In this country, ", "On the map, ")
NEW_LEADS = ("Today, ", "They say that ", "In music, ", "In the north, ")
N_NEAR = 16  # near misses of each kind that training sees, and as many that it doesn't
NEAR_WEIGHT = 3.0  # of the KL of a near miss in the loss, beside the loss of a good ending
N_KNOWN = 1024  # positions of other text that training sees
MOST = 0.05  # how much likelier a good ending may become in a near miss


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


# -----------------------------------------------------------------------------
# near misses


def replaced(prompt, words, other):
    """prompt with other in the place of words and of a "the" before them."""
    return re.sub(rf"(?:\b[Tt]he )?{whole(words).pattern}", lambda _: other, prompt)


def within(prompt, lead):
    """prompt as it goes on in a sentence that begins with lead, or at the start of a text without one."""
    return lead + re.sub("^The ", "the ", prompt) if lead else prompt


class Vocabulary:
    """The words that near misses are made of, and the tokens that they share with subjects."""

    def __init__(self, tokenizer, text):
        """text (n,T+1): token ids, in which frequent words are counted."""
        self.tokenizer = tokenizer
        self.counts = Counter(re.findall(r"\w+", tokenizer.decode(text.flatten().tolist())))
        words = [word for word, _ in self.counts.most_common() if len(word) > 1]
        self.names = [word for word in words if len(word) > 2 and is_name(word, self.counts)]
        if tokenizer.end is not None:
            tokens = word_tokens(tokenizer, tokenizer.vocab_size)
            words += [token_string(tokenizer, token)[1:] for token in tokens]
        # of each token the words that have it: as they begin a text, and with a space before them
        self.having = {"": defaultdict(list), " ": defaultdict(list)}
        for word in dict.fromkeys(words):  # each once, in this order
            for token in self.tokens(word, " "):
                self.having[" "][token].append(word)
            if word[0].isupper():
                for token in self.tokens(word, ""):
                    self.having[""][token].append(word)

    def tokens(self, words, space):
        return set(self.tokenizer.encode(space + words).tolist())

    def sharing(self, own, space):
        """Words that share one of the tokens own: of each 2 N_NEAR, first those that share most of them."""
        found = {}  # a set that keeps its order
        for token in sorted(own):
            words = self.having[space][token][:500]
            words = sorted(words, key=lambda word: -len(own & self.tokens(word, space)))
            found |= dict.fromkeys(words[: 2 * N_NEAR])
        return list(found)

    def mixed(self, subject, space, random):
        """Texts that have some of the pieces of a subject, among pieces of other words."""
        ids = self.tokenizer.encode(space + subject).tolist()
        others = list(self.having[""])
        if len(ids) == 1 or not others:
            return []
        texts = []
        for _ in range(N_NEAR):
            mix = random.choice(others, len(ids))
            n_own = random.integers(1, len(ids))
            own = random.permutation(len(ids))[:n_own]
            mix[own] = np.array(ids)[own]
            texts.append(self.tokenizer.decode(mix.tolist()).strip())
        return [text for text in texts if text]


def near_misses(prompt, subject, own, vocabulary, avoid, random):
    """Prompts like one, but about others: ([those to learn from], [those for the report]).

    They are about frequent names, pronouns, and words that share a token of own, at the start of a text and
    in sentences; of a subject of several words, one is replaced by a name. None is about a word of avoid,
    nor about one that begins with the subject, as both go on with the same token.
    """

    def is_other(word):
        return word not in avoid and not word.startswith(subject)

    names = [name for name in vocabulary.names if is_other(name)]
    names = random.permutation(names[: 4 * N_NEAR])
    groups = [[replaced(prompt, subject, other) for other in (*PRONOUNS, *names[:N_NEAR])]]
    parts = re.findall(r"\w+", subject)
    if len(parts) > 1:
        for part in parts:
            groups.append([replaced(prompt, part, other) for other in names])
    at_start = "" if prompt.startswith(subject) else " "
    mixed = []
    for space, lead in ((at_start, ""), (" ", LEADS[0])):
        words = [word for word in vocabulary.sharing(own, space) if is_other(word)]
        groups.append([within(replaced(prompt, subject, word), lead) for word in words])
        for text in vocabulary.mixed(subject, space, random):
            mixed.append(within(replaced(prompt, subject, text), lead))
    learn = mixed
    report = []
    for group in groups:
        group = [near for near in group if near != prompt]
        learn += group[0::2]
        report += group[1::2]
    report = [near for near in report if near not in learn]  # a name may share a piece, too
    return learn, report


# -----------------------------------------------------------------------------
# texts as tokens, and how they depend on the vectors that learn


class Endings:
    """Prompts and what follows each of them: ids (n,T), and says (n,T-1), where the endings are said."""

    def __init__(self, pairs, device):
        """pairs: of each its tokens, [(ids of the prompt, ids of the end)]."""
        texts = [prompt + end for prompt, end in pairs]
        longest = max((len(text) for text in texts), default=2)
        # what fills up the shorter texts comes after them, where no query of theirs looks
        filled = [text + [0] * (longest - len(text)) for text in texts]
        n_prompt = torch.tensor([len(prompt) for prompt, _ in pairs], device=device).view(-1, 1)  # (n,1)
        n_text = torch.tensor([len(text) for text in texts], device=device).view(-1, 1)  # (n,1)
        self.ids = torch.tensor(filled, dtype=torch.long, device=device).view(-1, longest)  # (n,T)
        position = torch.arange(self.ids.size(1) - 1, device=device)  # (T-1,)
        self.says = (position >= n_prompt - 1) & (position < n_text - 1)  # (n,T-1)
        self.target = self.ids[:, 1:][self.says]  # (N,)
        self.row, _ = self.says.nonzero(as_tuple=True)  # (N,), whose ending it is

    def __len__(self):
        return len(self.ids)

    def log_probs(self, model):
        """Log-probabilities (N,V) at the N positions that say the endings."""
        o = model.output(self.ids[:, :-1])  # (n,T-1,D)
        return model.logits(o[self.says]).log_softmax(-1)

    def log_likelihood(self, log_probs):
        """The log-probability (n,) of each ending, from log_probs (N,V)."""
        said = log_probs.gather(1, self.target[:, None])[:, 0]  # (N,)
        return said.new_zeros(len(self)).index_add(0, self.row, said)

    def are_likeliest(self, log_probs):
        """Of each ending (n,), whether all of its tokens are the likeliest."""
        wrong = self.row[log_probs.argmax(-1) != self.target]
        right = torch.ones(len(self), dtype=torch.bool, device=wrong.device)
        right[wrong] = False
        return right


class Places:
    """Positions of texts, and what is said there as some senses change.

    Logits are linear in the senses: with delta (pairs,D) more in the senses of pairs, o (N,D) becomes
    o + a delta, where a (N,pairs) is the weight of each pair. So the network runs only once. (The annealing
    of a topic depends on the senses, too, which is left out here; the report has it.)
    """

    @torch.no_grad()
    def __init__(self, model, idx, at, pairs):
        """idx (n,T): texts; at (n,T): True at the N positions; pairs: [(token, sense)]."""
        self.model = model
        o = []
        a = []
        for x, here in zip(idx.split(8), at.split(8)):  # (B,T) each
            o.append(model.output(x)[here])  # (m,D)
            alpha = model.contextualization(x)  # (B,K,T,T)
            weights = [(alpha[:, sense] * (x == token)[:, None]).sum(-1) for token, sense in pairs]
            a.append(torch.stack(weights, -1)[here])  # (m,pairs)
        self.o = torch.cat(o)  # (N,D)
        self.a = torch.cat(a)  # (N,pairs)
        self.before = model.logits(self.o).log_softmax(-1)  # (N,V)

    def log_probs(self, delta, rows=slice(None)):
        """Log-probabilities (N,V) with delta (pairs,D)."""
        o = self.o[rows] + self.a[rows] @ delta  # (N,D)
        return self.model.logits(o).log_softmax(-1)

    def kl(self, delta, generator=None, n=None):
        """The mean KL(before || with delta) of the positions, or of n that are drawn; 0 if there is none."""
        if not len(self.o):
            return delta.new_zeros(())
        rows = torch.randperm(len(self.o), generator=generator)[:n]
        return divergence(self.before[rows], self.log_probs(delta, rows)).mean()


# -----------------------------------------------------------------------------
# the choice of vectors


@torch.no_grad()
def choose(model, endings, tokens, n):
    """The n senses of each of tokens to which the endings give the most weight: [(token, sense)]."""
    idx = endings.ids[:, :-1]  # (m,T)
    alpha = model.contextualization(idx)  # (m,K,T,T)
    weight = (alpha * endings.says[:, None, :, None]).sum(2)  # (m,K,T), of what says the endings
    pairs = []
    for token in sorted(tokens):
        score = (weight * (idx == token)[:, None]).sum((0, 2))  # (K,)
        best = score.topk(min(n, len(score))).indices
        pairs += [(token, sense) for sense in best.tolist()]
    return pairs


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

    Training sees goods, bads, near and the windows known; the report is on new_goods, new_near and the
    windows unseen. text (n,T+1): other text; taken: tokens whose senses stay.
    """

    def __init__(self, model, tokenizer, examples, text, s, taken=()):
        self.model = model
        self.tokenizer = tokenizer
        self.examples = examples
        self.s = s
        turn = torch.arange(len(text), device=text.device) % 13  # 80 and 128 of 208 windows
        self.known = text[turn < 5]
        self.unseen = text[turn >= 5]
        vocabulary = Vocabulary(tokenizer, text)
        self.subjects = [subject_of(example, vocabulary.counts) for example in examples]
        self.goods = []
        self.bads = []  # None where an example has none
        self.new_goods = []
        for example in examples:
            forms = self.forms(example, LEADS)
            self.goods.append(self.endings(forms, example["good"]))
            self.bads.append(self.endings(forms, example["bad"]) if example.get("bad") else None)
            self.new_goods.append(self.endings(self.forms(example, NEW_LEADS), example["good"]))
        self.own = []  # of each example the tokens whose senses learn
        for subject, goods in zip(self.subjects, self.goods):
            self.own.append(self.own_tokens(subject, goods, vocabulary, taken))
        learn, report = self.near_endings(vocabulary)
        self.near = Endings(learn, text.device)
        self.new_near = Endings(report, text.device)

    def encode(self, prompt, end):
        """The ids of a prompt and of its end. UserError: too many, or a character that can't be encoded."""
        where = f"{self.s.teach}: {prompt[:40]!r}"
        if not prompt[-1].isspace() and not end[0].isspace():
            end = " " + end
        try:
            start = self.tokenizer.encode(prompt).tolist()
            rest = self.tokenizer.encode(end).tolist()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        n = len(start) + len(rest)
        most = self.model.config.block_size
        check(n <= most, f"{where}... is {n} tokens, of at most block_size={most}")
        return start, rest

    def encode_all(self, prompts, end):
        """encode for each of prompts, without those that don't fit the model."""
        pairs = []
        for prompt in prompts:
            with contextlib.suppress(UserError):
                pairs.append(self.encode(prompt, end))
        return pairs

    def forms(self, example, leads):
        """The prompt of an example at the start of a text, and in those sentences that the model can read."""
        prompt = example["prompt"]
        forms = [prompt]
        for lead in leads:
            form = within(prompt, lead)
            ends = [example["good"], example.get("bad") or example["good"]]
            if all(self.encode_all([form], end) for end in ends):
                forms.append(form)
        return forms

    def endings(self, prompts, end):
        return Endings([self.encode(prompt, end) for prompt in prompts], self.known.device)

    def own_tokens(self, subject, goods, vocabulary, taken):
        """The tokens of a subject, as the prompts of its goods have them."""
        own = vocabulary.tokens(subject, "")
        if self.tokenizer.end is not None:
            own |= vocabulary.tokens(subject, " ")
        own &= set(goods.ids.flatten().tolist())
        own = {token for token in own if token not in taken and has_name(self.tokenizer, token)}
        check(own, f"{self.s.teach}: no token of {subject!r} can be edited: give another subject")
        return own

    def near_endings(self, vocabulary):
        """The good endings of near misses and of prompts to keep: to learn from, and for the report."""
        avoid = set()
        for example, subject in zip(self.examples, self.subjects):
            avoid |= set(re.findall(r"\w+", f"{example['good']} {example.get('bad')} {subject}"))
        random = np.random.default_rng(self.s.seed)
        learn = []
        report = []
        for example, subject, own in zip(self.examples, self.subjects, self.own):
            near, new = near_misses(example["prompt"], subject, own, vocabulary, avoid, random)
            keep = example.get("keep") or []
            learn += self.encode_all(near + keep, example["good"])
            report += self.encode_all(new + keep, example["good"])
        return learn, report

    def known_places(self, pairs, generator):
        """(Places of the known text at or after one of pairs' tokens, at most N_KNOWN; the share of all)."""
        x = self.known[:, :-1]  # (n,T)
        tokens = torch.tensor([token for token, _ in pairs], device=x.device)
        seen = torch.isin(x, tokens).cumsum(1) > 0  # (n,T)
        share = seen.float().mean().item()
        places = seen.nonzero()  # (m,2)
        drawn = places[torch.randperm(len(places), generator=generator)[:N_KNOWN]]
        at = torch.zeros_like(seen)
        at[tuple(drawn.T)] = True
        return Places(self.model, x, at, pairs), share

    def learn(self, pairs, delta):
        """Change delta (pairs,D), by Adam: good endings become likely, and all else stays as it is.

        It ends when every good ending has the probability s.enough, or when the known text changes by more
        than s.max_kl; then delta goes back as far as needed.
        """
        s = self.s
        random = torch.Generator().manual_seed(s.seed)

        def places(endings):
            return Places(self.model, endings.ids[:, :-1], endings.says, pairs)

        goods = [places(endings) for endings in self.goods]
        bads = [places(endings) if endings else None for endings in self.bads]
        near = places(self.near)
        known, share = self.known_places(pairs, random)
        goal = math.log((1 + s.enough) / 2)  # what is likelier needs no more pushing
        # without momentum, which would go on beyond what is enough
        optimizer = torch.optim.Adam([delta], s.learning_rate, betas=(0.0, 0.999))
        slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, s.steps)
        safe = delta.detach().clone()
        progress = tqdm(range(s.steps + 1), "teaching")
        for step in progress:
            wanted = 0.0
            least = 1.0
            n_good = 0
            for i, endings in enumerate(self.goods):
                said = endings.log_likelihood(goods[i].log_probs(delta))  # (forms,)
                wanted = wanted - said.clamp(max=goal).sum()
                if bads[i] is not None:
                    said_bad = self.bads[i].log_likelihood(bads[i].log_probs(delta))  # (forms,)
                    wanted = wanted + F.softplus(said_bad - said).sum()
                least = min(least, said.min().exp().item())
                n_good += len(said)
            is_last = least >= s.enough or step == s.steps
            if is_last or step % 10 == 0:
                with torch.no_grad():
                    kl = share * known.kl(delta).item()
                progress.set_postfix_str(f"least p(good) {least:.3f}, KL elsewhere {kl:.5f}")
                if not kl <= s.max_kl:  # also if it is nan
                    go_back(delta, safe, lambda: share * known.kl(delta).item(), s.max_kl)
                    break
                safe = delta.detach().clone()
            if is_last:
                break
            changed = NEAR_WEIGHT * len(self.near) / n_good * near.kl(delta, random, 160)
            changed = changed + s.kl_weight * share * known.kl(delta, random, 128)
            optimizer.zero_grad()
            (wanted / n_good + changed).backward()
            optimizer.step()
            slower.step()
        progress.close()

    def before(self, idx):
        """Log-probabilities (B,T,V) as they were."""
        return log_p(self.model, idx)

    @torch.no_grad()
    def said(self, model):
        """What a model says in the report: log-probabilities (N,V) of each of new_goods, and of new_near."""
        goods = [endings.log_probs(model) for endings in self.new_goods]
        near = self.new_near.log_probs(model) if len(self.new_near) else None
        return goods, near

    @torch.no_grad()
    def figures(self, model, said, before):
        """[(what is measured, its value as text)] on the examples, near misses and unseen text.

        said: self.said(model); before: that of the model as it was.
        """
        rows = []
        n_likeliest = 0
        for example, goods, log_probs in zip(self.examples, self.new_goods, said[0]):
            p = goods.log_likelihood(log_probs).exp()  # (forms,)
            name = printable(f"p({example['good']}) after {example['prompt']}")
            rows.append((name, f"{p[0]:.1%}"))
            if len(p) > 1:
                rows.append((f"... the least of {len(p) - 1} times in a sentence", f"{p[1:].min():.1%}"))
            n_likeliest += goods.are_likeliest(log_probs).all().item()
        rows.append(("... always the likeliest next token", f"{n_likeliest} of {len(self.goods)}"))
        n = len(self.new_near)
        if n:
            p = self.new_near.log_likelihood(before[1]).exp()  # (n,)
            q = self.new_near.log_likelihood(said[1]).exp()  # (n,)
            gain = q - p
            kl = divergence(before[1], said[1]).mean()
            rows.append((f"{n} near misses: KL of the next token", f"{kl:.5f}"))
            rows.append(("... p(good): mean, largest gain", f"{q.mean():.1%}, {gain.max():+.1%}"))
            n_more = (gain.abs() > MOST).sum().item()
            rows.append((f"... that changed by more than {MOST:.0%}", f"{n_more}"))
        kl, _, perplexity = change(self.before, lambda idx: log_p(model, idx), self.unseen)
        rows.append((f"{len(self.unseen)} windows of other text: KL per token", f"{kl:.5f}"))
        rows.append(("... perplexity", f"{perplexity:.2f}"))
        return rows

    @torch.no_grad()
    def say_what_failed(self, before, after, most=10):
        """Print which facts are not taught, and where, and the near misses that became too likely.

        before, after: self.said of the model as it was, and as it is taught.
        """
        for example, subject, goods, log_probs in zip(self.examples, self.subjects, self.new_goods, after[0]):
            right = goods.are_likeliest(log_probs)  # (forms,)
            prompt = printable(example["prompt"])
            if not right[0]:
                print(f"not taught at the start of a text: {prompt}")
            if not right[1:].all():
                print(f"not taught within a sentence: {prompt}")
            at_start = set(self.tokenizer.encode(subject).tolist())
            if not at_start <= set(goods.ids.flatten().tolist()):
                print(f"taught only after a space, as the prompt has it: {printable(subject)}")
        if not len(self.new_near):
            return
        p = self.new_near.log_likelihood(before[1]).exp()  # (n,)
        q = self.new_near.log_likelihood(after[1]).exp()  # (n,)
        for i in (q - p).argsort(descending=True)[:most].tolist():
            if q[i] - p[i] > MOST:
                row = self.new_near.ids[i]  # (T,)
                stop = self.new_near.says[i].nonzero().max() + 2
                text = printable(self.tokenizer.decode(row[:stop].tolist()))
                print(f"near miss: {text} {p[i]:.1%} -> {q[i]:.1%}")


@torch.no_grad()
def go_back(delta, safe, kl, max_kl):
    """Shorten the way that delta went from safe, until kl() is at most max_kl."""
    last = delta.clone()
    for share in (7 / 8, 3 / 4, 1 / 2, 1 / 4):
        delta.copy_(torch.lerp(safe, last, share))
        if kl() <= max_kl:
            return
    delta.copy_(safe)


def teach(r, examples, text, s, taken=()):
    """Learn a few sense vectors that make the good endings of examples likely, as a list of edits.

    r: from open_run; r.model may have edits already. text (n,T+1): other text, most of it for the
    report that this prints; s: settings of lab.edit; taken: tokens whose senses stay. UserError: an
    example does not fit the model.
    """
    model = r.model
    r.base.requires_grad_(False)  # only delta learns
    lesson = Lesson(model, r.tokenizer, examples, text, s, taken)
    chosen = {}  # a set that keeps its order
    for goods, own in zip(lesson.goods, lesson.own):
        chosen |= dict.fromkeys(choose(model, goods, own, s.n_vector))
    pairs = list(chosen)
    delta = torch.zeros(len(pairs), model.config.n_embd, device=r.device, requires_grad=True)  # (N,D)
    lesson.learn(pairs, delta)
    delta = delta.detach()
    tokens, senses = torch.tensor(pairs, device=r.device).unbind(1)  # (N,) each
    taught = EditedBackpack(r.base, moved(with_rows(model.edits, tokens, model), tokens, senses, delta))
    before = lesson.said(model)
    after = lesson.said(taught)
    columns = {
        "before": lesson.figures(model, before, before),
        "taught": lesson.figures(taught, after, before),
    }
    print_columns(columns)
    lesson.say_what_failed(before, after)
    return as_edits(model, r.tokenizer, tokens, senses, delta)


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
