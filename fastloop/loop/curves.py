# SPDX-License-Identifier: Apache-2.0
"""`training_curves.png`: what `metrics.jsonl` holds, a panel for each quantity."""

from __future__ import annotations

import math
import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastloop import drawing
from fastloop.extras import need
from fastloop.loop.logs import read_rows
from fastloop.loop.watch import median

# Panels that come first, by the last part of a metric's name: train/loss and val/loss share one.
FIRST = ("loss", "lr", "grad_norm", "samples/s", "tokens/s", "data_wait", "mfu")
LABELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "data_wait": "share of time waiting for data",
    "memory": "memory, GiB",
    "mfu": "model FLOPs utilization",
}
LOGARITHMIC = ("grad_norm",)
FROM_ZERO = ("samples/s", "tokens/s", "steps/s", "data_wait", "mfu", "memory")  # else noise fills the panel
NOT_DRAWN = ("step", "epoch", "time", "seconds")
MOST_PANELS = 16
MOST_POINTS = 4000  # more than twice the picture's width in pixels

Series = list[tuple[float, float]]


def plot_curves(run_dir: str | os.PathLike[str]) -> Path:
    """Draws `run_dir/metrics.jsonl` into `run_dir/training_curves.png`, in one rename, and returns its path.

    Losses of training and validation in one panel, then learning rate, gradient norm, speed, data wait and every other
    numeric metric, as far as they are there. Values that are not finite are red lines at their steps.

    Raises:
        FileNotFoundError: there is no metrics.jsonl.
        ValueError: it has no numbers to draw.
        MissingExtra: matplotlib is not installed.
    """
    source = Path(run_dir) / "metrics.jsonl"
    if not source.exists():
        raise FileNotFoundError(
            f"[curves] {source} must exist to be drawn, there is no such file; pass the run_dir of a run with the "
            "'jsonl' logger"
        )
    need("matplotlib.figure", "plots", "drawing training curves")  # before the file is read
    panels = _panels(read_rows(source))
    if not panels:
        raise ValueError(f"[curves] {source} must hold rows with numbers, it has none; train for some windows first")
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    figure = drawing.figure(6.5 * columns, 2.6 * rows + 0.4)
    steps = [step for series in panels.values() for points in series.values() for step, _ in points]
    for place, (name, series) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        _draw(axes, name, series)
        axes.set_xlim(*_limits(min(steps), max(steps)))
        if place > len(panels) - columns:
            axes.set_xlabel("step")
    figure.suptitle(Path(run_dir).resolve().name)
    return drawing.save(figure, Path(run_dir) / "training_curves.png")


def _panels(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Series]]:
    """Panel -> name of the metric -> points, in the order of FIRST and then of appearance."""
    panels: dict[str, dict[str, Series]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            panel = _panel(name)
            if panel not in NOT_DRAWN:
                panels.setdefault(panel, {}).setdefault(name, []).append((row["step"], value))
    order = [name for name in FIRST if name in panels] + [name for name in panels if name not in FIRST]
    return {name: panels[name] for name in order[:MOST_PANELS]}


def _panel(name: str) -> str:
    parts = name.split("/")
    if name in FIRST or len(parts) == 1 or parts[-1] == "s":  # "samples/s" is a unit
        return name
    return parts[0] if parts[0] in ("memory", "lr") else parts[-1]


def _draw(axes: Any, panel: str, series: dict[str, Series]) -> None:
    scale = 2.0**-30 if panel == "memory" else 1.0
    everything: list[float] = []
    for place, (name, points) in enumerate(sorted(series.items(), key=lambda item: not item[0].startswith("train"))):
        finite = _thinned([(step, scale * value) for step, value in points if math.isfinite(value)])
        odd = dict.fromkeys(step for step, value in points if not math.isfinite(value))
        for number, step in enumerate(odd):
            label = None if number else f"{name} not finite"
            axes.axvline(step, color="tab:red", linewidth=0.8, alpha=0.6, label=label)
        if not finite:
            continue
        steps, values = zip(*finite, strict=True)
        everything += values
        color = f"C{place}"
        smooth = _smoothed(values) if len(values) >= 100 and panel not in ("lr", "memory") else None
        marker = "o" if len(values) <= 30 else None
        faint = 1.0 if smooth is None else 0.3
        label = name if smooth is None else None
        axes.plot(steps, values, color=color, alpha=faint, linewidth=1.0, marker=marker, markersize=3, label=label)
        if smooth is not None:
            axes.plot(steps, smooth, color=color, linewidth=1.4, label=name)
    axes.set_title(LABELS.get(panel, panel if len(series) > 1 else next(iter(series))), fontsize="medium")
    axes.grid(alpha=0.3)
    _scale_values(axes, panel, everything)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize="small", loc="best")


def _scale_values(axes: Any, panel: str, everything: Sequence[float]) -> None:
    if panel in FROM_ZERO:
        axes.set_ylim(0, 1.1 * max(everything, default=1.0) or 1.0)
    elif panel in LOGARITHMIC and everything and min(everything) > 0 and max(everything) > 30 * min(everything):
        axes.set_yscale("log")
    elif panel == "loss":
        _without_outliers(axes, everything)


def _without_outliers(axes: Any, values: Sequence[float]) -> None:
    """One spike must not press the curve flat: the axis ends where all but a hundredth of the losses lie.

    Only for spikes: three times the range of all others.
    """
    ordered = sorted(values)
    if len(ordered) < 100:
        return
    low, high = ordered[0], ordered[-1 - len(ordered) // 100]
    if ordered[-1] - low > 3 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))


def _limits(first: float, last: float) -> tuple[float, float]:
    margin = 0.02 * (last - first) or 0.5
    return first - margin, last + margin


def _thinned(points: Series) -> Series:
    """At most MOST_POINTS, of each stretch its lowest and its highest: a spike stays to be seen."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: Series = []
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        both = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(both)
    return kept


def _smoothed(values: Sequence[float]) -> list[float]:
    """Median over a fiftieth of the curve, centred: a spike or a jump stays as sharp as it is."""
    reach = max(1, len(values) // 100)
    window = sorted(values[:reach])
    smooth = []
    for at in range(len(values)):
        if at + reach < len(values):
            insort(window, values[at + reach])
        if at > reach:
            del window[bisect_left(window, values[at - reach - 1])]
        smooth.append(median(window))
    return smooth
