"""
The Backpack, written from the paper's equations with loops over positions, senses and heads.

It takes a dictionary of tensors (a state_dict) and a config, and shares no code with model.py. The tests
compare model.py with it, and so does lab/layouts.py: published layouts are of this network, not of a fork's.
"""

import math

import torch


def layer_norm(x, w, name):
    mean = x.mean()
    normed = (x - mean) / torch.sqrt(((x - mean) ** 2).mean() + 1e-5)
    return normed * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def linear(x, w, name):
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)


def gelu(x, exact):
    if exact:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x, w, name, c):
    return linear(gelu(linear(x, w, f"{name}.fc"), c.exact_gelu), w, f"{name}.proj")


def softmax(scores):
    e = [math.exp(s - max(scores)) for s in scores]
    return [x / sum(e) for x in e]


def hidden(ids, w, c):
    """h_1..h_T of the Transformer, for a list of ids; c: a BackpackConfig."""
    xs = [w["wte.weight"][x] + w["wpe.weight"][t] for t, x in enumerate(ids)]
    D = len(xs[0])
    width = D // c.n_head
    for i in range(c.n_layer):
        block = f"blocks.{i}"
        qkv = [linear(layer_norm(x, w, f"{block}.ln_1"), w, f"{block}.attn.qkv") for x in xs]
        new = []
        for t, x in enumerate(xs):
            heads = []
            for h in range(c.n_head):
                part = slice(h * width, (h + 1) * width)
                q = qkv[t][:D][part]
                scores = [
                    float(q @ qkv[j][D : 2 * D][part])
                    / math.sqrt(width)
                    / (i + 1 if c.inverse_layer_scale else 1)
                    for j in range(t + 1)
                ]
                heads.append(sum(a * qkv[j][2 * D :][part] for j, a in enumerate(softmax(scores))))
            x = x + linear(torch.cat(heads), w, f"{block}.attn.proj")
            new.append(x + mlp(layer_norm(x, w, f"{block}.ln_2"), w, f"{block}.mlp", c))
        xs = new
    return [layer_norm(x, w, "ln_f") for x in xs]


def senses(x, w, c):
    """C(x)_1..K of one id."""
    e = w["wte.weight"][x]
    r = layer_norm(e, w, "sense_network.ln_0") + e
    r = r + mlp(layer_norm(r, w, "sense_network.ln_1"), w, "sense_network.mlp", c)
    return mlp(layer_norm(r, w, "sense_network.ln_2"), w, "sense_network.mlp_out", c).split(len(e))


def logits(ids, w, c):
    """(T, vocab_size): logits_i = E sum_j sum_l alpha[l,i,j] C(x_j)_l, for a list of ids."""
    h = hidden(ids, w, c)
    n_sense = c.n_sense
    if n_sense:
        C = [senses(x, w, c) for x in ids]
        both = [linear(x, w, "sense_qk") for x in h]
        width = len(both[0]) // 2 // n_sense
        outputs = []
        for i in range(len(ids)):
            o = torch.zeros_like(h[0])
            for sense in range(n_sense):
                q = both[i][sense * width : (sense + 1) * width]
                keys = [
                    both[j][(n_sense + sense) * width : (n_sense + sense + 1) * width] for j in range(i + 1)
                ]
                alpha = softmax([float(q @ k) / math.sqrt(width) for k in keys])
                for j in range(i + 1):
                    o = o + alpha[j] * C[j][sense]
            outputs.append(o)
        h = outputs
    return torch.stack([w["wte.weight"][: c.vocab_size] @ o for o in h])
