# SPDX-License-Identifier: Apache-2.0
"""Two ways to train the same target, each in a process of its own with its own options and loader, timed in turn.

Options such as the number of threads hold for a whole process, and some are remembered by it: one process cannot be
both. The side whose turn it is not waits for a request, its workers for room in their queues.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from fastloop.bench import measure as paired
from fastloop.bench.stats import Interval
from fastloop.tune.loading import PAIRS, ROUNDS, WON
from fastloop.tune.step import WARMUP_WINDOWS, Steps, Stream, empty_queue, training

Way = Mapping[str, Mapping[str, Any]]  # {"options": ..., "loader": ...}, in place of the target's present ones


def two(spec: Mapping[str, Any], before: Way, after: Way, seconds: float) -> dict[str, Any]:
    """Samples/s of both, and their ratios, above 1 where `after` is faster; at least 5 pairs."""
    sides = [_Side(spec, before), _Side(spec, after)]
    try:
        for side in sides:
            side.ready()
        pairs = paired.measure_pairs(
            0, 1, decided=_decided, pairs=PAIRS, deadline=perf_counter() + seconds,
            sampler=lambda side, repetitions: sides[side].sample(repetitions),
        )  # fmt: skip
    finally:
        for side in sides:
            side.close()
    samples = [side.samples for side in sides]
    return {
        "ratios": [ratio * samples[1] / samples[0] for ratio in pairs.ratios],
        "before": [samples[0] / each for each in pairs.a],
        "after": [samples[1] / each for each in pairs.b],
    }


def _decided(gain: Interval) -> bool:
    return gain.low > WON or gain.high < WON


class _Side:
    """A training in another process; `sample` gives seconds of a window, over so many in a row."""

    def __init__(self, spec: Mapping[str, Any], way: Way) -> None:
        context = multiprocessing.get_context("spawn")  # a fork does not survive OpenMP's threads or CUDA
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(spec), dict(way)))
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until it has warmed up."""
        self.samples = self._answer()  # of a window

    def sample(self, windows: int) -> float:
        """Raises RuntimeError where it has failed."""
        self._connection.send(windows)
        return float(self._answer())

    def _answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join(5.0)
            raise RuntimeError(f"[tune] one side ended with exit code {self._process.exitcode}") from None
        if kind == "error":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """It ends when nobody is at the other end."""
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, spec: dict[str, Any], way: Way) -> None:
    try:
        made = training(spec, way.get("options"), way.get("loader"))
        stream = Stream(made.train_loader)
        with Steps(made.loop, stream) as steps:
            samples = max(steps.step() for _ in range(WARMUP_WINDOWS))
            connection.send(("ready", samples))
            while True:
                windows = connection.recv()
                empty_queue(steps, stream)
                connection.send(("seconds", _seconds_per_window(steps, max(windows, ROUNDS * stream.workers))))
    except EOFError:
        return
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


def _seconds_per_window(steps: Steps, windows: int) -> float:
    steps.wait()
    start = perf_counter()
    for _ in range(windows):
        steps.step()
    steps.wait()
    return (perf_counter() - start) / windows
