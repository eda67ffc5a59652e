# SPDX-License-Identifier: Apache-2.0
"""Which settings matter: the share of each in the differences between values."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from fastloop.extras import need
from fastloop.recipes.search.space import Choice, Range, distributions, encoded

LEAST = 4  # values
FANOVA, RANKS = "fANOVA", "rank correlation"


def importances(
    values: Sequence[tuple[Mapping[str, Any], float]], space: Mapping[str, Range], seed: int
) -> tuple[dict[str, float], str]:
    """(by key a share, the sum being 1; the method): Optuna's fANOVA where scikit-learn is there, else ranks.

    By ranks it is |Spearman's correlation| of a number with the value, and of a Choice the correlation ratio of the
    ranks; effects of several settings together are not seen.

    Args:
        values: (settings, value) of each trial.

    Source: Hutter, Hoos and Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter Importance", 2014.
    """
    if len(values) < LEAST or len({value for _, value in values}) < 2:
        return {}, ""
    if importlib.util.find_spec("sklearn") is not None and importlib.util.find_spec("optuna") is not None:
        found = _by_fanova(values, space, seed)
        if found:
            return found, FANOVA
    found = by_ranks(values, space)
    return found, RANKS if found else ""


def _by_fanova(
    values: Sequence[tuple[Mapping[str, Any], float]], space: Mapping[str, Range], seed: int
) -> dict[str, float]:
    optuna = need("optuna", "search", "importances")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study()
        kinds = distributions(space)
        for settings, value in values:
            study.add_trial(optuna.trial.create_trial(params=encoded(settings), distributions=kinds, value=value))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        return {
            key: float(each)
            for key, each in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
        }
    except RuntimeError:  # no tree has a split: all trials had the same settings
        return {}
    finally:
        optuna.logging.set_verbosity(verbosity)


def by_ranks(values: Sequence[tuple[Mapping[str, Any], float]], space: Mapping[str, Range]) -> dict[str, float]:
    """The shares by ranks; {} where none of the settings goes with the value."""
    ranked = _ranks([value for _, value in values])
    found = {}
    for key, given in space.items():
        column = [settings[key] for settings, _ in values]
        found[key] = _ratio(column, ranked) if isinstance(given, Choice) else _correlation(_ranks(column), ranked)
    total = sum(found.values())
    return {key: share / total for key, share in found.items()} if total > 0 else {}


def _ranks(values: Sequence[float]) -> NDArray[numpy.float64]:
    """From 0, ties at their mean."""
    _, group, counts = numpy.unique(numpy.asarray(values, numpy.float64), return_inverse=True, return_counts=True)
    ends = numpy.cumsum(counts)
    return numpy.asarray((ends - (counts + 1) / 2)[group], numpy.float64)


def _correlation(a: NDArray[numpy.float64], b: NDArray[numpy.float64]) -> float:
    spread = a.std() * b.std()
    return float(abs(((a - a.mean()) * (b - b.mean())).mean() / spread)) if spread > 0 else 0.0


def _ratio(column: Sequence[Any], ranks: NDArray[numpy.float64]) -> float:
    """sqrt(variance between the groups / variance)."""
    texts = [repr(value) for value in column]
    if ranks.var() == 0:
        return 0.0
    between = 0.0
    for text in set(texts):
        group = ranks[[i for i, each in enumerate(texts) if each == text]]
        between += len(group) * (group.mean() - ranks.mean()) ** 2
    return float(numpy.sqrt(between / len(ranks) / ranks.var()))
