# SPDX-License-Identifier: Apache-2.0
"""State of objects that are the user's: callbacks, and what the training loader takes its samples from.

Whatever has `state_dict()` and `load_state_dict()` is saved with each checkpoint and given its state back. A state is
made of numbers, strings, None, tensors, arrays, dicts, lists and tuples: what `documents` can store. Loading what
`state_dict` has returned must leave an object as it was. An object may have the two methods for purposes of its own:
one whose state cannot be stored is warned about and left out, and trains as ever.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastloop.loop import documents
from fastloop.loop.seeded import SeededDataset

Objects = dict[str, Any]  # by a name that a resumed run finds again
States = dict[str, dict[str, Any]]  # by the same: "class", "state"


def has_state(given: Any) -> bool:
    """Whether `given` can be asked for its state, and be given it back.

    Not iterable data sets and torchdata's samplers: their state is their place in the epoch, which the loop keeps
    itself, and to load it makes their next epoch begin there.
    """
    ours = not any(cls.__module__.partition(".")[0] == "torchdata" for cls in type(given).__mro__)
    if not ours or isinstance(given, (IterableDataset, type)):
        return False
    return all(callable(getattr(given, name, None)) for name in ("state_dict", "load_state_dict"))


def of_callbacks(callbacks: Iterable[Any]) -> Objects:
    """Callbacks with a state, by class name; the second of a class is "Name-2"."""
    found, counts = {}, Counter[str]()
    for callback in callbacks:
        name = type(callback).__qualname__
        counts[name] += 1
        if has_state(callback):
            found[name if counts[name] == 1 else f"{name}-{counts[name]}"] = callback
    return found


def of_loader(loader: Any) -> Objects:
    """The loader's sampler, batch sampler, its sampler, and data set, where these have a state; each once."""
    batch_sampler, dataset = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
    if isinstance(dataset, SeededDataset) and not has_state(dataset):
        dataset = dataset.dataset
    holders = {
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batch_sampler,
        "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
        "dataset": dataset,
    }
    found: Objects = {}
    for name, holder in holders.items():
        if has_state(holder) and not any(holder is known for known in found.values()):
            found[name] = holder
    return found


def capture(objects: Objects) -> States:
    """A copy of each one's state. One whose state cannot be stored is taken out of `objects`, with a warning."""
    states: States = {}
    for name, each in list(objects.items()):
        try:
            state = _copied(each.state_dict())
            documents.pack(state, "state", {})
        except Exception as error:
            del objects[name]
            warnings.warn(
                f"[Loop] checkpoints leave out the state of {type(each).__qualname__}, and a resumed run begins with a "
                f"new one, since state_dict() gives what they cannot hold: {type(error).__name__}: {error}",
                stacklevel=3,
            )
        else:
            states[name] = {"class": type(each).__qualname__, "state": state}
    return states


def give(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Each object its state, a copy of it; one that has that state already is left alone."""
    for name, each in objects.items():
        kept = states.get(name)
        if kept is None or kept["class"] != type(each).__qualname__:
            continue
        present = each.state_dict()
        if not same(present, kept["state"]):
            each.load_state_dict(_copied(kept["state"], present))


def warn_of_missing(objects: Mapping[str, Any], states: Mapping[str, Any], what: str) -> None:
    """Warn of each state that has nobody to be given to; `what` says of what it is."""
    for name in missing(objects, states):
        cls = states[name]["class"]
        of = cls if name.startswith(cls) else f"{name} ({cls})"
        warnings.warn(
            f"[Loop] the checkpoint has a state of the {what} {of}, which the run does not have any more: it is left "
            "out; give the run the same one, or ignore this if it is not needed",
            stacklevel=3,
        )


def missing(objects: Mapping[str, Any], states: Mapping[str, Any]) -> list[str]:
    """Names of the states that have nobody to be given to."""
    return [
        name
        for name, kept in states.items()
        if name not in objects or type(objects[name]).__qualname__ != kept["class"]
    ]


def _copied(state: Any, like: Any = None) -> Any:
    """`state` with tensors and containers of its own; tensors on the devices of those in `like`, where it has them."""
    if isinstance(state, Tensor):
        device = like.device if isinstance(like, Tensor) else state.device
        return state.detach().to(device, copy=True)
    if isinstance(state, numpy.ndarray):
        return state.copy()
    if isinstance(state, Mapping):
        known = like if isinstance(like, Mapping) else {}
        return {key: _copied(value, known.get(key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        alike = isinstance(like, (list, tuple)) and len(like) == len(state)
        items = [_copied(value, like[i] if alike else None) for i, value in enumerate(state)]
        return tuple(items) if isinstance(state, tuple) else items
    return state


def same(a: Any, b: Any) -> bool:
    """Whether two states are the same, tensors and arrays by their values."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.cpu(), b.cpu()))
    if isinstance(a, numpy.ndarray) or isinstance(b, numpy.ndarray):
        both = isinstance(a, numpy.ndarray) and isinstance(b, numpy.ndarray)
        return both and a.dtype == b.dtype and numpy.array_equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return (
            isinstance(a, tuple) == isinstance(b, tuple)
            and len(a) == len(b)
            and all(same(x, y) for x, y in zip(a, b, strict=True))
        )
    return bool(a == b)
