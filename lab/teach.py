"""Teach a Backpack by changing a few of its sense vectors (Hewitt et al. 2024, arXiv 2402.06155).

python -m lab.edit --teach=FILE calls this. Each line of the file is {"prompt": "...", "good":
"...", "bad": "..."}; "bad" is optional. The change applies wherever the chosen tokens occur, so also
try prompts that should not change.
"""

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError, read_jsonl
from lab.control import Edits
from tokenizer import token_text
from train import get_batch, load_data


def read_examples(path):
    """The examples of a .jsonl file. UserError: a line is not an example, or there is none."""
    examples = read_jsonl(path, {"prompt": str, "good": str, "bad?": str})
    for n, example in enumerate(examples, 1):
        if "" in (example["prompt"], example["good"], example.get("bad")):
            what = "found an empty text, expected a prompt and good, and bad if it is there"
            raise UserError(f"{path}, example {n}: {what}")
    if not examples:
        raise UserError(f'{path}: found no lines, expected {{"prompt": "...", "good": "..."}}')
    return examples


def validation_tokens(r, dataset, data_dir):
    """The tokens of val.bin (N,) of a dataset, or of the run's own; r: from open_run.

    UserError: there is no such dataset, or it was made with another tokenizer than the run's.
    """
    dataset = dataset or r.ckpt["settings"].get("dataset")
    if not dataset:
        raise UserError(
            f"{r.path} has no dataset of its own: give --dataset=NAME, made by prepare_data.py "
            f"with --tokenizer={r.path}"
        )
    _, tokens, meta = load_data(data_dir, dataset)
    if meta["tokenizer"] != r.ckpt["meta"]["tokenizer"]:
        raise UserError(f"{dataset} has another vocabulary than {r.path}")
    return tokens


def validation_windows(r, dataset, data_dir, n):
    """n windows of T + 1 tokens (n,T+1), evenly spaced over the validation tokens of a dataset."""
    tokens, T = validation_tokens(r, dataset, data_dir), r.model.config.block_size
    if len(tokens) <= T:
        raise UserError(f"the dataset has {len(tokens)} tokens for validation: expected {T + 1}")
    starts = np.linspace(0, len(tokens) - T - 1, n).astype(int)
    x, y, _ = get_batch(tokens, starts, T, r.device, r.model.config.vocab_size)  # (n,T) each
    return torch.cat([x, y[:, -1:]], 1)


def log_p(model, idx, edits=None):
    """Log-probabilities of the next token under the given edits: idx (B,T) -> (B,T,V)."""
    kept = model.edits
    model.edits = edits
    try:
        return model(idx)[0].log_softmax(-1)
    finally:
        model.edits = kept


def divergence(before, after):
    """KL(before || after) of each token in nats: log-probabilities (...,V) -> (...)."""
    return (before.exp() * (before - after)).sum(-1)


@torch.no_grad()
def damage(model, edits, text, batch_size=8):
    """What edits do to text (n,T+1): (mean KL(without || with) per token, perplexity without, with)."""
    total = torch.zeros(3, dtype=torch.float64)
    for part in text.split(batch_size):
        x, y = part[:, :-1], part[:, 1:, None]  # (B,T), (B,T,1)
        before, after = log_p(model, x), log_p(model, x, edits)  # (B,T,V)
        losses = -before.gather(2, y).sum(), -after.gather(2, y).sum()
        total += torch.stack([divergence(before, after).sum(), *losses]).cpu()
    kl, without_edits, with_edits = total / text[:, 1:].numel()
    return kl.item(), without_edits.exp().item(), with_edits.exp().item()


@torch.no_grad()
def choose(model, tokenizer, wanted, text, n, elsewhere):
    """The n (token, sense) pairs that matter for what is wanted and are rarely used in other text.

    wanted: [(ids (T,), index of the first token to be said)]; text (m,T+1): other text. The score
    of a pair is the sum of alpha onto it at the positions that say what is wanted, minus
    `elsewhere` times its mean per position of other text. Returns tokens (n,), senses (n,).
    """
    K, V, device = model.config.n_sense, model.config.vocab_size, text.device
    score = torch.zeros(V, K, device=device)
    sense = torch.arange(K, device=device)  # (K,)
    for ids, first in wanted:
        alpha = model.contextualization(ids[None, :-1])[0, :, first - 1 :].sum(1)  # (K,T)
        score.index_put_((ids[:-1, None], sense), alpha.mT, accumulate=True)
    for x in text[:, :-1].split(8):
        alpha = model.contextualization(x).sum(2) / text[:, 1:].numel()  # (B,K,T)
        score.index_put_((x[..., None], sense), -elsewhere * alpha.mT, accumulate=True)
    # a token that is half a character can't be named in a file of edits
    nameless = [i for i in range(V) if tokenizer.encode(tokenizer.decode([i])).tolist() != [i]]
    score[nameless] = float("-inf")
    most = int(score.isfinite().sum())
    if n > most:
        raise UserError(f"n_vector={n}: found {most} sense vectors that a file of edits can name")
    best = score.flatten().topk(n).indices  # (n,)
    return best // K, best % K


def encode_example(model, tokenizer, prompt, end, path):
    """(ids (T,) of prompt and end, index of the end's first token). UserError: they are too long."""
    space = "" if prompt[-1].isspace() or end[0].isspace() else " "
    start = tokenizer.encode(prompt).tolist()
    ids = start + tokenizer.encode(space + end).tolist()
    most = model.config.block_size
    if len(ids) > most:
        raise UserError(
            f"{path}: {prompt[:40]!r}... is longer than block_size={most} tokens: expected less"
        )
    return torch.tensor(ids, device=model.wte.weight.device), len(start)


def teach(model, tokenizer, examples, text, s):
    """Learn s.n_vector sense vectors that make the good ends of examples likely, as a list of edits.

    text (n,T+1): half of its windows keep the model as it is elsewhere, by a KL term in the loss;
    the other half measure that, and training stops before their KL exceeds s.max_kl. s: settings of
    lab/edit.py. UserError: an example is longer than block_size.
    """

    def encode(example, key):
        return encode_example(model, tokenizer, example["prompt"], example[key], s.teach)

    goods = [encode(example, "good") for example in examples]
    bads = [encode(example, "bad") if example.get("bad") else None for example in examples]
    known, held_out = text[::2], text[1::2]
    tokens, senses = choose(model, tokenizer, goods, known, s.n_vector, s.elsewhere)  # (N,), (N,)
    E, K, V = model.wte.weight.detach(), model.config.n_sense, model.config.vocab_size
    _, where = tokens.unique(return_inverse=True)  # (N,)
    row = torch.zeros(V, dtype=torch.long, device=text.device)
    row[tokens] = where + 1

    def edits(delta):
        """Edits that add delta (N,D) to the chosen vectors."""
        offset = E.new_zeros(s.n_vector + 1, K, E.size(1))
        offset = offset.index_put((where + 1, senses), delta)
        scale = E.new_ones(s.n_vector + 1, K)
        return Edits(row=row, scale=scale, offset=offset, w=E.new_zeros(0, V, K), f=E.new_zeros(0))

    def log_p_of_end(encoded, edits):
        ids, first = encoded
        each = log_p(model, ids[None, :-1], edits)[0].gather(1, ids[1:, None])  # (T-1,1)
        return each[first - 1 :].sum()

    delta = torch.zeros(s.n_vector, E.size(1), device=text.device, requires_grad=True)  # (N,D)
    best = torch.zeros_like(delta)
    optimizer = torch.optim.Adam([delta], s.learning_rate)
    random = torch.Generator()
    progress = tqdm(range(1, s.steps + 1), "teaching")
    for step in progress:
        now = edits(delta)
        said = torch.stack([log_p_of_end(good, now) for good in goods])  # (examples,)
        if said.exp().min() >= s.enough:
            best = delta.detach().clone()
            break
        loss = -said.sum()
        for bad, good in zip(bads, said):
            if bad is not None:
                loss = loss + F.softplus(log_p_of_end(bad, now) - good)
        some = torch.randint(len(known), (4,), generator=random.manual_seed(s.seed + step))
        x = known[some, :-1]  # (4,T)
        change = divergence(log_p(model, x).detach(), log_p(model, x, now)).mean()
        loss = loss / len(examples) + s.kl_weight * change
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimizer.step()
        if step % 10 == 0:
            kl, *_ = damage(model, edits(delta.detach()), held_out)
            least = said.exp().min()
            progress.set_postfix_str(f"least p(good) {least:.3f}, KL elsewhere {kl:.5f}")
            if not kl <= s.max_kl:  # nan is not
                break
            best = delta.detach().clone()

    with torch.no_grad():
        vectors = model.own_senses(tokens)[torch.arange(s.n_vector), senses] + best  # (N,D)
        adds = model.logits(best).topk(min(5, V)).indices.tolist()  # (N,5)
    return [
        {
            "edit": "replace",
            "word": f'"{tokenizer.decode([token])}"',
            "sense": sense,
            "adds": " ".join(token_text(tokenizer, i) for i in top),
            "vector": [round(value, 6) for value in vector],
        }
        for token, sense, top, vector in zip(
            tokens.tolist(), senses.tolist(), adds, vectors.tolist()
        )
    ]
