# SPDX-License-Identifier: Apache-2.0
"""A metric by group of samples, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from fastloop.recipes.after.intervals import Estimate, mean_interval, wilson


@dataclass(frozen=True)
class Group:
    """Accuracy, or mean absolute error, of a group of samples and of all others, with 98 % intervals.

    `others` is None where all samples are of this group.
    """

    name: str
    samples: int
    value: float
    low: float
    high: float
    others: Estimate | None = None


def by_group(values: numpy.ndarray, names: Sequence[str]) -> list[Group]:
    """Each group's mean of values [n]: of bool with Wilson's interval, of numbers with the bootstrap's.

    The smallest mean first for bool (accuracy), the largest for numbers (errors).
    """
    labels = numpy.asarray(names)
    made = []
    for name in sorted(set(names)):
        inside = labels == name
        found = _estimate(values[inside])
        others = None if inside.all() else _estimate(values[~inside])
        made.append(Group(name, int(inside.sum()), found.value, found.low, found.high, others))
    return sorted(made, key=lambda group: group.value, reverse=values.dtype != bool)


def _estimate(values: numpy.ndarray) -> Estimate:
    return wilson(int(values.sum()), len(values)) if values.dtype == bool else mean_interval(values)
