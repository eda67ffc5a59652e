# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters, and BatchNorms that keep their statistics."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastloop.recipes.finetune.names import aliases, chosen, inner, listed, matches


def freeze(model: nn.Module, patterns: str | Iterable[str] = ("*",), *, batchnorm: bool = True) -> list[str]:
    """Take parameters out of the training, in place: requires_grad=False, and no gradient left.

    The optimizer passes over what has no gradient: no update, no weight decay, no state.

    Args:
        patterns: of `fnmatch`, for names of parameters or of modules, whose parameters are all meant: "layer4",
            "encoder.layer.*", "*.bias".
        batchnorm: a BatchNorm whose parameters are all frozen stays in eval mode, whatever `train()` is called, and so
            keeps its running statistics; False: they follow the new data.

    Returns:
        Names of the parameters.

    Raises:
        ValueError: a pattern that matches nothing.
        TypeError: a pattern that is no text.
    """
    wanted = listed("freeze", patterns)
    found = chosen("freeze", model, wanted)
    for parameter in found.values():
        set_trainable(parameter, False)
    if batchnorm:
        for name, module in _batchnorms(model):
            own = list(module.parameters(recurse=False))
            meant = any(f"{name}.{each}" in found for each, _ in module.named_parameters(recurse=False))
            if not any(p.requires_grad for p in own) and (meant or any(matches(name, each) for each in wanted)):
                _hold(module)
    return list(found)


def unfreeze(model: nn.Module, patterns: str | Iterable[str] = ("*",)) -> list[str]:
    """Take parameters into the training again, in place; their BatchNorms follow `train()` and `eval()` again.

    Args:
        patterns: see `freeze`.

    Returns:
        Names of the parameters; those of integers, as in quantized layers, cannot be trained and are left out.

    Raises:
        ValueError: a pattern that matches nothing.
        TypeError: a pattern that is no text.
    """
    wanted = listed("unfreeze", patterns)
    found = chosen("unfreeze", model, wanted)
    names = [name for name, parameter in found.items() if set_trainable(parameter, True)]
    for name, module in _batchnorms(model):
        if any(p.requires_grad for p in module.parameters(recurse=False)) or any(matches(name, p) for p in wanted):
            _release(module, inner(model).training)
    return names


def can_be_trained(parameter: nn.Parameter) -> bool:
    """Not those of integers, as in quantized layers."""
    return parameter.is_floating_point() or parameter.is_complex()


def set_trainable(parameter: nn.Parameter, wanted: bool) -> bool:
    """Freeze or unfreeze one; returns whether it is trained now."""
    if wanted and not can_be_trained(parameter):
        return False
    if parameter.requires_grad != wanted:
        parameter.requires_grad_(wanted)
    if not wanted:
        parameter.grad = None
    return wanted


def settle_batchnorms(model: nn.Module, patterns: Iterable[str]) -> None:
    """Hold the BatchNorms without any trained parameter, let the others go; one without parameters as patterns say."""
    trained = list(patterns)
    names = aliases(model)
    for name, module in _batchnorms(model):
        own = list(module.parameters(recurse=False))
        known = [every for p in own for every in names[id(p)]] or [name]
        free = any(p.requires_grad for p in own) if own else any(matches(n, p) for n in known for p in trained)
        if free:
            _release(module, inner(model).training)
        else:
            _hold(module)


def _batchnorms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, module) for name, module in inner(model).named_modules() if isinstance(module, _BatchNorm)]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a BatchNorm that is held."""
    del mode
    module.training = False
    return module


def _hold(module: nn.Module) -> None:
    # On the instance, since model.train() calls each child's own: what else sets modes need not know of it. A partial
    # of a function of this module is copied and pickled with the model.
    module.__dict__["train"] = partial(_stay_in_eval, module)
    module.training = False


def _release(module: nn.Module, mode: bool) -> None:
    held = module.__dict__.get("train")
    if isinstance(held, partial) and held.func is _stay_in_eval:
        del module.__dict__["train"]
        module.train(mode)
