# SPDX-License-Identifier: Apache-2.0
"""Numbers of a classification and of a regression, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ECE_BINS = 15


@dataclass(frozen=True)
class ClassScore:
    """One class: `precision` of what was called so, `recall` of what is so; 0 where there is nothing to divide by."""

    name: str
    samples: int
    predicted: int
    precision: float
    recall: float
    f1: float


def confusion_matrix(target: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: rows are targets, columns predictions."""
    return torch.bincount(target * classes + prediction, minlength=classes * classes).view(classes, classes)


def class_scores(confusion: Tensor, names: list[str]) -> list[ClassScore]:
    """Precision TP/(TP+FP), recall TP/(TP+FN), F1 2TP/(2TP+FP+FN) of each class."""
    right = confusion.diagonal().double()
    actual, predicted = confusion.sum(1), confusion.sum(0)
    precision = (right / predicted.clamp(min=1)).tolist()
    recall = (right / actual.clamp(min=1)).tolist()
    f1 = (2 * right / (actual + predicted).clamp(min=1)).tolist()
    columns = names, actual.tolist(), predicted.tolist(), precision, recall, f1
    return [ClassScore(*row) for row in zip(*columns, strict=True)]


def averages(scores: list[ClassScore]) -> dict[str, float]:
    """Precision, recall and F1 as means over classes ("macro_...") and weighted by their samples ("weighted_...").

    Over the classes that occur as target or as prediction, as scikit-learn has it.
    """
    present = [score for score in scores if score.samples or score.predicted]
    total = sum(score.samples for score in present)
    found = {}
    for name in ("precision", "recall", "f1"):
        found[f"macro_{name}"] = sum(getattr(score, name) for score in present) / len(present)
        found[f"weighted_{name}"] = sum(getattr(score, name) * score.samples for score in present) / total
    return found


def calibration_error(probability: Tensor, right: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error: sum over bins of n_b/n |accuracy_b - mean probability_b|, bins of one width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    bin_of = (probability * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, right.double() - probability)
    return float(gap.abs().sum() / len(probability))


def regression_scores(target: Tensor, prediction: Tensor) -> dict[str, float]:
    """Mean absolute and root mean squared error, bias (mean of prediction - target) and R^2.

    R^2 = 1 - sum (y - p)^2 / sum (y - mean y)^2, mean over columns; NaN where a column's targets are all the same.

    Args:
        target, prediction: fp64 [n, d].
    """
    residual = prediction - target
    spread = (target - target.mean(0)).square().sum(0)
    varied = (target != target[0]).any(0)  # the sum of squares of equal numbers is not exactly 0: their mean is rounded
    r2 = torch.where(varied, 1 - residual.square().sum(0) / spread, torch.nan)
    return {
        "mae": float(residual.abs().mean()),
        "rmse": float(residual.square().mean().sqrt()),
        "bias": float(residual.mean()),
        "r2": float(r2.mean()),
    }
