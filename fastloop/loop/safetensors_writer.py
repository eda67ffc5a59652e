# SPDX-License-Identifier: Apache-2.0
"""Writing of safetensors files: the header, and bytes that are hashed on their way to the disk.

File = header length (8 bytes, little endian), header (JSON), the tensors' bytes without gaps. A tensor may be a box of
a larger one that several files share; its offsets stand under DCP_SHARDING_INFO in the header, where
torch.distributed.checkpoint.HuggingFaceStorageReader finds them.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What every reader knows: torch 2.8's takes others for float32.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# For files of whole weights, which keep their dtypes.
EXPORT_NAMES: dict[torch.dtype, str] = {
    **DTYPE_NAMES,
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

CHUNK = 8 << 20  # bytes: large enough that the GIL is asked for some 60 times per GB, small enough for a shared cache
MAX_HEADER = 100_000_000  # bytes; readers refuse more


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name, dtype and shape as stored, and where in the whole tensor it begins."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def stored_form(tensor: Tensor) -> Tensor:
    """The tensor as a file holds it: complex numbers as pairs (..., 2), other dtypes not in DTYPE_NAMES as their bits.

    A view: writing into it writes into `tensor`. Not for conjugated views.

    Raises:
        ValueError: a dtype or layout that has no such form.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ValueError(f"wanted a dense tensor with memory, got {tensor.layout}, {tensor.dtype}, {tensor.device}")
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    if tensor.dtype in DTYPE_NAMES:
        return tensor
    return tensor.view(_BITS[tensor.dtype.itemsize])


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Wide dtypes first, so that without gaps every tensor begins at a multiple of its element's size."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None, sharded: bool = True) -> bytes:
    """Length and header of a file that holds `entries` in this order; `sharded` adds where their boxes begin.

    Raises:
        ValueError: a reserved name, or more tensors than a header has room for.
    """
    about = {"format": "pt", **(metadata or {})}
    if sharded:
        boxes = {entry.name: {"saved_offsets": list(entry.offsets)} for entry in entries}
        about["DCP_SHARDING_INFO"] = json.dumps(boxes)
    fields: dict[str, Any] = {"__metadata__": about}
    end = 0
    for entry in entries:
        if entry.name in fields:
            raise ValueError(f"[safetensors] tensor names must be unique and not '__metadata__', got {entry.name!r}")
        start, end = end, end + entry.nbytes
        fields[entry.name] = {
            "dtype": EXPORT_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors begin at a multiple of 8
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"[safetensors] a header has room for {MAX_HEADER} bytes, got {len(text)} for {len(entries)} tensors; "
            "shard the state over more processes"
        )
    return struct.pack("<Q", len(text)) + text


class Pace:
    """How much of a thread's time a write may take beside a training; all of it once somebody waits for the write.

    A writer at full speed takes memory bandwidth and cache from the training on other cores. At a share s of the time
    it takes a part s of that, 1/s times as long.

    Args:
        share: of the time, in (0, 1].
    """

    def __init__(self, share: float) -> None:
        self._rest = 1.0 / share - 1.0
        self._hurry = threading.Event()

    def hurry(self) -> None:
        """No more pauses."""
        self._hurry.set()

    def pause(self, worked: float) -> None:
        """After so many seconds of work."""
        if self._rest > 0 and threading.main_thread().is_alive():
            self._hurry.wait(worked * self._rest)


def write_file(path: Path, buffers: Iterable[bytes | memoryview], pace: Pace | None = None) -> dict[str, Any]:
    """Write a new file, sync it, and return its {"size", "sha256"}; with pauses if there is a `pace`.

    Raises:
        OSError: no room, or the file is there already.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                began = time.perf_counter()
                digest.update(chunk)  # both release the GIL
                _write_all(file, chunk)
                size += len(chunk)
                if pace is not None:
                    pace.pause(time.perf_counter() - began)
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _write_all(file: io.FileIO, chunk: memoryview) -> None:
    """A full disk takes a part of the bytes first and raises at the next call."""
    while len(chunk):
        chunk = chunk[file.write(chunk) :]


def sync_folder(path: Path) -> None:
    """What was created, renamed and deleted in this folder survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
