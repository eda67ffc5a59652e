# SPDX-License-Identifier: Apache-2.0
"""Memory of one window as it happens: at the end of the last forward, of the backward, of the step; and the peak.

On a GPU torch's allocator counts. On a CPU, where there is no such count, torch's profiler hears of each operation's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastloop.bench.memory import timeline
from fastloop.tune.parts import gradient_bytes

PHASES = ("earlier micro-batches", "forward", "backward", "step")  # the last three are of the last one
_MARK = "fastloop.tune:"


@dataclass(frozen=True)
class Phases:
    """Bytes above those that were there when the window began. ends, peaks: by phase.

    activations: what the last forward left for its backward, its outputs and its loss.
    gradients: of the whole window, before the step.
    """

    ends: dict[str, int]
    peaks: dict[str, int]
    gradients: int

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def activations(self) -> int:
        return self.ends["forward"] - self.ends["earlier micro-batches"]


Marks = Callable[[str], None]  # called with a phase's name at its end


def phases_of(window: Callable[[Marks], None], optimizer: torch.optim.Optimizer, device: torch.device) -> Phases:
    """Run `window`, which says when each of PHASES ends."""
    found = [0]

    def with_gradients(phase: str, mark: Marks) -> None:
        mark(phase)
        if phase == "backward":
            found[0] = gradient_bytes(optimizer)

    ends, peaks = (_on_gpu if device.type == "cuda" else _on_cpu)(window, with_gradients, device)
    return Phases(ends, peaks, found[0])


def _on_cpu(window: Any, heard: Any, device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    del device

    def mark(phase: str) -> None:
        with torch.autograd.profiler.record_function(_MARK + phase):
            pass  # a range of no length: what is freed within one would count at its end

    return split_by_phase(timeline(lambda: window(lambda phase: heard(phase, mark))))


def split_by_phase(events: Sequence[tuple[str, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes at each phase's end, largest within it) from (name, change) in order, marks among them."""
    ends: dict[str, int] = {}
    peaks: dict[str, int] = {}
    held = peak = 0
    for name, change in events:
        held += change
        peak = max(peak, held)
        if name.startswith(_MARK):
            phase = name.removeprefix(_MARK)
            ends[phase], peaks[phase], peak = held, peak, held
    return ends, peaks


def _on_gpu(window: Any, heard: Any, device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    ends: dict[str, int] = {}
    peaks: dict[str, int] = {}
    start = torch.cuda.memory_allocated(device)

    def mark(phase: str) -> None:
        ends[phase] = torch.cuda.memory_allocated(device) - start
        peaks[phase] = torch.cuda.max_memory_allocated(device) - start
        torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.reset_peak_memory_stats(device)
    window(lambda phase: heard(phase, mark))
    return ends, peaks
