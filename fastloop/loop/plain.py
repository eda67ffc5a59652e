# SPDX-License-Identifier: Apache-2.0
"""Settings and objects as JSON for people to read; `documents` is for what has to be read back exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy
import torch

from fastloop.schedules import Schedule

LONGEST = 500  # characters of a text
MOST = 1000  # entries of a list or a mapping: half a million of them would take seconds at the start of a run


def plain(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """As JSON for people to read. Of what is no JSON the name of its class; no tensor is read, no iterator.

    Args:
        inside: ids of what holds the value, since a list may be in itself.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if -float("inf") < value < float("inf") else str(value)
    if isinstance(value, str):
        return value[:LONGEST]
    if isinstance(value, Schedule):
        return {"name": value.name, **plain(value.arguments)}
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return name_of(value) if id(value) in inside else _entries(value, (*inside, id(value)))
    if isinstance(value, (os.PathLike, torch.dtype, torch.device)):
        return str(value)[:LONGEST]
    if isinstance(value, (numpy.bool_, numpy.integer, numpy.floating)):
        return plain(float(value) if isinstance(value, numpy.floating) else value.item())
    return name_of(value)


def _entries(value: Any, inside: tuple[int, ...]) -> Any:
    left_out = f"... and {len(value) - MOST} more"
    if isinstance(value, Mapping):
        found = {str(k): plain(v, inside) for k, v in islice(value.items(), MOST)}
        return {**found, "...": left_out} if len(value) > MOST else found
    listed = [plain(v, inside) for v in islice(value, MOST)]
    return [*listed, left_out] if len(value) > MOST else listed


def name_of(value: Any) -> str:
    """Of a class or function its own name, of an object its class's."""
    named = value if hasattr(value, "__qualname__") and hasattr(value, "__module__") else type(value)  # generators
    return f"{named.__module__}.{named.__qualname__}"


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names; lists as JSON."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, (list, tuple, dict)) else value
    return flat
