# SPDX-License-Identifier: Apache-2.0
"""Where a model is wrong: by class, by group, and the samples that it gets most wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn

from fastloop.findings import Finding, listed
from fastloop.recipes.after import error_plots, metrics
from fastloop.recipes.after.batches import dataset_of, visit
from fastloop.recipes.after.error_findings import found
from fastloop.recipes.after.groups import Group, by_group
from fastloop.recipes.after.metrics import ClassScore
from fastloop.recipes.after.outcomes import Collector, Outcomes, class_names
from fastloop.recipes.results import Result
from fastloop.texts import columns

SHOWN = 20  # rows of each part in the table
JSON_CLASSES = 50  # the matrix of more classes is not in the JSON


@dataclass(frozen=True)
class Worst:
    """A sample that the model gets wrong, or right with doubt."""

    index: int
    loss: float
    target: Any
    prediction: Any
    probability: float | None  # of the prediction


@dataclass(frozen=True)
class Confusion:
    """Samples of one class that were called another; `share` of that class's samples."""

    target: str
    prediction: str
    samples: int
    share: float


@dataclass
class ErrorAnalysis(Result):
    """What a model gets wrong.

    Attributes:
        task: "classification" or "regression".
        metrics: by name: accuracy, loss (nats), macro_ and weighted_ precision, recall, f1, calibration_error; or mae,
            rmse, bias, r2.
        classes: their names; confusion: int64 [classes, classes], rows being targets; by_class: precision, recall, F1.
        confused: the pairs of classes that are mixed up, the most frequent first.
        worst: the samples of the largest loss; index is the place in the data.
        groups: accuracy (or mean absolute error) of each group with its 98 % interval.
        outcomes: of each sample.
    """

    practice: ClassVar[str] = "error_analysis"
    task: str
    samples: int
    metrics: dict[str, float]
    classes: list[str] = field(default_factory=list)
    confusion: Tensor | None = None
    by_class: list[ClassScore] = field(default_factory=list)
    confused: list[Confusion] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    outcomes: Outcomes | None = field(default=None, repr=False)

    def table(self) -> str:
        """Metrics, classes, pairs, groups and worst samples, each in its own part."""
        parts = [columns(("", self.task), [*self.metrics.items(), ("samples", self.samples)])]
        if self.by_class:
            rows = [(c.name, c.samples, c.precision, c.recall, c.f1) for c in sorted(self.by_class, key=lambda c: c.f1)]
            parts.append(columns(("class", "samples", "precision", "recall", "F1"), rows[:SHOWN]))
        if self.confused:
            pairs = [(c.target, c.prediction, c.samples, c.share) for c in self.confused[:SHOWN]]
            parts.append(columns(("target", "predicted as", "samples", "share"), pairs))
        if self.groups:
            titles = ("group", "samples", "accuracy" if self.classes else "mae", "98 % interval")
            named = [(g.name, g.samples, g.value, f"{g.low:.4g} to {g.high:.4g}") for g in self.groups]
            parts.append(columns(titles, named))
        if self.worst:
            head = ("worst sample", "loss", "target", "prediction", "probability")
            samples = [(w.index, w.loss, w.target, w.prediction, w.probability) for w in self.worst[:SHOWN]]
            parts.append(columns(head, samples))
        if self.findings:
            parts.append(listed(self.findings))
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON; the confusion matrix of more than 50 classes is left out."""
        made = super().to_json()
        if len(self.classes) > JSON_CLASSES:
            made["confusion"] = None
        return made

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the confusion matrix; of numbers, predictions over targets and the residuals. Needs fastloop[plots]."""
        assert self.outcomes is not None
        if self.confusion is not None:
            return error_plots.confusion(self.confusion, self.classes, path)
        return error_plots.residuals(self.outcomes.target, self.outcomes.prediction, path)


def error_analysis(
    model: nn.Module,
    data: Any,
    *,
    classes: int | Sequence[str] | None = None,
    groups: Sequence[Any] | Tensor | Callable[[Any], Any] | None = None,
    worst: int = 20,
    batch_size: int = 256,
) -> ErrorAnalysis:
    """See what the model gets wrong on data that it has not been trained on.

    Integer targets [n] with outputs [n, classes] (or one output for the targets 0 and 1) are classes, other targets
    numbers. Outputs may be logits, log-probabilities or probabilities.

    Args:
        model: stays where and as it is.
        data: a Dataset of (input, target), a pair of tensors, or a loader that keeps the order.
        classes: their names, or how many: 2 makes float targets with one output classes too.
        groups: of each sample, in the data's order, or function(sample) -> group, to see whether the model is worse for
            some.
        worst: how many samples to name.
        batch_size: where `data` is no loader.

    Raises:
        ValueError: no samples, shapes or lengths that do not fit, outputs that are not finite.
        TypeError: data, targets or outputs of another kind.
    """
    count, names = class_names(classes, "error_analysis")
    if isinstance(worst, bool) or not isinstance(worst, int) or worst < 0:
        raise ValueError(f"[error_analysis] worst must be an integer of at least 0, got {worst!r}")
    collector = Collector("error_analysis", count)
    visit(
        [model],
        data,
        lambda outputs, target, _: collector.add(outputs[0], target),
        batch_size=batch_size,
        where="error_analysis",
    )
    outcomes = collector.done()
    group_names = _group_names(groups, data, len(outcomes.loss))
    if outcomes.classes is None:
        made = ErrorAnalysis(
            "regression", len(outcomes.loss), metrics.regression_scores(outcomes.target, outcomes.prediction)
        )
        values = (outcomes.prediction - outcomes.target).abs().mean(1)
    else:
        made = _classification(outcomes, names or [str(i) for i in range(outcomes.classes)])
        values = outcomes.right
    made.worst = _worst(outcomes, made.classes, worst)
    if group_names is not None:
        made.groups = by_group(values.numpy(), group_names)
    made.outcomes = outcomes
    made.findings = found(made, values.numpy(), group_names)
    return made


def _classification(outcomes: Outcomes, names: list[str]) -> ErrorAnalysis:
    assert outcomes.classes is not None
    assert outcomes.probability is not None
    right = outcomes.right
    confusion = metrics.confusion_matrix(outcomes.target, outcomes.prediction, outcomes.classes)
    scores = metrics.class_scores(confusion, names)
    values = {
        "accuracy": float(right.double().mean()),
        "loss": float(outcomes.loss.mean()),
        **metrics.averages(scores),
        "calibration_error": metrics.calibration_error(outcomes.probability, right),
    }
    wrong = confusion.clone().fill_diagonal_(0)
    pairs = [
        Confusion(names[i], names[j], int(wrong[i, j]), float(wrong[i, j]) / scores[i].samples)
        for i, j in wrong.nonzero().tolist()
    ]
    pairs.sort(key=lambda pair: -pair.samples)
    return ErrorAnalysis("classification", len(right), values, names, confusion, scores, pairs)


def _worst(outcomes: Outcomes, names: list[str], count: int) -> list[Worst]:
    order = torch.argsort(outcomes.loss, descending=True, stable=True)[:count].tolist()

    def shown(value: Tensor) -> Any:
        if names:
            return names[int(value)]
        return float(value) if value.numel() == 1 else value.tolist()

    return [
        Worst(
            i,
            float(outcomes.loss[i]),
            shown(outcomes.target[i]),
            shown(outcomes.prediction[i]),
            None if outcomes.probability is None else float(outcomes.probability[i]),
        )
        for i in order
    ]


def _group_names(groups: Any, data: Any, samples: int) -> list[str] | None:
    """A name for each sample."""
    if groups is None:
        return None
    if callable(groups):
        dataset = dataset_of(data)
        if dataset is None:
            raise TypeError(
                "[error_analysis] groups as a function needs data whose samples can be taken one by one; pass a "
                "Dataset, or a sequence of groups"
            )
        groups = [groups(dataset[i]) for i in range(samples)]
    elif isinstance(groups, (Tensor, numpy.ndarray)):
        groups = groups.tolist()
    if isinstance(groups, str) or not hasattr(groups, "__len__"):
        raise TypeError(f"[error_analysis] groups must be a sequence or a function, got {type(groups).__name__}")
    if len(groups) != samples:
        raise ValueError(f"[error_analysis] groups must name the group of each of {samples} samples, got {len(groups)}")
    return [str(group) for group in groups]
