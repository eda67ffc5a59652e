# SPDX-License-Identifier: Apache-2.0
"""The loss of each window that a trial trains."""

from __future__ import annotations

import math
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


__all__ = ["Losses"]
