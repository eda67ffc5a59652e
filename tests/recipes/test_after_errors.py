# SPDX-License-Identifier: Apache-2.0
"""error_analysis, against scikit-learn and closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastloop.recipes.after import error_analysis
from fastloop.recipes.after.intervals import mean_interval, wilson
from fastloop.recipes.after.metrics import calibration_error

IDENTITY = nn.Identity()  # data are the outputs


def classes(samples: int = 300, count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are right most of the time, and targets."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(count, (samples,), generator=generator)
    logits = torch.randn(samples, count, generator=generator) + 1.5 * nn.functional.one_hot(target, count)
    return logits, target


def test_metrics_are_scikit_learns() -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    logits, target = classes()
    logits[:, 3] -= 20  # never predicted
    made = error_analysis(IDENTITY, (logits, target), batch_size=64)
    prediction = logits.argmax(1)
    assert made.confusion is not None
    assert made.confusion.tolist() == oracle.confusion_matrix(target, prediction).tolist()
    for average in ("macro", "weighted"):
        wanted = oracle.precision_recall_fscore_support(target, prediction, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), wanted[:3], strict=True):
            assert made.metrics[f"{average}_{name}"] == pytest.approx(value, rel=1e-12)
    by_class = oracle.precision_recall_fscore_support(target, prediction, zero_division=0)
    for i, score in enumerate(made.by_class):
        assert (score.precision, score.recall, score.f1) == pytest.approx([column[i] for column in by_class[:3]])
        assert score.samples == by_class[3][i]
    assert made.metrics["accuracy"] == oracle.accuracy_score(target, prediction)
    assert made.metrics["loss"] == pytest.approx(
        oracle.log_loss(target, logits.double().softmax(1).numpy(), labels=range(4)), rel=1e-9
    )
    assert made.samples == 300


def test_averages_are_over_the_classes_that_occur() -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    logits, target = classes(count=3)
    wide = torch.cat([logits, torch.full((300, 2), -50.0)], 1)  # two classes that nobody has
    made = error_analysis(IDENTITY, (wide, target))
    assert made.metrics["macro_f1"] == pytest.approx(oracle.f1_score(target, logits.argmax(1), average="macro"))
    assert {f.where for f in made.findings if "no samples" in f.what} == {"class 3", "class 4"}


def test_worst_samples_and_confused_pairs() -> None:
    logits = torch.tensor([[4.0, 0, 0], [0, 9, 0], [0, 5, 0], [0, 0, 1], [3, 0, 0], [0, 2, 0]])
    target = torch.tensor([0, 0, 0, 2, 2, 1])
    made = error_analysis(IDENTITY, (logits, target), classes=["a", "b", "c"], worst=3, batch_size=2)
    losses = nn.functional.cross_entropy(logits.double(), target, reduction="none")
    assert [w.index for w in made.worst] == [1, 2, 4]
    assert made.worst[0].loss == pytest.approx(float(losses[1]))
    assert (made.worst[0].target, made.worst[0].prediction) == ("a", "b")
    assert made.worst[0].probability == pytest.approx(float(logits[1].softmax(0)[1]))
    assert [(c.target, c.prediction, c.samples) for c in made.confused] == [("a", "b", 2), ("c", "a", 1)]
    assert made.confused[0].share == pytest.approx(2 / 3)
    assert "predicted as" in str(made)


@pytest.mark.parametrize("form", ["logits", "log-probabilities", "probabilities"])
def test_logits_and_probabilities_are_told_apart(form: str) -> None:
    logits, target = classes()
    given = {"logits": logits, "log-probabilities": logits.log_softmax(1), "probabilities": logits.softmax(1)}[form]
    made = error_analysis(IDENTITY, (given, target), batch_size=7)
    assert made.metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, target)), rel=1e-5)
    assert any("taken for probabilities" in f.what for f in made.findings) == (form == "probabilities")


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("floats", [False, True])
def test_one_output_for_two_classes(shape: tuple[int, ...], floats: bool) -> None:
    logits, target = classes(count=2)
    single = (logits[:, 1] - logits[:, 0]).reshape(shape)
    given = target.float() if floats else target
    made = error_analysis(IDENTITY, (single, given), classes=2)
    wanted = error_analysis(IDENTITY, (logits, target))
    assert made.confusion is not None
    assert made.confusion.tolist() == wanted.confusion.tolist()  # type: ignore[union-attr]
    assert made.metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=1e-5)
    probable = error_analysis(IDENTITY, (single.sigmoid(), given), classes=2)
    assert probable.confusion.tolist() == made.confusion.tolist()  # type: ignore[union-attr]
    assert probable.metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=1e-5)


def test_calibration_error() -> None:
    # Two bins: 4 samples at 0.9 of which 2 are right, 6 at 0.6 of which 3 are right.
    probability = torch.tensor([0.9] * 4 + [0.6] * 6, dtype=torch.float64)
    right = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    assert calibration_error(probability, right) == pytest.approx(0.4 * 0.4 + 0.6 * 0.1)
    logits, target = classes(samples=400)
    sure = error_analysis(IDENTITY, (logits * 20, target))
    assert any(f.where == "probabilities" and "overconfident" in f.what for f in sure.findings)


def test_a_worse_group_is_found_and_an_equal_one_is_not() -> None:
    logits, target = classes(samples=600)
    names = ["north" if i % 3 else "south" for i in range(600)]
    fair = error_analysis(IDENTITY, (logits, target), groups=names)
    assert not [f for f in fair.findings if f.where.startswith("group")]
    south = torch.tensor([name == "south" for name in names])
    target = torch.where(south & (torch.arange(600) % 2 == 0), (target + 1) % 4, target)
    made = error_analysis(IDENTITY, (logits, target), groups=names)
    assert made.groups[0].name == "south"
    right = (logits.argmax(1) == target)[south]
    wanted = wilson(int(right.sum()), len(right))
    assert (made.groups[0].value, made.groups[0].low, made.groups[0].high) == (wanted.value, wanted.low, wanted.high)
    found = [f for f in made.findings if f.where == "group south"]
    assert [f.level for f in found] == ["warning"]
    same = error_analysis(IDENTITY, TensorDataset(logits, target), groups=lambda s: int(s[0][0] > 0))
    assert {g.name for g in same.groups} == {"0", "1"}
    assert sum(g.samples for g in same.groups) == 600


def test_wilson_is_the_textbooks() -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes, trials in ((0, 7), (7, 7), (3, 10), (480, 1000)):
        wanted = stats.binomtest(successes, trials).proportion_ci(0.98, method="wilson")
        got = wilson(successes, trials)
        assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_the_bootstrap_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(2, 3, 400)
    made = mean_interval(values)
    half = 2.326 * values.std() / 20
    assert (made.low, made.high) == pytest.approx((made.value - half, made.value + half), abs=0.08)
    assert made == mean_interval(values)
    assert made != mean_interval(values, seed=1)


def test_regression_is_scikit_learns() -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(200, 2, generator=generator)
    output = target + 0.3 * torch.randn(200, 2, generator=generator)
    made = error_analysis(IDENTITY, (output, target), worst=2, groups=[i % 2 for i in range(200)])
    assert made.task == "regression"
    assert made.metrics["r2"] == pytest.approx(oracle.r2_score(target, output), rel=1e-6)
    assert made.metrics["mae"] == pytest.approx(oracle.mean_absolute_error(target, output), rel=1e-6)
    assert made.metrics["rmse"] == pytest.approx(oracle.mean_squared_error(target, output) ** 0.5, rel=1e-6)
    assert made.worst[0].index == int((output - target).square().mean(1).argmax())
    assert len(made.worst[0].prediction) == 2
    assert [g.samples for g in made.groups] == [100, 100]
    single = error_analysis(IDENTITY, (output[:, :1], target[:, 0]))  # [n, 1] against [n]: no broadcast to [n, n]
    assert single.metrics["r2"] == pytest.approx(oracle.r2_score(target[:, 0], output[:, 0]), rel=1e-6)


def test_a_biased_and_a_useless_regression_are_told() -> None:
    target = torch.randn(100, generator=torch.Generator().manual_seed(0))
    biased = error_analysis(IDENTITY, (target + 0.3 + 0.01 * target.flip(0), target))
    assert any("on average" in f.what for f in biased.findings)
    useless = error_analysis(IDENTITY, (target.flip(0) * 3, target))
    assert any(f.level == "error" and "R^2" in f.what for f in useless.findings)
    constant = error_analysis(IDENTITY, (target, torch.ones(100)))
    assert math.isnan(constant.metrics["r2"])
    assert constant.to_json()["metrics"]["r2"] is None


def test_a_model_that_says_one_class() -> None:
    _, target = classes()
    made = error_analysis(IDENTITY, (torch.tensor([[0.0, 1, 0, 0]]).expand(300, 4), target))
    assert [f.level for f in made.findings] == ["error"]
    assert made.metrics["macro_recall"] == pytest.approx(0.25)
    logits, _ = classes()
    one = error_analysis(IDENTITY, (logits, torch.zeros(300, dtype=torch.long)))
    assert any("all samples are of class '0'" in f.what for f in one.findings)


def test_a_class_that_is_missed_is_told() -> None:
    logits, target = classes(samples=600)
    logits[target == 2] += torch.tensor([5.0, 0, 0, 0])
    made = error_analysis(IDENTITY, (logits, target))
    assert [f.where for f in made.findings if "recall" in f.what] == ["class 2"]


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        ((torch.zeros(3, 2), torch.tensor([0, 1, 2])), {}, ValueError, r"\[0, 2\), got 0 to 2"),
        ((torch.zeros(3, 2), torch.tensor([0, -100, 1])), {}, ValueError, "got -100"),
        ((torch.tensor([[0.0, 1], [math.nan, 0]]), torch.tensor([0, 1])), {}, ValueError, "of sample 1 are not"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)), {}, ValueError, "as many numbers"),
        ((torch.zeros(2, 3), torch.zeros(2)), {}, ValueError, "as many numbers"),
        ((torch.zeros(2), torch.tensor([0.0, math.inf])), {}, ValueError, "targets must be finite"),
        (
            (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)),
            {"classes": 4},
            ValueError,
            "says 4, the model gives 3",
        ),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"classes": 3}, ValueError, "leave classes= out"),
        ((torch.zeros(2), torch.tensor([0.0, 0.5])), {"classes": 2}, ValueError, "whole numbers"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), {"classes": ["a", "a", "b"]}, ValueError, "differ"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), {"classes": 1}, ValueError, "at least 2"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), {"classes": "abc"}, TypeError, "number or names"),
        (
            (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)),
            {"groups": ["a"]},
            ValueError,
            "each of 2 samples, got 1",
        ),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), {"groups": "ab"}, TypeError, "got str"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), {"worst": -1}, ValueError, "worst"),
        (torch.zeros(2, 3), {}, TypeError, "targets as a tensor, got none"),
        ((torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), {}, ValueError, "at least one sample"),
        ([torch.zeros(2, 3)], {"groups": lambda s: 1}, TypeError, "targets"),
    ],
)
def test_bad_input(data: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        error_analysis(IDENTITY, data, **options)


def test_groups_by_function_need_samples() -> None:
    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(TypeError, match="one by one"):
        error_analysis(IDENTITY, batches, groups=lambda s: 1)


class Wrapped(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return {"dict": {"logits": x, "hidden": 1}, "tuple": (x, None), "none": {"y": x}}[self.form]


def test_the_logits_among_several_outputs() -> None:
    logits, target = classes()
    wanted = error_analysis(IDENTITY, (logits, target)).metrics
    assert error_analysis(Wrapped("dict"), (logits, target)).metrics == wanted
    assert error_analysis(Wrapped("tuple"), (logits, target)).metrics == wanted
    with pytest.raises(TypeError, match="wrap it"):
        error_analysis(Wrapped("none"), (logits, target))


def test_it_is_json_and_recorded(tmp_path: Path) -> None:
    logits, target = classes()
    made = error_analysis(IDENTITY, DataLoader(TensorDataset(logits, target), batch_size=9), groups=target)
    again = json.loads(json.dumps(made.to_json()))
    assert again["metrics"]["accuracy"] == made.metrics["accuracy"]
    assert "outcomes" not in again
    made.record(tmp_path)
    assert "error_analysis" in (tmp_path / "practices.jsonl").read_text()
    many = error_analysis(IDENTITY, (torch.randn(60, 60), torch.arange(60)))
    assert many.to_json()["confusion"] is None


@pytest.mark.parametrize("count", [2, 70])
def test_the_matrix_is_drawn(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    logits, target = classes(count=count)
    path = error_analysis(IDENTITY, (logits, target)).plot(tmp_path / "matrix.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_residuals_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    x = torch.randn(50)
    assert error_analysis(IDENTITY, (x, x + 0.1)).plot(tmp_path / "residuals.svg").exists()


def test_equal_targets_have_no_r2() -> None:
    """Their mean is rounded, and the sum of squares around it is 1e-31, not 0."""
    target = torch.full((1000, 1), 0.1, dtype=torch.float64)
    made = error_analysis(IDENTITY, (target + 1, target))
    assert math.isnan(made.metrics["r2"])
    assert any("R^2 is not defined" in f.what for f in made.findings)


def test_the_picture_shows_all_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every 4th number of [10000, 2] would be of the first column only."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    shown: list[Any] = []
    scatter = axes.scatter
    monkeypatch.setattr(axes, "scatter", lambda self, x, y, **rest: shown.append(x) or scatter(self, x, y, **rest))
    target = torch.tensor([[1.0, 2.0]]).repeat(10_000, 1)
    error_analysis(IDENTITY, (target, target)).plot(tmp_path / "r.png")
    assert set(shown[0].tolist()) == {1.0, 2.0}


def test_intervals_of_few_values_and_of_many_samples() -> None:
    """Three ways to one interval: indices, multinomial counts, and the normal distribution of a mean.

    An end of a 98 % bootstrap interval is off by sqrt(0.01 * 0.99 / 4000) / phi(2.33) = 0.06 standard errors.
    """
    random = np.random.default_rng(0)
    right = (random.random(5000) < 0.8).astype(float)
    drawn = mean_interval(right + 1e-9 * random.random(5000))  # 5000 different values
    counted = mean_interval(right)
    assert (counted.low, counted.high) == pytest.approx((drawn.low, drawn.high), abs=1.5e-3)
    few = random.exponential(size=20_000)
    normal = mean_interval(np.append(few, few.mean()))
    assert (normal.low, normal.high) == pytest.approx((mean_interval(few).low, mean_interval(few).high), abs=1.5e-3)


def test_classes_as_floats_are_told() -> None:
    logits, target = classes()
    with pytest.raises(ValueError, match="targets of classes are integers"):
        error_analysis(IDENTITY, (logits, target.float()))
