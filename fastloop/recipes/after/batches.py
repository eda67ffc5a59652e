# SPDX-License-Identifier: Apache-2.0
"""A trained model over a whole data set: in eval mode, batch by batch, each sample once and in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from fastloop.loop import random_state
from fastloop.loop.data import samples_in
from fastloop.loop.loader import generators_of
from fastloop.loop.precision import autocast, resolve
from fastloop.loop.probe import device_of, eval_mode, moved

TARGETS = ("labels", "label", "targets", "target")  # names of the target in a batch that is a dict


def visit(
    models: Sequence[nn.Module],
    data: Any,
    look: Callable[[list[Any], Any, int], None],
    *,
    batch_size: int,
    precision: str | None = None,
    where: str,
) -> None:
    """Call `look(outputs, target, samples)` for each batch, with one output for each model.

    Args:
        models: each stays on its device; modes and random states are put back.
        data: a Dataset, a tensor, a pair of tensors (input, target), or a loader that keeps the order. Batches are
            (input, target) for model(input), a tensor for model(tensor), or a dict for model(**dict), of which
            "labels" or "target" is the target.
        look: outputs are on the models' devices.
        precision: of autocast: None or "fp32" for none, "bf16", "fp16", "auto".
        where: the caller's name, for errors.

    Raises:
        ValueError: no samples, or a loader that shuffles or drops some.
        TypeError: data or batches of another kind.
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"[{where}] model must be an nn.Module, got {type(model).__name__}")
    loader = _loader(data, batch_size, where)
    contexts = [_autocast(model, precision, where) for model in models]
    empty = True
    with ExitStack() as stack:
        stack.enter_context(_unmoved(loader))
        for model in models:
            stack.enter_context(eval_mode(model))
        for batch in loader:
            args, kwargs, target = _parts(batch, where)
            outputs = []
            for model, context in zip(models, contexts, strict=True):
                here, named = moved((args, kwargs), device_of(model))
                with context():
                    outputs.append(model(*here, **named))
            empty = False
            look(outputs, target, samples_in(args or kwargs))
    if empty:
        raise ValueError(f"[{where}] data must hold at least one sample, got none; look at how it was made or split")


def dataset_of(data: Any) -> Any:
    """What can be indexed by sample: a loader's dataset, the data itself; None where there is nothing of the kind."""
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, (IterableDataset, list)):
        return None
    if isinstance(data, tuple):
        return list(zip(*data, strict=True))
    return data if hasattr(data, "__getitem__") and hasattr(data, "__len__") else None


def _loader(data: Any, batch_size: int, where: str) -> Iterable[Any]:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"[{where}] batch_size must be an integer of at least 1, got {batch_size!r}")
    if isinstance(data, Tensor):
        return _slices(data, batch_size, where)
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(each, Tensor) for each in data):
            raise TypeError(f"[{where}] a tuple as data must be two tensors, (input, target); pass a Dataset else")
        if len({each.shape[:1] for each in data}) != 1:
            lengths = " and ".join(str(len(each)) if each.dim() else "no dimension" for each in data)
            raise ValueError(f"[{where}] input and target must have as many samples, got {lengths}")
        inputs, targets = (_slices(each, batch_size, where) for each in data)
        return list(zip(inputs, targets, strict=True))
    if isinstance(data, DataLoader):
        _check_order(data, where)
        return data
    if isinstance(data, IterableDataset) or (
        hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (list, Mapping, str))
    ):
        if not isinstance(data, IterableDataset) and len(data) == 0:
            return []
        return DataLoader(data, batch_size=batch_size, generator=torch.Generator())
    if isinstance(data, Iterable) and not isinstance(data, (Mapping, str)):
        return data
    raise TypeError(
        f"[{where}] data must be a Dataset, a loader, a tensor or a pair of tensors, got {type(data).__name__}"
    )


def _slices(tensor: Tensor, batch_size: int, where: str) -> list[Tensor]:
    if tensor.dim() == 0:
        raise ValueError(f"[{where}] a tensor as data must have the samples in its first dimension, got a scalar")
    return list(tensor.split(batch_size)) if len(tensor) else []


def _check_order(loader: DataLoader[Any], where: str) -> None:
    """The n-th output must be that of the n-th sample, and none may be missing."""
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last:
            raise ValueError(f"[{where}] the loader may drop its last samples; pass drop_last=False")
        return
    sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    if not isinstance(sampler, SequentialSampler):
        kind = type(sampler or loader.batch_sampler).__name__
        raise ValueError(
            f"[{where}] the loader must go through its samples in order, this one's sampler is a {kind}, and outputs "
            "could not be told apart; pass loader.dataset, or a DataLoader with shuffle=False"
        )
    batches: Any = loader.batch_sampler  # one of the caller's own is not in loader.drop_last
    if getattr(batches, "drop_last", False) and len(sampler) % batches.batch_size:
        raise ValueError(f"[{where}] the loader drops its last samples; pass drop_last=False, or loader.dataset")


def _parts(batch: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(args, kwargs, target) of a batch."""
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, Mapping):
        target = next((batch[name] for name in TARGETS if name in batch), None)
        return (), {name: value for name, value in batch.items() if name not in TARGETS}, target
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        return (batch[0],), {}, batch[1] if len(batch) == 2 else None
    size = f" of {len(batch)} parts" if isinstance(batch, (tuple, list)) else ""
    raise TypeError(
        f"[{where}] batches must be (input, target), a tensor or a dict, got a {type(batch).__name__}{size}; let the "
        "dataset give ((several, inputs), target) or a dict of the model's arguments"
    )


def _autocast(model: nn.Module, precision: str | None, where: str) -> Callable[[], Any]:
    if precision == "bf16-pure":
        raise ValueError(f'[{where}] precision="bf16-pure" is for training; pass "bf16", or half_precision(model)')
    device = device_of(model)
    return autocast(resolve(precision or "fp32", device), device)


@contextmanager
def _unmoved(loader: Any) -> Iterator[None]:
    """Random states as before: making a DataLoader's iterator draws from them, and so may the dataset."""
    generators = generators_of(loader)
    before = random_state.capture(generators)
    try:
        yield
    finally:
        random_state.restore(before, generators)
