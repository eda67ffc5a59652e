# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay: a pure function of what is there. Deleting is the store's business."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MANAGED = ("step-", "final-")  # checkpoints of other names are the user's own and stay


class Saved(Protocol):
    """What a decision needs to know of a whole checkpoint."""

    @property
    def name(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Policy:
    """What to keep.

    Args:
        keep_last: so many of the newest, at least 1; None keeps all.
        keep_best: so many of the best by each monitored metric.
        keep_log_spaced: also one of every age of 1, 2-3, 4-7, 8-15, ... saves back.
        monitors: metric -> "min" or "max", which is the better.

    Raises:
        ValueError: a setting out of range.
    """

    keep_last: int | None = 3
    keep_best: int = 1
    keep_log_spaced: bool = False
    monitors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"[Store] keep_last must be at least 1 or None for all, got {self.keep_last}")
        if self.keep_best < 0:
            raise ValueError(f"[Store] keep_best must be at least 0, got {self.keep_best}")
        for metric, mode in self.monitors.items():
            if mode not in ("min", "max"):
                raise ValueError(f'[Store] the mode of {metric!r} must be "min" or "max", got {mode!r}')

    def to_delete(self, present: Iterable[Saved], just_written: str | None = None) -> list[str]:
        """Names to delete of the whole checkpoints that are present, oldest first.

        Kept are the `keep_last` newest, the `keep_best` best by each metric, the newest `final-*`, with
        `keep_log_spaced` one of each age, `just_written`, and what is not named as the loop names its checkpoints.
        Deciding again after each save, from what the last decision left, keeps the ages spaced.
        """
        managed = sorted((s for s in present if s.name.startswith(MANAGED)), key=lambda s: s.number)
        if self.keep_last is None:
            return []
        finals = [s for s in managed if s.name.startswith("final-")]
        running = [s for s in managed if not s.name.startswith("final-")]
        keep = {s.name for s in (*running[-self.keep_last :], *finals[-1:])} | {just_written}
        for metric, mode in self.monitors.items():
            keep |= {s.name for s in ranked(managed, metric, mode)[: self.keep_best]}
        if self.keep_log_spaced and managed:
            for target in log_spaced(managed[-1].number):
                keep.add(min(managed, key=lambda s: abs(s.number - target)).name)
        return [s.name for s in managed if s.name not in keep]


def ranked(present: Iterable[Saved], metric: str, mode: str) -> Sequence[Saved]:
    """Those that have the metric, best first; of equal ones the earlier is the better, and NaN is no candidate."""
    sign = 1.0 if mode == "min" else -1.0
    measured = [(sign * s.metrics[metric], s.number, s) for s in present if metric in s.metrics]
    return [s for value, _, s in sorted(measured, key=lambda m: m[:2]) if not math.isnan(value)]


def log_spaced(newest: int) -> set[int]:
    r"""Numbers to keep of 1, ..., `newest`: for k = 0, 1, ... the last two multiples of 2^k.

    \lfloor n / 2^k \rfloor 2^k - 2^k is 2^k to 2^(k+1) - 1 back, so every age has one. What is wanted at n + 1 is n + 1
    or was wanted at n: nothing is missed that an earlier decision deleted.
    """
    wanted, step = set(), 1
    while step <= newest:
        last = newest // step * step
        wanted |= {last, last - step}
        step *= 2
    return {number for number in wanted if number >= 1}
