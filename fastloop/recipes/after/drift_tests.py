# SPDX-License-Identifier: Apache-2.0
"""Distances and tests of two samples of one feature, in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy

from fastloop.recipes.after.intervals import chi_square

Array = numpy.ndarray
FEWEST_EXPECTED = 5.0  # of a cell, for chi-square's distribution to hold (Cochran 1954)


def binned(before: Array, now: Array, bins: int) -> tuple[Array, Array]:
    """Counts of both in the reference's bins of equal counts; of at most `bins` different values each is a bin.

    A value that is more frequent than a bin is a bin of its own; the outer bins reach to infinity.
    """
    values = numpy.unique(before)
    if len(values) <= bins:
        # The last cell is for all values that the reference has not.
        a = numpy.append(numpy.searchsorted(values, before), len(values))[:-1]
        place = numpy.searchsorted(values, now).clip(max=len(values) - 1)
        b = numpy.where(values[place] == now, place, len(values))
        counts = numpy.bincount(a, minlength=len(values) + 1), numpy.bincount(b, minlength=len(values) + 1)
        used = (counts[0] + counts[1]) > 0
        return counts[0][used], counts[1][used]
    edges = numpy.unique(numpy.quantile(before, numpy.arange(1, bins) / bins))
    a, b = (numpy.bincount(numpy.searchsorted(edges, x), minlength=len(edges) + 1) for x in (before, now))
    used = (a + b) > 0
    return a[used], b[used]


def counted(before: Array, now: Array) -> tuple[list[str], Array, Array]:
    """Categories of both, and their counts."""
    names, places = numpy.unique(numpy.concatenate([before, now]), return_inverse=True)
    a = numpy.bincount(places[: len(before)], minlength=len(names))
    b = numpy.bincount(places[len(before) :], minlength=len(names))
    return [str(name) for name in names], a, b


def psi(before: Array, now: Array) -> float:
    """Population stability index sum (q - p) ln(q/p) of counts; half a count is added to each, for empty cells."""
    p, q = ((x + 0.5) / (x.sum() + 0.5 * len(x)) for x in (before.astype(float), now.astype(float)))
    return float(((q - p) * numpy.log(q / p)).sum())


def kolmogorov_smirnov(a: Array, b: Array) -> tuple[float, float]:
    """(D, p): the largest distance of two empirical distribution functions, and its probability under one distribution.

    p = Q((sqrt(n) + 0.12 + 0.11/sqrt(n)) D), n = |a||b|/(|a|+|b|), Q(x) = 2 sum_k (-1)^(k-1) exp(-2 k^2 x^2)
    With ties p is too large, never too small.
    Source: Stephens, "Use of the Kolmogorov-Smirnov, Cramer-von Mises and related statistics without extensive tables",
    1970.
    """
    a, b = numpy.sort(a), numpy.sort(b)
    both = numpy.concatenate([a, b])
    steps = numpy.searchsorted(a, both, side="right") / len(a) - numpy.searchsorted(b, both, side="right") / len(b)
    distance = float(numpy.abs(steps).max())
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    return distance, _kolmogorov((root + 0.12 + 0.11 / root) * distance)


def _kolmogorov(x: float) -> float:
    if x < 0.2:  # 1 - Q is below 1e-12 there, and the series below converges slowly
        return 1.0
    terms = [2 * (-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101)]
    return min(1.0, max(0.0, math.fsum(terms)))


def chi_square_test(a: Array, b: Array) -> tuple[float, float | None]:
    """(statistic, p) of counts by category in two samples; p is None where one cell is left.

    Categories of which fewer than 5 are expected in either sample are taken together, with as many of the next larger
    ones as it takes to expect 5.
    """
    table: Any = numpy.stack([a, b]).astype(float)
    table = table[:, numpy.argsort(table.sum(0), kind="stable")]
    fewest = table.sum(0) * (table.sum(1).min() / table.sum())  # expected in the smaller sample
    rare = int((fewest < FEWEST_EXPECTED).sum())
    if rare:
        together = max(rare, int(numpy.searchsorted(fewest.cumsum(), FEWEST_EXPECTED)) + 1)
        table = numpy.concatenate([table[:, :together].sum(1, keepdims=True), table[:, together:]], axis=1)
    if table.shape[1] < 2:
        return 0.0, None
    expected = numpy.outer(table.sum(1), table.sum(0)) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    return statistic, chi_square(statistic, table.shape[1] - 1)
