import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset
from test_edit import ALL, CHARS, edited, tiny

import train
from configurator import UserError
from lab import experiments, page
from lab import look as tool
from lab.page import table_page
from sample import open_run
from tokenizer import load_tokenizer, word_ids

DATA = '<script type="application/json" id="data">(.*)</script>'
PEOPLE = "nurse teacher doctor king".split()


@pytest.fixture(scope="session")
def bpe_run(tmp_path_factory):
    """A run whose vocabulary has words: people, he, she."""
    docs = [
        f"The {who} said that {he} was a music fan {i}.\n"
        f"{he.title()} knows that the {who} saw the sport of food."
        for i in range(60)
        for who in PEOPLE
        for he in ("he", "she")
    ]
    folder = make_dataset(
        tmp_path_factory.mktemp("bpe"),
        "people",
        docs,
        "--tokenizer=bpe",
        "--vocab_size=330",
        "--val_fraction=0.2",
    )
    train.main(
        [
            *TINY,
            f"--data_dir={folder}",
            "--dataset=people",
            f"--out_dir={folder / 'run'}",
            "--block_size=32",
            "--max_iters=60",
        ]
    )
    return folder / "run"


@pytest.fixture
def look(bpe_run, capsys):
    """look("--word=...") -> what it prints."""

    def call(*args):
        capsys.readouterr()
        tool.main([f"--run={bpe_run}", "--device=cpu", *args])
        return capsys.readouterr().out

    return call


@torch.no_grad()
@pytest.mark.parametrize("edit", ["", ALL])
def test_attribution_sums_to_the_logits(edit):
    """In fp32, on 100 random texts of any length, and of differences of logits, also under edits."""
    model, random = edited(tiny(torch.float32), edit), np.random.default_rng(0)
    E = model.wte.weight
    for _ in range(100):
        idx = torch.from_numpy(random.integers(8, size=random.integers(1, 13)))
        logits = model(idx[None])[0][0, -1]
        for y, z in random.integers(8, size=(3, 2)):
            alpha, parts = tool.attribution(model, idx, E[y])
            assert parts.shape == (len(idx), 4) and (alpha >= 0).all()
            assert abs(parts.sum() - logits[y]) < 1e-4 * max(1, abs(logits[y]))
            contrast = tool.attribution(model, idx, E[y] - E[z])[1].sum()
            assert abs(contrast - (logits[y] - logits[z])) < 1e-4 * logits.abs().max()


@torch.no_grad()
def test_what_senses_say_and_what_is_like_them():
    model = tiny()
    C = model.senses(torch.arange(8))
    high, low = tool.says(model, C[2], 8)
    for sense in range(4):
        loud = sorted(
            ((float(model.wte.weight[y] @ C[2, sense]), y) for y in range(8)), reverse=True
        )
        assert (
            high.indices[sense].tolist()
            == [y for _, y in loud]
            == low.indices[sense].tolist()[::-1]
        )
        assert np.allclose(high.values[sense], [v for v, _ in loud])
    cosines = tool.similarity(model, C[2])
    for x in range(8):
        for sense in range(4):
            a, b = C[x, sense], C[2, sense]
            assert abs(cosines[x, sense] - sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5) < 1e-12
    mean = tool.word_senses(model, CHARS, "bad")
    assert torch.allclose(mean, (C[1] + C[0] + C[3]) / 3)
    shown = torch.tensor([True, False] * 4)
    some = tool.says(model, C[2], 8, shown)
    for sense in range(4):  # the same order, without those that are not shown
        want = [y for y in high.indices[sense].tolist() if y % 2 == 0]
        assert some[0].indices[sense].tolist() == want == some[1].indices[sense].tolist()[::-1]
    e = model.wte.weight - model.wte.weight.mean(0)
    names = load_tokenizer({"kind": "char", "chars": "abcdefgh"})
    names.decode = lambda ids: "abc" if ids[0] % 4 else "a."  # tokens 0 and 4 have too few letters
    for sense, found in enumerate(tool.coherence(model, names, high.indices[:, :4])):
        rows = [e[y] for y in high.indices[sense, :4].tolist() if y % 4]
        pairs = [(x, y) for i, x in enumerate(rows) for y in rows[:i]]
        want = sum(x @ y / (x @ x * (y @ y)).sqrt() for x, y in pairs) / 6
        assert torch.isclose(found, torch.as_tensor(want), atol=1e-6)


def test_words_have_a_space_before_them_and_quotes_none(bpe_run):
    tokenizer = open_run(bpe_run).tokenizer
    assert (
        tokenizer.decode(word_ids(tokenizer, "nurse")) == " nurse"
        and len(word_ids(tokenizer, "nurse")) == 1
    )
    assert tokenizer.decode(word_ids(tokenizer, '"nurse"')) == "nurse"
    assert word_ids(CHARS, "a") == [0]


def test_views_fit_a_terminal(look):
    word = look("--word=nurse,xylophone")
    assert (
        "·nurse\n" in word and "the mean of" in word and word.count(" + ") == 8 == word.count(" - ")
    )
    one = look("--word=nurse,teacher", "--sense=2", "--top=3")
    assert "sense 2: highest" in one and re.search(r"nurse +teacher", one)
    near = look("--similar=nurse")
    assert "all (mean)" in near and near.count("sense") == 4
    text = look("--text=The nurse said that", "--target=he", "--against=she")
    assert (
        "logit of ·he less that of ·she" in text and "weights in %" in text and "in tenths" in text
    )
    roles = look("--roles", "--top=3")
    assert len(roles.split("\n")) == 7
    for line in "".join((word, one, near, text, roles)).split("\n"):
        assert len(line) <= 80, line


def test_senses_stand_in_order_and_in_full(look):
    """All tokens asked for, none of them a part of a word unless that is asked for, too."""
    words = look("--word=nurse", "--top=12")
    rows = re.findall(r"^ +(\d+)  (-?\d\.\d\d)  \+((?:.|\n {11} )*)", words, re.M)
    order = [float(alike) for _, alike, _ in rows]
    assert len(rows) == 4 and order == sorted(order, reverse=True)
    for _, _, said in rows:
        tokens = said.split()[::2]
        assert len(tokens) == 12 and all(t[0] == "·" or not t[0].islower() for t in tokens)
    few = look("--word=nurse", "--top=12", "--sense=3,1", "--pieces=True")
    assert re.findall(r"^ +(\d+)  ", few, re.M) == ["3", "1"]
    assert re.search(r"  [a-z]+ -?\d", few)


def test_the_text_view_shows_the_models_numbers(look, bpe_run):
    shown = look("--text=The nurse", "--target=he", "--top=100")
    parts = re.findall(r"sense \d+ +of .*\(position \d+\)", shown)
    assert len(parts) == len(set(parts)) == int(re.search(r"sum of (\d+) parts", shown)[1])
    shown = look("--text=The nurse said that", "--target=he", "--against=she", "--top=2")
    r = open_run(bpe_run, "cpu")
    model, tokenizer = r.model, r.tokenizer
    logits = model(torch.tensor(tokenizer.encode("The nurse said that"))[None])[0][0, -1]
    he, she = (word_ids(tokenizer, word)[0] for word in ("he", "she"))
    assert f"{(logits[he] - logits[she]).item():+.3f}" in shown
    edit = look(
        "--text=The nurse said that",
        "--target=he",
        "--against=she",
        "--top=2",
        "--edit=swap that: he -> she",
    )
    assert edit != shown


def test_pictures(look, tmp_path):
    for args in (
        ["--word=nurse"],
        ["--similar=nurse,king", "--sense=1"],
        ["--text=The nurse said", "--against=she"],
        ["--roles"],
        ["--who=nurse"],
    ):
        assert f"wrote {tmp_path / 'p.png'}" in look(
            *args, f"--plot={tmp_path / 'p.png'}", "--top=3"
        )
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and (
            tmp_path / "p.png"
        ).stat().st_size > 10000
    look("--word=$x^$,<&>", "--sense=0", f"--plot={tmp_path / 'p.svg'}")  # no formula, no markup
    picture = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert ">$x^$, sense 0<" in picture and "&lt;&amp;&gt;, sense 0<" in picture
    before = (tmp_path / "p.svg").read_bytes()
    for name in ("p.svg/a.svg", "p.svg/a.html"):
        key = "html" if name.endswith("html") else "plot"
        with pytest.raises(UserError, match="p.svg is no folder: choose another place"):
            look("--word=nurse", f"--{key}={tmp_path / name}")
    assert (tmp_path / "p.svg").read_bytes() == before


def test_the_table_page_needs_nothing_else_and_holds_the_models_numbers(bpe_run):
    """What a run gets whose weights are too large for a page with the model in it."""
    r = open_run(bpe_run, "cpu")
    html = table_page(r, ["nurse", "xylophone"], "The nurse said that")
    assert not re.search(r"https?://|<link|src=|@import|url\(", html) and len(html) < 5_000_000
    data = json.loads(re.search(DATA, html)[1])
    assert (
        list(data["words"])[:2] == data["asked"] == ["nurse", "xylophone"]
        and len(data["words"]) > 50
    )
    model, tokenizer = r.model, r.tokenizer
    ids = torch.tensor(tokenizer.encode("The nurse said that"))[None]
    assert data["text"]["ids"] == ids[0].tolist() and len(data["text"]["steps"]) == ids.size(1)
    for i, step in enumerate(data["text"]["steps"]):
        logits = model(ids)[0][0, i]
        for y, p, parts in zip(step["ids"], step["p"], step["parts"]):
            assert (
                abs(sum(map(sum, parts)) - logits[y]) < 0.005 * 4 * (i + 1)
                and abs(logits.softmax(-1)[y] - p) < 1e-4
            )
    top, scores, _ = data["words"]["nurse"]
    C = model.senses(torch.tensor(word_ids(tokenizer, "nurse")[0]))
    assert (
        top == model.logits(C).topk(8).indices.tolist()
        and abs(scores[0][0] - model.logits(C)[0].max()) < 0.051
    )


@pytest.mark.parametrize("limit", [0, page.LIMIT])
def test_no_word_and_no_name_of_a_run_can_break_a_page(bpe_run, tmp_path, monkeypatch, limit):
    """The data is text of a script without a <, so it neither ends the script nor opens another."""
    monkeypatch.setattr(page, "LIMIT", limit)  # 0: the page of tables
    word = "<!--<script></SCRIPT><img src=x onerror=alert(1)>&lt;\u2028`${1}"
    run = tmp_path / "<!--<script>"
    shutil.copytree(bpe_run, run)
    args = [f"--run={run}", f"--word={word},__proto__", "--text=a<!--<script>b"]
    tool.main([*args, "--device=cpu", f"--html={tmp_path / 'p'}"])
    made = (tmp_path / "p").read_text(encoding="utf-8")
    found = re.search(DATA, made)[1]
    data = json.loads(found)
    assert "<" not in found and "\u2028" not in found
    template = (page.FOLDER / ("page.html" if limit else "report.html")).read_text(encoding="utf-8")
    made = re.sub(r'id="(weights|peaks)">[\w+/=]+', r'id="\1">', made.replace(found, ""))
    assert made == re.sub(
        r"/\*(DATA\*/null|WEIGHTS\*/|PEAKS\*/)", "", template
    )  # all else is the template
    if limit:
        assert data["about"].startswith(str(run)) and data["words"] == f"{word},__proto__"
    else:
        assert data["title"] == str(run) and data["asked"] == [word, "__proto__"]
        assert {word, "__proto__"} <= data["words"].keys()
    assert (
        "innerHTML" not in template and "document.write" not in template and "eval(" not in template
    )


def test_a_run_of_characters(run_train, capsys):
    out = run_train("--max_iters=1")
    for args in (["--word=a"], ["--similar=w"], ["--text=words a", "--target=r"]):
        tool.main([f"--run={out}", "--device=cpu", "--top=3", *args])
    assert "logit of r" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give one of --word=..., --similar=..., --who=..., --text=..."),
        (["--word=a", "--text=b"], "give one of"),
        (["--word=nurse", "--plot=p.xyz"], "plot='p.xyz': expected a .png, .svg or .pdf"),
        (["--word=nurse", "--html=p.html", "--plot=p.png"], "plot has no effect on the page"),
        (["--text=The", "--html=p.html", "--target=he"], "target has no effect on the page"),
        (["--html=p.html", "--top=20"], "top has no effect on the page"),
        (["--text=The", "--pieces=True"], "pieces has no effect on text"),
        (["--word=,"], "give one of"),
        (["--word=nurse", "--sense=1,4"], "sense='1,4': found '4', expected 0 to 3 of 4 senses"),
        (["--word=nurse", "--sense=-1"], "sense='-1': found '-1', expected 0 to 3"),
        (["--text=The", "--sense=1"], "sense='1' (command line) has no effect without --word or"),
        (
            ["--word=nurse", "--target=he"],
            "target='he' (command line) has no effect without --text",
        ),
        (["--word=nurse", "--top=0"], "top=0 (command line): expected a number in [1, 1000]"),
        (["--text=The", "--target=xylophone"], "'xylophone' is"),
        (["--text=" + "nurse " * 40], "expected 1 to 32"),
        (["--word=nurse", "--edit=what"], "edit 'what'"),
        (["--word=nurse", "--edits=no.json"], "no.json: No such file"),
    ],
)
def test_bad_settings(look, args, message):
    with pytest.raises(UserError) as error:
        look(*args)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- experiments.py


def test_he_or_she_in_a_padded_batch(bpe_run):
    r = open_run(bpe_run, "cpu")
    model, tokenizer = r.model, r.tokenizer
    prompts = ["The PROFESSION said that", "A PROFESSION knows that the", "PROFESSION"]
    with torch.no_grad():
        found = experiments.he_she(model, tokenizer, prompts, PEOPLE)
        for i, noun in enumerate(PEOPLE):
            for j, prompt in enumerate(prompts):
                ids = tokenizer.encode(prompt.replace("PROFESSION", noun))
                p = model(torch.tensor(ids)[None])[0][0, -1].softmax(-1)
                he, she = (p[word_ids(tokenizer, word)[0]] for word in ("he", "she"))
                assert abs(found[i, j] / max(he / she, she / he) - 1) < 1e-4


def test_correlation_of_ranks_is_spearmans():
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(0).integers(5, size=(2, 40))
    ranks = stats.rankdata(x), stats.rankdata(y)
    assert abs(experiments.correlation(*ranks) - stats.spearmanr(x, y).statistic) < 1e-12
    which = np.random.default_rng(1).integers(40, size=(3, 40))
    want = [np.corrcoef(ranks[0][row], ranks[1][row])[0, 1] for row in which]
    assert np.allclose(experiments.correlation(ranks[0][which], ranks[1][which]), want)


def test_best_factor():
    pytest.importorskip("scipy")
    assert (
        abs(experiments.best_factor(lambda f: 20 * (f - 0.3) ** 2) - 0.325) < 0.02
    )  # argmin of it and |1 - f|
    assert experiments.best_factor(lambda f: -9 * f) == 1


def test_every_experiment_runs(bpe_run, tmp_path, capsys):
    pytest.importorskip("scipy")
    pair = [
        ("nurse", "teacher", 9),
        ("nurse", "king", 2),
        ("doctor", "music", 1),
        ("food", "sport", 4),
    ] * 6
    for file, (separator, *columns) in experiments.SETS.items():
        rows = [["word"] * 5 for _ in range(len(pair) + 1)]
        for row, values in zip(rows[1:], pair):
            for column, value in zip(columns, values):
                row[column] = str(value)
        (tmp_path / file).write_text("\n".join(separator.join(row) for row in rows))
    (tmp_path / "s.json").write_text(
        json.dumps({"professions": PEOPLE, "topics": {"music": ["music", "c++ ("]}})
    )
    (tmp_path / "e.json").write_text(
        json.dumps([{"edit": "swap", "word": "nurse", "from": "he", "to": "she"}] * 12)
    )
    train.main(
        [
            *TINY,
            f"--data_dir={bpe_run.parent}",
            "--dataset=people",
            f"--out_dir={tmp_path / 'T'}",
            "--n_sense=0",
            "--block_size=32",
        ]
    )
    capsys.readouterr()
    experiments.main(
        [
            f"--run={bpe_run}",
            "--device=cpu",
            f"--lexical={tmp_path}",
            "--bias",
            "--topics",
            "--words",
            "--swaps",
            f"--transformer={tmp_path / 'T'}",
            f"--damage={tmp_path / 'e.json'}",
            "--num_samples=3",
            f"--data_dir={bpe_run.parent}",
            f"--prompts={tmp_path / 's.json'}",
            "--max_new_tokens=10",
            "--n_bootstrap=20",
        ]
    )
    out = capsys.readouterr().out
    assert "SimVerb-3500.txt, all 24 pairs" in out and "embedding" in out and "nan" not in out
    assert "4 of 4 professions are one token" in out and "its Transformer as it is" in out
    assert (
        "mean perplexity" in out and "edits   KL" in out and "by document: word perplexity" in out
    )
    harm = out.split("edits   KL")[1].split("\n")[1:4]  # after 1, 10, 12 edits: the same swap anew
    numbers = [float(line.split()[1]) for line in harm]
    assert all(kl >= 0 for kl in numbers) and numbers[0] > 0


def test_experiments_want_a_task(bpe_run):
    with pytest.raises(UserError, match="give one of --lexical"):
        experiments.main([f"--run={bpe_run}"])
    with pytest.raises(UserError, match="SimLex-999.txt: No such file"):
        experiments.main([f"--run={bpe_run}", "--lexical=nowhere"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "pairs.csv, line 1: found '', expected 2 words and a score"),
        ("Word 1,Word 2,Human (mean)", "line 1: found 'Word 1,Word 2,Human (mean)', expected"),
        ("Word 1,Word 2,Score\nlove,sex,6.77\ntiger,cat", "line 3: found 'tiger,cat', expected"),
        ("love,sex,6.77\n\ntiger,cat,1", "line 2: found '', expected"),
        ("love,sex,nan", "found 'love,sex,nan', expected"),
        ("love,,1", "found 'love,,1', expected"),
        ("love,sex,1\0", "expected 2 words and a score"),
    ],
)
def test_bad_pairs(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError) as error:
        experiments.read_pairs(tmp_path / "pairs.csv", ",", (0, 1, 2))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_pairs(tmp_path):
    text = "Word 1,Word 2,Human (mean)\r\nlove\u2028,word,6.77 \r\nwords , word,-1\r\n"
    (tmp_path / "pairs.csv").write_bytes(text.encode("utf-8-sig"))
    pairs = experiments.read_pairs(tmp_path / "pairs.csv", ",", (0, 1, 2))
    assert pairs == [("love", "word", 6.77), ("words", "word", -1.0)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "s.json: found [], expected an object"),
        ('{"professions": "nurse"}', "s.json, professions: found 'nurse', expected a list"),
        ('{"professions": ["nurse", 1]}', "professions, entry 2: found 1, expected text"),
        ('{"topics": ["music"]}', "s.json, topics: found ['music'], expected an object"),
        ('{"topics": {"music": "music"}}', "topics, entry 1: found 'music', expected a list"),
    ],
)
def test_bad_stimuli(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError) as error:
        experiments.read_stimuli(tmp_path / "s.json")
    assert message in str(error.value)
    assert experiments.read_stimuli(None).keys() == {
        "professions",
        "bias_prompts_evaluate",
        "bias_prompts_fit",
        "topics",
    }


def test_word_perplexity_in_loops(bpe_run, capsys):
    """Each document alone, after the token that ends the one before it, in windows of at most T tokens."""
    args = [f"--run={bpe_run}", f"--data_dir={bpe_run.parent}", "--words", "--device=cpu"]
    capsys.readouterr()
    experiments.main(args)
    shown = capsys.readouterr().out
    r = open_run(bpe_run, "cpu")
    T, end = r.model.config.block_size, r.tokenizer.end
    text = r.tokenizer.decode(np.fromfile(bpe_run.parent / "people/val.bin", "<u2").tolist())
    loss, words = 0.0, 0
    for document in text.split("<|endoftext|>")[:-1]:
        words += len(document.split())
        ids = [end, *r.tokenizer.encode(document).tolist()]
        last = max(0, len(ids) - 1 - T)  # where the last window starts
        for i in range(1, len(ids)):
            start = min((i - 1) // T * T, last)
            with torch.no_grad():
                logits = r.model(torch.tensor([ids[start:i]]))[0][0, -1]
            loss -= logits.log_softmax(-1)[ids[i]].item()
    perplexity = float(re.search(r"word perplexity ([\d.]+), ", shown)[1])
    assert f", {words:,} words" in shown
    assert perplexity == pytest.approx(np.exp(loss / words), abs=0.006, rel=1e-5)


def test_word_perplexity_of_other_runs(bpe_run, run_train, data_dir, tmp_path, capsys):
    """A Transformer has one, too; text without ends of documents has none."""
    out = tmp_path / "T"
    train.main(
        [
            *TINY,
            f"--data_dir={bpe_run.parent}",
            "--dataset=people",
            f"--out_dir={out}",
            "--n_sense=0",
        ]
    )
    experiments.main([f"--run={out}", f"--data_dir={bpe_run.parent}", "--words", "--device=cpu"])
    assert "by document: word perplexity" in capsys.readouterr().out
    with pytest.raises(UserError, match="no token ends the documents"):
        experiments.main(
            [f"--run={run_train('--max_iters=1')}", f"--data_dir={data_dir}", "--words"]
        )
    with pytest.raises(UserError, match="it has no senses"):
        experiments.main([f"--run={out}", "--bias"])
