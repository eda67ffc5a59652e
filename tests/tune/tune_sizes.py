# SPDX-License-Identifier: Apache-2.0
"""Trainings whose memory is known: one by hand, and one that takes 6 MiB for each sample of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.loop import Loop
from fastloop.tune.peaks import peak_rss

INPUTS, HIDDEN, CLASSES, SAMPLES = 64, 256, 10, 512


def _made(model: nn.Module, optimizer: str, batch_size: int) -> dict[str, Any]:
    classes = {"ours": fastloop.AdamW, "torch": torch.optim.AdamW}
    data = TensorDataset(torch.randn(SAMPLES, INPUTS), torch.randint(0, CLASSES, (SAMPLES,)))
    return {
        "model": model,
        "optimizer": classes[optimizer](model.parameters(), lr=1e-3),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(data, batch_size=batch_size, shuffle=True),
    }


def perceptron(batch_size: int = 32, optimizer: str = "ours") -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    return _made(model, optimizer, batch_size)


class Hungry(nn.Module):
    """4 MiB for each sample are kept for backward, which takes about 12 more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        wide = (x.mean(1, keepdim=True) * self.layer.bias[0]).expand(-1, 2**20).exp()
        return self.layer(x) + wide.square().mean(1, keepdim=True)


def hungry(batch_size: int = 8) -> dict[str, Any]:
    torch.manual_seed(0)
    return _made(Hungry(), "ours", batch_size)


def peak_of_one() -> Any:
    """Bytes of a process that trains on batches of one sample."""
    made = hungry(1)
    loop = Loop(made["model"], made["optimizer"], made["loss_fn"], loggers=(), progress=False)
    loop.fit(made["train_loader"], max_steps=3)
    return peak_rss()
