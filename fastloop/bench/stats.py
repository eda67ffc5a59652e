# SPDX-License-Identifier: Apache-2.0
"""Medians of paired ratios, their bootstrap intervals, and the verdicts that follow from them.

Everything here is arithmetic on lists of ratios: no clocks, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

LEVEL = 0.98
RESAMPLES = 4000
PAIRS = (20, 40, 80)  # 20 pairs, then 40, then 80 while undecided
RERUN_PAIRS = 40

SLOWER = 1.05  # a median above this is a regression,
SURELY_SLOWER = 1.02  # if the interval's lower end is above this
CONTROL_MOVED = 0.02


@dataclass(frozen=True)
class Interval:
    """A median with the two ends of its bootstrap interval."""

    median: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


class Verdict(str, Enum):
    """What a change did to one case."""

    REGRESSED = "REGRESSED"
    IMPROVED = "IMPROVED"
    PASS = "PASS"
    INCONCLUSIVE = "INCONCLUSIVE"
    VOID = "VOID"


def _medians(values: Sequence[float], seed: int) -> np.ndarray:
    """Medians of RESAMPLES resamples with replacement; the seed is fixed: the same ratios give the same interval."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, array.size, size=(RESAMPLES, array.size))
    return np.median(array[picks], axis=1)


def _interval(median: float, medians: np.ndarray) -> Interval:
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(median), float(low), float(high))


def median_interval(ratios: Sequence[float]) -> Interval:
    """The median of `ratios` and its 98 % percentile-bootstrap interval.

    Raises ValueError when `ratios` is empty or holds a value that is not positive and finite.
    Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    return _interval(float(np.median(_checked(ratios))), _medians(ratios, seed=0))


def _checked(ratios: Sequence[float]) -> Sequence[float]:
    if not len(ratios):
        raise ValueError("[bench] an interval needs at least one ratio, got none; measure at least one pair")
    bad = [ratio for ratio in ratios if not 0 < ratio < float("inf")]
    if bad:
        raise ValueError(f"[bench] ratios must be positive and finite, got {bad[0]}; look for a sample of 0 s")
    return ratios


def rounds_interval(rounds: Sequence[Sequence[float]]) -> Interval:
    """The median of all ratios and its 98 % interval, where a round's ratios share what another round's do not.

    Two processes of the same code differ by where the system placed their memory; that stays for as long as they live.
    So rounds (a fresh pair of processes each) are resampled first, then the pairs within each.
    Raises ValueError as `median_interval` does, and for rounds of different lengths.
    Reference: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8.
    """
    whole = float(np.median(_checked([ratio for each in rounds for ratio in each])))
    if len({len(each) for each in rounds}) != 1:
        raise ValueError(f"[bench] rounds must be of one length, got {sorted({len(each) for each in rounds})}")
    array = np.asarray(rounds, dtype=np.float64)
    count, length = array.shape
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, count, size=(RESAMPLES, count, 1))
    pairs = generator.integers(0, length, size=(RESAMPLES, count, length))
    return _interval(whole, np.median(array[chosen, pairs].reshape(RESAMPLES, -1), axis=1))


def difference_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The median of a - b, pair by pair, and its 98 % percentile-bootstrap interval."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return _interval(float(np.median(differences)), _medians(differences, seed=0))


def slowdown(before: Sequence[float], after: Sequence[float]) -> Interval:
    """How much slower `after` is, both being speed-ups over the same peer: median(before) / median(after).

    The two runs are resampled independently of each other: pairs exist within a run, not across runs.
    """
    a, b = median_interval(before), median_interval(after)
    return _interval(a.median / b.median, _medians(before, seed=1) / _medians(after, seed=2))


def looks_slower(change: Interval) -> bool:
    """Whether `change` (new time / old time) asks for the rerun that a REGRESSED needs."""
    return change.median > SLOWER and change.low > SURELY_SLOWER


def looks_faster(change: Interval) -> bool:
    """The mirror image of `looks_slower`."""
    return change.median < 1 / SLOWER and change.high < 1 / SURELY_SLOWER


def verdict(change: Interval, rerun: Interval | None = None) -> Verdict:
    """The verdict on `change` (new time / old time); `rerun` is the same quantity from 40 fresh pairs.

    REGRESSED and IMPROVED need a rerun that agrees: without one such a change is INCONCLUSIVE (or PASS, where
    its upper end is below 1.05).
    """
    if rerun is not None:
        if looks_slower(change) and looks_slower(rerun):
            return Verdict.REGRESSED
        if looks_faster(change) and looks_faster(rerun):
            return Verdict.IMPROVED
    return Verdict.PASS if change.high < SLOWER else Verdict.INCONCLUSIVE


def decided(change: Interval) -> bool:
    """Whether more pairs could not change what `verdict` would say of `change`."""
    return looks_slower(change) or looks_faster(change) or change.high < SLOWER


def control_moved(control: Interval) -> bool:
    """Whether the control case, the same code on both sides, is off by more than 2 %: the run is then VOID."""
    return abs(control.median - 1) > CONTROL_MOVED
