# SPDX-License-Identifier: Apache-2.0
"""An NVIDIA GPU, asked through NVML. CUDA is never started for it: a process that has started it may not fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from fastloop.extras import need
from fastloop.monitor.record import GPU_FIELDS, Readings, throttle_names

Device = int | str | torch.device | None
MEGA = 1e6


class NotKnown(RuntimeError):
    """Which of NVML's devices is meant cannot be told; the text says why."""


def cuda_index(device: Device) -> int | None:
    """The index of `device` among CUDA's; None if it is not a CUDA device. Without one: the calling thread's, else 0.

    Raises TypeError or ValueError for what is not a device.
    """
    if isinstance(device, bool) or not isinstance(device, int | str | torch.device | None):
        raise TypeError(f"[monitor] device must be an index, a torch.device or its name, got {device!r}; try 'cuda:0'")
    if isinstance(device, int):
        if device < 0:
            raise ValueError(f"[monitor] a device's index must be at least 0, got {device}; pass e.g. 0")
        return device
    try:
        named = torch.device("cuda" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"[monitor] {device!r} is not a device: {str(error).splitlines()[0]}; try 'cuda:0'") from None
    if named.type != "cuda":
        return None
    if named.index is not None:
        return named.index
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


def _visible(index: int) -> str | None:
    """The entry of CUDA_VISIBLE_DEVICES that CUDA calls `index`; None where the variable is not set."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    if index >= len(entries) or entries[index].startswith("-"):
        raise NotKnown(f"CUDA_VISIBLE_DEVICES={listed!r} shows no device {index}")
    return entries[index]


def _by_uuid(nvml: Any, uuid: str) -> Any:
    """The device of that UUID, or of the only one that begins so, as CUDA takes it."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        alike = []
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        alike = [handle for handle in handles if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(uuid)]
    except nvml.NVMLError as error:  # of one that this process may not see, say
        raise NotKnown(f"NVML finds no device of UUID {uuid}: {error}") from error
    if len(alike) != 1:
        raise NotKnown(f"NVML has {len(alike)} devices of UUID {uuid}")
    return alike[0]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _by_order(nvml: Any, number: int) -> Any:
    """CUDA's device `number` where CUDA has not started and so has told no UUID.

    NVML counts along the PCI bus. CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID; otherwise the fastest comes first, which
    is the same order if all are alike.
    """
    count = nvml.nvmlDeviceGetCount()
    if number >= count:
        raise NotKnown(f"NVML has {count} devices, none of number {number}")
    handles = [nvml.nvmlDeviceGetHandleByIndex(each) for each in range(count)]
    if (
        os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
        and len({nvml.nvmlDeviceGetName(each) for each in handles}) > 1
    ):
        raise NotKnown(f"the GPUs differ: which of them CUDA calls {number} is known once CUDA runs, or with "
                       "CUDA_DEVICE_ORDER=PCI_BUS_ID")  # fmt: skip
    return handles[number]


def locate(nvml: Any, index: int) -> tuple[Any, bool, bool]:
    """(handle, whether it is a MIG instance, whether that is final) of CUDA's device `index`.

    CUDA tells its UUID once it runs; before that CUDA_VISIBLE_DEVICES and the order of the devices say which it is.
    """
    final = torch.cuda.is_initialized()
    entry = None if final else _visible(index)  # which may have changed since CUDA read it
    if entry is not None and entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry), True, True
    if final:
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        try:
            handle = _by_uuid(nvml, f"GPU-{uuid}")
        except NotKnown:
            return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}"), True, True
    elif entry is not None and not entry.isdigit():
        handle = _by_uuid(nvml, entry)
    else:
        handle = _by_order(nvml, index if entry is None else int(entry))
    if _mig_is_on(nvml, handle):
        raise NotKnown("MIG is on and which instance is meant is unknown; name it in CUDA_VISIBLE_DEVICES=MIG-...")
    return handle, False, final


def _mig_is_on(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except (nvml.NVMLError, AttributeError):  # a GPU, or a pynvml, that has none
        return False


def _throttle(nvml: Any, handle: Any) -> tuple[str, ...]:
    """By the name of driver 535 and later, then by the one before."""
    try:
        return throttle_names(int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)))
    except (nvml.NVMLError, AttributeError) as first:
        try:
            return throttle_names(int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        except AttributeError:
            raise first from None


def _questions(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    clock = nvml.nvmlDeviceGetClockInfo
    return {
        "gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "gpu_memory_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).memory / 100,
        "gpu_memory_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "gpu_clock_hz": lambda: clock(handle, nvml.NVML_CLOCK_SM) * MEGA,
        "gpu_memory_clock_hz": lambda: clock(handle, nvml.NVML_CLOCK_MEM) * MEGA,
        "gpu_power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "gpu_temperature": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "gpu_throttle": lambda: _throttle(nvml, handle),
    }


class Gpu:
    """CUDA's device `index` as NVML knows it; None, and a GPU that cannot be asked, gives reasons only."""

    def __init__(self, index: int | None) -> None:
        self._index, self._pid = index, os.getpid()
        self._nvml: Any = None
        self._found: tuple[Any, bool, bool] | None = None
        self._never = self._start()

    def _start(self) -> str:
        """Start NVML; returns why this never can be, "" if it did."""
        if self._index is None:
            return "the device is not a CUDA device"
        if torch.version.hip is not None:
            return "NVML speaks of NVIDIA's GPUs, and this torch is built for ROCm"
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        try:
            nvml = need("pynvml", "monitor", "the GPU's state")
            nvml.nvmlInit()
        except Exception as error:  # no package, no driver, no permission: all of them a reason, none a crash
            return str(error)
        self._nvml = nvml
        return ""

    def read(self, into: Readings) -> None:
        """Put every field of the GPU, or its reason, into `into`. Never raises."""
        why = self._never
        if not why and (self._found is None or not self._found[2]):
            try:
                self._found = locate(self._nvml, self._index or 0)
            except Exception as error:
                why = str(error)
        if why or self._found is None:
            into.reasons |= dict.fromkeys(GPU_FIELDS, why)
            return
        handle, instance, _ = self._found
        for name, read in _questions(self._nvml, handle).items():
            into.ask(name, read, " (a MIG instance)" if instance else "")

    def close(self) -> None:
        """End NVML; a fork of the process that started it must not, and does not."""
        if self._nvml is not None and os.getpid() == self._pid:
            nvml, self._nvml, self._never = self._nvml, None, "the monitor was stopped"
            try:
                nvml.nvmlShutdown()
            except Exception:
                return  # the driver went first: nothing is left to end
