# SPDX-License-Identifier: Apache-2.0
"""The learning-rate range test: train while the rate grows exponentially, and read off where the loss falls fastest.

    lr_i = low * (high / low)^(i / (steps - 1))

Reference: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastloop.loop.loader import generators_of
from fastloop.loop.loop import Loop
from fastloop.loop.restore import process_kept, restored
from fastloop.tune.losses import Losses
from fastloop.tune.step import Steps

FEWEST_STEPS = 10
FEWEST_JUDGED = FEWEST_STEPS  # losses before one counts as diverged, as long as it is finite
DIVERGED = 4.0  # times the best smoothed loss
SURE_FALL = 4.0  # standard deviations of the smoothed loss: the deepest of 100 that only vary lies 2.5 deep
SMALLEST_FALL = 1e-3  # of the first loss
REFUSED = (
    "strategy",
    "schedule",
    "run_dir",
    "resume",
    "auto_microbatch",
    "cuda_graph",
    "patience",
    "nonfinite",
    "callbacks",
    "progress",
)


@dataclass(frozen=True)
class LRRange:
    """What a range test saw, and the rate that it suggests for the optimizer's first group.

    Attributes:
        learning_rates: of each step; losses: of its batches, before the update; smoothed: their moving average.
        steepest: where the loss falls fastest; tenth_of_minimum: a tenth of the rate at the lowest smoothed loss.
        suggestion: the smaller of the two; None where the curve does not say, `note` says why.
        diverged_at: the rate at which the loss was no longer finite, or above 4 times the lowest smoothed one, twice
            in turn and by more than it varies from batch to batch; None if it never was.
        note: a sentence about the suggestion, or why there is none.
    """

    learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    steepest: float | None
    tenth_of_minimum: float | None
    diverged_at: float | None
    note: str

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curve, the suggestion marked, into an image file.

        Raises:
            MissingExtra: matplotlib is not installed.
            ValueError: no losses to draw, or a file name of no image format.
        """
        from fastloop.tune.lr_plot import draw

        draw(self, path)


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Any,
    train_loader: Any,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    options: Mapping[str, Any] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
) -> LRRange:
    """Train for `steps` windows with a rate that grows from `low` to `high`, and suggest one.

    Afterwards parameters, buffers, modes, gradients, the optimizer's state and groups, and the random states of torch,
    Python, NumPy and the loader are what they were, bit for bit, also after an error or Ctrl-C; so are torch's settings
    for the whole process that options change. What else the loader keeps (a place in its data, the batches of a
    generator) has moved on.

    Groups keep the ratios of their rates: the rates here are those of the first group whose rate is above 0.

    Args:
        model, optimizer, loss_fn, train_loader: as for `Loop` and `Loop.fit`; the loader is begun anew at its end.
        low, high: the first rate and the last.
        steps: at least 10; it ends sooner where the loss diverges (`LRRange.diverged_at`).
        options: of `Loop`: precision, accumulation_steps, max_grad_norm, compile, device, ...
        on_step: called with each step's number, rate and loss.

    Raises:
        ValueError: an argument out of range, an option that does not fit, a loader without a batch.
    """
    check_range(low, high, steps)
    given = dict(options or {})
    refused = [name for name in given if name in REFUSED]
    if refused:
        raise ValueError(
            f"[tune] a range test sets the rate itself, in this process, until the loss is not finite, and leaves no "
            f"files: options must not have {', '.join(refused)}; leave that out"
        )
    if given.get("device") is None and torch.cuda.is_available():
        torch.cuda.init()  # its random states count too: they cannot be kept before they exist
    modules = [each for each in (model, loss_fn) if isinstance(each, nn.Module)]
    with process_kept(), restored(modules, optimizer, generators_of(train_loader)):
        loop = Loop(model, optimizer, loss_fn, progress=False, curves=False, **given)
        if not model.training:
            model.train()
        return sweep(loop, train_loader, low, high, steps, on_step)


def sweep(
    loop: Loop,
    loader: Any,
    low: float,
    high: float,
    steps: int,
    on_step: Callable[[int, float, float], None] | None = None,
) -> LRRange:
    """The test itself, on a loop without a schedule; what it trains stays trained."""
    rates = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    with _without_warnings():
        return summary(*_swept(loop, loader, rates, on_step), steps)


def check_range(low: float, high: float, steps: int) -> None:
    """Raise ValueError unless 0 < low < high and there are steps enough."""
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(
                f"[tune] {name} must be a finite learning rate above 0, got {value!r}; the usual is 1e-7 to 10"
            )
    if not low < high:
        raise ValueError(f"[tune] low must be below high, got {low!r} and {high!r}; the usual is 1e-7 to 10")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < FEWEST_STEPS:
        raise ValueError(f"[tune] steps must be an integer of at least {FEWEST_STEPS}, got {steps!r}; 100 is usual")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of the loop: that the loss rises, and then is not finite, is what a range test waits for."""
    logger = logging.getLogger("fastloop.loop")

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger.addFilter(errors_only)
    try:
        yield
    finally:
        logger.removeFilter(errors_only)


def _swept(
    loop: Loop, loader: Any, rates: list[float], on_step: Callable[[int, float, float], None] | None
) -> tuple[list[float], list[float], float | None]:
    """(rates, losses, the rate that ended it): one window for each rate, as far as the losses stay finite and low."""
    groups = loop.optimizer.param_groups
    bases = [float(group.get("initial_lr", group["lr"])) for group in groups]
    first = next((base for base in bases if base > 0), None)
    losses: list[float] = []
    average = Average(len(rates))
    heard = Losses(loop)
    with Steps(loop, loader) as windows:
        for i, rate in enumerate(rates):
            for group, base in zip(groups, bases, strict=True):
                _set_rate(group, rate * (1.0 if first is None else base / first))
            windows.step()
            loss = heard.values[-1]
            if on_step is not None:
                on_step(i, rate, loss)
            if not math.isfinite(loss):
                return rates[:i], losses, rate
            losses.append(loss)
            if average.diverged(loss):
                return rates[: i + 1], losses, rate
    return rates, losses, None


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


# ---- reading the curve


class Average:
    """A moving average over about a twentieth of the steps, its beginning corrected as Adam's is.

    s = beta * s + (1 - beta) * loss;   average_i = s / (1 - beta^(i + 1))
    """

    def __init__(self, steps: int) -> None:
        self.beta = 1.0 - 1.0 / max(steps / 20, 2.0)
        self._sum = 0.0
        self._weight = 0.0
        self._losses: list[float] = []
        self._best = math.inf

    def deviation(self, count: int) -> float:
        """The standard deviation of the average of `count` losses, in that of one loss."""
        faded = self.beta**count
        return math.sqrt((1 - self.beta) / (1 + self.beta) * (1 + faded) / (1 - faded))

    def update(self, loss: float) -> float:
        """The average with one more loss."""
        self._sum = self.beta * self._sum + (1 - self.beta) * loss
        self._weight = self.beta * self._weight + (1 - self.beta)
        return self._sum / self._weight

    def diverged(self, loss: float) -> bool:
        """Whether this loss, the one before and the average are above 4 times the lowest average, and not by chance.

        Below 0, it is as far above the lowest as 4 times the fall.
        """
        value = self.update(loss)
        self._losses.append(loss)
        self._best = best = min(self._best, value)
        limit = DIVERGED * best if best > 0 else best + DIVERGED * max(self._losses[0] - best, -best)
        if len(self._losses) < FEWEST_JUDGED or min(value, *self._losses[-2:]) <= limit:
            return False
        return value - best > SURE_FALL * _noise(self._losses)


def summary(rates: list[float], losses: list[float], diverged_at: float | None, steps: int | None = None) -> LRRange:
    """The curve and what it suggests. Arithmetic alone.

    Args:
        steps: as many as were planned, which the average goes by; None: as many as there are rates.
    """
    average = Average(len(rates) if steps is None else steps)
    smoothed = [average.update(loss) for loss in losses]

    def result(
        note: str, steepest: float | None = None, tenth: float | None = None, chosen: float | None = None
    ) -> LRRange:
        return LRRange(rates, losses, smoothed, chosen, steepest, tenth, diverged_at, note)

    if not losses:
        return result(
            "no suggestion: the first loss was not finite, before any update; look at the data and the model's output"
        )
    if len(losses) < FEWEST_STEPS:
        return result(
            f"no suggestion: after {len(losses)} steps the loss was no longer finite; begin with a lower rate (low)"
        )
    few = max(3, len(losses) // 10)
    start = sum(losses[:few]) / few
    noise = _noise(losses)
    surely = [value + SURE_FALL * noise * average.deviation(i + 1) for i, value in enumerate(smoothed)]
    bottom = surely.index(min(surely))
    if not start > max(surely[bottom], smoothed[bottom] + SMALLEST_FALL * abs(start)):
        return result(
            f"no suggestion: the loss never fell by more than it varies from batch to batch ({start:.4g} at first, "
            f"{smoothed[bottom]:.4g} at best); take more steps, larger batches or accumulation, or look for what keeps "
            "it from learning"
        )
    if bottom < few:
        return result("no suggestion: the loss was lowest at the first rates and rose; begin with a lower one (low)")
    steepest = rates[_steepest(losses, bottom)]
    tenth = rates[bottom] / 10
    note = "the smaller of the rate of the steepest descent and a tenth of the rate at the lowest loss"
    if bottom >= len(losses) - 2 and diverged_at is None:
        note += "; the loss was still falling at the last rate: a higher one (high) may be better"
    return result(note, steepest, tenth, min(steepest, tenth))


def _noise(losses: list[float]) -> float:
    """The standard deviation from batch to batch.

    Half of the successive differences are below 0.6745 * sqrt(2) deviations: a fall of some steps does not count in.
    """
    return float(np.median(np.abs(np.diff(losses)))) / (0.6745 * math.sqrt(2))


def _steepest(losses: list[float], bottom: int) -> int:
    """Where a line through a tenth of the points around falls fastest; not after the lowest.

    Through the losses themselves: the moving average lies behind them by some steps.
    """
    half = max(2, len(losses) // 20)
    values = np.asarray(losses[: bottom + half + 1])
    offsets = np.arange(-half, half + 1)
    if values.size <= offsets.size:
        return bottom // 2
    slopes = [float(offsets @ values[i - half : i + half + 1]) for i in range(half, values.size - half)]
    return half + int(np.argmin(slopes))


__all__ = ["LRRange", "lr_range_test"]
