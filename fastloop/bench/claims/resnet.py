# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 in plain torch, as the guides' memory table and training times mean it.

Reference: He et al., "Deep Residual Learning for Image Recognition", 2015; the stride sits in the 3x3 convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 4


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, which is a projection where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.reduce = _convolution(inputs, width, 1)
        self.spatial = _convolution(width, width, 3, stride)
        self.expand = _convolution(width, outputs, 1)
        self.project = _convolution(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.project is None else self.project(x)
        x = functional.relu(self.reduce(x), inplace=True)
        x = functional.relu(self.spatial(x), inplace=True)
        return functional.relu(self.expand(x) + shortcut, inplace=True)


class ResNet50(nn.Module):
    """Images [n, 3, h, w] in, logits [n, classes] out; 25,557,032 parameters with 1000 classes."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = _convolution(3, 64, 7, 2)
        blocks, channels = [], 64
        for stage, (width, count) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
            for block in range(count):
                blocks.append(Bottleneck(channels, width, 2 if stage > 0 and block == 0 else 1))
                channels = EXPANSION * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.stem(images), inplace=True)
        x = self.blocks(functional.max_pool2d(x, 3, 2, 1))
        return self.head(x.mean((2, 3)))


def images(count: int, device: torch.device, side: int = 224) -> tuple[Tensor, Tensor]:
    """Random images and classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, side, side, generator=generator)
    return pixels.to(device), torch.randint(0, 1000, (count,), generator=generator).to(device)
