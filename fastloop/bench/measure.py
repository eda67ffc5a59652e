# SPDX-License-Identifier: Apache-2.0
"""Time two callables in turn, in one process, and hand back one ratio per pair.

Nothing is restored between samples: a restore would be work of its own that leaves its own data in the caches.
A sample is at least 20 ms long and repeats the call; a call whose data fit in a cache therefore finds them there
(the report calls such cases cache-hot), larger ones stream from memory each time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter, perf_counter_ns
from typing import Any

import torch

from fastloop.bench import stats

Call = Callable[[], object]
Sampler = Callable[[Any, int], float]  # (what is timed, repetitions) -> seconds per call

SAMPLE_SECONDS = 0.020
MARGIN = 1.25  # calibration runs cooler than the sample: aim above the 20 ms that a sample must last
FEWEST_PAIRS = 5  # below this an interval says nothing


@dataclass(frozen=True)
class Pairs:
    """Seconds per call of both sides, pair by pair."""

    a: tuple[float, ...]
    b: tuple[float, ...]
    repetitions: tuple[int, int]
    stopped: str  # "decided", "limit" (80 pairs and still undecided) or "deadline"

    @property
    def ratios(self) -> tuple[float, ...]:
        """a / b of each pair: above 1 where b is faster."""
        return tuple(a / b for a, b in zip(self.a, self.b, strict=True))


@contextmanager
def quiet_interpreter(threads: int | None = None) -> Iterator[None]:
    """Garbage collection off and a fixed number of threads, for as long as the context lasts."""
    enabled, before = gc.isenabled(), torch.get_num_threads()
    gc.collect()
    gc.disable()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if enabled:
            gc.enable()


def sample(call: Call, repetitions: int) -> float:
    """Seconds per call over `repetitions` calls in a row."""
    start = perf_counter_ns()
    for _ in repeat(None, repetitions):
        call()
    return (perf_counter_ns() - start) / repetitions * 1e-9


def calibrate(call: Any, seconds: float = SAMPLE_SECONDS, sampler: Sampler = sample) -> int:
    """Warm `call` up and find how many repetitions last at least `seconds`."""
    sampler(call, 1)
    repetitions = 1
    while True:
        elapsed = sampler(call, repetitions) * repetitions
        if elapsed >= seconds:
            return repetitions if repetitions == 1 else math.ceil(repetitions * seconds / elapsed * MARGIN)
        growth = seconds / elapsed * MARGIN if elapsed > 0 else 10.0
        repetitions = max(repetitions + 1, math.ceil(repetitions * min(growth, 10.0)))


def measure_pairs(
    a: Any,
    b: Any,
    *,
    decided: Callable[[stats.Interval], bool] = stats.decided,
    pairs: Sequence[int] = stats.PAIRS,
    deadline: float = math.inf,
    threads: int | None = None,
    on_pair: Callable[[int], None] | None = None,
    sampler: Sampler = sample,
) -> Pairs:
    """Time `a` and `b` in the order A B B A A B B A ..., one ratio a/b per pair.

    pairs: the counts at which to ask `decided` about the interval so far; the last is the limit.
    deadline: a `time.perf_counter()` value after which no new pair starts, once 5 are taken.
    sampler: how one sample is taken; by default `a` and `b` are called and a clock of the host is read.
    """
    times: tuple[list[float], list[float]] = ([], [])
    calls = (a, b)
    with quiet_interpreter(threads):
        repetitions = (calibrate(a, sampler=sampler), calibrate(b, sampler=sampler))
        for limit in pairs:
            while len(times[0]) < limit:
                if len(times[0]) >= min(FEWEST_PAIRS, limit) and perf_counter() > deadline:
                    return Pairs(tuple(times[0]), tuple(times[1]), repetitions, "deadline")
                for side in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
                    times[side].append(sampler(calls[side], repetitions[side]))
                if on_pair is not None:
                    on_pair(len(times[0]))
            result = Pairs(tuple(times[0]), tuple(times[1]), repetitions, "decided")
            if decided(stats.median_interval(result.ratios)):
                return result
    return Pairs(result.a, result.b, repetitions, "limit")
