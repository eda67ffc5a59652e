# SPDX-License-Identifier: Apache-2.0
"""Trainings to be tuned: small ones, slow ones, and ones that fail in every way."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastloop.tune.child import note

FEATURES = 16


class Rows(Dataset):
    """Vectors with a target each; `seconds` of waiting for one."""

    def __init__(self, count: int = 4096, seconds: float = 0.0, hang_in_worker: bool = False) -> None:
        self.x = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(0))
        self.seconds, self.hang_in_worker = seconds, hang_in_worker

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.hang_in_worker and torch.utils.data.get_worker_info() is not None:
            time.sleep(3600)
        if self.seconds:
            time.sleep(self.seconds)
        return self.x[index], self.x[index].sum()


class Flow(IterableDataset):
    """The same, one after the other, with an end."""

    def __init__(self, count: int = 512) -> None:
        self.count = count

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        number, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(number, self.count, of):
            x = torch.full((FEATURES,), i / self.count)
            yield x, x.sum()


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x).squeeze(-1), y)


def training(data: Any, batch_size: int = 16, width: int = 64, shuffle: bool | None = True, **loader: Any) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, 1))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
        "loss_fn": loss_fn,
        "train_loader": DataLoader(data, batch_size=batch_size, shuffle=shuffle, **loader),
    }


def slow_loss(model: nn.Module, batch: Any) -> Tensor:
    time.sleep(0.3)  # so long that the data are no 2 % of it, even where another program comes in between
    return loss_fn(model, batch)


def fast(batch_size: int = 16) -> dict:
    """A step that takes long, and data that are there."""
    return {**training(Rows(), batch_size), "loss_fn": slow_loss}


def slow(seconds: float = 0.002) -> dict:
    return training(Rows(seconds=seconds))


def flow() -> dict:
    return training(Flow(), shuffle=None)


def hangs_in_worker() -> dict:
    return training(Rows(seconds=0.002, hang_in_worker=True))


# ---- broken


def raises() -> dict:
    raise KeyError("no such table")


def exits(code: int = 3) -> dict:
    sys.exit(code)


def vanishes() -> dict:
    os._exit(0)


def segfaults() -> dict:
    ctypes.string_at(0)
    return {}


def hangs(start_another: bool = False) -> dict:
    if start_another:
        command = [sys.executable, "-c", "import time; time.sleep(3600)"]
        note(other=subprocess.Popen(command, start_new_session=True).pid)
    time.sleep(3600)
    return {}


def takes_memory(step: int = 2**25, most: int = 2**30) -> dict:
    """More and more, but not all that the machine has, where nobody ends it."""
    kept = []
    while len(kept) * step < most:
        kept.append(bytearray(b"x") * step)
        time.sleep(0.01)
    time.sleep(3600)
    return {}


def takes_memory_for_a_moment(size: int = 2**30) -> dict:
    taken = bytearray(b"x") * size
    del taken
    time.sleep(3)
    return {}


def asks_for_too_much() -> dict:
    torch.empty(2**60, dtype=torch.uint8)
    return {}


def prints(megabytes: int = 200) -> dict:
    line = "x" * 2**20
    for _ in range(megabytes):
        print(line)
    sys.stdout.flush()  # what its buffer keeps would come after
    print("the last line", file=sys.stderr, flush=True)
    return {"printed": megabytes}


def echo(**values: Any) -> dict:
    return values


def no_batch() -> dict:
    return training(Rows(count=1), batch_size=2, drop_last=True, shuffle=False)


def notes_then_vanishes() -> None:
    note(first=1)
    note(second=2)
    os._exit(0)


class Broken(Rows):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise KeyError(index)
