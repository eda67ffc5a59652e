# SPDX-License-Identifier: Apache-2.0
"""Looking at a training without changing it: the model and its optimizer, and the data with whatever they draw from."""

from __future__ import annotations

import copy
import io
import random
import sys
from collections import abc, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fastloop.loop import random_state
from fastloop.loop.core import Core
from fastloop.loop.restore import restored
from fastloop.loop.strategy import unwrapped

MOST_OBJECTS = 2000  # of a loader, looked at for what a look into the data could change
MOST_ITEMS = 100_000  # of a container that is copied
PLAIN = (str, bytes, int, float, type, ModuleType, Tensor, numpy.ndarray)
TRAINED = (nn.Module, Optimizer, Tensor)
AT_WORK = (
    "multiprocessing", "threading", "queue", "concurrent", "logging", "asyncio", "socket", "weakref", "wandb", "mlflow",
    "tensorboard", "torch.utils.tensorboard", "tqdm",
)  # fmt: skip


@contextmanager
def model_kept(model: nn.Module, loss_fn: Any = None, optimizer: Optimizer | None = None) -> Iterator[nn.Module]:
    """Gives the user's own module, and puts back bit for bit what a forward, a backward or a step changes.

    Weights, buffers, modes, hooks, gradients, the optimizer's states and all random states; the same of modules,
    optimizers and tensors that the loss function reaches by attributes, its closure or the globals that it names, and
    its own attributes and containers. Gradients are None inside. What torch.compile has compiled runs uncompiled
    inside. Bytes are kept in host memory, once for each storage.

    Raises:
        ValueError: parameters that have no values yet.
    """
    inner = unwrapped(model)
    below = _Kept([loss_fn], of_loss=True)
    others = [each for each in below.found if not isinstance(each, nn.Module) and each is not optimizer]
    modules = [model, *(each for each in below.found if isinstance(each, nn.Module) and each is not model)]
    with ExitStack() as stack:
        stack.callback(below.restore)
        stack.enter_context(restored(modules, optimizer, others=others))
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if isinstance(model, DistributedDataParallel):
            stack.enter_context(_past(model))
        yield inner


def iterators_below(loss_fn: Any) -> list[str]:
    """Kinds of the iterators that a loss function reaches: what they have given cannot be taken back."""
    return [type(each).__name__ for each in _Kept([loss_fn], of_loss=True).iterators]


@contextmanager
def _past(wrapped: DistributedDataParallel) -> Iterator[None]:
    """The inner module may be called: no gradient of it is kept, so the ranks need not share any."""
    before = DistributedDataParallel._active_ddp_module
    DistributedDataParallel._active_ddp_module = wrapped
    try:
        yield
    finally:
        DistributedDataParallel._active_ddp_module = before


@contextmanager
def data_kept(*data: Any) -> Iterator[None]:
    """Samples may be read inside: what reading changes in the data sets and loaders is put back.

    Attributes, containers and generators (of Python, NumPy and torch) that can be reached from them, tensors and arrays
    left out: at most 2000 objects. Global random states too.

    Args:
        data: data sets, or loaders, of which data set, samplers and functions are looked at.
    """
    states = random_state.capture()
    kept = _Kept([part for each in data for part in _parts(each)])
    try:
        yield
    finally:
        kept.restore()
        random_state.restore(states)


def _parts(each: Any) -> list[Any]:
    """Of a loader: not the iterator that it may hold, whose threads are at work."""
    if not isinstance(each, DataLoader):
        return [each]
    return [each.dataset, each.sampler, each.batch_sampler, each.collate_fn, each.generator]


class _Kept:
    """Copies, one level deep each, of the objects below some others.

    Args:
        of_loss: the roots are loss functions. Globals that they name are followed too; modules, optimizers and tensors
            are not, but are in `found`; iterators are in `iterators`.
    """

    def __init__(self, roots: list[Any], of_loss: bool = False) -> None:
        self._of_loss = of_loss
        self.found: list[Any] = []
        self.iterators: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
        self._states: list[tuple[Callable[[Any], Any], Any]] = []
        seen: set[int] = set()
        waiting = deque(roots)
        while waiting and len(seen) < MOST_OBJECTS:
            each = waiting.popleft()
            if id(each) in seen or each is None:
                continue
            seen.add(id(each))
            if of_loss and isinstance(each, TRAINED):
                self.found.append(each)
                continue
            if isinstance(each, PLAIN) or (of_loss and isinstance(each, (Core, DataLoader))):
                continue
            if of_loss and isinstance(each, abc.Iterator) and not isinstance(each, io.IOBase):
                self.iterators.append(each)
                continue
            if not type(each).__module__.startswith(AT_WORK):
                waiting.extend(self._keep(each))

    def _keep(self, each: Any) -> list[Any]:
        """Copies it; returns what it refers to."""
        if isinstance(each, random.Random):
            self._states.append((each.setstate, each.getstate()))
        elif isinstance(each, (torch.Generator, numpy.random.RandomState)):
            self._states.append((each.set_state, each.get_state()))
        elif isinstance(each, numpy.random.Generator):
            put_back = partial(setattr, each.bit_generator, "state")
            self._states.append((put_back, copy.deepcopy(each.bit_generator.state)))
        elif isinstance(each, (dict, list, set, deque)):
            if len(each) <= MOST_ITEMS:
                self._containers.append((each, copy.copy(each)))
                return list(each.values() if isinstance(each, dict) else each)[:MOST_OBJECTS]
        elif isinstance(each, tuple):
            return list(each[:MOST_OBJECTS])
        elif isinstance(each, FunctionType):
            return self._keep_names(each)
        elif isinstance(each, MethodType):
            return [each.__self__, each.__func__]
        elif isinstance(each, partial):
            return [each.func, each.args, each.keywords]
        elif isinstance(getattr(each, "__dict__", None), dict):
            return [each.__dict__, *([vars(type(each)).get("__call__")] if self._of_loss else [])]
        return []

    def _keep_names(self, function: FunctionType) -> list[Any]:
        """What it refers to by its closure, and by the globals that it names; either may be bound anew."""
        held = [cell for cell in function.__closure__ or () if not _is_empty(cell)]
        self._states += [(partial(setattr, cell, "cell_contents"), cell.cell_contents) for cell in held]
        values = [cell.cell_contents for cell in held]
        if self._of_loss and not str(function.__module__).startswith(("torch.", "numpy.")):
            around = function.__globals__
            names = [name for name in function.__code__.co_names if name in around]
            self._states += [(partial(around.__setitem__, name), around[name]) for name in names]
            values += [around[name] for name in names] + list(function.__defaults__ or ())
        return values

    def restore(self) -> None:
        for container, before in self._containers:
            if len(container) == len(before) and all(a is b for a, b in _pairs(container, before)):
                continue
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(before)
        for put_back, state in self._states:
            put_back(state)


def _pairs(container: Any, before: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, dict):
        yield from zip(container, before, strict=False)
        container, before = container.values(), before.values()
    yield from zip(container, before, strict=False)


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
