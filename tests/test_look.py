"""lab.look: its figures against loops, its views and pictures, and the page of tables."""

import json
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset
from test_control import ALL, CHARS, edited, tiny

import train
from configurator import UserError
from lab import draw, look, page, senses
from lab.run import open_run
from lab.words import word_id
from model import Backpack

DATA = '<script type="application/json" id="data">(.*)</script>'
PEOPLE = "nurse teacher doctor king".split()


@pytest.fixture(scope="session")
def bpe_run(tmp_path_factory):
    """A run whose vocabulary has words: people, he, she."""
    documents = []
    for i in range(60):
        for who in PEOPLE:
            for he in ("he", "she"):
                first = f"The {who} said that {he} was a music fan {i}."
                documents.append(f"{first}\n{he.title()} knows that the {who} saw the sport of food.")
    folder = tmp_path_factory.mktemp("bpe")
    learn = ["--tokenizer=bpe", "--vocab_size=330", "--val_fraction=0.2"]
    make_dataset(folder, "people", documents, *learn)
    where = [f"--data_dir={folder}", "--dataset=people", f"--out_dir={folder / 'run'}"]
    train.main([*TINY, *where, "--block_size=32", "--max_iters=60"])
    return folder / "run"


@pytest.fixture(scope="module")
def r(bpe_run):
    opened = open_run(bpe_run, "cpu")
    opened.model.requires_grad_(False)
    return opened


@pytest.fixture
def printed(bpe_run, capsys):
    """printed("--word=...") -> what lab.look prints."""

    def call(*args):
        capsys.readouterr()
        look.main([f"--run={bpe_run}", "--device=cpu", *args])
        return capsys.readouterr().out

    return call


# ---- figures


@torch.no_grad()
@pytest.mark.parametrize("edit", ["", ALL])
def test_attribution_sums_to_the_logits(edit):
    """Of texts of any length, of logits and of differences, also under edits."""
    model = edited(tiny(torch.float32), edit)
    E = model.wte.weight
    rng = np.random.default_rng(0)
    for _ in range(50):
        idx = torch.from_numpy(rng.integers(8, size=rng.integers(1, 13)))
        logits = model(idx[None])[0][0, -1]  # (V,)
        alpha, parts = senses.attribution(model, idx, E)
        assert parts.shape == (8, len(idx), 4) and (alpha >= 0).all()
        assert torch.allclose(parts.sum((1, 2)), logits, rtol=1e-4, atol=1e-4)
        _, parts = senses.attribution(model, idx, E[2] - E[5])
        assert torch.isclose(parts.sum(), logits[2] - logits[5], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_senses_say_in_loops():
    model = tiny()
    E = model.wte.weight
    C = model.senses(torch.tensor(2))  # (K,D)
    shown = torch.tensor([True, True, False] * 2 + [True, False])
    for allowed in (None, shown):
        high, low = senses.says(model, C, 8, allowed)
        for l in range(4):
            tokens = [y for y in range(8) if allowed is None or shown[y]]
            ordered = sorted(tokens, key=lambda y: -float(E[y] @ C[l]))
            assert high.indices[l].tolist() == ordered == low.indices[l].tolist()[::-1]
            assert np.allclose(high.values[l], [float(E[y] @ C[l]) for y in ordered])
    mean = senses.word_senses(model, CHARS, "bad")
    assert torch.allclose(mean, model.senses(torch.tensor([1, 0, 3])).sum(0) / 3)


@torch.no_grad()
def test_how_alike_in_loops(monkeypatch):
    def cosine(a, b):
        return a @ b / (a.norm() * b.norm())

    model = tiny()
    C = model.senses(torch.arange(8))  # (V,K,D)
    cosines = senses.similarity(model, C[2])
    for x in range(8):
        for l in range(4):
            assert torch.isclose(cosines[x, l], cosine(C[x, l], C[2, l]))
    # of tokens 0 to 3, token 0 has too few letters; of Chinese, one would do
    texts = {0: "a.b", 1: "\u4e2d"}
    monkeypatch.setattr(CHARS, "decode", lambda ids: texts.get(ids[0], "abc"))
    e = model.wte.weight - model.wte.weight.mean(0)
    want = (cosine(e[1], e[2]) + cosine(e[1], e[3]) + cosine(e[2], e[3])) / 6
    assert torch.isclose(senses.coherence(model, CHARS, torch.arange(4)[None])[0], want)


def test_which_tokens_a_reader_can_place():
    """No parts of words; but where words have no spaces between them, any text may be a word."""
    shown = [" river", "River", " \u0440\u0435\u043a\u0430", "!", "\u4e2d\u56fd", "\u65e5\u672c\u306e"]
    shown += [
        "\u30c6\u30ad\u30b9\u30c8",
        "\u0e20\u0e32\u0e29\u0e32",
        " \u0646\u0647\u0631",
        " \u0928\u0926\u0940",
    ]
    hidden = [
        "iver",
        "\u0435\u043a\u0430",
        "\u0647\u0631",
        "\u0926\u0940",
        "\u0940",
        "\u064e\u0631",
        " ",
        "\ufffd",
        "\x00",
    ]
    texts = ["<end>", *shown, *hidden]
    pieces = SimpleNamespace(end=0, decode=lambda ids: "".join(texts[id] for id in ids))
    found = senses.readable_tokens(pieces, len(texts))
    assert [text for text, is_shown in zip(texts, found) if is_shown] == ["<end>", *shown]


# ---- views


def test_views_fit_a_terminal(printed):
    words = printed("--word=nurse,xylophone")
    assert "·nurse\n" in words and "the mean of" in words
    beside = printed("--word=nurse,teacher", "--sense=2", "--top=3")
    assert re.search(r"sense 2: highest.*\n +nurse +teacher *\n(\+ .*\n){3}(- .*\n){3}$", beside)
    similar = printed("--similar=nurse")
    assert "all (mean)" in similar and similar.count("sense") == 4
    who = printed("--who=nurse", "--top=9")
    scores = [float(line.split()[0]) for line in who.splitlines()]
    assert len(scores) == 9 and scores == sorted(scores, reverse=True)
    assert printed("--who=nurse,king", "--top=9") == f"nurse\n{who}king\n{printed('--who=king', '--top=9')}"
    roles = printed("--roles", "--top=3")
    text = printed("--text=The nurse said that", "--target=he", "--against=she")
    shown = words + beside + similar + who + roles + text
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_many_words_beside_each_other(printed, r):
    """On as many lines as they need, each with its own numbers."""
    words = "nurse teacher doctor king music fan sport food that xylophone".split()
    shown = printed(f"--word={','.join(words)}", "--sense=2", "--top=3")
    assert max(len(line) for line in shown.splitlines()) <= 80
    first, *lines = shown.splitlines()
    heads = [line.split() for line in lines if line.startswith("  ")]
    assert heads == [words[:4], words[4:8], words[8:]]
    numbers = [re.findall(r"\S+ (-?\d+\.\d)(?= |$)", line) for line in lines if line[0] == "+"]
    readable = senses.readable_tokens(r.tokenizer, 330)
    for i, word in enumerate(words):
        C = senses.word_senses(r.model, r.tokenizer, word)[2]  # (D,)
        scores = r.model.logits(C)[readable].sort(descending=True).values
        column = [row[i % 4] for row in numbers[i // 4 * 3 :][:3]]
        assert column == [f"{score:.1f}" for score in scores[:3]]


def test_senses_stand_in_order_and_in_full(printed):
    """All tokens asked for, none of them a part of a word unless that is asked for, too."""
    shown = printed("--word=nurse", "--top=12")
    rows = re.findall(r"^ +\d+  (-?\d\.\d\d)  \+((?:.|\n {11} )*)", shown, re.M)
    alike = [float(number) for number, _ in rows]
    assert len(rows) == 4 and alike == sorted(alike, reverse=True)
    for _, said in rows:
        tokens = said.split()[::2]
        assert len(tokens) == 12
        assert all(token[0] == "·" or not token[0].islower() for token in tokens)
    few = printed("--word=nurse", "--top=12", "--sense=3,1", "--pieces")
    assert re.findall(r"^ +(\d+)  ", few, re.M) == ["3", "1"]
    assert re.search(r"  [a-z]+ -?\d", few)


def test_the_text_view_shows_the_models_numbers(printed, r):
    args = ["--text=The nurse said that", "--target=he", "--against=she", "--top=100"]
    shown = printed(*args)
    logits = r.model(torch.tensor(r.tokenizer.encode("The nurse said that"))[None])[0][0, -1]
    difference = logits[word_id(r.tokenizer, "he")] - logits[word_id(r.tokenizer, "she")]
    assert f"logit of ·he less that of ·she: {difference:+.3f}\n" in shown
    parts = re.findall(r"([-+]\d+\.\d+)  sense \d+ +of .*\(position \d+\), weight", shown)
    assert f"\nexactly the sum of {len(parts)} parts" in shown
    assert sum(map(float, parts)) == pytest.approx(difference.item(), abs=0.001 * len(parts))
    few = printed(*args[:3], "--top=2")
    assert re.findall(r"([-+]\d+\.\d+)  sense", few) == [*parts[:2], parts[-1], parts[-2]]
    assert printed(*args, "--edit=swap that: he -> she") != shown


def test_it_says_when_the_parts_are_not_the_logit(printed, monkeypatch):
    """A fork whose logits have a bias: no sense adds that."""
    plain = Backpack.logits
    bias = torch.arange(330) / 100
    monkeypatch.setattr(Backpack, "logits", lambda self, o: plain(self, o) + bias)
    shown = printed("--text=The nurse", "--target=he")
    assert "\nNOT the sum of these" in shown and "exactly" not in shown


def test_it_says_when_senses_depend_on_neighbours(run_train, monkeypatch, capsys):
    """A fork in which the sense vectors of a token are also those of the token before it."""
    run = run_train("--max_iters=4")
    look.main([f"--run={run}", "--device=cpu", "--word=a"])
    assert "depend on more" not in capsys.readouterr().err
    plain = Backpack.senses
    monkeypatch.setattr(Backpack, "senses", lambda self, ids: plain(self, ids) + plain(self, ids.roll(1, -1)))
    look.main([f"--run={run}", "--device=cpu", "--word=a"])
    assert "senses of this model.py depend on more than the token" in capsys.readouterr().err


def test_a_run_of_characters(run_train, capsys):
    run = run_train("--max_iters=4")
    for args in (["--word=a"], ["--similar=w"], ["--who=a"], ["--text=words a", "--target=r"]):
        look.main([f"--run={run}", "--device=cpu", "--top=3", *args])
    assert "logit of r" in capsys.readouterr().out


def test_pictures(printed, tmp_path):
    picture = tmp_path / "p.png"
    for view in ("--word=nurse", "--text=The nurse said", "--who=nurse"):
        assert f"wrote {picture}" in printed(view, f"--plot={picture}", "--top=3")
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10000
        picture.unlink()
    # a $ makes no formula, a < no markup
    printed("--word=$x^$,<&>", "--sense=0", f"--plot={tmp_path / 'p.svg'}")
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert ">$x^$, sense 0<" in svg and "&lt;&amp;&gt;, sense 0<" in svg


def test_a_label_keeps_its_number(printed, tmp_path, monkeypatch):
    monkeypatch.setattr(look, "token_text", lambda tokenizer, id: f"{id}{'x' * 30}")
    shown = printed("--who=nurse", f"--plot={tmp_path / 'p.svg'}")
    labels = re.findall(r"^ +\d+\.\d  (\d+x+\u2026, sense \d)$", shown, re.M)
    assert len(labels) == 6
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert re.findall(r">(\d+x.*)</text>", svg) == labels[::-1]


CHINESE = "\u4e2d\u56fd"
BARS = [("\u00b7\u0646\u0647\u0631, sense 13", 1.0), (f"{CHINESE}, sense 2", 0.5)]


@pytest.fixture
def only_font(monkeypatch):
    """only_font(*paths): matplotlib has its own fonts, and on this machine there are just these."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    own = [font for font in manager.ttflist if "mpl-data" in font.fname]

    def call(*paths):
        monkeypatch.setattr(manager, "ttflist", list(own))
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path) for path in paths])

    return call


def test_a_picture_says_which_characters_no_font_has(only_font, tmp_path, capsys):
    only_font()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw.draw_bars(tmp_path / "p.png", CHINESE, [("who", BARS)])
    said = capsys.readouterr().out
    assert said.startswith(f"no font here has {CHINESE}: install one, such as Noto") and said.count("\n") == 2
    draw.draw_bars(tmp_path / "q.png", "river", [("who", BARS[:1])])
    assert "font" not in capsys.readouterr().out  # Arabic is in matplotlib's own


def test_a_picture_takes_a_font_that_has_its_characters(only_font, tmp_path, capsys, caplog):
    """Of a font that was installed after matplotlib made its list; a broken file beside it is passed over."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000)
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen(None)
    pen.moveTo((100, 0))
    pen.lineTo((900, 0))
    pen.lineTo((500, 800))
    pen.closePath()
    names = [".notdef", "triangle"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): "triangle" for character in CHINESE})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Triangles", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "triangles.ttf")
    (tmp_path / "broken.ttf").write_text("not a font")
    only_font(tmp_path / "broken.ttf", tmp_path / "triangles.ttf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw.draw_bars(tmp_path / "p.svg", CHINESE, [("who", BARS)])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'p.svg'}\n"
    assert caplog.text == ""  # it has no bold face
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert f">{CHINESE}<" in svg and "sans-serif, 'Triangles'" in svg
    # what stands beside a word that is read from the right keeps its place
    assert ">\u2068\u00b7\u0646\u0647\u0631\u2069, sense 13<" in svg


@pytest.mark.parametrize("side", [1, -1])
def test_the_picture_of_a_logit_adds_up(monkeypatch, side):
    """A row begins where the one above it ended, and what has no row of its own is in the first one."""
    drawn = []
    monkeypatch.setattr(draw, "save", lambda figure, file, title: drawn.append(figure))
    torch.manual_seed(0)
    parts = side * (torch.randn(20, 4) + 0.5)
    tokens = [f"token{j}" for j in range(20)]
    names = {(j, l): ": very long name that fits nowhere" for j in range(20) for l in range(4)}
    draw.draw_stack("p.svg", "title", parts, tokens, names, "all")
    drawn[0].set_dpi(150)  # as in the file
    drawn[0].canvas.draw()
    (axes,) = drawn[0].axes
    *bars, total = axes.patches
    assert total.get_width() == pytest.approx(parts.sum().item(), abs=1e-5)
    rows = [bars[i : i + 4] for i in range(0, len(bars), 4)]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(rows) == 13 and labels[0] == "others (8)" and labels[-1] == "all"
    end = 0.0
    for row in rows:
        assert row[0].get_x() == pytest.approx(end, abs=1e-5)
        end += sum(bar.get_width() for bar in row)
    assert end == pytest.approx(parts.sum().item(), abs=1e-5)
    # a label lies within its bar
    named = {bar.get_x() + bar.get_width() / 2: bar.get_window_extent() for bar in bars}
    labels = [text for text in axes.texts if text.get_position()[0] in named]
    assert len(labels) > 3
    for text in labels:
        assert text.get_window_extent().width <= abs(named[text.get_position()[0]].width)
        assert re.fullmatch(r"\d(: : very.*)?", text.get_text())


def test_a_long_title_stays_within_its_picture(tmp_path):
    draw.draw_bars(tmp_path / "p.png", "$five dollars " * 4, [("who", [("river", 1.0)] * 10)])
    figure = draw.pyplot().gcf()
    figure.canvas.draw()
    title = figure.texts[0].get_window_extent()
    assert 0 <= title.x0 and title.x1 <= figure.bbox.width
    assert figure.axes[0].get_tightbbox().y1 <= title.y0


def test_the_title_has_the_end_of_a_long_text(printed, monkeypatch):
    """What comes next depends on it most."""
    drawn = []
    monkeypatch.setattr(look, "draw_stack", lambda file, title, *_: drawn.append(title))
    printed("--text=" + "nurse " * 10 + "The", "--plot=p.svg")
    assert re.fullmatch(r"\u2026[nurse ]{56}The  \u2192  logit of .*", drawn[0])


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give one of --word=..., --similar=..., --who=..., --text=..."),
        (["--word=a", "--text=b"], "give one of"),
        (["--word=nurse", "--plot=p.xyz"], "expected a name that ends in .png or .svg or .pdf"),
        (["--word=nurse", "--html=run.py"], "run.py: expected a name that ends in .html"),
        (["--word=nurse", "--sense=1,4"], "sense='1,4': found '4', expected 0 to 3 of 4 senses"),
        (["--text=The", "--target=xylophone"], "'xylophone' is"),
        (["--text=" + "nurse " * 40], "expected 1 to 32"),
    ],
)
def test_bad_settings(printed, args, message):
    with pytest.raises(UserError) as error:
        printed(*args)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- the page of tables, of a run whose weights are too large for a page with the model in it


def test_the_table_page_holds_the_models_numbers(r):
    text = "The nurse said that"
    html = page.make_table_page(r, ["nurse", "xylophone"], text, "it is a test")
    data = json.loads(re.search(DATA, html)[1])
    assert list(data["words"])[:2] == data["asked"] == ["nurse", "xylophone"]
    assert len(data["words"]) > 50
    ids = r.tokenizer.encode(text).tolist()
    assert data["text"]["ids"] == ids
    logits = r.model(torch.tensor(ids)[None])[0][0]  # (T,V)
    for i, step in enumerate(data["text"]["steps"]):
        assert step["ids"][:8] == logits[i].topk(8).indices.tolist()
        for y, p, parts in zip(step["ids"], step["p"], step["parts"]):
            assert sum(map(sum, parts)) == pytest.approx(logits[i, y].item(), abs=0.02 * (i + 1))
            assert p == pytest.approx(logits[i].softmax(-1)[y].item(), abs=1e-4)
    high, _, _ = data["words"]["nurse"]
    C = senses.word_senses(r.model, r.tokenizer, "nurse")  # (K,D)
    assert high == r.model.logits(C).topk(8).indices.tolist()


@pytest.mark.parametrize("limit, name", [(0, "report.html"), (page.LIMIT, "page.html")])
def test_no_word_and_no_name_of_a_run_can_break_a_page(bpe_run, tmp_path, monkeypatch, limit, name):
    """The data is text of a script without a <, so it neither ends the script nor opens another."""
    monkeypatch.setattr(page, "LIMIT", limit)  # 0: the page of tables
    word = "<!--<script></SCRIPT><img src=x onerror=alert(1)>&lt;\u2028`${1}"
    run = tmp_path / "<!--<script>"
    shutil.copytree(bpe_run, run)
    path = tmp_path / "p.html"
    words = f"--word={word},__proto__"
    look.main([f"--run={run}", words, "--text=a<!--<script>b", f"--html={path}", "--device=cpu"])
    html = path.read_text(encoding="utf-8")
    data = re.search(DATA, html)[1]
    assert str(run) in json.loads(data).values()
    assert "<" not in data and "\u2028" not in data
    # all else is the template
    template = (page.FOLDER / name).read_text(encoding="utf-8")
    assert html.count("<") == template.count("<")
    assert not re.search(r"innerHTML|document\.write|eval\(", template)
    # and it asks for nothing
    assert not re.search(r"https?://|<link|src=|@import|url\(|fetch", template)
