# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: experiments with an id from their config, compared in a table; a card for a model."""

from fastloop.recipes.tracking.compare import Comparison, compare_experiments
from fastloop.recipes.tracking.experiment import Experiment
from fastloop.recipes.tracking.model_card import model_card

__all__ = ["Comparison", "Experiment", "compare_experiments", "model_card"]
