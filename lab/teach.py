"""Teach a Backpack by a few of its sense vectors, leaving its weights alone (Hewitt et al. 2024, arXiv 2402.06155).

`python edits.py --teach=FILE` calls this. A line of the file is {"prompt": "...", "good": "...", "bad": "..."}; "bad"
may be left out.
"""
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from batches import load_data
from configurator import UserError
from model import Edits
from tokenizer import shown


def read_examples(path):
    """The examples of a .jsonl file. Raises UserError."""
    examples = []
    for n, line in enumerate(filter(str.strip, Path(path).read_text().splitlines()), 1):
        try:
            example = json.loads(line)
        except ValueError:
            example = None
        if not isinstance(example, dict) or not all(example.get(key) and isinstance(example[key], str)
                                                    for key in {"prompt", "good"} | ({"bad"} & example.keys())):
            raise UserError(f'{path}, line {n}: expected {{"prompt": "...", "good": "..."}}, perhaps with "bad"')
        examples.append(example)
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def other_text(s, ckpt, n, device):
    """n windows of T + 1 tokens (n,T+1), evenly spaced over val.bin of s.dataset, or of the run's own dataset. Raises
    UserError for one that isn't there, is too short, or has another vocabulary."""
    s.dataset, T = s.dataset or ckpt["config"]["dataset"], ckpt["config"]["block_size"]
    if not s.dataset:
        raise UserError(f"{s.out_dir} has no dataset of its own: give --dataset=..., which prepare_data.py made "
                        f"with --tokenizer={s.out_dir}")
    (_, tokens), meta = load_data(s)
    if meta["tokenizer"] != ckpt["meta"]["tokenizer"] or len(tokens) <= T:
        raise UserError(f"{s.dataset} has another vocabulary than {s.out_dir}, or not {T + 1} tokens to validate")
    starts = np.linspace(0, len(tokens) - T - 1, n).astype(int)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)).to(device)


def log_p(model, idx, edits=None):
    """Log-probabilities of the next token, idx (B,T) -> (B,T,V), with the given edits."""
    kept, model.edits = model.edits, edits
    try:
        return model(idx)[0].log_softmax(-1)
    finally:
        model.edits = kept


@torch.no_grad()
def damage(model, edits, text, batch_size=8):
    """What edits do to text (n,T+1): (mean KL(without || with) of a token in nats, perplexity without, with)."""
    total = torch.zeros(3, dtype=torch.float64)
    for part in text.split(batch_size):
        x, y = part[:, :-1], part[:, 1:, None]
        before, after = log_p(model, x), log_p(model, x, edits)                                    # (B,T,V)
        total += torch.stack([(before.exp() * (before - after)).sum(), -before.gather(2, y).sum(),
                              -after.gather(2, y).sum()]).cpu() / text[:, 1:].numel()
    return total[0].item(), total[1].exp().item(), total[2].exp().item()


@torch.no_grad()
def choose(model, tokenizer, wanted, text, n, elsewhere):
    """The n pairs (token, sense) that matter for what is wanted and seldom in other text: tokens (n,), senses (n,).

    wanted: [(ids (T,), first position to be said)]. The score of a pair is the sum of alpha onto it at the positions
    that say what is wanted, less `elsewhere` times its mean at a position of other text.
    """
    K, V, device = model.config.n_sense, model.config.vocab_size, text.device
    score, sense = torch.zeros(V, K, device=device), torch.arange(K, device=device)
    for ids, first in wanted:
        alpha = model.contextualization(ids[None, :-1])[0, :, first - 1 :].sum(1)                  # (K,T)
        score.index_put_((ids[:-1, None], sense), alpha.mT, accumulate=True)
    for x in text[:, :-1].split(8):
        alpha = model.contextualization(x).sum(2) / text[:, 1:].numel()                            # (B,K,T)
        score.index_put_((x[..., None], sense), -elsewhere * alpha.mT, accumulate=True)
    unwritable = [i for i in range(V) if tokenizer.encode(tokenizer.decode([i])).tolist() != [i]]  # half a character
    score[unwritable] = float("-inf")
    best = score.flatten().topk(n).indices
    return best // K, best % K


def teach(model, tokenizer, examples, text, s):
    """Learn s.n_vector sense vectors that make the model say what examples hold for good; returns a list of edits.

    text (n,T+1): every other window is to be said as before, by a KL term in the loss; the rest judges that, and
    training stops before their KL is more than s.max_kl. Raises UserError for an example longer than block_size.
    """
    def ids(example, end):
        space = "" if example["prompt"][-1].isspace() or end[0].isspace() else " "
        prompt, end = tokenizer.encode(example["prompt"]).tolist(), tokenizer.encode(space + end).tolist()
        if len(prompt + end) > model.config.block_size:
            raise UserError(f"{example['prompt'][:40]!r}... is longer than block_size={model.config.block_size} tokens")
        return torch.tensor(prompt + end, device=text.device), len(prompt)

    pairs = [(ids(e, e["good"]), ids(e, e["bad"]) if "bad" in e else None) for e in examples]
    known, held_out = text[::2], text[1::2]
    tokens, senses = choose(model, tokenizer, [good for good, _ in pairs], known, s.n_vector, s.elsewhere)  # (N,), (N,)
    E, K, V = model.wte.weight.detach(), model.config.n_sense, model.config.vocab_size
    _, where = tokens.unique(return_inverse=True)                                                  # (N,)
    row = torch.zeros(V, dtype=torch.long, device=text.device)
    row[tokens] = where + 1

    def edits(delta):
        """Edits that add delta (N,D) to the chosen vectors."""
        offset = E.new_zeros(s.n_vector + 1, K, E.size(1)).index_put((where + 1, senses), delta)
        return Edits(row=row, scale=E.new_ones(s.n_vector + 1, K), offset=offset,
                     w=E.new_zeros(0, V, K), f=E.new_zeros(0))

    def said(target, edits):
        """log p of the end of a text."""
        ids, first = target
        return log_p(model, ids[None, :-1], edits)[0].gather(1, ids[1:, None])[first - 1 :].sum()

    delta = torch.zeros(s.n_vector, E.size(1), device=text.device, requires_grad=True)             # (N,D)
    optimizer, best, random = torch.optim.Adam([delta], s.learning_rate), torch.zeros_like(delta), torch.Generator()
    for step in (progress := tqdm(range(1, s.steps + 1), "teaching")):
        now = edits(delta)
        goods = torch.stack([said(good, now) for good, _ in pairs])                                # (examples,)
        if goods.exp().min() >= s.enough:
            best = delta.detach().clone()
            break
        loss = -goods.sum() + sum(F.softplus(said(bad, now) - p) for (_, bad), p in zip(pairs, goods) if bad)
        x = known[torch.randint(len(known), (4,), generator=random.manual_seed(s.seed + step)), :-1]
        before, after = log_p(model, x).detach(), log_p(model, x, now)                             # (B,T,V)
        loss = loss / len(pairs) + s.kl_weight * (before.exp() * (before - after)).sum(-1).mean()
        delta.grad, = torch.autograd.grad(loss, delta)
        optimizer.step()
        if step % 10 == 0:
            kl, *_ = damage(model, edits(delta.detach()), held_out)
            progress.set_postfix_str(f"least p(good) {goods.exp().min():.3f}, KL elsewhere {kl:.5f}")
            if kl > s.max_kl:
                break
            best = delta.detach().clone()
    with torch.no_grad():
        own = model.sense_network(model.wte(tokens))[torch.arange(s.n_vector), senses]             # (N,D)
        adds = model._logits(best).topk(min(5, V)).indices.tolist()                                # (N,5)
    return [{"edit": "replace", "word": f'"{tokenizer.decode([token])}"', "sense": sense,
             "adds": " ".join(shown(tokenizer, i) for i in top), "vector": [round(v, 6) for v in vector]}
            for token, sense, top, vector in zip(tokens.tolist(), senses.tolist(), adds, (own + best).tolist())]
