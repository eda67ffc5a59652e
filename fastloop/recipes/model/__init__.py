# SPDX-License-Identifier: Apache-2.0
"""Weights to begin with, a model's make-up, first gradients, normalization by batch size, dead ReLUs and dropout."""

from fastloop.recipes.model.dead import DeadUnits, dead_relus
from fastloop.recipes.model.dropout import progressive_dropout
from fastloop.recipes.model.dropout_search import DropoutSearch, search_dropout
from fastloop.recipes.model.gradients import GradientReport, check_initial_gradients
from fastloop.recipes.model.initialize import initialize_weights
from fastloop.recipes.model.normalization import normalization_layer, replace_batchnorm
from fastloop.recipes.model.summary import ModelSummary, model_summary

__all__ = [
    "DeadUnits",
    "DropoutSearch",
    "GradientReport",
    "ModelSummary",
    "check_initial_gradients",
    "dead_relus",
    "initialize_weights",
    "model_summary",
    "normalization_layer",
    "progressive_dropout",
    "replace_batchnorm",
    "search_dropout",
]
