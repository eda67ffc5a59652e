# SPDX-License-Identifier: Apache-2.0
"""Which kernels can run here, and why the others cannot."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch

from fastloop.ops import cuda
from fastloop.ops.launches import DeviceBackend, count_launch
from fastloop.ops.native import load_native, native

NAMES = ("auto", "cpu", "cuda", "triton", "reference")


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this build and this machine have, the best one last. Empty without native kernels."""
    module = native()
    return () if module is None else tuple(module.supported_isas())


def backends() -> dict[str, dict[str, Any]]:
    """What can run on this machine.

    Returns:
        `{name: {"available": bool, "reason": str, "isa": str | None}}` for the backends "cpu", "cuda", "triton" and
        "reference". `reason` says why a backend is there or is not; `isa` is the instruction set of the CPU kernels.

    Raises:
        ValueError: `FASTLOOP_ISA` names an instruction set that this build or machine does not have.
    """
    module, missing = load_native()
    isa = None if module is None else module.isa()
    chosen = "FASTLOOP_ISA" if os.environ.get("FASTLOOP_ISA") else "the best of this machine"
    cpu_reason = missing if module is None else f"{isa}, {chosen} (has {', '.join(supported_isas())})"
    return {
        "cpu": {"available": module is not None, "reason": cpu_reason, "isa": isa},
        "cuda": _status(missing or cuda.why_not(), "CUDA kernels, in CPU emulation" if cuda.is_emulated() else "CUDA"),
        "triton": _status(missing or triton_why_not(), "Triton, interpreted on the CPU" if interpreted() else "Triton"),
        "reference": {"available": True, "reason": "plain torch operations, on every device", "isa": None},
    }


def _status(why_not: str, reason: str) -> dict[str, Any]:
    return {"available": not why_not, "reason": why_not or reason, "isa": None}


# ---- devices


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _has_triton() -> str:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4)
    return f"triton {triton.__version__} is older than 3.4" if old else ""


def triton_why_not(device: torch.device | None = None) -> str:
    """Why the Triton kernels cannot run, on `device` or at all; empty if they can."""
    missing = _has_triton()
    if missing:
        return missing
    if interpreted():
        return "" if device is None or device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors"
    if device is not None and device.type not in ("cuda", "xpu"):
        return f"Triton kernels serve no tensors on {device}"
    xpu = getattr(torch, "xpu", None)
    has_gpu = torch.cuda.is_available() or (xpu is not None and xpu.is_available())
    return "" if has_gpu else "torch sees no GPU"


@functools.cache
def _triton_kernels() -> DeviceBackend:
    kernels: Any = importlib.import_module("fastloop.triton_kernels")
    kernels.on_launch = count_launch
    return kernels  # type: ignore[no-any-return]


def device_kernels(backend: str, device: torch.device) -> DeviceBackend | None:
    """The kernels that run on `device` under this choice of backend; None: CPU kernels, or the reference."""
    if native() is None or backend in ("cpu", "reference") or (backend == "auto" and device.type in ("cpu", "meta")):
        return None
    if backend in ("auto", "cuda") and not cuda.why_not(device):
        return cuda.KERNELS
    if backend in ("auto", "triton") and not triton_why_not(device):
        return _triton_kernels()
    return None


def why_not_on(backend: str, device: torch.device) -> str:
    """Why a backend's kernels do not run on `device`; empty if they do."""
    return {"cuda": cuda.why_not, "triton": triton_why_not}[backend](device)


def check_backend(where: str, backend: str) -> None:
    """Raise unless `backend` is a known name and can run here.

    Raises:
        ValueError: unknown name.
        RuntimeError: a backend that cannot run, with its reason.
    """
    if backend not in NAMES:
        raise ValueError(f"[{where}] backend must be one of {', '.join(NAMES)}, got {backend!r}")
    if backend in ("auto", "reference"):
        return
    status = backends()[backend]
    if not status["available"]:
        raise RuntimeError(
            f'[{where}] backend="{backend}" cannot run here: {status["reason"]}; use backend="auto" '
            "(fastloop.backends() lists what can)"
        )
