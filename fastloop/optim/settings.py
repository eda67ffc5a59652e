# SPDX-License-Identifier: Apache-2.0
"""Which settings there are beside torch's, and the checks of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloop.ops import backends
from fastloop.ops.plan import NATIVE_DTYPES, local_shard

# Keys of a group that are ours; a checkpoint of torch's has none of them.
OUR_KEYS = ("max_grad_norm", "max_grad_value", "ema_decay")
# Settings of the whole optimizer: in `defaults`, where pickle and deepcopy keep them, but not in the groups.
WHOLE_KEYS = ("error_if_nonfinite", "norm_group", "state_dtype", "master_weights", "zero_grads", "backend")
# How torch's errors call a hyperparameter; code and tests search for its words.
TORCH_WORDS = {"lr": "learning rate", "eps": "epsilon value"}


def check_settings(where: str, defaults: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Our arguments, checked. Returns those that belong to defaults.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
        RuntimeError: a backend that cannot run here.
    """
    backends.check_backend(where, ours["backend"])
    check_group(where, {**defaults, **ours})
    state_dtype = ours["state_dtype"]
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"[{where}] state_dtype must be None (as torch), torch.float32 or torch.bfloat16, got {state_dtype!r}"
        )
    if ours["master_weights"] and state_dtype == torch.bfloat16:
        raise ValueError(
            f"[{where}] master_weights=True keeps float32 states, got state_dtype=torch.bfloat16; drop one of the two"
        )
    for name in ("error_if_nonfinite", "master_weights", "zero_grads"):
        if not isinstance(ours[name], bool):
            raise TypeError(f"[{where}] {name} must be a bool, got {ours[name]!r}")
    if ours["backend"] not in ("auto", "reference") and defaults.get("differentiable"):
        raise RuntimeError(
            f'[{where}] differentiable=True runs on the reference backend, got backend="{ours["backend"]}"; '
            'use backend="auto"'
        )
    return ours


def check_group(where: str, group: dict[str, Any]) -> None:
    """Check our settings of one group.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
    """
    for name in ("max_grad_norm", "max_grad_value"):
        value = group.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"[{where}] {name} must be a number or None, got {value!r}")
        if not value > 0:
            raise ValueError(f"[{where}] {name} must be above 0, or None for no clipping, got {value!r}")
    decay = group.get("ema_decay")
    if decay is not None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"[{where}] ema_decay must be a number or None, got {decay!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"[{where}] ema_decay must lie in [0, 1), got {decay!r}; pass e.g. 0.999")


def check_numbers(where: str, group: dict[str, Any], hyper: Sequence[tuple[str, int]]) -> None:
    """Raise TypeError if a hyperparameter of a group is no number: groups are edited by schedulers and by hand."""
    for key, index in hyper:
        value = group[key]
        try:
            number = value if index < 0 else value[index]
            if isinstance(number, Tensor) and number.numel() == 1 and not number.is_complex():
                continue  # its value may be on a device, and reading it would wait
            float(number)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            wanted = "a number" if index < 0 else "two numbers"
            raise TypeError(f"[{where}] {key} must be {wanted}, got {value!r} in a param group") from error


def check_number(where: str, name: str, value: Any, low: float, high: float | None, hint: str) -> None:
    """Raise ValueError unless low <= value (< high). Tensors of one element are numbers."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"[{where}] Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        value = value.detach().item()
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"[{where}] {name} must be a number, got {value!r}; pass e.g. {hint}")
    if not value >= low or (high is not None and not value < high) or math.isinf(value):
        bounds = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g})"
        as_torch = TORCH_WORDS.get(name, f"{name} value")
        raise ValueError(f"[{where}] Invalid {as_torch}: {value!r}; {name} must be {bounds}, pass e.g. {hint}")


def check_served(where: str, p: Tensor, backend: str, differentiable: bool) -> None:
    """Raise if one backend was asked for and its kernels cannot serve the parameter."""
    local = local_shard(p)
    reason = None
    if backend == "cpu" and local.device.type != "cpu":
        reason = f"is on {local.device}"
    elif backend != "cpu" and backends.device_kernels(backend, local.device) is None:
        reason = f"is on {local.device}: {backends.why_not_on(backend, local.device)}"
    elif local.dtype not in NATIVE_DTYPES:
        reason = f"has dtype {local.dtype}"
    elif differentiable:
        reason = "is in a group with differentiable=True"
    if reason is not None:
        raise RuntimeError(
            f'[{where}] backend="{backend}" cannot step a parameter of shape {tuple(p.shape)} that {reason}; '
            'use backend="auto"'
        )
