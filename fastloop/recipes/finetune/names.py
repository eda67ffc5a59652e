# SPDX-License-Identifier: Apache-2.0
"""A model's parameters by name, and the patterns that choose among them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fastloop.loop.strategy import unwrapped

SHOWN = 8  # names that an error lists


def inner(model: nn.Module) -> nn.Module:
    """The user's own module, without DDP's and torch.compile's around it."""
    model = unwrapped(model)
    return getattr(model, "_orig_mod", model)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, under its first name, in the order of registration."""
    return dict(inner(model).named_parameters())


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by id: one that is shared has several."""
    found: dict[int, list[str]] = {}
    for name, parameter in inner(model).named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether the pattern is for the parameter, or for a module that it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def listed(where: str, patterns: str | Iterable[str]) -> list[str]:
    """The patterns as a list; one may be given by itself.

    Raises:
        TypeError: something else than text.
    """
    found: list[Any] = (
        list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    )
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"[{where}] a pattern must be text such as 'layer4' or 'encoder.layer.*', got {pattern!r}")
    return found


def chosen(where: str, model: nn.Module, patterns: str | Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters that a pattern is for, under any of their names; each under its first.

    Raises:
        ValueError: a pattern that is for nothing; names that are close are in the error.
    """
    wanted = listed(where, patterns)
    names = aliases(model)
    found = {
        name: parameter
        for name, parameter in named(model).items()
        if any(matches(each, pattern) for each in names[id(parameter)] for pattern in wanted)
    }
    modules = _modules(inner(model))
    for pattern in wanted:
        if any(matches(name, pattern) for every in names.values() for name in every):
            continue
        if not any(matches(name, pattern) for name in modules):
            raise ValueError(f"[{where}] pattern {pattern!r} matches nothing in the model; {_close(pattern, model)}")
    return found


def first_match(names: Iterable[str], rates: Mapping[str, float]) -> str | None:
    """The first of the patterns that is for one of a parameter's names."""
    every = list(names)
    return next((pattern for pattern in rates if any(matches(name, pattern) for name in every)), None)


def covering(model: nn.Module, wanted: Iterable[str]) -> tuple[str, ...]:
    """The fewest patterns that are for exactly these parameters: names of modules where all of theirs are wanted."""
    within = set(wanted)

    def cover(module: nn.Module, prefix: str) -> list[str]:
        below = [prefix + name for name, _ in module.named_parameters()]
        if below and all(name in within for name in below):
            return [prefix[:-1] or "*"]
        found = [prefix + name for name, _ in module.named_parameters(recurse=False) if prefix + name in within]
        for name, child in module.named_children():
            found += cover(child, f"{prefix}{name}.")
        return found

    return tuple(cover(inner(model), ""))


def _modules(model: nn.Module) -> list[str]:
    """Names of those that hold something: parameters, or statistics."""
    return [name for name, module in model.named_modules() if name and module.state_dict()]


def _close(pattern: str, model: nn.Module) -> str:
    model = inner(model)
    known = _modules(model) + [name for name, _ in model.named_parameters()]
    close = difflib.get_close_matches(pattern.strip("*."), known, n=3)
    if close:
        return f"did you mean {', '.join(map(repr, close))}?"
    top = [name for name, _ in model.named_children()] or known
    return f"its modules are {', '.join(top[:SHOWN])}{', ...' if len(top) > SHOWN else ''}"
