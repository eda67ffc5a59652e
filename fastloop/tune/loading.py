# SPDX-License-Identifier: Apache-2.0
"""Trials of the loader tuner, each in a process of its own: what limits the training, one setting, two in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic, perf_counter
from typing import Any

import torch

from fastloop.bench import measure as paired
from fastloop.bench.stats import Interval, median_interval
from fastloop.loop.loader import length_of, with_settings
from fastloop.loop.random_state import seed_everything
from fastloop.tune import child
from fastloop.tune.step import (
    SEED,
    Again,
    Measured,
    Pulls,
    Steps,
    Stream,
    empty_queue,
    first_batch,
    measure,
    settings_of,
    training,
)

WON = 1.02  # a gain below this is none
PAIRS = (10, 20, 40)
ROUNDS = 4  # of all workers, in a sample: each round they give their batches almost at once
Settings = dict[str, Any]


def bottleneck(spec: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """With the present settings: the loader alone, steps on a cached batch, and both together."""
    made = training(spec)
    given = made.train_loader
    alone = _closing(Pulls(Stream(given)), seconds)
    batch = first_batch(given, made.loop.device)
    with Steps(made.loop, Again(batch)) as steps:
        cached = measure(steps, seconds)
    both = _closing(Steps(made.loop, Stream(given)), seconds)
    return {
        "settings": settings_of(given),
        "kind": type(given).__name__,
        "alone": _rates(alone, None),
        "cached": _rates(cached, None),
        "both": _rates(both, given),
        "cuda": made.loop.device.type == "cuda",
    }


def several(spec: Mapping[str, Any], settings: Sequence[Settings], seconds: float, until: float) -> None:
    """Training with each of these settings of the loader in turn; a note for each."""
    made = training(spec)

    def rates(each: Settings) -> dict[str, Any]:
        seed_everything(SEED)  # each has the same samples
        loader = with_settings(made.train_loader, each)
        return _rates(_closing(Steps(made.loop, Stream(loader)), seconds), loader)

    _each(settings, rates, until)


def several_alone(
    given: Any, settings: Sequence[Settings], seconds: float, until: float, wait: float | None = None
) -> None:
    """The same of loaders alone: a loader or data set with these settings, and nobody who trains.

    Args:
        wait: seconds for one batch of workers, where nothing else ends a trial; None: as the loader says.
    """

    def rates(each: Settings) -> dict[str, Any]:
        loader = _waiting(with_settings(given, each), wait)
        return _rates(_closing(Pulls(Stream(loader)), seconds), loader)

    _each(settings, rates, until)


def _each(settings: Sequence[Settings], rates: Callable[[Settings], dict[str, Any]], until: float) -> None:
    """Notes {"rates": ...} or {"failure": ...}, in the order of `settings`; no trial starts after `until`."""
    child.note(begun=True)  # what was imported and built until here is no setting's time
    for each in settings:
        if monotonic() > until:
            return
        start = monotonic()
        try:
            found = rates(each)
        except Exception as error:
            child.note(failure=child.described(error), seconds=monotonic() - start)
        else:
            child.note(found=found, seconds=monotonic() - start)


def two(spec: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Training with one setting and another in turn, one loop: ratios of their times, before / after."""
    made = training(spec, None, before)
    other = with_settings(made.train_loader, after)
    switch = _Switch()
    with Steps(made.loop, switch) as steps:
        found = _in_turn(steps, switch, (made.train_loader, other), seconds)
    return found


def two_alone(
    given: Any, before: Mapping[str, Any], after: Mapping[str, Any], seconds: float, wait: float | None = None
) -> dict[str, Any]:
    """The same of loaders alone."""
    switch = _Switch()
    loaders = (_waiting(with_settings(given, before), wait), _waiting(with_settings(given, after), wait))
    return _in_turn(Pulls(switch), switch, loaders, seconds)  # type: ignore[arg-type]


def _waiting(loader: Any, seconds: float | None) -> Any:
    if seconds is not None and loader.num_workers > 0:
        loader.timeout = seconds
    return loader


class _Switch:
    """An iterator that takes from one stream or another."""

    def __init__(self) -> None:
        self.active: Stream | None = None

    def __iter__(self) -> _Switch:
        return self

    def __next__(self) -> Any:
        assert self.active is not None
        return next(self.active)

    def close(self) -> None:
        """End the workers."""
        if self.active is not None:
            self.active.close()
            self.active = None


def _in_turn(steps: Steps | Pulls, switch: _Switch, loaders: tuple[Any, Any], seconds: float) -> dict[str, Any]:
    """A sample starts the workers anew, so that those of the other side are not there to disturb it.

    Only where starting is not a fork, and takes seconds, both sides' workers stay.
    """
    anew = not torch.cuda.is_initialized()
    streams: dict[int, Stream] = {}

    def sample(side: int, repetitions: int) -> float:
        if anew:
            switch.close()
            streams.pop(side, None)
        stream = streams.setdefault(side, Stream(loaders[side]))
        switch.active = stream
        steps.step()
        empty_queue(steps, stream)
        count = max(repetitions, ROUNDS * stream.workers)
        steps.wait()
        start = perf_counter()
        for _ in range(count):
            steps.step()
        steps.wait()
        return (perf_counter() - start) / count

    def decided(change: Interval) -> bool:
        return change.low > WON or change.high < WON

    pairs = paired.measure_pairs(
        0, 1, decided=decided, pairs=PAIRS, deadline=perf_counter() + seconds, sampler=sample, threads=None
    )
    for stream in streams.values():
        stream.close()
    return {"ratios": list(pairs.ratios)}


def _closing(steps: Steps | Pulls, seconds: float) -> Measured:
    try:
        return measure(steps, seconds)
    finally:
        steps.close()


def _rates(found: Measured, loader: Any) -> dict[str, Any]:
    """As JSON. With a loader whose length is known, the rates of whole epochs: each starts its workers anew."""
    share = 1.0
    length = None if loader is None or torch.cuda.is_initialized() else length_of(loader)
    if length and found.startup_seconds is not None and getattr(loader, "num_workers", 0) and found.samples_per_batch:
        steady = length * found.samples_per_batch / median_interval(found.rates).median
        share = steady / (steady + found.startup_seconds)
    return {
        "rates": [share * rate for rate in found.rates],
        "wait_share": found.wait_share,
        "startup_seconds": found.startup_seconds,
        "startup_share": 1 - share,
    }
