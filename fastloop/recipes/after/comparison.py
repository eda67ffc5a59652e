# SPDX-License-Identifier: Apache-2.0
"""Is the new model better than the old one, on the same samples?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn

from fastloop.bench.stats import LEVEL
from fastloop.findings import Finding, listed
from fastloop.recipes.after.batches import visit
from fastloop.recipes.after.intervals import mcnemar, mean_interval
from fastloop.recipes.after.outcomes import Collector
from fastloop.recipes.results import Result
from fastloop.texts import columns

FEW = 100  # samples; below, the bootstrap's interval of a mean is too narrow
DISCORDANT = 7  # the fewest of which McNemar's exact test can give p < 0.02: 2 * 2^-7

Metric = str | Callable[[Any, Any], Tensor]


@dataclass
class ModelComparison(Result):
    """A new model (b) against an old one (a), sample by sample.

    Attributes:
        a, b: mean of the metric.
        difference, low, high: mean of b - a with its 98 % bootstrap interval over samples.
        higher_is_better: of the metric.
        only_a, only_b: samples that only one of them has right; p_value: McNemar's exact test of the two. None for
            other metrics than accuracy.
        verdict: "b better", "a better" or "no difference shown".
    """

    practice: ClassVar[str] = "compare_models"
    metric: str
    samples: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    higher_is_better: bool
    verdict: str
    level: float = LEVEL
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None
    findings: list[Finding] = field(default_factory=list)

    def table(self) -> str:
        """The two means, their difference with its interval, and the verdict."""
        rows = [
            ("a", self.a),
            ("b", self.b),
            ("b - a", self.difference),
            (f"{self.level:.0%} interval", f"{self.low:.4g} to {self.high:.4g}"),
            ("samples", self.samples),
        ]
        if self.p_value is not None:
            rows += [("right in a only / b only", f"{self.only_a} / {self.only_b}"), ("McNemar p", self.p_value)]
        text = f"{self.verdict}\n{columns(('', self.metric), rows)}"
        return f"{text}\n{listed(self.findings)}" if self.findings else text


def compare_models(
    a: nn.Module, b: nn.Module, data: Any, *, metric: Metric = "accuracy", batch_size: int = 256, seed: int = 0
) -> ModelComparison:
    """Compare two models on the same samples: the mean difference of a metric with its interval, and a verdict.

    One is called better where the 98 % bootstrap interval of mean(b - a) is on its side of 0 and, for accuracy,
    McNemar's exact test has p < 0.02 too.

    Args:
        a: the old model; b: the new one. Each on its device; both see the very same batches.
        data: a Dataset, a pair of tensors, or a loader that keeps the order: unseen by both in training.
        metric: "accuracy", "loss" (cross-entropy, or the squared error of numbers), or function(output, target) that
            gives a number for each sample, larger being better (negate a loss).
        batch_size: where `data` is no loader.
        seed: of the bootstrap.

    Raises:
        ValueError: an unknown metric, no samples, outputs or values that are not finite, accuracy of numbers.
        TypeError: data, targets or outputs of another kind.

    Source: McNemar 1947; Efron and Tibshirani 1993, chapter 13; Dietterich, "Approximate statistical
    tests for comparing supervised classification learning algorithms", 1998.
    """
    if not callable(metric) and metric not in ("accuracy", "loss"):
        raise ValueError(f'[compare_models] metric must be "accuracy", "loss" or a function, got {metric!r}')
    if callable(metric):
        values = _by_function(a, b, data, metric, batch_size)
        return _compared(getattr(metric, "__name__", type(metric).__name__), values, True, seed)
    collectors = Collector("compare_models"), Collector("compare_models")

    def look(outputs: list[Any], target: Any, samples: int) -> None:
        for collector, output in zip(collectors, outputs, strict=True):
            collector.add(output, target)

    visit([a, b], data, look, batch_size=batch_size, where="compare_models")
    outcomes = [collector.done() for collector in collectors]
    if metric == "loss":
        return _compared("loss", [each.loss.numpy() for each in outcomes], False, seed)
    if any(each.classes is None for each in outcomes):
        raise ValueError('[compare_models] metric="accuracy" is of classes, these are numbers; pass metric="loss"')
    return _compared("accuracy", [each.right.double().numpy() for each in outcomes], True, seed, right_or_wrong=True)


def _by_function(
    a: nn.Module, b: nn.Module, data: Any, metric: Callable[[Any, Any], Tensor], batch_size: int
) -> list[numpy.ndarray]:
    values: tuple[list[Tensor], list[Tensor]] = ([], [])

    def look(outputs: list[Any], target: Any, samples: int) -> None:
        for kept, output in zip(values, outputs, strict=True):
            both = isinstance(target, Tensor) and isinstance(output, Tensor)
            given = metric(output, target.to(output.device) if both else target)
            got = torch.as_tensor(given).detach().double().cpu()
            if got.shape != (samples,):
                raise ValueError(
                    f"[compare_models] metric(output, target) must give a number for each of {samples} samples, got "
                    f"shape {tuple(got.shape)}"
                )
            kept.append(got)

    visit([a, b], data, look, batch_size=batch_size, where="compare_models")
    return [torch.cat(each).numpy() for each in values]


def _compared(
    name: str, values: list[numpy.ndarray], higher: bool, seed: int, right_or_wrong: bool = False
) -> ModelComparison:
    a, b = values
    if not (numpy.isfinite(a).all() and numpy.isfinite(b).all()):
        raise ValueError(
            f"[compare_models] {name} must be finite for each sample, got {int((~numpy.isfinite(a)).sum())} such "
            f"values of a and {int((~numpy.isfinite(b)).sum())} of b that are not; compare accuracies, or "
            "look at those samples"
        )
    found = mean_interval(b - a, seed)
    p_value = only_a = only_b = None
    if right_or_wrong:
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        p_value = mcnemar(only_a, only_b)
    shown = p_value is None or p_value < 1 - LEVEL
    sign = (found.low > 0) - (found.high < 0) if shown else 0
    verdict = {0: "no difference shown", 1: "b better", -1: "a better"}[sign if higher else -sign]
    made = ModelComparison(
        name, len(a), float(a.mean()), float(b.mean()), found.value, found.low, found.high, higher, verdict,
        only_a=only_a, only_b=only_b, p_value=p_value,
    )  # fmt: skip
    made.findings = _findings(made)
    return made


def _findings(made: ModelComparison) -> list[Finding]:
    findings = []
    if made.samples < FEW:
        findings.append(
            Finding(
                "warning",
                "data",
                f"{made.samples} samples: the interval is too narrow for so few",
                f"use at least {FEW}",
            )
        )
    if made.only_a is not None and made.only_b is not None and 0 < made.only_a + made.only_b < DISCORDANT:
        what = f"the models disagree in {made.only_a + made.only_b} samples only: fewer than {DISCORDANT} show nothing"
        findings.append(Finding("note", "data", what, "use more samples"))
    if made.verdict == "no difference shown" and made.high > made.low:
        half = (made.high - made.low) / 2
        findings.append(
            Finding(
                "note", made.metric, f"a difference of less than about {half:.2g} cannot be shown with these samples"
            )
        )
    return findings
