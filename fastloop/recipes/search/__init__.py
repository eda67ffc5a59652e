# SPDX-License-Identifier: Apache-2.0
"""Search for settings: grid, random and Bayesian, each trial a training in a process of its own."""

from fastloop.recipes.search.report import SearchReport, SearchTrial
from fastloop.recipes.search.searching import search
from fastloop.recipes.search.space import DEFAULT_SPACE, PRIORITIES, Choice, Float, Int

__all__ = ["DEFAULT_SPACE", "PRIORITIES", "Choice", "Float", "Int", "SearchReport", "SearchTrial", "search"]
