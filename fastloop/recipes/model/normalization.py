# SPDX-License-Identifier: Apache-2.0
"""Normalization by the size of the batch, and models freed of BatchNorm."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from fastloop.recipes.model.summary import check_module

# BatchNorm's statistics are those of a batch: from 32 samples on their noise regularizes, below it hurts (Wu and He,
# 2018, figure 1: with 16 samples as good as GroupNorm, with 2 worse by 10 % of ImageNet's errors).
BATCHNORM_FROM = 32
GROUPNORM_FROM = 8

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def normalization_layer(channels: int, batch_size: int, *, dims: int = 2, groups: int = 8) -> nn.Module:
    """BatchNorm for 32 samples and more, GroupNorm for 8 and more, GroupNorm of one group (LayerNorm) below.

    The groups are the largest number of at most `groups` that divides the channels and leaves two of them to a group:
    a group of one channel would be zero wherever there is one position, as behind a linear layer.

    Args:
        channels: dimension 1 of the layer's input.
        batch_size: samples that are normalized together: of one micro-batch of one process. Neither accumulation nor
            DDP makes it larger (nn.SyncBatchNorm does).
        dims: 1 for [N, C] and [N, C, length], 2 for images, 3 for volumes.
        groups: at most so many.

    Raises:
        ValueError, TypeError: an argument that is no positive integer, or another dims.

    Source: Wu and He, "Group Normalization", 2018.
    """
    where = "[normalization_layer]"
    for name, value in {"channels": channels, "batch_size": batch_size, "groups": groups}.items():
        _positive(where, name, value)
    if dims not in _BATCH_NORMS:
        raise ValueError(f"{where} dims must be 1, 2 or 3, got {dims!r}; pass 2 for images")
    if batch_size >= BATCHNORM_FROM:
        return _BATCH_NORMS[dims](channels)
    return nn.GroupNorm(groups_of(channels, groups) if batch_size >= GROUPNORM_FROM else 1, channels)


def groups_of(channels: int, most: int) -> int:
    """The largest number up to `most` that divides the channels into groups of at least two; else 1."""
    return next((n for n in range(min(most, channels // 2), 1, -1) if channels % n == 0), 1)


def replace_batchnorm(model: nn.Module, *, groups: int = 8) -> list[str]:
    """Replace every BatchNorm, SyncBatchNorm too, by GroupNorm, in place; the names of those replaced.

    Weight and bias are the same parameters as before: an optimizer that holds them, its state and its parameter groups
    stay as they are, and so do device, dtype, `requires_grad` and eps. The running statistics are gone, from the
    state_dict too, and the outputs are others: train or fine-tune afterwards. Hooks of the replaced modules are gone.

    Args:
        groups: at most so many in a layer; see `normalization_layer`.

    Raises:
        ValueError: the model itself is a BatchNorm, or one is lazy, parametrized, or of a class with a forward of its
            own, as timm's BatchNormAct2d, whose activation would be lost.
    """
    where = "[replace_batchnorm]"
    check_module(model, where)
    _positive(where, "groups", groups)
    every = model.named_modules(remove_duplicate=False)
    found = [(name, module) for name, module in every if isinstance(module, _BatchNorm)]
    for name, module in found:
        if module is model:
            raise ValueError(f"{where} the model itself is a BatchNorm; use normalization_layer in its place")
        if isinstance(module, _LazyNormBase) or parametrize.is_parametrized(module):
            raise ValueError(
                f"{where} {name} is {'parametrized' if parametrize.is_parametrized(module) else 'lazy'}; "
                "call the model once with a batch, remove the parametrization, or replace it yourself"
            )
        if type(module).forward not in (_BatchNorm.forward, SyncBatchNorm.forward):
            raise ValueError(
                f"{where} {name} is a {type(module).__name__}, whose forward may do more than BatchNorm's; replace it "
                "yourself"
            )
    made = {id(module): _as_groupnorm(module, groups) for _, module in found}
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    return [name for name, _ in found]


def _as_groupnorm(old: _BatchNorm, groups: int) -> nn.GroupNorm:
    channels = old.num_features
    new = nn.GroupNorm(groups_of(channels, groups), channels, eps=old.eps, affine=False)
    new.affine = old.affine
    new.weight, new.bias = old.weight, old.bias  # the same Parameters
    return new.train(old.training)


def _positive(where: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} {name} must be an integer, got {value!r}; pass e.g. 32")
    if value < 1:
        raise ValueError(f"{where} {name} must be at least 1, got {value}; pass e.g. 32")


__all__ = ["normalization_layer", "replace_batchnorm"]
