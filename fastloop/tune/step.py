# SPDX-License-Identifier: Apache-2.0
"""What a trial times: windows of a Loop on one batch again and again, or on its loader; and the loader alone.

A sample is at least 20 ms of windows in a row, the device waited for at both ends; a rate is samples of data per
second. Warm-up stands apart. With workers the queues that filled meanwhile are emptied before the clock starts: a
full queue gives batches at any rate until it is empty.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastloop.bench.measure import MARGIN, SAMPLE_SECONDS
from fastloop.bench.stats import Interval, median_interval
from fastloop.loop import Loop
from fastloop.loop.config import Training, build, read
from fastloop.loop.data import samples_in
from fastloop.loop.loader import rebuilt, with_settings
from fastloop.loop.probe import moved
from fastloop.loop.random_state import seed_everything
from fastloop.tune.target import OF_A_RUN, SETTINGS, Target

SEED = 0  # of every trial: two that differ in a setting differ in nothing that is drawn
ENDLESS = 2**60  # windows of a run that is left when enough is measured
WARMUP_WINDOWS = 3
FEWEST_SAMPLES = 5
_END = object()


def training(
    target: Target | Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    loader: Mapping[str, Any] | None = None,
) -> Training:
    """The target's Loop and loader, as a trial needs them: seeded; nothing is written, logged or resumed.

    Args:
        target: or its `spec()`.
        options: of Loop, in place of the present ones.
        loader: settings of the loader, in place of the present ones.
    """
    seed_everything(SEED)
    of = target if isinstance(target, Target) else Target.of(target)
    tables = of.tables(options, loader)
    if "loop" in tables:
        tables["loop"] = {name: value for name, value in tables["loop"].items() if name not in OF_A_RUN}
    made = build(Loop, read(tables), loggers=(), progress=False)
    made.loop._on = {event: [] for event in made.loop._on}  # the target's callbacks are for its runs
    if not made.loop.model.training:
        made.loop.model.train()
    return made


def settings_of(loader: Any) -> dict[str, Any]:
    """The settings that a DataLoader has; {} for what is none."""
    if not isinstance(loader, DataLoader):
        return {}
    found = {name: getattr(loader, name) for name in SETTINGS}
    if found["batch_size"] is None:
        found["batch_size"] = getattr(loader.batch_sampler, "batch_size", None)
    return found


# ---- batches


@dataclass
class Again:
    """One batch, again and again."""

    batch: Any

    def __iter__(self) -> Again:
        return self

    def __next__(self) -> Any:
        return self.batch


def first_batch(loader: Any, device: torch.device | None = None) -> Any:
    """The first of `first_batches`, on the device."""
    batch = first_batches(loader, 1)[0]
    return batch if device is None else moved(batch, device)


def first_batches(loader: Any, count: int, seconds: float = math.inf) -> list[Any]:
    """The loader's first ones, loaded in this process; fewer where it has fewer, or takes longer than that.

    Raises:
        ValueError: it gives none.
    """
    if isinstance(loader, DataLoader) and loader.num_workers > 0:
        loader = with_settings(loader, {"num_workers": 0})
    batches: list[Any] = []
    start = perf_counter()
    for batch in islice(iter(loader), count):
        batches.append(batch)
        if perf_counter() - start > seconds:
            break
    if not batches:
        raise ValueError("[tune] the target's train_loader gave no batch; it must give at least one")
    return batches


class Stream:
    """The batches of a loader, epoch after epoch; times how long it is waited for.

    Attributes:
        batches, samples, epochs: given so far; epochs that have ended.
        wait_seconds: in all; `last_wait`: for the last batch.
        startup_seconds: from the first epoch's iter() to its first batch.
        epoch_rates: samples/s of whole epochs, start included.
        queued: batches that workers may have ready.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = endless(loader)
        workers = getattr(loader, "num_workers", 0)
        self.queued = workers * (getattr(loader, "prefetch_factor", None) or 2) if workers else 0
        self.workers = workers
        self.batches = self.samples = self.epochs = 0
        self.wait_seconds = self.last_wait = 0.0
        self.startup_seconds: float | None = None
        self.epoch_rates: list[float] = []
        self._iterator: Iterator[Any] | None = None
        self._epoch_began, self._epoch_samples = 0.0, 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        before = perf_counter()
        batch = self._next(before)
        now = perf_counter()
        self.last_wait = now - before
        self.wait_seconds += self.last_wait
        if self.startup_seconds is None:
            self.startup_seconds = self.last_wait
        size = samples_in(batch)
        self.batches += 1
        self.samples += size
        self._epoch_samples += size
        return batch

    def _next(self, now: float) -> Any:
        for _ in range(2):
            if self._iterator is None:
                do_not_fork_after_cuda(self.loader)
                self._epoch_began, self._epoch_samples = now, 0
                self._iterator = iter(self.loader)
            batch = next(self._iterator, _END)
            if batch is not _END:
                return batch
            if self._epoch_samples:
                self.epochs += 1
                self.epoch_rates.append(self._epoch_samples / max(perf_counter() - self._epoch_began, 1e-9))
            self._iterator = None
        raise ValueError("[tune] the target's train_loader gave no batch; it must give at least one in each epoch")

    def close(self) -> None:
        """End the workers."""
        self._iterator = None
        if getattr(self.loader, "persistent_workers", False):
            self.loader._iterator = None  # which holds them, too


class _Endless:
    """Batches of indices, epoch after epoch."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.batch_sampler:
                empty = False
                yield batch
            if empty:
                return


def endless(loader: Any) -> Any:
    """A loader whose epoch never ends, where it goes by batches of indices; else the loader itself."""
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, torch.utils.data.IterableDataset)
    if not indexed or loader.batch_sampler is None:
        return loader
    return rebuilt(loader, _Endless(loader.batch_sampler))


def do_not_fork_after_cuda(loader: Any) -> None:
    """Workers are started by another process where this one has a CUDA context, which does not survive a fork.

    Raises:
        ValueError: what they need cannot be sent to them.
    """
    if not isinstance(loader, DataLoader) or loader.num_workers == 0 or not torch.cuda.is_initialized():
        return
    context = loader.multiprocessing_context
    method = context.get_start_method() if context is not None else torch.multiprocessing.get_start_method()
    if method == "fork":
        for name in ("dataset", "collate_fn", "worker_init_fn"):
            _check_it_travels(name, getattr(loader, name))
        loader.multiprocessing_context = "forkserver"


def _check_it_travels(name: str, value: Any) -> None:
    try:
        _Nowhere().dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"[tune] workers are started by forkserver, since CUDA runs, and the loader's {name} cannot be sent to "
            f"them ({error}): move what it is made of to the top of a module"
        ) from None
    except RuntimeError:  # a lock or a queue, which travels only while a process is started
        return


class _Nowhere(ForkingPickler):
    """Pickles, and keeps nothing. Tensors are taken as they are: sending one would move it into shared memory."""

    def __init__(self) -> None:
        super().__init__(self)

    def write(self, data: Any) -> int:
        return len(data)

    def reducer_override(self, value: Any) -> Any:
        return (int, ()) if isinstance(value, torch.Tensor) else NotImplemented


# ---- windows


class Steps:
    """Windows of a loop on a source of batches, one at a time.

    Args:
        loop: left as a training leaves it.
        source: an iterator, endless; a `Stream` or `Again`.
    """

    def __init__(self, loop: Loop, source: Any) -> None:
        self.loop, self.source = loop, source
        self._windows = loop._run(source, None, ENDLESS)  # not windows(), which refuses what needs fit: _train is fit's

    def step(self) -> int:
        """One window: forward, backward and update; the samples of it."""
        window = next(self._windows)
        self.loop._train(window)
        return window.samples

    def wait(self) -> None:
        """For the device."""
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize(self.loop.device)

    def close(self) -> None:
        """End the run; workers too."""
        self._windows.close()  # type: ignore[attr-defined]
        if isinstance(self.source, Stream):
            self.source.close()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Pulls:
    """The loader alone: a step takes one batch and does nothing with it."""

    def __init__(self, source: Stream) -> None:
        self.source = source

    def step(self) -> int:
        """One batch; the samples of it."""
        return samples_in(next(self.source))

    def wait(self) -> None:
        """Nothing runs beside it."""

    def close(self) -> None:
        """End the workers."""
        self.source.close()


@dataclass
class Measured:
    """Samples/s of each sample, and of the time that they took the share spent waiting for data."""

    rates: list[float] = field(default_factory=list)
    wait_share: float | None = None
    startup_seconds: float | None = None
    windows: int = 0  # in all, warm-up included
    samples_per_batch: float | None = None  # of a Stream

    @property
    def interval(self) -> Interval:
        return median_interval(self.rates)


def windows_per_sample(steps: Steps | Pulls, least_seconds: float = SAMPLE_SECONDS) -> int:
    """So many windows last at least 20 ms; taken from windows of a run that is warm."""
    count = 1
    while True:
        seconds = _timed(steps, count)[0]
        if seconds >= least_seconds:
            return count if count == 1 else math.ceil(count * MARGIN * least_seconds / seconds)
        count = max(count + 1, math.ceil(count * min(MARGIN * least_seconds / max(seconds, 1e-9), 10.0)))


def _timed(steps: Steps | Pulls, count: int) -> tuple[float, int]:
    """(seconds, samples) of `count` windows, the device waited for."""
    steps.wait()
    start, samples = perf_counter(), 0
    for _ in range(count):
        samples += steps.step()
    steps.wait()
    return perf_counter() - start, samples


def measure(
    steps: Steps | Pulls,
    seconds: float,
    *,
    warmup: int = WARMUP_WINDOWS,
    least: int = FEWEST_SAMPLES,
    on_sample: Callable[[float], None] | None = None,
) -> Measured:
    """Warm up, then take samples for so many seconds and at least `least` of them.

    Samples during which an epoch ended are left out; where no epoch is long enough for one, whole epochs are samples.
    A window that takes longer than all of the samples may ends the warm-up, and is a sample by itself.
    """
    stream = steps.source if isinstance(steps.source, Stream) else None
    done, slow = 0, False
    while done < warmup and not slow:
        slow = _is_slow(steps, stream, seconds, first=done == 0)
        done += 1
    count = 1 if slow else windows_per_sample(steps)
    if stream is not None:
        count = max(count, stream.workers)
        empty_queue(steps, stream)
    result = Measured(windows=done)
    waited = spent = 0.0
    start = perf_counter()
    while (perf_counter() - start < seconds or len(result.rates) < least) and (
        perf_counter() - start < 3 * seconds or (not result.rates and _epochs(stream) < 2)
    ):
        epochs, before = _epochs(stream), 0.0 if stream is None else stream.wait_seconds
        elapsed, samples = _timed(steps, count)
        result.windows += count
        if stream is not None:
            if stream.epochs != epochs:
                waited, spent = waited + stream.wait_seconds - before, spent + elapsed
                empty_queue(steps, stream)
                continue
            waited += stream.wait_seconds - before
        spent += elapsed
        result.rates.append(samples / elapsed)
        if on_sample is not None:
            on_sample(result.rates[-1])
    if stream is not None:
        result.rates = result.rates or stream.epoch_rates
        result.wait_share = waited / spent if spent else None
        result.startup_seconds = stream.startup_seconds
        result.samples_per_batch = stream.samples / stream.batches
    return result


def _is_slow(steps: Steps | Pulls, stream: Stream | None, seconds: float, first: bool) -> bool:
    """Whether one window takes longer than that. The first may compile, or start workers: then only waiting counts."""
    took = _timed(steps, 1)[0]
    if not first:
        return took > seconds
    return stream is not None and stream.workers == 0 and stream.last_wait > seconds


def _epochs(stream: Stream | None) -> int:
    return 0 if stream is None else stream.epochs


def empty_queue(steps: Steps | Pulls, stream: Stream) -> None:
    """Take the batches that workers had ready: as many as they may have, or until one has to be waited for."""
    first = stream.batches
    while stream.batches - first < stream.queued:
        before = perf_counter()
        steps.step()
        taken = stream.batches - first
        if taken >= stream.workers and stream.last_wait > 0.5 * (perf_counter() - before):
            return
