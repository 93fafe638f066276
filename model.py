"""
The Backpack language model, all of it (Hewitt, Thickstun, Manning, Liang, ACL 2023, arXiv 2305.16765).

Every token x has K sense vectors C(x)_1..K that depend on nothing but x. A Transformer computes only
the weights alpha of their sum, and the logits are linear in that sum (section 3 of the paper):

    o_i = sum_j sum_l alpha[l,i,j] C(x_j)_l        logits_i = E o_i       (E: the token embedding, tied)

It is attention with K heads whose values are the senses, summed over heads, without an output matrix.

Shapes: B batch, T positions, S keys (T, and those cached before them), V vocabulary, R rows of E,
        D n_embd, H n_head, K n_sense, d n_qk, U distinct tokens of a batch
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass
class BackpackConfig:
    """The sizes of the network; the defaults are the paper's "small". ValueError: they don't divide."""

    block_size: int = 512  # longest context, in tokens
    vocab_size: int = 50257  # tokens; E is padded to a multiple of 8 rows
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_sense: int = 16  # sense vectors per token; 0: the plain Transformer, our baseline
    n_qk: int | None = None  # width of a sense's query and key; None: n_embd / n_sense (paper)
    sense_mlp_ratio: int = 4  # inner width of the two sense MLPs / n_embd
    sense_out_ratio: int | None = None  # the same of the second one; None: as the first
    dropout: float = 0.0  # on embeddings, attention, residuals and senses (paper: 0.1)
    bias: bool = True  # in Linear and LayerNorm
    exact_gelu: bool = False  # as in nanoGPT; else approximated by tanh, as in GPT-2 and the paper
    init_std: float = 0.02  # standard deviation of the initial weights
    inverse_layer_scale: bool = True  # divide the attention scores of block i by i + 1 (paper)
    grad_checkpoint: bool = False  # recompute blocks in backward instead of keeping activations

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if self.n_sense and self.n_qk is None and self.n_embd % self.n_sense:
            sizes = f"n_embd={self.n_embd} must be divisible by n_sense={self.n_sense}"
            raise ValueError(f"{sizes}, unless n_qk is given")


class Cache:
    """What generation keeps of the positions before: named tensors that grow along one dimension."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.past = 0  # how many positions are held
        self.tensors = {}

    def extend(self, name, new, dim=2):
        """Append new behind the positions held, along dim; returns all of them."""
        if name not in self.tensors:
            shape = list(new.shape)
            shape[dim] = self.block_size
            self.tensors[name] = new.new_empty(shape)
        held = self.tensors[name]
        held.narrow(dim, self.past, new.size(dim)).copy_(new)
        return held.narrow(dim, 0, self.past + new.size(dim))


# torch's kinds of attention but cuDNN's, which it prefers on an H100: that one makes a plan for each new
# number of keys, for 0.1 to 0.5 s (enable_cudnn_sdp(False) would be for all of a process)
FOR_GENERATION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# -----------------------------------------------------------------------------
# modules


class Projection(nn.Linear):
    """The Linear at the end of a branch; it starts with smaller weights (see init_weights)."""


class SelfAttention(nn.Module):
    """GPT-2's causal attention; its scores are q k^T / sqrt(D/H), divided by i + 1 in block i."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = (config.n_embd // config.n_head) ** -0.5
        if config.inverse_layer_scale:
            self.scale /= layer + 1
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Projection(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, mask=None):
        B, T, D = x.shape
        # queries, keys and values of all heads come from one product
        qkv = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,H,T,D/H) each
        if cache is not None:
            k = cache.extend(f"key {self.layer}", k)  # (B,H,S,D/H)
            v = cache.extend(f"value {self.layer}", v)  # (B,H,S,D/H)
        # a single query sees all keys; causal attention takes flash kernels, a mask does not
        causal = mask is None and T > 1
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, n_in, n_inner, n_out, config):
        super().__init__()
        self.fc = nn.Linear(n_in, n_inner, bias=config.bias)
        self.proj = Projection(n_inner, n_out, bias=config.bias)
        self.approximate = "none" if config.exact_gelu else "tanh"

    def forward(self, x):
        x = self.fc(x)
        x = F.gelu(x, approximate=self.approximate)
        x = self.proj(x)
        return x


class Block(nn.Module):
    """A pre-LayerNorm Transformer block."""

    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.ln_1 = nn.LayerNorm(D, bias=config.bias)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(D, bias=config.bias)
        self.mlp = MLP(D, 4 * D, D, config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, mask=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache, mask))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class SenseNetwork(nn.Module):
    """C: the embedding of a token (...,D) -> its senses (...,K,D). It sees neither position nor context."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        inner = config.sense_mlp_ratio * D
        inner_out = (config.sense_out_ratio or config.sense_mlp_ratio) * D
        self.n_sense = config.n_sense
        self.ln_0 = nn.LayerNorm(D, bias=config.bias)
        self.ln_1 = nn.LayerNorm(D, bias=config.bias)
        self.mlp = MLP(D, inner, D, config)
        self.ln_2 = nn.LayerNorm(D, bias=config.bias)
        self.mlp_out = MLP(D, inner_out, config.n_sense * D, config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, e):
        e = self.drop(e)
        # the authors call this second residual accidental, but their published weights have it
        x = self.drop(self.ln_0(e)) + e
        x = x + self.drop(self.mlp(self.ln_1(x)))
        x = self.mlp_out(self.ln_2(x))  # (...,K*D)
        return x.unflatten(-1, (self.n_sense, -1))  # (...,K,D)


# -----------------------------------------------------------------------------
# the sum of senses


def contextualize(q, k, mask=None):
    """Contextualization weights alpha = softmax(q k^T / sqrt(d)) of every sense (section 3.3).

    The queries q (B,K,T,d) belong to the last T positions of the keys k (B,K,S,d). mask (B,1,T,S) is
    True where a query may look; None: at itself and all before it. Returns alpha (B,K,T,S).
    """
    T = q.size(2)
    S = k.size(2)
    # dividing q is the same as dividing the scores, of which there are more
    scores = (q / math.sqrt(q.size(3))) @ k.mT  # (B,K,T,S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    elif T > 1:
        # only the last T keys can lie in a query's future
        scores[..., S - T :] += scores.new_full((T, T), -math.inf).triu(1)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))


def weigh(alpha, C):
    """o_i = sum_j sum_l alpha[l,i,j] C_jl as one product: alpha (B,K,T,S), C (B,S,K,D) -> o (B,T,D)."""
    # the sum over keys and the one over senses are a single sum over their S*K pairs
    alpha = alpha.to(C.dtype).permute(0, 2, 3, 1).flatten(2)  # (B,T,S*K)
    return alpha @ C.flatten(1, 2)


def sum_block(q, k, C, where):
    """The sum of senses for a block of queries q (B,K,t,d): see sum_senses. Returns (B,t,D)."""
    # C[where], but with the faster backward pass of an embedding
    values = F.embedding(where, C.flatten(1)).unflatten(2, C.shape[1:])  # (B,S,K,D)
    return weigh(contextualize(q, k), values)


def sum_senses(q, k, C, where, block=None):
    """weigh(contextualize(q, k), C[where]), but without (B,K,T,T) weights in memory.

    q, k (B,K,T,d); C (U,K,D): the senses of the distinct tokens; where (B,T): which of these stands at
    each position. It takes a block of queries at a time, and only the keys that these may see; backward
    computes the weights of a block again. Returns o (B,T,D).
    """
    T = q.size(2)
    C = C.to(q.dtype)
    if block is None:
        block = 128 if q.device.type == "cpu" else 256  # a GPU wants fewer and larger products
    if T <= block:
        return sum_block(q, k, C, where)
    o = []
    for i in range(0, T, block):
        j = min(i + block, T)
        args = (q[:, :, i:j], k[:, :, :j], C, where[:, :j])
        o.append(checkpoint(sum_block, *args, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(o, dim=1)


# -----------------------------------------------------------------------------
# the loss


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits o E^T, some rows at a time: the logits are never whole.

    The gradient of the logits is softmax - one-hot, so forward takes it while a chunk of them is there:
    three products, where computing them again in backward would need four. Sums are float32 whatever
    the type of o. Backward multiplies by the loss scale and 1/N, so that float16 gradients can neither
    underflow nor hide an overflow from a GradScaler.
    """

    @staticmethod
    def forward(ctx, o, E, y, vocab_size, with_grad):
        """o (N,D), E (R,D), y (N,) with -100 where no target counts -> the mean loss in nats, a scalar."""
        with_dE = with_grad and ctx.needs_input_grad[1]  # dE is a third of the arithmetic
        dE = None
        wide = torch.promote_types(o.dtype, torch.float32)
        W = E.to(o.dtype)  # (R,D)
        loss = o.new_zeros((), dtype=wide)
        if with_grad:
            do = torch.empty_like(o)
        if with_dE:
            dE = torch.zeros_like(E, dtype=wide)
        # about 8M logits at once, but products of enough rows, and for a GPU few of them: compiled, the
        # dE of all chunks wait to be added; many more rows could overflow in float16
        rows = max(512 if o.device.type == "cpu" else 4096, 2**23 // len(E))
        rows = min(rows, 8192, len(o))
        # one buffer for all chunks: fresh memory of this size costs a CPU as much as the arithmetic
        buffer = o.new_empty(rows, len(E))
        for i in range(0, len(o), rows):
            x = o[i : i + rows]  # (n,D)
            target = y[i : i + rows, None]  # (n,1)
            counts = target >= 0
            target = target.clamp(min=0)
            logits = torch.mm(x, W.T, out=buffer[: len(x)]).to(wide)  # (n,R)
            logits[:, vocab_size:] = -math.inf  # rows of padding are no tokens
            of_target = logits.gather(1, target)  # (n,1)
            top = logits.amax(1, keepdim=True)  # (n,1)
            p = logits.sub_(top).exp_()  # (n,R), softmax up to its norm
            norm = p.sum(1, keepdim=True)  # (n,1)
            loss += ((top + norm.log() - of_target) * counts).sum()
            if with_grad:
                # the target's p - 1 is taken before p is rounded: in bfloat16, p = 0.999 is 1
                of_target = p.gather(1, target) / norm - 1  # (n,1)
                p = p.div_(norm).to(o.dtype).scatter_(1, target, of_target.to(o.dtype))
                torch.mul(p @ W, counts, out=do[i : i + rows])
            if with_dE:
                dE += p.T @ (x * counts)
        n_targets = (y >= 0).sum().clamp(min=1)
        if with_grad:
            ctx.save_for_backward(do, dE, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # by create_graph=True; autograd would take do and dE for constants
            raise NotImplementedError("the loss has no second derivative")
        do, dE, n_targets = ctx.saved_tensors
        if dE is not None:
            dE = dE * (grad / n_targets)
        return do * (grad / n_targets), dE, None, None, None


# -----------------------------------------------------------------------------
# the model


class Backpack(nn.Module):
    """The Backpack language model; with n_sense=0 the Transformer language model inside it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        K = config.n_sense
        # E: input of the Transformer, input of the sense network, and output matrix
        self.wte = nn.Embedding(math.ceil(config.vocab_size / 8) * 8, D)
        # the Transformer
        self.wpe = nn.Embedding(config.block_size, D)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D, bias=config.bias)
        # the senses, and the queries and keys of their weights
        if K:
            self.n_qk = config.n_qk or D // K
            self.sense_network = SenseNetwork(config)
            self.sense_qk = nn.Linear(D, 2 * K * self.n_qk, bias=config.bias)
        self.init_weights()

    def init_weights(self):
        """Matrices are N(0, init_std), at the end of branches 1/sqrt(2 n_layer) of that; biases are 0.

        Everything else, such as a norm, starts as torch makes it.
        """
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, Projection):
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.n_layer))
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            # a Projection has a bias, too
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, distinct=None, transformer_share=None):
        """Logits (B,T,V) and None; with targets (B,T) None and their mean loss in nats (-100: not counted).

        idx (B,T): token ids, at most block_size in a row (else ValueError).
        distinct: the pair idx.unique(return_inverse=True), if known; finding it makes a GPU's host wait.
        transformer_share: a scalar tensor, that part of the loss is of the logits E h, which teach the
        Transformer directly and not through alpha only (ours; lab/notes/small_runs.md).
        """
        h = self.hidden(idx)  # (B,T,D)
        o = h
        if self.config.n_sense:
            q, k = self.query_key(h)  # (B,K,T,d) each
            # senses depend on the token alone: compute them once for each distinct one
            ids, where = distinct or idx.unique(return_inverse=True)  # (U,), (B,T)
            C = self.senses(ids)  # (U,K,D)
            o = sum_senses(q, k, C, where)  # (B,T,D)
        if targets is None:
            return self.logits(o), None
        # the logits of all positions are never whole
        loss = self.loss(o, targets)
        if transformer_share is not None:
            loss = torch.lerp(loss, self.loss(h, targets), transformer_share)
        return None, loss

    def hidden(self, idx, cache=None, mask=None, pos=None):
        """The Transformer: idx (B,T) -> h (B,T,D).

        mask (B,1,T,S): True where a query may look; None: causal. pos (B,T): positions, if they don't
        simply go on from the cache.
        """
        return self.transformer(self.wte(idx), cache, mask, pos)

    def transformer(self, e, cache=None, mask=None, pos=None):
        """The same from embeddings e (B,T,D)."""
        T = e.size(1)
        S = T if cache is None else cache.past + T
        if pos is None:
            if S > self.config.block_size:
                raise ValueError(f"{S} tokens are more than block_size={self.config.block_size}")
            pos = torch.arange(S - T, S, device=e.device)  # (T,)
        if mask is None and 1 < T < S:
            # scaled_dot_product_attention's own causal mask would align the first query and key
            mask = torch.ones(T, S, dtype=torch.bool, device=e.device).tril(S - T)
        h = self.drop(e + self.wpe(pos))  # (B,T,D)
        for block in self.blocks:
            if self.config.grad_checkpoint and self.training:
                h = checkpoint(block, h, cache, mask, use_reentrant=False)
            else:
                h = block(h, cache, mask)
        return self.ln_f(h)

    def senses(self, ids):
        """Token ids of any shape (...) -> their sense vectors C (...,K,D)."""
        return self.sense_network(self.wte(ids))

    def query_key(self, h):
        """h (B,T,D) -> the queries and the keys of all senses, (B,K,T,d) each."""
        qk = self.sense_qk(h).unflatten(-1, (2, self.config.n_sense, self.n_qk))  # (B,T,2,K,d)
        q, k = qk.permute(2, 0, 3, 1, 4).contiguous()
        return q, k

    def contextualization(self, idx):
        """idx (B,T) -> alpha (B,K,T,T), to look at: lower-triangular, and its rows sum to 1."""
        q, k = self.query_key(self.hidden(idx))
        return contextualize(q, k)

    def logits(self, o):
        """o (...,D) -> E o (...,V)."""
        return F.linear(o, self.wte.weight)[..., : self.config.vocab_size]

    def loss(self, o, targets):
        """Mean cross-entropy in nats of the logits of o (B,T,D); targets (B,T), -100: not counted."""
        # autocast knows nothing of our own function, so its products get their type here
        if torch.is_autocast_enabled(o.device.type):
            o = o.to(torch.get_autocast_dtype(o.device.type))
        o = o.flatten(0, 1)  # (B*T,D)
        y = targets.flatten()  # (B*T,)
        with_grad = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(o, self.wte.weight, y, self.config.vocab_size, with_grad)

    # ---- generation

    def step(self, idx, cache, sense_table=None):
        """Logits (B,V) of the token after idx (B,T), which goes on from what the cache holds."""
        with sdpa_kernel(FOR_GENERATION):
            h = self.hidden(idx, cache)  # (B,T,D)
        o = h[:, -1:]  # (B,1,D)
        if self.config.n_sense:
            q, k = self.query_key(h)  # (B,K,T,d) each
            C = self.senses(idx) if sense_table is None else sense_table[idx]  # (B,T,K,D)
            k = cache.extend("sense key", k)  # (B,K,S,d)
            C = cache.extend("senses", C, dim=1)  # (B,S,K,D)
            # only the last position predicts something new
            alpha = contextualize(q[:, :, -1:], k)  # (B,K,1,S)
            o = weigh(alpha, C)  # (B,1,D)
        cache.past += idx.size(1)
        return self.logits(o[:, -1])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, sense_table=None, **sampling):
        """Yield the next token of every sequence (B,1), max_new_tokens times: see generate."""
        block_size = self.config.block_size
        was_training = self.training
        self.eval()
        try:
            cache = Cache(block_size)
            new = idx[:, -block_size:]
            for _ in range(max_new_tokens):
                if cache.past + new.size(1) > block_size:
                    # the context is full: go on from its last half
                    cache = Cache(block_size)
                    new = idx[:, -max(1, block_size // 2) :]
                logits = self.step(new, cache, sense_table)  # (B,V)
                new = sample_token(logits, **sampling)  # (B,1)
                yield new
                idx = torch.cat((idx, new), dim=1)
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, **sampling):
        """Continue idx (B,T), T >= 1, by max_new_tokens tokens -> (B, T + max_new_tokens).

        temperature: 0 takes the likeliest token; top_k: draw from the k likeliest only; top_p: from the
        likeliest that together have this probability; generator: a torch.Generator; sense_table: what
        sense_table() returns. When block_size tokens are there, it goes on from the last half of them.
        """
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **sampling)], dim=1)

    @torch.no_grad()
    def sense_table(self):
        """The senses of all tokens (V,K,D), for generate to look up; None if its logits are not the same."""
        ids = torch.arange(self.config.vocab_size, device=self.wte.weight.device)
        table = self.senses(ids[:1]).new_empty(len(ids), self.config.n_sense, self.config.n_embd)
        for part in ids.split(1024):  # so that what this needs on the way stays small
            table[part] = self.senses(part)
        # a fork's senses may depend on more than the token, and then they are in no table
        idx = ids.flip(0)[None, : self.config.block_size]
        own = self.step(idx, Cache(self.config.block_size))
        found = self.step(idx, Cache(self.config.block_size), table)
        same = (own - found).abs().max() <= 0.02 * own.abs().max()  # bfloat16 has 3 digits
        return table if same else None

    # ---- training and loading

    def num_params(self):
        """The number of parameters, E counted once."""
        return sum(p.numel() for p in self.parameters())

    def param_groups(self, weight_decay):
        """What trains, in two groups: matrices decay; biases, norms and embeddings don't (paper)."""
        embeddings = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() >= 2 and p not in embeddings]
        rest = [p for p in trained if p.dim() < 2 or p in embeddings]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]

    @classmethod
    def from_checkpoint(cls, source, device="cpu", **changes):
        """The model of a run folder, a ckpt.pt or a checkpoint already read: float32, in eval mode.

        changes: fields of BackpackConfig to set otherwise.
        """
        ckpt = source if isinstance(source, dict) else load_checkpoint(source)
        model = cls(BackpackConfig(**ckpt["config"] | changes))
        # into the model's own tensors, in its own type: those of ckpt are pages of a file
        model.load_state_dict(ckpt["model"])
        return model.to(device).eval()


def load_checkpoint(path):
    """The dict that train.py saved in a run folder or a file; nothing pickled in it is executed.

    Its tensors are pages of the file until they are used. OSError: it is missing or damaged.
    """
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the folder of a trained run")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of zip, pickle or torch: they have no common class
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} is damaged, or no checkpoint of train.py: {reason}") from None


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token (B,1) from logits (B,V): see Backpack.generate."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]  # (B,1)
        logits = logits.masked_fill(logits < least, -math.inf)
    probs = logits.softmax(-1)  # (B,V)
    if top_p is not None:
        ordered, order = probs.sort(descending=True)  # (B,V)
        before = ordered.cumsum(-1) - ordered  # what the likelier ones have together
        # the likeliest stays, however small top_p is
        beyond = (before >= top_p) & (before > 0)
        probs = probs.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    return torch.multinomial(probs, 1, generator=generator)
