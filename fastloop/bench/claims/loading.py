# SPDX-License-Identifier: Apache-2.0
"""Loading data: workers, pinned memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastloop.bench.checks import WrongResult
from fastloop.bench.claims.record import Claim, Finding, Here, faster, times, torch_threads
from fastloop.machine import usable_cpus

SAMPLES, BATCH = 32, 8
WAIT = 0.002  # seconds of a disk or a network for one sample
WORK = 20  # matrix products of 128 by 128 for one sample: some milliseconds of a CPU
BYTES = 1 << 26
WORKERS = 4
FASTER = 1.05  # what "faster", without a figure, must reach


class Slow(Dataset[Tensor]):
    """Samples that wait, as for a disk, or that compute, as decoding an image does."""

    def __init__(self, wait: bool) -> None:
        self.wait = wait
        self.data = torch.randn(SAMPLES, 128, 128, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        if self.wait:
            time.sleep(WAIT)
            return self.data[index]
        matrix = self.data[index]
        for _ in range(WORK):
            matrix = torch.tanh(matrix @ self.data[index])
        return matrix


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def loader(dataset: Dataset[Tensor], workers: int) -> DataLoader[Tensor]:
    """Its workers stay between epochs; they are forked only while CUDA does not run in this process."""
    options: dict[str, Any] = {}
    if workers:
        context = "spawn" if torch.cuda.is_initialized() else None
        options = {"persistent_workers": True, "worker_init_fn": _one_thread, "multiprocessing_context": context}
    return DataLoader(dataset, batch_size=BATCH, num_workers=workers, **options)


def _epoch(of: DataLoader[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for _ in of:
            pass

    return run


def workers(here: Here, wait: bool, count: int) -> Finding:
    """An epoch without workers over one with `count`, which have been started before."""
    dataset = Slow(wait)
    with warnings.catch_warnings(), torch_threads(1):  # as a worker has: one CPU against several
        warnings.simplefilter("ignore")  # that there are more workers than CPUs, which the row says
        alone, many = loader(dataset, 0), loader(dataset, count)
        for a, b in zip(alone, many, strict=True):
            if not torch.allclose(a, b, atol=1e-6):
                raise WrongResult("[bench claims] a batch that workers load differs from that of no worker")
        found, pairs = here.pairs(_epoch(alone), _epoch(many), FASTER)
    what = "samples wait 2 ms, as for a disk" if wait else "samples compute"
    note = f"{what}; {count} workers on {usable_cpus()} CPUs, already started"
    return Finding(times(found), faster(found, FASTER), note, found, pairs.ratios)


def pinned(here: Here) -> Finding:
    """64 MiB to the device, from pageable memory over from pinned memory."""
    pageable = torch.randn(BYTES // 4)
    fixed, target = pageable.pin_memory(), torch.empty(BYTES // 4, device=here.device)
    target.copy_(fixed)
    if not torch.equal(target.cpu(), pageable):
        raise WrongResult("[bench claims] a copy from pinned memory differs")
    found, pairs = here.pairs(lambda: target.copy_(pageable), lambda: target.copy_(fixed, non_blocking=True), FASTER)
    return Finding(times(found), faster(found, FASTER), "copies of 64 MiB", found, pairs.ratios)


CLAIMS = (
    Claim("workers-waiting", f"{WORKERS} workers, slow storage", "faster with 4-8 workers",
          partial(workers, wait=True, count=WORKERS), on_cpu=True),
    Claim("workers-computing", f"{WORKERS} workers, slow transforms", "faster with 4-8 workers",
          partial(workers, wait=False, count=WORKERS), on_cpu=True),
    Claim("pin-memory", "pinned memory", "faster copies to the GPU", pinned, gpus=1),
)  # fmt: skip
