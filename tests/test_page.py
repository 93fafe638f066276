"""The page of lab.look --html: its engine against model.py in Node, and its views in a headless Chromium."""

import json
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_control import tiny

import lab.page
import sample
from configurator import configure
from lab.control import EditedBackpack
from lab.edits import make_edits, parse
from lab.run import open_run
from tokenizer import learn_bpe, load_tokenizer

EDITS = [  # no topics, whose weights take half a minute for 16,384 tokens
    "",
    "swap Denver: Colorado -> Texas; swap the: river -> sea margin 1",
    "paper_swap Denver: Colorado -> Texas; swap in: river -> sea",
    "scale the 3 0; scale of all 0.5; scale in 2 2.5",
    "scale in 1 0.3; swap the: of -> in; scale the 4 2; replace in 1 by the 2; replace The 0 by of 1",
]
ODD = list("abcXYZ éü ñ\n\t  '’s.,!?😀👩‍👩‍👧日本語0123½Ⅷ\u0301\u00a0\u3000\ufeff\u0085\u2028ß")
WORDS = "the of in river music Denver was born and sea city people".split()

IN_NODE = """
const fs = require("fs");
const [html, cases, found] = process.argv.slice(2);
const page = fs.readFileSync(html, "utf8");
const script = id => page.split(`id="${id}">`)[1].split("</script>")[0];
const code = script("engine") + script("worker");
const lab = new Function(code + "; return {methods, engine: () => engine};")();
(async () => {
  const data = JSON.parse(script("data"));
  await lab.methods.load(data, ...["weights", "peaks", "inverse"].map(id => script(id).trim()));
  const engine = lab.engine();
  const {strings, texts, prompts} = JSON.parse(fs.readFileSync(cases));
  const ids = strings.map(text => engine.tokenizer.encode(text));
  const decoded = ids.map(ids => engine.tokenizer.decode(ids));
  const greedy = prompts.map(ids => [...ids, ...engine.generate(ids, 20, null)]);
  const logits = [];
  for (const {ids, edits} of texts) {
    const o = engine.output(engine.read(ids), ids.length - 1, await engine.compile(edits));
    logits.push(Array.from(engine.logits(o)));
  }
  fs.writeFileSync(found, JSON.stringify({ids, decoded, greedy, logits}));
})();
"""


def script(html, id):
    return html.split(f'id="{id}">')[1].split("</script>")[0]


@pytest.fixture(scope="module")
def shipped():
    return open_run(ROOT / "pretrained/simplewiki", "cpu")


@pytest.fixture(scope="module")
def shipped_page(shipped, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.page, "sense_peaks", lambda *_: torch.ones(1))  # only topics need them
        path.write_text(lab.page.make_page(shipped), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small():
    """A run of another shape: characters, no biases, n_qk of its own, padded rows; and with edits."""
    r = SimpleNamespace(path="small", ckpt={"step": 0}, device=torch.device("cpu"))
    others = {"vocab_size": 66, "n_qk": 6, "bias": False, "sense_mlp_ratio": 2, "sense_out_ratio": 3}
    r.base = tiny(torch.float16, **others).float()  # the page has these very numbers
    r.tokenizer = load_tokenizer({"kind": "char", "chars": "\n" + "".join(map(chr, range(32, 97)))})
    r.edits = parse("swap A: B -> C; scale D 1 0.5")
    r.model = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, r.edits))
    return r


@pytest.fixture(scope="module")
def small_page(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(lab.page.make_page(small, text="A BAD CAB"), encoding="utf-8")
    return path


# ---- the engine


def assert_engine_is_model(r, html, folder, strings, edits, prompts):
    """The engine of a page says what the model says, also of texts under each of edits."""
    if not shutil.which("node"):
        pytest.skip("no node on this machine")
    rng = np.random.default_rng(0)
    texts = []
    logits = []
    for i in range(12):
        listed = parse(edits[i % len(edits)])
        model = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, listed))
        size = rng.integers(1, min(r.base.config.block_size, 40) + 1)
        ids = r.tokenizer.encode(strings[-1 - i] * 20)[:size]
        if i % 5 == 0:
            ids = rng.integers(r.base.config.vocab_size, size=size)
        texts.append({"ids": ids.tolist(), "edits": listed})
        logits.append(model(torch.tensor(ids)[None])[0][0, -1])
    prompts = [r.tokenizer.encode(prompt).tolist() for prompt in prompts]
    (folder / "node.js").write_text(IN_NODE)
    (folder / "cases.json").write_text(json.dumps({"strings": strings, "texts": texts, "prompts": prompts}))
    files = ["node.js", html, "cases.json", "found.json"]
    subprocess.run(["node", *files], cwd=folder, check=True, timeout=600)
    found = json.loads((folder / "found.json").read_text())

    ids = [r.tokenizer.encode(text).tolist() for text in strings]
    assert found["ids"] == ids
    assert found["decoded"] == [r.tokenizer.decode(each) for each in ids]
    for have, want in zip(found["logits"], logits):
        assert torch.allclose(torch.tensor(have), want, atol=1e-3)
    for prompt, have in zip(prompts, found["greedy"]):
        assert have == r.base.generate(torch.tensor([prompt]), 20, temperature=0)[0].tolist()


@torch.no_grad()
def test_the_engine_is_the_shipped_model(shipped, shipped_page, tmp_path):
    rng = np.random.default_rng(0)
    strings = ["".join(rng.choice(ODD, size=rng.integers(1, 30))) for _ in range(1000)]
    strings += [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) + "." for _ in range(100)]
    prompts = ["The river is", "He was born in"]
    assert_engine_is_model(shipped, shipped_page, tmp_path, strings, EDITS, prompts)


@torch.no_grad()
def test_the_engine_is_any_model(small, small_page, tmp_path):
    """With topics, and with texts that fill the window."""
    edits = ["", "topic A,B 2; replace A 1 by B 2; scale D 1 0.5", "topic C,D 4; swap A: B -> C"]
    edits.append("paper_swap D: B -> C; swap D: A -> B margin 2")
    strings = ["A BAD CAB", "D", "ABC DEF"] * 10
    assert_engine_is_model(small, small_page, tmp_path, strings, edits, ["A", "ABCDEFGHIJKL"])


@torch.no_grad()
def test_the_engine_keeps_marks_with_their_letters(small, tmp_path):
    """Of a vocabulary that was learned here; the shipped one has the words of GPT-2."""
    marked = "किताब كِتَابٌ e\u0301"
    r = SimpleNamespace(**vars(small))
    r.tokenizer = load_tokenizer(learn_bpe([f"{marked} {marked}"] * 3, 280))
    r.base = tiny(torch.float16, vocab_size=280).float()
    r.edits = []
    r.model = r.base
    html = tmp_path / "page.html"
    html.write_text(lab.page.make_page(r, text=marked), encoding="utf-8")
    rng = np.random.default_rng(0)
    strings = ["".join(rng.choice([*marked, *ODD], size=rng.integers(1, 30))) for _ in range(300)]
    assert_engine_is_model(r, html, tmp_path, [*strings, *[marked] * 12], [""], [marked[:3]])


# ---- the views


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
def opened(chromium):
    """opened(path, width, fragment) -> the page; what it reports or asks of a network fails the test."""
    problems = []

    def call(path, width=1280, fragment="", **options):
        view = chromium.new_page(viewport={"width": width, "height": 900}, **options)
        view.on("console", lambda message: problems.append(message.text))
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("request", lambda request: problems.append(request.url))
        view.goto(f"{path.as_uri()}{fragment}")
        return view

    yield call
    assert [problem for problem in problems if not problem.startswith(("file:", "blob:"))] == []


def wait_for(view, id, text):
    """Wait until an element shows a text."""
    view.wait_for_function(f"document.getElementById('{id}').textContent.includes({json.dumps(text)})")


def numbers(text):
    return [float(x.replace("\u2212", "-")) for x in re.findall(r"[-+\u2212]\d+\.\d+", text)]


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_the_guided_minute(opened, shipped_page, width, scheme):
    view = opened(shipped_page, width, color_scheme=scheme)
    # the first picture is there before the model, and the engine draws the same
    view.wait_for_selector("#parts td")
    first = {id: view.inner_text(f"#{id}") for id in ("before", "sum", "parts")}
    wait_for(view, "ready", "Ready")
    view.evaluate("update()")
    view.wait_for_timeout(500)
    assert first["before"] == view.inner_text("#before") and first["sum"] == view.inner_text("#sum")
    assert np.allclose(numbers(first["parts"]), numbers(view.inner_text("#parts")), atol=0.011)

    tour = json.loads((ROOT / "lab/tour.json").read_text())
    old = tour["edit"]["from"]
    new = tour["edit"]["to"]
    for step in range(1, 6):
        view.click("#tour button.main")
        wait_for(view, "tour", f"Step {step} of 5")
        if step == 4:
            wait_for(view, "generate", "Continue the text")
            assert view.inner_text("#plain").startswith(f"{tour['text']} {old}")
            assert view.inner_text("#changed").startswith(f"{tour['text']} {new}")
    view.wait_for_selector("#tour-list li:last-child")
    lines = view.inner_text("#tour-list").split("\n")
    assert sum("unchanged" in line for line in lines) == len(tour["without"])
    assert sum(f"{old} " in line for line in lines) >= len(tour["others"]) >= 10
    # what the table shows adds up to what is said above it
    cells = view.locator("#parts tr:not(:last-child) td:not(.sum)").all_inner_texts()
    assert len(cells) == 96
    total = sum(round(100 * number) for cell in cells for number in numbers(cell))
    assert total == round(100 * numbers(view.inner_text("#sum"))[0])
    wide = "e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1"
    assert view.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).length") == 0
    view.fill("#text", "He was born in Denver, but his family moved to Boston, where he went to school and")
    view.wait_for_function("document.querySelectorAll('.stack-row').length === 14")
    assert_rows_add_up(view)


def assert_rows_add_up(view):
    """In the picture of a logit each row begins where the one above it ended; the last one is their sum."""
    view.wait_for_timeout(1000)  # it moves
    rows = view.locator(".stack-row").all()
    assert "others" in rows[0].inner_text()
    shown = [numbers(row.locator("> :last-child").inner_text())[0] for row in rows]
    assert round(100 * sum(shown[:-1])) == round(100 * shown[-1])
    assert shown[-1] == numbers(view.inner_text("#sum"))[0]
    edges = """row => [...row.querySelectorAll('.part, .total')].map(part => {
      const {left, width} = part.getBoundingClientRect();
      return [left, width, part.classList.contains('against')];
    })"""
    end = rows[0].locator(".zero").bounding_box()["x"]
    for row in rows[:-1]:
        parts = row.evaluate(edges)
        assert abs(min(left for left, _, against in parts if not against) - end) < 1.5
        end += sum(-width if against else width for _, width, against in parts)
    ((left, width, _),) = rows[-1].evaluate(edges)
    assert abs((left + width if shown[-1] > 0 else left) - end) < 1.5


def test_a_state_is_a_link_a_command_and_a_file(opened, small_page):
    view = opened(small_page)
    wait_for(view, "ready", "Ready")
    text = 'A "5$"; BAD'
    view.fill("#text", text)
    for kind, values in (("scale", ["B", "all", "0.5"]), ("swap", ["D", "A", "B", "2"])):
        view.select_option("#kind", kind)
        for box, value in zip(view.locator("#add input").all(), values):
            box.fill(value)
        view.click("#add button")
        wait_for(view, "edits", f"{kind} {values[0]}")
    view.evaluate("navigator.clipboard.writeText = text => { window.copied = text; }")
    copied = {}
    for kind, start in (("command", "python"), ("json", "["), ("link", "file:")):
        view.click(f"#copy-{kind}")
        view.wait_for_function(f"window.copied?.startsWith('{start}')")
        copied[kind] = view.evaluate("copied")
    python, name, *args = shlex.split(copied["command"])
    values, _ = configure(sample.Settings, args)
    assert (python, name, values.start) == ("python", "sample.py", text)
    assert json.loads(copied["json"]) == parse(values.edit) and len(parse(values.edit)) == 4

    again = opened(small_page, fragment="#" + copied["link"].partition("#")[2])
    wait_for(again, "ready", "Ready")
    again.wait_for_function("document.getElementById('text').value.includes('5$')")
    wait_for(again, "sum", "with your changes")
    for id in ("edits", "after", "parts"):
        assert again.inner_text(f"#{id}") == view.inner_text(f"#{id}")
    drop = """list => {
      const data = new DataTransfer();
      data.items.add(new File([list], "e.json"));
      document.dispatchEvent(new DragEvent("drop", {dataTransfer: data}));
    }"""
    again.evaluate(drop, '[{"edit": "topic", "words": "A, B", "strength": 2}]')
    wait_for(again, "edits", "topic A,B 2")
    again.evaluate(drop, '[{"edit": "swap", "word": "A", "from": "B", "to": "C"}]')  # from before 2026-12
    wait_for(again, "edits", "paper_swap A: B -> C")
    again.evaluate(drop, '[{"edit": "topic", "words": "A, B", "strength": 2}]')
    wait_for(again, "edits", "topic A,B 2")
    for foreign, said in (
        ("{", "is not a file of edits"),
        ('[{"edit": "swap", "word": "A"}]', "lacks its from"),
        ('[{"edit": "constructor"}]', 'expected an "edit" that is one of scale, swap'),
        ('[{"edit": "topic", "words": ["A"], "strength": 1}]', 'words is ["A"], expected text'),
        ('[{"edit": "topic", "words": "A", "strength": "constructor"}]', "expected 1, 2, 3 or 4"),
        ('[{"edit": "scale", "word": "A", "sense": 1, "factor": 1e999}]', "factor is null, expected"),
        ('[{"edit": "scale", "word": "A", "sense": "1", "factor": 1}]', 'sense is "1", expected the'),
        ('[{"edit": "scale", "word": "\\ud800", "sense": 1, "factor": 1}]', "expected text"),
        ('[{"edit": "scale", "word": "A", "sense": 1, "factor": 999999}]', "too large"),
        ('[{"edit": "replace", "word": "A", "sense": 1, "vector": ["1"]}]', "expected a list of numbers"),
        ('[{"edit": "scale", "word": "ABC", "sense": 1, "factor": 1}]', "tokens here"),
        ('[{"edit": "replace", "word": "A", "sense": 1, "vector": [1]}]', "expected 16"),
    ):
        again.evaluate(drop, foreign)
        wait_for(again, "error", said)
    assert "topic A,B 2" in again.inner_text("#edits")
    for state, said in (
        ({"text": "A", "edits": [{"edit": "constructor"}]}, "one of scale"),
        ({"text": "A", "edits": [{"edit": "swap", "word": "A", "from": {}, "to": "B"}]}, "from is {}"),
        ({"text": 1, "edits": []}, "it has no text"),
        ({"text": "A", "edits": [], "targets": ["constructor"]}, "it has no tokens"),
    ):
        again.evaluate("state => { location.hash = encodeURIComponent(JSON.stringify(state)); }", state)
        wait_for(again, "error", said)
    assert "topic A,B 2" in again.inner_text("#edits")


def test_words_and_the_keyboard(opened, small, small_page):
    """A word with markup in it is a word; a number tells what it is to the keyboard, too."""
    view = opened(small_page)
    wait_for(view, "ready", "Ready")
    view.fill("#words", "<IMG SRC=X>, A")
    view.wait_for_function("document.querySelectorAll('#senses .card').length === 8")
    assert "<IMG SRC=X>: the mean of" in view.inner_text("#senses")
    view.fill("#who", "A")
    view.press("#who", "Enter")
    view.wait_for_selector("#sayers .bar")
    most = (small.base.senses(torch.arange(66)) @ small.base.wte.weight[34]).max()  # 34: A
    assert view.locator("#sayers .bar").first.inner_text().endswith(f"{most:.1f}")
    cells = view.locator("#parts td[tabindex]")
    cells.first.focus()
    view.keyboard.press("ArrowDown")
    wait_for(view, "says", "It says:")
    cells.nth(6).click()
    wait_for(view, "says", "It says:")
    told = view.inner_text("#says")
    cells.nth(9).hover()
    assert view.inner_text("#says") == told  # it stays, so that one can get at its button
    view.locator("#says button").click()
    wait_for(view, "edits", '" " 2 1')
    assert view.locator("#edits input[type=range]").count() == 3  # two factors and the margin of a swap
    view.locator("#before button").nth(1).focus()
    view.keyboard.press("Enter")
    view.wait_for_selector("#before button.on >> nth=0")
    assert view.evaluate("document.activeElement.classList.contains('bar')")


def test_the_network_of_a_fork_is_not_taken_for_this_one(opened, small, tmp_path):
    """The engine knows nothing of a scale on alpha: the page stays with what Python computed, and says so."""

    class Fork(type(small.model)):
        def contextualization(self, idx):
            return 0.5 * super().contextualization(idx)

    fork = SimpleNamespace(**vars(small))
    fork.model = Fork(small.base, small.model.edits)
    path = tmp_path / "page.html"
    path.write_text(lab.page.make_page(fork, text="A BAD CAB"), encoding="utf-8")
    view = opened(path)
    wait_for(view, "ready", "another network")
    assert view.is_disabled("#text")
