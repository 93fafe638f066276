"""The page of lab.look --html: its engine against model.py in Node, its views in three browsers."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from browsers import Firefox, WebKit
from conftest import ROOT
from test_control import tiny

import lab.page
import model as model_file
import sample
from configurator import configure
from lab import senses
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
const lab = new Function(code + "; return {methods, says, engine: () => engine};")();
(async () => {
  const data = JSON.parse(script("data"));
  const packed = ["weights", "peaks", "inverse"].map(id => script(id).trim());
  const isSame = await lab.methods.load(data, ...packed);
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
  const said = lab.says(engine.sense(texts[0].ids[0], 0), 10);
  fs.writeFileSync(found, JSON.stringify({isSame, ids, decoded, greedy, logits, said}));
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

    assert found["isSame"]
    ids = [r.tokenizer.encode(text).tolist() for text in strings]
    assert found["ids"] == ids
    assert found["decoded"] == [r.tokenizer.decode(each) for each in ids]
    for have, want in zip(found["logits"], logits):
        assert torch.allclose(torch.tensor(have), want, atol=1e-3)
    C = r.base.senses(torch.tensor(texts[0]["ids"][:1]))[0]  # (K,D)
    shown = senses.readable_tokens(r.tokenizer, r.base.config.vocab_size)
    high, _ = senses.says(r.base, C, 10, shown)  # (K,n)
    assert [said["id"] for said in found["said"]["high"]] == high.indices[0].tolist()
    alike = senses.coherence(r.base, r.tokenizer, high.indices)  # (K,)
    assert found["said"]["alike"] == pytest.approx(alike[0].item(), abs=1e-5)
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
    """opened(path, width, height, fragment) -> the page; what it reports or asks of a network is a failure.

    first: a script that runs before the page's own.
    """
    problems = []

    def call(path, width=1280, height=900, fragment="", first="", **options):
        view = chromium.new_page(viewport={"width": width, "height": height}, **options)
        view.set_default_timeout(120_000)  # ms, for slow machines
        view.add_init_script(first)
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


IN_VIEW = """places => {
  const guide = document.getElementById("tour").getBoundingClientRect();
  const isInView = place => {
    const box = document.querySelector(place).getBoundingClientRect();
    const top = place.startsWith("#tour ") ? 0 : guide.bottom;
    return box.left >= 0 && box.right <= innerWidth && box.top >= top && box.bottom <= innerHeight;
  };
  return places.every(isInView);
}"""
SUBJECTS = [  # of each step of the guide, what it talks about
    ["#before"],
    ["#sum", "#stack-rows"],
    ["#before", "#after"],
    ["#plain", "#changed"],
    ["#tour-list li", "#tour-list ul:last-child li"],
]


@pytest.mark.parametrize("width, height, scheme", [(1280, 900, "light"), (390, 844, "dark")])
def test_the_guided_minute(opened, shipped_page, width, height, scheme):
    """The guide is true; its text, its button and what it talks about are in view in each step."""
    view = opened(shipped_page, width, height, color_scheme=scheme, reduced_motion="reduce")
    # the first picture is there before the model, and the engine draws the same
    view.wait_for_selector("#parts td")
    first = {id: view.inner_text(f"#{id}") for id in ("before", "sum", "parts")}
    wait_for(view, "ready", "Ready")
    view.evaluate("update()")
    view.wait_for_timeout(500)
    assert first["before"] == view.inner_text("#before") and first["sum"] == view.inner_text("#sum")
    assert np.allclose(numbers(first["parts"]), numbers(view.inner_text("#parts")), atol=0.011)

    # in print there is no heading of nothing
    view.emulate_media(media="print")
    headings = view.locator("h2:visible, h3:visible").all_inner_texts()
    assert headings == ["Text", "Next token", view.inner_text("#sum")]
    view.emulate_media(media="screen")

    tour = json.loads((ROOT / "lab/tour.json").read_text())
    old = tour["edit"]["from"]
    new = tour["edit"]["to"]
    view.focus("#tour button.main")
    for step, places in enumerate(SUBJECTS, 1):
        view.keyboard.press("Enter")
        wait_for(view, "tour", f"Step {step} of 5")
        if step == 4:
            wait_for(view, "plain", f"{tour['text']} {old}")
            wait_for(view, "changed", f"{tour['text']} {new}")
        if step == 5:
            view.wait_for_selector("#tour-list li")
        assert view.evaluate("document.activeElement.className") == "main"
        view.wait_for_function(IN_VIEW, arg=["#tour p", "#tour button.main", *places])
    lines = view.inner_text("#tour-list").split("\n")
    assert sum("unchanged" in line for line in lines) == len(tour["without"])
    assert sum(f"{old} " in line for line in lines) >= len(tour["others"]) >= 10
    # what the table shows adds up to what is said above it
    cells = view.locator("#parts tr:not(:last-child) td:not(.sum)").all_inner_texts()
    assert len(cells) == 96
    total = sum(round(100 * number) for cell in cells for number in numbers(cell))
    assert total == round(100 * numbers(view.inner_text("#sum"))[0])
    darkest = view.locator("#parts td[aria-label^='sense 13 of \u00b7Denver']").bounding_box()
    assert darkest["x"] >= 0 and darkest["x"] + darkest["width"] <= width
    assert view.is_visible("#try")  # the switch of the guide's change, which is for its text
    view.click("#tour >> text=End")
    assert view.evaluate("getComputedStyle(document.getElementById('tour')).position") == "static"
    wide = "e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1"
    assert view.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).length") == 0
    view.fill("#text", "He was born in Denver, but his family moved to Boston, where he went to school and")
    view.wait_for_function("document.querySelectorAll('.stack-row').length === 14")
    assert not view.is_visible("#try")
    assert_rows_add_up(view)
    for n in (3, 0):  # a logit less a larger one
        view.locator("#before button").nth(n).click()
        view.wait_for_selector(f"#before button:nth-of-type({n + 1})[aria-pressed=true]")
    wait_for(view, "sum", "less that of")
    assert_rows_add_up(view)
    assert numbers(view.inner_text("#sum"))[0] < 0


def assert_rows_add_up(view):
    """In the picture of a logit each row begins where the one above it ended; the last one is their sum."""
    view.wait_for_timeout(1000)  # it moves
    rows = view.locator(".stack-row").all()
    assert "others" in rows[0].inner_text()
    shown = [numbers(row.locator("> :last-child").inner_text())[0] for row in rows]
    assert round(100 * sum(shown[:-1])) == round(100 * shown[-1])
    assert shown[-1] == numbers(view.inner_text("#sum"))[0]
    side = np.sign(shown[-1])
    edges = """row => [...row.querySelectorAll('.part, .total')].map(part => {
      const {left, right} = part.getBoundingClientRect();
      return [left, right, part.classList.contains('against')];
    })"""
    end = zero = rows[0].locator(".zero").bounding_box()["x"]
    for row in rows[:-1]:
        parts = [
            sorted((side * left, side * right)) + [against] for left, right, against in row.evaluate(edges)
        ]
        assert abs(min(near for near, _, against in parts if not against) - side * end) < 1.5
        end += side * sum(near - far if against else far - near for near, far, against in parts)
    ((left, right, _),) = rows[-1].evaluate(edges)
    assert sorted((zero, end)) == pytest.approx([left, right], abs=1.5)


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
    for kind, start in (("command", "python"), ("json", "["), ("link", "#")):
        view.click(f"#copy-{kind}")
        view.wait_for_function(f"window.copied?.startsWith('{start}')")
        copied[kind] = view.evaluate("copied")
    python, name, *args = shlex.split(copied["command"])
    values, _ = configure(sample.Settings, args)
    assert (python, name, values.start) == ("python", "sample.py", text)
    assert json.loads(copied["json"]) == parse(values.edit) and len(parse(values.edit)) == 4

    assert "the address of this page" in view.inner_text("#copied")

    again = opened(small_page, fragment=copied["link"])
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


BROKEN = [  # fragments that are no state of the page
    "undefined",
    "%",
    "null",
    '{"text": 1, "edits": []}',
    '{"text": "A"}',
    '{"text": "A", "edits": {}}',
    '{"text": "A", "edits": [], "targets": ["constructor"]}',
    '{"text": "A", "edits": [], "targets": [9999]}',
    '{"text": "A", "edits": [], "at": -1}',
]


def test_a_link_of_anybody(opened, small_page):
    """Edits that this model can't do are left out, one by one; what is no state of the page, as a whole."""
    edits = [
        {"edit": "scale", "word": "A", "sense": 1, "factor": 0.5},
        {"edit": "scale", "word": "ABC", "sense": 1, "factor": 1},
        {"edit": "scale", "word": "\u20ac", "sense": 1, "factor": 1},
        {"edit": "scale", "word": "A", "sense": 77, "factor": 1},
        {"edit": "replace", "word": "A", "sense": 1, "vector": [1]},
        {"edit": "swap", "word": "A", "from": {}, "to": "B"},
        {"edit": "constructor"},
        None,
        {"edit": "swap", "word": "A", "from": "B", "to": "C", "margin": 2},
    ]
    state = {"text": "DAB", "edits": edits}
    link = "#" + quote(json.dumps(state))
    without_model = opened(small_page, fragment=link, first="Worker = class { postMessage() {} }")
    assert without_model.input_value("#text") == "DAB"
    assert without_model.locator("#before .bar").count() == 0  # nor those of the first text
    view = opened(small_page, fragment=link)
    wait_for(view, "edits", "swap A: B -> C margin 2")
    wait_for(view, "sum", "with your changes")
    left_out = view.inner_text("#link-error").split("\n")
    for line, said in zip(
        left_out,
        (
            "scale ABC 1 1 of this link is left out: ABC is 3 tokens here",
            "the character \u20ac is not in",
            "expected 0 to 3",
            "replace A 1 by a vector of this link is left out: a vector of 1 numbers: expected 16",
            "An edit of this link is left out: from is {}, expected text",
            'expected an "edit" that is one of scale, swap',
            'expected an "edit" that is one of scale, swap',
        ),
        strict=True,
    ):
        assert said in line
    assert view.locator("#edits .edit").count() == 2
    assert view.locator("#tokens button").all_inner_texts() == ["D", "A", "B"]
    assert view.locator("#before .bar").count() == 8

    for fragment in BROKEN:
        view.evaluate("document.getElementById('link-error').replaceChildren()")
        # as the page does when it has been changed
        view.evaluate(
            "fragment => { location.hash = fragment; history.replaceState(null, '', '#'); }", fragment
        )
        wait_for(view, "link-error", "is broken, or was cut")
        assert view.locator("#edits .edit").count() == 2
        assert "undefined" not in view.inner_text("main")
    # a text with a character that isn't in the vocabulary: no other text's bars
    state = {"text": "A\u20ac", "edits": []}
    view.evaluate("state => { location.hash = encodeURIComponent(JSON.stringify(state)); }", state)
    wait_for(view, "text-error", "is not in this vocabulary")
    assert view.locator("#before .bar, #parts td, #tokens button").count() == 0
    view.fill("#text", "A")
    view.wait_for_selector("#before .bar")
    assert view.inner_text("#text-error") == ""


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


def test_the_network_of_a_fork_is_not_taken_for_this_one(opened, small, tmp_path, monkeypatch):
    """The engine knows nothing of a gate on alpha: the page stays with what Python computed, and says so."""
    own = model_file.contextualize
    monkeypatch.setattr(model_file, "contextualize", lambda q, k: 0.5 * own(q, k))
    path = tmp_path / "page.html"
    path.write_text(lab.page.make_page(small, text="A BAD CAB"), encoding="utf-8")
    state = quote(json.dumps({"text": "CAB", "edits": []}))
    for fragment in ("", f"#{state}"):
        view = opened(path, fragment=fragment)
        wait_for(view, "ready", "another network")
        assert view.is_disabled("#text") and view.input_value("#text") == "A BAD CAB"
        assert view.locator("#before .bar").count() == 8


def test_a_sum_that_is_not_the_logit_is_not_called_exact(opened, small, tmp_path):
    """As of a model with more to it than lab/senses.py adds up."""
    html = lab.page.make_page(small, text="A BAD CAB")
    data = json.loads(script(html, "data"))
    data["first"]["look"]["logit"] += 1
    html = html.replace(script(html, "data"), json.dumps(data).replace("<", "\\u003c"))
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    assert "not the sum of these parts" in opened(path).inner_text("#sum")
    r = SimpleNamespace(**vars(small))
    r.model = copy.copy(r.model)
    r.model.logits = lambda o: r.base.logits(o) + 1
    path.write_text(lab.page.make_table_page(r, ["A"], "A BAD CAB", "a reason"), encoding="utf-8")
    view = opened(path)
    assert "is NOT the sum" in view.inner_text("#why") and "tables only: a reason" in view.inner_text("main")


def test_a_text_from_right_to_left(opened, small, tmp_path):
    """Its tokens stand in its order, and a name among English words keeps its own.

    The weights of this model are rounded in the page, which is no other network.
    """
    r = SimpleNamespace(**vars(small))
    r.base = tiny(torch.float32, vocab_size=27)
    r.tokenizer = load_tokenizer({"kind": "char", "chars": "".join(map(chr, range(0x5D0, 0x5EB)))})
    r.edits = parse("swap \u05d0: \u05d1 -> \u05d2")
    r.model = EditedBackpack(r.base, make_edits(r.base, r.tokenizer, r.edits))
    path = tmp_path / "page.html"
    path.write_text(lab.page.make_page(r, text="\u05d0\u05d1\u05d2"), encoding="utf-8")
    view = opened(path)
    x = [button.bounding_box()["x"] for button in view.locator("#tokens button").all()]
    assert x[0] > x[1] > x[2]
    assert view.locator("#sum bdi").inner_text() in r.tokenizer.spec["chars"]
    wait_for(view, "ready", "Ready")


class Renamed(torch.nn.LayerNorm):
    pass


def other_class(base):
    base.ln_f = Renamed(base.config.n_embd, bias=False)


def other_tensor(base):
    base.gate = torch.nn.Parameter(torch.zeros(4))


def missing_tensor(base):
    base.ln_f = torch.nn.LayerNorm(base.config.n_embd, elementwise_affine=False)


@pytest.mark.parametrize(
    "change, name", [(other_class, "Renamed"), (other_tensor, "gate"), (missing_tensor, "ln_f.weight")]
)
def test_a_network_that_the_engine_does_not_know_gets_tables(small, change, name):
    fork = SimpleNamespace(**vars(small))
    fork.base = copy.deepcopy(small.base)
    change(fork.base)
    html = lab.page.make_page(fork, ["A"])
    assert f"doesn't know all of this network: {name}" in json.loads(script(html, "data"))["why"]
    assert lab.page.why_tables(small) == ""


# ---- other engines


@torch.no_grad()
@pytest.mark.parametrize("browser", [Firefox, WebKit])
def test_in_other_browsers(shipped, shipped_page, browser):
    """Opened from disk the page shows what Python computes, before and after an edit."""
    tour = json.loads((ROOT / "lab/tour.json").read_text())
    before, after = lab.page.next_under(shipped, tour["text"], tour["edit"])
    bars = "Array.from(document.querySelectorAll('#{} .bar'), bar => bar.textContent)"
    with browser() as view:
        view.open(shipped_page.as_uri())
        view.wait_for("document.getElementById('ready').textContent.includes('Ready')")
        first = view.run(f"return {bars.format('before')}")
        view.run(f"addEdits([{json.dumps(tour['edit'])}])")
        view.wait_for("document.querySelectorAll('#after .bar').length")
        shown = [(first, before), (view.run(f"return {bars.format('before')}"), before)]
        shown.append((view.run(f"return {bars.format('after')}"), after))
    for bars, p in shown:
        assert len(bars) == 8
        for bar, likely in zip(bars, lab.page.likeliest(shipped, p, 8)):
            token, percent = re.fullmatch(r"(.*?)([\d.]+)%", bar).groups()
            assert token == likely["token"]
            assert float(percent) == pytest.approx(100 * likely["p"], abs=0.51)
