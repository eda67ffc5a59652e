# SPDX-License-Identifier: Apache-2.0
"""Loop's arguments, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

NONFINITE = ("skip", "stop", "raise")
MATMUL_PRECISIONS = (None, "highest", "high", "medium")
EVENTS = ("on_fit_start", "on_window", "on_log", "on_evaluate", "on_epoch_end", "on_save", "on_fit_end")


def positive(name: str, value: Any, whole: bool = True) -> None:
    """Raise unless `value` is None or a number above 0 (an integer if `whole`)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
        kind = "an integer" if whole else "a number"
        raise ValueError(f"[Loop] {name} must be {kind} above 0, or None, got {value!r}")


def objects(model: Any, optimizer: Any, loss_fn: Any) -> None:
    """Raise unless they are what they are called."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"[Loop] model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"[Loop] optimizer must be one torch.optim.Optimizer, got {type(optimizer).__name__}; several train in one "
            "loop each"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"[Loop] loss_fn must be a function of (model, batch) or a criterion, got {loss_fn!r}")


def flag(name: str, value: Any, none: bool = False) -> None:
    """Raise unless `value` is True or False (or None where that is allowed)."""
    if not isinstance(value, bool) and not (none and value is None):
        raise TypeError(f"[Loop] {name} must be True{', False or None' if none else ' or False'}, got {value!r}")


def count(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"[Loop] {name} must be an integer of at least {least}, got {value!r}")


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"[Loop] {name} must be one of {tuple(allowed)}, got {value!r}")


def monitors(monitor: str | Sequence[str], mode: str | Sequence[str]) -> dict[str, str]:
    """Mode of each monitored metric.

    Raises:
        ValueError: a mode that is none, or another number of modes than of metrics.
    """
    if not monitor:
        raise ValueError(f"[Loop] monitor must name a metric, got {monitor!r}; pass e.g. 'val/loss'")
    names = [monitor] if isinstance(monitor, str) else list(monitor)
    modes = [mode] * len(names) if isinstance(mode, str) else list(mode)
    if len(modes) != len(names) or any(m not in ("min", "max") for m in modes):
        raise ValueError(f'[Loop] mode must be "min" or "max", for each of {names} or for all, got {mode!r}')
    return dict(zip(names, modes, strict=True))


def events(callbacks: Iterable[Any]) -> dict[str, list[Any]]:
    """The callbacks' methods by event; an event that nobody listens to costs nothing.

    Raises:
        TypeError: a callback without any event's method, or with a method that looks like one and is none.
    """
    found: dict[str, list[Any]] = {event: [] for event in EVENTS}
    for callback in callbacks:
        methods = [name for name in dir(callback) if name.startswith("on_")]
        unknown = [name for name in methods if name not in EVENTS]
        if unknown or not methods:
            raise TypeError(
                f"[Loop] callback {type(callback).__name__} must have methods among {', '.join(EVENTS)}, "
                f"got {', '.join(unknown) or 'none'}"
            )
        for name in methods:
            found[name].append(getattr(callback, name))
    return found


def run_length(epochs: int | None, max_steps: int | None) -> None:
    """Raise unless the training has an end."""
    if epochs is None and max_steps is None:
        raise ValueError("[Loop] how long? pass epochs= or max_steps=, or both")
    for name, value in (("epochs", epochs), ("max_steps", max_steps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"[Loop] {name} must be an integer of at least 0, got {value!r}")
