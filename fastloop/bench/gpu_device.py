# SPDX-License-Identifier: Apache-2.0
"""The GPU that is measured on: its description, its clocks, and how fast it moves bytes."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastloop.bench import env
from fastloop.monitor.record import SLOWING

Move = Callable[[], object]  # one call moves a known number of bytes

# ---- Ceilings


@dataclass
class Ceiling:
    """How fast the device moves bytes in one pattern of streams."""

    build: Callable[[], Move]  # makes its buffers, and a call that moves `bytes`
    bytes: int
    seconds: list[float]

    @property
    def gbps(self) -> float:
        return self.bytes / median(self.seconds) * 1e-9


def _buffers(count: int, elements: int, device: torch.device) -> list[Tensor]:
    return [torch.randn(elements, device=device) for _ in range(count)]


def patterns(elements: int, device: torch.device) -> Iterator[tuple[str, int, Callable[[], Move]]]:
    """(name, bytes, build) of each pattern: copy, triad, and the streams of clip + AdamW where Triton is installed."""

    def copy() -> Move:
        a, b = _buffers(2, elements, device)
        return partial(a.copy_, b)

    def triad() -> Move:
        a, b, c = _buffers(3, elements, device)
        return partial(torch.add, b, c, alpha=0.5, out=a)

    def streams() -> Move:
        module: Any = importlib.import_module("fastloop.bench.gpu_stream")
        call: Move = module.build(_buffers(module.STREAMS, elements, device))
        return call

    yield "copy", 8 * elements, copy
    yield "triad", 12 * elements, triad
    if importlib.util.find_spec("triton") is not None:
        yield "streams", 32 * elements, streams


# ---- The device's state

_FIELDS = (
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "power.limit",
    "pstate", "driver_version",
)  # fmt: skip
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second before driver 535


def _query(fields: Sequence[str], index: int) -> list[str]:
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return [field.strip() for field in result.stdout.strip().split(",")]


def clocks(index: int = 0) -> dict[str, Any]:
    """Clocks, power, temperature and reasons of throttling, as nvidia-smi says; `error` where it does not."""
    try:
        state: dict[str, Any] = dict(zip(_FIELDS, _query(_FIELDS, index), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return {"error": f"nvidia-smi: {error}"}
    for name in _REASONS:
        try:
            mask = int(_query([name], index)[0], 16)
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
        state["throttling"] = [reason for bit, reason in SLOWING.items() if mask & bit]
        state["reasons"] = hex(mask)
        break
    return state


def clocks_under_load(device: torch.device, elements: int) -> dict[str, Any]:
    """The same while the device copies, for the second or so that nvidia-smi takes."""
    _, _, build = next(patterns(elements, device))
    copy = build()
    for _ in range(1000):
        copy()
    state = clocks(device.index or 0)
    torch.cuda.synchronize()
    return state


def environment(device: torch.device) -> dict[str, Any]:
    """That of the CPU benchmark, and the GPU's."""
    properties: Any = torch.cuda.get_device_properties(device)
    triton = importlib.util.find_spec("triton") is not None and importlib.import_module("triton").__version__
    return env.environment().as_dict() | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "device_memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "torch_cuda": torch.version.cuda,
        "triton": triton or None,
    }
