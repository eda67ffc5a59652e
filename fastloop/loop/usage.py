# SPDX-License-Identifier: Apache-2.0
"""What the machine does while a run goes on: columns of the log, and a warning where the GPU was left waiting."""

from __future__ import annotations

import logging
from dataclasses import fields
from time import perf_counter
from typing import Any

import torch

PREFIX = "system/"

logger = logging.getLogger("fastloop.loop")


class Usage:
    """Samples of `fastloop.monitor` in a thread of their own; a row of the log takes the latest.

    Args:
        interval: seconds between two samples.
        device: of the loop.
    """

    def __init__(self, interval: float, device: torch.device) -> None:
        self._interval, self._device = interval, device
        self._monitor: Any = self._made()  # now, so that what is missing is missed before the training
        self._begun = self._waited = 0.0

    def begin(self, waited: float) -> None:
        """Start sampling; `waited` is the seconds that the run has waited for its loader so far."""
        self._begun, self._waited = perf_counter(), waited
        if self._monitor is None:
            self._monitor = self._made()
        self._monitor.start()

    def _made(self) -> Any:
        from fastloop.monitor import Monitor

        return Monitor(self._interval, device=self._device)

    def row(self) -> dict[str, Any]:
        """The latest sample; None is what the machine does not say. {} before the first."""
        sample = self._monitor.latest
        if sample is None:
            return {}
        values = {each.name: getattr(sample, each.name) for each in fields(sample)}
        return {
            PREFIX + name: (", ".join(value) or "none") if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in ("time", "reasons")
        }

    def end(self, waited: float, failed: bool) -> None:
        """Stop sampling; warn where the GPU was used little, unless an error is news enough."""
        from fastloop.monitor import likely_cause

        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        monitor.stop()
        seconds = perf_counter() - self._begun
        cause = likely_cause(monitor.summary(), min((waited - self._waited) / seconds, 1.0))
        if cause is not None and not failed:
            logger.warning("%s", cause)
