# SPDX-License-Identifier: Apache-2.0
"""The normalizations at the end of residual branches, found in the graph of the model's forward."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fastloop.loop.restore import restored

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: batch and instance normalization
_ADDS = (operator.add, operator.iadd, torch.add)
_PASSED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPS_BRANCHES = ("DropPath", "StochasticDepth")  # of timm and others, and of torchvision


def zeroed_norms(model: nn.Module, residual_zero: bool | Sequence[str]) -> set[str]:
    """Names of the normalizations that `residual_zero` asks for: those that are found (True), or that patterns match.

    Raises:
        ValueError: there is none, or the forward cannot be followed.
        TypeError: a residual_zero of another kind.
    """
    if isinstance(residual_zero, bool):
        return _found(model) if residual_zero else set()
    if isinstance(residual_zero, str) or not all(isinstance(each, str) for each in residual_zero):
        raise TypeError(
            f"[initialize_weights] residual_zero must be True, False or a list of patterns, got {residual_zero!r}"
        )
    names = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    for pattern in residual_zero:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"[initialize_weights] residual_zero: no normalization is called {pattern!r}; there are "
                f"{', '.join(names[:8]) or 'none'}{', ...' if len(names) > 8 else ''}"
            )
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in residual_zero)}


def _found(model: nn.Module) -> set[str]:
    """Of each sum of a branch and what goes around it, the normalization that ends the branch."""
    try:
        with restored([model]):  # the forward runs: it may count its calls or draw numbers
            graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises on proxies
        raise ValueError(
            f"[initialize_weights] residual_zero cannot follow this model's forward ({type(error).__name__}: {error}); "
            "name the normalizations, as in residual_zero=['layer*.bn2']"
        ) from error
    modules = dict(model.named_modules())
    found = set()
    for node in graph.nodes:
        if not _is_sum(node):
            continue
        sides = [each for each in node.args if isinstance(each, fx.Node)]
        ends = [_ending_norm(side, modules) for side in sides]
        # A projected shortcut may end in a normalization too: the branch is the side with more behind it.
        depths = [len(_before(side) - _before(sides[1 - i])) for i, side in enumerate(sides)] if len(sides) == 2 else []
        if depths:
            branch = ends[depths.index(max(depths))]
            if branch is not None and depths[0] != depths[1]:
                found.add(branch)
    if not found:
        raise ValueError(
            "[initialize_weights] residual_zero: no residual branch ends with a normalization; leave it out, or name "
            "the normalizations, as in residual_zero=['layer*.bn2']"
        )
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in _DROPS_BRANCHES or super().is_leaf_module(m, module_qualified_name)


def _is_sum(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _ADDS
    return node.op == "call_method" and node.target in ("add", "add_")


def _ending_norm(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    while node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, NORMS):
            return str(node.target)
        passed = isinstance(module, _PASSED) or type(module).__name__ in _DROPS_BRANCHES
        if not passed or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None


def _before(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting += each.all_input_nodes
    return seen


__all__ = ["NORMS", "zeroed_norms"]
