# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as a device backend: `fastloop._cuda`, which is built where a CUDA toolkit is found."""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastloop.ops.launches import BucketSpec, count_launch
from fastloop.ops.native import load_extension, native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/core/dtype.h
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

_emulated: ModuleType | None = None  # set by tests: the same kernels, compiled for the CPU


def emulate(module: ModuleType | None) -> None:
    """Let backend="cuda" run on CPU tensors through `module`, an emulated build of the kernels; None: no more."""
    global _emulated
    _emulated = module


def is_emulated() -> bool:
    return _emulated is not None


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    absent = "installed without CUDA kernels (no CUDA toolkit when fastloop was built, or FASTLOOP_CUDA=OFF)"
    return load_extension("fastloop._cuda", absent)


@functools.cache
def _why_not(device: int | None) -> str:
    """Why the kernels cannot run on the device of this number, or at all; empty if they can."""
    module, reason = _load()
    if module is None:
        return reason
    if torch.version.hip is not None:
        return "torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    with _on(torch.cuda.current_device() if device is None else device):
        return str(module.check_runtime() or module.check_device())


def why_not(device: torch.device | None = None) -> str:
    """Why the kernels cannot run, on `device` or on the current one; empty if they can."""
    if _emulated is not None:
        return "" if device is None or device.type == "cpu" else "an emulated build runs on CPU tensors"
    if device is not None and device.type != "cuda":
        return f"CUDA kernels serve no tensors on {device}"
    return _why_not(None if device is None else device.index)


def _module() -> Any:
    return _emulated if _emulated is not None else _load()[0]


def rule_index(rule: str) -> int:
    module = native()
    assert module is not None, "without native kernels there is no table to launch with"
    return list(module.rules()).index(rule)


class Kernels:
    """The device backend: see DeviceBackend in fastloop.ops.launches."""

    @property
    def INLINE_WORDS(self) -> int:
        return int(_module().INLINE_WORDS)

    def serves(
        self, rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype, master: bool, ema: bool
    ) -> bool:
        codes = [DTYPE_CODES.get(dtype) for dtype in (param, grad, state)]
        return None not in codes and bool(_module().serves(rule_index(rule), *codes, master, ema))

    def bucket(self, spec: BucketSpec) -> CudaLaunches:
        return CudaLaunches(spec)

    def blocks(self, device: torch.device) -> int:
        with _on(device.index if device.type == "cuda" else None):
            return int(_module().norm_blocks(device.index or 0))


KERNELS = Kernels()


class CudaLaunches:
    """The two launches of one bucket, on the current stream of its device."""

    def __init__(self, spec: BucketSpec) -> None:
        self._keep = spec  # its tensors live as long as their addresses are used
        self._index = spec.device.index or 0
        self._guarded = self._index if spec.device.type == "cuda" else None
        skipped = 0 if spec.skipped is None else spec.skipped.data_ptr()
        with _on(self._guarded):
            self._launches = _module().Launches(
                self._index,
                rule_index(spec.rule),
                *(DTYPE_CODES[dtype] for dtype in (spec.param, spec.grad, spec.state)),
                spec.master,
                spec.ema,
                spec.rows,
                spec.tensors,
                spec.chunks,
                spec.first_tensor,
                spec.bucket_tensors,
                spec.first_chunk,
                spec.bucket_chunks,
                spec.table.data_ptr(),
                spec.sums.data_ptr(),
                spec.sums.shape[0],
                spec.ticket.data_ptr(),
                spec.result.data_ptr(),
                skipped,
            )

    def _stream(self) -> int:
        return 0 if self._guarded is None else _current_raw_stream(self._index)

    def norm(self, words: int, n_words: int) -> None:
        count_launch()
        with _on(self._guarded):
            self._launches.norm(self._stream(), words, n_words)

    def update(self, sums: Tensor) -> None:
        count_launch()
        with _on(self._guarded):
            self._launches.update(self._stream(), sums.data_ptr(), sums.shape[0])


_HERE = contextlib.nullcontext()


def _on(index: int | None) -> contextlib.AbstractContextManager[Any]:
    """This GPU as the current one; None: no matter."""
    return _HERE if index is None or index == torch.cuda.current_device() else torch.cuda.device(index)


def _current_raw_stream(index: int) -> int:
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(raw(index) if raw is not None else torch.cuda.current_stream(index).cuda_stream)
