# SPDX-License-Identifier: Apache-2.0
"""What a process may use, read from made-up /proc and control groups."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastloop import machine

MEMINFO = "MemTotal:       8388608 kB\nMemAvailable:   4194304 kB\nHugePages_Total:       0\n"
GIB = 2**30


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def made(root: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """(proc, cgroups) with these files."""
    for name, text in {"proc/self/cgroup": groups, "proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "cgroup"


def test_no_limit(tmp_path: Path, many_cpus: None) -> None:
    where = made(tmp_path, "0::/a\n", {"cgroup/a/cpu.max": "max 100000\n", "cgroup/a/memory.max": "max\n"})
    assert machine.cpu_quota(*where) is None
    assert machine.usable_cpus(*where) == 8
    assert machine.total_bytes(*where) == 8 * GIB
    assert machine.available_bytes(*where) == 4 * GIB


def test_version_2_takes_the_smallest_of_its_parents(tmp_path: Path, many_cpus: None) -> None:
    files = {
        "cgroup/a/b/cpu.max": "600000 100000\n",
        "cgroup/a/cpu.max": "250000 100000\n",
        "cgroup/a/memory.max": f"{2 * GIB}\n",
        "cgroup/a/memory.current": f"{GIB}\n",
        "cgroup/a/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
    }
    where = made(tmp_path, "0::/a/b\n", files)
    assert machine.cpu_quota(*where) == 2.5
    assert machine.usable_cpus(*where) == 2
    assert machine.total_bytes(*where) == 2 * GIB
    assert machine.available_bytes(*where) == 1.5 * GIB


def test_version_1(tmp_path: Path, many_cpus: None) -> None:
    files = {
        "cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
        "cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        "cgroup/memory/memory.usage_in_bytes": "5\n",
        "cgroup/memory/a/memory.limit_in_bytes": f"{GIB}\n",
        "cgroup/memory/a/memory.usage_in_bytes": f"{3 * GIB}\n",
    }
    where = made(tmp_path, "4:memory:/a\n2:cpu,cpuacct:/a\n0::/\n", files)
    assert machine.cpu_quota(*where) == 0.5
    assert machine.usable_cpus(*where) == 1
    assert machine.total_bytes(*where) == GIB
    assert machine.available_bytes(*where) == 0


def test_nothing_is_known(tmp_path: Path, many_cpus: None) -> None:
    where = (tmp_path / "proc", tmp_path / "cgroup")
    assert machine.usable_cpus(*where) == 8
    assert machine.total_bytes(*where) is None
    assert machine.available_bytes(*where) is None
    assert machine.meminfo(where[0]) == {}


def test_the_fingerprint_names_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.fingerprint()
    assert before == machine.fingerprint()
    assert "torch" in before
    monkeypatch.setattr(machine, "usable_cpus", lambda: 77)
    assert "77 CPUs" in machine.fingerprint()


def test_a_gpu_is_named_without_starting_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    folder = tmp_path / "driver/nvidia/gpus/0000:01:00.0"
    assert machine.gpu_model(tmp_path) == "unknown GPU"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA Thing\nIRQ:   5\n")
    assert machine.gpu_model(tmp_path) == "NVIDIA Thing"


def test_cudas_first_gpu_is_named_by_nvml_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml(ModuleType):
        NVMLError = type("NVMLError", (Exception,), {})
        names = ("NVIDIA One", "NVIDIA Two")

        def nvmlInit(self) -> None: ...

        def nvmlShutdown(self) -> None: ...

        def nvmlDeviceGetCount(self) -> int:
            return len(self.names)

        def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
            return number

        def nvmlDeviceGetName(self, handle: int) -> bytes:
            return self.names[handle].encode()

        def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
            return 0, 0

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.gpu_model() == "NVIDIA Two"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")  # which is that is not known
    assert machine.gpu_model() not in Nvml.names
