# SPDX-License-Identifier: Apache-2.0
"""State as JSON and tensors, and back: what a checkpoint stores beside the large tensors. Nothing of it can run code.

JSON has no tuples, no keys but strings, no NaN, no tensors. Each is written as an object of one key that starts with
`$`; anything that is none of these is refused when it is saved, not when it is needed.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

JSON = Any


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> JSON:
    """`value` as JSON; its tensors go to `tensors` under names that begin with `name`.

    Raises:
        TypeError: something that is neither a number, a string, None, a tensor, an array, nor a dict, list or tuple.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        while name in tensors:  # {"a.b": ..., "a": {"b": ...}}
            name += "'"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, numpy.ndarray):
        return {"$array": pack(torch.from_numpy(value.copy()), name, tensors)}
    if isinstance(value, numpy.generic):
        return pack(value.item(), name, tensors)
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: pack(v, f"{name}.{k}", tensors) for k, v in value.items()}
        pairs = enumerate(value.items())
        return {"$items": [[pack(k, f"{name}.{i}", tensors), pack(v, f"{name}.{i}", tensors)] for i, (k, v) in pairs]}
    raise TypeError(
        f"[Loop] {name} is {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: it "
        "stores numbers, strings, tensors, arrays, dicts and lists, and nothing that could run code when it is read"
    )


def unpack(value: JSON, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key == "$float":
            return float(inner)
        if key == "$tensor":
            return tensors[inner]
        if key == "$array":
            return unpack(inner, tensors).numpy()
        if key == "$bytes":
            return base64.b64decode(inner)
        if key == "$dtype":
            dtype = getattr(torch, inner)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"[Loop] {inner!r} in a checkpoint is no dtype")
            return dtype
        if key == "$tuple":
            return tuple(unpack(v, tensors) for v in inner)
        if key == "$items":
            return {unpack(k, tensors): unpack(v, tensors) for k, v in inner}
    return {k: unpack(v, tensors) for k, v in value.items()}
