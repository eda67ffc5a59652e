# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: which panels it has, what becomes of gaps, spikes and long runs."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from fastloop import drawing
from fastloop.extras import MissingExtra
from fastloop.loop import curves
from fastloop.loop.curves import plot_curves
from fastloop.loop.logs import JsonLines

ROWS: list[dict[str, Any]] = [
    {"step": n, "epoch": n // 40, "time": 0.1 * n, "train/loss": 2.0 + 1 / (n + 1), "lr": 1e-3, "skipped": 0}
    for n in range(150)
]
ROWS += [{"step": step, "val/loss": 2.1, "val/acc": 0.5, "note": "text", "best": True} for step in (50, 100, 149)]


def write(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    logger = JsonLines()
    logger.open(run_dir, None)
    for row in rows:
        logger.log(row)
    logger.close()


def figures_drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    kept: list[Any] = []
    save = drawing.save

    def keep(figure: Any, path: Path) -> Path:
        kept.append(figure)
        return save(figure, path)

    monkeypatch.setattr(drawing, "save", keep)
    return kept


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    return figures_drawn(monkeypatch)


def test_a_picture(tmp_path: Path, drawn: list[Any]) -> None:
    write(tmp_path, ROWS)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "training_curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["loss", "learning rate", "skipped", "val/acc"]
    losses = drawn[0].axes[0]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["train/loss", "val/loss"]
    assert list(losses.lines[0].get_xdata()) == list(range(150))
    assert list(losses.lines[0].get_ydata()) == [row["train/loss"] for row in ROWS[:150]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "training_curves.png"]
    plot_curves(tmp_path)  # once more, over the first


def test_panels_are_the_quantities() -> None:
    row = {
        "step": 1,
        "memory/host": 1,
        "memory/peak": 2,
        "train/acc": 0.1,
        "samples/s": 5.0,
        "data_wait": 0.1,
        "grad_norm": 1.0,
        "val/acc": 0.2,
        "lr/0": 0.1,
        "lr/1": 0.2,
        "val/loss": 3.0,
        "train/loss": 3.0,
    }
    panels = curves._panels([row])
    assert {name: sorted(series) for name, series in panels.items()} == {
        "loss": ["train/loss", "val/loss"],
        "lr": ["lr/0", "lr/1"],
        "grad_norm": ["grad_norm"],
        "samples/s": ["samples/s"],
        "data_wait": ["data_wait"],
        "memory": ["memory/host", "memory/peak"],
        "acc": ["train/acc", "val/acc"],
    }
    assert list(panels)[:5] == ["loss", "lr", "grad_norm", "samples/s", "data_wait"]
    assert len(curves._panels([{"step": 1, **{f"m{n}": 1.0 for n in range(40)}}])) == curves.MOST_PANELS


def test_a_value_that_is_not_finite_is_a_line_at_its_step(tmp_path: Path, drawn: list[Any]) -> None:
    write(tmp_path, [{"step": n, "train/loss": math.nan if n == 7 else 1.0} for n in range(10)])
    plot_curves(tmp_path)
    red, curve = drawn[0].axes[0].lines
    assert list(red.get_xdata()) == [7, 7]
    assert 7 not in curve.get_xdata()
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert legend == ["train/loss not finite", "train/loss"]


def test_nothing_but_nan(tmp_path: Path, drawn: list[Any]) -> None:
    write(tmp_path, [{"step": 1, "train/loss": math.nan}])
    assert plot_curves(tmp_path).exists()


def test_one_row(tmp_path: Path, drawn: list[Any]) -> None:
    write(tmp_path, [{"step": 3, "train/loss": 1.0}])
    plot_curves(tmp_path)
    assert len(drawn[0].axes) == 1


def test_a_long_run_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    points[88_888] = (88_888.0, -50.0)
    thinned = curves._thinned(points)
    assert len(thinned) <= curves.MOST_POINTS
    assert (77_777.0, 50.0) in thinned
    assert (88_888.0, -50.0) in thinned
    assert thinned == sorted(thinned)
    assert curves._thinned(points[:100]) == points[:100]


def test_a_spike_does_not_flatten_the_curve(tmp_path: Path, drawn: list[Any]) -> None:
    write(tmp_path, [{"step": n, "train/loss": 1e6 if n == 100 else 2 - n / 200} for n in range(200)])
    plot_curves(tmp_path)
    assert drawn[0].axes[0].get_ylim()[1] < 3


def test_smoothing_is_a_median_of_what_is_around() -> None:
    values = [float((n * 37) % 101) for n in range(300)]  # a reach of 3
    expected = [statistics.median(values[max(0, n - 3) : n + 4]) for n in range(300)]
    assert curves._smoothed(values) == expected
    jump = [0.0] * 150 + [1.0] * 150
    assert curves._smoothed(jump) == jump


def test_matplotlibs_settings_stay(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    import matplotlib
    from matplotlib import pyplot

    backend, open_figures = matplotlib.get_backend(), pyplot.get_fignums()
    write(tmp_path, ROWS)
    plot_curves(tmp_path)
    assert (matplotlib.get_backend(), pyplot.get_fignums()) == (backend, open_figures)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"\[curves\] .*metrics.jsonl must exist"):
        plot_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "note": "x"}\n')
    with pytest.raises(ValueError, match=r"must hold rows with numbers"):
        plot_curves(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastloop\[plots\]'"):
        plot_curves(tmp_path)
