# SPDX-License-Identifier: Apache-2.0
"""Outputs of a model for all samples of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.recipes.after.batches import visit


def predict(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 256,
    precision: str | None = None,
    output: str | int | Callable[[Any], Any] | None = None,
) -> Any:
    """The model's outputs of all samples, in their order, on the CPU.

    In eval mode and without gradients; the model stays on its device, and modes and random states are put back.

    Args:
        model: called as model(input), or model(**batch) for batches that are dicts.
        data: a Dataset, a tensor, a pair of tensors, or a loader that keeps the order; targets are not used.
        batch_size: where `data` is no loader; the last batch may be smaller.
        precision: of autocast: "bf16", "fp16", "auto"; None computes in the model's own dtype.
        output: which output, where the model gives several: a key or attribute, an index, or a function of the output.

    Returns:
        A tensor [n, ...], or tuples, lists and dicts of such tensors as the model gives them.

    Raises:
        ValueError: no samples, a loader that shuffles or drops some, outputs without a row for each sample or of
            shapes that differ between batches.
        TypeError: data or outputs of another kind.
    """
    parts: list[Any] = []

    def look(outputs: list[Any], target: Any, samples: int) -> None:
        parts.append(_rows(_picked(outputs[0], output), samples))

    visit([model], data, look, batch_size=batch_size, precision=precision, where="predict")
    return _joined(parts)


def _picked(given: Any, output: str | int | Callable[[Any], Any] | None) -> Any:
    if output is None:
        return given
    try:
        if callable(output):
            return output(given)
        if isinstance(output, str) and not isinstance(given, Mapping):
            return getattr(given, output)
        return given[output]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        held = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"[predict] output={output!r} is not in what the model gives ({held})") from error


def _rows(value: Any, samples: int) -> Any:
    """On the CPU, each tensor with a row for each sample."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != samples:
            raise ValueError(
                f"[predict] outputs must have a row for each sample, got shape {tuple(value.shape)} for {samples} "
                "samples; pick the right one with output="
            )
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _rows(each, samples) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        rows = [_rows(each, samples) for each in value]
        return type(value)(*rows) if hasattr(value, "_fields") else type(value)(rows)
    if value is None:
        return None
    raise TypeError(
        f"[predict] outputs must be tensors, or tuples, lists and dicts of them, got a {type(value).__name__}; pick "
        "one with output="
    )


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if not all(type(part) is type(first) for part in parts):
        raise ValueError("[predict] the model's output has another form in some batches; pick one part with output=")
    if isinstance(first, Tensor):
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        if len(shapes) > 1:
            raise ValueError(
                f"[predict] outputs must have one shape in all batches, got {shapes[0]} and {shapes[-1]} a sample; "
                "pad all inputs to one length, or reduce the output with output=function"
            )
        return torch.cat(parts)
    if first is None:
        return None
    if any(len(part) != len(first) for part in parts):
        raise ValueError("[predict] the model's output has another length in some batches; pick one with output=")
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    columns = [_joined([part[i] for part in parts]) for i in range(len(first))]
    return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
