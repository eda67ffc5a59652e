# SPDX-License-Identifier: Apache-2.0
"""One reading of every field, and what many of them come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

# What slows a GPU's clocks down, by the bits of NVML's mask, and what else may stand in it. NVML's names changed with
# driver 535 (throttle reasons -> event reasons), the bits did not.
POWER = {0x4: "power cap", 0x8: "hardware slowdown", 0x80: "power brake"}
THERMAL = {0x20: "thermal, by software", 0x40: "thermal, by hardware"}
SLOWING = dict(sorted((POWER | THERMAL).items()))
HARMLESS = {0x1: "idle", 0x2: "application clocks", 0x10: "sync boost", 0x100: "display clocks"}


def throttle_names(mask: int) -> tuple[str, ...]:
    """Names of the bits of NVML's mask of reasons, those unknown here in hexadecimal."""
    known = SLOWING | HARMLESS
    bits = [1 << position for position in range(mask.bit_length()) if mask >> position & 1]
    return tuple(known.get(bit, hex(bit)) for bit in bits)


@dataclass(frozen=True)
class Sample:
    """What was read at one moment; None where the device does not say, for the reason under the field's name.

    time: seconds since the epoch.
    gpu_utilization: share of the last sampling period of the device (up to a second) in which a kernel ran;
        gpu_memory_utilization: in which its memory was read or written.
    gpu_memory_bytes: in use on the device, by all processes and the driver.
    gpu_throttle: why its clocks are as they are, () if for no reason.
    host_rss_bytes: memory of this process and its children. With children it is the sum of proportional set sizes
        (PSS): a page that n processes share counts once. Reading it walks the page tables (1.7 ms a GB here), so it is
        read when a process came or went, and else so seldom that it takes less than 1 % of the time; in between, the
        change of the resident sizes is added.
    host_available_bytes: that can be allocated without swapping and within the control group's limit.
    cpu_utilization: share of the usable CPUs (affinity) that is busy, whoever keeps it so.
    process_cpu: CPUs that this process and its children keep busy, 1.0 being one of them.
    """

    time: float
    gpu_utilization: float | None = None
    gpu_memory_utilization: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_clock_hz: float | None = None
    gpu_memory_clock_hz: float | None = None
    gpu_power_watts: float | None = None
    gpu_temperature: float | None = None
    gpu_throttle: tuple[str, ...] | None = None
    host_rss_bytes: int | None = None
    host_available_bytes: int | None = None
    cpu_utilization: float | None = None
    process_cpu: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[str, float | None]:
        """Every field that is a number, by name, without the time."""
        return {name: getattr(self, name) for name in NUMBERS}


FIELDS = tuple(each.name for each in fields(Sample) if each.name not in ("time", "reasons"))
NUMBERS = tuple(name for name in FIELDS if name != "gpu_throttle")
GPU_FIELDS = tuple(name for name in FIELDS if name.startswith("gpu_"))


class Readings:
    """The values of a sample while it is taken: a field that fails gives its reason and stops no other."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def ask(self, name: str, read: Callable[[], Any], note: str = "") -> None:
        """Put `read()` under `name`, or, if it raises, the error's text and `note` under the field's reason."""
        try:
            self.values[name] = read()
        except Exception as error:
            self.reasons[name] = f"{error or type(error).__name__}{note}"

    def sample(self, time: float) -> Sample:
        return Sample(time=time, **self.values, reasons=self.reasons)


def summarize(samples: Sequence[Sample], ranks: int) -> dict[str, float | None]:
    """Means by field, `..._peak` the largest value, shares of the samples in which the GPU's clocks were held down.

    None where no sample has the field. `host_available_bytes_least` takes the place of that field's peak.
    """
    summary: dict[str, float | None] = {"samples": float(len(samples)), "ranks": float(ranks)}
    for name in NUMBERS:
        known = [float(value) for each in samples if (value := getattr(each, name)) is not None]
        summary[name] = sum(known) / len(known) if known else None
        end, extreme = ("least", min) if name == "host_available_bytes" else ("peak", max)
        summary[f"{name}_{end}"] = extreme(known) if known else None
    reasons = [each.gpu_throttle for each in samples if each.gpu_throttle is not None]
    for name, kind in (("power", POWER), ("thermal", THERMAL)):
        held = sum(not set(kind.values()).isdisjoint(each) for each in reasons)
        summary[f"gpu_throttle_{name}"] = held / len(reasons) if reasons else None
    return summary
