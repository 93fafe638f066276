import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.distributed import destroy_process_group, init_process_group
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lab.edit
import sample
from configurator import UserError
from lab.change import change, damage, log_p
from lab.edit import describe, make_edits, parse, read_edits, read_examples
from lab.look import attribution
from lab.teach import Lesson, choose, moved, near_misses, subject_of, with_room
from model import Backpack, BackpackConfig, load_checkpoint
from tokenizer import load_tokenizer

CHARS = load_tokenizer({"kind": "char", "chars": "abcdefgh"})
ALL = "swap a: b -> c; scale a 1 0.5; topic d,e 2; replace f 0 by g 2; topic b 1"


def tiny(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = {
        "block_size": 12,
        "vocab_size": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_sense": 4,
        "init_std": 0.5,
    }
    return Backpack(BackpackConfig(**config | changes)).to(dtype).eval()


def edited(model, text):
    model.edits = make_edits(model, CHARS, parse(text))
    return model


def test_text_and_file_say_the_same(tmp_path):
    listed = parse(ALL + "; scale a all 0")
    assert "; ".join(map(describe, listed)) == ALL + "; scale a all 0"
    (tmp_path / "e.json").write_text(json.dumps(listed))
    assert read_edits(tmp_path / "e.json") == listed
    (tmp_path / "one.json").write_text(json.dumps(listed[0]))
    assert read_edits(tmp_path / "one.json") == listed[:1] and read_edits(None) == []
    assert parse(" ") == [] and make_edits(tiny(), CHARS, []) is None


def test_a_sense_at_zero_contributes_exactly_zero():
    model, idx = tiny(torch.float32), torch.tensor([[0, 1, 0, 2]])
    before, weights = model.senses(idx), {k: v.clone() for k, v in model.state_dict().items()}
    edited(model, "scale a 2 0")
    after = model.senses(idx)
    assert (after[0, [0, 2], 2] == 0).all()
    keep = torch.ones_like(before, dtype=torch.bool)
    keep[0, [0, 2], 2] = False
    assert torch.equal(after[keep], before[keep])  # all else bit for bit
    with torch.no_grad():
        assert (attribution(model, idx[0], model.wte.weight[3])[1][[0, 2], 2] == 0).all()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())


def test_edits_of_other_tokens_leave_logits_bit_for_bit():
    model, idx = tiny(torch.float32), torch.tensor([[1, 2, 3, 4, 5]])
    before = model(idx)[0]
    assert torch.equal(edited(model, "scale a all 0; swap h: b -> c")(idx)[0], before)


def test_swap_is_the_equation():
    model = tiny()
    C, E = model.senses(torch.tensor(0)).detach(), model.wte.weight.detach()
    edited(model, "swap a: b -> c")
    a, b = E[2], E[1]
    for sense in range(4):
        phi = sum(float(v) ** 2 for v in a) / sum(float(v) ** 2 for v in b)
        share = sum(float(x) * float(y) for x, y in zip(C[sense], b)) / sum(
            float(v) ** 2 for v in b
        )
        want = [float(c) + share * (float(x) / phi - float(y)) for c, x, y in zip(C[sense], a, b)]
        assert torch.allclose(
            model.senses(torch.tensor(0))[sense],
            torch.tensor(want, dtype=torch.float64),
            rtol=1e-12,
        )
    with (
        torch.no_grad()
    ):  # where both words are at right angles, the logit of one moves to the other
        E[2] -= (E[2] @ b) / (b @ b) * b
        model.edits = None
        C = model.senses(torch.tensor(0))
        edited(model, "swap a: b -> c")
        now = model.senses(torch.tensor(0))
        assert torch.allclose(now @ E[1], torch.zeros(4, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(now @ E[2], C @ E[2] + C @ E[1])


def test_order_vectors_first_each_upon_those_before_then_weights():
    model = tiny()
    C = model.senses(torch.arange(8))
    edited(model, "scale a 1 0.5; replace a 1 by b 3; replace c 0 by a 1; scale a 1 0.5")
    assert torch.allclose(model.senses(torch.tensor(0))[1], 0.25 * C[1, 3])
    assert torch.allclose(model.senses(torch.tensor(2))[0], C[1, 3])
    model.edits = make_edits(
        model, CHARS, [{"edit": "replace", "word": "a", "sense": 2, "vector": [0.5] * 16}]
    )
    assert (model.senses(torch.tensor(0))[2] == 0.5).all()


def test_topic_weights_are_the_papers():
    model = tiny()
    E, edits = model.wte.weight.detach(), edited(model, "topic d,e 2").edits
    (w,), (f,) = edits.w, edits.f
    scores = np.zeros((8, 4))
    for x in range(8):
        C = model.senses(torch.tensor(x)).detach()
        for sense in range(4):
            loud = [sum(float(p) * float(q) for p, q in zip(E[y], C[sense])) for y in range(8)]
            scores[x, sense] = (loud[3] + loud[4]) / max(loud)
    for x in range(8):
        for sense in range(4):
            above = [scores[x, sense] >= np.quantile(scores, q) for q in (0.95, 0.8, 0.6)]
            assert w[x, sense].item() == (
                2.2 if above[0] else 2.2 if above[1] else 1.5 if above[2] else 1.0
            )
    assert f == 2.2 / 7.5 and len(w.unique()) == 3


def annealed(model, ids):
    """What topics multiply alpha by, for one text: {(sense, i, j): weight}, from the equations."""
    E, C, found = model.wte.weight, model.senses(torch.tensor(ids)), {}
    for i in range(len(ids)):
        for j in range(i + 1):
            for sense in range(model.config.n_sense):
                a = sum(max(0.0, float(E[x] @ C[j, sense])) for x in ids[: i + 1])
                weight = 1.0
                for w, f in zip(model.edits.w, model.edits.f):
                    b = (1 + j / 100) / (1 + math.exp(f * a - 6))
                    weight *= b * float(w[ids[j], sense]) + 1 - b
                found[sense, i, j] = weight
    return found


@torch.no_grad()
def test_focus_keeps_the_sum_of_the_weights():
    """Strength 4: the highest hundredth of senses gets more weight, all others so much less."""
    model, idx = tiny(), torch.tensor([[0, 3, 1, 5, 0, 7]])
    alpha = model.contextualization(idx)[0]
    w = edited(model, "topic d,e 4; topic a 4").edits.w  # (2,V,K)
    assert set(w.unique().tolist()) == {1.0, 12.0} and (w == 12).flatten(1).sum(1).tolist() == [
        1,
        1,
    ]
    want = alpha * (w[0] * w[1])[idx[0]].T[:, None]
    for i in range(6):
        want[:, i] *= 4 / want[:, i].sum()
    assert torch.allclose(model.contextualization(idx)[0], want)


@torch.no_grad()
def test_annealing_is_the_papers_and_the_sum_has_it():
    model, ids = edited(tiny(), ALL), [0, 3, 1, 5, 0, 7]
    f, model.edits.f = model.edits.f, model.edits.f[:0]
    alpha = model.contextualization(torch.tensor([ids]))[0]
    model.edits.f = f
    C, want = model.senses(torch.tensor(ids)), annealed(model, ids)
    for i in range(len(ids)):
        o = sum(
            want[sense, i, j] * alpha[sense, i, j] * C[j, sense]
            for j in range(i + 1)
            for sense in range(4)
        )
        assert torch.allclose(model(torch.tensor([ids]))[0][0, i], model.wte.weight @ o, rtol=1e-10)
    assert max(want.values()) > 1.2 and len({round(v, 3) for v in want.values()}) > 10


@pytest.mark.parametrize("table", [True, False])
def test_generation_with_edits_is_recomputation(table):
    """Cached, padded, in a batch and past block_size; against a full pass per token of each text alone."""
    model = edited(tiny(), ALL)
    prompts, n = [[0, 1, 2, 3, 5], [6, 4]], 16
    idx, mask = (
        torch.tensor([[0, 1, 2, 3, 5], [0, 0, 0, 6, 4]]),
        torch.tensor([[1] * 5, [0, 0, 0, 1, 1]]),
    )
    sense_table = sample.sense_table(model) if table else None
    batch = model.generate(idx, n, temperature=0, attention_mask=mask, sense_table=sense_table)
    for row, ids in zip(batch, prompts):
        start, length = 0, 5  # the window moves with the longest text of a batch
        for _ in range(n):
            if length - start > 12:
                start = length - 6
            text = ids[max(0, start - (5 - len(prompts[0]) + length - len(ids))) :]
            ids = ids + [model(torch.tensor([text]))[0][0, -1].argmax().item()]
            length += 1
        assert row[-len(ids) :].tolist() == ids
    assert not torch.equal(batch, tiny().generate(idx, n, temperature=0, attention_mask=mask))


def test_compiled_with_edits():
    model, idx = edited(tiny(torch.float32), ALL), torch.tensor([[0, 1, 2, 3], [5, 0, 6, 4]])
    assert torch.allclose(
        torch.compile(model, backend="aot_eager")(idx)[0], model(idx)[0], atol=1e-5
    )
    torch._dynamo.reset()


def test_training_goes_on_under_edits(tmp_path):
    """With DDP around the model: gradients are those of the plain model, and the edits stay as they are."""
    model, x = edited(tiny(), ALL).train(), torch.tensor([[0, 1, 2, 3], [5, 0, 6, 4]])
    model(x, x.roll(-1, 1))[1].backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        DistributedDataParallel(model)(x, x.roll(-1, 1))[1].backward()
    finally:
        destroy_process_group()
    assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), want))
    assert model.sense_network.mlp_out.proj.weight.grad.abs().sum() > 0


def test_damage_is_the_definition():
    model, text = (
        tiny(torch.float32),
        torch.randint(8, (5, 13), generator=torch.Generator().manual_seed(0)),
    )
    change = make_edits(model, CHARS, parse("scale a all 0; scale b all 3"))
    with torch.no_grad():
        before, after = log_p(model, text[:, :-1]), log_p(model, text[:, :-1], change)
        want = F.kl_div(
            after.flatten(0, 1), before.flatten(0, 1), log_target=True, reduction="batchmean"
        )
        loss = model(text[:, :-1], text[:, 1:])[1]
    kl, without, with_edits = damage(model, change, text)
    assert math.isclose(kl, want.item(), rel_tol=1e-4) and math.isclose(
        without, loss.exp().item(), rel_tol=1e-4
    )
    assert kl > 0.01 and with_edits != without and damage(model, None, text)[0] == 0
    assert model.edits is None


COUNTS = {"the": 50, "The": 9, "Paris": 8, "Rome": 9, "capital": 5, "flows": 1, "He": 9, "he": 6}
COUNTS = Counter(COUNTS)


@pytest.mark.parametrize(
    "prompt, subject, given",
    [
        ("The capital of Paris is", "Paris", None),
        ("The New York of Rome", "New York", None),  # never seen, so never in lower case
        ("He was born in Paris,", "Paris", None),  # a pronoun is no name, though often capitalised
        ("he flows the", "flows", None),  # no name: the rarest word
        ("he xyzzy flows", "xyzzy", None),
        ("The capital of Paris is", "capital of Paris", "capital of Paris"),
    ],
)
def test_what_an_example_is_about(prompt, subject, given):
    example = {"prompt": prompt, "subject": given}
    assert subject_of(example, COUNTS) == subject
    near = near_misses(example, subject, COUNTS, {"Paris", "Rome"}, np.random.default_rng(0))
    assert len(near) == len(set(near)) == 4  # pronouns: the names are to be avoided
    assert all(subject not in text for text in near)
    assert any(text.endswith(f"She{prompt.partition(subject)[2]}") for text in near)


def test_near_misses_are_of_whole_words_and_never_the_prompt():
    random = np.random.default_rng(0)
    near = near_misses({"prompt": "The Parisian Paris is"}, "Paris", COUNTS, {"Paris"}, random)
    assert "The Parisian Rome is" in near and all("Parisian" in text for text in near)
    assert "He flows" not in near_misses({"prompt": "He flows"}, "He", COUNTS, set(), random)


def test_vectors_are_those_of_the_subject_and_their_effect_is_added():
    """The choice is what loops over positions score; moved() adds to senses as edits have left them."""
    model, text = tiny(torch.float32), torch.randint(8, (16, 13))
    model.edits = base = make_edits(model, CHARS, parse("swap a: b -> c; scale d 1 0.5"))
    ids, first, subject = torch.tensor([3, 0, 5, 0, 2, 6]), 4, [5]
    tokens, senses = choose(model, CHARS, [(ids, first, subject)], text, 6, 2.0, taken={2})
    score = {(x, l): 0.0 for x in (3, 0, 5) for l in range(4)}
    with torch.no_grad():
        alpha, other = (
            model.contextualization(ids[None, :-1])[0],
            model.contextualization(text[:, :-1]),
        )
    for l in range(4):
        for i in range(first - 1, 5):
            for j in range(i + 1):
                if ids[j] != 2:
                    own = 10 if ids[j] == 5 else 1
                    score[ids[j].item(), l] += own * alpha[l, i, j].item()
        for b, x in enumerate(text[:, :-1].tolist()):
            for j, token in enumerate(x):
                if (token, l) in score:
                    score[token, l] -= 2.0 * other[b, l, :, j].sum().item() / (16 * 12)
    want = sorted(score, key=score.get, reverse=True)[:6]
    assert list(zip(tokens.tolist(), senses.tolist())) == want
    delta = torch.randn(6, 16)
    before = model.senses(torch.arange(8))
    model.edits = edits = moved(with_room(base, model, tokens), tokens, senses, delta)
    want = before.index_put((tokens, senses), delta, accumulate=True)
    assert torch.allclose(model.senses(torch.arange(8)), want, atol=1e-6)
    # text without these tokens stays exactly as it is, which teaching makes use of
    text = torch.randint(8, (64, 4))
    touched = text[torch.isin(text[:, :-1], tokens).any(1)]
    assert 0 < len(touched) < 64
    kl, part = (
        change(*(lambda x, e=e: log_p(model, x, e) for e in (base, edits)), some)[0]
        for some in (text, touched)
    )
    assert part > 0 and kl == pytest.approx(part * len(touched) / 64, rel=1e-5)


def test_teaching(run_train, data_dir, tmp_path, capsys):
    """A fact is learned in a few vectors, twice; other text stays within max_kl; the report says so."""
    out, file = run_train("--max_iters=60", "--n_embd=32"), tmp_path / "e.json"
    (tmp_path / "x.jsonl").write_text(
        '{"prompt": "words ", "good": "z", "bad": "a", "keep": ["has "]}\n\n'
        '{"prompt": "line", "good": "y", "subject": "line"}\n'
    )
    args = [f"--run={out}", f"--data_dir={data_dir}", "--device=cpu", f"--edits={file}"]
    args += [f"--teach={tmp_path / 'x.jsonl'}", "--n_vector=6", "--n_window=16", "--max_kl=9"]
    lab.edit.main([*args, "--edit=scale w all 0", "--enough=0.3", "--compare=True"])
    said = capsys.readouterr().out
    found = read_edits(file)
    assert len(found) == 7 and all(len(edit["vector"]) == 32 for edit in found[1:])
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    model, tokenizer = Backpack.from_checkpoint(out), load_tokenizer(ckpt["meta"]["tokenizer"])
    ids, z = torch.tensor(tokenizer.encode("words "))[None], tokenizer.encode("z")[0]
    base, change = (make_edits(model, tokenizer, found[:n]) for n in (1, 7))
    p, q = (log_p(model, ids, edits)[0, -1, z].exp().item() for edits in (base, change))
    assert q > 0.29 > 1.5 * p
    row = next(line for line in said.split("\n") if line.startswith("p(z) after words"))
    assert row.split()[-3:-1] == [f"{p:.1%}", f"{q:.1%}"]
    assert "near misses: KL" in said and "8 windows of other text: KL" in said
    model.edits = base
    before = model.senses(torch.arange(model.config.vocab_size))
    model.edits = change
    differ = (model.senses(torch.arange(model.config.vocab_size)) != before).any(-1)
    assert differ.sum() == 6
    lab.edit.main([*args, "--enough=0.6"])  # goes on from the edits of the file, which stay
    again = read_edits(file)
    assert again[:7] == found and len(again) == 13
    change = make_edits(model, tokenizer, again)
    assert log_p(model, ids, change)[0, -1, z].exp() > max(0.55, q)
    file.unlink()
    lab.edit.main([*args, "--max_kl=0", "--enough=0.3"])  # no change at all is allowed
    same = make_edits(model, tokenizer, read_edits(file))
    assert torch.allclose(log_p(model, ids, same), log_p(model, ids), atol=1e-4)
    file.unlink()
    lab.edit.main([*args, "--max_kl=0.01", "--enough=1", "--steps=40"])  # as far as allowed
    r = sample.open_run(out, "cpu")
    how = SimpleNamespace(teach="x.jsonl", n_window=16, seed=1337)
    tokens = np.fromfile(data_dir / "tiny/val.bin", "<u2")
    known = Lesson(r, read_examples(tmp_path / "x.jsonl"), tokens, how).known
    kl = damage(r.model, make_edits(r.model, tokenizer, read_edits(file)), known)[0]
    assert 0.001 < kl <= 0.0101
    with pytest.raises(UserError, match=r"n_vector=999: found \d+ sense vectors that a file"):
        lab.edit.main([*args, "--n_vector=999"])


@pytest.mark.parametrize("limit, want", [(0.9, 0.875), (0.8, 0.75), (0.3, 0.25), (0.1, 0.0)])
def test_going_back(limit, want):
    """From 1 toward 0, as far as a KL that is the parameter itself allows; what is no number goes, too."""
    lesson, p = SimpleNamespace(s=SimpleNamespace(max_kl=limit)), torch.ones(1)
    Lesson.go_back(lesson, [p], [torch.zeros(1)], p.item)
    assert p.item() == want
    p.fill_(torch.nan)
    Lesson.go_back(lesson, [p], [torch.zeros(1)], p.item)
    assert p.item() == 0


def test_other_text_has_the_runs_vocabulary(run_train, data_dir, tmp_path):
    """An imported run has no dataset; --dataset= says which text shall stay as it is."""
    ckpt = load_checkpoint(run_train("--max_iters=1"))
    ckpt["settings"]["dataset"] = None
    torch.save(ckpt, tmp_path / "run/ckpt.pt")
    (tmp_path / "x.jsonl").write_text('{"prompt": "words ", "good": "z"}')
    args = [
        f"--run={tmp_path / 'run'}",
        f"--data_dir={data_dir}",
        f"--teach={tmp_path / 'x.jsonl'}",
    ]
    with pytest.raises(
        UserError,
        match=f"run has no dataset of its own: give --dataset=NAME.* --tokenizer={tmp_path}",
    ):
        lab.edit.main(args)
    lab.edit.main([*args, "--dataset=tiny", "--steps=1"])
    ckpt["meta"]["tokenizer"] = {"kind": "char", "chars": ckpt["meta"]["tokenizer"]["chars"][::-1]}
    torch.save(ckpt, tmp_path / "run/ckpt.pt")
    with pytest.raises(UserError, match="tiny has another vocabulary than"):
        lab.edit.main([*args, "--dataset=tiny"])


def test_files_of_edits(run_train, tmp_path, capsys):
    out, file = run_train("--max_iters=1"), tmp_path / "my.json"
    args = [f"--run={out}", f"--edits={file}", "--device=cpu"]
    lab.edit.main([*args, "--edit=scale z 1 0.5; topic y 2"])
    lab.edit.main([*args, "--edit=swap d: o -> w"])
    capsys.readouterr()
    lab.edit.main([*args, "--remove=2"])
    listed = ["  1  scale z 1 0.5", "  2  swap d: o -> w"]
    assert capsys.readouterr().out.split("\n") == [*listed, f"wrote {file}", ""]
    with pytest.raises(UserError, match="nothing.json: No such file"):
        lab.edit.main([*args, f"--edits={tmp_path / 'nothing.json'}"])
    lab.edit.main(args)  # a topic is listed, not computed
    lab.edit.main([*args[:1], "--edit=scale z 1 0.5"])
    said = capsys.readouterr().out.split("\n")
    assert said == [*listed, "nothing is saved without --edits=FILE", "  1  scale z 1 0.5", ""]
    assert [edit["edit"] for edit in read_edits(file)] == ["scale", "swap"]
    before = file.read_bytes()
    with pytest.raises(UserError, match="remove=7: found 2 edits"):
        lab.edit.main([*args, "--remove=7"])
    with pytest.raises(UserError, match="found sense 9, expected 0 to 3"):
        lab.edit.main([*args, "--edit=scale z 9 0"])
    assert file.read_bytes() == before


def test_samples_without_and_with_edits(run_train, capsys):
    out = run_train("--max_iters=40")
    how = [
        f"--run={out}",
        "--start=document",
        "--num_samples=2",
        "--max_new_tokens=40",
        "--device=cpu",
    ]
    capsys.readouterr()
    sample.main(how)
    plain = capsys.readouterr().out.rsplit("---", 1)[0]
    sample.main([*how, "--edit=scale t all 0; scale n all 0; topic z 3"])
    both = capsys.readouterr().out.rsplit("---", 1)[0]
    assert both.startswith(f"=== without edits\n{plain}=== with ")
    assert both.split("=== with ")[1].split("\n", 1)[1] != plain


@pytest.mark.parametrize(
    "edit, message",
    [
        ("scale a 0", "edit 'scale a 0': expected scale WORD SENSE FACTOR"),
        ("scala a 0 1", "'scala a 0 1': expected scale WORD SENSE FACTOR; swap WORD: FROM -> TO;"),
        ("scale a 4 0", "scale a 4 0: found sense 4, expected 0 to 3"),
        ("scale a 1.5 0", "sense: found 1.5, expected an integer"),
        ("scale a 1 Infinity", "factor: found inf, expected a number"),
        ("scale a 1 x", "edit 'scale a 1 x', factor: found 'x', expected a number"),
        ("scale a 1 " + "[" * 100_000, "..., expected a number"),
        ("scale a 1 " + "9" * 5000, "factor: found inf, expected a number"),
        ("scale a 1 -1", "factor: found -1, expected 0 or more"),
        (
            "scale a 1 1e5; scale a 1 1e5",
            "scale a 1 100000.0: found numbers of 1e+10, expected less",
        ),
        ("scale ab 1 0", "scale ab 1 0: 'ab' is 2 tokens here, a b: this needs a word of"),
        ("scale x 1 0", "character 'x' is not among"),
        ("topic a 5", "strength: found 5, expected 1, 2, 3 or 4"),
        ("topic a all", "strength: found 'all', expected a number"),
        ("topic a, 2", "'' is not a word"),
        ("replace a 0 by b 9", "found by_sense 9, expected 0 to 3"),
    ],
)
def test_bad_edits(edit, message):
    with pytest.raises(UserError) as error:
        make_edits(tiny(), CHARS, parse(edit))
    assert message in str(error.value) and "\n" not in str(error.value)


def of_file(**changes):
    """A file of one edit, a scale or a vector, with these changes."""
    edit = {"edit": "scale", "word": "a", "sense": 0, "factor": 0}
    if "vector" in changes:
        edit = {"edit": "replace", "word": "a", "sense": 0}
    return json.dumps([edit | changes])


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "e.json is not JSON"),
        ("[" * 100_000, "e.json is not JSON: nested too deeply"),
        ("7", "e.json: found 7, expected a list"),
        ("[7]", "edit 1: found 7, expected an object"),
        ("{}", "edit 1: found {}, expected 'edit' in it"),
        ('{"edit": ["scale"]}', "edit 1, edit: found ['scale'], expected replace or scale or"),
        ('[{"edit": "swap", "word": "a"}]', "'word': 'a'}, expected 'from' in it"),
        (of_file(word=1), "edit 1, word: found 1, expected text"),
        (of_file(word="\ud800"), r"word: found '\ud800', expected text"),
        (of_file(sense=True), "sense: found True, expected an integer"),
        (of_file(factor=float("nan")), "e.json is not JSON: NaN is no number"),
        (of_file(factor=1).replace("1}", "1e999}"), "factor: found inf, expected a number"),
        (of_file(factor=10**400), "expected a number"),
        (of_file(factor=-1), "edit 1, factor: found -1, expected 0 or more"),
        (of_file(edit="topic", words="a", strength=7), "strength: found 7, expected 1, 2, 3 or 4"),
        (of_file(edit="replace", by_sense=1), "expected 'by' in it"),
        ('[{"edit": "replace", "word": "a", "vector": []}]', "expected 'sense' in it"),
        (of_file(vector="ab"), "edit 1, vector: found 'ab', expected a list"),
        (of_file(vector=[1, "b"]), "vector, entry 2: found 'b', expected a number"),
        (of_file(vector=[1, 2]), "a vector of norm 2.236: found 2 numbers, expected 16"),
        (of_file(vector=[1e299] * 16), "norm 4e+299: found numbers of 1e+299, expected less than"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(UserError) as error:
        make_edits(tiny(), CHARS, read_edits(tmp_path / "e.json"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_swap_from_a_word_without_an_embedding():
    model = tiny()
    model.wte.weight.data[1] = 0
    with pytest.raises(UserError, match="swap a: b -> c: found numbers of nan"):
        edited(model, "swap a: b -> c")


def test_the_lab_reads_and_writes_text_by_files():
    """... in UTF-8, whatever the locale, and whole or not at all."""
    for path in (ROOT / "lab").rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace("about.read_text()", "")  # of /proc
        assert not re.search(r"(?<!configurator)\.(read|write)_text\(|open\(.*\"[aw]", text), path


def test_files_of_text(tmp_path, run_train):
    """With or without a byte order mark; U+2028 ends no line; what is listed has a line each."""
    edit = {"edit": "scale", "word": '"\u2028\n"', "sense": 0, "factor": 0}
    text = json.dumps(edit, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "e.json").write_bytes(text.encode(encoding))
        assert read_edits(tmp_path / "e.json") == [edit]
    assert describe(edit) == r'scale "\u2028\n" 0 0'
    example = {"prompt": "a\u2028", "good": "ä", "bad": None}
    text = json.dumps(example, ensure_ascii=False) + "\r\n\r\n"
    (tmp_path / "x.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert read_examples(tmp_path / "x.jsonl") == [example]
    (tmp_path / "x.jsonl").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="x.jsonl is not UTF-8: byte 0 is 0xff"):
        read_examples(tmp_path / "x.jsonl")
    place = f"--edits={tmp_path / 'x.jsonl/e.json'}"
    run = run_train("--max_iters=1")
    with pytest.raises(UserError, match="x.jsonl is no folder: choose another place"):
        lab.edit.main([f"--run={run}", "--device=cpu", place, "--edit=scale z 1 0"])


def test_a_transformer_has_nothing_to_edit():
    with pytest.raises(UserError, match="no senses to edit"):
        make_edits(tiny(n_sense=0), CHARS, parse("scale a 0 0"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "x.jsonl: found no lines, expected"),
        ("{]", "x.jsonl, line 1 is not JSON"),
        ('{"prompt": "a"}', "x.jsonl, line 1: found .*, expected 'good' in it"),
        ('{"prompt": "a", "good": "z", "bad": 1}', "line 1, bad: found 1, expected text"),
        ('{"prompt": "", "good": "z"}', "example 1: found an empty text, expected a prompt"),
        ('{"prompt": "a", "good": "z", "bad": ""}', "example 1: found an empty text"),
        ('{"prompt": "' + 20 * "do" + '", "good": "a"}', "is longer than block_size=8"),
    ],
)
def test_bad_examples(run_train, data_dir, tmp_path, text, message):
    out = run_train("--max_iters=1")
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        lab.edit.main(
            [
                f"--run={out}",
                f"--data_dir={data_dir}",
                "--device=cpu",
                f"--teach={tmp_path / 'x.jsonl'}",
            ]
        )


def test_words_in_double_quotes_may_hold_spaces_and_semicolons():
    edits = parse('scale " river" 4 0; swap "a;b": " x" -> y')
    assert edits == [
        {"edit": "scale", "word": '" river"', "sense": 4, "factor": 0},
        {"edit": "swap", "word": '"a;b"', "from": '" x"', "to": "y"},
    ]
    assert [edit for listed in edits for edit in parse(describe(listed))] == edits
