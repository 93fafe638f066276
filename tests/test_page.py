"""The page of lab.look --html: its engine against model.py in Node, and its views in a headless Chromium."""

import json
import os
import re
import shlex
import shutil
import subprocess
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import lab.edit
import sample
from configurator import configure
from lab import look, page
from lab.edit import make_edits, parse
from model import Backpack, BackpackConfig
from tokenizer import load_tokenizer, word_ids

RUN = ROOT / "pretrained/simplewiki"
EDITS = [
    "",
    "swap Denver: Colorado -> Texas; swap the: river -> sea",
    "scale the 3 0; scale of all 0.5; scale in 2 2.5",
    "replace the 3 by river 9; replace of 0 by the 1",
    "topic music 3",
    "topic music 4",
    "swap the: of -> in; scale the 4 2; topic river,sea 2; replace in 1 by the 2; scale in 1 0.3",
]
ODD = list("abcXYZ éü ñ\n\t  '’s.,!?😀👩‍👩‍👧日本語0123½Ⅷ\u0301\u00a0\u3000\ufeff\u0085\u2028ß") + [
    "<|endoftext|>"
]
WORDS = "the of in river music Denver was born and sea city people".split()
CHECK = """
const fs = require("fs"), page = fs.readFileSync(process.argv[2], "utf8");
const script = id => page.split(`id="${id}">`)[1].split("</script>")[0];
const lab = new Function(script("engine") + script("worker") +
  "; return {methods, get engine() { return engine; }, get tokenizer() { return tokenizer; }};")();
(async () => {
  const data = JSON.parse(script("data")), cases = JSON.parse(fs.readFileSync(process.argv[3]));
  await lab.methods.load(data, script("weights").trim(), script("peaks").trim());
  const {engine, tokenizer} = lab, result = {};
  result.ids = cases.strings.map(text => tokenizer.encode(text));
  result.decoded = cases.strings.map((text, i) => tokenizer.decode(result.ids[i]));
  result.logits = [];
  const compile = {};
  for (const {ids, edits} of cases.texts) {
    const compiled = await (compile[JSON.stringify(edits)] ||= engine.compile(edits));
    result.logits.push(Array.from(engine.logits(engine.output(engine.read(ids), ids.length - 1, compiled))));
  }
  result.greedy = cases.prompts.map(ids => [...engine.generate(ids, cases.length, null)]);
  result.who = await lab.methods.who({word: cases.who, n: 10}, () => {});
  result.look = await lab.methods.look({...data.first, at: null, targets: [], n: 8});
  fs.writeFileSync(process.argv[4], JSON.stringify(result));
})();
"""


@lru_cache
@torch.no_grad()
def some_peaks(model, progress=iter):
    """sense_peaks over 512 of 16,384 tokens, which take half a minute; clamped, as they divide."""
    ids, E = torch.arange(model.config.vocab_size), model.wte.weight[:512]
    return torch.cat([(model.own_senses(part) @ E.T).amax(-1).clamp(1) for part in ids.split(512)])


@pytest.fixture(scope="module")
def shipped():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "sense_peaks", some_peaks)
        patch.setattr(lab.edit, "sense_peaks", some_peaks)
        yield sample.open_run(RUN, "cpu")


@pytest.fixture(scope="module")
def built(shipped, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page.page(shipped))
    return file


def part(html, id):
    return html.split(f'id="{id}">')[1].split("</script>")[0]


def test_it_is_one_file_of_bounded_size_that_asks_for_nothing(built):
    html = built.read_text()
    assert built.stat().st_size < page.LIMIT and json.loads(part(html, "data"))["tour"]
    code = re.sub(
        r'<script type="(application/json|text/plain)" id="(data|weights|peaks)">.*', "", html
    )
    assert not re.search(r"https?://|<link|src=|@import|url\(|fetch|innerHTML|eval\(", code)
    assert len(part(html, "engine").split("\n")) < 300
    assert len(code.split("\n")) - len(part(html, "engine").split("\n")) < 580


def in_node(html, cases, folder):
    """What the scripts of a page say of cases; see CHECK."""
    if not shutil.which("node"):
        pytest.skip("no node on this machine")
    (folder / "check.js").write_text(CHECK)
    (folder / "cases.json").write_text(json.dumps(cases))
    files = [str(html), str(folder / "cases.json"), str(folder / "found.json")]
    subprocess.run(["node", str(folder / "check.js"), *files], check=True, timeout=200)
    return json.loads((folder / "found.json").read_text())


def cases_of(model, tokenizer, strings, edits, n):
    """n texts of random lengths, each with one of edits, and the model's logits after them."""
    rng, texts, want = np.random.default_rng(0), [], []
    compiled = [make_edits(model, tokenizer, parse(text)) for text in edits]
    for i in range(n):
        size = int(np.exp(rng.uniform(0, np.log(min(model.config.block_size, 120)))))
        words = tokenizer.encode(strings[-1 - i % len(strings)] * 20)[:size]
        ids = rng.integers(model.config.vocab_size, size=size) if i % 2 else words
        texts.append({"ids": ids.tolist(), "edits": parse(edits[i % len(edits)])})
        model.edits = compiled[i % len(edits)]
        want.append(model(torch.from_numpy(ids)[None])[0][0, -1])
    model.edits = None
    return texts, want


def assert_same(model, tokenizer, found, cases, want):
    strings = cases["strings"]
    assert found["ids"] == [tokenizer.encode(text).tolist() for text in strings]
    assert found["decoded"] == strings
    worst = max((torch.tensor(a) - b).abs().max().item() for a, b in zip(found["logits"], want))
    assert worst < 1e-3
    for ids, greedy in zip(cases["prompts"], found["greedy"]):
        want = model.generate(torch.tensor([ids]), cases["length"], temperature=0)[0, len(ids) :]
        same = next((n for n, (a, b) in enumerate(zip(greedy, want)) if a != b), None)
        if same is not None:  # only where the two likeliest tokens are as good as equal
            window = torch.tensor([*ids, *greedy[:same]])[None]
            assert window.size(1) <= model.config.block_size
            assert -model(window)[0][0, -1].topk(2).values.diff() < 2e-3


@torch.no_grad()
def test_the_engine_is_the_model(shipped, built, tmp_path):
    """Logits, tokens, greedy continuations, who says a word, and the first picture."""
    model, tokenizer, rng = shipped.model, shipped.tokenizer, np.random.default_rng(0)
    strings = ["".join(rng.choice(ODD, size=rng.integers(1, 30))) for _ in range(1000)]
    strings += [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) + "." for _ in range(1000)]
    texts, want = cases_of(model, tokenizer, strings, EDITS, int(os.environ.get("PAGE_TEXTS", 35)))
    prompts = [tokenizer.encode(text).tolist() for text in ("The river is", "He was born in", "\n")]
    cases = {"strings": strings, "texts": texts, "prompts": prompts, "length": 25, "who": "river"}
    found = in_node(built, cases, tmp_path)
    assert_same(model, tokenizer, found, cases, want)
    E, ids = model.wte.weight, torch.arange(model.config.vocab_size)
    river = E[word_ids(tokenizer, "river")[0]]
    scores = torch.cat([model.senses(part) @ river for part in ids.split(512)])  # (V,K)
    tokens = [look.token_text(tokenizer, i) for i in ids.tolist()]
    for pair in found["who"]:
        assert abs(scores[tokens.index(pair["token"]), pair["l"]] - pair["score"]) < 1e-3
    first = json.loads(part(built.read_text(), "data"))["first"]["look"]
    for key in ("tokens", "ids", "at", "y", "K", "names", "changed"):
        assert found["look"][key] == first[key], key
    parts = found["look"]["parts"]
    assert np.allclose([parts[str(i)] for i in range(len(parts))], first["parts"], atol=1e-3)
    assert [x["token"] for x in found["look"]["before"]] == [x["token"] for x in first["before"]]


@torch.no_grad()
def test_the_engine_is_any_model(tmp_path):
    """Characters, no biases, n_qk of its own kind, padded rows, edits from the start, a full window."""
    torch.manual_seed(0)
    chars = "".join(map(chr, range(32, 97)))  # 65 of them
    sizes = {
        "block_size": 8,
        "vocab_size": 65,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_sense": 4,
    }
    model = Backpack(BackpackConfig(**sizes, bias=False, init_std=0.3, sense_mlp_ratio=2)).eval()
    for p in model.parameters():
        p.copy_(p.half())
    tokenizer = load_tokenizer({"kind": "char", "chars": chars})
    edits = ["", "swap A: B -> C; scale D 1 0.5", "topic A,B 2; replace A 1 by B 2"]
    r = SimpleNamespace(model=model, tokenizer=tokenizer, path="tiny", ckpt={"step": 0})
    r.device, r.edits = torch.device("cpu"), parse(edits[1])
    model.edits = make_edits(model, tokenizer, r.edits)
    (tmp_path / "page.html").write_text(page.page(r, text="A BAD CAB"[:8]))
    strings = ["A BAD CAB", "D", "ABC DEF"]
    texts, want = cases_of(model, tokenizer, strings, edits, 30)
    prompts = [tokenizer.encode(text).tolist() for text in ("A", "ABCDEFGH")]
    cases = {"strings": strings, "texts": texts, "prompts": prompts, "length": 30, "who": "A"}
    assert_same(model, tokenizer, in_node(tmp_path / "page.html", cases, tmp_path), cases, want)


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, built):
    """opened(width, fragment) -> the page, whose errors fail the test."""
    problems, contexts = [], []

    def call(width=1280, fragment="", **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        view = context.new_page()
        view.on("console", lambda message: problems.append(message.text))
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on(
            "request",
            lambda request: (
                problems.append(request.url) if request.url.startswith("http") else None
            ),
        )
        view.goto(f"{built.as_uri()}{fragment}")
        return view

    yield call
    for context in contexts:
        context.close()
    assert problems == []


def ready(view):
    view.wait_for_function("document.getElementById('ready').textContent.startsWith('Ready')")
    return view


def numbers(text):
    return [float(x.replace("\u2212", "-")) for x in re.findall(r"[-+\u2212]\d+\.\d+", text)]


def test_the_first_picture_stands_there_before_the_model(opened):
    view = opened()
    view.wait_for_selector("#parts td")
    before = view.inner_text("#before"), view.inner_text("#sum"), view.inner_text("#parts")
    ready(view)
    view.evaluate("update()")  # the engine draws the same
    view.wait_for_timeout(500)
    assert before[:2] == (view.inner_text("#before"), view.inner_text("#sum"))
    assert np.allclose(numbers(before[2]), numbers(view.inner_text("#parts")), atol=0.011)


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_the_guided_minute(opened, width, scheme):
    view = ready(opened(width, color_scheme=scheme))
    tour = json.loads((ROOT / "lab/tour.json").read_text())
    old, new = tour["edit"]["from"], tour["edit"]["to"]
    for step in range(1, 6):
        view.click("#tour button.main")
        view.wait_for_function(
            f"document.querySelector('#tour b').textContent === 'Step {step} of 5'"
        )
        if step == 4:
            view.wait_for_function("document.getElementById('generate').textContent !== 'Stop'")
            plain, changed = view.inner_text("#plain"), view.inner_text("#changed")
            assert plain.startswith(f"{tour['text']} {old}") and changed.startswith(
                f"{tour['text']} {new}"
            )
    view.wait_for_selector("#tour-list li:last-child")
    lines = view.inner_text("#tour-list").split("\n")
    assert sum("unchanged" in line for line in lines) == len(tour["without"])
    assert sum(f"{old} " in line for line in lines) >= len(tour["others"]) >= 10
    # what the table shows adds up to what is said above it
    cells = [
        numbers(cell)
        for cell in view.locator("#parts tr:not(:last-child) td:not(.sum)").all_inner_texts()
    ]
    total = sum(round(100 * cell[0]) for cell in cells if cell)
    assert total == round(100 * numbers(view.inner_text("#sum"))[0])
    wide = "e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1"
    assert view.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).length") == 0


def test_a_state_is_a_link_a_command_and_a_file(opened, tmp_path):
    view = ready(opened())
    view.fill("#text", 'He said "5$"; she was born in Denver,')
    for kind, values in (("scale", ["Denver", "all", "0.5"]), ("swap", ["born", "in", "at"])):
        view.select_option("#kind", kind)
        for box, value in zip(view.locator("#add input").all(), values):
            box.fill(value)
        view.click("#add button")
        view.wait_for_function(f"document.getElementById('edits').textContent.includes('{kind} ')")
    view.evaluate("navigator.clipboard.writeText = text => { window.copied = text; }")
    view.click("#copy-command")
    view.wait_for_function("window.copied")
    python, script, *args = shlex.split(view.evaluate("copied"))
    values, _ = configure(sample.Settings, args)
    assert (python, script) == ("python", "sample.py") and values.start == view.input_value("#text")
    view.click("#copy-json")
    view.wait_for_function("window.copied.startsWith('[')")
    assert (
        json.loads(view.evaluate("copied")) == parse(values.edit) and len(parse(values.edit)) == 2
    )
    view.evaluate("navigator.clipboard.writeText = text => { window.copied = text; }")
    view.click("#copy-link")
    view.wait_for_function("window.copied.startsWith('file:')")
    again = ready(opened(fragment="#" + view.evaluate("copied").partition("#")[2]))
    again.wait_for_function("document.getElementById('after').children.length > 0")
    assert again.inner_text("#edits") == view.inner_text("#edits")
    assert again.inner_text("#after") == view.inner_text("#after")
    drop = """list => { const data = new DataTransfer(); data.items.add(new File([list], "e.json"));
      document.dispatchEvent(new DragEvent("drop", {dataTransfer: data})); }"""
    again.evaluate(drop, '[{"edit": "topic", "words": "music", "strength": 2}]')
    again.wait_for_function(
        "document.getElementById('edits').textContent.startsWith('topic music 2')"
    )
    for bad, said in (
        ("{", "is not a file of edits"),
        ('[{"edit": "swap", "word": "x"}]', "lacks its from"),
        ('[{"edit": "scale", "word": "notawordatall", "sense": 1, "factor": 1}]', "tokens here"),
    ):
        again.evaluate(drop, bad)
        again.wait_for_function(
            f"document.getElementById('error').textContent.includes({json.dumps(said)})"
        )


def test_words_and_the_keyboard(opened):
    """A word with markup in it is a word; a number is told by the keyboard, too."""
    view = ready(opened())
    view.fill("#words", "<script>alert(1)</script>, river")
    view.wait_for_function("document.querySelectorAll('#senses .card').length === 32")
    assert "<script>alert(1)</script>" in view.inner_text("#senses")
    view.fill("#who", "Canada")
    view.press("#who", "Enter")
    view.wait_for_selector("#sayers .bar")
    assert "Canada" in view.inner_text("#sayers")
    view.locator("#parts td[tabindex]").nth(3).focus()
    view.wait_for_function("document.getElementById('says').textContent.includes('It says:')")
    view.locator("#parts td[tabindex]").nth(70).click()
    view.locator("#says button").click()
    view.wait_for_selector("#edits input[type=range]")
    assert re.search(r"scale \S+ \d+ 1", view.inner_text("#edits"))
    view.locator("#before button").nth(1).focus()
    view.keyboard.press("Enter")
    view.wait_for_selector("#before button.on >> nth=0")
    assert view.evaluate("document.activeElement.classList.contains('bar')")
