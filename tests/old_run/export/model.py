"""The Backpack language model (Hewitt, Thickstun, Manning, Liang, ACL 2023, arXiv 2305.16765), whole.

Every token x owns K sense vectors C(x)_1..K that depend on nothing but x. A Transformer computes only the weights alpha
of their sum, and the logits are linear in that sum (section 3 of the paper):

    o_i = sum_j sum_l alpha[l,i,j] C(x_j)_l        logits_i = E o_i        (E: the token embedding, tied)

Letters in shape comments: B batch, T positions, S key positions (T and what is cached before), D = n_embd, H = n_head,
K = n_sense, d = width of query and key per sense, V = vocab_size.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

try:
    from checkpoints import CheckpointError, load_checkpoint
    from weighted_sum import weighted_sum
except ImportError:  # in a folder of convert.py --to=hf, which transformers makes a package of
    from .checkpoints import CheckpointError, load_checkpoint
    from .weighted_sum import weighted_sum


@dataclass
class BackpackConfig:
    """Sizes and choices of the network; the defaults are the paper's "small". ValueError for sizes that don't fit."""
    block_size: int = 512            # longest context, in tokens
    vocab_size: int = 50257          # tokens; E is padded to a multiple of 8 rows, and those beyond have no logit
    n_layer: int = 12                # Transformer blocks
    n_head: int = 12                 # attention heads
    n_embd: int = 768                # width
    n_sense: int = 16                # sense vectors per token; 0: no senses, the plain Transformer LM, as a baseline
    n_qk: int | None = None          # width of query and key per sense; None: n_embd / n_sense (paper)
    sense_mlp_ratio: int = 4         # inner width of the sense MLPs in n_embd; the paper's sense-count ablation has 1
    sense_out_ratio: int | None = None  # of the second of them; None: the same
    sense_mean: bool = False         # the sum of senses is divided by n_sense, as in Levanter's weights
    dropout: float = 0.0             # on embeddings, attention and residuals, senses too (paper: 0.1)
    bias: bool = True                # biases in Linear and LayerNorm
    init_std: float = 0.02           # of the normal distribution that weights start from
    inverse_layer_scale: bool = True # attention scores of block i are divided by i + 1, too (paper)
    grad_checkpoint: bool = False    # compute activations again in backward, not keep them: less memory, more time

    def __post_init__(self):
        problems = [f"{key}={value} must be at least {int(key != 'n_sense')}" for key, value in vars(self).items()
                    if type(value) is int and value < (key != "n_sense")]
        if self.n_head > 0 and self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if self.n_sense > 0 and self.n_qk is None and self.n_embd % self.n_sense:
            problems.append(f"n_embd={self.n_embd} must be divisible by n_sense={self.n_sense}, or give n_qk")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout} must be in [0, 1)")
        if problems:
            raise ValueError("; ".join(problems))


class Cache:
    """What decoded positions leave behind: named tensors (B, heads or senses, S, width) that grow along S."""

    def __init__(self, block_size):
        self.block_size, self.past, self.tensors = block_size, 0, {}

    def extend(self, name, new):
        """Append new (B,N,T,width) behind the self.past positions held; returns all of them (B,N,S,width)."""
        B, N, T, width = new.shape
        if name not in self.tensors:
            self.tensors[name] = new.new_empty(B, N, self.block_size, width)
        self.tensors[name][:, :, self.past : self.past + T] = new
        return self.tensors[name][:, :, : self.past + T]


class SelfAttention(nn.Module):
    """GPT-2's causal multi-head attention; the score scale of block i is 1/sqrt(D/H)/(i+1)."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.scale = (config.n_embd // config.n_head) ** -0.5 / (layer + 1 if config.inverse_layer_scale else 1)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # 3 x (B,H,T,D/H)
        if cache is not None:
            k, v = cache.extend(("key", self.layer), k), cache.extend(("value", self.layer), v)    # (B,H,S,D/H)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
                                           is_causal=mask is None and T > 1, scale=self.scale)     # (B,H,T,D/H)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, n_in, n_inner, n_out, bias):
        super().__init__()
        self.fc = nn.Linear(n_in, n_inner, bias=bias)
        self.proj = nn.Linear(n_inner, n_out, bias=bias)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-LN Transformer block."""

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
    """C: a token's embedding (..., D) -> its K senses (..., K, D), whatever its position and context (section 3.2)."""

    def __init__(self, config):
        super().__init__()
        D, self.n_sense = config.n_embd, config.n_sense
        self.ln_0 = nn.LayerNorm(D, bias=config.bias)
        self.ln_1 = nn.LayerNorm(D, bias=config.bias)
        self.mlp = MLP(D, config.sense_mlp_ratio * D, D, config.bias)
        self.ln_2 = nn.LayerNorm(D, bias=config.bias)
        self.mlp_out = MLP(D, (config.sense_out_ratio or config.sense_mlp_ratio) * D, config.n_sense * D, config.bias)
        self.drop, self.mean = nn.Dropout(config.dropout), config.sense_mean

    def forward(self, e):
        e = self.drop(e)
        r = self.drop(self.ln_0(e)) + e   # a second residual that the authors call accidental; their weights have it
        r = r + self.drop(self.mlp(self.ln_1(r)))
        C = self.mlp_out(self.ln_2(r)).unflatten(-1, (self.n_sense, -1))                           # (...,K,D)
        return C / self.n_sense if self.mean else C


class Edits(nn.Module):
    """Changes of senses that leave the weights of the model alone (section 6 of the paper); edits.py makes them.

    Sense vectors: C'(x)_l = scale C(x)_l + offset, with row (V,): which of scale (n,K) and offset (n,K,D) is a token's;
    row 0 is for tokens that stay as they are. Topics: w (m,V,K), f (m,); each multiplies alpha[l,i,j] by b w[x_j,l] +
    1-b. The annealing b falls as the text up to i says what sense l of x_j would say (app. D, as in the authors' code):

        a = sum over t <= i of relu(E_{x_t} . C'(x_j)_l)        b = sigmoid(6 - f a) (1 + j/100)
    """

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():  # row, scale, offset, w, f
            self.register_buffer(name, tensor)

    def senses(self, ids, C):
        """ids (...) and their C (...,K,D) -> C' (...,K,D)."""
        row = self.row[ids]                                                                        # (...)
        return (self.scale[row][..., None] * C + self.offset[row]).to(C.dtype)

    def topic_weights(self, wte, idx, C, mask=None, cache=None):
        """What topics multiply alpha by, (B,K,T,S): of queries idx (B,T) and keys with senses C (B,K,S,D)."""
        T, S, total = idx.size(1), C.size(2), 1.0
        ids = idx if cache is None else cache.extend("ids", idx[:, None, :, None])[:, 0, :, 0]     # (B,S)
        there = torch.ones_like(ids) if mask is None else mask[:, 0, -1]                           # (B,S), 0 at padding
        e = (wte(ids) * there[..., None])[:, None].to(C.dtype)                                     # (B,1,S,D)
        said = (e[:, :, S - T :] @ C.mT).relu().cumsum(2)                                          # (B,K,T,S)
        if cache is not None:
            new = (e[:, :, : S - T] @ C[:, :, S - T :].mT).relu().sum(2)                           # (B,K,T)
            before = cache.extend("said", new[..., None])[..., 0]                                  # (B,K,S)
            said = said + before[:, :, None]
            before.copy_(said[:, :, -1])
        late = 1 + (there.cumsum(1) - 1).to(C.dtype) / 100                                         # (B,S)
        for w, f in zip(self.w, self.f):
            b = torch.sigmoid(6 - f * said) * late[:, None, None]                                  # (B,K,T,S)
            total = total * (b * w[ids].mT[:, :, None] + 1 - b)
        return total


class Backpack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.edits = config, None  # edits: an Edits, or None
        D = config.n_embd
        self.wte = nn.Embedding(-(-config.vocab_size // 8) * 8, D)  # E: Transformer input, sense input and LM head
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
        """N(0, init_std); over sqrt(2 n_layer) for the matrices that end a residual branch or a sense MLP (proj)."""
        std = self.config.init_std
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif ".ln_" in f".{name}":
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if "proj" in name else std)

    def senses(self, ids):
        """ids, any shape (...) -> C(ids) (..., K, D): the sense vectors of tokens, as self.edits leaves them."""
        C = self._run(self.sense_network, self.wte(ids))
        return C if self.edits is None else self.edits.senses(ids, C)

    def contextualization(self, idx, attention_mask=None):
        """idx (B,T) -> alpha (B,K,T,T), lower-triangular, rows sum to 1 but for topics (section 3.3)."""
        h, mask = self._hidden(idx, attention_mask)
        alpha = self._alpha(*self._qk(h), mask)
        if self.edits is not None and len(self.edits.f):
            alpha = alpha * self.edits.topic_weights(self.wte, idx, self.senses(idx).transpose(1, 2), mask)
        return alpha

    def _hidden(self, idx, attention_mask=None, cache=None):
        """The Transformer: idx (B,T) -> h (B,T,D), and mask: (B,1,T,S), True where a query may look at a key, or None
        where plain causal attention serves."""
        T, past, mask = idx.size(1), cache.past if cache is not None else 0, None
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens are more than block_size={self.config.block_size}")
        pos = torch.arange(past, past + T, device=idx.device)                                      # (T,)
        if attention_mask is not None:
            pos = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]                       # (B,T)
            causal = idx.new_ones(T, past + T, dtype=torch.bool).tril(past)                        # (T,S)
            mask = causal & attention_mask.bool()[:, None, None, :]                                # (B,1,T,S)
            mask |= causal.triu(past)  # a padding position looks at itself, so that no row is empty
        h = self.drop(self.wte(idx) + self.wpe(pos))                                               # (B,T,D)
        for block in self.blocks:
            h = self._run(block, h, mask, cache)
        return self.ln_f(h), mask

    def _qk(self, h):
        """h (B,T,D) -> query, divided by sqrt(d), and key of each sense, both (B,K,T,d)."""
        q, k = self.sense_qk(h).unflatten(-1, (2, self.config.n_sense, self.n_qk)).permute(2, 0, 3, 1, 4).contiguous()
        return q / math.sqrt(self.n_qk), k

    def _alpha(self, q, k, mask=None):
        """query (B,K,T,d) and key (B,K,S,d) -> alpha (B,K,T,S), their softmax over the positions that each may see."""
        if mask is None:
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
        return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)

    def _sum(self, h, idx, mask=None, cache=None, senses=None):
        """o_i = sum_j sum_l alpha[l,i,j] C(x_j)_l: h (B,T,D), idx (B,T) -> o (B,T,D)."""
        q, k = self._qk(h)
        if senses is None:
            ids, where = idx.unique(return_inverse=True)                                           # (U,), (B,T)
            senses = self.senses(ids), where
        C, where = senses[0].flatten(1), senses[1]                                                 # (U,K*D), (B,T)
        topics = self.edits is not None and len(self.edits.f) > 0
        if mask is None and cache is None and not topics:
            return weighted_sum(q, k, C, where)
        C = F.embedding(where, C)                                                                  # (B,T,K*D)
        if cache is not None:
            k, C = cache.extend("sense key", k), cache.extend("sense", C[:, None])[:, 0]     # (B,K,S,d), (B,S,K*D)
        C, alpha = C.unflatten(-1, (q.size(1), -1)), self._alpha(q, k, mask)                 # (B,S,K,D), (B,K,T,S)
        if topics:
            alpha = alpha * self.edits.topic_weights(self.wte, idx, C.transpose(1, 2), mask, cache)
        return alpha.permute(0, 2, 3, 1).flatten(2) @ C.flatten(1, 2)                              # (B,T,D)

    def _output(self, idx, attention_mask=None, cache=None, senses=None):
        """idx (B,T) -> o, which the logits are linear in, and h, the Transformer's own output, both (B,T,D); the same
        without senses. cache, where given, holds the positions before."""
        h, mask = self._hidden(idx, attention_mask, cache)
        o = self._run(self._sum, h, idx, mask, cache, senses) if self.config.n_sense else h
        if cache is not None:
            cache.past += idx.size(1)
        return o, h

    def _run(self, function, *args):
        if self.config.grad_checkpoint and self.training:
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _logits(self, o):
        """o (...,D) -> logits (...,V) = o E^T, without the padded rows."""
        return F.linear(o, self.wte.weight[: self.config.vocab_size])

    @torch.compiler.disable  # chunks run eagerly: the compiled part ends at o
    def _loss(self, o, targets):
        """Mean cross-entropy of logits o E^T, o (B,T,D), targets (B,T); large vocabularies in chunks, never whole."""
        E = self.wte.weight[: self.config.vocab_size]                                              # (V,D)
        if torch.is_autocast_enabled(o.device.type):
            dtype = torch.get_autocast_dtype(o.device.type)
            o, E = o.to(dtype), E.to(dtype)
        chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512) if len(E) > E.size(1) else None
        return F.linear_cross_entropy(o.flatten(0, 1), E, targets.flatten(), options=chunks)

    def forward(self, idx, targets=None, attention_mask=None, senses=None, transformer_share=None):
        """Next-token logits, or their loss.

        idx (B,T) token ids; targets (B,T) the token that follows each, -100 where none counts; attention_mask (B,T)
        0 at (left) padding. Returns (logits (B,T,V), None) without targets, else (None, mean cross-entropy in nats).
        senses: (C (U,K,D), where (B,T)), sense vectors at hand and which of them stands where. None: they are computed
        here, once for each distinct token, so dropout has one mask for it. transformer_share: m, a tensor (): the loss
        is (1 - m) of o's and m of the one that the Transformer would have alone, with logits E h_i: it teaches the
        Transformer directly, where o's gradient reaches it through alpha only. ValueError for more than block_size
        tokens.
        """
        o, h = self._output(idx, attention_mask, senses=senses)                                    # (B,T,D)
        if targets is None:
            return self._logits(o), None
        loss = self._loss(o, targets)
        if transformer_share is not None:
            loss = (1 - transformer_share) * loss + transformer_share * self._loss(h, targets)
        return None, loss

    @torch.no_grad()
    def sense_table(self, max_bytes=4e9):
        """The senses of all tokens (V,K,D), which generate may look up, or None where they would take more bytes."""
        ids, table = torch.arange(self.config.vocab_size, device=self.wte.weight.device), None     # (V,)
        if self.config.n_sense and (one := self.senses(ids[:1])).nbytes * len(ids) <= max_bytes:
            table = one.new_empty(len(ids), *one.shape[1:])                                        # (V,K,D)
            for part in ids.split(1024):
                table[part] = self.senses(part)
        return table

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, attention_mask=None, generator=None,
               sense_table=None):
        """Yield max_new_tokens times the next token of each sequence (B,1), given idx (B,T); see generate."""
        training, block_size = self.training, self.config.block_size
        self.eval()
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)
        start, cache = max(0, idx.size(1) - block_size), Cache(block_size)
        try:
            for _ in range(max_new_tokens):
                if idx.size(1) - start > block_size:  # full: go on from the last half of the window
                    start, cache = idx.size(1) - max(1, block_size // 2), Cache(block_size)
                new = idx[:, start + cache.past :]                                                 # (B,T) or (B,1)
                mask = attention_mask[:, start : idx.size(1)] if attention_mask is not None else None
                senses = (sense_table, new) if sense_table is not None else None
                logits = self._logits(self._output(new, mask, cache, senses)[0][:, -1])            # (B,V)
                yield (token := sample_token(logits, temperature, top_k, top_p, generator))        # (B,1)
                idx = torch.cat((idx, token), 1)
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, **sampling):
        """Continue idx (B,T), T >= 1, by max_new_tokens tokens -> (B, T + max_new_tokens).

        temperature: 0 takes the likeliest token; top_k: only the k likeliest; top_p: only the likeliest that together
        have this probability; attention_mask (B,T): 0 at left padding; generator: a torch.Generator to draw from;
        sense_table: what sense_table() returned, so that senses are looked up and not computed.
        Each step computes one position: past keys, values and senses are cached. When block_size positions are cached,
        the last block_size/2 are computed anew at positions from 0, and it goes on.
        """
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **sampling)], 1)

    def num_params(self):
        """Number of parameters, E once."""
        return sum(p.numel() for p in self.parameters())

    def param_groups(self, weight_decay):
        """Groups for AdamW: matrices decay; biases, norms and embeddings don't (paper)."""
        embeddings = {self.wte.weight, self.wpe.weight}
        decay = [p for p in self.parameters() if p.dim() >= 2 and p not in embeddings]
        rest = [p for p in self.parameters() if p.dim() < 2 or p in embeddings]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    @classmethod
    def from_checkpoint(cls, source, device="cpu", **changes):
        """The model of a run folder, a ckpt.pt or a checkpoint already read, in eval mode.

        changes: fields of BackpackConfig to have otherwise, such as dropout. Raises CheckpointError.
        """
        ckpt = source if isinstance(source, dict) else load_checkpoint(source, device)
        try:
            values = {f.name: ckpt["config"][f.name] for f in fields(BackpackConfig) if f.name in ckpt["config"]}
            with torch.device("meta"):
                model = cls(BackpackConfig(**values | changes))
            model.load_state_dict(ckpt["model"], assign=True)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint's weights don't fit its config: {str(error)[:200]!r}") from None
        return model.to(device, torch.float32).eval()


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token (B,1) from logits (B,V); see Backpack.generate."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]                            # (B,1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)                                        # (B,V)
        beyond = p.cumsum(-1) - p >= top_p                                                         # (B,V), sorted
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
