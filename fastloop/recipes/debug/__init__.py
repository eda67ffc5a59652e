# SPDX-License-Identifier: Apache-2.0
"""Why a training does not go as it should: a batch, a step, the curves, backward, the layers."""

from fastloop.recipes.debug.curves import diagnose_curves
from fastloop.recipes.debug.gradients import GradientCheck, check_gradients
from fastloop.recipes.debug.plateau import PlateauDiagnosis, diagnose_plateau
from fastloop.recipes.debug.statistics_by_layer import LayerRow, LayerStatistics, layer_statistics
from fastloop.recipes.debug.step import Diagnosis, diagnose

__all__ = [
    "Diagnosis",
    "GradientCheck",
    "LayerRow",
    "LayerStatistics",
    "PlateauDiagnosis",
    "check_gradients",
    "diagnose",
    "diagnose_curves",
    "diagnose_plateau",
    "layer_statistics",
]
