# SPDX-License-Identifier: Apache-2.0
"""What flows through each layer in one forward: statistics in fp64, by name, in the order of the first call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Activations:
    """Of one layer's outputs, over all of its calls.

    Attributes:
        kind: the layer's class. count: elements. zeros: how many are exactly 0. odd: how many are not finite; mean and
            deviation are NaN with any.
    """

    kind: str
    count: int = 0
    zeros: int = 0
    odd: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of (x - mean)**2

    @property
    def std(self) -> float:
        """sqrt(sum((x - mean)**2) / count)."""
        return float((self.squares / self.count) ** 0.5) if self.count else 0.0

    @property
    def zero_share(self) -> float:
        """Share of the elements that are exactly 0."""
        return self.zeros / self.count if self.count else 0.0

    def add(self, values: Tensor) -> None:
        """Merge with what was there (Chan, Golub and LeVeque 1979)."""
        if values.numel() == 0:
            return
        values = values.detach().double()
        count, mean = values.numel(), float(values.mean())
        total, delta = self.count + count, mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        self.zeros += int((values == 0).sum())
        self.odd += int((~values.isfinite()).sum())


@contextmanager
def recorded_layers(model: nn.Module) -> Iterator[dict[str, Activations]]:
    """Statistics of the outputs of modules without children, or with parameters of their own, filled in while open."""
    found: dict[str, Activations] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in outputs_of(output):
                found.setdefault(name, Activations(type(module).__name__)).add(tensor)

        return record

    hooks = [
        module.register_forward_hook(recorder(name or "the model"))
        for name, module in model.named_modules()
        if module._parameters or not any(module.children())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def outputs_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a layer's output; of an LSTM's the sequence alone."""
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    if isinstance(output, Tensor) and output.is_floating_point() and not output.is_sparse:
        return [output]
    return []


def first_odd(found: dict[str, Activations]) -> str | None:
    """The first layer with outputs that are not finite."""
    return next((name for name, each in found.items() if each.odd), None)


def weights_norm(tensor: Tensor) -> float:
    """Euclidean norm in fp64."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
