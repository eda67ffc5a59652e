# SPDX-License-Identifier: Apache-2.0
"""A copy of a state in host memory, made in one go and kept for the next one; and which part of a DTensor is ours."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastloop.loop.safetensors_writer import Entry, header, in_file_order, stored_form
from fastloop.ops.plan import local_shard

# One allocation each. Pinned ones are rounded up to a power of two, which for one of 9 GB would waste 7.
BLOCK = 256 << 20


@dataclass(frozen=True)
class Part:
    """What this process writes of one tensor: an array in stored form and where in the whole tensor it begins."""

    name: str
    array: Tensor
    offsets: tuple[int, ...]


def parts_of(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> tuple[list[Part], dict[str, str]]:
    """What process `rank` writes, and the dtype of every tensor that is stored in another form.

    Plain tensors are rank 0's. Of a DTensor each process has its shard; of copies of one shard the first is written.

    Raises:
        ValueError: a tensor that cannot be written: no memory of its own, quantized, a sum yet to be made, or
            a shard that is not one box of the whole.
    """
    parts, forms = [], {}
    for name, tensor in tensors.items():
        try:
            if tensor.is_complex() or stored_form(local_shard(tensor)).dtype != tensor.dtype:
                forms[name] = str(tensor.dtype).removeprefix("torch.")
            offsets = box_offsets(tensor) if hasattr(tensor, "_local_tensor") else _whole(tensor, rank)
            if offsets is not None:
                array = stored_form(_local(tensor).resolve_conj().resolve_neg())
                parts.append(Part(name, array, offsets + (0,) * (array.dim() - len(offsets))))
        except ValueError as error:
            raise ValueError(f"[Store] cannot save {name!r}: {error}") from None
    return parts, forms


def _whole(tensor: Tensor, rank: int) -> tuple[int, ...] | None:
    return (0,) * tensor.dim() if rank == 0 else None


def _local(tensor: Tensor) -> Tensor:
    local = local_shard(tensor.detach())
    return local.wait() if hasattr(local, "wait") else local  # a collective may still be under way


def box_offsets(tensor: Tensor) -> tuple[int, ...] | None:
    """Where this process's shard of a DTensor begins in the whole, None if another process writes it or it is empty.

    Raises:
        ValueError: the elements are yet to be summed over processes, or the shard is not one box.
    """
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"its elements are yet to be summed ({placements}); redistribute it first")
    if any(c and placement.is_replicate() for c, placement in zip(coordinate, placements, strict=True)):
        return None
    if tensor.numel() == 0:
        return None if any(coordinate) else (0,) * tensor.dim()
    if local_shard(tensor).numel() == 0:
        return None
    return _offsets(tuple(tensor.shape), tuple(mesh.shape), tuple(coordinate), placements)


@functools.lru_cache(maxsize=65536)  # torch makes a list of all rows for it, at every save the same
def _offsets(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[int, ...]:
    begin = []
    for dim, size in enumerate(shape):
        if all(getattr(placement, "dim", None) != dim for placement in placements):
            begin.append(0)
            continue
        rows = torch.arange(size).view((1,) * dim + (size,))
        for ways, place, placement in zip(mesh_shape, coordinate, placements, strict=True):
            if getattr(placement, "dim", None) == dim:
                rows = placement._split_tensor(rows, ways, with_padding=False, contiguous=False)[0][place]
        rows = rows.flatten()
        if int(rows[-1]) - int(rows[0]) + 1 != len(rows):
            raise ValueError(
                f"its shard under {placements} is no box: dimension {dim} has gaps; redistribute it to Shard first"
            )
        begin.append(int(rows[0]))
    return tuple(begin)


@dataclass(frozen=True)
class Staged:
    """Bytes of a safetensors file, whole once `ready` returns and until the next copy."""

    head: bytes
    blocks: list[memoryview]
    events: list[Any]

    def ready(self) -> None:
        """Wait for copies from devices."""
        for device, event in self.events:
            with torch.cuda.device(device):  # this thread's own would be the first one, and get a context
                event.synchronize()

    def buffers(self) -> Iterator[bytes | memoryview]:
        """The file's bytes in order."""
        yield self.head
        yield from self.blocks


class Staging:
    """Memory for the copy of one file's tensors, taken at the first copy (or by `prepare`) and used again after it.

    Not thread-safe: a copy is used up before the next one is made.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._pinned = False
        self._entries: list[Entry] = []
        self._slots: list[Tensor] = []
        self._head = b""
        self._views: list[memoryview] = []

    @property
    def nbytes(self) -> int:
        """Memory held, bytes."""
        return sum(block.numel() for block in self._blocks)

    def prepare(self, parts: Sequence[Part]) -> list[Part]:
        """Lay the parts out in file order; nothing is done if the last layout is the same. Returns them in order."""
        by_name = {part.name: part for part in parts}
        entries = in_file_order(Entry(p.name, p.array.dtype, tuple(p.array.shape), p.offsets) for p in parts)
        pinned = any(part.array.device.type == "cuda" for part in parts)
        if entries != self._entries or pinned != self._pinned or not self._head:
            self._lay_out(entries, pinned)
        return [by_name[entry.name] for entry in entries]

    def _lay_out(self, entries: list[Entry], pinned: bool) -> None:
        self._head = b""
        head = header(entries)
        fills: list[int] = []  # bytes used of each block
        places = []
        for entry in entries:
            if not fills or (fills[-1] and fills[-1] + entry.nbytes > BLOCK):
                fills.append(0)
            places.append((len(fills) - 1, fills[-1]))
            fills[-1] += entry.nbytes
        if pinned != self._pinned:
            self._blocks = []
        self._slots, self._views, self._pinned = [], [], pinned
        del self._blocks[len(fills) :]
        for number, used in enumerate(fills):
            if number == len(self._blocks):
                self._blocks.append(torch.empty(0, dtype=torch.uint8))
            if self._blocks[number].numel() < used:
                self._blocks[number] = torch.empty(0, dtype=torch.uint8)  # freed before its successor is taken
                self._blocks[number] = torch.empty(used, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._views.append(memoryview(self._blocks[number][:used].numpy()))  # type: ignore[arg-type]
        for entry, (number, start) in zip(entries, places, strict=True):
            flat = self._blocks[number][start : start + entry.nbytes]
            self._slots.append(flat.view(entry.dtype).view(entry.shape))
        self._entries, self._head = entries, head

    @torch.no_grad()
    def copy(self, parts: Sequence[Part]) -> Staged:
        """Copy all parts. On CUDA by a side stream, for which the current one waits; the host does not."""
        parts = self.prepare(parts)
        devices: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for slot, part in zip(self._slots, parts, strict=True):
            slots, arrays = devices.setdefault(part.array.device, ([], []))
            slots.append(slot)
            arrays.append(part.array)
        events = []
        for device, (slots, arrays) in devices.items():
            if device.type == "cuda":
                events.append((device, _copy_from_cuda(slots, arrays, device)))
            else:
                torch._foreach_copy_(slots, arrays)
        return Staged(self._head, self._views, events)


def _copy_from_cuda(slots: list[Tensor], arrays: list[Tensor], device: torch.device) -> Any:
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        torch._foreach_copy_(slots, arrays, non_blocking=True)
        event = side.record_event()
    current.wait_stream(side)  # the next step may change the tensors only when they are copied
    return event


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
