"""What scale, replace and topic edits do that nobody chose: python -m lab.experiments --rates.

Places and words are drawn as for swaps (lab/unchosen.py): WORD is the token that says most of FROM, the
likeliest next token of a place. SENSE is the sense of WORD that says most of it there.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from configurator import check
from lab.change import divergence, log_p, next_p, validation_tokens
from lab.control import STRENGTHS, EditedBackpack
from lab.edits import make_edits
from lab.files import read_json
from lab.senses import directions
from lab.unchosen import N_WINDOW, Judge, Text, draw_swaps, line, name, show_kl, some
from lab.words import word_ids, word_tokens

N_TEXT = 8  # texts that topics are measured on
N_TOKEN = 64  # the length of each


class Case(NamedTuple):
    """What one edit did at its place."""

    factor: float  # probability of the token in question after the edit, divided by that before
    rank: int  # of that token after the edit; 0: the likeliest
    error: float  # of the change of its logit, beside the product of the weight and the vectors, in logits
    stays: bool  # text without the word is the same
    kl: float  # at or after the word
    kl_random: float  # in random windows


def loudest(judge):
    """The sense of the judge's word that says most of FROM in the place."""
    model = judge.r.base
    e = model.wte.weight[judge.swap.old]  # (D,)
    said = model.senses(judge.tokens) @ e  # (ids,K)
    parts = torch.einsum("ki,ik->k", judge.place.a[0], said)  # (K,)
    return parts.argmax().item()


def case(judge, edit, token):
    """What an edit does to the probability of a token, as a Case."""
    model = judge.r.base
    edited = EditedBackpack(model, make_edits(model, judge.r.tokenizer, [edit]))
    result = judge.result(edit)
    before = next_p(model, judge.idx)  # (V,)
    after = next_p(edited, judge.idx)  # (V,)
    # what the formula says: the sum over senses of weight times the change of the vector
    moved = edited.senses(judge.tokens) - model.senses(judge.tokens)  # (ids,K,D)
    said = moved @ model.wte.weight[token]  # (ids,K)
    expected = torch.einsum("ki,ik->", judge.place.a[0], said)
    logits = []
    for one in (model, edited):
        all_logits, _ = one(judge.idx[None])  # (1,T,V)
        logits.append(all_logits[0, -1, token])
    error = (logits[1] - logits[0] - expected).abs()
    return Case(
        factor=(after[token] / before[token]).item(),
        rank=(after > after[token]).sum().item(),
        error=error.item(),
        stays=result.stays,
        kl=result.kl,
        kl_random=result.kl_random,
    )


def rates(r, s):
    """Print how often scale, replace and topic edits do what they say."""
    check(r.tokenizer.end is not None, "--rates needs a dataset whose documents end with a token")
    text = Text(r, validation_tokens(r, s.dataset, s.data_dir))
    rng = np.random.default_rng(s.seed)
    places = draw_swaps(r, text, s.n_swap, rng)
    check(places, "--rates found no word with a probability of 0.3 or more in the validation text")
    words = word_tokens(r.tokenizer, r.base.config.vocab_size)
    random_windows = some(range(len(text.x)), N_WINDOW, rng)
    scaled = []
    replaced = []
    for place in tqdm(places, "places", leave=False):
        judge = Judge(r, text, place, random_windows, rng)
        edit = {"word": name(r.tokenizer, place.word), "sense": loudest(judge)}
        scaled.append(case(judge, edit | {"edit": "scale", "factor": 0.0}, place.old))
        by = rng.choice(words).item()
        by_sense = rng.integers(r.base.config.n_sense).item()
        raised = r.base.logits(r.base.senses(torch.tensor(by, device=r.device))[by_sense]).argmax().item()
        edit |= {"edit": "replace", "by": name(r.tokenizer, by), "by_sense": by_sense}
        replaced.append(case(judge, edit, raised))
    print(f"{len(places)} random places of {len(text.x)} windows, seed {s.seed}")
    show_cases("scale WORD SENSE 0: FROM", scaled, less=True)
    show_cases("replace WORD SENSE by a random sense of a random word: what that raises most", replaced)
    show_topics(r, s, text, words, rng)


def show_cases(title, cases, less=False):
    """Print the rates of some Cases, one a line; less: whether the token shall become less likely."""
    factors = np.array([case.factor for case in cases])
    ranks = np.array([case.rank for case in cases])
    print(f"\n{title}")
    if less:
        line("is less likely", f"{np.mean(factors < 1):.1%}")
        line("loses half", f"{np.mean(factors <= 0.5):.1%}")
        line("is not the likeliest any more", f"{np.mean(ranks > 0):.1%}")
    else:
        line("is likelier", f"{np.mean(factors > 1):.1%}")
        line("is twice as likely", f"{np.mean(factors >= 2):.1%}")
        line("is one of the ten likeliest", f"{np.mean(ranks < 10):.1%}")
        line("is the likeliest", f"{np.mean(ranks == 0):.1%}")
    low, middle, high = np.quantile(factors, (0.1, 0.5, 0.9))
    line("its probability, times", f"{middle:.3g}", f"median; 10% and 90%: {low:.2g}, {high:.3g}")
    line("its logit is as the formula says", f"{max(case.error for case in cases):.5f}", "largest error")
    line("text without the word is unchanged", f"{np.mean([case.stays for case in cases]):.1%}")
    show_kl(cases)


# -----------------------------------------------------------------------------
# topics


def random_bags(r, words, n, rng):
    """n bags of five: a random word and the four that are nearest to it."""
    E = directions(r.base)[words]  # (words,D)
    bags = []
    for i in rng.permutation(len(words))[:n]:
        nearest = (E @ E[i]).topk(min(5, len(words))).indices.tolist()
        bags.append([name(r.tokenizer, words[j]) for j in nearest])
    return bags


def show_topics(r, s, text, words, rng):
    """Print how much likelier a topic's words become, by strength, for given and for random bags."""
    topics = read_json(Path(__file__).with_name("stimuli.json"))["topics"]
    starts = rng.permutation(len(text.x))[:N_TEXT].tolist()
    x = text.x[starts, :N_TOKEN]  # (n,T)
    before = log_p(r.base, x)  # (n,T,V)
    for title, bags in [
        (f"the {len(topics)} topics of lab/stimuli.json", list(topics.values())),
        (f"{len(topics)} random words, each with the four nearest", random_bags(r, words, len(topics), rng)),
    ]:
        print(f"\ntopics: {title}")
        print("strength   likelier in   times: median, lowest, highest   share before   after   KL")
        for strength in STRENGTHS:
            rows = []
            for bag in tqdm(bags, f"strength {strength}", leave=False):
                ids = sorted({word_ids(r.tokenizer, word)[0] for word in bag})
                edit = {"edit": "topic", "words": ",".join(bag), "strength": strength}
                edited = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, [edit]))
                after = log_p(edited, x)  # (n,T,V)
                p = before[..., ids].exp().sum(-1).mean().item()
                q = after[..., ids].exp().sum(-1).mean().item()
                rows.append((p, q, divergence(before, after).mean().item()))
            p, q, kl = np.array(rows).T  # (bags,) each
            times = q / p
            figures = f"{np.median(times):8.2f} {times.min():6.2f} {times.max():6.2f}"
            shares = f"{p.mean():14.3%} {q.mean():9.3%}"
            print(f"{strength:8} {(times > 1).sum():6} of {len(bags)}  {figures} {shares} {kl.mean():8.3f}")
