# SPDX-License-Identifier: Apache-2.0
"""What the steps leave behind: fetched from the device when it is there anyway, added up into rows of the log."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastloop.loop.update import Scalar

History = dict[str, list[tuple[int, float]]]


@dataclass(slots=True)
class Record:
    """One window.

    Attributes:
        values: total weight, weighted sums of the loss and of each metric; under several ranks also samples, tokens and
            flags; then gradient norm and whether the step was skipped.
    """

    step: int
    epoch: int
    lr: float
    samples: int
    tokens: int
    values: list[float]
    batches: list[Any] | None = None


class Outbox:
    """Scalars on their way from the device. The host asks whether they have come, and goes on if not.

    Args:
        device: where the scalars are.
        together: ranks act on what comes, and so must see it at the same step: a record is then waited for when the
            next one has been put, by which time the device has long written it.
    """

    def __init__(self, device: torch.device, together: bool) -> None:
        self._device = device
        self._together = together
        self._under_way: deque[tuple[Record, Tensor, Any]] = deque()

    def put(self, record: Record, values: list[Scalar]) -> None:
        """Send off `values`, which become the record's."""
        there = [v for v in values if isinstance(v, Tensor)]
        record.values = values  # type: ignore[assignment]
        arrived = torch.empty(len(there), dtype=torch.float64, device="cpu", pin_memory=True)
        if there:
            arrived.copy_(torch.stack([v.detach().to(self._device, torch.float64) for v in there]), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append((record, arrived, event))

    def take(self, all_of_them: bool = False, only_ready: bool = False) -> Iterator[Record]:
        """Records that have arrived, oldest first; with `only_ready` without any wait, whatever other ranks see."""
        while self._under_way:
            record, arrived, event = self._under_way[0]
            if only_ready:
                if not event.query():
                    return
            elif all_of_them or (self._together and len(self._under_way) > 1):
                event.synchronize()
            elif self._together or not event.query():
                return
            self._under_way.popleft()
            numbers = iter(arrived.tolist())
            record.values = [next(numbers) if isinstance(v, Tensor) else v for v in record.values]
            yield record


@dataclass(slots=True)
class Ledger:
    """Sums over the windows since the last row of the log; in each checkpoint, so that a resumed run logs the same."""

    weight: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    grad_norm: float = math.nan
    skipped: int = 0  # windows, in the whole run

    def add(self, record: Record, names: tuple[str, ...]) -> None:
        """Count one window in."""
        values = record.values
        self.weight += values[0]
        for name, value in zip(("loss", *names), values[1:], strict=False):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.grad_norm = values[-2]
        if values[-1]:
            self.skipped += 1

    def row(self) -> dict[str, float]:
        """Means since the last row, and begin anew."""
        weight = self.weight or math.nan
        row = {f"train/{name}": value / weight for name, value in self.sums.items()}
        row["grad_norm"] = self.grad_norm
        row["skipped"] = self.skipped
        self.weight, self.sums = 0.0, {}
        return row

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for name in self.__slots__:
            setattr(self, name, state[name])
