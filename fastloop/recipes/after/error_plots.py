# SPDX-License-Identifier: Apache-2.0
"""Pictures of errors: a confusion matrix, residuals."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from fastloop.drawing import figure, save
from fastloop.loop.images import draw_confusion

POINTS = 5000  # of a scatter plot


def confusion(matrix: Tensor, names: list[str], path: str | os.PathLike[str]) -> Path:
    """Draw the matrix: numbers are samples, colours shares of the target's class."""
    return save(draw_confusion(matrix.numpy(), names), path)


def residuals(target: Tensor, prediction: Tensor, path: str | os.PathLike[str]) -> Path:
    """Draw predictions over targets, and how the residuals are distributed; all columns in one."""
    made = figure(9.0, 4.0, "a picture of residuals")
    left, right = made.subplots(1, 2)
    step = max(1, target.numel() // POINTS)  # of samples: all columns are shown
    left.scatter(target[::step].flatten().numpy(), prediction[::step].flatten().numpy(), s=8, alpha=0.5, linewidths=0)
    wanted, got = target.flatten(), prediction.flatten()
    ends = [float(min(wanted.min(), got.min())), float(max(wanted.max(), got.max()))]
    left.plot(ends, ends, color="black", linewidth=0.8, label="exact")
    left.set_xlabel("target")
    left.set_ylabel("prediction")
    left.legend(frameon=False)
    right.hist((got - wanted).numpy(), bins=min(40, max(10, int(len(wanted) ** 0.5))))
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("prediction - target")
    right.set_ylabel("samples")
    return save(made, path)
