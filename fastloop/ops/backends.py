# SPDX-License-Identifier: Apache-2.0
"""Which kernels can run here, and why the others cannot."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

NAMES = ("auto", "cpu", "cuda", "triton", "reference")

_NOT_YET = "this version has no {} kernels yet"


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    """The native module, or None and the reason."""
    try:
        # torch is imported above: its OpenMP runtime is the one that the module then finds loaded.
        module = importlib.import_module("fastloop._native")
    except ModuleNotFoundError as error:
        if error.name != "fastloop._native":
            raise
        return None, "installed without native kernels (FASTLOOP_NATIVE=OFF)"
    except ImportError as error:
        return None, f"fastloop._native does not load: {error}"
    module.initialize(torch.Tensor, use_exchange_api=os.environ.get("FASTLOOP_DLPACK", "ON").upper() != "OFF")
    return module, ""


def native() -> ModuleType | None:
    """`fastloop._native`, or None where it was not built or does not load."""
    return _load_native()[0]


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
    module, missing = _load_native()
    isa = None if module is None else module.isa()
    chosen = "FASTLOOP_ISA" if os.environ.get("FASTLOOP_ISA") else "the best of this machine"
    cpu_reason = missing if module is None else f"{isa}, {chosen} (has {', '.join(supported_isas())})"
    return {
        "cpu": {"available": module is not None, "reason": cpu_reason, "isa": isa},
        "cuda": {"available": False, "reason": _NOT_YET.format("CUDA"), "isa": None},
        "triton": {"available": False, "reason": _NOT_YET.format("Triton"), "isa": None},
        "reference": {"available": True, "reason": "plain torch operations, on every device", "isa": None},
    }


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
