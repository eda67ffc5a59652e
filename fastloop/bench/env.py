# SPDX-License-Identifier: Apache-2.0
"""Where a result was measured: hardware, versions, threads, memory, commit. No host or user names."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastloop import machine
from fastloop.machine import available_bytes as available_bytes

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """One line of the report per field; `same_machine` and `same_build` compare the fields that matter."""

    device: str
    cpu: str
    cores: int
    threads: int
    isa: str
    torch_isa: str
    memory_bytes: int
    available_bytes: int
    load: float
    huge_pages: str
    system: str
    python: str
    torch: str
    fastloop: str
    backends: dict[str, str]
    commit: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or text.strip()


def commit(folder: Path = REPOSITORY) -> str | None:
    """The checkout's commit, with "-dirty" if tracked files differ from it; None outside a checkout of this project."""
    if not (folder / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _device() -> str:
    if not torch.cuda.is_available():
        return "CPU"
    return f"CPU (a GPU is present and not measured: {torch.cuda.get_device_name()})"


def environment() -> Environment:
    """Describe this process and machine."""
    package = import_module("fastloop")
    backends: dict[str, dict[str, Any]] = package.backends() if hasattr(package, "backends") else {}
    meminfo = machine.meminfo()
    return Environment(
        device=_device(),
        cpu=machine.cpu_model(),
        cores=machine.usable_cpus(),
        threads=torch.get_num_threads(),
        isa=str(backends.get("cpu", {}).get("isa")),
        torch_isa=torch.backends.cpu.get_cpu_capability(),
        memory_bytes=meminfo.get("MemTotal", 0),
        available_bytes=meminfo.get("MemAvailable", 0),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        huge_pages=_huge_pages(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        fastloop=str(getattr(package, "__version__", "unknown")),
        backends={
            name: "available" if entry["available"] else str(entry["reason"]) for name, entry in backends.items()
        },
        commit=commit(),
    )


def same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results come from the same kind of machine with the same threads and torch."""
    return all(a.get(key) == b.get(key) for key in ("cpu", "cores", "threads", "torch", "isa", "torch_isa"))


def same_build(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results come from the same version and commit of fastloop; a dirty checkout is never the same."""
    commits = (a.get("commit"), b.get("commit"))
    return a.get("fastloop") == b.get("fastloop") and commits[0] == commits[1] and "dirty" not in str(commits[0])
