# SPDX-License-Identifier: Apache-2.0
"""For looking at a model outside of a training: the loss that Loop would take, batches on its device, its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastloop.loop import evaluate as evaluation
from fastloop.loop.data import map_tensors, samples_in

Loss = Callable[[nn.Module, Any], "tuple[Tensor, dict[str, Any]]"]


def loss_of(loss_fn: Any) -> Loss:
    """`function(model, batch) -> (loss, metrics)` from a criterion or a function, as `Loop` takes them.

    Raises:
        TypeError: neither of the two.
        ValueError: a criterion with reduction="sum" or "none".
    """
    if isinstance(loss_fn, nn.Module):
        loss_fn = evaluation.Supervised(loss_fn)
    if not callable(loss_fn):
        raise TypeError(f"[Loop] loss_fn must be a criterion or a function of (model, batch), got {loss_fn!r}")

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        value, metrics, _ = evaluation.parts(loss_fn(model, batch), float(samples_in(batch)))
        return value, dict(metrics)

    return loss


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def first_batch(given: Any) -> Any:
    """The first batch of a loader; a batch itself is given back.

    Raises:
        ValueError: a loader without any batch.
    """
    if not isinstance(given, DataLoader) and (isinstance(given, (Tensor, tuple, list, dict)) or hasattr(given, "to")):
        return given
    for batch in given:
        return batch
    raise ValueError("[Loop] the loader must give a batch, got none; pass a loader of at least one sample")


def call(model: Any, batch: Any) -> Any:
    """The model's output: a dict by name, the first element of a list or tuple, or the batch itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; each module's mode is put back."""
    with evaluation.eval_mode(model), torch.no_grad():
        yield


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules without children, by name, in the order of their registration."""
    return [(name, module) for name, module in model.named_modules() if not any(module.children())]
