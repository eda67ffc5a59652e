# SPDX-License-Identifier: Apache-2.0
"""Intervals and exact tests that the verdicts rest on. Arithmetic only, in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy
import torch

from fastloop.bench.stats import LEVEL, RESAMPLES

CHUNK = 2**22  # indices drawn at a time: 32 MiB
FEW = 16  # different values, such as of right or wrong
MANY = 20_000  # values of which the mean is normal enough: the bootstrap draws 4000 times as many indices


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 98 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int) -> Estimate:
    """A share with Wilson's 98 % score interval, which holds for few trials and for shares near 0 and 1 too.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.

    Raises:
        ValueError: no trials.
    """
    if trials < 1:
        raise ValueError(f"[wilson] trials must be at least 1, got {trials}")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return Estimate(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def mean_interval(values: numpy.ndarray, seed: int = 0) -> Estimate:
    """The mean of values [n] and its 98 % percentile-bootstrap interval; the same seed gives the same interval.

    Of more than 20 000 values mean -+ z s/sqrt(n), which the bootstrap's comes to.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    array = numpy.asarray(values, dtype=numpy.float64)
    values, counts = numpy.unique(array, return_counts=True)
    if len(values) <= FEW:  # how often each value is drawn is multinomial: the same bootstrap without an index a sample
        drawn = numpy.random.default_rng(seed).multinomial(array.size, counts / array.size, size=RESAMPLES)
        low, high = numpy.quantile(drawn @ values / array.size, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(array.mean()), float(low), float(high))
    if array.size > MANY:
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * float(array.std(ddof=1)) / math.sqrt(array.size)
        return Estimate(float(array.mean()), float(array.mean()) - half, float(array.mean()) + half)
    generator = numpy.random.default_rng(seed)
    rows = max(1, CHUNK // array.size)
    means = [
        array[generator.integers(0, array.size, size=(min(rows, RESAMPLES - done), array.size))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = numpy.quantile(numpy.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(array.mean()), float(low), float(high))


def mcnemar(only_a: int, only_b: int) -> float:
    """p of McNemar's exact test: both models are right equally often, seen from the samples where one of them is.

    min(1, 2 sum_{k <= min(a, b)} C(a + b, k) / 2^(a + b))
    Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    count = only_a + only_b
    if count == 0:
        return 1.0
    k = torch.arange(min(only_a, only_b) + 1, dtype=torch.float64)
    whole = torch.tensor(float(count), dtype=torch.float64)
    logs = torch.lgamma(whole + 1) - torch.lgamma(k + 1) - torch.lgamma(whole - k + 1) - count * math.log(2)
    return min(1.0, 2 * float(torch.logsumexp(logs, 0).exp()))


def chi_square(statistic: float, degrees: int) -> float:
    """P(X >= statistic) of the chi-square distribution: Q(degrees/2, statistic/2)."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values, each to be compared with alpha: all tests together err with probability alpha at most.

    In ascending order, the running maximum of (tests left) * p.
    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
