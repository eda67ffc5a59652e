# SPDX-License-Identifier: Apache-2.0
"""What runs each step: windows, backward, step. Everything else is called from here and lives elsewhere.

    for window in loop.windows(loader, epochs=3):       # the micro-batches of one optimizer step
        for batch in window:                            # on the device
            with loop.autocast():
                loss = criterion(loop.model(batch[0]), batch[1])
            loop.backward(loss)
        loop.step()

A micro-batch i has a mean loss L_i over a weight w_i (samples, or tokens). Backward runs on L_i * w_i / N with N the
nominal weight of a window, known on the host; the step divides the gradients by sum(w_i) / N. So the gradient is

    sum_i w_i grad(L_i) / sum_i w_i

over all micro-batches of all ranks, the one of a single large batch, whatever their sizes. Where ranks average their
gradients, the step divides by sum(w_i) / (N * ranks), the sum being over all of them.

On a CPU scalars are Python numbers; on a GPU they stay there as tensors, and nothing here waits for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.loop.backward import Backward
from fastloop.loop.data import END, Feed, Position, first_tensor, samples_in
from fastloop.loop.strategy import Ranks
from fastloop.loop.update import OurUpdate, Scalar, TorchUpdate, weighted

TAKEN = object()  # in the place of a window's first batch


class Window:
    """The micro-batches of one optimizer step. Iterate over it once; call backward once for each micro-batch.

    Attributes:
        samples, tokens: what this rank has had in it so far; tokens where its first tensor is integers [batch, length].
    """

    __slots__ = (
        "_awaiting", "_core", "_count", "_exhausted", "_feed", "_first", "_padding", "batches", "losses", "samples",
        "stepped", "sums", "tokens", "void", "weight",
    )  # fmt: skip

    def __init__(self, core: Core, feed: Feed, first: Any, count: int) -> None:
        self._core = core
        self._feed = feed
        self._first = first  # fetched already: it is how the loop knows that there is another window
        self._count = count
        self._awaiting = self._padding = self._exhausted = self.stepped = self.void = False
        self.weight: Scalar = 0.0
        self.sums: list[Scalar] = []  # weighted sums of the loss and of the metrics
        self.losses = 0
        self.samples = 0
        self.tokens = 0
        self.batches: list[Any] | None = None  # kept where the batch of a loss that is not finite is to be saved

    def __iter__(self) -> Iterator[Any]:
        if self._first is TAKEN:
            raise RuntimeError("[Loop] a window is iterated over once")
        core, feed, batch = self._core, self._feed, self._first
        self._first = TAKEN
        together = core.ranks.size > 1
        for index in range(self._count):
            if index > 0:
                batch = feed.next()
            if batch is END:
                if not together:
                    break
                batch = feed.repeated()  # others still have data, and wait for this rank in their collectives
                self._padding = True
            if self._awaiting and together:
                raise RuntimeError("[Loop] a micro-batch without backward() leaves the other ranks waiting for it")
            self._awaiting = True
            if core._sync_gradients is not None:
                core._sync_gradients(index == self._count - 1)
            if self.batches is not None:
                self.batches.append(batch)
            if not self._padding:
                self._count_in(batch)
            yield batch
        self._exhausted = True

    @property
    def first_batch(self) -> Any:
        """The batch that it begins with, while it has not begun; None where this rank has none."""
        return None if self._first is TAKEN or self._first is END else self._first

    def expect_backward(self) -> None:
        """Another backward will come, of a part of a micro-batch."""
        self._awaiting = True

    def forget(self) -> None:
        """The backwards so far did not count: the window's micro-batches come again."""
        self.weight, self.sums, self.losses = 0.0, [], 0

    def _count_in(self, batch: Any) -> None:
        self._core._batch_samples = samples = samples_in(batch)
        self.samples += samples
        tensor = batch[0] if type(batch) in (list, tuple) and len(batch) else batch
        if type(tensor) is not Tensor:
            tensor = first_tensor(batch)
        if tensor is not None and tensor.dim() == 2 and not tensor.is_floating_point():
            self.tokens += tensor.numel()


class StepResult:
    """What a step did, as scalars on the device; reading one on a GPU waits for it.

    Attributes:
        loss: mean loss of the window, over all ranks. grad_norm: before clipping. skipped: 1.0 if the gradients were
            not finite and nothing was updated, else 0.0. Each a 0-dim tensor.
    """

    __slots__ = ("_loss", "_norm", "_skipped")

    def __init__(self, loss: Scalar, norm: Scalar, skipped: Scalar) -> None:
        self._loss, self._norm, self._skipped = loss, norm, skipped

    loss = property(lambda self: _as_tensor(self._loss))
    grad_norm = property(lambda self: _as_tensor(self._norm))
    skipped = property(lambda self: _as_tensor(self._skipped))


def _as_tensor(number: Scalar) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)


class Core:
    """The loop proper; `Loop` sets it up, and hears of each step through the hooks below."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    accumulation_steps: int
    autocast: Callable[[], AbstractContextManager[Any]]

    def _start_core(self, update: OurUpdate | TorchUpdate, sync_gradients: Callable[[bool], None] | None) -> None:
        self.global_step = 0
        self.epoch = 0
        self._update = update
        self._sync_gradients = sync_gradients
        self._backward = Backward()
        self._on_device = self.ranks.device.type != "cpu"
        self._window: Window | None = None
        self._nominal = 0.0  # weight of a full window, on the host
        self._batch_samples = 1
        self._metric_names: tuple[str, ...] | None = None  # those of the run, once its first loss is there
        self._keep_batches = False
        self._has_trained = False  # in this process
        self._updating = False  # the weights, or the counters that belong to them, may be in between two steps

    # ---- hooks of Loop

    def _stepped(self, window: Window, totals: list[Scalar], norm: Scalar, skipped: Scalar) -> None:
        """Count the step, and advance what goes by steps."""
        raise NotImplementedError

    def _at_boundary(self, feed: Feed) -> bool:
        """Between two windows; True ends the run."""
        raise NotImplementedError

    def _flags(self) -> list[float]:
        """What the ranks tell each other at each step, as numbers that are added up."""
        raise NotImplementedError

    # ---- the windows of an epoch

    def _windows_of_epoch(self, feed: Feed, max_steps: int | None) -> Iterator[Window]:
        """Yields windows; returns at the epoch's end or at max_steps."""
        longest = self._batches_of_longest_rank(feed)
        while max_steps is None or self.global_step < max_steps:
            window = self._next_window(feed, longest)
            if window is None:
                return
            self._window = window
            yield window
            if not window.stepped:
                raise RuntimeError("[Loop] a window was left without loop.step(); call it once after its micro-batches")
            if window.void or self._at_boundary(feed):  # no rank had data for it, or the run is to stop
                return

    def _batches_of_longest_rank(self, feed: Feed) -> float | None:
        """None where nobody knows. Alone, the loader itself says when it ends."""
        if self.ranks.size == 1:
            return None
        length = feed.length()
        longest = self.ranks.largest(math.inf if length is None else float(length))
        return None if longest == math.inf else longest

    def _next_window(self, feed: Feed, longest: float | None) -> Window | None:
        count = self.accumulation_steps
        if longest is not None:
            left = int(longest) - feed.batches - feed.padded
            if left <= 0:
                return None
            count = min(count, left)
        feed.batches_before = feed.batches
        first = feed.next()
        if first is END and self.ranks.size == 1:
            return None
        window = Window(self, feed, first, count)
        if self._keep_batches:
            window.batches = []
        return window

    # ---- backward

    def backward(
        self,
        loss: Tensor,
        weight: float | Tensor | None = None,
        *,
        reduction: str = "mean",
        metrics: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Backward of one micro-batch's loss, weighted so that the window's gradient is that of one large batch.

        Args:
            loss: 0-dim.
            weight: what the loss is a mean over: samples or tokens. None: the size of the first dimension of the
                batch's first tensor. A tensor on the device is not read by the host.
            reduction: "mean", or "sum" if the loss is a sum over its weight.
            metrics: scalars to be averaged with the same weights and logged.

        Raises:
            RuntimeError: outside of a window, or twice for a micro-batch.
        """
        window = self._window
        if window is None or not window._awaiting:
            raise RuntimeError(
                "[Loop] backward() is called once for each batch of a window; add up several losses of one batch first"
            )
        window._awaiting = False
        if reduction not in ("mean", "sum"):
            raise ValueError(f'[Loop] reduction must be "mean" or "sum", got {reduction!r}')
        if loss.dim() != 0:
            raise ValueError(f"[Loop] the loss must be a scalar, got shape {tuple(loss.shape)}; take its mean")
        if weight is None:
            weight = float(self._batch_samples)
        elif isinstance(weight, Tensor):
            weight = weight.detach().double().reshape(()) if weight.device.type != "cpu" else float(weight)
        else:
            weight = float(weight)
        if isinstance(weight, float) and not weight >= 0.0:
            raise ValueError(
                f"[Loop] the weight must be at least 0, got {weight}; pass the samples or tokens of the mean"
            )
        if not self._nominal:
            self._set_nominal(weight)
        if window._padding:
            weight = 0.0
        factor = weight / self._nominal if reduction == "mean" or window._padding else 1.0 / self._nominal
        # A mean over nothing is NaN, and 0 times its gradient too: it is left out, unless other ranks wait for it.
        if isinstance(weight, Tensor) or weight or self._sync_gradients is not None:
            self._backward(loss, factor, self._update.scaler)
        self._count_loss(window, loss, weight, reduction, metrics)

    def _set_nominal(self, weight: Scalar) -> None:
        """N: the weight of a window whose micro-batches are all like the first. A tensor is read here, this once."""
        weight = float(weight)
        self._nominal = self.ranks.largest((weight if weight > 0 else 1.0) * self.accumulation_steps)

    def _count_loss(
        self, window: Window, loss: Tensor, weight: Scalar, reduction: str, metrics: Mapping[str, Any] | None
    ) -> None:
        values = [loss]
        if metrics or self._metric_names != ():
            values += self._in_order(metrics or {})
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                number: Scalar = value.item() if value.device.type == "cpu" else value.detach().double().reshape(())
            else:
                number = float(value)
            if i > 0 or reduction == "mean" or window._padding:
                number = weighted(number, weight)
            if window.losses == 0:
                window.sums.append(number)
            else:
                window.sums[i] = window.sums[i] + number
        window.weight = window.weight + weight
        window.losses += 1

    def _in_order(self, metrics: Mapping[str, Any]) -> list[Any]:
        """The metrics' values; their names are the same for every batch, on every rank."""
        names = self._metric_names
        if names is None:
            if "loss" in metrics:
                raise ValueError('[Loop] a metric is named "loss", which the loss itself is; give it another name')
            names = self._metric_names = tuple(metrics)
        if len(names) != len(metrics) or any(name not in metrics for name in names):
            raise ValueError(
                f"[Loop] metrics must have the same names for every batch, got {sorted(metrics)} after "
                f"{sorted(names)}; return all of them each time"
            )
        return [metrics[name] for name in names]

    # ---- step

    def step(self) -> StepResult:
        """Update the weights with the window's gradients, clear these, advance the schedule.

        Always a real step: it counts, and moves the schedule, also where gradients that are not finite leave the
        weights as they are.

        Raises:
            RuntimeError: outside of a window, before its last micro-batch, or without any backward.
        """
        window = self._window
        if window is None:
            raise RuntimeError("[Loop] step() outside of a window, or called twice for one")
        if not window._exhausted or window.losses == 0:
            raise RuntimeError(
                "[Loop] step() before the window's last micro-batch; iterate over the whole window, calling "
                "loop.backward(loss) for each batch, then step"
            )
        self._window = None
        window.stepped = True
        totals, norm, skipped = self._update_weights(window)
        self._clear_gradients()
        loss = totals[1] / totals[0] if isinstance(totals[0], Tensor) or totals[0] else math.nan
        if not window.void:
            self._stepped(window, totals, norm, skipped)
        return StepResult(loss, norm, skipped)

    def _update_weights(self, window: Window) -> tuple[list[Scalar], Scalar, Scalar]:
        """Step with the window's gradients; its totals, the gradients' norm, and whether they were skipped."""
        totals: list[Scalar] = [window.weight, *window.sums]
        if self.ranks.size > 1:
            totals = self._sum_over_ranks(window, totals)
        scale = totals[0] / (self._nominal * self.ranks.size)
        # Only ranks whose data have ended ask: where one of the others has data, there are samples.
        samples = 1 + len(window.sums)  # of all ranks, where there are several
        window.void = window._padding and window.samples == 0 and float(totals[samples]) == 0.0
        norm: Scalar = 0.0
        skipped: Scalar = 0.0
        if not window.void:
            self._updating = True
            scale, nothing = _without_zero(scale)
            if not self._has_trained and nothing is not True:
                self._check_gradients()
            norm, skipped = (0.0, 1.0) if nothing is True else self._update(scale, nothing)
        return totals, norm, skipped

    def _check_gradients(self) -> None:
        if all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "[Loop] the losses of the first window reach no parameter of the optimizer; make it with the "
                "parameters of the model that is called"
            )
        self._has_trained = True

    def _clear_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def _sum_over_ranks(self, window: Window, totals: list[Scalar]) -> list[Scalar]:
        """One collective for weights, losses, samples and flags; on a GPU nobody waits for it."""
        values = [*totals, float(window.samples), float(window.tokens), *self._flags()]
        device = self.ranks.device
        if not self._on_device:
            return self.ranks.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        # A number that becomes a tensor there waits for the device, unless it comes from pinned memory.
        numbers = [v for v in values if not isinstance(v, Tensor)]
        pinned = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=True)
        moved = iter(pinned.to(device, non_blocking=True).unbind())
        return list(self.ranks.sum(torch.stack([v if isinstance(v, Tensor) else next(moved) for v in values])).unbind())


def _without_zero(scale: Scalar) -> tuple[Scalar, Scalar | bool]:
    """A divisor, and whether there is nothing to divide: a window that weighs nothing has no gradient."""
    if isinstance(scale, float):
        return (scale, False) if scale else (1.0, True)
    nothing = (scale == 0).double()
    return scale + nothing, nothing


__all__ = ["Core", "Position", "StepResult", "Window"]
