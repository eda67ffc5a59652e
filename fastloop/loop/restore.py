# SPDX-License-Identifier: Apache-2.0
"""Train for a while and leave no trace: model, optimizer and random states come back bit for bit.

What can be changed is found and not listed: every tensor, and every dict, list and set, that a module or the optimizer
holds. So hooks, modes, buffers that are not in the state_dict and an optimizer's own counts come back too. Bytes are
kept in host memory, once for each storage.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastloop.loop import random_state
from fastloop.loop.precision import set_process
from fastloop.optim.base import FusedOptimizer


@contextmanager
def restored(
    modules: Iterable[nn.Module],
    optimizer: Optimizer | None = None,
    generators: Sequence[torch.Generator] = (),
    others: Sequence[Optimizer | Tensor] = (),
) -> Iterator[None]:
    """What is trained inside is as before afterwards, also after an error or Ctrl-C; gradients are None meanwhile.

    Args:
        modules: with all that is in them.
        optimizer: of its parameters, also those of no module; None where nothing is stepped.
        generators: put back beside Python's, NumPy's and torch's own.
        others: optimizers and tensors beside these.

    Raises:
        ValueError: parameters that have no values yet.
    """
    interrupts = _Interrupts()
    optimizers = [each for each in (optimizer, *others) if isinstance(each, Optimizer)]
    _forget_addresses(optimizers)
    random_states = random_state.capture(generators)
    snapshot = _Snapshot([each for module in modules for each in module.modules()], [*optimizers, *others])
    with interrupts:
        try:
            snapshot.clear_gradients()
            yield
        finally:
            try:
                interrupts.hold()
            finally:
                _forget_addresses(optimizers)
                snapshot.restore()
                random_state.restore(random_states, generators)


def _forget_addresses(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        if isinstance(optimizer, FusedOptimizer):
            optimizer._forget_plan()


class _Interrupts:
    """Ctrl-C raises as ever until `hold`, or until it has raised once; what comes later waits for the end."""

    def __init__(self) -> None:
        self._held = self._pending = False
        self._earlier: Any = None
        self._installed = False

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._earlier, self._installed = signal.signal(signal.SIGINT, self._received), True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._earlier)
        if self._pending:
            signal.raise_signal(signal.SIGINT)

    def hold(self) -> None:
        self._held = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = True
        else:
            self._held = True
            self._earlier(number, frame)
            self._held = False  # a handler that does not raise


@dataclass
class _Kept:
    """A tensor, and what it refers to: `to()` and a change of layout make it refer to other memory."""

    tensor: Tensor
    data: Tensor
    requires_grad: bool
    grad: Tensor | None


class _Snapshot:
    def __init__(self, modules: Iterable[nn.Module], others: Iterable[Optimizer | Tensor]) -> None:
        self._containers: list[tuple[Any, Any]] = []  # and a copy of what they hold
        self._tensors: dict[int, _Kept] = {}
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._sparse: list[tuple[Tensor, Tensor]] = []
        waiting: list[Any] = [module.__dict__ for module in modules]
        waiting += [each.__dict__ if isinstance(each, Optimizer) else each for each in others]
        seen: set[int] = set()
        while waiting:
            each = waiting.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if isinstance(each, Tensor):
                self._keep(each)
            elif isinstance(each, dict):
                self._containers.append((each, dict(each)))
                waiting += [*each.keys(), *each.values()]
            elif isinstance(each, (list, set, deque)):
                self._containers.append((each, list(each)))
                waiting += each
            elif isinstance(each, tuple):
                waiting += each

    def _keep(self, tensor: Tensor) -> None:
        if is_lazy(tensor):
            raise ValueError("[Loop] the model has parameters without values; call it once with a batch first")
        if not tensor.is_leaf:  # computed from others; the reference to it comes back
            return
        data = tensor.detach()
        self._tensors[id(tensor)] = _Kept(tensor, data, tensor.requires_grad, tensor.grad)
        if data.layout != torch.strided:
            self._sparse.append((data, data.clone()))
        elif not data.is_meta:
            storage = data.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = (
                    storage,
                    storage.clone() if storage.device.type == "cpu" else storage.cpu(),
                )

    def clear_gradients(self) -> None:
        """So that nothing is added to those that were there: they are put back as they are."""
        for kept in self._tensors.values():
            if kept.grad is not None:
                kept.tensor.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        for container, copy in self._containers:
            if isinstance(container, dict):
                _refill(container, copy)
            else:
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(copy)
        for kept in self._tensors.values():
            tensor = kept.tensor
            if tensor.requires_grad or tensor.grad is not None:
                tensor.grad = None  # of another dtype or place, it may be
            if not _same_memory(tensor, kept.data):
                tensor.data = kept.data
            tensor.requires_grad_(kept.requires_grad)
            tensor.grad = kept.grad
        for storage, copy in self._storages.values():
            storage.copy_(copy)
        for values, copy in self._sparse:
            values.copy_(copy)


def _refill(container: dict[Any, Any], copy: dict[Any, Any]) -> None:
    """In place, and only if something changed: a module's `__dict__` is not left empty for another thread to see."""
    if list(container) == list(copy) and all(container[key] is copy[key] for key in copy):
        return
    container.clear()
    container.update(copy)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.device != b.device or a.layout != b.layout or a.layout != torch.strided:
        return a.layout == b.layout != torch.strided
    same_view = a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    return same_view and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def process_settings() -> tuple[bool, str, int]:
    """What `fastloop.loop.precision.set_process` sets, as it is now."""
    return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.get_num_threads()


@contextmanager
def process_kept() -> Iterator[None]:
    """torch's settings for the whole process, as options of Loop change them, are afterwards what they were."""
    process = process_settings()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        if process_settings() != process:
            set_process(*process)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


__all__ = ["process_kept", "process_settings", "restored"]
