# SPDX-License-Identifier: Apache-2.0
"""The loop as people write it, for the tests to hold `Loop` against: windows, weights, clipping, schedule, scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloop

FEATURES, CLASSES = 6, 3
Batch = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batches(sizes: Sequence[int], seed: int = 1) -> list[Batch]:
    made = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, FEATURES, generator=made), torch.randint(0, CLASSES, (n,), generator=made)) for n in sizes]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def windows_of(items: Sequence[Any], accumulation: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), accumulation):
        yield items[start : start + accumulation]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fastloop.AdamW": lambda params: fastloop.AdamW(params, lr=0.05, weight_decay=0.1),
    "fastloop.SGD": lambda params: fastloop.SGD(params, lr=0.05, momentum=0.9),
    "torch.AdamW": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1, fused=True),
    "torch.SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "torch.Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Batch],
    *,
    epochs: int = 1,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    lr: Callable[[int], float] | None = None,
    scheduler: Any = None,
    weigh: Callable[[Batch], float] = lambda batch: float(len(batch[0])),
    loss_of: Callable[[nn.Module, Batch], Tensor] = cross_entropy,
    autocast: Callable[[], Any] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """Train; returns the windows' mean losses.

    Normalized in the order of operations that `fastloop.loop.core` documents: the losses by weight / N, with N the
    weight of a window of batches like the first, the gradients by N / total.
    """
    ours = isinstance(optimizer, fastloop.optim.base.FusedOptimizer)
    if ours:
        for group in optimizer.param_groups:
            group["max_grad_norm"] = math.inf if max_grad_norm is None else max_grad_norm
            group["max_grad_value"] = max_grad_value
    nominal = weigh(data[0]) * accumulation
    losses, step = [], 0
    for _ in range(epochs):
        for window in windows_of(data, accumulation):
            if lr is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr(step)
            total = weighted = 0.0
            for batch in window:
                with autocast():
                    loss = loss_of(model, batch)
                weight = weigh(batch)
                scaled = loss * (weight / nominal)
                (scaled if scaler is None else scaler.scale(scaled)).backward()
                total += weight
                weighted += loss.item() * weight
            _update(optimizer, total / nominal, ours, max_grad_norm, max_grad_value, scaler)
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            losses.append(weighted / total)
            step += 1
    return losses


def _update(
    optimizer: torch.optim.Optimizer,
    scale: float,
    ours: bool,
    max_grad_norm: float | None,
    max_grad_value: float | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if ours:
        if scaler is not None:
            assert scale == 1.0, "torch's scaler would overwrite the optimizer's grad_scale"
            scaler.step(optimizer)
            scaler.update()
            return
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale  # type: ignore[attr-defined]
        return
    if scaler is not None:
        scaler.unscale_(optimizer)
    torch._foreach_mul_([p.grad for p in params], 1.0 / scale)
    if max_grad_norm is not None:
        fastloop.clip_grad_norm_(params, max_grad_norm)
    if max_grad_value is not None:
        torch.nn.utils.clip_grad_value_(params, max_grad_value)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


class Mean(nn.Module):
    """The gradient of mean(x @ w) by w is the mean of the rows of x: a sum whose rounding errors are bounded."""

    FEATURES = 5

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(self.FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w
