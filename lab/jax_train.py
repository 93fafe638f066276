"""
Train a Backpack by JAX: model.py's network and train.py's loop, on all devices of this machine.

$ python -m lab.jax_train config/backpack_micro.py --dropout=0.0 --out_dir=out/jax
$ python -m lab.jax_train --out_dir=out/jax --init_from=resume

Data, settings and checkpoints are train.py's; settings that would have no effect here are refused. Before
the first step it compares itself with model.py: whoever changes the network changes it here, too.

Shapes: B sequences of a device and micro-batch, T positions, V vocabulary, D n_embd, H n_head, K n_sense,
        d n_qk, U distinct tokens, G devices, M micro-batches of a step, N = B*T
w: {name: array} of all parameters, by their names in model.py; c: the settings, with dtype known
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import configurator  # isort: skip  # before torch, for which it sets the environment
import numpy as np
import torch

import train
from configurator import check
from model import Backpack

try:
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
except ImportError as error:
    sys.exit(f"lab.jax_train: {error}; pip install -r requirements-jax.txt")


@dataclass
class Settings(train.Settings):
    shard: bool = False  # parameters and optimizer state are spread over the devices


# any other setting must stay at its default, as it would have no effect
HEEDED = set(
    """
    block_size vocab_size n_layer n_head n_embd n_sense n_qk sense_mlp_ratio sense_out_ratio bias exact_gelu
    init_std inverse_layer_scale grad_checkpoint dataset data_dir out_dir init_from overwrite tokens_per_step
    batch_size max_iters learning_rate min_lr schedule warmup_iters weight_decay beta1 beta2 grad_clip
    eval_interval eval_iters full_val log_interval dtype seed shard
    """.split()
)


def refuse_others(s):
    """UserError: a setting that is not heeded is not at its default."""
    others = [f for f in fields(s) if f.name not in HEEDED and getattr(s, f.name) != f.default]
    names = ", ".join(f.name for f in others)
    flags = " ".join(f"--{f.name}={f.default}" for f in others)
    check(not others, f"lab.jax_train has no {names}: add {flags}")
    check(s.dtype != "float16", "dtype=float16 would need a loss scaler: --dtype=bfloat16")


# -----------------------------------------------------------------------------
# the network


def scope(w, module):
    """The arrays of a module, by their names in it."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def layer_norm(w, name, x, c):
    """Computed in float32; the result has the type that products are to have."""
    x = x.astype(jnp.float32)
    x = jax.nn.standardize(x, algorithm="stable") * w[f"{name}.weight"]
    if c.bias:
        x = x + w[f"{name}.bias"]
    return x.astype(c.dtype)


def linear(w, name, x, c):
    x = x @ w[f"{name}.weight"].astype(x.dtype).T
    if c.bias:
        x = x + w[f"{name}.bias"].astype(x.dtype)
    return x


def mlp(w, x, c):
    x = linear(w, "fc", x, c)
    x = jax.nn.gelu(x, approximate=not c.exact_gelu)
    return linear(w, "proj", x, c)


def block(w, x, layer, c):
    B, T, D = x.shape
    scale = (D // c.n_head) ** -0.5
    if c.inverse_layer_scale:
        scale /= layer + 1
    # backward computes the weights again, as flash attention does
    attention = jax.checkpoint(partial(jax.nn.dot_product_attention, scale=scale, is_causal=True))
    y = layer_norm(w, "ln_1", x, c)
    qkv = linear(w, "attn.qkv", y, c).reshape(B, T, 3, c.n_head, -1)  # (B,T,3,H,D/H)
    q, k, v = jnp.moveaxis(qkv, 2, 0)  # (B,T,H,D/H) each
    y = attention(q, k, v).reshape(B, T, D)
    x = x + linear(w, "attn.proj", y, c)
    y = layer_norm(w, "ln_2", x, c)
    return x + mlp(scope(w, "mlp"), y, c)


def transformer(w, e, c):
    """Embeddings e (B,T,D) -> h (B,T,D)."""
    h = e + w["wpe.weight"][: e.shape[1]]
    for layer in range(c.n_layer):
        step = partial(block, layer=layer, c=c)
        if c.grad_checkpoint:
            step = jax.checkpoint(step)
        h = step(scope(w, f"blocks.{layer}"), h)
    return layer_norm(w, "ln_f", h, c)


def senses(w, e, c):
    """Embeddings e (U,D) of tokens -> their sense vectors C (U,K,D)."""
    x = layer_norm(w, "ln_0", e, c) + e
    y = layer_norm(w, "ln_1", x, c)
    x = x + mlp(scope(w, "mlp"), y, c)
    y = layer_norm(w, "ln_2", x, c)
    x = mlp(scope(w, "mlp_out"), y, c)  # (U,K*D)
    return x.reshape(len(x), c.n_sense, -1)


def sum_senses(q, k, C):
    """Of one sequence: queries and keys (T,K,d), senses at each position (T,K,D) -> o (T,D)."""
    T, K, d = q.shape

    def of_query(row):
        q_i, i = row
        scores = jnp.einsum("ld,jld->lj", q_i / math.sqrt(d), k)  # (K,T)
        scores = jnp.where(jnp.arange(T) <= i, scores.astype(jnp.float32), -jnp.inf)
        alpha = jax.nn.softmax(scores)
        return jnp.einsum("lj,jld->d", alpha.astype(C.dtype), C)

    # 256 queries at a time, whose weights backward computes again
    return jax.lax.map(jax.checkpoint(of_query), (q, jnp.arange(T)), batch_size=256)


def backpack(w, ids, where, c):
    """The distinct tokens ids (U,), and which stands at each position, where (B,T) -> o (B,T,D)."""
    B, T = where.shape
    e = w["wte.weight"][ids]  # (U,D)
    h = transformer(w, e[where], c)  # (B,T,D)
    if not c.n_sense:
        return h
    qk = linear(w, "sense_qk", h, c).reshape(B, T, 2, c.n_sense, -1)  # (B,T,2,K,d)
    C = senses(scope(w, "sense_network"), e, c)  # (U,K,D)
    return jax.vmap(sum_senses)(qk[:, :, 0], qk[:, :, 1], C[where])


def losses(w, o, y, c):
    """The cross-entropy (N,) of the logits E o_i, 0 where y (N,) is -100: some rows at a time."""

    def of_row(row):
        o_i, target = row
        E = w["wte.weight"][: c.vocab_size].astype(o_i.dtype)  # (V,D)
        logits = jnp.dot(o_i, E.T, preferred_element_type=jnp.float32)  # (V,)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.where(target >= 0, loss, 0.0)

    rows = max(512, 2**23 // c.vocab_size)  # about 8M logits at once
    return jax.lax.map(jax.checkpoint(of_row), (o, y), batch_size=rows)


def mean_loss(w, y, ids, where, c):
    """The mean loss of all targets y (B,T), over all devices."""
    o = backpack(w, ids, where, c)  # (B,T,D)
    total = losses(w, o.reshape(-1, c.n_embd), y.reshape(-1), c).sum()
    n_targets = jax.lax.psum((y >= 0).sum(), "data")
    return jax.lax.psum(total, "data") / jnp.maximum(n_targets, 1)


# -----------------------------------------------------------------------------
# data and steps


def load_batch(tokens, starts, s, mesh):
    """The windows that begin at starts (M,G,B), on the devices that they are for, as mean_loss takes them.

    y and where have the shape (M,G*B,T), ids has (M,G*U): each device has its own distinct tokens.
    """
    M, G, B = starts.shape
    parts = []
    for own in starts.reshape(M * G, B):
        _, y, (ids, where) = train.get_batch(tokens, own, s.block_size, torch.device("cpu"))
        parts.append((y, ids, where))
    ys, distinct, wheres = zip(*parts)
    # another U means another compilation, so it comes in steps of 512; nothing points to what that adds
    U = max(len(ids) for ids in distinct)
    U = min(math.ceil(U / 512) * 512, s.vocab_size)
    y = np.concatenate(ys).reshape(M, G * B, -1)
    ids = np.concatenate([np.resize(ids, U) for ids in distinct]).reshape(M, G * U)
    where = np.concatenate(wheres).reshape(M, G * B, -1)
    return jax.device_put((y, ids, where), NamedSharding(mesh, P(None, "data")))


def place(x, mesh, shard):
    """Where an array of w or of the optimizer's state lies: whole on each device, or by rows on all."""
    by_rows = shard and x.ndim and x.shape[0] % mesh.size == 0
    return NamedSharding(mesh, P("data") if by_rows else P())


def make_loss(c, mesh):
    """mean_loss of (w, y, ids, where): each device has all of w and its share of the batch."""
    specs = (P(), P("data"), P("data"), P("data"))
    return jax.shard_map(partial(mean_loss, c=c), mesh=mesh, in_specs=specs, out_specs=P())


def make_adamw(model, s):
    """What train.py does with gradients, as an optax transformation; its updates lack the factor -lr."""
    matrices, _ = model.param_groups(s.weight_decay)
    matrices = set(matrices["params"])
    decays = {name: p in matrices for name, p in model.named_parameters()}
    return optax.chain(
        optax.clip_by_global_norm(s.grad_clip or math.inf),
        optax.scale_by_adam(s.beta1, s.beta2),
        optax.add_decayed_weights(s.weight_decay, decays),
    )


def make_step(loss_of, adamw, places):
    """step(w, state, batch, lr) -> (w, state, loss, norm of the gradient); it uses up w and state."""

    def step(w, state, batch, lr):
        def add(total, micro_batch):
            new = jax.value_and_grad(loss_of)(w, *micro_batch)
            return jax.tree.map(jnp.add, total, new), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, w)
        total, _ = jax.lax.scan(add, zero, batch)
        loss, grads = jax.tree.map(lambda x: x / len(batch[0]), total)
        updates, state = adamw.update(grads, state, w)
        w = jax.tree.map(lambda p, update: p - lr * update, w, updates)
        return w, state, loss, optax.tree.norm(grads)

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, None, None))


def check_network(model, w, tokens, s, mesh):
    """UserError: a short sequence has another loss than by model.py (by 0.1%), or another gradient (1%)."""
    s = replace(s, block_size=min(s.block_size, 64), dtype="float32")
    starts = np.zeros((1, mesh.size, 1), int)  # each device gets the same sequence
    y, ids, where = load_batch(tokens, starts, s, mesh)
    with_grads = jax.jit(jax.value_and_grad(make_loss(s, mesh)))
    loss, grads = with_grads(w, y[0], ids[0], where[0])
    x, y, distinct = train.get_batch(tokens, starts[0, 0], s.block_size, torch.device("cpu"))
    _, expected = model(x, y, distinct)
    expected.backward()
    hint = "this model.py is another network than that of lab/jax_train.py"
    close = np.isclose(loss, expected.item(), rtol=0.001)
    check(close, f"the loss of a sequence is {loss:.4f}, by model.py {expected:.4f}: {hint}")
    for name, p in model.named_parameters():
        expected = p.grad.numpy()
        off = np.abs(grads[name] - expected).max()
        allowed = 0.01 * np.abs(expected).max() + 1e-8
        check(off <= allowed, f"the gradient of {name} differs by up to {off:.2g} from model.py's: {hint}")


# -----------------------------------------------------------------------------


def windows(s, mesh, n_train, n_val):
    """The shape (M,G,B) of the windows of a step, and where those for evaluation begin (n,1,G,B)."""
    T = s.block_size
    check(n_train > T and n_val > 1, f"{s.dataset} is too short for block_size={T}")
    G = mesh.size
    sequences = s.tokens_per_step // (T * G)  # of a device in a step
    B = min(s.batch_size, sequences)
    divides = B > 0 and s.tokens_per_step % (T * G * B) == 0
    sizes = f"{G} devices x {B} sequences x {T} tokens"
    check(divides, f"tokens_per_step={s.tokens_per_step} must be a multiple of {sizes}")
    starts = train.evaluation_starts(s, n_val)
    # windows beyond the end of the text have no targets
    starts = np.pad(starts, (0, -len(starts) % (G * B)), constant_values=n_val)
    return (sequences // B, G, B), starts.reshape(-1, 1, G, B)


def evaluate(loss_of, w, tokens, starts, s, mesh):
    """The mean loss of all targets in the windows that begin at starts (n,1,G,B)."""
    total = 0.0
    n_targets = 0
    for some in starts:
        y, ids, where = load_batch(tokens, some, s, mesh)
        n = (y >= 0).sum().item()
        total += loss_of(w, y[0], ids[0], where[0]).item() * n
        n_targets += n
    return total / n_targets


def prepare(s, ckpt, tokens, mesh):
    """(w, state of the optimizer, loss_of, take_step), all of it on the devices."""
    torch.manual_seed(s.seed)
    model = Backpack(train.network_config(s))  # the weights with which train.py would start
    if ckpt:
        model.load_state_dict(ckpt["model"])
    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    adamw = make_adamw(model, s)
    state = adamw.init(w)
    if s.init_from == "resume":
        saved = [x.numpy().copy() for x in ckpt["jax"]]
        state = jax.tree.unflatten(jax.tree.structure(state), saved)
    places = jax.tree.map(partial(place, mesh=mesh, shard=s.shard), (w, state))
    w, state = jax.device_put((w, state), places)
    check_network(model, w, tokens, s, mesh)
    dtype = s.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    print(f"{model.num_params():,} parameters on {mesh.size} x {jax.devices()[0].device_kind} in {dtype}")
    loss_of = make_loss(replace(s, dtype=dtype), mesh)
    return w, state, jax.jit(loss_of), make_step(loss_of, adamw, places)


def save(s, w, state, meta, step):
    """Write ckpt.pt, as train.py does but for the optimizer's state, and config.json."""
    ckpt = {
        "model": {name: torch.tensor(np.asarray(x)) for name, x in w.items()},
        "jax": [torch.tensor(np.asarray(x)) for x in jax.tree.leaves(state)],
        "config": asdict(train.network_config(s)),
        "settings": vars(s),
        "meta": meta,
        "step": step,
    }
    train.save_checkpoint(Path(s.out_dir) / "ckpt.pt", ckpt)
    (Path(s.out_dir) / "config.json").write_text(json.dumps(vars(s) | {"jax": jax.__version__}, indent=1))


def main(argv):
    s, given = configurator.configure(Settings, argv, __doc__)
    ckpt = train.find_checkpoint(s, given, print)
    resume = s.init_from == "resume"
    hint = f"--init_from={s.out_dir} and another out_dir start from its weights"
    check(not resume or "jax" in ckpt, f"{s.out_dir} is no run of lab.jax_train: {hint}")
    refuse_others(s)
    train.check_settings(s)
    train_data, val_data, meta = train.load_data(Path(s.data_dir) / s.dataset)
    check(not meta.get("answers"), f"{s.dataset} has prompts and answers, which lab.jax_train doesn't know")
    train.adopt_vocabulary(s, ckpt, meta)
    # else a TPU rounds the factors of float32 products to bfloat16
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shape, val_starts = windows(s, mesh, len(train_data), len(val_data))
    w, state, loss_of, take_step = prepare(s, ckpt, train_data, mesh)
    step = ckpt["step"] if resume else 0

    def draw(step):
        starts = np.random.default_rng((s.seed, step)).integers(len(train_data) - s.block_size, size=shape)
        return load_batch(train_data, starts, s, mesh)

    path = Path(s.out_dir) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if step:
        train.cut_metrics(path, step)
    metrics = open(path, "a" if step else "w", buffering=1)

    def log(text, **figures):
        print(f"step {step}/{s.max_iters}  {text}", flush=True)
        metrics.write(json.dumps({"step": step, **figures}) + "\n")

    began = time.time()
    batch = draw(step)
    while True:
        if step % s.eval_interval == 0 or step >= s.max_iters:
            val_loss = evaluate(loss_of, w, val_data, val_starts, s, mesh)
            check(math.isfinite(val_loss), f"step {step}: validation loss {val_loss}; {train.HINT}")
            save(s, w, state, meta, step)
            log(f"val loss {val_loss:.4f}", val_loss=val_loss)
        if step >= s.max_iters:
            break
        t0 = time.time()
        lr = train.lr_at(s, step)
        w, state, loss, norm = take_step(w, state, batch, lr)
        batch = draw(step + 1)  # while the devices are busy
        loss = loss.item()
        norm = norm.item()
        check(math.isfinite(loss + norm), f"step {step}: loss {loss}, gradient norm {norm}; {train.HINT}")
        step += 1
        if step % s.log_interval == 0 or step == s.max_iters:
            now = time.time()
            speed = s.tokens_per_step / (now - t0)
            text = f"loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s"
            figures = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": speed}
            log(text, **figures, seconds=now - began)


if __name__ == "__main__":
    configurator.run(main)
