# SPDX-License-Identifier: Apache-2.0
"""Images of data sets as matplotlib draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastloop.recipes.data.samples import tensor_of


def is_image(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape can be drawn: [height, width], or with 1, 3 or 4 channels first or last."""
    if len(shape) == 2:
        return min(shape) >= 4
    return len(shape) == 3 and (shape[0] in (1, 3, 4) or shape[2] in (1, 3, 4)) and sorted(shape)[1] >= 4


def pixels(image: Any) -> Any:
    """uint8 [height, width] or [height, width, 3]; what is not in [0, 1] is stretched to it.

    Raises:
        ValueError: not of the shape of an image.
    """
    tensor = tensor_of(image)
    if tensor is None or not is_image(tensor.shape):
        shape = type(image).__name__ if tensor is None else [*tensor.shape]
        raise ValueError(f"[recipes] an image must be [channels, height, width] of 1 or 3 channels, got {shape}")
    if tensor.dim() == 3:
        if tensor.shape[0] in (1, 3, 4):
            tensor = tensor.movedim(0, -1)
        tensor = tensor[..., 0] if tensor.shape[-1] == 1 else tensor[..., :3]
    return (_unit(tensor) * 255).round().byte().numpy()


def _unit(tensor: Tensor) -> Tensor:
    values = tensor.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)
    if not tensor.is_floating_point() and 1 < float(values.max()) <= 255 and float(values.min()) >= 0:
        return values / 255
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        return values
    return (values - low) / (high - low) if high > low else values * 0


def show(axes: Any, image: Any, title: str = "") -> None:
    """Draw the image in a matplotlib Axes, without ticks."""
    axes.imshow(pixels(image), cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(title, fontsize=8)
