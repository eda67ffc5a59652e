# SPDX-License-Identifier: Apache-2.0
"""A weighted loss's backward, at the cost of the graph alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloop.amp import GradScaler


class Backward:
    """d(loss * factor)/dp without the product: the factor is the gradient that backward begins with.

    A product would be one more operation forward and one more backward, on a GPU two launches for each micro-batch.
    """

    def __init__(self) -> None:
        self._factor = 0.0
        self._begin = torch.zeros(())

    def __call__(self, loss: Tensor, factor: float | Tensor, scaler: GradScaler | None) -> None:
        """Add the gradients of loss * factor (times the scaler's scale) to the parameters'.

        Args:
            loss: 0-dim.
            factor: 0-dim if a tensor, on the loss's device.
        """
        if isinstance(factor, Tensor):
            begin = factor
        elif factor == self._factor and self._begin.dtype == loss.dtype and self._begin.device == loss.device:
            begin = self._begin
        else:
            begin = torch.full((), factor, dtype=loss.dtype, device=loss.device)
            self._factor, self._begin = factor, begin
        if scaler is not None:
            begin = scaler.scale(begin)
        if begin.dtype != loss.dtype:
            begin = begin.to(loss.dtype)
        engine = _engine()
        if engine is not None and type(loss) is Tensor:
            engine((loss,), (begin,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        else:
            loss.backward(begin)


@functools.cache
def _engine() -> Callable[..., Any] | None:
    """autograd's engine, which `Tensor.backward` calls after some 25 us of looking for what a scalar loss has not.

    It is torch's own and may change: it is tried, and `Tensor.backward` is used where it is not what it was. Not at
    import: the first backward of a process starts threads for its GPUs, which a fork does not survive.
    """
    try:
        engine: Callable[..., Any] = torch.autograd.Variable._execution_engine.run_backward  # type: ignore[attr-defined]
        x = torch.ones((), requires_grad=True)
        engine((x * 3.0,), (torch.ones(()),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        return engine if x.grad is not None and x.grad.item() == 3.0 else None
    except Exception:
        return None
