# SPDX-License-Identifier: Apache-2.0
"""drift_report, against scipy and data whose drift is known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastloop.recipes.after import drift_report
from fastloop.recipes.after.drift_tests import binned, chi_square_test, kolmogorov_smirnov, psi
from fastloop.recipes.after.intervals import holm


def normal(samples: int, features: int = 3, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (samples, features))


def test_kolmogorov_smirnov_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n, m, shift in ((50, 70, 0), (200, 300, 0.15), (1000, 500, 0.1), (30, 30, 0.4)):
        a, b = normal(n, 1)[:, 0], normal(m, 1, seed=1, mean=shift)[:, 0]
        wanted = stats.ks_2samp(a, b, method="exact")
        distance, p = kolmogorov_smirnov(a, b)
        assert distance == pytest.approx(wanted.statistic, abs=1e-12)
        assert p == pytest.approx(wanted.pvalue, rel=0.25, abs=0.01)  # Stephens' approximation
    tied = np.array([0, 0, 1, 1, 2.0]), np.array([0, 1, 1, 1, 2, 2.0])
    assert kolmogorov_smirnov(*tied)[0] == pytest.approx(stats.ks_2samp(*tied).statistic)
    assert kolmogorov_smirnov(tied[0], tied[0]) == (0, 1)


def test_chi_square_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array([50, 30, 20]), np.array([40, 45, 25])
    wanted = stats.chi2_contingency(np.stack([a, b]), correction=False)
    assert chi_square_test(a, b) == pytest.approx((wanted.statistic, wanted.pvalue), rel=1e-10)
    merged = stats.chi2_contingency(np.array([[50, 30, 10], [40, 45, 8]]), correction=False)
    assert chi_square_test(np.array([50, 30, 6, 4]), np.array([40, 45, 3, 5])) == pytest.approx(
        (merged.statistic, merged.pvalue), rel=1e-10
    )
    assert chi_square_test(np.array([9]), np.array([7])) == (0, None)


def test_psi_by_hand() -> None:
    p, q = (10.5 / 21, 10.5 / 21), (15.5 / 21, 5.5 / 21)
    wanted = sum((y - x) * math.log(y / x) for x, y in zip(p, q, strict=True))
    assert psi(np.array([10, 10]), np.array([15, 5])) == pytest.approx(wanted)
    a, b = binned(np.arange(100.0), np.arange(50.0), 10)
    assert a.tolist() == [10] * 10
    assert b.tolist() == [10] * 5 + [0] * 5
    # A shift of a standard normal by d has PSI d^2 in the limit of many bins.
    before, now = normal(200_000, 1)[:, 0], normal(200_000, 1, seed=1, mean=0.3)[:, 0]
    assert psi(*binned(before, now, 50)) == pytest.approx(0.09, rel=0.05)


def test_few_values_are_bins_of_their_own() -> None:
    before = np.repeat([0.0, 1, 2], [80, 15, 5])
    a, b = binned(before, np.array([0.0, 1, 1, 2, 7, 0.5]), 10)
    assert a.tolist() == [80, 15, 5, 0]
    assert b.tolist() == [1, 2, 1, 2]
    constant = drift_report(np.ones((200, 1)), np.r_[np.ones(100), np.full(100, 2.0)][:, None])
    assert constant.drifted == ["0"]
    assert constant.features[0].outside == 0.5
    assert drift_report(np.ones((200, 1)), np.ones((150, 1))).drifted == []


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_feature_that_drifts_is_found() -> None:
    reference, current = normal(1000), normal(800, seed=1)
    current[:, 1] += 0.6
    made = drift_report(reference, current)
    assert made.drifted == ["1"]
    assert made.features[1].psi == pytest.approx(0.36, rel=0.3)
    assert [(f.level, f.where) for f in made.findings] == [("warning", "1")]
    assert str(made).splitlines()[2].startswith("1 ")  # the largest first
    again = json.loads(json.dumps(made.to_json()))
    assert again["drifted"] == ["1"]
    assert drift_report(torch.from_numpy(reference), torch.from_numpy(current)).features == made.features


def test_false_alarms_are_at_most_alpha() -> None:
    """Of 60 comparisons of 20 features each without drift, at alpha = 0.05: more than 8 has probability 0.003."""
    alarms = 0
    for seed in range(60):
        made = drift_report(normal(150, 20, seed), normal(120, 20, 1000 + seed), alpha=0.05)
        alarms += bool(made.drifted)
    assert alarms <= 8


def test_one_rare_category_raises_no_alarm() -> None:
    """One in 2000: in 5 % of the days' 100 samples there is one, and chi-square alone gives it p < 1e-4."""
    reference = np.arange(10_000) < 5
    made = drift_report({"rare": reference}, {"rare": np.arange(100) < 1})
    assert made.drifted == []
    assert made.features[0].p_value is None
    letters = np.array(list("abcd" * 2500 + "e" * 5))
    one = drift_report({"letter": letters}, {"letter": np.array(list("abcd" * 25 + "e"))})
    assert one.drifted == []
    assert one.features[0].p_value is not None


def test_a_data_frame_and_numbers_of_numpy() -> None:
    class Frame:
        """What a pandas DataFrame has."""

        columns = ("a",)

        def items(self) -> Any:
            return [("a", np.array([np.int64(3), None, np.float32(2.5)] * 20, dtype=object))]

    feature = drift_report(Frame(), {"a": [3, None, 2.5] * 20}).features[0]
    assert (feature.kind, feature.drifted) == ("numbers", False)
    assert feature.missing_before == pytest.approx(1 / 3)


def test_columns_of_a_dict() -> None:
    generator = np.random.default_rng(0)
    reference = {
        "age": generator.integers(18, 60, 500),
        "city": generator.choice(["A", "B"], 500).tolist(),
        "paid": generator.random(500) < 0.5,
        "income": [None if i % 50 == 0 else float(i) for i in range(500)],
    }
    current = {
        "city": ["A" if i % 2 else "C" for i in range(400)],
        "age": generator.integers(18, 60, 400),
        "paid": generator.random(400) < 0.5,
        "income": [None if i % 2 else float(i) for i in range(400)],
    }
    made = drift_report(reference, current)
    kinds = {f.name: f.kind for f in made.features}
    assert kinds == {"age": "numbers", "city": "categories", "paid": "categories", "income": "numbers"}
    by_name = {f.name: f for f in made.features}
    assert by_name["city"].new == ["C"]
    assert by_name["city"].drifted
    assert not by_name["paid"].drifted
    assert (by_name["income"].missing_before, by_name["income"].missing) == pytest.approx((0.02, 0.5))
    said = {(f.where, f.what.split(":")[0][:30]) for f in made.findings}
    assert ("city", "categories that the reference ") in said
    assert any(f.where == "income" and "missing" in f.what for f in made.findings)
    assert not [f for f in made.findings if f.where == "age"]


def test_units_that_have_changed_are_out_of_range() -> None:
    made = drift_report(normal(500, 1), normal(500, 1, seed=1) * 100)
    assert made.features[0].outside is not None
    assert made.features[0].outside > 0.9
    assert any("outside of the reference" in f.what for f in made.findings)


def test_datasets_and_predictions() -> None:
    x = torch.from_numpy(normal(200, 2)).float()
    data = TensorDataset(x, torch.zeros(200))
    wanted = drift_report(x, x + 1)
    assert drift_report(data, TensorDataset(x + 1)).features == wanted.features
    assert drift_report(DataLoader(data), x + 1).features == wanted.features
    assert wanted.drifted == ["0", "1"]
    assert drift_report(x[:, 0], x[:, 0].bfloat16()).drifted == []


def test_missing_values_of_an_array() -> None:
    current = normal(300, 2, seed=1)
    current[:100, 0] = math.nan
    made = drift_report(normal(300, 2), current)
    assert made.drifted == []
    assert [(f.where, f.level) for f in made.findings] == [("0", "warning")]
    current[:, 0] = math.nan
    gone = drift_report(normal(300, 2), current)
    assert [(f.where, f.level) for f in gone.findings] == [("0", "error")]
    assert gone.features[0].p_value is None


def test_too_few_samples_are_told() -> None:
    made = drift_report(normal(12, 1), normal(12, 1, seed=5, mean=0.5))
    assert made.drifted == []
    assert any("by chance alone" in f.what for f in made.findings)


@pytest.mark.parametrize(
    ("reference", "current", "options", "error", "words"),
    [
        (np.zeros((0, 2)), np.zeros((3, 2)), {}, ValueError, "reference must hold at least one"),
        (np.zeros((3, 2)), [], {}, ValueError, "current must hold at least one"),
        (np.zeros((3, 2)), np.zeros((3, 3)), {}, ValueError, "lacks none and has 2"),
        ({"a": [1]}, {"b": [1]}, {}, ValueError, "lacks a and has b"),
        ({"a": [1], "b": [1, 2]}, {"a": [1], "b": [1]}, {}, ValueError, "one length"),
        ({"a": [1]}, {"a": ["x"]}, {}, ValueError, "numbers in the reference and categories"),
        ({}, {}, {}, ValueError, "at least one sample and feature"),
        ({"a": "text"}, {"a": "text"}, {}, TypeError, "column of values"),
        ({"a": [1j]}, {"a": [1j]}, {}, TypeError, "complex"),
        ({"a": [[1]]}, {"a": [[1]]}, {}, ValueError, r"must be \[n\]"),
        (np.zeros((3, 2, 2)), np.zeros((3, 2, 2)), {}, ValueError, "of images"),
        (np.array([1, math.inf]), np.zeros(2), {}, ValueError, "1 infinite"),
        (7, np.zeros(2), {}, TypeError, "got int"),
        (np.zeros(3), np.zeros(3), {"bins": 1}, ValueError, "bins"),
        (np.zeros(3), np.zeros(3), {"alpha": 0}, ValueError, "alpha"),
    ],
)
def test_bad_input(reference: Any, current: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        drift_report(reference, current, **options)


def test_alpha_is_a_number() -> None:
    with pytest.raises(ValueError, match="alpha"):
        drift_report([1, 2], [1, 2], alpha="0.01")
