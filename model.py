"""The Backpack language model (Hewitt, Thickstun, Manning, Liang, ACL 2023, arXiv 2305.16765).

Every token x has K sense vectors C(x)_1..K that depend on nothing but x. A Transformer computes only
the weights alpha of their sum, and the logits are linear in that sum (section 3 of the paper):

    o_i = sum_j sum_l alpha[l,i,j] C(x_j)_l      logits_i = E o_i      (E: the token embedding, tied)

This is attention with K heads whose values are the senses, summed over heads, with no output projection.
"""

# Letters in shape comments: B batch, T positions, S key positions (T and those cached before), V tokens of
# the vocabulary, R rows of E (V padded), D = n_embd, H = n_head, K = n_sense, d = n_qk (width of a sense's
# query and key), U distinct tokens, N distinct tokens of a sequence; t, n: a part of T, of N or of rows.

import math
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class BackpackConfig:
    """Sizes and choices of the network. The defaults are the paper's "small". ValueError: they don't fit."""

    block_size: int = 512  # [1, 1e6] longest context, in tokens
    vocab_size: int = 50257  # [1, 1e7] tokens; E is padded to a multiple of 8 rows
    n_layer: int = 12  # [1, 1000] Transformer blocks
    n_head: int = 12  # [1, 1000] attention heads
    n_embd: int = 768  # [1, 1e5] width
    n_sense: int = 16  # [0, 1e4] sense vectors per token; 0: the plain Transformer LM (baseline)
    n_qk: int | None = None  # [1, 1e4] width of a sense's query and key; None: n_embd / n_sense
    sense_mlp_ratio: int = 4  # [1, 100] inner width of the sense MLPs / n_embd (ablation: 1)
    sense_out_ratio: int | None = None  # [1, 100] of the second of them; None: as the first
    dropout: float = 0.0  # [0, 1) on embeddings, attention, residuals and senses (paper: 0.1)
    bias: bool = True  # biases in Linear and LayerNorm
    init_std: float = 0.02  # [0, 10] standard deviation of initial weights
    inverse_layer_scale: bool = True  # divide the attention scores of block i by i + 1 (paper)
    grad_checkpoint: bool = False  # recompute activations in backward instead of storing them

    def __post_init__(self):
        # K: senses that share n_embd among their queries; none do if n_qk is given
        D, H, K = self.n_embd, self.n_head, self.n_sense if self.n_qk is None else 0
        wrong = {}  # {problem: whether it is there}
        for f in fields(self):
            value, low = getattr(self, f.name), int(f.name != "n_sense")
            if not isinstance(value, f.type | int if f.type is float else f.type):
                raise TypeError(f"{f.name}={value!r} must be {f.type}")
            wrong[f"{f.name}={value} must be at least {low}"] = type(value) is int and value < low
        wrong |= {
            f"n_layer={self.n_layer} must be at most 1000": self.n_layer > 1000,
            f"n_embd={D} must be divisible by n_head={H}": H > 0 and D % H,
            f"n_embd={D} must be divisible by n_sense={K}, or give n_qk": K > 0 and D % K,
            f"dropout={self.dropout} must be in [0, 1)": not 0 <= self.dropout < 1,
        }
        if any(wrong.values()):
            raise ValueError("; ".join(problem for problem in wrong if wrong[problem]))


class Cache:
    """What generation keeps of the positions before: named tensors (B, heads, S, width) that grow along S."""

    def __init__(self, block_size):
        self.block_size, self.past, self.tensors = block_size, 0, {}

    def extend(self, name, new):
        """Append new (B,H,T,width) behind the self.past positions held; returns all, (B,H,S,width)."""
        B, H, T, width = new.shape
        if name not in self.tensors:
            self.tensors[name] = new.new_empty(B, H, self.block_size, width)
        self.tensors[name][:, :, self.past : self.past + T] = new
        return self.tensors[name][:, :, : self.past + T]


class SelfAttention(nn.Module):
    """GPT-2's causal multi-head attention; scores are scaled by 1/sqrt(D/H)/(i+1) in block i."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.scale = (config.n_embd // config.n_head) ** -0.5
        self.scale /= layer + 1 if config.inverse_layer_scale else 1
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask=None, cache=None):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head)  # (B,T,3,H,D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B,H,T,D/H)
        if cache is not None:
            k = cache.extend(("key", self.layer), k)  # (B,H,S,D/H)
            v = cache.extend(("value", self.layer), v)  # (B,H,S,D/H)
        p, causal = self.dropout if self.training else 0.0, mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))  # (B,T,D)


class MLP(nn.Module):
    def __init__(self, n_in, n_inner, n_out, bias):
        super().__init__()
        self.fc = nn.Linear(n_in, n_inner, bias=bias)
        self.proj = nn.Linear(n_inner, n_out, bias=bias)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """A pre-LN Transformer block."""

    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.ln_1 = nn.LayerNorm(D, bias=config.bias)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(D, bias=config.bias)
        self.mlp = MLP(D, 4 * D, D, config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class SenseNetwork(nn.Module):
    """C: token embeddings (...,D) -> their senses (...,K,D), whatever position and context (section 3.2)."""

    def __init__(self, config):
        super().__init__()
        D, self.n_sense = config.n_embd, config.n_sense
        out_ratio = config.sense_out_ratio or config.sense_mlp_ratio
        self.ln_0 = nn.LayerNorm(D, bias=config.bias)
        self.ln_1 = nn.LayerNorm(D, bias=config.bias)
        self.mlp = MLP(D, config.sense_mlp_ratio * D, D, config.bias)
        self.ln_2 = nn.LayerNorm(D, bias=config.bias)
        self.mlp_out = MLP(D, out_ratio * D, config.n_sense * D, config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, e):
        e = self.drop(e)
        # the authors call this second residual accidental, but their published weights have it
        r = self.drop(self.ln_0(e)) + e
        r = r + self.drop(self.mlp(self.ln_1(r)))
        return self.mlp_out(self.ln_2(r)).unflatten(-1, (self.n_sense, -1))  # (...,K,D)


# ---- the sum of senses


def contextualize(q, k, mask=None):
    """Contextualization weights alpha = softmax(q k^T / sqrt(d)) of every sense (section 3.3).

    q (B,K,T,d) are the last T of the positions of k (B,K,S,d); mask (B,1,T,S) is True where a query may
    look, None for plain causal weights. Returns alpha (B,K,T,S), whose rows sum to 1.
    """
    T, S = q.size(2), k.size(2)
    scores = (q / math.sqrt(q.size(3))) @ k.mT  # (B,K,T,S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    elif T > 1:  # only the last T keys can lie in a query's future
        scores[..., S - T :] += scores.new_full((T, T), -math.inf).triu(1)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))


def weigh(alpha, C):
    """o_i = sum_j sum_l alpha[l,i,j] C_jl, as one product: alpha (B,K,T,S), C (B,S,K,D) -> o (B,T,D)."""
    return alpha.to(C.dtype).permute(0, 2, 3, 1).flatten(2) @ C.flatten(1, 2)


def sum_senses(q, k, C, where, block=None):
    """weigh(contextualize(q, k), C[where]) without (B,K,T,T) weights in memory.

    q and k (B,K,T,d); C (U,K,D) senses of distinct tokens; where (B,T): which of them stands where.
    Returns o (B,T,D). Backward computes the weights of a block of queries again.
    """
    on_cpu = q.device.type == "cpu"
    block = block or (128 if on_cpu else 256)  # a GPU wants fewer and larger products
    B, K, T, _ = q.shape
    slot = None
    # Text repeats itself: with the weights of equal tokens added first, the products get shorter. Counting
    # these tokens would make the host wait for a GPU, though, or break a graph.
    if on_cpu and not torch.compiler.is_compiling():
        # number the distinct tokens of each sequence in the order in which they first appear
        first = (where[:, :, None] == where[:, None, :]).byte().argmax(-1)  # (B,T)
        new = (first == torch.arange(T)).cumsum(-1)  # (B,T)
        slot = new.gather(1, first) - 1  # (B,T)
        where = where.new_zeros(B, int(new[:, -1].max())).scatter_(1, slot, where)  # (B,N)
    C = C.flatten(1).to(q.dtype)  # (U,K*D)

    def part(q, k, C, where):
        alpha = contextualize(q, k)  # (B,K,t,S)
        if slot is not None:
            index = slot[:, None, None, : k.size(2)].expand(alpha.shape)  # (B,K,t,S)
            empty = alpha.new_zeros(*alpha.shape[:3], where.size(1))  # (B,K,t,N)
            alpha = empty.scatter_add(3, index, alpha)
        return weigh(alpha, F.embedding(where, C).unflatten(2, (K, -1)))  # C there: (B,n,K,D)

    if T <= block:
        return part(q, k, C, where)
    o = []
    for i in range(0, T, block):
        j = min(i + block, T)
        n = j if slot is None else int(new[:, j - 1].max())  # tokens in view of this block
        args = q[:, :, i:j], k[:, :, :j], C, where[:, :n]
        o.append(checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(o, 1)


# ---- the loss


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits o E^T by chunks, so that the logits are never whole."""

    # The gradient of a chunk's logits is softmax - one-hot, so forward takes it while they are there: three
    # products, where recomputing them takes four. Sums are float32 whatever the type of o. The gradient
    # meets 1/N and the loss scale in backward: in float16 it can't underflow or hide from a GradScaler.

    @staticmethod
    def forward(ctx, o, E, y, vocab_size, with_grad):
        """o (M,D), E (R,D), y (M,) with -100 where no target counts -> the loss, a float32 scalar."""
        wide = torch.promote_types(o.dtype, torch.float32)
        W = E.to(o.dtype)  # (R,D)
        total, count = o.new_zeros((), dtype=wide), (y >= 0).sum()
        do, dE = (torch.empty_like(o), torch.zeros_like(E, dtype=wide)) if with_grad else (o, None)
        # rows of a chunk; p.T @ x over more of them could overflow in float16
        n = min(8192, max(512 if o.device.type == "cpu" else 2048, 2**23 // len(E)))
        # one buffer for all chunks: fresh memory of this size costs a CPU as much as the arithmetic
        buffer = o.new_empty(min(n, len(o)), len(E))
        # x and dx (n,D), target (n,1)
        for x, dx, target in zip(o.split(n), do.split(n), y[:, None].split(n)):
            counts, target = target >= 0, target.clamp(min=0)
            logits = torch.mm(x, W.T, out=buffer[: len(x)]).to(wide)  # (n,R)
            # padded rows take part in the product, as GPU kernels want sizes of 8, but are impossible
            logits[:, vocab_size:] = -math.inf
            of_target, top = logits.gather(1, target), logits.amax(1, keepdim=True)  # (n,1)
            p = logits.sub_(top).exp_()  # (n,R), softmax but for its norm
            norm = p.sum(1, keepdim=True)  # (n,1)
            total += ((norm.log() + top - of_target) * counts).sum()
            if with_grad:
                p = p.div_(norm).scatter_add_(1, target, -torch.ones_like(norm)).to(o.dtype)
                torch.mul(p @ W, counts, out=dx)
                x = x * counts
                dE = dE.addmm_(p.T, x) if p.dtype == wide else dE.add_(p.T @ x)
        ctx.save_for_backward(do, dE, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        do, dE, count = ctx.saved_tensors
        return do * (grad / count), dE * (grad / count), None, None, None


# ---- the model


class Backpack(nn.Module):
    """The Backpack; with n_sense=0 the Transformer LM inside it, alone.

    model.edits is None or an object that changes senses wherever they are used and leaves the weights
    alone: it has .senses(ids, C), .has_topics and .reweigh(alpha, ...); see lab/control.py.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.edits = config, None
        D = config.n_embd
        # E is the input of the Transformer, the input of the sense network and the LM head
        self.wte = nn.Embedding(-(-config.vocab_size // 8) * 8, D)
        self.wpe = nn.Embedding(config.block_size, D)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D, bias=config.bias)
        if config.n_sense:
            self.n_qk = config.n_qk or D // config.n_sense
            self.sense_network = SenseNetwork(config)
            self.sense_qk = nn.Linear(D, 2 * config.n_sense * self.n_qk, bias=config.bias)
        self.init_weights()

    def init_weights(self):
        """Biases 0, norms 1, the rest N(0, init_std), over sqrt(2 n_layer) at the end of branches (proj)."""
        std = self.config.init_std
        at_ends = std / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" in name:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=at_ends if "proj" in name else std)

    def forward(
        self, idx, targets=None, attention_mask=None, distinct=None, transformer_share=None
    ):
        """Logits of the next token (B,T,V) and None, or with targets None and their mean loss in nats.

        idx (B,T): token ids. targets (B,T): the token after each, -100 where none counts. attention_mask
        (B,T): 0 at (left) padding. distinct: (ids (U,), where (B,T)), the distinct tokens of idx and which
        of them stands where, if known; it saves a GPU a device sync. transformer_share: m, a scalar
        tensor: returns the Backpack's loss, and (1-m) of it plus m of the Transformer's own, of the logits
        E h, which teach it directly and not through alpha only. ValueError: more than block_size tokens.
        """
        o, h = self.output(idx, attention_mask, distinct=distinct)  # (B,T,D), (B,T,D)
        if targets is None:
            return self.logits(o), None
        loss, m = self.loss(o, targets), transformer_share
        if m is None:
            return None, loss
        return loss.detach(), (1 - m) * loss + m * self.loss(h, targets)

    def output(self, idx, attention_mask=None, cache=None, distinct=None, sense_table=None):
        """idx (B,T) -> o, which the logits are linear in, and h, the Transformer's output, both (B,T,D);
        without senses, o is h. cache: of the positions before idx; this call extends it."""
        h, mask = self.hidden(idx, attention_mask, cache)  # (B,T,D), (B,1,T,S) or None
        o = h
        if self.config.n_sense:
            o = self.remat(self.sum, h, idx, mask, cache, distinct, sense_table)  # (B,T,D)
        if cache is not None:
            cache.past += idx.size(1)
        return o, h

    def hidden(self, idx, attention_mask=None, cache=None):
        """The Transformer: idx (B,T) -> h (B,T,D) and the mask of its attention, (B,1,T,S), or None."""
        T, past, mask = idx.size(1), cache.past if cache is not None else 0, None
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens are more than block_size={self.config.block_size}")
        pos = torch.arange(past, past + T, device=idx.device)  # (T,)
        # is_causal would align the queries with the first keys
        if attention_mask is None and past and T > 1:
            attention_mask = idx.new_ones(len(idx), past + T)
        if attention_mask is not None:
            pos = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]  # (B,T)
            causal = idx.new_ones(T, past + T, dtype=torch.bool).tril(past)  # (T,S)
            mask = causal & attention_mask.bool()[:, None, None, :]  # (B,1,T,S)
            mask |= causal.triu(past)  # padding looks at itself, so that no row is empty
        h = self.drop(self.wte(idx) + self.wpe(pos))  # (B,T,D)
        for block in self.blocks:
            h = self.remat(block, h, mask, cache)
        return self.ln_f(h), mask

    def own_senses(self, ids):
        """ids (...) -> C(ids) (...,K,D), without edits."""
        return self.sense_network(self.wte(ids))

    def senses(self, ids):
        """ids of any shape (...) -> their sense vectors C(ids) (...,K,D), as self.edits leaves them."""
        C = self.own_senses(ids)
        return C if self.edits is None else self.edits.senses(ids, C)

    def query_key(self, h):
        """h (B,T,D) -> query and key of every sense, both (B,K,T,d)."""
        qk = self.sense_qk(h).unflatten(-1, (2, self.config.n_sense, self.n_qk))  # (B,T,2,K,d)
        return qk.permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    def sum(self, h, idx, mask=None, cache=None, distinct=None, sense_table=None):
        """o_i = sum_j sum_l alpha[l,i,j] C(x_j)_l: h (B,T,D), idx (B,T) -> o (B,T,D)."""
        q, k = self.query_key(h)  # (B,K,T,d)
        if sense_table is not None:
            C, where = sense_table, idx  # (V,K,D), (B,T)
        else:  # senses depend on the token alone: once for each distinct one
            ids, where = idx.unique(return_inverse=True) if distinct is None else distinct
            C = self.senses(ids)  # (U,K,D)
        topics = self.edits is not None and self.edits.has_topics
        if mask is None and cache is None and not topics:
            return sum_senses(q, k, C, where)
        C = C[where]  # (B,T,K,D)
        if cache is not None:
            k = cache.extend("sense key", k)  # (B,K,S,d)
            C = cache.extend("sense", C.flatten(2)[:, None])[:, 0]  # (B,S,K*D)
            C = C.unflatten(2, (self.config.n_sense, -1))  # (B,S,K,D)
        alpha = contextualize(q, k, mask)  # (B,K,T,S)
        if topics:
            alpha = self.edits.reweigh(alpha, self.wte, idx, C, mask, cache)
        return weigh(alpha, C)

    def contextualization(self, idx, attention_mask=None):
        """idx (B,T) -> alpha (B,K,T,T): lower-triangular; rows sum to 1 unless topics are edited in."""
        h, mask = self.hidden(idx, attention_mask)
        alpha = contextualize(*self.query_key(h), mask)
        if self.edits is not None and self.edits.has_topics:
            alpha = self.edits.reweigh(alpha, self.wte, idx, self.senses(idx), mask)
        return alpha

    def remat(self, function, *args):
        """Call function; with grad_checkpoint its activations are computed again in backward."""
        if self.config.grad_checkpoint and self.training:
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def logits(self, o):
        """o (...,D) -> logits (...,V) = o E^T."""
        return F.linear(o, self.wte.weight)[..., : self.config.vocab_size]

    def loss(self, o, targets):
        """Mean cross-entropy (nats, float32) of the logits of o (B,T,D); targets (B,T), -100: not counted."""
        if torch.is_autocast_enabled(o.device.type):
            o = o.to(torch.get_autocast_dtype(o.device.type))
        o, y = o.flatten(0, 1), targets.flatten()  # (M,D), (M,), M = B*T
        V, with_grad = self.config.vocab_size, torch.is_grad_enabled()
        return LinearCrossEntropy.apply(o, self.wte.weight, y, V, with_grad)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, attention_mask=None, sense_table=None, **sampling):
        """Yield the next token of every sequence (B,1), max_new_tokens times; see generate."""
        training, block_size = self.training, self.config.block_size
        self.eval()
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)
        start, cache = max(0, idx.size(1) - block_size), Cache(block_size)
        try:
            for _ in range(max_new_tokens):
                if idx.size(1) - start > block_size:  # full: go on from the last half of the window
                    start, cache = idx.size(1) - max(1, block_size // 2), Cache(block_size)
                new = idx[:, start + cache.past :]  # (B,T), after the first step (B,1)
                mask = None if attention_mask is None else attention_mask[:, start : idx.size(1)]
                o, _ = self.output(new, mask, cache, sense_table=sense_table)
                token = sample_token(self.logits(o[:, -1]), **sampling)  # (B,1)
                yield token
                idx = torch.cat((idx, token), 1)
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, **sampling):
        """Continue idx (B,T), T >= 1, by max_new_tokens tokens -> (B, T + max_new_tokens).

        temperature: 0 takes the likeliest token; top_k: only the k likeliest; top_p: only the likeliest that
        together have this probability; generator: a torch.Generator; attention_mask (B,T): 0 at left
        padding; sense_table (V,K,D): the senses of all tokens, to look them up. Past keys, values and
        senses are cached; when block_size positions are, the last half is computed anew from position 0.
        """
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **sampling)], 1)

    def num_params(self):
        """Number of parameters, E counted once."""
        return sum(p.numel() for p in self.parameters())

    def param_groups(self, weight_decay):
        """Parameter groups for AdamW: matrices decay; biases, norms and embeddings don't (paper)."""
        embeddings = {self.wte.weight, self.wpe.weight}
        decays = {p: p.dim() >= 2 and p not in embeddings for p in self.parameters()}
        decay, rest = ([p for p in decays if decays[p] == side] for side in (True, False))
        groups = ((decay, weight_decay), (rest, 0.0))
        return [{"params": params, "weight_decay": w} for params, w in groups]

    @classmethod
    def from_checkpoint(cls, source, device="cpu", **changes):
        """The model of a run folder, a ckpt.pt or a checkpoint already read: float32, in eval mode.

        changes: fields of BackpackConfig to set otherwise. CheckpointError: missing or damaged.
        """
        ckpt = source if isinstance(source, dict) else load_checkpoint(source, mmap=True)
        with torch.device("meta"):  # no memory, no initialisation: the weights come now
            model = cls(BackpackConfig(**ckpt["config"] | changes))
        to = {"device": device, "dtype": torch.float32, "copy": True}  # not pages of the file
        model.load_state_dict({name: t.to(**to) for name, t in ckpt["model"].items()}, assign=True)
        return model.eval()


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token (B,1) from logits (B,V); see Backpack.generate."""
    if temperature < 1e-5:  # 0, or so near that a division would overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B,1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)  # (B,V)
        beyond = p.cumsum(-1) - p >= top_p  # (B,V), in sorted order
        beyond[:, 0] = False  # the likeliest stays, however small top_p is
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# ---- checkpoints


class CheckpointError(OSError):
    """A checkpoint that is missing, damaged, of another shape or not ours; one line for the user."""


def load_checkpoint(path, device="cpu", mmap=False):
    """The dict that train.py saved, of a run folder or a file; nothing pickled in it is executed.

    mmap: tensors are pages of the file, which processes share and nothing may write in place meanwhile.
    CheckpointError: there is none, or it is damaged.
    """
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the folder of a trained run")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at checksums
        ckpt = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # zip, pickle and storage errors have no common class
        damaged = repr(" ".join(str(error).split())[:200])
    if damaged:
        raise CheckpointError(f"{path} is truncated, damaged or not from train.py: {damaged}")
    parts = {"model": dict, "config": dict, "step": int, "meta": dict}
    try:
        wrong = [key for key in parts if not isinstance(ckpt.get(key), parts[key])]
        if wrong or not isinstance(ckpt.get("settings", {}), dict):
            raise ValueError(f"it lacks {', '.join(wrong) or 'settings'}")
        ckpt = upgrade(ckpt)
        Backpack.from_checkpoint(ckpt, "meta")  # its config and weights fit, in no memory
        if not all(t.is_floating_point() and t.isfinite().all() for t in ckpt["model"].values()):
            raise ValueError("some weights are not finite numbers")
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not fit model.py: {reason}") from None
    return ckpt


def upgrade(ckpt):
    """Bring a checkpoint from before 2026-11-24 to today's form."""
    # It had all settings in one dict, and sense_mean, which divided the sum by n_sense: now the matrix that
    # makes the senses is divided.
    if "settings" in ckpt:
        return ckpt
    known = {f.name for f in fields(BackpackConfig)}
    config = {key: value for key, value in ckpt["config"].items() if key in known}
    settings = {key: value for key, value in ckpt["config"].items() if key not in known}
    n = config["n_sense"] if settings.pop("sense_mean", False) else 0
    weights = {k: w / n if n and "mlp_out.proj" in k else w for k, w in ckpt["model"].items()}
    return ckpt | {"model": weights, "config": config, "settings": settings}
