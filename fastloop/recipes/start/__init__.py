# SPDX-License-Identifier: Apache-2.0
"""Before the training: can the model learn a batch, and what has it to beat."""

from __future__ import annotations

from fastloop.recipes.start.baselines import Baselines, baselines
from fastloop.recipes.start.overfit import OverfitResult, overfit_one_batch

__all__ = ["Baselines", "OverfitResult", "baselines", "overfit_one_batch"]
