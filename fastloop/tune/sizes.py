# SPDX-License-Identifier: Apache-2.0
"""Which batch size to try next: doubling, then bisection around the best, within what memory is predicted to hold.

Arithmetic on what trials returned: no clocks, no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

RESOLUTION = 1.25  # neighbours whose ratio is below this are not searched between
SAME_RATE = 0.02  # rates that differ by less are the same: the smaller size is then the better one
NEAR = 1.1  # memory ends so close to the largest that fits that there is no point in going there
HOPELESS = 1.10  # a trial whose predicted peak is above the limit by this factor is not made
WORSE_DOUBLINGS = 4  # two doublings beyond the best that brought nothing end the growth


@dataclass(frozen=True)
class Tried:
    """What one trial said of a size. rate: samples/s, None where it did not run to its end. peak: bytes."""

    size: int
    rate: float | None
    peak: int | None = None


@dataclass(frozen=True)
class Line:
    """peak(size) = fixed + per_sample * size, in bytes."""

    fixed: float
    per_sample: float

    def at(self, size: int) -> int:
        return round(self.fixed + self.per_sample * size)

    def largest(self, limit: float) -> int | None:
        """The largest size whose peak is at most `limit`; None where the peak does not grow."""
        return None if self.per_sample <= 0 else max(0, math.floor((limit - self.fixed) / self.per_sample))


def line_through(points: Sequence[tuple[int, int]]) -> Line | None:
    """Least squares through (size, peak); None for fewer than two sizes."""
    if len({size for size, _ in points}) < 2:
        return None
    mean_size = sum(size for size, _ in points) / len(points)
    mean_peak = sum(peak for _, peak in points) / len(points)
    spread = sum((size - mean_size) ** 2 for size, _ in points)
    slope = sum((size - mean_size) * (peak - mean_peak) for size, peak in points) / spread
    return Line(mean_peak - slope * mean_size, slope)


def divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


@dataclass
class Search:
    """Batch sizes in the order in which they are worth a trial.

    Args:
        start: the first size; sizes are doubled from here.
        largest: no size above it; None for no bound.
        limit: bytes that a peak may reach; None where nobody knows.
        allowed: the only sizes to try, ascending; None for all.
    """

    start: int
    largest: int | None = None
    limit: float | None = None
    allowed: Sequence[int] | None = None
    tried: dict[int, Tried] = field(default_factory=dict)
    hopeless: dict[int, int] = field(default_factory=dict)  # sizes that were not tried: their predicted peaks

    def tell(self, result: Tried) -> None:
        self.tried[result.size] = result

    def fits(self, result: Tried) -> bool:
        """Whether it ran to its end within the limit."""
        within = self.limit is None or result.peak is None or result.peak <= self.limit
        return result.rate is not None and within

    @property
    def fitting(self) -> list[Tried]:
        """Those that fit, by size."""
        return [self.tried[size] for size in sorted(self.tried) if self.fits(self.tried[size])]

    @property
    def best(self) -> Tried | None:
        """The smallest size whose rate is within 2 % of the highest; None where nothing fits."""
        fitting = self.fitting
        if not fitting:
            return None
        highest = max(_rate(each) for each in fitting)
        return next(each for each in fitting if _rate(each) >= (1 - SAME_RATE) * highest)

    @property
    def line(self) -> Line | None:
        """Peak over size."""
        return line_through(
            [(t.size, t.peak) for t in self.tried.values() if t.rate is not None and t.peak is not None]
        )

    def next(self) -> int | None:
        """The next size; None when there is nothing left to find out."""
        if not self.tried:
            return self._pick(self.start, 0, None)
        fitting = self.fitting
        if not fitting:
            smallest = min(self.tried)
            return self._pick(max(1, smallest // 2), 0, smallest)
        ceiling = min((size for size in (*self.tried, *self.hopeless) if size > fitting[-1].size), default=None)
        return self._larger(fitting, ceiling) or self._smaller(fitting) or self._between(fitting, ceiling)

    def _larger(self, fitting: list[Tried], ceiling: int | None) -> int | None:
        """Twice the largest while that may bring something; below what failed, the middle."""
        top, best = fitting[-1].size, max(fitting, key=_rate).size
        if ceiling is None:
            if top >= WORSE_DOUBLINGS * best:
                return None
            size = self._pick(2 * top, top, None)
            if size is None or not self._is_hopeless(size):
                return size
            ceiling = size
        if best != top or ceiling / top <= RESOLUTION:
            return None
        line = self.line
        ends = None if line is None or self.limit is None else line.largest(self.limit)
        if ends is not None and ends < NEAR * top:
            return None
        wanted = ends if ends is not None and ends < ceiling else math.sqrt(top * ceiling)
        size = self._pick(max(_round(wanted, down=True), top + 1), top, ceiling)
        return None if size is None or self._is_hopeless(size) else size

    def _is_hopeless(self, size: int) -> bool:
        line = self.line
        if line is None or self.limit is None or line.at(size) <= HOPELESS * self.limit:
            return False
        self.hopeless[size] = line.at(size)
        return True

    def _smaller(self, fitting: list[Tried]) -> int | None:
        """Half of the smallest, where that is the fastest so far."""
        smallest = fitting[0]
        if max(fitting, key=_rate) is not smallest or smallest.size == 1:
            return None
        return self._pick(max(1, smallest.size // 2), 0, smallest.size)

    def _between(self, fitting: list[Tried], ceiling: int | None) -> int | None:
        """The middle of the wider of the two gaps beside the fastest."""
        sizes = [each.size for each in fitting]
        best = max(fitting, key=_rate).size
        gaps = []
        for low, high in itertools.pairwise(sizes):
            if best in (low, high) and high / low > RESOLUTION:
                gaps.append((high / low, low, high))
        for _, low, high in sorted(gaps, reverse=True):
            size = self._pick(_round(math.sqrt(low * high)), low, high)
            if size is not None:
                return size
        return None

    def _pick(self, wanted: int, above: int, below: int | None) -> int | None:
        """An untried size near `wanted`, with above < size < below."""
        top = math.inf if self.largest is None else self.largest
        if below is not None:
            top = min(top, below - 1)
        if self.allowed is None:
            size = int(min(max(wanted, above + 1), top))
            candidates = [size] if above < size else []
        else:
            candidates = [size for size in self.allowed if above < size <= top]
        candidates = [size for size in candidates if size not in self.tried and size not in self.hopeless]
        return min(candidates, key=lambda size: abs(math.log(size / wanted)), default=None)


def _rate(result: Tried) -> float:
    assert result.rate is not None
    return result.rate


def _round(size: float, down: bool = False) -> int:
    """To one of the eight sizes of an octave, which are multiples of 8 from 64 on."""
    step = 2 ** max(0, math.floor(math.log2(max(size, 1))) - 3)
    return max(1, (math.floor(size / step) if down else round(size / step)) * step)


__all__ = ["Line", "Search", "Tried", "divisors", "line_through"]
