# SPDX-License-Identifier: Apache-2.0
"""A target that every machine has: a small character-level GPT on the text of Python's standard library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastloop.bench import chargpt
from fastloop.optim import AdamW

LEARNING_RATE = 1e-3
CHARACTERS = 500_000


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Each window of the text, and the same one character later.

    Args:
        text: one int64 for each character, as `chargpt.encode` makes them.
        context: characters of a window.
    """

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.text[start : start + self.context + 1]
        return window[:-1], window[1:]


def text(batch_size: int = 16, context: int = 64, width: int = 64, layers: int = 2) -> dict[str, Any]:
    """Model, optimizer, loss and loader; a step takes 10 to 30 ms on two cores.

    Args:
        batch_size: windows of a batch.
        context: characters of a window.
        width, layers: of the model.

    Raises:
        NoText: Python is installed without the sources of its standard library.
    """
    size = chargpt.Size(layers=layers, width=width, context=context, batch=batch_size)
    torch.manual_seed(0)
    model = chargpt.CharGPT(size)
    data = Windows(chargpt.standard_library(CHARACTERS), context)
    return {
        "model": model,
        "optimizer": AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, max_grad_norm=1.0),
        "loss_fn": chargpt.loss,
        "train_loader": DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True),
    }
