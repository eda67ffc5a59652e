# SPDX-License-Identifier: Apache-2.0
"""A module that answers as pynvml does, for GPUs described here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As pynvml's, without its numbers."""


class FakeNvml:
    """GPUs by UUID, along the PCI bus; `fails` names functions that raise NVMLError, `lacks` those that are missing."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(
        self,
        gpus: dict[str, str] | None = None,
        *,
        mig: bool = False,
        fails: dict[str, str] | None = None,
        lacks: tuple[str, ...] = (),
        mask: int = 0,
    ) -> None:
        self.gpus = {"GPU-aaaa-1": "H200"} if gpus is None else gpus
        self.mig, self.fails, self.lacks, self.mask = mig, fails or {}, lacks, mask
        self.started = self.ended = 0
        self.asked: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        known = object.__getattribute__(self, "__dict__")
        if name in known.get("lacks", ()):
            raise AttributeError(name)
        if name in known.get("fails", {}):
            return self._raising(known["fails"][name])
        return object.__getattribute__(self, name)

    @staticmethod
    def _raising(text: str) -> Callable[..., None]:
        def fail(*arguments: object) -> None:
            raise NVMLError(text)

        return fail

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.ended += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.gpus)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid in self.gpus or (uuid.startswith("MIG-") and self.mig):
            return uuid
        raise NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()  # older versions answer with bytes

    def nvmlDeviceGetName(self, handle: str) -> str:
        return self.gpus[handle]

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return [int(self.mig), int(self.mig)]

    def _whole(self, handle: str) -> None:
        self.asked.append(handle)
        if handle.startswith("MIG-"):
            raise NVMLError("Not Supported")

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._whole(handle)
        return SimpleNamespace(gpu=93, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=5 << 30, total=80 << 30)

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        self._whole(handle)
        return 1980 if kind == self.NVML_CLOCK_SM else 3201

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._whole(handle)
        return 412_500

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self._whole(handle)
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self._whole(handle)
        return self.mask

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._whole(handle)
        return self.mask
