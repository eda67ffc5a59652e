# SPDX-License-Identifier: Apache-2.0
"""The part of a step that runs on one device in two launches for each combination of dtypes, without waiting for it.

The native plan checks groups, states and addresses on the host and writes what changed to the front of a table
(csrc/core/device_table.h). Norm launches deliver it, or one copy does; update launches read the table. The host learns
nothing of the outcome: norm, skipped steps and counts of steps stay on the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloop.ops.cuda import DTYPES
from fastloop.ops.launches import BucketLaunches, BucketSpec, DeviceBackend, count_copy
from fastloop.ops.native import native


class DevicePart:
    """Parameters of one device. `add` them, `finish`, and then for each step `refresh`, `norm`, `update`, `close`.

    Args:
        kernels: the backend that launches.
        device: where all parameters, gradients and states are.
        hyper, structure: as for StepPlan.
    """

    def __init__(
        self, kernels: DeviceBackend, device: torch.device, hyper: Sequence[tuple[str, int]], structure: Sequence[str]
    ) -> None:
        module = native()
        assert module is not None
        self.device = device
        self.params: list[Tensor] = []
        self.reads_grads = True  # .grad as it is; else copies in the parameters' layout are handed in
        self.plan = module.Plan(list(hyper), list(structure), dlpack_device(device))
        self._kernels = kernels
        self._launches: list[BucketLaunches] = []
        self._changed = False
        self._held: tuple[Any, ...] = ()  # what the launches of this step read beside the table
        # A captured step writes the table when its graph is replayed: the host then no longer knows what it holds.
        self.in_graph = False

    def finish(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], elsewhere: list[Tensor], kinds: list[int],
        skipped: Tensor | None,
    ) -> None:  # fmt: skip
        """Build the table. `kinds` numbers, for each parameter, the sums that its norm belongs to."""
        self.plan.finish(groups, state, elsewhere)
        table = self.plan.make_table(kinds)
        self._address: int = table.address
        self._front: int = table.front_words
        self._words = _host_words(table.address, table.words)
        self.table = on_device(self._words.clone(), self.device)
        self._number_address: int = self.table.data_ptr() + 8 * table.scale_word | 1  # the low bit: float64
        self._spare = self._staging()  # for a step that is captured in a graph: pinned memory cannot be made there
        self._captured: list[Tensor] = []
        most = self._kernels.blocks(self.device)
        buckets = table.buckets
        programs = [max(1, min(bucket["chunks"], most)) for bucket in buckets]
        self.sums = torch.zeros((sum(programs), 2), dtype=torch.float64, device=self.device)
        self.result = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._tickets = tickets = torch.zeros(len(buckets), dtype=torch.int32, device=self.device)
        rows, tensors, chunks = table.layout
        self._rows_of_kind: dict[int, slice] = {}
        start = 0
        for i, (bucket, count) in enumerate(zip(buckets, programs, strict=True)):
            spec = BucketSpec(
                device=self.device,
                rule=bucket["rule"],
                param=DTYPES[bucket["param"]],
                grad=DTYPES[bucket["grad"]],
                state=DTYPES[bucket["state"]],
                master=bucket["master"],
                ema=bucket["ema"],
                rows=rows,
                tensors=tensors,
                chunks=chunks,
                first_tensor=bucket["first_tensor"],
                bucket_tensors=bucket["tensors"],
                first_chunk=bucket["first_chunk"],
                bucket_chunks=bucket["chunks"],
                table=self.table,
                sums=self.sums[start : start + count],
                ticket=tickets[i : i + 1],
                result=self.result,
                skipped=skipped if i == 0 else None,
            )
            self._launches.append(self._kernels.bucket(spec))
            known = self._rows_of_kind.get(bucket["kind"])
            self._rows_of_kind[bucket["kind"]] = slice(start if known is None else known.start, start + count)
            start += count

    def refresh(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        grads: list[Tensor | None] | None,
        scale: float | Tensor | None,
        found_inf: float | Tensor | None,
        check_finite: bool,
        zero_grads: bool,
    ) -> bool:
        """Check that the plan still holds and note what this step says. False: stale, nothing was touched.

        Args:
            grads: gradients to use, None to read each parameter's `.grad`.
            scale, found_inf: as for StepPlan.step. A number of a scale travels in the table.
        """
        number, scale_address, found_address = 1.0, 0, 0
        if isinstance(scale, Tensor):
            scale, scale_address = self._scalar(scale)
        elif scale is not None and scale != 1:
            number, scale_address = float(scale), self._number_address
        if found_inf is not None and found_inf is not False:
            if not isinstance(found_inf, Tensor):
                found_inf = torch.full((), float(found_inf), dtype=torch.float64, device=self.device)
            found_inf, found_address = self._scalar(found_inf)
        self.in_graph = self.in_graph or self._capturing()
        changed = self.plan.refresh(
            groups, state, grads, number, scale_address, found_address, check_finite, zero_grads
        )
        if changed is None:
            return False
        self._changed = self._changed or changed or self.in_graph
        self._held = (scale, found_inf, grads)
        return True

    def _scalar(self, value: Tensor) -> tuple[Tensor, int]:
        """A scalar on the device as float32 or float64, without waiting for it, and its address."""
        address: int = self.plan.scalar_address(value)
        if address != 0:
            return value, address
        if value.numel() != 1:
            raise ValueError(
                f"[fastloop] grad_scale and found_inf must be numbers or tensors of one element, got one of shape "
                f"{tuple(value.shape)}"
            )
        if value.device.type == "cpu" and self._capturing():
            raise RuntimeError(
                "[fastloop] grad_scale and found_inf must be on the parameters' device in a step that is captured, "
                "got a tensor on the CPU: a replay would read its memory later"
            )
        value = value.detach().to(device=self.device, dtype=torch.float32, non_blocking=True)
        return value, value.data_ptr()

    def norm(self, measure: bool) -> None:
        """Launch 1: deliver what changed and, with `measure`, write the partial sums to `sums`."""
        words = 0
        if self._changed:
            if self._front <= self._kernels.INLINE_WORDS:
                words = self._front
            else:
                self._copy_front()
        if measure:
            for launches in self._launches:
                launches.norm(self._address, words)
                words = 0
        elif words:
            self._launches[0].norm(self._address, words)
        self._changed = False  # now that it has been delivered

    def update(self, sums: Tensor) -> None:
        """Launch 2, with the norm that the rows of `sums` (float64 [n, 2], on this device) add up to."""
        for launches in self._launches:
            launches.update(sums)
        self.plan.count_versions()
        self._held = ()  # memory that is freed is reused in the order of the stream

    def zero_grads(self) -> None:
        """What the kernels could not zero: gradients that they read as copies, or that two parameters share."""
        if self.reads_grads and not self.plan.zeroes_afterwards:
            return
        with torch.no_grad():
            for p in self.params:
                if p.grad is not None:
                    p.grad.zero_()

    def release(self) -> None:
        """Before the plan is dropped: launches on the current stream may still read its memory."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for tensor in (self.table, self.sums, self.result, self._tickets):
                tensor.record_stream(stream)

    def sums_of_kind(self, kind: int) -> Tensor:
        """Sums of squares of one kind: float64 [2], on the device."""
        rows = self._rows_of_kind.get(kind)
        if rows is None:
            return torch.zeros(2, dtype=torch.float64, device=self.device)
        return self.sums[rows].sum(dim=0)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _staging(self) -> Tensor | None:
        if self.device.type != "cuda" or self._front <= self._kernels.INLINE_WORDS:
            return None
        return torch.empty(self._front, dtype=torch.int64, pin_memory=True)

    def _copy_front(self) -> None:
        """One asynchronous copy from memory that nobody writes again before the copy has been made."""
        count_copy()
        front = self._words[: self._front]
        if self.device.type != "cuda":
            self.table[: self._front].copy_(front)
            return
        if self._capturing():
            if self._captured and torch.equal(self._captured[-1], front):
                staging = self._captured[-1]
            elif self._spare is None:
                raise RuntimeError(
                    "[fastloop] a second graph captures a step of this optimizer before a step was made outside of "
                    "a capture; make one in between"
                )
            else:
                staging, self._spare = self._spare, None
                staging.copy_(front)
                self._captured.append(staging)  # a replay reads it again
        else:
            if self._spare is None:
                self._spare = self._staging()
            staging = torch.empty(self._front, dtype=torch.int64, pin_memory=True)  # torch reuses it after the copy
            staging.copy_(front)
        self.table[: self._front].copy_(staging, non_blocking=True)


def dlpack_device(device: torch.device) -> tuple[int, int]:
    """DLPack's type and number of a device."""
    kind, index = torch.empty(0, device=device).__dlpack_device__()
    return int(kind), int(index)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, asynchronous for a GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, copy=True)


def _host_words(address: int, count: int) -> Tensor:
    """The table in the native plan's memory, as a tensor."""
    return torch.frombuffer((ctypes.c_int64 * count).from_address(address), dtype=torch.int64)
