# SPDX-License-Identifier: Apache-2.0
"""Plots of a regression report as inline SVG that stretches with its box while its text keeps its size.

Horizontal places are per cent of the width; points are drawn in a nested SVG of 1000 units that stretches without
scaling its strokes. Colours are the stylesheet's: a figure names classes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from fastloop.bench import stats
from fastloop.bench.regression import words
from fastloop.bench.regression.record import Count
from fastloop.bench.report import seconds
from fastloop.bench.stats import Interval

STRIP = 168  # pixels that a strip is high
WIDE = 1.5  # a change beyond this factor is clipped: it would hide those of some per cent
FARTHEST = 1.15  # pairs this much off their median are clipped, if they are rarer than one in ten on a side
CHANGES = (
    1.0,
    1.05,
    0.95,
    1.1,
    0.9,
    1.2,
    0.8,
    1.5,
    0.67,
    1.02,
    0.98,
    1.3,
    0.7,
    2.0,
    0.5,
    3.0,
    0.33,
    4.0,
    0.25,
    8.0,
    0.125,
    16.0,
)
RATIOS = (1.0, 2.0, 0.5, 1.5, 4.0, 8.0, 1.2, 3.0, 0.8, 1.1, 0.9, 16.0, 6.0, 0.25, 5.0)


@dataclass(frozen=True)
class Axis:
    """From `low` to `high` in per cent of the width; what lies outside is at the edge."""

    low: float
    high: float
    log: bool = True

    def at(self, value: float) -> float:
        low, high, place = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, place = math.log(low), math.log(high), math.log(place)
        return round(100 * (place - low) / (high - low), 2)

    def clipped(self, value: float) -> int:
        """-1 where the value lies below the axis, 1 above it."""
        return (value > self.high) - (value < self.low)

    def ticks(self, candidates: Iterable[float], gap: float) -> list[float]:
        """Of the candidates, best first, those that are at least `gap` per cent apart."""
        chosen: list[float] = []
        for value in candidates:
            if self.low <= value <= self.high and all(abs(self.at(value) - self.at(each)) >= gap for each in chosen):
                chosen.append(value)
        return sorted(chosen)


def _ends(intervals: Iterable[Interval | None]) -> list[float]:
    return [end for each in intervals if each is not None for end in (each.low, each.high) if 0 < end < math.inf]


def change_axis(intervals: Iterable[Interval | None]) -> Axis:
    """One axis for all changes: at least +-10 %, at most a factor of 1.5."""
    ends = _ends(intervals)
    return Axis(max(1 / WIDE, min([1 / 1.1, *ends]) / 1.01), min(WIDE, max([1.1, *ends]) * 1.01))


def ratio_axis(intervals: Iterable[Interval | None], floors: Sequence[float]) -> Axis:
    """One axis for ratios and their floors, at most from 1/4x to 16x."""
    ends = _ends(intervals) + [floor for floor in floors if floor > 0]
    return Axis(max(0.25, min([0.9, *ends]) / 1.05), min(16.0, max([1.2, *ends]) * 1.05))


def svg(name: str, title: str, text: str, body: str, kind: str, height: int | None = None) -> str:
    """An SVG with an accessible title and description; `name` is unique in the document."""
    size = f' height="{height}"' if height is not None else ""
    return (
        f'<svg class="{kind}" role="img" aria-labelledby="{name}-t {name}-d"{size}>'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(text)}</desc>{body}</svg>'
    )


def _line(x: float, kind: str, top: str = "0", bottom: str = "100%") -> str:
    return f'<line class="{kind}" x1="{x}%" x2="{x}%" y1="{top}" y2="{bottom}"/>'


def _text(x: float | str, y: float | str, text: str, kind: str = "", anchor: str = "middle") -> str:
    place = f"{x}%" if isinstance(x, float) else x
    return f'<text class="{kind}" x="{place}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _at(x: float, y: str, body: str) -> str:
    """A mark in pixels around a place in per cent."""
    return f'<svg x="{x}%" y="{y}" overflow="visible">{body}</svg>'


def _anchor(x: float) -> str:
    return "start" if x < 3 else "end" if x > 97 else "middle"


def _dots(points: Sequence[tuple[float, float]], height: int, kind: str) -> str:
    """Round points at (0 to 1000, pixels)."""
    path = "".join(f"M{x:.0f} {y:.1f}h.01" for x, y in points)
    return (
        f'<svg width="100%" height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none" '
        f'overflow="visible"><path class="dots {kind}" d="{path}"/></svg>'
    )


def _guides(axis: Axis, thresholds: bool) -> str:
    lines = [_line(axis.at(1.0), "one")]
    for value, kind in ((stats.SLOWER, "limit"), (stats.SURELY_SLOWER, "sure")) if thresholds else ():
        lines += [_line(axis.at(each), kind) for each in (value, 1 / value) if not axis.clipped(each)]
    return "".join(lines)


def _label(value: float, as_change: bool) -> str:
    return ("0" if value == 1 else words.percent(value).replace(".0 %", " %")) if as_change else words.factor(value)


def axis_labels(name: str, axis: Axis, title: str, as_change: bool) -> str:
    """The axis as the head of a column of `interval_row`s."""
    ticks = axis.ticks(CHANGES if as_change else RATIOS, 18)
    body = "".join(_text(axis.at(each), 12, _label(each, as_change), anchor=_anchor(axis.at(each))) for each in ticks)
    return svg(name, title, f"From {_label(axis.low, as_change)} to {_label(axis.high, as_change)}.", body, "axis", 16)


def _mark(axis: Axis, value: Interval, y: str, kind: str, as_change: bool) -> str:
    """A bar from low to high with its median; beyond the axis a pointed end, and a number for a median out there."""
    low, high, middle = axis.at(value.low), axis.at(value.high), axis.at(value.median)
    parts = [f'<line class="bar {kind}" x1="{low}%" x2="{high}%" y1="{y}" y2="{y}"/>']
    for end in (value.low, value.high):
        side = axis.clipped(end)
        if side:
            parts.append(_at(axis.at(end), y, f'<path class="point {kind}" d="M{9 * side} 0L0 -6V6Z"/>'))
        else:
            parts.append(_at(axis.at(end), y, f'<path class="cap {kind}" d="M0 -5V5"/>'))
    side = axis.clipped(value.median)
    if side:
        text, anchor = (
            words.percent(value.median) if as_change else words.factor(value.median),
            "end" if side > 0 else "start",
        )
        parts.append(
            _at(middle, y, f'<text class="beyond" x="{-8 * side}" y="-8" text-anchor="{anchor}">{text}</text>')
        )
    else:
        parts.append(_at(middle, y, f'<path class="median {kind}" d="M0 -7L6 0L0 7L-6 0Z"/>'))
    return "".join(parts)


def interval_row(
    name: str,
    title: str,
    axis: Axis,
    value: Interval | None,
    *,
    rerun: Interval | None = None,
    floor: float | None = None,
    as_change: bool = True,
    kind: str = "",
) -> str:
    """One row of a forest plot: the interval, its rerun below it, the floor as a hatched limit.

    Ticks are in every row; the stylesheet shows them only where the table is folded to cards.
    """
    body = [_guides(axis, as_change)]
    gap = 22 if as_change else 18
    for each in axis.ticks(CHANGES if as_change else RATIOS, gap):
        place = axis.at(each)
        body.append(_text(place, "100%", _label(each, as_change), "tick", _anchor(place)))
    if floor is not None:
        body.append(_line(axis.at(floor), "floor"))
    form = words.change if as_change else words.times
    text = "Not measured."
    if value is not None:
        body.append(_mark(axis, value, "50%" if rerun is None else "36%", kind, as_change))
        text = "Median {}, 98 % interval {}.".format(*form(value))
    if rerun is not None:
        body.append(_mark(axis, rerun, "70%", f"again {kind}", as_change))
        text += " Rerun {}, {}.".format(*form(rerun))
    if floor is not None:
        text += f" Floor {words.factor(floor)}."
    return svg(name, title, text, "".join(body), "row")


def _places(rounds: Sequence[Sequence[float]], reruns: Sequence[Sequence[float]]) -> list[list[float]]:
    """Where the pairs of each round are, 0 to 1000, with room between rounds and more before the rerun."""
    places, x = [], 0.5
    for index, each in enumerate([*rounds, *reruns]):
        if index:
            x += 3.0 if index == len(rounds) else 1.0
        places.append([x + step for step in range(len(each))])
        x += len(each)
    return [[1000 * each / (x - 0.5) for each in row] for row in places]


@dataclass(frozen=True)
class _Plane:
    """Ratios upwards: an axis and where it lies, in pixels."""

    axis: Axis
    top: int = 24
    bottom: int = STRIP - 8

    def y(self, ratio: float) -> float:
        return round(self.bottom - (self.bottom - self.top) * self.axis.at(ratio) / 100, 1)

    def grid(self, as_change: bool) -> list[str]:
        parts = []
        for each in self.axis.ticks(CHANGES if as_change else RATIOS, 10):
            kind = "one" if each == 1 else "limit" if as_change and each == stats.SLOWER else "grid"
            parts.append(f'<line class="{kind}" x1="0" x2="100%" y1="{self.y(each)}" y2="{self.y(each)}"/>')
            parts.append(_text("-6", self.y(each) + 4, _label(each, as_change), anchor="end"))
        return parts

    def round(self, row: Sequence[float], xs: Sequence[float]) -> list[str]:
        """The median of one round as a line, and the pairs that are beyond the axis as pointers."""
        height, left, right = self.y(median(row)), max(xs[0] - 6, 0) / 10, min(xs[-1] + 6, 1000) / 10
        parts = [f'<line class="middle" x1="{left:.2f}%" x2="{right:.2f}%" y1="{height}" y2="{height}"/>']
        for ratio, x in zip(row, xs, strict=True):
            side = self.axis.clipped(ratio)
            if side:
                mark = f'<path class="point head" d="M-5 0H5L0 {-9 * side}Z"/>'
                parts.append(_at(round(x / 10, 2), str(self.y(ratio)), mark))
        return parts

    def dots(self, rows: Sequence[Sequence[float]], places: Sequence[Sequence[float]], kind: str) -> str:
        pairs = [pair for row, xs in zip(rows, places, strict=True) for pair in zip(xs, row, strict=True)]
        return _dots([(x, self.y(ratio)) for x, ratio in pairs if not self.axis.clipped(ratio)], STRIP, kind)


def _strip_axis(every: Sequence[float]) -> Axis:
    """At least from -6 to +7 %, without the few pairs that are further than FARTHEST from the median."""
    middle, ordered = median(every), sorted(every)
    edge = min(max(1, len(every) // 10), (len(every) - 1) // 2)
    low, high = min(ordered[edge], middle / FARTHEST), max(ordered[-1 - edge], middle * FARTHEST)
    near = [ratio for ratio in every if low <= ratio <= high]
    return Axis(min([0.94, *near]) / 1.01, max([1.07, *near]) * 1.01)


def _round_names(count: int, places: Sequence[Sequence[float]]) -> list[str]:
    """Lines between rounds, and their numbers above, as far as there is room."""
    parts, free = [], -1.0
    for index, row in enumerate(places):
        start = round(row[0] / 10, 2)
        if index:
            edge = round((places[index - 1][-1] + row[0]) / 20, 2)
            parts.append(_line(edge, "between again" if index == count else "between", "16"))
        text = {0: "round 1", count: "rerun"}.get(index, str(index + 1 - count * (index > count)))
        if start >= free or index == count:
            parts.append(_text(start, 11, text, "name", "start"))
            free = start + 2.5 * len(text) + 1.5
    return parts


def strip(
    name: str,
    title: str,
    rounds: Sequence[Sequence[float]],
    reruns: Sequence[Sequence[float]] = (),
    value: Interval | None = None,
    *,
    as_change: bool = True,
) -> str:
    """Every pair's ratio in its order, round by round, with the median of each: shows drift, steps and noise."""
    filled, again = [each for each in rounds if each], [each for each in reruns if each]
    rows, places = [*filled, *again], _places(filled, again)
    every = [ratio for row in rows for ratio in row]
    plane = _Plane(_strip_axis(every))
    body = []
    if value is not None:
        top, bottom = plane.y(value.high), plane.y(value.low)
        body.append(f'<rect class="band" x="0" width="100%" y="{top}" height="{max(bottom - top, 1):.1f}"/>')
    body += plane.grid(as_change)
    body += _round_names(len(filled), places) if as_change else []
    body += [part for row, xs in zip(rows, places, strict=True) for part in plane.round(row, xs)]
    body.append(plane.dots(filled, places[: len(filled)], "head"))
    for kind in ("head", "hole") if again else ():  # a ring is a dot with a smaller one on it
        body.append(plane.dots(again, places[len(filled) :], kind))
    form = words.percent if as_change else words.factor
    text = f"{words.plural(len(every), 'pair')}, from {form(min(every))} to {form(max(every))}."
    return svg(name, title, text, "".join(body), "strip", STRIP)


def _time_ticks(axis: Axis) -> list[float]:
    """Two to five round times."""
    step = 10 ** math.floor(math.log10(axis.high - axis.low))
    step = next(each for each in (step / 5, step / 2, step, step * 2) if (axis.high - axis.low) / each <= 5)
    first = math.ceil(axis.low / step)
    return [each * step for each in range(first, math.floor(axis.high / step) + 1)]


def both_times(name: str, title: str, base: Sequence[float], head: Sequence[float]) -> str:
    """Each sample's time per call, base above head, with the medians."""
    middles = {"base": median(base), "head": median(head)}
    farthest = 2 * max(middles.values())
    near = [each for each in [*base, *head] if each <= farthest]
    room = 0.04 * max(max(near) - min(near), 0.02 * max(near))
    axis = Axis(min(near) - room, max(near) + room, log=False)
    body = []
    for each in _time_ticks(axis):
        place = axis.at(each)
        body += [_line(place, "grid", "8", "134"), _text(place, 150, seconds(each), anchor=_anchor(place))]
    for side, row, y in (("base", base, 36), ("head", head, 100)):
        points = [(10 * axis.at(each), y + 5.0 * (index % 5 - 2)) for index, each in enumerate(row) if each <= farthest]
        body.append(_dots(points, STRIP, side))
        place = axis.at(middles[side])
        body += [_line(place, f"middle {side}", str(y - 20), str(y + 20)), _text("-6", y + 4, side, "name", "end")]
        beyond = len(row) - len(points)
        if beyond:
            body.append(_text("100%", y - 22, f"{beyond} beyond {seconds(farthest)} \u25b6", "beyond", "end"))
    text = f"Medians: base {seconds(middles['base'])}, head {seconds(middles['head'])} per call."
    return svg(name, title, text, "".join(body), "strip", STRIP)


def share(name: str, title: str, count: Count) -> str:
    """A count as a bar, what is allowed as a line at 80 % of the width; a count far above it has a pointed end."""
    assert count.value is not None
    assert count.allowed is not None
    axis = Axis(0.0, max(count.allowed, 1e-9) / 0.8, log=False)
    kind = "failed" if count.failed else "held"
    width, y = axis.at(count.value), "50%"
    body = f'<line class="bar {kind}" x1="0%" x2="{width}%" y1="{y}" y2="{y}"/>' if width else ""
    if axis.clipped(count.value) > 0:
        body += _at(100, y, f'<path class="point {kind}" d="M9 0L0 -6V6Z"/>')
    body += _line(axis.at(count.allowed), "floor", "15%", "85%")
    return svg(name, title, f"{words.number(count.value)}, allowed {words.number(count.allowed)}.", body, "row")
