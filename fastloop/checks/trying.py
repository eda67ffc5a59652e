# SPDX-License-Identifier: Apache-2.0
"""Whether a batch may be tried, so that afterwards all is as before, and no rank waits for another."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastloop.checks.undisturbed import iterators_below
from fastloop.loop.strategy import _is_sharded, unwrapped
from fastloop.machine import available_bytes

SPARE = 0.8  # of the free host memory that copies of model and optimizer may take


def why_not(model: nn.Module, loss_fn: Any, batch: Any, optimizer: Optimizer | None, world: int = 1) -> str:
    """Why no batch can be tried; "" where one can.

    Args:
        world: ranks that train together. What one of them cannot try, none may: a loss with a collective would hang.
    """
    inner = unwrapped(model)
    if batch is None:
        return "the loader gives none by an index, and may be gone through once only"
    if any(is_lazy(tensor) for tensor in (*inner.parameters(), *inner.buffers())):
        return "the model has parameters without values; call it once with a batch first"
    if _is_sharded(inner) or (world > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in inner.modules())):
        return "the model's forward is one of all ranks together (FSDP2, SyncBatchNorm)"
    moving = iterators_below(loss_fn)
    if moving:
        return f"the loss function holds an iterator ({moving[0]}), which a try would move on"
    needed, free = bytes_of(inner, optimizer) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")), available_bytes()
    if free is not None and needed > SPARE * free:
        gib = 2**30
        return f"putting back the model takes {needed / gib:.3g} GiB of host memory, and {free / gib:.3g} are free"
    return ""


def bytes_of(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Of parameters, buffers and the optimizer's state."""
    states = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *(value for value in states if isinstance(value, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
