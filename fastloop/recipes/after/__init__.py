# SPDX-License-Identifier: Apache-2.0
"""After training: outputs of all samples, where they are wrong, is the new model better, fewer weights, drift."""

from fastloop.recipes.after.comparison import ModelComparison, compare_models
from fastloop.recipes.after.drift import DriftReport, drift_report
from fastloop.recipes.after.errors import ErrorAnalysis, error_analysis
from fastloop.recipes.after.predictions import predict
from fastloop.recipes.after.pruning import PruneReport, prune

__all__ = [
    "DriftReport",
    "ErrorAnalysis",
    "ModelComparison",
    "PruneReport",
    "compare_models",
    "drift_report",
    "error_analysis",
    "predict",
    "prune",
]
