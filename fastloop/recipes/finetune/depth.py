# SPDX-License-Identifier: Apache-2.0
"""How far from the input each parameter is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fastloop.extras import need
from fastloop.recipes.finetune.head import is_timm
from fastloop.recipes.finetune.names import inner, named

_STAGE = re.compile(r"(layer|stage|block|denseblock|transition)_?\d+")
_NORM = re.compile(r"Norm(Act)?(\d+d)?$")  # ends the name of the class, also of those of other libraries


def depth_of(model: nn.Module) -> dict[str, int]:
    """The depth of each parameter: 0 is next to the input, the largest at the head; no number in between is missing.

    timm's models say it themselves (`group_matcher`). Of others: each member of a ModuleList or Sequential is a layer,
    such as encoder.layer.N, h.N, layers.N or features.N; stages that are numbered by name, as a ResNet's layer1 to
    layer4, count as one layer each; what stands before the first block (stem, embeddings) is one layer, and what stands
    after the last one (final norm, pooler, head) too. A model without any of these: its modules in the order in which
    they are registered. A normalization belongs to the layer before it.

    Returns:
        By the names of `named_parameters`, frozen ones too.
    """
    model = inner(model)
    if is_timm(model) and hasattr(model, "group_matcher"):
        return _of_timm(model)
    units = _merged(list(_units(model, "")))
    depth: dict[str, int] = {}
    for name in named(model):
        owner = max((unit for unit in units if unit.owns(name)), key=lambda unit: len(unit.owner(name)))
        depth[name] = owner.depth
    return _without_gaps(depth)


@dataclass
class _Unit:
    """Modules, or parameters by themselves, that are as deep as each other."""

    names: list[str]  # a module's name, or a parameter's
    block: bool  # one of a row of larger parts
    norm: bool
    depth: int = 0

    def owner(self, parameter: str) -> str:
        """The longest of the names that the parameter is under; "" if none."""
        return max((n for n in self.names if parameter == n or parameter.startswith(f"{n}.")), key=len, default="")

    def owns(self, parameter: str) -> bool:
        return bool(self.owner(parameter))


def _units(module: nn.Module, prefix: str) -> Iterator[_Unit]:
    for name, _ in module.named_parameters(recurse=False):
        yield _Unit([prefix + name], block=False, norm=False)
    in_a_row = isinstance(module, (nn.ModuleList, nn.Sequential))
    for name, child in module.named_children():
        path = prefix + name
        if not any(True for _ in child.parameters()):
            continue
        leaf = not any(True for _ in child.children())
        if _STAGE.fullmatch(name) or (in_a_row and (leaf or not isinstance(child, (nn.ModuleList, nn.Sequential)))):
            yield _Unit([path], block=not leaf, norm=_is_norm(child))
        elif _has_rows(child):
            yield from _units(child, f"{path}.")
        else:
            yield _Unit([path], block=in_a_row, norm=_is_norm(child))


def _is_norm(module: nn.Module) -> bool:
    return _NORM.search(type(module).__name__) is not None


def _has_rows(module: nn.Module) -> bool:
    """Whether it has layers in a row somewhere: itself a list of several, or one that stands in it."""
    if any(_STAGE.fullmatch(name) for name, _ in module.named_children()):
        return True
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return any(any(True for _ in child.parameters()) for child in module)
    return any(_has_rows(child) for child in module.children())


def _merged(units: list[_Unit]) -> list[_Unit]:
    """Depths: what is before the first block together, what is after the last one too, norms with what they follow."""
    blocks = [i for i, unit in enumerate(units) if unit.block]
    first, last = (blocks[0], blocks[-1]) if blocks else (0, len(units))
    depth = 0
    for i, unit in enumerate(units):
        if i > 0:
            together = i < first or i > last + 1 or (unit.norm and i != last + 1)
            depth += not together
        unit.depth = depth
    return units


def _of_timm(model: nn.Module) -> dict[str, int]:
    groups = need("timm.models", "vision", "the depth of a timm model").group_parameters
    return _without_gaps(groups(model, model.group_matcher(coarse=False), reverse=True))  # type: ignore[operator]


def _without_gaps(depth: dict[str, int]) -> dict[str, int]:
    order = {value: i for i, value in enumerate(sorted(set(depth.values())))}
    return {name: order[value] for name, value in depth.items()}
