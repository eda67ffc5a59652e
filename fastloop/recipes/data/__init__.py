# SPDX-License-Identifier: Apache-2.0
"""Data: divided, made, looked at, normalized, balanced, augmented."""

from __future__ import annotations

from fastloop.recipes.data.analysis import Analysis, analyze
from fastloop.recipes.data.augmentation import StagedAugmentation, augmentation
from fastloop.recipes.data.focal import FocalLoss
from fastloop.recipes.data.grid import augmentation_grid
from fastloop.recipes.data.imbalance import Balanced, WeightedSampler, balance, class_weights, weighted_sampler
from fastloop.recipes.data.labels import labels_of
from fastloop.recipes.data.normalization import Normalization, fit_normalization
from fastloop.recipes.data.splits import Split
from fastloop.recipes.data.splitting import split
from fastloop.recipes.data.synthetic import synthetic_data

__all__ = [
    "Analysis",
    "Balanced",
    "FocalLoss",
    "Normalization",
    "Split",
    "StagedAugmentation",
    "WeightedSampler",
    "analyze",
    "augmentation",
    "augmentation_grid",
    "balance",
    "class_weights",
    "fit_normalization",
    "labels_of",
    "split",
    "synthetic_data",
    "weighted_sampler",
]
