# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each window: one of our schedules, a scheduler of torch, or a function of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastloop import schedules
from fastloop.loop.plateau import Plateau
from fastloop.schedules import Schedule, from_name

logger = logging.getLogger("fastloop.loop")

Given = str | Mapping[str, Any] | Schedule | LRScheduler | Callable[[int], float] | None


class Rates:
    """Sets the groups' learning rates, once for each window: window `step` is trained with lr(step).

    lr(step) = initial_lr * schedule(step) for a schedule of ours and for a function; a scheduler of torch is stepped
    after each window, skipped ones too. `plateau` and torch's ReduceLROnPlateau are stepped after each evaluation.

    Args:
        optimizer: whose groups are set; "initial_lr" is kept in them, as torch's schedulers do.
        schedule: what was given to Loop.
        mode: "min" or "max", of the metric that `plateau` follows; torch's scheduler has its own.

    Raises:
        TypeError: something else, or torch's scheduler of another optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Given, mode: str = "min") -> None:
        self._optimizer = optimizer
        self._scheduler: LRScheduler | None = None
        self._torchs_plateau: ReduceLROnPlateau | None = None
        self._plateau: Plateau | None = None
        self._factor: Callable[[int], float] | None = None
        self._schedule: Callable[[int], float] | None = None  # as it was given
        self._bases: list[float] = []
        self._value = math.nan
        if isinstance(schedule, (str, Mapping)):
            schedule = from_name(schedule)
        if isinstance(schedule, (LRScheduler, ReduceLROnPlateau)):
            if schedule.optimizer is not optimizer:
                raise TypeError("[Loop] the schedule is a torch scheduler of another optimizer; make it with this one")
            if isinstance(schedule, ReduceLROnPlateau):
                self._torchs_plateau = schedule
            else:
                self._scheduler = schedule
        elif callable(schedule):
            name = getattr(schedule, "__name__", "")
            if isinstance(schedule, type):
                raise TypeError(f"[Loop] schedule is the class {name}; pass {name}(optimizer, ...)")
            if schedule is getattr(schedules, name, None):
                raise TypeError(f"[Loop] schedule is what makes a schedule; pass fastloop.schedules.{name}(...)")
            self._factor = self._schedule = schedule
            if isinstance(schedule, Schedule) and schedule.follows_metric:
                self._plateau = Plateau(schedule, mode)
                self._factor = self._plateau_factor
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", float(group["lr"]))
        elif schedule is not None:
            raise TypeError(
                f"[Loop] schedule must be a name, a schedule of fastloop.schedules, a scheduler of torch.optim or a "
                f"function of the step, got {schedule!r}"
            )

    def begin(self, step: int, total_steps: int | None) -> None:
        """Before the first window: fill in the training's length, set the rate of window `step`."""
        if isinstance(self._schedule, Schedule) and self._plateau is None:
            self._factor = self._schedule.resolved(total_steps)  # anew: a later call may train longer
        self._bases = []
        if self._factor is not None:
            factor = self._factor(step)
            if isinstance(factor, bool) or not isinstance(factor, Real):
                raise TypeError(
                    f"[Loop] schedule must give a number for window {step}, got {factor!r}; pass a function of the "
                    "step that returns one"
                )
            self._set(step)

    def advance(self, step: int) -> None:
        """After a window: set the rate of the next one, number `step`."""
        if self._factor is not None:
            self._set(step)
        elif self._scheduler is not None:
            # It warns where its optimizer's step was not called, which is so after a skipped window.
            self._optimizer._opt_called = True  # type: ignore[attr-defined]
            self._scheduler.step()

    @property
    def shown(self) -> float:
        """The rate of the window under way, of the first group; NaN where only the device knows it."""
        lr = self._optimizer.param_groups[0]["lr"]
        if not isinstance(lr, torch.Tensor):
            return float(lr)
        if self._factor is not None:
            return self._value
        return float(lr) if lr.device.type == "cpu" else math.nan

    def evaluated(self, value: float) -> None:
        """After an evaluation: its monitored metric."""
        if self._torchs_plateau is not None:
            self._torchs_plateau.step(value)
        elif self._plateau is not None:
            self._plateau.update(value)
            self._set(0)  # now: the next window is trained with it

    def _plateau_factor(self, step: int) -> float:
        assert self._plateau is not None
        return self._plateau.factor

    def _set(self, step: int) -> None:
        assert self._factor is not None
        factor = self._factor(step)
        for group in self._optimizer.param_groups[len(self._bases) :]:  # also of groups that were added since
            self._bases.append(float(group.setdefault("initial_lr", float(group["lr"]))))
        self._value = self._bases[0] * factor
        for group, base in zip(self._optimizer.param_groups, self._bases, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    @property
    def follows_metric(self) -> bool:
        """Whether nothing but evaluations moves the rate."""
        return self._plateau is not None or self._torchs_plateau is not None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. A schedule of ours has no state but for `plateau`: it depends on the step alone."""
        if self._plateau is not None:
            return {"plateau": self._plateau.state_dict()}
        scheduler = self._scheduler or self._torchs_plateau
        return {} if scheduler is None else scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint; without the state of a schedule of this kind it begins anew, with a warning."""
        scheduler = self._scheduler or self._torchs_plateau
        if scheduler is None and self._plateau is None:
            return
        if not state or (self._plateau is None) == ("plateau" in state):
            logger.warning("the checkpoint is of a run with another kind of schedule; this one begins anew")
        elif self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])
        elif scheduler is not None:
            scheduler.load_state_dict(dict(state))


__all__ = ["Given", "Rates"]
