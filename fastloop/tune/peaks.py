# SPDX-License-Identifier: Apache-2.0
"""How much memory this process has taken at most, of how much it could have."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fastloop import machine
from fastloop.extras import need
from fastloop.monitor import nvidia

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak, with what others have taken of the device, of `capacity`; None where nobody says."""

    bytes: int | None
    capacity: int | None
    what: str  # how it was measured


def peak(device: torch.device, memory_limit: int | None) -> Peak:
    """Of this process so far. A GPU's is what torch has reserved and what else is on the device.

    Args:
        device: that is trained on.
        memory_limit: bytes of host memory that the process may take; None: what the machine has.
    """
    if device.type != "cuda":
        capacity = machine.total_bytes() if memory_limit is None else memory_limit
        return Peak(peak_rss(), capacity, "largest resident size of the process")
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = max(0, total - free - torch.cuda.memory_reserved(device))  # CUDA's context, other processes
    return Peak(torch.cuda.max_memory_reserved(device) + elsewhere, total, "reserved by torch, and what else is there")


def peak_rss(status: Path = STATUS) -> int | None:
    """Largest resident size of this process in bytes; None where the system does not say."""
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def nvml_bytes(device: torch.device, pid: int) -> tuple[int | None, str]:
    """What NVML says that the process has on the device, or None and why it does not say."""
    if device.type != "cuda":
        return None, "the device is no NVIDIA GPU"
    try:
        nvml = need("pynvml", "monitor", "NVML's view of the memory")
        nvml.nvmlInit()
        handle = nvidia.locate(nvml, torch.cuda.current_device() if device.index is None else device.index)[0]
        used = [each.usedGpuMemory for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if each.pid == pid]
    except Exception as error:  # no package, no driver, no permission: a reason, and no crash
        return None, str(error)
    if not used:
        return None, "NVML does not list this process: in a container it knows the host's process numbers"
    return (None, "NVML does not say it here, as on a MIG instance") if used[0] is None else (int(used[0]), "")
