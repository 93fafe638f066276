import math

import pytest
import torch
from conftest import ROOT
from reference import logits as reference_logits
from reference import senses as reference_senses
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from configurator import read_config
from hardware import flops_per_token
from model import Backpack, BackpackConfig, CheckpointError, sample_token
from sample import sense_table

SMALL = {
    "block_size": 16,
    "vocab_size": 61,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 24,
    "n_sense": 3,
    "init_std": 0.3,
}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    model = Backpack(BackpackConfig(**SMALL | changes))
    for p in model.parameters():  # biases and norms, too, so that a missing one shows
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=p.mean().item(), std=0.3)
    return model.eval()


def ids(*shape, seed=0, n=61):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def on_meta(**sizes):
    with torch.device("meta"):
        return Backpack(BackpackConfig(**sizes))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "name, whole, transformer, sense_network, sense_qk",
    [
        ("micro", 41_659_776, 30_145_536, 11_218_560, 295_680),
        ("mini", 103_856_000, 71_886_080, 31_149_440, 820_480),
        ("small", 170_083_584, 124_051_968, 44_850_432, 1_181_184),
    ],
)
def test_parameter_counts_are_the_papers(name, whole, transformer, sense_network, sense_qk):
    shape = {
        k: v
        for k, v in read_config(ROOT / f"config/backpack_{name}.py").items()
        if k in ("n_layer", "n_head", "n_embd", "n_sense", "block_size")
    }
    model = on_meta(**shape)
    assert model.wte.weight.shape[0] == 50_264
    assert next(model.parameters()) is model.wte.weight
    assert (model.num_params(), count(model.sense_network), count(model.sense_qk)) == (
        whole,
        sense_network,
        sense_qk,
    )
    baseline = {k: v for k, v in read_config(ROOT / f"config/gpt2_{name}.py").items() if k in shape}
    assert on_meta(**baseline).num_params() == transformer


@pytest.mark.parametrize(
    "n_sense, n", [(1, 74_351_360), (4, 75_582_080), (16, 80_504_960), (64, 100_196_480)]
)
def test_parameter_counts_of_the_ablation(n_sense, n):
    assert (
        on_meta(n_layer=8, n_head=8, n_embd=640, n_sense=n_sense, sense_mlp_ratio=1).num_params()
        == n
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_sense": 0},
        {"n_qk": 5},
        {"bias": False},
        {"sense_mlp_ratio": 1},
        {"n_sense": 1, "n_head": 4},
    ],
)
def test_forward_is_the_equation(changes):
    model, idx = build(**changes).double(), ids(2, 11)
    c = model.config
    want = torch.stack(
        [
            reference_logits(
                row.tolist(), model.state_dict(), c.n_layer, c.n_head, c.n_sense, c.vocab_size
            )
            for row in idx
        ]
    )
    got, loss = model(idx)
    assert loss is None and got.shape == (2, 11, 61)
    assert (got - want).abs().max() < 1e-10 * want.abs().max()
    none, loss = model(idx[:, :-1], idx[:, 1:])
    assert none is None
    by_hand = -torch.stack(
        [want[b, t].log_softmax(-1)[idx[b, t + 1]] for b in range(2) for t in range(10)]
    ).mean()
    assert abs(loss - by_hand) < 1e-10


def test_senses_depend_on_ids_alone():
    model, idx = build().double(), ids(2, 3, 4)
    C = model.senses(idx)
    assert C.shape == (2, 3, 4, 3, 24)
    want = torch.stack(reference_senses(int(idx[1, 2, 3]), model.state_dict(), 3))
    assert (C[1, 2, 3] - want).abs().max() < 1e-12
    assert torch.equal(model.senses(idx.flip(0)), C.flip(0))


def test_contextualization_is_a_causal_distribution():
    alpha = build().contextualization(ids(2, 9))
    assert alpha.shape == (2, 3, 9, 9) and (alpha >= 0).all()
    assert torch.equal(alpha, alpha.tril()) and torch.allclose(alpha.sum(-1), torch.ones(2, 3, 9))


def test_logits_are_the_alpha_weighted_sum_of_senses():
    model, idx = build().double(), ids(2, 9)
    o = torch.einsum("bktj,bjkd->btd", model.contextualization(idx), model.senses(idx))
    assert torch.allclose(o @ model.wte.weight[:61].T, model(idx)[0], atol=1e-12)


@pytest.mark.parametrize("n_sense", [0, 3])
def test_causality(n_sense):
    model, idx = build(n_sense=n_sense), ids(1, 12)
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 61
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])


def test_strided_input():
    model, both = build(), ids(2, 4, 9)
    x, y = both[:, ::2, :-1].transpose(0, 1)[0], both[:, ::2, 1:].transpose(0, 1)[0]
    assert torch.equal(model(x, y)[1], model(x.contiguous(), y.contiguous())[1])


def test_padded_rows_have_no_logit_and_no_gradient():
    model, idx = build().train(), ids(2, 8)
    assert model.wte.weight.shape[0] == 64
    model(idx, idx)[1].backward()
    assert (model.wte.weight.grad[61:] == 0).all() and (model.wte.weight.grad[:61] != 0).any()
    with torch.no_grad():
        model.wte.weight[61:] = 100.0
    assert model(idx)[0].shape[-1] == 61 and model.generate(idx, 200).max() < 61


@pytest.mark.parametrize("n_sense", [0, 3])
def test_left_padding_changes_nothing(n_sense):
    model, idx = build(n_sense=n_sense), ids(2, 7)
    padded = torch.cat((ids(2, 5, seed=1), idx), 1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, :5] = 0
    assert torch.allclose(model(padded, attention_mask=mask)[0][:, 5:], model(idx)[0], atol=1e-4)
    assert model(padded, padded, attention_mask=mask)[1].isfinite()
    greedy = model.generate(padded, 30, temperature=0, attention_mask=mask)
    assert torch.equal(greedy[:, 5:13], model.generate(idx, 1, temperature=0))


def test_padded_prompts_generate_as_each_alone():
    model, a, b = build(), ids(1, 3), ids(1, 6, seed=1)
    batch = torch.cat((torch.cat((torch.zeros(1, 3, dtype=torch.long), a), 1), b))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    got = model.generate(batch, 10, temperature=0, attention_mask=mask)
    assert torch.equal(got[:1, 3:], model.generate(a, 10, temperature=0))
    assert torch.equal(got[1:], model.generate(b, 10, temperature=0))


@pytest.mark.parametrize("n_sense", [0, 3])
@pytest.mark.parametrize("prompt", [1, 5, 16, 23])
def test_cached_generation_is_recomputation(n_sense, prompt):
    model, idx = build(n_sense=n_sense), ids(2, prompt)
    want, start = idx, max(0, prompt - 16)
    for _ in range(40):
        if want.size(1) - start > 16:
            start = want.size(1) - 8
        want = torch.cat((want, model(want[:, start:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(idx, 40, temperature=0), want)


def test_generation_from_a_sense_table_is_the_same():
    model, idx, mask = build(), ids(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    table = sense_table(model)
    assert (
        torch.allclose(table, model.senses(torch.arange(61)), atol=1e-6)
        and table.nbytes == 61 * 3 * 24 * 4
    )
    for how in ({}, {"attention_mask": mask}):
        assert torch.equal(
            model.generate(idx, 40, temperature=0, **how),
            model.generate(idx, 40, temperature=0, sense_table=table, **how),
        )
    marked = model.generate(idx, 40, temperature=0, sense_table=torch.zeros_like(table))
    assert (marked[:, 5:] == 0).all()  # senses come from nowhere else
    assert torch.equal(sense_table(model, table.nbytes), table)
    assert sense_table(model, table.nbytes - 1) is None
    assert sense_table(build(n_sense=0)) is None


def test_generation_leaves_the_mode_and_uses_no_dropout():
    model, idx = build(dropout=0.5).train(), ids(1, 4)
    first = model.generate(idx, 8, temperature=0)
    assert model.training and torch.equal(first, model.generate(idx, 8, temperature=0))


def test_same_seed_same_text():
    model, idx = build(), ids(1, 4)
    a, b, c = (
        model.generate(idx, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_sampling_draws_from_the_stated_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
    p = (logits / 0.7).softmax(-1)[0]

    def frequencies(**how):
        draws = sample_token(
            logits.expand(40_000, 5), generator=torch.Generator().manual_seed(0), **how
        )
        return torch.bincount(draws[:, 0], minlength=5) / 40_000

    assert torch.allclose(frequencies(temperature=0.7), p, atol=0.01)
    two = torch.tensor([*p[:2], 0, 0, 0]) / p[:2].sum()
    assert torch.allclose(frequencies(temperature=0.7, top_k=2), two, atol=0.01)
    assert p[0] < 0.8 < p[:2].sum()  # so two tokens are the fewest that have .8
    assert torch.allclose(frequencies(temperature=0.7, top_p=0.8), two, atol=0.01)
    assert (
        frequencies(temperature=0)[0] == 1
        and frequencies(top_p=1e-9)[0] == 1
        and frequencies(top_k=99)[4] > 0
    )


def test_dropout_is_where_the_paper_has_it():
    """A probability close to 1 cuts every branch: only biases behind the last dropout survive."""
    model, idx = build(dropout=1 - 1e-9).train(), ids(1, 5)
    assert torch.equal(model.hidden(idx)[0], model.ln_f.bias.expand(1, 5, 24))
    out = model.sense_network.mlp_out(model.sense_network.ln_2.bias)
    assert torch.allclose(model.senses(idx), out.view(3, 24).expand(1, 5, 3, 24), atol=1e-6)


@pytest.mark.parametrize("n_sense", [0, 3])
def test_grad_checkpoint_changes_no_gradient(n_sense):
    idx, grads, calls = ids(2, 9), [], []
    for on in (False, True):
        model = build(n_sense=n_sense, grad_checkpoint=on).train()
        parts = [*model.blocks, *([model.sense_network] if n_sense else [])]
        calls.clear()
        for part in parts:
            part.register_forward_pre_hook(lambda module, _: calls.append(module))
        model(idx, idx)[1].backward()
        assert [calls.count(part) for part in parts] == [1 + on] * len(parts)
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_initialisation():
    torch.manual_seed(0)
    model = Backpack(BackpackConfig(n_layer=8, n_head=4, n_embd=128, n_sense=4, vocab_size=500))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            want = 0.02 / math.sqrt(16) if "proj" in name else 0.02
            assert abs(p.std() / want - 1) < 0.03, name
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
    small = [name for name, p in model.named_parameters() if p.dim() == 2 and "proj" in name]
    assert len(small) == 8 * 2 + 2


def test_weight_decay_groups():
    model = build()
    decay, rest = model.param_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert all(
        names[p].endswith("weight")
        and "ln" not in names[p]
        and "wte" not in names[p]
        and "wpe" not in names[p]
        for p in decay["params"]
    )
    assert all(p.dim() == 1 or "wte" in names[p] or "wpe" in names[p] for p in rest["params"])


def test_flops_are_what_torch_counts():
    model, idx = (
        build(n_head=3, n_sense=4),
        torch.arange(16)[None],
    )  # all different: no weights are added up
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(idx)
    c = model.config  # torch counts all pairs of positions
    pairs = 2 * c.n_layer * c.n_embd + c.n_sense * (c.n_embd // c.n_sense + c.n_embd)
    want = counter.get_total_flops() / 16 - 2 * pairs * (16 - 8.5)
    assert sum(flops_per_token(model, 1.0).values()) / 3 == pytest.approx(want, rel=1e-9)


def test_xl_builds_on_meta_and_its_states_fit_80_gb():
    values = read_config(ROOT / "config/backpack_xl.py")
    shape = {k: v for k, v in values.items() if k in BackpackConfig.__dataclass_fields__}
    model = on_meta(**shape)
    assert model.num_params() == 1_756_536_000 and 16 * model.num_params() < 80e9


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match="17 tokens are more than block_size=16"):
        build()(ids(1, 17))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_embd": 25}, "n_embd=25 must be divisible by n_head=2"),
        ({"n_sense": 7}, "divisible by n_sense=7"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"n_sense": -1}, "n_sense=-1"),
        ({"n_head": 0}, "n_head=0 must be"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        BackpackConfig(**SMALL | changes)


def test_from_checkpoint(tmp_path):
    model, idx = build(), ids(1, 5)
    ckpt = {"model": model.state_dict(), "config": SMALL, "settings": {}, "step": 3}
    ckpt["meta"] = {"tokenizer": None}
    torch.save(ckpt, tmp_path / "ckpt.pt")
    for where in (tmp_path, tmp_path / "ckpt.pt"):
        loaded = Backpack.from_checkpoint(where)
        assert torch.equal(loaded(idx)[0], model(idx)[0]) and not loaded.training
    changed = Backpack.from_checkpoint(tmp_path, dropout=0.5)
    assert changed.drop.p == 0.5 and changed.blocks[0].attn.dropout == 0.5
    torch.save(ckpt | {"config": SMALL | {"n_embd": 48}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="does not fit model.py: .*size mismatch"):
        Backpack.from_checkpoint(tmp_path)
    torch.save(ckpt | {"config": SMALL | {"rope": True}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'rope'"):
        Backpack.from_checkpoint(tmp_path)


def test_targets_of_minus_100_do_not_count():
    model, idx = build(), ids(1, 6)
    y = idx.roll(-1, 1).clone()
    y[0, 3:] = -100
    assert torch.allclose(model(idx, y)[1], F.cross_entropy(model(idx)[0][0, :3], y[0, :3]))


def test_loss_in_chunks_is_the_loss_of_whole_logits():
    model, idx = build(vocab_size=1234).double(), ids(2, 16, n=1234)
    y = idx.roll(-1, 1).clone()
    y[1, 10:] = -100
    results = []
    for loss in (
        lambda: model(idx, y)[1],
        lambda: F.cross_entropy(model(idx)[0].flatten(0, 1), y.flatten()),
    ):
        model.zero_grad()
        (value := loss()).backward()
        results.append([value, *(p.grad.clone() for p in model.parameters())])
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*results))


def test_transformer_share_mixes_in_the_loss_of_the_transformer_alone():
    model, idx = build().double(), ids(2, 9)
    alone = build(n_sense=0).double()
    alone.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "sense" not in key}
    )
    own, its = model(idx, idx.roll(-1))[1], alone(idx, idx.roll(-1))[1]
    assert abs(own - its) > 0.01
    mixed = model(idx, idx.roll(-1), transformer_share=torch.tensor(0.3))[1]
    assert abs(mixed - (0.7 * own + 0.3 * its)) < 1e-7
    model(idx, idx.roll(-1), transformer_share=torch.tensor(1.0))[
        1
    ].backward()  # its gradients, else none
    its.backward()
    grads = {name: p.grad for name, p in alone.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, grads[name]) if name in grads else not p.grad.any(), name


def test_distinct_tokens_that_are_known_change_nothing():
    model, idx = build(), ids(2, 9)
    tokens, where = idx.unique(return_inverse=True)
    more = torch.cat((tokens, tokens[:3])), where  # rows that stand nowhere
    assert torch.equal(model(idx, idx)[1], model(idx, idx, distinct=more)[1])
    mask = torch.ones_like(idx)
    want = model(idx, attention_mask=mask)[0]
    assert torch.allclose(want, model(idx, attention_mask=mask, distinct=more)[0])


def test_dropout_has_one_mask_for_each_distinct_token(monkeypatch):
    """Equal tokens of a sequence have the same senses, whatever was dropped."""
    model = build(dropout=0.5).train()
    table = model.senses(torch.tensor([4, 4, 7]))
    assert not torch.equal(table[0], table[1])  # separate rows: separate masks
    seen, sum_senses = [], model_file.sum_senses
    monkeypatch.setattr(
        model_file, "sum_senses", lambda *args: seen.append(args[2:]) or sum_senses(*args)
    )
    model(torch.tensor([[4, 7, 4, 4, 9]]))
    C, where = seen[0]
    assert C.shape == (3, 3, 24) and where.tolist() == [[0, 1, 0, 0, 2]]


def test_compile_has_no_graph_break_and_does_not_compile_again():
    model = build()
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        idx = ids(2, 16, seed=seed)
        distinct, where = idx.unique(return_inverse=True)
        torch._dynamo.mark_dynamic(distinct, 0)
        loss = step(idx, idx, distinct=(distinct, where), transformer_share=torch.tensor(0.3))[1]
        want = model(idx, idx, transformer_share=torch.tensor(0.3))[1]
        assert torch.allclose(loss, want, atol=1e-5)
        for p, a, b in zip(
            model.parameters(), *(torch.autograd.grad(x, model.parameters()) for x in (loss, want))
        ):
            assert torch.allclose(a, b, atol=1e-5), p.shape
    assert len({len(ids(2, 16, seed=seed).unique()) for seed in range(4)}) > 1
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def loss_head(vocab_size=8190):
    """(o, y -> loss; E; o (16,128,D); y): logits of standard deviation 3; a fourth are targets."""
    generator, D = torch.Generator().manual_seed(0), 64
    model = Backpack(
        BackpackConfig(
            block_size=128, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=D, n_sense=0
        )
    )
    with torch.no_grad():
        model.wte.weight.copy_(
            torch.randn(model.wte.weight.shape, generator=generator) * 3 / math.sqrt(D)
        )
    o, y = (
        torch.randn(16, 128, D, generator=generator),
        torch.randint(vocab_size // 4, (16, 128), generator=generator),
    )
    y[3, :50] = -100
    return model.loss, model.wte.weight, o.requires_grad_(), y


@pytest.mark.parametrize(
    "mode, dtype, scale",
    [
        ("eager", torch.float32, 1),
        ("eager", torch.bfloat16, 1),
        ("eager", torch.float16, 65536),
        ("aot_eager", torch.bfloat16, 1),
        ("inductor", torch.float32, 1),
        ("inductor", torch.bfloat16, 1),
        ("inductor", torch.float16, 65536),
    ],
)
def test_the_loss_and_its_gradients_in_16_bits(mode, dtype, scale):
    loss, E, o, y = loss_head()
    whole = F.cross_entropy(F.linear(o.double(), E[:8190].double()).flatten(0, 1), y.flatten())
    of_o, of_E = torch.autograd.grad(whole, (o, E))
    torch._dynamo.reset()
    call = loss if mode == "eager" else torch.compile(loss, backend=mode, fullgraph=True)
    kept = []
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            evaluated = call(o, y)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.shape) or t, lambda t: t
        ):
            trained = call(o, y)
    grad_o, grad_E = (
        grad.double() / scale for grad in torch.autograd.grad(scale * trained, (o, E))
    )
    for value in (evaluated, trained):
        assert value.dtype == torch.float32 and abs(value - whole) < 2e-3

    def close(got, want, tolerance):
        return (got - want).norm() < tolerance * want.norm()

    never = (
        torch.ones(8190, dtype=torch.bool).index_fill(0, y[y >= 0].unique(), False).nonzero()[:, 0]
    )
    assert (
        close(grad_o, of_o, 0.01)
        and close(grad_E, of_E, 0.01)
        and close(grad_E[never], of_E[never], 0.02)
    )
    assert not grad_E[8190:].any() and not grad_o[3, :50].any()
    assert all(
        math.prod(shape) < 16 * 128 * 8190 for shape in kept
    )  # no logits are kept for backward


@pytest.mark.parametrize("n_sense", [0, 3])
def test_several_tokens_may_follow_a_cache(n_sense):
    model, idx = build(n_sense=n_sense), ids(2, 11)
    cache, parts = model_file.Cache(16), []
    for part in idx.split((4, 6, 1), 1):
        parts.append(model.output(part, cache=cache)[0])
    assert torch.allclose(torch.cat(parts, 1), model.output(idx)[0], atol=1e-5)
