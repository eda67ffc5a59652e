# SPDX-License-Identifier: Apache-2.0
"""One trial, in a process of its own: trains what the tables describe and tells of each evaluation."""

from __future__ import annotations

from typing import Any

from fastloop.loop import Loop
from fastloop.loop.config import build, read
from fastloop.tune.child import note

FUNCTION = "fastloop.recipes.search.trial:train"
VALUE = "search value"  # of the note after an evaluation


class Telling:
    """A callback: notes the metric after each evaluation, so that the search may end the trial."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.told = 0

    def on_evaluate(self, loop: Any, values: dict[str, float]) -> None:
        """Tell what is new."""
        del values
        points = loop.history.get(self.metric, [])
        if self.metric.startswith("val/") and len(points) > self.told:
            self.told = len(points)
            note(**{VALUE: points[-1][1]})


def train(tables: dict[str, Any], run_dir: str, metric: str) -> dict[str, Any]:
    """Train a config of `fastloop.loop.config` in `run_dir`.

    Returns:
        "values": the metric, as often as it was logged; "steps": windows that were trained.

    Raises:
        ValueError: a config that does not fit, or a metric that is not logged.
    """
    training = build(Loop, read(tables), run_dir=run_dir, resume=False, callbacks=[Telling(metric)])
    if metric.startswith("val/") and training.val_loader is None:
        raise ValueError(f"[search] the metric {metric!r} needs a val_loader, which the target does not return")
    history = training.fit()
    if metric not in history:
        raise ValueError(f"[search] the metric {metric!r} is none of {', '.join(sorted(history)) or 'those logged'}")
    return {"values": [value for _, value in history[metric]], "steps": training.loop.global_step}
