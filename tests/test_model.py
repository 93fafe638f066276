"""The network: the paper's equation written with loops, its parameter counts, generation, compile."""

import math

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from configurator import read_config
from lab import reference
from model import Backpack, BackpackConfig, Cache, Projection, load_checkpoint, sample_token

SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 24}
SMALL |= {"n_sense": 3, "init_std": 0.3}


def build(cls=Backpack, **changes):
    torch.manual_seed(0)
    model = cls(BackpackConfig(**SMALL | changes))
    for p in model.parameters():
        if p.dim() == 1:  # biases and norms, so that a missing one shows
            nn.init.normal_(p, mean=p.mean().item(), std=0.3)
    return model.eval()


def ids(*shape, seed=0, n=61):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


# ---- parameter counts


def count(**sizes):
    with torch.device("meta"):
        return Backpack(BackpackConfig(**sizes)).num_params()


@pytest.mark.parametrize(
    "config, n",
    [
        ("backpack_micro", 41_659_776),
        ("backpack_mini", 103_856_000),
        ("backpack_small", 170_083_584),
        ("gpt2_micro", 30_145_536),
        ("gpt2_mini", 71_886_080),
        ("gpt2_small", 124_051_968),
    ],
)
def test_parameter_counts_are_the_papers(config, n):
    values = read_config(ROOT / f"config/{config}.py")
    assert count(**{key: values[key] for key in values.keys() & vars(BackpackConfig())}) == n


def test_parameter_counts_of_the_ablation():
    counts = {1: 74_351_360, 4: 75_582_080, 16: 80_504_960, 64: 100_196_480}
    for n_sense, n in counts.items():
        assert count(n_layer=8, n_head=8, n_embd=640, n_sense=n_sense, sense_mlp_ratio=1) == n


# ---- the equation


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_sense": 0},
        {"n_qk": 5},
        {"bias": False},
        {"sense_mlp_ratio": 1},
        {"exact_gelu": True, "inverse_layer_scale": False},
        {"n_sense": 1, "n_head": 4},
    ],
)
def test_forward_is_the_equation(changes):
    model = build(**changes).double()
    idx = ids(2, 11)
    want = [reference.logits(row.tolist(), model.state_dict(), model.config) for row in idx]
    want = torch.stack(want)  # (B,T,V)
    got, loss = model(idx)
    assert loss is None
    assert got.shape == (2, 11, 61)  # no logits of the rows of padding
    assert (got - want).abs().max() < 1e-10 * want.abs().max()


def test_logits_are_the_alpha_weighted_sum_of_senses():
    model = build().double()
    idx = ids(2, 9)
    alpha = model.contextualization(idx)
    assert torch.equal(alpha, alpha.tril())
    assert torch.allclose(alpha.sum(-1), torch.ones(2, 3, 9).double())
    o = torch.einsum("bktj,bjkd->btd", alpha, model.senses(idx))
    assert torch.allclose(o @ model.wte.weight[:61].T, model(idx)[0], atol=1e-12)


@pytest.mark.parametrize("n_sense", [0, 3])
def test_causality(n_sense):
    model = build(n_sense=n_sense)
    idx = ids(1, 12)
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 61
    before = model(idx)[0]
    after = model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_transformer_share_mixes_in_the_loss_of_the_transformer_alone():
    model = build().double()
    alone = build(n_sense=0).double()
    alone.load_state_dict({key: p for key, p in model.state_dict().items() if "sense" not in key})
    x = ids(2, 9)
    y = ids(2, 9, seed=1)
    own = model(x, y)[1]
    its = alone(x, y)[1]
    assert abs(own - its) > 0.01
    mixed = model(x, y, transformer_share=torch.tensor(0.3))[1]
    assert abs(mixed - (0.7 * own + 0.3 * its)) < 1e-7


def test_dropout_is_where_the_paper_has_it():
    """A probability close to 1 cuts every branch: only biases behind the last dropout survive."""
    model = build(dropout=1 - 1e-9).train()
    idx = ids(1, 5)
    assert torch.equal(model.hidden(idx), model.ln_f.bias.expand(1, 5, 24))
    out = model.sense_network.mlp_out(model.sense_network.ln_2.bias)
    assert torch.allclose(model.senses(idx), out.view(3, 24).expand(1, 5, 3, 24), atol=1e-6)


def test_grad_checkpoint_computes_blocks_again_and_changes_no_gradient():
    grads = {}
    for on in (False, True):
        model = build(grad_checkpoint=on, dropout=0.1).train()
        calls = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module))
        torch.manual_seed(0)
        model(ids(2, 9), ids(2, 9))[1].backward()
        assert len(calls) == (4 if on else 2)
        grads[on] = [p.grad for p in model.parameters()]
    assert all(map(torch.equal, grads[True], grads[False]))


def test_one_graph_for_any_number_of_distinct_tokens():
    """Recomputed blocks, two blocks of queries, two losses; gradients are those without compile."""
    model = build(block_size=160, n_layer=1, grad_checkpoint=True).train()
    parameters = [*model.parameters()]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    share = torch.full((), 0.3)
    for n in (3, 12, 45):
        x = ids(2, 160, n=n)
        distinct = x.unique(return_inverse=True)
        torch._dynamo.mark_dynamic(distinct[0], 0)
        loss = compiled(x, x, distinct, share)[1]
        want = model(x, x, transformer_share=share)[1]
        assert torch.allclose(loss, want)
        grads = torch.autograd.grad(loss, parameters)
        for got, expected in zip(grads, torch.autograd.grad(want, parameters)):
            assert torch.allclose(got, expected, atol=1e-5)
    assert counter.frame_count == 1


# ---- generation


def recomputed(model, idx, n):
    """Greedy text without a cache; a full context goes on from its last half."""
    block_size = model.config.block_size
    start = max(0, idx.size(1) - block_size)
    for _ in range(n):
        if idx.size(1) - start > block_size:
            start = idx.size(1) - block_size // 2
        new = model(idx[:, start:])[0][:, -1].argmax(-1, keepdim=True)
        idx = torch.cat((idx, new), dim=1)
    return idx


@pytest.mark.parametrize("n_sense", [0, 3])
@pytest.mark.parametrize("prompt", [1, 5, 16, 23])
def test_cached_generation_is_recomputation(n_sense, prompt):
    model = build(n_sense=n_sense)
    idx = ids(2, prompt)
    assert torch.equal(model.generate(idx, 40, temperature=0), recomputed(model, idx, 40))


@pytest.mark.parametrize("n_sense", [0, 3])
def test_several_tokens_may_follow_a_cache(n_sense):
    model = build(n_sense=n_sense)
    idx = ids(2, 11)
    cache = Cache(16)
    logits = model(idx)[0]
    for part in idx.split((4, 6, 1), dim=1):
        got = model.step(part, cache)
        assert torch.allclose(got, logits[:, cache.past - 1], atol=1e-5)
    assert cache.past == 11


def test_generation_from_a_sense_table_is_the_same():
    model = build()
    idx = ids(2, 5)
    table = model.sense_table()
    assert torch.allclose(table, model.senses(torch.arange(61)), atol=1e-6)
    looked_up = model.generate(idx, 40, temperature=0, sense_table=table)
    assert torch.equal(looked_up, model.generate(idx, 40, temperature=0))
    none = model.generate(idx, 40, temperature=0, sense_table=torch.zeros_like(table))
    assert (none[:, 5:] == 0).all()  # senses come from nowhere else


class AfterTheTokenBefore(Backpack):
    """A fork whose senses depend on the token before, too, so that no table can hold them."""

    def senses(self, ids):
        before = F.pad(ids[..., :-1], (1, 0))
        return super().senses(ids) + 0.3 * super().senses(before)


def test_no_table_for_senses_that_depend_on_more_than_the_token():
    assert build(AfterTheTokenBefore).sense_table() is None


def test_generation_uses_no_dropout_and_leaves_the_mode():
    model = build(dropout=0.5).train()
    first = model.generate(ids(1, 4), 8, temperature=0)
    assert torch.equal(first, model.generate(ids(1, 4), 8, temperature=0))
    for _ in model.stream(ids(1, 4), 8):
        break
    assert model.training


def test_sampling_draws_from_the_stated_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
    p = (logits / 0.7).softmax(-1)[0]

    def frequencies(**how):
        generator = torch.Generator().manual_seed(0)
        draws = sample_token(logits.expand(40_000, 5), generator=generator, **how)
        return torch.bincount(draws[:, 0], minlength=5) / 40_000

    assert torch.allclose(frequencies(temperature=0.7), p, atol=0.01)
    two = torch.tensor([p[0], p[1], 0, 0, 0]) / p[:2].sum()
    assert torch.allclose(frequencies(temperature=0.7, top_k=2), two, atol=0.01)
    assert p[0] < 0.8 < p[:2].sum()  # so two tokens are the fewest that have 0.8
    assert torch.allclose(frequencies(temperature=0.7, top_p=0.8), two, atol=0.01)
    assert frequencies(temperature=0)[0] == 1
    assert frequencies(top_p=1e-9)[0] == 1
    assert frequencies(top_k=99)[4] > 0


# ---- kinds of modules, not names


class Fork(Backpack):
    """What a researcher adds: an embedding, a norm, a branch of two Linears."""

    def __init__(self, config):
        super().__init__(config)
        D = config.n_embd
        self.kind = nn.Embedding(100, D)
        self.new_norm = nn.RMSNorm(D)
        self.new_in = nn.Linear(D, D)
        self.new_out = Projection(D, D)
        self.init_weights()


def test_weights_start_by_kind():
    torch.manual_seed(0)
    model = Fork(BackpackConfig(n_layer=8, n_head=4, n_embd=128, n_sense=4, vocab_size=500))
    ends = []  # of branches
    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            assert (module.weight == 1).all(), name
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if name.endswith(("proj", "new_out")):
                std = 0.02 / math.sqrt(16)
                ends.append(name)
            assert module.weight.std().item() == pytest.approx(std, rel=0.03), name
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any(), name
    assert len(ends) == 8 * 2 + 2 + 1


def test_weights_decay_by_kind_and_frozen_ones_are_passed_over():
    model = build(Fork)
    model.new_in.weight.requires_grad = False
    decay, rest = model.param_groups(0.1)
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    names = {p: name for name, p in model.named_parameters()}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    decaying = {f"{name}.weight" for name in linear} - {"new_in.weight"}
    assert {names[p] for p in decay["params"]} == decaying
    assert {names[p] for p in rest["params"]} == {*names.values()} - decaying - {"new_in.weight"}


# ---- sizes and checkpoints


@pytest.mark.parametrize("n_embd, n_sense, message", [(25, 5, "n_head=2"), (24, 7, "n_sense=7")])
def test_sizes_that_do_not_divide(n_embd, n_sense, message):
    with pytest.raises(ValueError, match=f"n_embd={n_embd} must be divisible by {message}"):
        build(n_embd=n_embd, n_sense=n_sense)


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match="17 tokens are more than block_size=16"):
        build()(ids(1, 17))


def test_from_checkpoint(tmp_path):
    model = build()
    idx = ids(1, 5)
    ckpt = {"model": model.state_dict(), "config": SMALL}
    torch.save(ckpt, tmp_path / "ckpt.pt")
    for source in (tmp_path, tmp_path / "ckpt.pt", ckpt):
        loaded = Backpack.from_checkpoint(source)
        assert torch.equal(loaded(idx)[0], model(idx)[0])
        assert not loaded.training
    half = {name: p.half() for name, p in model.state_dict().items()}
    loaded = Backpack.from_checkpoint(ckpt | {"model": half}, dropout=0.5)
    assert loaded.drop.p == loaded.blocks[0].attn.dropout == 0.5
    assert loaded.wte.weight.dtype == torch.float32
    assert torch.allclose(loaded(idx)[0], model(idx)[0], atol=0.05)


@pytest.mark.parametrize("n_bytes", [0, 7, 2000, None])
def test_a_damaged_checkpoint_is_one_line(tmp_path, n_bytes):
    """So is a whole one with an object in it, which would execute code."""
    path = tmp_path / "ckpt.pt"
    torch.save({"model": nn.Linear(30, 30)}, path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(OSError, match="ckpt.pt is damaged, or no checkpoint of train.py") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
