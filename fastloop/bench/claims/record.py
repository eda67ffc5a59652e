# SPDX-License-Identifier: Apache-2.0
"""A claim, what was found when it was tried here, and how both are written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from time import perf_counter
from typing import Any

import torch

from fastloop.bench import env
from fastloop.bench.measure import Pairs, measure_pairs
from fastloop.bench.memory import measure as measure_memory
from fastloop.bench.stats import Interval, median_interval

PAIRS = (10, 20, 40)
SECONDS = 4.0  # for the pairs of one claim
PROBES = 3
ABOUT = 0.20  # how far a measured amount may be from one that is claimed with a tilde


class Verdict(str, Enum):
    """What trying a claim here has shown."""

    HOLDS = "holds"
    PARTLY = "partly"
    FAILS = "does not hold here"
    NEEDS = "not tried"  # the device that it needs is not here
    PROJECTED = "projection"  # computed from what was measured; only the device of the claim tells
    WRONG = "wrong result"
    ERROR = "could not be tried"


class Unavailable(Exception):
    """What a scenario needs is not here; the text says what."""


@dataclass(frozen=True)
class Here:
    """Where a scenario runs."""

    device: torch.device
    seconds: float = SECONDS

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def timed(self, call: Callable[[], object]) -> Callable[[], None]:
        """`call`, until the device is done."""

        def whole() -> None:
            call()
            self.wait()

        return whole

    def pairs(self, before: Callable[[], object], after: Callable[[], object], wanted: float) -> tuple[Interval, Pairs]:
        """Time of `before` over that of `after` (above 1: `after` is faster), with the pairs that it comes from.

        wanted: the least ratio that is claimed: pairs are taken until it is, or is not, in the interval's range.
        """
        pairs = measure_pairs(
            self.timed(before),
            self.timed(after),
            pairs=PAIRS,
            decided=lambda found: wanted not in found and 1.0 not in found,
            deadline=perf_counter() + self.seconds,
        )
        return median_interval(pairs.ratios), pairs

    def transient_bytes(self, step: Callable[[], object]) -> int:
        """Largest number of bytes that `step` takes on top of what is there before it."""
        step()
        if not self.is_gpu:
            return measure_memory(step, [], None).transient_bytes
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before


@dataclass(frozen=True)
class Finding:
    """What was measured, in words, and the numbers behind them."""

    measured: str
    verdict: Verdict
    note: str = ""
    interval: Interval | None = None
    ratios: Sequence[float] = ()
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One figure of the guides: what it is about, the figure, and the scenario that tries it.

    gpus: how many the scenario needs; 0: it runs anywhere.
    on_cpu: it works on the CPU, also where there is a GPU.
    """

    name: str
    about: str
    claimed: str
    measure: Callable[[Here], Finding]
    gpus: int = 0
    on_cpu: bool = False


@dataclass(frozen=True)
class Row:
    """A claim that was tried, or why it was not."""

    claim: Claim
    finding: Finding
    device: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        found = self.finding
        interval = None if found.interval is None else [found.interval.median, found.interval.low, found.interval.high]
        return {
            "name": self.claim.name,
            "about": self.claim.about,
            "claimed": self.claim.claimed,
            "measured": found.measured,
            "verdict": found.verdict.value,
            "device": self.device,
            "note": found.note,
            "interval": None if interval is None else [round(value, 4) for value in interval],
            "ratios": [round(ratio, 4) for ratio in found.ratios],
            "numbers": {name: float(f"{value:.6g}") for name, value in found.numbers.items()},
            "seconds": round(self.seconds, 1),
        }


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The result as JSON holds it: the rows, and the environment they come from."""
    return {
        "kind": "claims",
        "environment": env.environment().as_dict(),
        "seconds": round(sum(row.seconds for row in rows), 1),
        "rows": [row.as_dict() for row in rows],
    }


# ---- Threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch with that many threads, for as long as the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def useful_threads() -> int:
    """torch's threads, or 1 where that is faster: other processes have the CPUs, and each operation waits for a thread.

    It takes some tenths of a second. A machine that is left alone keeps its threads.
    """
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    counts = (torch.get_num_threads(), 1)
    spent: dict[int, list[float]] = {}
    for count in counts * PROBES:
        with torch_threads(count):
            torch.tanh(matrix @ matrix)
            start = perf_counter()
            for _ in range(50):
                torch.tanh(matrix @ matrix)
            spent.setdefault(count, []).append(perf_counter() - start)
    return min(counts, key=lambda count: sum(spent[count]))


# ---- Words and verdicts


def times(value: Interval) -> str:
    """A ratio with its 98 % interval."""
    return f"{value.median:.2f}x ({value.low:.2f} to {value.high:.2f})"


def gigabytes(count: float) -> str:
    """Decimal, as the guides count."""
    return f"{count * 1e-9:.2f} GB" if count >= 1e9 else f"{count * 1e-6:.1f} MB"


def faster(found: Interval, least: float) -> Verdict:
    """A claim that something is `least` times as fast, or more; partly: it is faster."""
    if found.median >= least:
        return Verdict.HOLDS
    return Verdict.PARTLY if found.low > 1 else Verdict.FAILS


def about(value: float, claimed: float, tolerance: float = ABOUT) -> Verdict:
    """A claim that an amount is `claimed`."""
    return Verdict.HOLDS if math.isclose(value, claimed, rel_tol=0, abs_tol=tolerance * claimed) else Verdict.FAILS


def both(first: Verdict, second: Verdict) -> Verdict:
    """Of a claim with two halves."""
    if first is second:
        return first
    return Verdict.PARTLY if Verdict.WRONG not in (first, second) else Verdict.WRONG
