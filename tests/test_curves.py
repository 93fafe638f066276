"""lab/curves.py: its figures and its table against those of logs that are written here, by hand."""

import json

import numpy as np
import pytest

from configurator import UserError
from lab import curves, draw

# a run that was stopped after step 30 and resumed: its seconds begin again
LONG = """
{"step": 0, "val_loss": 4.5, "bits_per_byte": 6.5}
{"step": 10, "loss": 4.0, "tokens_per_second": 100.0, "mfu": null, "seconds": 5.0}
{"step": 20, "loss": 3.5, "tokens_per_second": 300.0, "mfu": null, "seconds": 9.0}
{"step": 20, "val_loss": 3.25, "bits_per_byte": 4.75}
{"step": 30, "loss": 3.0, "tokens_per_second": 200.0, "mfu": null, "seconds": 15.0}
{"step": 40, "loss": 3.0, "tokens_per_second": 300.0, "mfu": null, "seconds": 8.0}
{"step": 45, "val_loss": 3.5, "bits_per_byte": 5.0}
{"step": 50, "loss": 2.5, "tokens_per_second": 10.0, "mfu": null, "seconds": 12.0}
"""
# a run that has just begun, with a figure for each of two senses, and half a line
SHORT = """
{"step": 0, "val_loss": 4.75, "bits_per_byte": null, "share": [0.25, 0.75]}
{"step": 10, "lo"""
SECONDS = {0: 0, 10: 5, 20: 9, 30: 15, 40: 15 + 8, 45: 15 + 10, 50: 15 + 12}
LONG_SETTINGS = {"n_sense": 16, "learning_rate": 0.003, "seed": 1, "out_dir": "out/long", "new": 1}
SHORT_SETTINGS = {"n_sense": 0, "learning_rate": 0.003, "seed": 1, "out_dir": "out/short"}


@pytest.fixture
def folders(tmp_path):
    for name, log, settings in (("long", LONG, LONG_SETTINGS), ("short", SHORT, SHORT_SETTINGS)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(log.lstrip())
        (folder / "config.json").write_text(json.dumps(settings))
    return str(tmp_path / "long"), str(tmp_path / "short")


@pytest.fixture
def drawn(monkeypatch):
    """The panels that were drawn."""
    panels = []
    monkeypatch.setattr(curves, "expect_picture", lambda path: None)
    monkeypatch.setattr(curves, "draw_curves", lambda path, made: panels.extend(made))
    return panels


def test_the_table(folders, capsys):
    long, short = folders
    curves.main([long, short])
    header, first, second = capsys.readouterr().out.splitlines()
    columns = "run step val_loss best at step bits_per_byte tokens/s n_sense new"
    assert header.split() == columns.split()
    assert first.split() == [long, "50", "3.5000", "3.2500", "20", "5.0000", "200", "16", "1"]
    assert second.split() == [short, "0", "4.7500", "4.7500", "0", "-", "-", "0", "-"]


def test_curves_over_steps(folders, drawn):
    long, short = folders
    curves.main([long, short, "--plot=x.png", "--figures=val_loss,loss,share"])
    val_loss, loss, share = [panel.curves for panel in drawn]
    assert drawn[0].title == "validation loss, nats per token"
    np.testing.assert_array_equal(val_loss[long], ([0, 20, 45], [4.5, 3.25, 3.5]))
    np.testing.assert_array_equal(val_loss[short], ([0], [4.75]))
    np.testing.assert_array_equal(loss[long], ([10, 20, 30, 40, 50], [4, 3.5, 3, 3, 2.5]))
    assert short not in loss
    assert share[short][1].tolist() == [[0.25, 0.75]]


def test_curves_over_seconds_of_a_resumed_run(folders, drawn):
    long, short = folders
    curves.main([long, short, "--plot=x.png", "--figures=loss,val_loss", "--x=seconds", "--first_step=20"])
    loss, val_loss = [panel.curves for panel in drawn]
    np.testing.assert_allclose(loss[long][0], [SECONDS[step] for step in (20, 30, 40, 50)])
    np.testing.assert_allclose(val_loss[long][0], [SECONDS[step] for step in (20, 45)])
    np.testing.assert_array_equal(val_loss[long][1], [3.25, 3.5])
    assert short not in val_loss


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--figures=val_loss,los"],
            "'los' .* bits_per_byte, loss, mfu, seconds, share, tokens_per_second, val_l",
        ),
        (["--figures=mfu"], "no run has 'mfu'"),
        (["--first_step=90"], "from step 90 on"),
        (["nowhere"], "nowhere/metrics.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_clear_line(folders, args, message):
    with pytest.raises(UserError, match=message):
        curves.main([*folders, *args])
    with pytest.raises(UserError, match="name the folders"):
        curves.main([])


def test_every_curve_is_drawn_and_named(folders, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    save = draw.save
    monkeypatch.setattr(draw, "save", lambda figure, *rest: (figures.append(figure), save(figure, *rest)))
    long, short = folders
    curves.main([long, short, f"--plot={tmp_path / 'x.svg'}", "--figures=val_loss,share"])
    assert long in (tmp_path / "x.svg").read_text()
    val_loss, share = figures[0].axes[:2]
    paths = [line.get_xydata().tolist() for line in val_loss.lines if len(line.get_xydata())]
    assert paths == [[[0, 4.5], [20, 3.25], [45, 3.5]], [[0, 4.75]]]
    assert [line.get_ydata().tolist() for line in share.lines] == [[0.25], [0.75]]
    [legend] = figures[0].legends
    named = {
        text.get_text(): line.get_linestyle() for text, line in zip(legend.get_texts(), legend.get_lines())
    }
    assert named == {long: val_loss.lines[0].get_linestyle(), short: share.lines[0].get_linestyle()}
    assert named[long] != named[short]
    # the legend lies below the panels and hides none of them
    lowest = min(axis.get_tightbbox().y0 for axis in figures[0].axes)
    assert 0 <= legend.get_window_extent().y0 < legend.get_window_extent().y1 <= lowest
    assert legend.get_window_extent().x1 <= figures[0].bbox.x1
