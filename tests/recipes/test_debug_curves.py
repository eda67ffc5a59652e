# SPDX-License-Identifier: Apache-2.0
"""Curves: each symptom is found in a curve that has it, and none in healthy ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.recipes.debug import diagnose_curves, diagnose_plateau
from fastloop.recipes.debug.series import change, slope, trend

N = 100
STEPS = numpy.arange(N) * 10


def noisy(values: Any, noise: float = 0.02, seed: int = 0) -> list[tuple[int, float]]:
    drawn = numpy.random.default_rng(seed).normal(0, noise, len(values))
    return [(int(step), float(v + d)) for step, v, d in zip(STEPS, values, drawn, strict=False)]


def decay(start: float = 2.3, end: float = 0.3, rate: float = 4.0) -> Any:
    return end + (start - end) * numpy.exp(-rate * numpy.linspace(0, 1, N))


def curves(train: Any, val: Any = None, **more: Any) -> dict[str, Any]:
    made = {"train/loss": train}
    if val is not None:
        made["val/loss"] = val[::5]
    return made | more


def said(found: Any) -> str:
    return "\n".join(str(finding) for finding in found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["usual", "still falling", "noisy", "dropout", "low", "regression", "language model"])
def test_healthy_curves_have_no_findings(kind: str, seed: int) -> None:
    train, val, noise, classes = decay(), decay() + 0.05, 0.02, 10
    if kind == "still falling":
        train, val = decay(rate=2), decay(rate=2)
    elif kind == "noisy":
        noise = 0.08
    elif kind == "dropout":  # training is worse than validation
        val = decay() * 0.9
    elif kind == "low":
        train, val, noise = decay(end=0.01), decay(end=0.011), 0.001
    elif kind == "regression":
        train, val, noise, classes = 40 * decay(), 41 * decay(), 0.5, None
    elif kind == "language model":  # most of the loss stays: log(50000) to 4
        train, val, noise, classes = decay(10.8, 3.9), decay(10.8, 4.0), 0.03, 50000
    found = diagnose_curves(curves(noisy(train, noise, seed), noisy(val, noise / 4, seed + 50)), classes=classes)
    assert said(found) == ""


def test_what_is_not_finite_is_an_error_with_its_step() -> None:
    train = [(s, v if s < 500 else math.nan) for s, v in noisy(decay())]
    found = diagnose_curves(curves(train, skipped=[(10, 0.0), (900, 3.0)]))
    assert found[0].level == "error"
    assert "from step 500" in found[0].what
    assert "3 windows" in said(found)


def test_symptoms_of_the_training_loss() -> None:
    wild = 1.5 + 0.8 * numpy.sin(2.5 * numpy.arange(N))
    assert "oscillates" in said(diagnose_curves(curves(noisy(wild))))
    assert "log(10) = 2.3" in said(diagnose_curves(curves(noisy(numpy.full(N, math.log(10)))), classes=10))
    assert "log(" not in said(diagnose_curves(curves(noisy(numpy.full(N, 0.4), 0.001)), classes=10))
    assert "does not fall" in said(diagnose_curves(curves(noisy(numpy.full(N, 1.0)))))
    up_again = numpy.concatenate([decay(rate=8)[:50], 0.3 + numpy.linspace(0, 1.5, 50)])
    found = said(diagnose_curves(curves(noisy(up_again))))
    assert "rises again" in found
    assert "learning rate" in found
    assert "falls slowly" in said(diagnose_curves(curves(noisy(numpy.linspace(2.3, 2.0, N)))))
    flat_and_high = 1.6 + 0.7 * numpy.exp(-numpy.arange(N) / 5)
    assert "underfitting" in said(diagnose_curves(curves(noisy(flat_and_high), noisy(flat_and_high + 0.05))))
    spiky = decay()
    spiky[[60, 80, 90]] += 3
    assert "3 spikes, the first at step 600" in said(diagnose_curves(curves(noisy(spiky))))


def test_overfitting_is_of_validation_while_training_falls() -> None:
    val = numpy.concatenate([decay(2.3, 0.8, 8)[:40], 0.8 + numpy.linspace(0, 0.6, 60)])
    found = diagnose_curves(curves(noisy(decay()), noisy(val)))
    assert [f.where for f in found] == ["val/loss"]
    assert "while the training loss falls" in found[0].what
    gap = diagnose_curves(curves(noisy(decay(end=0.1, rate=12)), noisy(decay(end=0.9, rate=12), 0.01)))
    assert "times the training loss: overfitting" in said(gap)
    both = diagnose_curves(curves(noisy(val, 0.02, 3), noisy(val)))
    assert "as the training loss does not fall" in said(both)
    assert "overfitting" not in said(both)


def test_gradients_that_explode_and_vanish() -> None:
    healthy = noisy(numpy.full(N, 1.0), 0.1)
    assert said(diagnose_curves(curves(noisy(decay()), grad_norm=healthy))) == ""
    healthy[70] = (700, 900.0)
    assert "explodes" in said(diagnose_curves(curves(noisy(decay()), grad_norm=healthy)))
    tiny = [(s, 1e-9) for s, _ in healthy]
    assert "vanishes" in said(diagnose_curves(curves(noisy(decay()), grad_norm=tiny)))


def test_few_points_are_said_to_be_few() -> None:
    found = diagnose_curves({"train/loss": [(0, 1.0), (1, 5.0), (2, 0.1)], "val/loss": [(2, 3.0)]})
    assert [f.level for f in found] == ["note", "note"]
    assert "too few" in found[0].what


def test_all_forms_of_a_history_say_the_same(tmp_path: Path) -> None:
    train = noisy(numpy.full(N, math.log(10)))
    rows = [{"step": step, "train/loss": value, "name": "a", "flag": True} for step, value in train]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = said(diagnose_curves({"train/loss": train}, classes=10))
    assert "log(10)" in expected
    for given_as in (rows, tmp_path, str(tmp_path), {"train/loss": [v for _, v in train]}):
        assert said(diagnose_curves(given_as, classes=10)) == expected


def test_bad_input_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl must exist"):
        diagnose_curves(tmp_path)
    with pytest.raises(ValueError, match="wants a training loss"):
        diagnose_curves({})
    with pytest.raises(TypeError, match="must be numbers or pairs"):
        diagnose_curves({"train/loss": ["high"]})
    with pytest.raises(TypeError, match="rows must be dicts"):
        diagnose_curves([1.0])
    with pytest.raises(TypeError, match="got int"):
        diagnose_curves(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classes must be an integer"):
        diagnose_curves({"train/loss": [1.0]}, classes=1)


# ---- trends


@given(st.lists(st.integers(-5, 5), min_size=4, max_size=25))
def test_slope_and_trend_are_those_of_their_definitions(values: list[int]) -> None:
    points = [(float(i), float(v)) for i, v in enumerate(values)]
    pairs = [(i, j) for i in range(len(values)) for j in range(i + 1, len(values))]
    assert slope(points) == pytest.approx(numpy.median([(values[j] - values[i]) / (j - i) for i, j in pairs]))
    assert change(points) == pytest.approx(slope(points) * (len(values) - 1))
    score = sum(int(numpy.sign(values[j] - values[i])) for i, j in pairs)
    counts = numpy.unique(values, return_counts=True)[1]
    n = len(values)
    variance = (n * (n - 1) * (2 * n + 5) - sum(c * (c - 1) * (2 * c + 5) for c in counts)) / 18
    sure = variance > 0 and (abs(score) - 1) / math.sqrt(variance) > 1.96
    assert trend(points) == (int(numpy.sign(score)) if sure else 0)


def test_noise_has_rarely_a_trend() -> None:
    found = [trend(noisy(numpy.zeros(50), 1.0, seed)) for seed in range(100)]
    assert sum(map(abs, found)) <= 12  # 5 expected; more than 12 in 1 of 500


# ---- plateaus


def plateau(val: Any, train: Any = None, noise: float = 0.0, metric: str = "val/loss", **options: Any) -> Any:
    given_as = {metric: noisy(val, noise)}
    if train is not None:
        given_as["train/loss"] = noisy(train, noise)
    given_as.update(options.pop("more", {}))
    return diagnose_plateau(given_as, metric=metric, **options)


def test_steady_small_progress_is_no_plateau_and_noise_is_one() -> None:
    steady = numpy.linspace(0.5, 0.48, 10)  # its standard deviation is 0.006; of a hundredth of that too:
    assert not plateau(steady).plateaued
    assert not plateau(0.5 - numpy.arange(10) * 1e-4, tolerance=1e-3).plateaued
    assert plateau(0.5 - numpy.arange(10) * 1e-5, tolerance=1e-3).plateaued
    assert all(plateau(numpy.full(10, 0.5), noise=0.05 + i / 1e9).plateaued for i in range(3))


def test_causes_of_a_plateau() -> None:
    flat, falling = numpy.full(20, 0.8), numpy.linspace(0.8, 0.2, 20)
    over = plateau(flat, falling, noise=0.001)
    assert over.plateaued
    assert over.cause == "overfitting"
    assert over.gap == pytest.approx(0.44, abs=0.05)
    assert over.train_change < -0.2
    assert abs(over.val_change) < 0.01
    under = plateau(flat, flat - 0.01, noise=0.001)
    assert under.cause == "underfitting"
    assert "the training loss" in str(under)
    rates = [(int(s), r) for s, r in zip(STEPS[:20], numpy.linspace(1e-3, 1e-6, 20), strict=True)]
    assert plateau(flat, flat, noise=0.001, more={"lr": rates}).cause == "learning rate"
    wild = 0.8 + 0.5 * (-1.0) ** numpy.arange(20)
    assert plateau(flat, wild, noise=0.001).cause == "learning rate"
    alone = plateau(flat)
    assert alone.plateaued
    assert alone.cause is None
    assert alone.gap is None


def test_accuracies_are_compared_with_accuracies_and_never_with_a_loss() -> None:
    flat = numpy.full(20, 0.7)
    pair = plateau(
        flat, numpy.full(20, 0.6), metric="val/accuracy", mode="max", more={"train/accuracy": noisy(flat + 0.25, 0)}
    )
    assert pair.cause == "overfitting"
    assert pair.gap == pytest.approx(0.25)
    # without a training accuracy the losses are compared: 1 - 0.6 is no accuracy
    losses = plateau(
        flat, numpy.full(20, 0.6), metric="val/accuracy", mode="max", more={"val/loss": noisy(flat * 0 + 0.62, 0)}
    )
    assert losses.cause == "underfitting"
    assert losses.gap == pytest.approx(0.02)
    rising = plateau(numpy.linspace(0.6, 0.8, 20), metric="val/accuracy", mode="max")
    assert not rising.plateaued
    assert "still improves" in str(rising)
    worse = plateau(numpy.linspace(0.8, 0.6, 20), metric="val/accuracy", mode="max")
    assert worse.plateaued


def test_few_evaluations_and_bad_input() -> None:
    few = plateau(numpy.full(5, 1.0))
    assert not few.plateaued
    assert few.cause is None
    assert "too few" in str(few)
    assert few.to_json()["findings"][0]["level"] == "note"
    for options, text in (
        ({"mode": "best"}, "mode must be"), ({"window": 3}, "window must be an integer"),
        ({"tolerance": -1.0}, "tolerance must be"), ({"metric": "val/f1"}, "is none of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            diagnose_plateau({"val/loss": [1.0] * 10}, **options)  # type: ignore[arg-type]
