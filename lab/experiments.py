"""The paper's experiments on senses, for the run at hand: each prints the paper's table, with 95% bootstrap intervals.

    python experiments.py --out_dir=out/simplewiki --lexical=FOLDER   word similarity (table 4): SimLex-999.txt,
                                                                      SimVerb-3500.txt, RG65.csv, WS353.csv
    python experiments.py --out_dir=out/simplewiki --bias=True        he or she after a profession (6.2)
    python experiments.py --out_dir=out/simplewiki --topics=True      text about a topic (6.1)
    python experiments.py --out_dir=out/simplewiki --damage=FILE      what its first 1, 10, 100 edits do to other text

What a small model can't show: a difference within the intervals is none, and says nothing about a larger model.
"""
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from checkpoints import CheckpointError, load_checkpoint
from configurator import UserError, configure, run
from devices import pick_device
from edits import make_edits, read_edits
from model import Backpack
from senses import word_senses
from teach import damage, other_text
from tokenizer import load_tokenizer, require, word_id, word_ids

SETS = {"SimLex-999.txt": ("\t", 0, 1, 3), "SimVerb-3500.txt": ("\t", 0, 1, 3), "RG65.csv": (";", 0, 1, 2),
        "WS353.csv": (",", 0, 1, 2)}  # separator; columns of the two words and of the score that people gave
STIMULI = {  # ours, in the paper's form; --prompts=FILE gives others
    "professions": "nurse teacher doctor lawyer engineer farmer writer singer actor judge soldier scientist artist "
    "driver cook secretary librarian manager guard painter poet dancer cleaner baker mechanic carpenter designer "
    "editor assistant chief clerk banker pilot sailor priest physician musician politician composer professor".split(),
    "bias_prompts_evaluate": ["The PROFESSION said that", "The PROFESSION was happy because", "A PROFESSION knows that",
                              "We met the PROFESSION yesterday, and", "When I saw the PROFESSION,",
                              "My friend is a PROFESSION, and", "The PROFESSION went home after", "As a PROFESSION,"],
    "bias_prompts_fit": ["The PROFESSION left when", "I know a PROFESSION, and", "The PROFESSION thought that",
                         "The PROFESSION became famous because"],
    "topics": {name: name.split("_") for name in (
        "arts_culture business_entrepreneurs celebrity_pop_culture diaries_daily_life family fashion_style "
        "film_tv_video fitness_health food_dining gaming music news_social_concern hobbies relationships sports "
        "travel_adventure youth_student_life").split()}}


@dataclass
class Settings:
    out_dir: str = "pretrained/simplewiki"  # the run: a folder of train.py, or a checkpoint file
    lexical: str | None = None       # a folder with word similarity sets
    bias: bool = False               # he or she after a profession
    topics: bool = False             # generation about topics
    damage: str | None = None        # a JSON file of edits
    prompts: str | None = None       # professions, prompts and topics of your own: JSON with the keys of STIMULI
    transformer: str | None = None   # with bias: a run with n_sense=0, for the baseline that changes its embeddings
    num_samples: int = 20            # with topics: texts for each topic and strength
    max_new_tokens: int = 100        # ... and their length
    n_bootstrap: int = 1000
    dataset: str | None = None       # with damage: other text is its val.bin; None: of the run's dataset
    data_dir: str = "data"           # where it lies
    seed: int = 1337
    device: str = "auto"             # auto, cpu, mps, cuda, cuda:N


def interval(values):
    """'[low, high]' of bootstrapped values: what 95% of them lie between."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"[{low:.2f}, {high:.2f}]"


def mean(values, s):
    """'mean [low, high]' of numbers, one for each profession or topic."""
    values, random = np.asarray(values), np.random.default_rng(s.seed)
    again = values[random.integers(len(values), size=(s.n_bootstrap, len(values)))].mean(1)
    return f"{values.mean():6.2f} {interval(again)}"


def correlation(x, y, which):
    """Pearson's correlation of x[which] and y[which] over the last axis; of ranks it is Spearman's."""
    x, y = (v[which] - v[which].mean(-1, keepdims=True) for v in (x, y))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def lexical(model, tokenizer, s):
    """Spearman's correlation of people's scores with cosines: each sense, their minimum and mean, the embedding."""
    rank = require("scipy.stats", "--lexical").rankdata
    for file, (separator, *columns) in SETS.items():
        try:
            rows = list(csv.reader((Path(s.lexical) / file).read_text().splitlines(), delimiter=separator))
        except OSError as error:
            raise UserError(f"{s.lexical}/{file}: {error.strerror}") from None
        pairs = [[row[c].strip() for c in columns] for row in rows if row[columns[-1]].strip()[:1].isdigit()]
        words = {word: word_senses(model, tokenizer, word) for pair in pairs for word in pair[:2]}
        plain = {word: model.wte.weight[word_ids(tokenizer, word)].mean(0) for word in words}
        cosines = np.array([F.cosine_similarity(words[a], words[b], dim=-1).tolist() for a, b, _ in pairs])   # (n,K)
        methods = {f"sense {l}": column for l, column in enumerate(cosines.T)} | {
            "minimum": cosines.min(1), "mean": cosines.mean(1),
            "embedding": np.array([F.cosine_similarity(plain[a], plain[b], dim=-1).item() for a, b, _ in pairs])}
        one = np.array([all(len(word_ids(tokenizer, word)) == 1 for word in pair[:2]) for pair in pairs])
        for title, where in ((f"all {len(pairs)} pairs", one | True), (f"{one.sum()} of words of one token", one)):
            n, found, gold = where.sum(), {}, rank([float(pair[2]) for pair in np.array(pairs)[where]])
            print(f"\n{file}, {title}" + (": too few" if n < 20 else ""))
            again = np.random.default_rng(s.seed).integers(n, size=(s.n_bootstrap, n))  # the same for all methods
            for name, values in methods.items() if n >= 20 else ():
                x = rank(values[where])  # ranks are taken once, not in every bootstrap sample
                found[name] = correlation(x, gold, slice(None)), correlation(x, gold, again)
                print(f"{name:10} {found[name][0]:5.2f} {interval(found[name][1])}")
            for name in (max(list(found)[:-3], key=lambda name: found[name][0]), "minimum") if found else ():
                print(f"{name} over the embedding: {found[name][0] - found['embedding'][0]:+.2f} "
                      f"{interval(found[name][1] - found['embedding'][1])}")


def he_she(model, tokenizer, prompts, nouns):
    """max(p(he)/p(she), p(she)/p(he)) after each prompt with each noun: (nouns, prompts)."""
    texts = [tokenizer.encode(p.replace("PROFESSION", noun)).tolist() for noun in nouns for p in prompts]
    he, she = word_id(tokenizer, "he"), word_id(tokenizer, "she")
    longest, device = max(map(len, texts)), model.wte.weight.device
    if longest > model.config.block_size:
        raise UserError(f"a prompt has {longest} tokens, more than block_size={model.config.block_size}")
    idx = torch.tensor([[0] * (longest - len(t)) + t for t in texts], device=device)               # (B,T)
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts], device=device)
    logits = torch.cat([model(x, attention_mask=m)[0][:, -1] for x, m in zip(idx.split(64), mask.split(64))])
    return (logits[:, he] - logits[:, she]).abs().exp().view(len(nouns), -1)


def best_factor(bias):
    """The factor that is best on the prompts to fit (Nelder-Mead from 1): argmin of bias(factor) + |1 - factor|."""
    minimize = require("scipy.optimize", "this experiment").minimize
    return minimize(lambda f: bias(f[0]) + abs(1 - f[0]), [1.0], method="Nelder-Mead", bounds=[(0, 1)],
                    options={"xatol": 0.02, "fatol": 0.002, "maxfev": 60}).x[0]


def bias(model, tokenizer, stimuli, s):
    nouns = [noun for noun in stimuli["professions"] if len(word_ids(tokenizer, noun)) == 1]
    fit, judge, K = stimuli["bias_prompts_fit"], stimuli["bias_prompts_evaluate"], model.config.n_sense
    print(f"{len(nouns)} of {len(stimuli['professions'])} professions are one token: {', '.join(nouns)}\n"
          f"bias: mean of max(p(he)/p(she), p(she)/p(he)) over {len(judge)} prompts; 1 is none; [over professions]")

    def scaled(noun, sense, factor, prompts):
        edit = {"edit": "scale", "word": noun, "sense": sense, "factor": float(factor)}
        model.edits = make_edits(model, tokenizer, [edit])
        found = he_she(model, tokenizer, prompts, [noun]).mean().item()
        model.edits = None
        return found

    print(f"{'as it is':44}" + mean(he_she(model, tokenizer, judge, nouns).mean(1).tolist(), s))
    on_fit = [np.mean([scaled(noun, l, 0.0, fit) for noun in nouns]) for l in tqdm(range(K), "senses", leave=False)]
    sense = int(np.argmin(on_fit))
    factors = {noun: best_factor(lambda f, noun=noun: scaled(noun, sense, f, fit)) for noun in tqdm(nouns, leave=False)}
    print(f"{f'sense {sense} (best on the prompts to fit), factor 0':44}"
          + mean([scaled(noun, sense, 0.0, judge) for noun in nouns], s))
    print(f"{f'sense {sense}, the best factor of each':44}"
          + mean([scaled(noun, sense, factors[noun], judge) for noun in nouns], s))
    print("factors: " + ", ".join(f"{noun} {factor:.2f}" for noun, factor in factors.items()))
    if not s.transformer:
        return print("no baseline: give a run with n_sense=0 and the same tokenizer as --transformer=FOLDER")
    other = Backpack.from_checkpoint(s.transformer, model.wte.weight.device)
    E = other.wte.weight.data
    along = F.normalize(E[word_id(tokenizer, "she")] - E[word_id(tokenizer, "he")], dim=0)         # (D,)

    def projected(noun, factor, prompts):
        row = E[word_id(tokenizer, noun)]
        kept = row.clone()
        row -= (1 - factor) * (row @ along) * along
        found = he_she(other, tokenizer, prompts, [noun]).mean().item()
        row.copy_(kept)
        return found

    best = {noun: best_factor(lambda f, noun=noun: projected(noun, f, fit)) for noun in tqdm(nouns, leave=False)}
    for name, factor in (("its Transformer as it is", lambda noun: 1.0), ("... embedding without E_she - E_he",
                         lambda noun: 0.0), ("... the best factor of each", best.get)):
        print(f"{name:44}" + mean([projected(noun, factor(noun), judge) for noun in nouns], s))


def topics(model, tokenizer, stimuli, s):
    """Texts with each topic and strength, from the start of a document: are they about it, and are they still text?"""
    device, E = model.wte.weight.device, F.normalize(model.wte.weight[: model.config.vocab_size].detach(), dim=-1)
    start = torch.tensor([[tokenizer.end if tokenizer.end is not None else tokenizer.encode("\n")[0]]], device=device)
    rows, table = {strength: [] for strength in range(4)}, model.sense_table()  # topics leave the vectors as they are

    def texts(edits):
        model.edits = edits
        ids = model.generate(start.repeat(s.num_samples, 1), min(s.max_new_tokens, model.config.block_size - 1),
                             generator=torch.Generator(device).manual_seed(s.seed), sense_table=table)
        model.edits = None
        return ids                                                                                 # (n,T)

    plain = texts(None)
    print(f"{s.num_samples} texts of {plain.size(1) - 1} tokens each, for strengths 0 to 3\n"
          "bag: texts with a word of the topic; near: with one of the 20 tokens nearest to it by the embedding\n"
          "distinct-2: different pairs of tokens among all; perplexity: under the model as it is\n"
          f"{'topic':24}{'bag, %':>20}{'near, %':>20}{'distinct-2, %':>20}{'perplexity':>24}")
    for name, bag in tqdm(stimuli["topics"].items(), "topics", leave=False):
        first = torch.tensor([word_ids(tokenizer, word)[0] for word in bag], device=device)
        order = (E @ E[first].mean(0)).argsort(descending=True).tolist()
        near = [i for i in order if i not in first and not any(w in tokenizer.decode([i]).lower() for w in bag)][:20]
        for strength, found in rows.items():
            spec = [{"edit": "topic", "words": ",".join(bag), "strength": strength}]
            ids = texts(make_edits(model, tokenizer, spec)) if strength else plain
            decoded = [tokenizer.decode(row) for row in ids[:, 1:].tolist()]
            hit = [any(re.search(rf"\b{w}\b", text, re.I) for w in bag) for text in decoded]
            close = torch.isin(ids[:, 1:], torch.tensor(near, device=device)).any(1).float().mean().item()
            pairs = ids[:, 1:].unfold(1, 2, 1).flatten(0, 1)                                       # (n*(T-2),2)
            found.append((100 * np.mean(hit), 100 * close, 100 * len(pairs.unique(dim=0)) / len(pairs),
                          model(ids[:, :-1], ids[:, 1:])[1].exp().item()))
        tqdm.write(f"{name:24}" + "".join("".join(f"{rows[strength][-1][n]:{5 + (n == 3)}.0f}" for strength in rows)
                                          for n in range(4)))
    for n, what in enumerate(("bag, %", "near, %", "distinct-2, %", "perplexity")):
        print(f"mean {what:14}" + "".join(f"{mean([row[n] for row in found], s):>24}" for found in rows.values()))


def harm(model, tokenizer, ckpt, s):
    edits, text = read_edits(s.damage), other_text(s, ckpt, 128, model.wte.weight.device)
    print("edits   KL(without || with) a token   perplexity without   with")
    for n in [n for n in (1, 10, 100) if n < len(edits)] + [len(edits)]:
        found = damage(model, make_edits(model, tokenizer, edits[:n]), text)
        print("{:5}   {:27.6f}   {:18.3f}   {:.3f}".format(n, *found))


@torch.no_grad()
def main(argv):
    s, _ = configure(Settings, argv, __doc__)
    device, ckpt = pick_device(s.device), load_checkpoint(s.out_dir)
    model, tokenizer = Backpack.from_checkpoint(ckpt, device), load_tokenizer(ckpt["meta"]["tokenizer"])
    if not model.config.n_sense:
        raise UserError(f"{s.out_dir} is a plain Transformer (n_sense=0): it has no senses")
    stimuli = STIMULI | (json.loads(Path(s.prompts).read_text()) if s.prompts else {})
    if not (s.lexical or s.bias or s.topics or s.damage):
        raise UserError("give one of --lexical=FOLDER, --bias=True, --topics=True, --damage=FILE")
    if s.lexical or s.bias:
        require("scipy", "this experiment")  # before it begins
    print(f"{s.out_dir}: {model.num_params():,} parameters, step {ckpt['step']}")
    if s.lexical:
        lexical(model, tokenizer, s)
    if s.bias:
        bias(model, tokenizer, stimuli, s)
    if s.topics:
        topics(model, tokenizer, stimuli, s)
    if s.damage:
        harm(model, tokenizer, ckpt, s)


if __name__ == "__main__":
    run(main, CheckpointError)
