# SPDX-License-Identifier: Apache-2.0
"""Out of memory: the micro-batch is halved, the window and its weight stay, the training goes on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fastloop.loop.data import samples_in, sliced
from fastloop.loop.evaluate import parts

if TYPE_CHECKING:
    from fastloop.loop.core import Window
    from fastloop.loop.fitting import Fitting

logger = logging.getLogger("fastloop.loop")


def run_in_parts(loop: Fitting, window: Window) -> None:
    """Forward and backward of a window, each micro-batch in `loop._parts` parts; twice as many where memory runs out.

    The window is then begun anew, since the gradients of the micro-batch that failed are half added. A part weighs what
    its samples weigh.

    Raises:
        torch.OutOfMemoryError: a single sample is too much.
    """
    done: list[Any] = []
    for batch in window:
        todo = [batch]
        while todo:
            try:
                for each in todo:
                    _backward(loop, window, each)
                todo = []
            except torch.OutOfMemoryError:
                if loop._parts >= samples_in(batch):
                    raise
                todo = [*done, batch]
            if todo:
                _begin_anew(loop, window)
        done.append(batch)


def _begin_anew(loop: Fitting, window: Window) -> None:
    window.forget()
    loop._clear_gradients()
    loop._parts *= 2
    logger.warning("out of memory: micro-batches in %d parts from here on", loop._parts)
    gc.collect()  # it is off while windows are handed out
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _backward(loop: Fitting, window: Window, batch: Any) -> None:
    loss_fn = loop.loss_fn
    assert loss_fn is not None
    for part in _split(batch, loop._parts):
        with loop.autocast():
            result = loss_fn(loop.model, part)
        loss, metrics, weight = parts(result, float(samples_in(part)))
        window.expect_backward()
        loop.backward(loss, weight, metrics=metrics)


def _split(batch: Any, count: int) -> Iterator[Any]:
    size = samples_in(batch)
    count = min(count, size)
    for i in range(count):
        yield sliced(batch, size * i // count, size * (i + 1) // count)
