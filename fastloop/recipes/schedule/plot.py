# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each window, computed and drawn without a training."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from fastloop import drawing
from fastloop.loop.plateau import Plateau
from fastloop.schedules import Schedule, from_name

WHERE = "[plot_schedule]"
Drawn = str | Mapping[str, Any] | Schedule | Callable[[int], float]


def plot_schedule(
    schedule: Drawn,
    total_steps: int,
    path: str | os.PathLike[str],
    *,
    lr: float = 1.0,
    values: Sequence[float] | None = None,
) -> Path:
    """Draw the learning rate of each window of a training; returns the path.

    Args:
        schedule: a name, a mapping or an object of `fastloop.schedules`, or a function of the step.
        total_steps: windows of the training.
        path: of the picture; the ending says the format.
        lr: the base learning rate.
        values: for "plateau", of the monitored metric (mode "min"), evaluated in even distances and at the end.

    Raises:
        ValueError: an argument or a rate out of range; values where nothing follows them, or none for "plateau".
        TypeError: a schedule of another kind, such as torch's, which cannot be computed without stepping them; values
            that are no numbers.
        MissingExtra: matplotlib is not installed.
    """
    made = resolved(schedule, total_steps)
    rates = rates_of(made, total_steps, lr, values)
    for window, rate in enumerate(rates):
        if not math.isfinite(rate):
            raise ValueError(f"{WHERE} the learning rates must be finite, got {rate} of window {window}; change "
                             "the schedule, or draw fewer windows")  # fmt: skip
    figure = drawing.figure(what="the plot of a schedule")
    axes = figure.add_subplot()
    # Steps, not slopes: a rate holds for a whole window, and drops are edges.
    axes.step(range(total_steps), rates, where="post", color="tab:blue", label="learning rate")
    axes.set(
        xlabel="window",
        ylabel="learning rate",
        title=textwrap.fill(str(made), 64, break_on_hyphens=False) if isinstance(made, Schedule) else "",
    )
    axes.set_xlim(0, max(total_steps - 1, 1))
    axes.set_ylim(0, max(max(rates), 1e-300) * 1.05)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.3)
    if values is not None:
        _draw_values(axes, total_steps, values)
    return drawing.save(figure, path)


def resolved(schedule: Drawn, total_steps: int) -> Schedule | Callable[[int], float]:
    """The schedule for a training of that length.

    Raises:
        ValueError, TypeError: as for `plot_schedule`.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"{WHERE} total_steps must be an integer of at least 1, got {total_steps!r}; pass e.g. 1000")
    if isinstance(schedule, (str, Mapping, Schedule)):
        return from_name(schedule, total_steps)
    if not callable(schedule):
        raise TypeError(
            f"{WHERE} schedule must be a name, a schedule of fastloop.schedules or a function of the step, got "
            f"{type(schedule).__name__}"
        )
    return schedule


def rates_of(
    schedule: Schedule | Callable[[int], float], total_steps: int, lr: float, values: Sequence[float] | None = None
) -> list[float]:
    """The learning rate of each of so many windows; `values` as for `plot_schedule`.

    Raises:
        ValueError: as for `plot_schedule`.
    """
    if not 0.0 < lr < math.inf:
        raise ValueError(f"{WHERE} lr must be above 0, got {lr!r}; pass e.g. 1e-3")
    follows = isinstance(schedule, Schedule) and schedule.follows_metric
    if follows != (values is not None):
        raise ValueError(
            f"{WHERE} values are needed for 'plateau', which follows them, and for nothing else; "
            + ("pass e.g. the validation losses of a run" if follows else "leave them out")
        )
    if values is None:
        return [lr * schedule(step) for step in range(total_steps)]
    assert isinstance(schedule, Schedule)
    return _rates_of_plateau(schedule, total_steps, lr, values)


def evaluations(total_steps: int, count: int) -> list[int]:
    """Windows after which so many evaluations are made: in even distances, the last at the end."""
    return [round((i + 1) * total_steps / count) for i in range(count)]


def _rates_of_plateau(schedule: Schedule, total_steps: int, lr: float, values: Sequence[float]) -> list[float]:
    if not 1 <= len(values) <= total_steps:
        raise ValueError(
            f"{WHERE} values must be at least 1 and at most total_steps = {total_steps}, got {len(values)} of them"
        )
    for value in values:
        if not isinstance(value, Real):
            raise TypeError(
                f"{WHERE} values must be numbers, got {value!r}; pass e.g. "
                "[value for step, value in loop.history['val/loss']]"
            )
    plateau, rates, done = Plateau(schedule), [], 0
    for value, step in zip(values, evaluations(total_steps, len(values)), strict=True):
        rates += [lr * plateau.factor] * (step - done)
        done = step
        plateau.update(value)
    return rates


def _draw_values(axes: Any, total_steps: int, values: Sequence[float]) -> None:
    """The metric on an axis of its own, where it was evaluated."""
    right = axes.twinx()
    places = evaluations(total_steps, len(values))
    right.plot(places, values, ".-", color="tab:orange", linewidth=0.8, label="monitored metric")
    right.set_ylabel("monitored metric")
    lines = axes.get_lines() + right.get_lines()
    axes.legend(lines, [line.get_label() for line in lines], loc="upper right")


__all__ = ["plot_schedule"]
