# SPDX-License-Identifier: Apache-2.0
"""Launch settings by architecture.

A table, not @autotune: trying settings would run kernels that write in place. Not yet measured on hardware: chosen
from the machine code (16-byte accesses, no spills, 20 warps on a multiprocessor with 40 KB of loads in flight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ACCESS_BYTES = 16  # of one thread
# Which of two products is fused with their sum would be the compiler's choice, and not the same for aligned and other
# elements: an element's bits would depend on its place.
UNFUSED = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Settings:
    threads: int = 128  # of a program
    norm_accesses: int = 4  # loads of one thread in flight in launch 1
    programs: int = 5  # per multiprocessor, all at once: 65536 registers / (5 * 128 threads) is 96 and more
    # Adam takes about 72, amsgrad with ema 96. Without a number ptxas aims at 64 and spills loop-invariant scalars.
    max_registers: int = 96

    def norm_block(self, grad_bytes: int) -> int:
        """Elements that launch 1 takes at once."""
        return self.threads * self.norm_accesses * ACCESS_BYTES // grad_bytes

    def update_block(self, widest_bytes: int) -> int:
        """Elements that launch 2 takes at once: 16 bytes a thread of its widest dtype.

        More would give a thread 8 elements of bf16 and with them two accesses of fp32, whose stores Triton then
        rearranges through shared memory.
        """
        return self.threads * ACCESS_BYTES // widest_bytes

    def cuda_options(self) -> dict[str, Any]:
        return {"num_warps": self.threads // 32, "maxnreg": self.max_registers, **UNFUSED}


DEFAULT = Settings()
BY_CAPABILITY: dict[int, Settings] = {}  # 90: Settings(...), once it is measured

# Fewer, longer steps than on a device; still several to a chunk, and several chunks to a program.
INTERPRETED = Settings(threads=512, norm_accesses=2, programs=3)


def settings_of(capability: int) -> Settings:
    """The settings of a CUDA compute capability: 90 for 9.0."""
    return BY_CAPABILITY.get(capability, DEFAULT)


def settings_for(device: torch.device) -> tuple[Settings, dict[str, Any]]:
    """The settings of a device, and the options of its launches."""
    if device.type == "cpu":
        return INTERPRETED, {}
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        settings = settings_of(10 * major + minor)
        return settings, settings.cuda_options()
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32  # 64 on CDNA
    return DEFAULT, {"num_warps": DEFAULT.threads // warp, **UNFUSED}


def programs(device: torch.device) -> int:
    """Programs of one launch, at most."""
    settings, _ = settings_for(device)
    if device.type == "cpu":
        return settings.programs
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    units = getattr(properties, "multi_processor_count", None) or properties.gpu_eu_count // 8  # XPU: Xe cores of 8
    return settings.programs * units
