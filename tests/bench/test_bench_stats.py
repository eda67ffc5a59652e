# SPDX-License-Identifier: Apache-2.0
"""Intervals and verdicts on ratios whose truth is known because they are made up."""

from __future__ import annotations

import numpy as np
import pytest

from fastloop.bench import stats
from fastloop.bench.stats import Interval, Verdict


def noisy_ratios(true: float, pairs: int, seed: int, noise: float = 0.03) -> list[float]:
    """Paired ratios as a two-core machine gives them: log-normal noise, and one sample in ten disturbed by half."""
    generator = np.random.default_rng(seed)
    disturbed = np.where(generator.random(pairs) < 0.1, generator.choice([1.5, 1 / 1.5], pairs), 1.0)
    return list(true * np.exp(generator.normal(0, noise, pairs)) * disturbed)


def measured(true: float, seed: int) -> Interval:
    """The change that 20, 40 or 80 pairs show, as `measure_pairs` takes them."""
    ratios = noisy_ratios(true, stats.PAIRS[-1], seed)
    for count in stats.PAIRS:
        change = stats.median_interval(ratios[:count])
        if stats.decided(change):
            break
    return change


def verdicts(true: float, runs: int) -> list[Verdict]:
    """Verdicts of many runs of one truth, each with its rerun of 40 pairs."""
    return [
        stats.verdict(measured(true, seed), stats.median_interval(noisy_ratios(true, stats.RERUN_PAIRS, 10_000 + seed)))
        for seed in range(runs)
    ]


def test_identical_distributions_are_never_judged_changed() -> None:
    found = verdicts(1.0, 200)
    assert Verdict.REGRESSED not in found
    assert Verdict.IMPROVED not in found
    assert found.count(Verdict.PASS) > 180


@pytest.mark.parametrize(("true", "wanted"), [(1.15, Verdict.REGRESSED), (1 / 1.15, Verdict.IMPROVED)])
def test_a_planted_change_of_15_percent_is_found(true: float, wanted: Verdict) -> None:
    assert verdicts(true, 100).count(wanted) >= 98


def test_a_slow_down_of_3_percent_is_not_a_regression() -> None:
    assert Verdict.REGRESSED not in verdicts(1.03, 100)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = sum(1.0 in stats.median_interval(noisy_ratios(1.0, 40, seed)) for seed in range(300))
    # 98 % of 300 is 294; the percentile bootstrap of a median is a little narrow at 40 pairs.
    assert covered >= 285


@pytest.mark.parametrize(
    ("change", "rerun", "wanted"),
    [
        ((1.10, 1.04, 1.2), (1.09, 1.03, 1.2), Verdict.REGRESSED),
        ((1.10, 1.04, 1.2), (1.01, 0.99, 1.04), Verdict.INCONCLUSIVE),  # the rerun does not agree
        ((1.10, 1.04, 1.2), None, Verdict.INCONCLUSIVE),  # nothing confirms it
        ((1.10, 1.01, 1.2), (1.10, 1.01, 1.2), Verdict.INCONCLUSIVE),  # the lower end reaches below 1.02
        ((1.04, 1.03, 1.045), (1.1, 1.09, 1.2), Verdict.PASS),
        ((1.00, 0.98, 1.049), None, Verdict.PASS),
        ((1.00, 0.90, 1.06), None, Verdict.INCONCLUSIVE),
        ((0.90, 0.88, 0.95), (0.91, 0.89, 0.96), Verdict.IMPROVED),
        ((0.90, 0.88, 0.95), (1.00, 0.99, 1.01), Verdict.PASS),
        ((0.90, 0.88, 0.99), (0.90, 0.88, 0.95), Verdict.PASS),
    ],
)
def test_verdict(change: tuple[float, float, float], rerun: tuple[float, float, float] | None, wanted: Verdict) -> None:
    assert stats.verdict(Interval(*change), Interval(*rerun) if rerun else None) is wanted


def test_slowdown_compares_speed_ups_of_two_runs() -> None:
    before, after = noisy_ratios(2.0, 40, 1, noise=0.01), noisy_ratios(1.6, 40, 2, noise=0.01)
    change = stats.slowdown(before, after)
    assert change.low < 1.25 < change.high
    assert stats.looks_slower(change)
    assert stats.looks_faster(stats.slowdown(after, before))


@pytest.mark.parametrize(("median", "moved"), [(1.0, False), (1.019, False), (1.021, True), (0.97, True)])
def test_control_moves_by_more_than_2_percent(median: float, moved: bool) -> None:
    assert stats.control_moved(Interval(median, median, median)) is moved


def test_the_same_ratios_give_the_same_interval() -> None:
    ratios = noisy_ratios(1.2, 20, 3)
    assert stats.median_interval(ratios) == stats.median_interval(ratios)


@pytest.mark.parametrize("ratios", [[], [1.0, 0.0], [float("nan")], [float("inf")], [-1.0]])
def test_ratios_that_cannot_be_are_refused(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match=r"\[bench\]"):
        stats.median_interval(ratios)
