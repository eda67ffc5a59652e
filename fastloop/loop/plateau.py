# SPDX-License-Identifier: Apache-2.0
"""The factor of `fastloop.schedules.plateau`: lowered when the monitored metric gets no better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastloop.schedules import Schedule


class Plateau:
    """Follows a metric, one value for each evaluation; `factor` is that of the next window.

    Args:
        schedule: from `fastloop.schedules.plateau`, where the rule is written.
        mode: "min" or "max", of the metric.
    """

    def __init__(self, schedule: Schedule, mode: str = "min") -> None:
        arguments = schedule.arguments
        self._drop, self._least = arguments["factor"], arguments["min_factor"]
        self._patience, self._cooldown = arguments["patience"], arguments["cooldown"]
        self._threshold = arguments["threshold"]
        self._sign = 1.0 if mode == "min" else -1.0
        self.factor = 1.0
        self.best: float | None = None
        self._bad = 0  # evaluations in a row that were not better
        self._resting = 0  # evaluations of the cooldown that are left

    def update(self, value: float) -> None:
        """After an evaluation: its value of the metric."""
        if self._is_better(value):
            self.best, self._bad = value, 0
        else:
            self._bad += 1
        if self._resting:
            self._resting, self._bad = self._resting - 1, 0
        if self._bad > self._patience:
            self.factor = min(self.factor, max(self.factor * self._drop, self._least))
            self._resting, self._bad = self._cooldown, 0

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value) or self.best is None:
            return math.isfinite(value)
        return self._sign * value < self._sign * self.best - self._threshold * abs(self.best)

    def state_dict(self) -> dict[str, Any]:
        """JSON: the factor, the best value, and how far the two counts are."""
        return {"factor": self.factor, "best": self.best, "bad": self._bad, "resting": self._resting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave. The arguments are those that it was made with."""
        self.factor, self.best = float(state["factor"]), state["best"]
        self._bad, self._resting = int(state["bad"]), int(state["resting"])


__all__ = ["Plateau"]
