# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of a batch with the loop's loss function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastloop.loop.data import samples_in
from fastloop.loop.evaluate import parts

if TYPE_CHECKING:
    from fastloop.loop.fitting import Fitting


def forward_backward(loop: Fitting, batch: Any) -> None:
    """What `fit` does with each micro-batch of a window."""
    loss_fn = loop.loss_fn
    assert loss_fn is not None
    with loop.autocast():
        result = loss_fn(loop.model, batch)
    if type(result) is Tensor:
        loop.backward(result)
    else:
        loss, metrics, weight = parts(result, samples_in(batch))
        loop.backward(loss, weight, metrics=metrics)
