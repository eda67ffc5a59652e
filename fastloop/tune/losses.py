# SPDX-License-Identifier: Apache-2.0
"""The loss of each window that a trial trains, and how far those of two trials are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastloop.loop import Loop


class Losses:
    """Listens to a loop. Reading `values` waits for the device, listening does not.

    Args:
        loop: of which no window is under way.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._values: list[float] = []
        loop._on["on_window"].append(self._heard)

    def _heard(self, loop: Loop, record: Any) -> None:
        weight, total = record.values[:2]
        self._values.append(total / weight if weight else math.nan)

    @property
    def values(self) -> list[float]:
        """Mean loss of each window so far."""
        self._loop._reporter.take(all_of_them=True)
        return self._values

    def close(self) -> None:
        """Listen no more."""
        self._loop._on["on_window"].remove(self._heard)


def relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest of |a - b| / |a|; infinite where one of them is not finite."""
    if len(ours) != len(theirs) or not all(map(math.isfinite, [*ours, *theirs])):
        return math.inf
    return max(abs(a - b) / max(abs(a), 1e-30) if a != b else 0.0 for a, b in zip(ours, theirs, strict=True))


__all__ = ["Losses", "relative_difference"]
