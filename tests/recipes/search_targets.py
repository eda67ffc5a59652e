# SPDX-License-Identifier: Apache-2.0
"""Trainings to be searched: a few steps of a linear regression, and ones that fail."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloop.tune.child import note


def line(lr: float = 0.1, optimizer: str = "sgd", fail: str = "", validate: bool = True) -> dict[str, Any]:
    """y = 2 x; what `fail` says happens in the second window."""
    x = torch.linspace(-1, 1, 32).reshape(-1, 1)
    data = DataLoader(TensorDataset(x, 2 * x), batch_size=8, shuffle=True)
    model = nn.Linear(1, 1)
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](model.parameters(), lr=lr)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        if fail == "crash":
            os.abort()
        if fail == "raise":
            raise RuntimeError("the data are gone")
        if fail == "hang":
            time.sleep(3600)
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        return loss * (math.nan if fail == "nan" and not model.training else 1.0)

    found = {"model": model, "optimizer": made, "loss_fn": loss_fn, "train_loader": data}
    return {**found, "val_loader": DataLoader(TensorDataset(x, 2 * x), batch_size=32)} if validate else found


def notes_without_end() -> None:
    """A trial that tells something again and again."""
    while True:
        note(x=1)
        time.sleep(0.05)
