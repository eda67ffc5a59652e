# SPDX-License-Identifier: Apache-2.0
"""What is watched while training: loss spikes, no more progress, speed and memory. Host numbers only."""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# A loss that is less than a tenth above the usual one alarms nobody, however steady the others are.
RISE = 0.1


class Spikes:
    """Finds losses far above the recent ones.

    A value is a spike if value > median + max(k * MAD, |median| / 10), with the median of the last `window` finite
    values x before it and MAD = median(|x - median|). For losses that are normally distributed k = 10 is 6.7 standard
    deviations.

    Args:
        window: values that are remembered, at least 3.
        k: how far above, above 0.
        least: values before the first verdict; half a window or 20 if that is less.

    A value that is not finite is no spike and is not remembered. Spikes are: after window / 2 of them the higher level
    is the usual one. A call costs a few microseconds; memory is `window` numbers twice.
    """

    def __init__(self, window: int = 100, k: float = 10.0, least: int | None = None) -> None:
        if window < 3:
            raise ValueError(f"[Spikes] window must be at least 3, got {window}; pass e.g. 100")
        if not k > 0:
            raise ValueError(f"[Spikes] k must be above 0, got {k}; pass e.g. 10.0")
        self.window = window
        self.k = k
        self.least = min(20, window // 2) if least is None else least
        if not 1 <= self.least <= window:
            raise ValueError(f"[Spikes] least must lie in [1, window = {window}], got {least}; pass e.g. 20")
        self.count = 0
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def update(self, value: float) -> bool:
        """Whether `value` is a spike; remembers it. `count` holds the number of spikes so far."""
        if not math.isfinite(value):
            return False
        spike = len(self._sorted) >= self.least and self._is_spike(value)
        self.count += spike
        if len(self._recent) == self.window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(value)
        insort(self._sorted, value)
        return spike

    def _is_spike(self, value: float) -> bool:
        middle = median(self._sorted)
        if value <= middle + RISE * abs(middle):  # nearly all values: no need for the MAD
            return False
        return value > middle + self.k * _deviation(self._sorted, middle)

    def state_dict(self) -> dict[str, Any]:
        """JSON: {"count": spikes so far, "recent": the values remembered, oldest first}."""
        return {"count": self.count, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        self._recent = deque(state["recent"][-self.window :])
        self._sorted = sorted(self._recent)


def median(ordered: list[float]) -> float:
    """Of ascending values, at least one."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else ordered[half - 1] + (ordered[half] - ordered[half - 1]) / 2


def _deviation(ordered: list[float], middle: float) -> float:
    """median(|x - middle|) of sorted values, in logarithmic time.

    The distances below the middle and those above it are two ascending rows, whose k-th smallest a bisection finds.
    """
    split = bisect_left(ordered, middle)
    below, above, total = split, len(ordered) - split, len(ordered)

    def nearest(rank: int) -> float:
        """The rank-th smallest distance, from 1."""
        low, high = max(0, rank - above), min(rank, below)
        while low < high:  # how many of the `rank` nearest lie below the middle
            taken = (low + high) // 2
            if middle - ordered[split - 1 - taken] < ordered[split + rank - taken - 1] - middle:
                low = taken + 1
            else:
                high = taken
        left = middle - ordered[split - low] if low else 0.0
        right = ordered[split + rank - low - 1] - middle if rank > low else 0.0
        return max(left, right)

    half = total // 2
    if total % 2:
        return nearest(half + 1)
    first = nearest(half)
    return first + (nearest(half + 1) - first) / 2


class EarlyStopping:
    """Says when a metric has not improved for `patience` evaluations in a row.

    Args:
        patience: evaluations without an improvement after which to stop, at least 1.
        mode: "min" if lower is better, "max" if higher is.
        min_delta: by how much better counts as an improvement, at least 0.

    A NaN is no improvement.
    """

    def __init__(self, patience: int, mode: str = "min", min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"[EarlyStopping] patience must be at least 1, got {patience}; pass None for no stopping")
        if mode not in ("min", "max"):
            raise ValueError(f"[EarlyStopping] mode must be 'min' or 'max', got {mode!r}; pass one of them")
        if not min_delta >= 0:
            raise ValueError(f"[EarlyStopping] min_delta must not be negative, got {min_delta}; pass 0.0")
        self.patience = patience
        self.mode = mode
        self.min_delta = min_delta
        self.best: float | None = None
        self.waited = 0

    @property
    def stop(self) -> bool:
        return self.waited >= self.patience

    def update(self, value: float) -> bool:
        """Takes the metric of one more evaluation; True if it is time to stop."""
        gain = math.inf if self.best is None else self.best - value if self.mode == "min" else value - self.best
        if not math.isnan(value) and gain > self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.stop

    def state_dict(self) -> dict[str, Any]:
        """JSON: {"best": the best value or None, "waited": evaluations since}; infinities as texts."""
        best = self.best if self.best is None or math.isfinite(self.best) else repr(self.best)
        return {"best": best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = None if state["best"] is None else float(state["best"])
        self.waited = int(state["waited"])


class Throughput:
    """How fast the training is, over the time since the last `row`.

    samples/s = ranks * samples / seconds, likewise tokens/s and steps/s (of one rank); data_wait = seconds waited for
    batches / seconds, in [0, 1]; mfu = samples of this rank / seconds * flops_per_sample / peak.

    Args:
        flops_per_sample: FLOPs of forward and backward of one sample, as from `flops.model_flops`; None: unknown.
        peak: FLOP/s of this rank's device, as from `flops.peak_flops`; None: unknown. Without both there is no "mfu".
        ranks: processes, each of which trains as many samples.
        clock: seconds of the host: a row counts what was handed to the device, in a steady loop what it did.
    """

    def __init__(
        self,
        *,
        flops_per_sample: float | None = None,
        peak: float | None = None,
        ranks: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.flops_per_sample = flops_per_sample
        self.peak = peak
        self._ranks = ranks
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forgets what was added and begins now."""
        self._steps = self._samples = self._tokens = 0
        self._waited = 0.0
        self._began = self._clock()

    def add(self, samples: int, tokens: int = 0, waited: float = 0.0) -> None:
        """Takes one window: this rank's samples and tokens, and the seconds that it waited for them."""
        self._steps += 1
        self._samples += samples
        self._tokens += tokens
        self._waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count: evaluation, a save that is waited for."""
        began = self._clock()
        try:
            yield
        finally:
            self._began += self._clock() - began

    def row(self) -> dict[str, float]:
        """Rates since the last row, and restarts; {} if nothing was added. "tokens/s" and "mfu" where known."""
        seconds = self._clock() - self._began
        if not self._steps or seconds <= 0:
            return {}
        rows = {
            "steps/s": self._steps / seconds,
            "samples/s": self._ranks * self._samples / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
        }
        if self._tokens:
            rows["tokens/s"] = self._ranks * self._tokens / seconds
        if self.flops_per_sample and self.peak:
            rows["mfu"] = self._samples / seconds * self.flops_per_sample / self.peak
        self.restart()
        return rows


def memory(device: torch.device | str | None = None) -> dict[str, int]:
    """Bytes: "memory/host" of this process; on CUDA also "memory/allocated", "memory/reserved" and "memory/peak".

    Args:
        device: whose memory beside the host's. The peak is that of tensors since the process began, or since
            `torch.cuda.reset_peak_memory_stats`. Nothing waits for the device.
    """
    found = {"memory/host": _resident()}
    if device is not None and torch.device(device).type == "cuda":
        statistics = torch.cuda.memory_stats(device)
        found["memory/allocated"] = statistics.get("allocated_bytes.all.current", 0)  # nothing before the first
        found["memory/reserved"] = statistics.get("reserved_bytes.all.current", 0)
        found["memory/peak"] = statistics.get("allocated_bytes.all.peak", 0)
    return found


_PAGE = os.sysconf("SC_PAGE_SIZE")


def _resident() -> int:
    with open("/proc/self/statm", "rb") as file:  # second field: resident pages
        return int(file.read().split()[1]) * _PAGE
