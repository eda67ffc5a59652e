# SPDX-License-Identifier: Apache-2.0
"""What an error analysis says in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy

from fastloop.findings import Finding, ordered
from fastloop.recipes.after.intervals import wilson

if TYPE_CHECKING:
    from fastloop.recipes.after.errors import ErrorAnalysis

FEW = 30  # samples of a class or group; below, its numbers say little
MISCALIBRATED = 0.1
ENOUGH_TO_CALIBRATE = 200  # of fewer samples the error of 15 bins is above 0.05 by chance alone
BIASED = 3.0  # standard errors that the mean residual is from 0


def found(analysis: ErrorAnalysis, values: numpy.ndarray, groups: Sequence[str] | None) -> list[Finding]:
    """Findings, the worst first; `values` are right or wrong, or the absolute error, of each sample."""
    made = [*_of_groups(analysis)] if groups is not None else []
    made += _of_classes(analysis) if analysis.classes else _of_numbers(analysis)
    return ordered(made)


def _of_groups(analysis: ErrorAnalysis) -> Iterator[Finding]:
    accuracy = bool(analysis.classes)
    for group in analysis.groups:
        if group.others is None:
            continue
        worse = group.high < group.others.low if accuracy else group.low > group.others.high
        what = "accuracy" if accuracy else "mean absolute error"
        if worse:
            yield Finding(
                "warning",
                f"group {group.name}",
                f"{what} {group.value:.3g} ({group.low:.3g} to {group.high:.3g}), all others "
                f"{group.others.value:.3g} ({group.others.low:.3g} to {group.others.high:.3g})",
                "look at its worst samples; get more of its data, or weight it in training",
            )
        elif group.samples < FEW:
            yield Finding(
                "note", f"group {group.name}", f"{group.samples} samples: too few to say that it fares as well"
            )


def _of_classes(analysis: ErrorAnalysis) -> Iterator[Finding]:
    accuracy = analysis.metrics["accuracy"]
    predicted = [score for score in analysis.by_class if score.predicted]
    actual = [score for score in analysis.by_class if score.samples]
    if len(predicted) == 1 and len(actual) > 1:
        yield Finding(
            "error", "predictions", f"all {analysis.samples} samples are called {predicted[0].name!r}",
            "look at the training: run diagnose, and balance for imbalanced classes",
        )  # fmt: skip
        return
    if len(actual) == 1:
        yield Finding("warning", "data", f"all samples are of class {actual[0].name!r}", "use data of all classes")
    overall = wilson(round(accuracy * analysis.samples), analysis.samples)
    for score in analysis.by_class:
        if not score.samples:
            yield Finding("note", f"class {score.name}", "no samples: nothing is known of it")
        elif wilson(round(score.recall * score.samples), score.samples).high < overall.low:
            yield Finding(
                "warning", f"class {score.name}",
                f"recall {score.recall:.3g} of {score.samples} samples, the accuracy is {accuracy:.3g}",
                "look at what it is confused with; get more of its data, or weight it in training",
            )  # fmt: skip
    error = analysis.metrics["calibration_error"]
    if error > MISCALIBRATED and analysis.samples >= ENOUGH_TO_CALIBRATE:
        assert analysis.outcomes is not None
        assert analysis.outcomes.probability is not None
        sure = float(analysis.outcomes.probability.mean()) > accuracy
        yield Finding(
            "warning", "probabilities", f"off by {error:.2g} on average, the model is "
                                        f"{'over' if sure else 'under'}confident",
            "scale the logits by a temperature fitted on validation data, or train with label smoothing",
        )  # fmt: skip
    if analysis.outcomes is not None and analysis.outcomes.from_probabilities:
        yield Finding("note", "outputs", "the outputs were taken for probabilities: they lie in [0, 1] and add up to 1")


def _of_numbers(analysis: ErrorAnalysis) -> Iterator[Finding]:
    assert analysis.outcomes is not None
    residual = analysis.outcomes.prediction - analysis.outcomes.target
    if len(residual) > 1:
        error = residual.std(0) / len(residual) ** 0.5
        off = (residual.mean(0).abs() > BIASED * error) & (residual.mean(0) != 0)
        for column in off.nonzero().flatten().tolist()[:5]:
            yield Finding(
                "note", f"output {column}",
                f"predictions are off by {float(residual[:, column].mean()):.3g} on average, {BIASED:.0f} "
                "standard errors or more",
                "train longer, or look whether these data are of another kind than the training's",
            )  # fmt: skip
    r2 = analysis.metrics["r2"]
    if r2 != r2:
        yield Finding("warning", "targets", "all the same in some column: R^2 is not defined", "use data that varies")
    elif r2 <= 0:
        yield Finding("error", "predictions", f"R^2 is {r2:.3g}: no better than the targets' mean", "run diagnose")
