# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: learning rates by depth or by name, and what has no weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastloop.recipes.finetune.depth import depth_of
from fastloop.recipes.finetune.head import head_parameters
from fastloop.recipes.finetune.names import aliases, chosen, first_match, inner, named

WHERE = "parameter_groups"


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.01,
    no_decay: bool = True,
    rates: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for an optimizer, each parameter once.

        rate(p) = rates[pattern]     of the first pattern that is for p
                  head_lr            in the head
                  lr * layer_decay^(depth of the head - depth of p)
                  lr                 otherwise

    Args:
        lr: above 0.
        weight_decay: of all but norms, biases (whatever has at most one dimension) and what the model's own
            `no_weight_decay()` names.
        no_decay: False gives weight decay to all.
        rates: learning rates by pattern, as of `freeze`; the first that matches wins.
        layer_decay: in (0, 1], e.g. 0.65 to 0.9 for transformers; depths are those of `depth_of`.
        head_lr: of the new layers, see `head_parameters`.

    Returns:
        Groups with "params", "lr", "weight_decay" and "name", in the order of registration.

    Raises:
        ValueError: a number out of range, a pattern that matches nothing, nothing that is trained, or a head_lr for a
            model in which no head is found.
        TypeError: rates or patterns that are none.

    Source: Howard and Ruder, 2018 (discriminative rates); Clark et al., "ELECTRA", 2020 (layer_decay).
    """
    _check(lr, weight_decay, rates, layer_decay, head_lr)
    parameters = {name: p for name, p in named(model).items() if p.requires_grad}
    if not parameters:
        raise ValueError(f"[{WHERE}] the model has no parameter that is trained; unfreeze(model, ...) some first")
    place = _places(model, lr, rates or {}, layer_decay, head_lr)
    left_out = _without_decay(model) if no_decay and weight_decay else set()
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    names = aliases(model)
    for name, p in parameters.items():
        label, rate = place(name)
        spared = no_decay and weight_decay > 0 and (p.ndim <= 1 or not left_out.isdisjoint(names[id(p)]))
        title = f"{label} without decay" if spared else label
        new = {"params": [], "lr": rate, "weight_decay": 0.0 if spared else float(weight_decay), "name": title}
        groups.setdefault((label, rate, spared), new)["params"].append(p)  # a pattern may be called as another group
    return list(groups.values())


def _places(
    model: nn.Module, lr: float, rates: Mapping[str, float], layer_decay: float | None, head_lr: float | None
) -> Callable[[str], tuple[str, float]]:
    """A function from a parameter's name to its group's name and rate."""
    chosen(WHERE, model, rates)
    names = aliases(model)
    matched = {name: first_match(names[id(p)], rates) for name, p in named(model).items()}
    head = head_parameters(model) if head_lr is not None else set()
    if head_lr is not None and not head:
        raise ValueError(f"[{WHERE}] head_lr: no head is found in the model; write its rate in rates=, by its name")
    depth = depth_of(model) if layer_decay is not None else {}
    deepest = max(depth.values(), default=0)
    rest = "others" if rates else "backbone" if head else "all"

    def place(name: str) -> tuple[str, float]:
        pattern = matched[name]
        if pattern is not None:
            return pattern, float(rates[pattern])
        if name in head and head_lr is not None:
            return "head", float(head_lr)
        if layer_decay is not None:
            return f"depth {depth[name]}", lr * layer_decay ** (deepest - depth[name])
        return rest, float(lr)

    return place


def _without_decay(model: nn.Module) -> set[str]:
    """Names of parameters that the model's author wants without weight decay."""
    function = getattr(inner(model), "no_weight_decay", None)
    return set(function()) if callable(function) else set()


def _check(
    lr: float, weight_decay: float, rates: Mapping[str, float] | None, layer_decay: float | None, head_lr: float | None
) -> None:
    if rates is not None and not isinstance(rates, Mapping):
        raise TypeError(
            f"[{WHERE}] rates must be learning rates by pattern, got {rates!r}; pass e.g. {{'layer4': 1e-5}}"
        )
    given = {"lr": lr, "head_lr": head_lr, **{f"rates[{pattern!r}]": rate for pattern, rate in (rates or {}).items()}}
    for name, value in given.items():
        if (value is not None or name != "head_lr") and not (_is_number(value) and value > 0):  # type: ignore[operator]
            raise ValueError(f"[{WHERE}] {name} must be a number above 0, got {value!r}")
    if not (_is_number(weight_decay) and weight_decay >= 0):
        raise ValueError(f"[{WHERE}] weight_decay must be a number of at least 0, got {weight_decay!r}")
    if layer_decay is not None and not (_is_number(layer_decay) and 0 < layer_decay <= 1):
        raise ValueError(f"[{WHERE}] layer_decay must lie in (0, 1], got {layer_decay!r}; pass e.g. 0.75")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
