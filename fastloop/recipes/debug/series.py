# SPDX-License-Identifier: Apache-2.0
"""Curves of a run, and what can be said of a few noisy points: trend, slope, noise, each robust against outliers."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastloop.loop.logs import read_rows

Points = list[tuple[float, float]]
MOST_POINTS = 300  # each trend looks at all pairs: longer curves are averaged in blocks
SURE = 1.96  # standard deviations: a trend by chance in 1 of 20


def series_of(given: Any, area: str) -> dict[str, Points]:
    """By metric, (step, value) in order.

    Args:
        given: what `Loop.fit` returns, {metric: values} without steps, rows with "step", or a run's folder.
        area: of the errors.

    Raises:
        FileNotFoundError: a folder without metrics.jsonl.
        TypeError: something else.
    """
    if isinstance(given, (str, os.PathLike)):
        path = Path(given) / "metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(
                f"[{area}] {path} must exist, there is no such file; pass a run_dir of the 'jsonl' logger"
            )
        given = read_rows(path)
    if isinstance(given, Mapping):
        return {str(name): _points(name, values, area) for name, values in given.items()}
    if isinstance(given, Iterable):
        return _of_rows(given, area)
    raise TypeError(f"[{area}] wants a history, rows or a run's folder, got {type(given).__name__}")


def _points(name: Any, values: Any, area: str) -> Points:
    try:
        return [
            (float(each[0]), float(each[1])) if isinstance(each, (tuple, list)) else (float(number), float(each))
            for number, each in enumerate(values)
        ]
    except (TypeError, ValueError, IndexError):
        raise TypeError(f"[{area}] {name!r} must be numbers or pairs (step, value), got {values!r:.80}") from None


def _of_rows(rows: Iterable[Any], area: str) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"[{area}] rows must be dicts of metrics, got {type(row).__name__}")
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, []).append((float(row.get("step", number)), float(value)))
    return found


def finite(points: Points) -> Points:
    """Those whose value is a number."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def blocks(points: Points, count: int = MOST_POINTS) -> Points:
    """At most `count` points: means of neighbours."""
    size = -(-len(points) // count)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(s for s, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def slope(points: Points) -> float:
    """Median of the slopes of all pairs (Theil 1950, Sen 1968); 0 where there is none."""
    points = blocks(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] != a[0]]
    return statistics.median(slopes) if slopes else 0.0


def change(points: Points) -> float:
    """How much the robust line through the points rises from the first to the last."""
    return slope(points) * (points[-1][0] - points[0][0]) if len(points) > 1 else 0.0


def trend(points: Points) -> int:
    """1 if values rise, -1 if they fall, 0 if they could by chance (Mann and Kendall, 5 %, ties counted).

    S = sum over pairs of sign(later - earlier), of variance n (n-1) (2n+5) / 18 without ties.
    """
    values = [value for _, value in blocks(points)]
    n = len(values)
    if n < 4:
        return 0
    score = sum(_sign(b - a) for i, a in enumerate(values) for b in values[i + 1 :])
    ties = [values.count(value) for value in set(values)]
    variance = (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
    if variance <= 0 or abs(score) - 1 <= SURE * math.sqrt(variance):
        return 0
    return _sign(score)


def level(points: Points) -> float:
    """Median of the values."""
    return statistics.median(value for _, value in points)


def jitter(points: Points) -> float:
    """Median distance of a value from the one before."""
    values = [value for _, value in points]
    return statistics.median(abs(b - a) for a, b in itertools.pairwise(values)) if len(values) > 1 else 0.0


def part(points: Points, start: float, stop: float = 1.0) -> Points:
    """From one share of the points to another."""
    return points[int(len(points) * start) : max(math.ceil(len(points) * stop), 1)]


def since(points: Points, step: float) -> Points:
    """From a step on."""
    return [point for point in points if point[0] >= step]


def first_of(series: Mapping[str, Points], names: Sequence[str]) -> Points:
    """The finite points of the first of these metrics that is there."""
    for name in names:
        if series.get(name):
            return finite(series[name])
    return []


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
