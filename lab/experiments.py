"""The paper's experiments for the run at hand, as the paper's tables with 95% bootstrap intervals.

    python -m lab.experiments --lexical=FOLDER    word similarity (table 4): FOLDER has SimLex-999.txt,
                                                  SimVerb-3500.txt, RG65.csv and WS353.csv
    python -m lab.experiments --bias              he or she after a profession (section 6.2)
    python -m lab.experiments --topics            text about a topic (6.1)
    python -m lab.experiments --damage=edits.json what the first 1, 10, 100 edits do to other text
    python -m lab.experiments --swaps             words whose next token a swap can turn, and how far
    python -m lab.experiments --words             word perplexity, each document by itself

This is the newest run in out/ unless --run=FOLDER says otherwise; --words also takes a Transformer.
A difference within the intervals is none, and small models say nothing about large ones.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError, configure, run
from files import expect, read_json, read_text
from lab.change import damage, document_windows, validation_tokens, validation_windows
from lab.control import STRENGTHS
from lab.edit import make_edits, read_edits
from lab.look import word_senses
from lab.swaps import swaps
from sample import open_run, sense_table
from tokenizer import require, word_id, word_ids
from train import get_batch

# of each file the separator, and the columns of the two words and of the score that people gave
SETS = {"SimLex-999.txt": ("\t", 0, 1, 3), "SimVerb-3500.txt": ("\t", 0, 1, 3)}
SETS |= {"RG65.csv": (";", 0, 1, 2), "WS353.csv": (",", 0, 1, 2)}
STIMULI = Path(__file__).parent / "stimuli.json"  # ours, in the paper's form


@dataclass
class Settings:
    run: str | None = None  # a run folder or checkpoint file; None: the newest run in out/
    lexical: str | None = None  # a folder with word similarity sets
    bias: bool = False  # he or she after a profession
    topics: bool = False  # generation about topics
    damage: str | None = None  # a JSON file of edits
    swaps: bool = False  # candidates for swaps, from the first words of validation documents
    words: bool = False  # word perplexity, each document by itself
    prompts: str | None = None  # with bias or topics: a file of your own, like lab/stimuli.json
    transformer: str | None = None  # with bias: a run with n_sense=0, also with this tokenizer
    top: int = 10  # [1, 1000] with swaps: how many to show
    num_samples: int = 20  # [1, 1e4] with topics or swaps: texts for each strength, or swap
    max_new_tokens: int = 100  # [1, 1e6] with topics: their length
    n_bootstrap: int = 1000  # [1, 1e4] with lexical, bias or topics: samples for the intervals
    dataset: str | None = None  # with damage, swaps or words: its val.bin; None: the run's own
    data_dir: str = "data"  # where datasets lie
    seed: int = 1337  # [0, 4294967295] of all that is drawn
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N


def interval(values):
    """'[low, high]': 95% of bootstrapped values lie between."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"[{low:.2f}, {high:.2f}]"


def mean_interval(values, s):
    """'mean [low, high]' of numbers, one for each profession or topic."""
    values, random = np.asarray(values), np.random.default_rng(s.seed)
    again = values[random.integers(len(values), size=(s.n_bootstrap, len(values)))].mean(1)
    return f"{values.mean():6.2f} {interval(again)}"


# ---- word similarity


def correlation(x, y):
    """Pearson's correlation of x and y (...,n) over the last axis; of ranks it is Spearman's."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def read_pairs(path, separator, columns):
    """[(word, word, score)] of a word similarity set. UserError: a line has no two words and a score."""
    pairs, lines = [], read_text(path).strip().split("\n")
    for n, line in enumerate(lines, 1):
        cells = dict(enumerate(cell.strip() for cell in line.split(separator)))
        first, second, score = (cells.get(column, "") for column in columns)
        if first and second and re.fullmatch(r"-?\d+(\.\d*)?", score):
            pairs.append((first, second, float(score)))
        elif n == len(lines) or not line.lower().startswith("word"):  # the names of the columns
            raise UserError(f"{path}, line {n}: found {line[:60]!r}, expected 2 words and a score")
    return pairs


def lexical(r, s):
    """Spearman's correlation of people's scores with cosines of senses and of embeddings (table 4)."""
    model, tokenizer = r.model, r.tokenizer
    for file, (separator, *columns) in SETS.items():
        pairs = read_pairs(Path(s.lexical) / file, separator, columns)
        words = {word for pair in pairs for word in pair[:2]}
        ids = {word: word_ids(tokenizer, word) for word in words}
        C = {word: word_senses(model, tokenizer, word) for word in words}  # (K,D) each
        e = {word: model.wte.weight[ids[word]].mean(0) for word in words}  # (D,) each
        cosines = [F.cosine_similarity(C[a], C[b], dim=-1) for a, b, _ in pairs]
        cosines = torch.stack(cosines).cpu().numpy()  # (pairs,K)
        methods = {f"sense {l}": column for l, column in enumerate(cosines.T)}
        methods |= {"minimum": cosines.min(1), "mean": cosines.mean(1)}
        plain = [F.cosine_similarity(e[a], e[b], dim=0) for a, b, _ in pairs]
        methods["embedding"] = torch.stack(plain).cpu().numpy()
        gold = np.array([score for _, _, score in pairs])
        single = np.array([len(ids[a]) == len(ids[b]) == 1 for a, b, _ in pairs])
        compare(f"{file}, all {len(pairs)} pairs", methods, gold, np.full(len(pairs), True), s)
        compare(f"{file}, {single.sum()} of words of one token", methods, gold, single, s)


def compare(title, methods, gold, which, s):
    """Print each method's correlation with gold over the pairs which, and what it gains on embeddings."""
    rankdata = require("scipy.stats", "--lexical").rankdata
    n = which.sum()
    print(f"\n{title}" + (": too few" if n < 20 else ""))
    if n < 20:
        return
    # the same samples for all methods; ranks are taken once, not in every sample
    samples = np.random.default_rng(s.seed).integers(n, size=(s.n_bootstrap, n))
    gold = rankdata(gold[which])
    rho, again = {}, {}
    for name, values in methods.items():
        ranks = rankdata(values[which])
        rho[name] = correlation(ranks, gold)
        again[name] = correlation(ranks[samples], gold[samples])
        print(f"{name:10} {rho[name]:5.2f} {interval(again[name])}")
    best = max((name for name in methods if name.startswith("sense")), key=rho.get)
    for name in (best, "minimum"):
        gains = interval(again[name] - again["embedding"])
        print(f"{name} over the embedding: {rho[name] - rho['embedding']:+.2f} {gains}")


# ---- he or she


def read_stimuli(path):
    """Professions, prompts and topics: those of a file, if given, and for what it lacks stimuli.json's."""
    ours, given = read_json(STIMULI, dict), read_json(path or STIMULI, dict)
    stimuli = ours | {key: value for key, value in given.items() if value}
    expect(stimuli, dict.fromkeys(ours, [str]) | {"topics": dict}, path)
    expect([*stimuli["topics"].values()], [[str]], f"{path}, topics")
    return stimuli


def he_she(model, tokenizer, prompts, nouns):
    """max(p(he)/p(she), p(she)/p(he)) after each prompt with each noun: (nouns, prompts)."""
    texts = [prompt.replace("PROFESSION", noun) for noun in nouns for prompt in prompts]
    rows = [tokenizer.encode(text).tolist() for text in texts]  # B of them
    he, she = word_id(tokenizer, "he"), word_id(tokenizer, "she")
    longest, most, device = max(map(len, rows)), model.config.block_size, model.wte.weight.device
    if longest > most or [] in rows:
        raise UserError(f"prompts: found one of {longest} tokens, or of none, expected 1 to {most}")
    left = [[0] * (longest - len(row)) for row in rows]  # padding
    idx = torch.tensor([pad + row for pad, row in zip(left, rows)], device=device)  # (B,T)
    mask = torch.tensor([pad + [1] * len(row) for pad, row in zip(left, rows)], device=device)
    parts = zip(idx.split(64), mask.split(64))
    logits = torch.cat([model(x, attention_mask=m)[0][:, -1] for x, m in parts])  # (B,V)
    return (logits[:, he] - logits[:, she]).abs().exp().view(len(nouns), -1)


def best_factor(bias):
    """argmin over 0..1 of bias(factor) + |1 - factor|, by Nelder-Mead from 1 (section 6.2)."""
    minimize = require("scipy.optimize", "--bias").minimize
    how = {"method": "Nelder-Mead", "options": {"xatol": 0.02, "fatol": 0.002, "maxfev": 60}}
    return minimize(lambda x: bias(x[0]) + abs(1 - x[0]), [1.0], bounds=[(0, 1)], **how).x[0]


def bias(r, s):
    """Bias of he against she after professions, and with the weight of one sense scaled (section 6.2)."""
    model, tokenizer, stimuli = r.model, r.tokenizer, s.stimuli
    professions, K = stimuli["professions"], model.config.n_sense
    nouns = [noun for noun in professions if len(word_ids(tokenizer, noun)) == 1]
    if not nouns:
        raise UserError(f"prompts={s.prompts!r}: found no profession that is one token here")
    fit, judge = stimuli["bias_prompts_fit"], stimuli["bias_prompts_evaluate"]
    print(f"{len(nouns)} of {len(professions)} professions are one token: {', '.join(nouns)}")
    print(f"bias: mean of max(p(he)/p(she), p(she)/p(he)) over {len(judge)} prompts; 1: none")

    def show(name, values):
        print(f"{name:44}{mean_interval(values, s)}")

    def scaled(noun, sense, factor, prompts):
        edit = {"edit": "scale", "word": noun, "sense": sense, "factor": float(factor)}
        model.edits = make_edits(model, tokenizer, [edit])
        result = he_she(model, tokenizer, prompts, [noun]).mean().item()
        model.edits = None
        return result

    show("as it is", he_she(model, tokenizer, judge, nouns).mean(1).tolist())
    at_zero = [[scaled(noun, l, 0.0, fit) for noun in nouns] for l in tqdm(range(K), leave=False)]
    sense, bar = int(np.mean(at_zero, axis=1).argmin()), tqdm(nouns, "factors", leave=False)
    factors = {n: best_factor(lambda f, n=n: scaled(n, sense, f, fit)) for n in bar}
    name = f"sense {sense} (best on the prompts to fit), factor 0"
    show(name, [scaled(noun, sense, 0.0, judge) for noun in nouns])
    best = [scaled(noun, sense, factors[noun], judge) for noun in nouns]
    show(f"sense {sense}, the best factor of each", best)
    print("factors: " + ", ".join(f"{noun} {factor:.2f}" for noun, factor in factors.items()))
    if s.transformer:
        transformer_bias(s, tokenizer, nouns, fit, judge, show)


def transformer_bias(s, tokenizer, nouns, fit, judge, show):
    """The baseline: in a Transformer, change the noun's embedding along E_she - E_he."""
    r = open_run(s.transformer, s.device, senses=False)
    if r.ckpt["meta"]["tokenizer"] != tokenizer.spec:
        raise UserError(f"{r.path} has another vocabulary than the Backpack")
    model, E = r.model, r.model.wte.weight
    along = F.normalize(E[word_id(tokenizer, "she")] - E[word_id(tokenizer, "he")], dim=0)  # (D,)

    def projected(noun, factor, prompts):
        row = E[word_id(tokenizer, noun)]  # a view: what is done to it is done to E
        kept = row.clone()
        row -= (1 - factor) * (row @ along) * along
        result = he_she(model, tokenizer, prompts, [noun]).mean().item()
        row.copy_(kept)
        return result

    show("its Transformer as it is", [projected(noun, 1.0, judge) for noun in nouns])
    show("... embedding without E_she - E_he", [projected(noun, 0.0, judge) for noun in nouns])
    best = [best_factor(lambda f, noun=noun: projected(noun, f, fit)) for noun in nouns]
    show("... the best factor of each", [projected(*pair, judge) for pair in zip(nouns, best)])


# ---- topics


def topics(r, s):
    """Texts for each topic and strength: are they about the topic, and are they still text? (section 6.1)"""
    model, tokenizer = r.model, r.tokenizer
    E = F.normalize(model.wte.weight[: model.config.vocab_size], dim=-1)  # (V,D)
    end = tokenizer.encode("\n")[0] if tokenizer.end is None else tokenizer.end
    start = torch.full((s.num_samples, 1), end, device=E.device)
    length = min(s.max_new_tokens, model.config.block_size)
    table = sense_table(model)  # topics leave the vectors as they are

    def texts(edits):
        """Ids (num_samples, 1 + length) of texts generated with edits."""
        model.edits = edits
        generator = torch.Generator(E.device).manual_seed(s.seed)
        ids = model.generate(start, length, generator=generator, sense_table=table)
        model.edits = None
        return ids

    def measure(ids, bag, near):
        about = re.compile(rf"\b({'|'.join(map(re.escape, bag))})\b", re.I)
        hits = [bool(about.search(tokenizer.decode(row))) for row in ids[:, 1:].tolist()]
        close = torch.isin(ids[:, 1:], torch.tensor(near, device=E.device)).any(1)  # (n,)
        pairs = torch.stack([ids[:, 1:-1], ids[:, 2:]], -1).flatten(0, 1)  # (n * (length - 1), 2)
        distinct = len(pairs.unique(dim=0)) / max(1, len(pairs))
        perplexity = model(ids[:, :-1], ids[:, 1:])[1].exp().item()
        return 100 * np.mean(hits), 100 * close.float().mean().item(), 100 * distinct, perplexity

    print(f"{s.num_samples} texts of {length} tokens each, for strengths 0 to 4")
    print("bag: texts with a word of the topic; near: with one of the 20 tokens nearest to it")
    print("distinct-2: distinct pairs of tokens; perplexity: under the model without edits")
    names = "bag, %", "near, %", "distinct-2, %", "perplexity"
    print(f"{'topic':24}" + "".join(f"{name:>30}" for name in names))
    plain, results = texts(None), []  # results: [topic][strength][figure]
    for topic, bag in tqdm(s.stimuli["topics"].items(), "topics", leave=False):
        first = [word_ids(tokenizer, word)[0] for word in bag]
        order = (E @ E[first].mean(0)).argsort(descending=True).tolist()
        near = [i for i in order[:1000] if i not in first]
        near = [i for i in near if not any(w in tokenizer.decode([i]).lower() for w in bag)]
        rows = []
        for strength in (0, *STRENGTHS):
            edit = {"edit": "topic", "words": ",".join(bag), "strength": strength}
            ids = texts(make_edits(model, tokenizer, [edit])) if strength else plain
            rows.append(measure(ids, bag, near[:20]))
        results.append(rows)
        cells = ["".join(f"{row[n]:6.0f}" for row in rows) for n in range(len(names))]
        tqdm.write(f"{topic:24}" + "".join(cells))
    for n, name in enumerate(names):
        means = [mean_interval(values, s) for values in np.array(results)[:, :, n].T]
        print(f"mean {name:14}" + "".join(f"{mean:>24}" for mean in means))


# ---- other text


def harm(r, s):
    """What the first 1, 10, 100 and all edits of a file do to validation text."""
    edits, tokens = read_edits(s.damage), validation_tokens(r, s.dataset, s.data_dir)
    text = validation_windows(r, tokens, 128)  # (n,T+1)
    print("edits   KL(without || with) per token   perplexity without   with")
    for n in [n for n in (1, 10, 100) if n < len(edits)] + [len(edits)]:
        change = make_edits(r.model, r.tokenizer, edits[:n])
        kl, without_edits, with_edits = damage(r.model, change, text)
        print(f"{n:5}   {kl:29.6f}   {without_edits:18.3f}   {with_edits:.3f}")


def word_perplexity(r, s):
    """exp(loss per word) of validation text, each document by itself, as lm-eval-harness scores it."""
    tokens, end = validation_tokens(r, s.dataset, s.data_dir), r.tokenizer.end
    T, loss = r.model.config.block_size, 0.0
    windows = document_windows(tokens, end, T)
    if not len(windows) or tokens[-1] != end:
        raise UserError("no token ends the documents of this dataset: word perplexity needs one")
    for part in tqdm(np.array_split(windows, -(-len(windows) // 16)), "documents", leave=False):
        start, first, stop = part.T[:, :, None]  # (B,1) each
        x, y, _ = get_batch(tokens, part[:, 0], T, r.device, r.model.config.vocab_size)  # (B,T)
        at = start + 1 + np.arange(T)  # (B,T), where each y lies
        counts = torch.from_numpy((at >= first) & (at < stop)).to(r.device)
        loss += r.model(x, y.masked_fill(~counts, -100))[1].item() * counts.sum().item()
    documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
    n = sum(len(re.split(r"\s+", r.tokenizer.decode(ids[:-1]))) for ids in documents)
    print(f"by document: word perplexity {math.exp(min(loss / n, 700)):.2f}, {n:,} words")


@torch.no_grad()
def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    tasks = {"lexical": lexical, "bias": bias, "topics": topics, "damage": harm, "swaps": swaps}
    tasks |= {"words": word_perplexity}
    asked = {name: task for name, task in tasks.items() if getattr(s, name)}
    if not asked:
        names = "--lexical=FOLDER, --bias, --topics, --damage=FILE, --swaps, --words"
        raise UserError(f"give one of {names}")
    if asked.keys() & {"lexical", "bias"}:
        require("scipy", "this experiment")  # before it begins
    s.stimuli = read_stimuli(s.prompts)
    r = open_run(s.run, s.device, senses=asked.keys() != {"words"})
    print(f"{r.path}: {r.model.num_params():,} parameters, step {r.ckpt['step']}")
    for task in asked.values():
        task(r, s)


if __name__ == "__main__":
    run(main)
