# SPDX-License-Identifier: Apache-2.0
"""What this process may use of its machine: CPUs, memory; and the fingerprint that a tuned setting belongs to.

A container is given less than the machine has: CPUs by an affinity mask or by a quota of time, memory by a limit. Both
are read from the control groups of this process, version 1 and 2, and from those that they lie in.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from fastloop._version import __version__

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """CPUs that this process may use: of its affinity mask, and no more than its quota of CPU time; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(proc, cgroups)
    return count if quota is None else max(1, min(count, int(quota)))


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """CPUs' worth of time that the control groups grant, the smallest of them; None without a limit."""
    found = []
    for folder in _folders("cpu", proc, cgroups):
        quota, period = (_text(folder / "cpu.max").split() + ["", ""])[:2]
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def total_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Memory that this process could have if nobody else had any; None where the system does not say."""
    limits = [limit for limit, _ in _memory_limits(proc, cgroups)]
    return min([*limits, *_known(meminfo(proc).get("MemTotal"))], default=None)


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Memory that can be allocated without swapping and within the limits; None where the system does not say."""
    left = [max(limit - used, 0) for limit, used in _memory_limits(proc, cgroups)]
    return min([*left, *_known(meminfo(proc).get("MemAvailable"))], default=None)


def meminfo(proc: Path = PROC) -> dict[str, int]:
    """/proc/meminfo in bytes; {} where there is none."""
    rows = (line.partition(":") for line in _text(proc / "meminfo").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in rows if value.endswith(" kB")}


def cpu_model(proc: Path = PROC) -> str:
    """The processor's name."""
    for line in _text(proc / "cpuinfo").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_model(proc: Path = PROC) -> str:
    """The name of CUDA's first GPU, from NVML or else /proc; "none" without one.

    CUDA is not started for it: a process that has may not fork.
    """
    if torch.cuda.device_count() == 0:
        return "none"
    if proc == PROC and (name := _name_of_nvml()) is not None:
        return name
    for path in sorted(proc.glob("driver/nvidia/gpus/*/information")):
        for line in _text(path).splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return "unknown GPU"


def _name_of_nvml() -> str | None:
    """None where NVML, or its module, is not there, or which device CUDA's first one is cannot be told."""
    try:
        import pynvml

        from fastloop.monitor.nvidia import locate
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            name = pynvml.nvmlDeviceGetName(locate(pynvml, 0)[0])
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, RuntimeError):
        return None
    return name.decode() if isinstance(name, bytes) else str(name)


def fingerprint() -> str:
    """What a measured setting holds for: the machine and the versions, "; " between them."""
    parts = (
        cpu_model(),
        f"{usable_cpus()} CPUs",
        f"{(total_bytes() or 0) / 2**30:.0f} GiB",
        f"GPU {gpu_model()}",
        f"Python {'.'.join(platform.python_version_tuple()[:2])}",
        f"torch {torch.__version__}",
        f"fastloop {__version__}",
    )
    return "; ".join(parts)


def _known(value: int | None) -> list[int]:
    return [] if value is None else [value]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _folders(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The control group of this process that has the controller, and those that it lies in."""
    for line in _text(proc / "self/cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            roots = [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            roots = [cgroups / controllers, cgroups / controller]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            for end in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:end])


def _memory_limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, used of it) of each control group that has one; what can be dropped from caches is not used."""
    for folder in _folders("memory", proc, cgroups):
        for limit_name, used_name, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _text(folder / limit_name), _text(folder / used_name)
            if limit.isdigit() and used.isdigit() and int(limit) < 2**60:  # version 1 writes 2**63 for none
                rows = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines())
                yield int(limit), max(int(used) - int(rows.get(cache, 0)), 0)
