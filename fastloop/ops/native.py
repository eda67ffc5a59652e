# SPDX-License-Identifier: Apache-2.0
"""The compiled modules, loaded once."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch


def load_extension(name: str, absent: str) -> tuple[ModuleType | None, str]:
    """A compiled module of ours, or None and the reason; `absent` is the reason where it was not built."""
    try:
        # torch is imported above: its OpenMP runtime is the one that the module then finds loaded.
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None, absent
    except ImportError as error:
        return None, f"{name} does not load: {error}"


@functools.cache
def load_native() -> tuple[ModuleType | None, str]:
    """The native module, or None and the reason."""
    module, reason = load_extension("fastloop._native", "installed without native kernels (FASTLOOP_NATIVE=OFF)")
    if module is not None:
        module.initialize(torch.Tensor, use_exchange_api=os.environ.get("FASTLOOP_DLPACK", "ON").upper() != "OFF")
    return module, reason


def native() -> ModuleType | None:
    """`fastloop._native`, or None where it was not built or does not load."""
    return load_native()[0]
