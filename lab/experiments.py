"""
The paper's experiments for the run at hand, as the paper's tables with 95% bootstrap intervals.

    python -m lab.experiments --lexical=FOLDER    word similarity (table 4): FOLDER has SimLex-999.txt,
                                                  SimVerb-3500.txt, RG65.csv and WS353.csv
    python -m lab.experiments --bias              he or she after a profession (section 6.2)
    python -m lab.experiments --topics            text about a topic (6.1)
    python -m lab.experiments --damage=edits.json what the first 1, 10, 100 edits do to other text
    python -m lab.experiments --swaps             what swaps of words do that nobody chose
    python -m lab.experiments --rates             how often scale, replace and topic edits do what they say
    python -m lab.experiments --showpieces        words whose next token a swap can turn, and how far
    python -m lab.experiments --words             word perplexity, each document by itself

This is the newest run in out/ unless --run=FOLDER says otherwise; --words also takes a Transformer.
--words, --swaps, --rates and --showpieces need a dataset. A difference within the intervals is none, and
small models say nothing about large ones.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configurator import check, configure, run
from lab.change import damage, other_text, validation_tokens
from lab.control import MARGIN, STRENGTHS, EditedBackpack
from lab.edits import make_edits, read_edits
from lab.files import read_json, read_text
from lab.rates import rates
from lab.run import open_run
from lab.senses import word_senses
from lab.showpieces import showpieces
from lab.unchosen import unchosen
from lab.words import word_id, word_ids
from sample import prompt
from tokenizer import require
from train import get_batch

STIMULI = Path(__file__).parent / "stimuli.json"  # ours, in the paper's form


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    lexical: str | None = None  # a folder with word similarity sets
    bias: bool = False  # he or she after a profession
    topics: bool = False  # generation about topics
    damage: str | None = None  # a JSON file of edits
    swaps: bool = False  # swaps of words that nobody chose, at random places of validation text
    rates: bool = False  # scale, replace and topic edits of words that nobody chose
    showpieces: bool = False  # swaps that go far, from the first words of validation documents
    words: bool = False  # word perplexity, each document by itself
    prompts: str | None = None  # with bias or topics: a file of your own, like lab/stimuli.json
    transformer: str | None = None  # with bias: a run with n_sense=0, also with this tokenizer
    n_swap: int = 200  # with swaps or rates: how many places to draw
    margin: float = MARGIN  # with swaps: of the swap that is not the paper's
    top: int = 10  # with showpieces: how many to show
    num_samples: int = 20  # with topics or showpieces: texts for each strength, or swap
    max_new_tokens: int = 100  # with topics: their length
    n_bootstrap: int = 1000  # with lexical, bias or topics: samples for the intervals
    dataset: str | None = None  # whose val.bin is read; None: the run's dataset
    data_dir: str = "data"  # where datasets lie
    seed: int = 1337  # of all that is drawn
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N


def interval(values):
    """'[low, high]': 95% of bootstrapped values lie between."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"[{low:.2f}, {high:.2f}]"


def mean_interval(values, s):
    """'mean [low, high]' of numbers, one for each profession or topic."""
    values = np.asarray(values)
    random = np.random.default_rng(s.seed)
    samples = random.integers(len(values), size=(s.n_bootstrap, len(values)))
    return f"{values.mean():6.2f} {interval(values[samples].mean(1))}"


# -----------------------------------------------------------------------------
# word similarity


SETS = {  # of each file the separator, and the columns of the two words and of the score that people gave
    "SimLex-999.txt": ("\t", (0, 1, 3)),
    "SimVerb-3500.txt": ("\t", (0, 1, 3)),
    "RG65.csv": (";", (0, 1, 2)),
    "WS353.csv": (",", (0, 1, 2)),
}


def correlation(x, y):
    """Pearson's correlation of x and y (...,n) over the last axis; of ranks it is Spearman's."""
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / norms


def read_pairs(path, separator, columns):
    """[(word, word, score)] of a word similarity set. UserError: a line has no two words and a score."""
    pairs = []
    for number, line in enumerate(read_text(path).strip().split("\n"), 1):
        if number == 1 and line.lower().startswith("word"):  # the names of the columns
            continue
        cells = [cell.strip() for cell in line.split(separator)]
        try:
            first, second, score = [cells[column] for column in columns]
            pairs.append((first, second, float(score)))
        except (IndexError, ValueError):
            check(False, f"{path}, line {number}: {line[:60]!r} is not two words and a score")
    return pairs


def lexical(r, s):
    """Spearman's correlation of people's scores with cosines of senses and of embeddings (table 4)."""
    require("scipy", "--lexical")  # before it begins
    E = r.base.wte.weight
    for file, (separator, columns) in SETS.items():
        pairs = read_pairs(Path(s.lexical) / file, separator, columns)
        scores = np.array([score for _, _, score in pairs])
        of_senses = []
        of_embeddings = []
        is_single = []  # whether both words are one token
        for first, second, _ in pairs:
            a = word_ids(r.tokenizer, first)
            b = word_ids(r.tokenizer, second)
            C_a = word_senses(r.base, r.tokenizer, first)  # (K,D)
            C_b = word_senses(r.base, r.tokenizer, second)  # (K,D)
            e_a = E[a].mean(0)  # (D,)
            e_b = E[b].mean(0)  # (D,)
            of_senses.append(F.cosine_similarity(C_a, C_b, dim=-1))  # (K,)
            of_embeddings.append(F.cosine_similarity(e_a, e_b, dim=0))
            is_single.append(len(a) == len(b) == 1)
        cosines = torch.stack(of_senses).cpu().numpy()  # (pairs,K)
        methods = {f"sense {l}": cosines[:, l] for l in range(cosines.shape[1])}
        methods["minimum"] = cosines.min(1)
        methods["mean"] = cosines.mean(1)
        methods["embedding"] = torch.stack(of_embeddings).cpu().numpy()
        compare(f"{file}, all {len(pairs)} pairs", methods, scores, s)
        single = np.array(is_single)
        methods = {name: values[single] for name, values in methods.items()}
        title = f"{file}, {single.sum()} of words of one token"
        compare(title, methods, scores[single], s)


def compare(title, methods, scores, s):
    """Print the correlation of each method's values (n,) with scores (n,), and the gain on embeddings."""
    rankdata = require("scipy.stats", "--lexical").rankdata
    n = len(scores)
    if n < 20:
        print(f"\n{title}: too few")
        return
    print(f"\n{title}")
    # the same samples for all methods; ranks are taken once, not in every sample
    samples = np.random.default_rng(s.seed).integers(n, size=(s.n_bootstrap, n))
    gold = rankdata(scores)
    rho = {}
    again = {}
    for name, values in methods.items():
        ranks = rankdata(values)
        rho[name] = correlation(ranks, gold)
        again[name] = correlation(ranks[samples], gold[samples])  # (n_bootstrap,)
        print(f"{name:10} {rho[name]:5.2f} {interval(again[name])}")
    best = max((name for name in methods if name.startswith("sense")), key=rho.get)
    for name in (best, "minimum"):
        gain = rho[name] - rho["embedding"]
        gains = interval(again[name] - again["embedding"])
        print(f"{name} over the embedding: {gain:+.2f} {gains}")


# -----------------------------------------------------------------------------
# he or she


def read_stimuli(path):
    """Professions, prompts and topics: those of stimuli.json, or of a file, for as far as it has them."""
    stimuli = read_json(STIMULI)
    given = read_json(path) if path else {}
    check(isinstance(given, dict), f"{path}: expected an object like lab/stimuli.json")
    for key, ours in stimuli.items():
        value = given.get(key) or ours
        check(type(value) is type(ours), f"{path}: {key} is not as in lab/stimuli.json")
        lists = value.values() if key == "topics" else [value]
        for texts in lists:
            fine = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
            check(fine, f"{path}: {key} is not as in lab/stimuli.json, a list of texts")
        stimuli[key] = value
    return stimuli


def he_she(model, tokenizer, prompts, nouns):
    """max(p(he)/p(she), p(she)/p(he)) after each prompt with each noun: (nouns, prompts)."""
    he = word_id(tokenizer, "he")
    she = word_id(tokenizer, "she")
    device = model.wte.weight.device
    most = model.config.block_size
    texts = []  # (T,) each
    for noun in nouns:
        for text in prompts:
            ids = tokenizer.encode(text.replace("PROFESSION", noun))
            check(0 < len(ids) <= most, f"prompts: {text!r} is {len(ids)} tokens, not 1 to {most}")
            texts.append(torch.tensor(ids, device=device))
    differences = []
    for first in range(0, len(texts), 64):
        part = texts[first : first + 64]
        last = torch.tensor([len(ids) - 1 for ids in part], device=device)  # (B,)
        # what fills up the shorter texts comes after them, where no query of theirs looks
        logits, _ = model(pad_sequence(part, batch_first=True))  # (B,T,V)
        logits = logits[torch.arange(len(part)), last]  # (B,V)
        differences.append(logits[:, he] - logits[:, she])
    return torch.cat(differences).abs().exp().view(len(nouns), len(prompts))


def best_factor(bias):
    """argmin over 0..1 of bias(factor) + |1 - factor|, by Nelder-Mead from 1 (section 6.2)."""
    minimize = require("scipy.optimize", "--bias").minimize
    found = minimize(
        lambda x: bias(x[0]) + abs(1 - x[0]),
        [1.0],
        bounds=[(0, 1)],
        method="Nelder-Mead",
        options={"xatol": 0.02, "fatol": 0.002, "maxfev": 60},
    )
    return found.x[0]


def bias(r, s):
    """Bias of he against she after professions, and with the weight of one sense scaled (section 6.2)."""
    require("scipy", "--bias")  # before it begins
    stimuli = read_stimuli(s.prompts)
    professions = stimuli["professions"]
    nouns = [noun for noun in professions if len(word_ids(r.tokenizer, noun)) == 1]
    check(nouns, f"prompts={s.prompts!r}: found no profession that is one token here")
    fit = stimuli["bias_prompts_fit"]
    judge = stimuli["bias_prompts_evaluate"]
    print(f"{len(nouns)} of {len(professions)} professions are one token: {', '.join(nouns)}")
    print(f"bias: mean of max(p(he)/p(she), p(she)/p(he)) over {len(judge)} prompts; 1: none")

    def show(name, values):
        print(f"{name:44}{mean_interval(values, s)}")

    def scaled(noun, sense, factor, prompts):
        """The bias after a noun, with the weight of one of its senses multiplied."""
        edit = {"edit": "scale", "word": noun, "sense": sense, "factor": float(factor)}
        edited = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, [edit]))
        return he_she(edited, r.tokenizer, prompts, [noun]).mean().item()

    show("as it is", he_she(r.base, r.tokenizer, judge, nouns).mean(1).tolist())
    at_zero = []  # of each sense
    for l in tqdm(range(r.base.config.n_sense), "senses", leave=False):
        at_zero.append(np.mean([scaled(noun, l, 0.0, fit) for noun in nouns]))
    sense = int(np.argmin(at_zero))
    factors = []  # of each noun
    for noun in tqdm(nouns, "factors", leave=False):
        factors.append(best_factor(lambda factor, noun=noun: scaled(noun, sense, factor, fit)))
    name = f"sense {sense} (best on the prompts to fit), factor 0"
    show(name, [scaled(noun, sense, 0.0, judge) for noun in nouns])
    best = [scaled(noun, sense, factor, judge) for noun, factor in zip(nouns, factors)]
    show(f"sense {sense}, the best factor of each", best)
    pairs = [f"{noun} {factor:.2f}" for noun, factor in zip(nouns, factors)]
    print(f"factors: {', '.join(pairs)}")
    if s.transformer:
        transformer_bias(s, r.tokenizer, nouns, fit, judge, show)


def transformer_bias(s, tokenizer, nouns, fit, judge, show):
    """The baseline: in a Transformer, change the noun's embedding along E_she - E_he."""
    r = open_run(s.transformer, s.device, senses=False)
    same = r.tokenizer.spec == tokenizer.spec
    check(same, f"{r.path} has another vocabulary than the Backpack")
    E = r.base.wte.weight
    along = E[word_id(tokenizer, "she")] - E[word_id(tokenizer, "he")]
    along = F.normalize(along, dim=0)  # (D,)

    def projected(noun, factor, prompts):
        """The bias after a noun, with a part of its embedding along she - he taken away."""
        row = E[word_id(tokenizer, noun)]  # a view: what is done to it is done to E
        before = row.clone()
        row -= (1 - factor) * (row @ along) * along
        result = he_she(r.base, tokenizer, prompts, [noun]).mean().item()
        row.copy_(before)
        return result

    show("its Transformer as it is", [projected(noun, 1.0, judge) for noun in nouns])
    show("... embedding without E_she - E_he", [projected(noun, 0.0, judge) for noun in nouns])
    best = []
    for noun in nouns:
        factor = best_factor(lambda factor, noun=noun: projected(noun, factor, fit))
        best.append(projected(noun, factor, judge))
    show("... the best factor of each", best)


# -----------------------------------------------------------------------------
# topics

FIGURES = ("bag, %", "near, %", "distinct-2, %", "perplexity")


def topics(r, s):
    """Texts for each topic and strength: are they about the topic, and are they still text? (6.1)"""
    length = min(s.max_new_tokens, r.base.config.block_size)
    start = torch.tensor(prompt("", r.tokenizer), device=r.device).repeat(s.num_samples, 1)  # (n,1)
    table = r.base.sense_table()  # topics leave the vectors as they are

    def write(model):
        """Token ids (num_samples, length) of texts."""
        generator = torch.Generator(r.device).manual_seed(s.seed)
        return model.generate(start, length, generator=generator, sense_table=table)[:, 1:]

    print(f"{s.num_samples} texts of {length} tokens each, for strengths 0 to 4")
    print("bag: texts with a word of the topic; near: with one of the 20 tokens nearest to it")
    print("distinct-2: distinct pairs of tokens; perplexity: under the model without edits")
    print(f"{'topic':24}" + "".join(f"{name:>30}" for name in FIGURES))
    plain = write(r.base)
    results = []
    for topic, bag in tqdm(read_stimuli(s.prompts)["topics"].items(), "topics", leave=False):
        near = nearest_tokens(r, bag)
        rows = [measure(r, start, plain, bag, near)]
        for strength in STRENGTHS:
            edit = {"edit": "topic", "words": ",".join(bag), "strength": strength}
            edited = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, [edit]))
            rows.append(measure(r, start, write(edited), bag, near))
        results.append(rows)
        columns = zip(*rows)  # of each figure its values at each strength
        cells = ["".join(f"{value:6.0f}" for value in column) for column in columns]
        tqdm.write(f"{topic:24}" + "".join(cells))
    results = np.array(results)  # (topics,strengths,figures)
    for i, name in enumerate(FIGURES):
        means = [mean_interval(values, s) for values in results[:, :, i].T]
        print(f"mean {name:14}" + "".join(f"{mean:>24}" for mean in means))


def nearest_tokens(r, bag, n=20):
    """The n tokens whose embeddings are nearest to those of a topic's words, without these."""
    E = F.normalize(r.base.wte.weight[: r.base.config.vocab_size], dim=-1)  # (V,D)
    first = [word_ids(r.tokenizer, word)[0] for word in bag]
    near = []
    for token in (E @ E[first].mean(0)).argsort(descending=True).tolist():
        text = r.tokenizer.decode([token]).lower()
        if token not in first and not any(word in text for word in bag):
            near.append(token)
        if len(near) == n:
            break
    return near


def measure(r, start, ids, bag, near):
    """FIGURES of texts ids (n,T) that go on from start (n,1)."""
    words = "|".join(re.escape(word) for word in bag)
    pattern = re.compile(rf"\b({words})\b", re.IGNORECASE)
    about = [bool(pattern.search(r.tokenizer.decode(row))) for row in ids.tolist()]
    close = torch.isin(ids, torch.tensor(near, device=ids.device)).any(1)  # (n,)
    pairs = torch.stack([ids[:, :-1], ids[:, 1:]], -1)  # (n,T-1,2)
    pairs = pairs.flatten(0, 1)  # (n * (T-1), 2)
    distinct = len(pairs.unique(dim=0)) / max(1, len(pairs))
    x = torch.cat([start, ids[:, :-1]], dim=1)  # (n,T)
    _, loss = r.base(x, ids)
    return 100 * np.mean(about), 100 * close.float().mean().item(), 100 * distinct, loss.exp().item()


# -----------------------------------------------------------------------------
# other text


def harm(r, s):
    """What the first 1, 10, 100 and all edits of a file do to other text."""
    edits = read_edits(s.damage)
    text = other_text(r, s.dataset, s.data_dir, 128)  # (n,T+1)
    print("edits   KL(without || with) per token   perplexity without   with")
    counts = [n for n in (1, 10, 100) if n < len(edits)]
    for n in [*counts, len(edits)]:
        edited = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, edits[:n]))
        kl, before, after = damage(r.base, edited, text)
        print(f"{n:5}   {kl:29.6f}   {before:18.3f}   {after:.3f}")


def document_windows(tokens, end, T):
    """Windows of T tokens over documents, each read by itself: rows (start, first, stop).

    A window begins at token start and predicts tokens first to stop - 1. A document starts at the token
    that ends the one before; the token that ends it isn't predicted. Its last window reaches back, so
    that it is full, but predicts only what is left.
    """
    stops = np.flatnonzero(tokens == end)
    starts = np.append(-1, stops[:-1])  # tokens[-1] ends a document, too
    windows = []
    for start, stop in zip(starts, stops):
        for i in range(start, stop - 1, T):
            begin = max(start, min(i, stop - 1 - T))
            windows.append((begin, i + 1, min(i + T + 1, stop)))
    return np.array(windows)


def word_perplexity(r, s):
    """exp(loss per word) of validation text, each document by itself, as lm-eval-harness scores it."""
    tokens = validation_tokens(r, s.dataset, s.data_dir)
    end = r.tokenizer.end
    check(tokens[-1] == end, "--words needs a dataset whose documents end with a token")
    T = r.base.config.block_size
    loss = 0.0
    windows = document_windows(tokens, end, T)
    parts = np.array_split(windows, math.ceil(len(windows) / 16))
    for part in tqdm(parts, "windows", leave=False):
        start, first, stop = part.T[:, :, None]  # (B,1) each
        x, y, _ = get_batch(tokens, part[:, 0], T, r.device)  # (B,T) each
        at = start + 1 + np.arange(T)  # (B,T), where each y lies
        counts = torch.from_numpy((at >= first) & (at < stop)).to(r.device)
        _, mean = r.base(x, y.masked_fill(~counts, -100))
        loss += mean.item() * counts.sum().item()
    n_words = 0
    starts = np.flatnonzero(tokens == end) + 1
    for document in np.split(tokens, starts)[:-1]:
        n_words += len(re.split(r"\s+", r.tokenizer.decode(document[:-1])))
    print(f"by document: word perplexity {np.exp(loss / n_words):.2f}, {n_words:,} words")


@torch.no_grad()
def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    tasks = {
        "lexical": lexical,
        "bias": bias,
        "topics": topics,
        "damage": harm,
        "swaps": unchosen,
        "rates": rates,
        "showpieces": showpieces,
        "words": word_perplexity,
    }
    asked = [name for name in tasks if getattr(s, name)]
    check(asked, "give one of " + ", ".join(f"--{name}" for name in tasks))
    r = open_run(s.run, s.device, senses=asked != ["words"])
    print(f"{r.path}: {r.base.num_params():,} parameters, step {r.ckpt['step']}")
    for name in asked:
        tasks[name](r, s)


if __name__ == "__main__":
    run(main)
