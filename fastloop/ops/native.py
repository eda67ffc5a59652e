# SPDX-License-Identifier: Apache-2.0
"""The native module, loaded once."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch


@functools.cache
def load_native() -> tuple[ModuleType | None, str]:
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
    return load_native()[0]
