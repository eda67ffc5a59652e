# SPDX-License-Identifier: Apache-2.0
"""Normalization by batch size, and models whose BatchNorm is replaced in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastloop
from fastloop.recipes.model import normalization_layer, replace_batchnorm


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
def test_the_batch_size_decides(dims: int, kind: type) -> None:
    x = torch.rand(5, 12, *[3] * dims)
    for batch_size, wanted, groups in ((64, kind, None), (32, kind, None), (31, nn.GroupNorm, 6), (8, nn.GroupNorm, 6),
                                       (7, nn.GroupNorm, 1), (1, nn.GroupNorm, 1)):  # fmt: skip
        made = normalization_layer(12, batch_size, dims=dims)
        assert type(made) is wanted
        assert getattr(made, "num_groups", None) == groups
        assert made(x).shape == x.shape


@pytest.mark.parametrize(
    ("channels", "most", "groups"),
    [(64, 8, 8), (12, 8, 6), (7, 8, 1), (8, 8, 4), (2, 8, 1), (1, 8, 1), (30, 4, 3), (64, 32, 32)],
)
def test_groups_divide_the_channels_and_hold_two(channels: int, most: int, groups: int) -> None:
    made: Any = normalization_layer(channels, 16, dims=1, groups=most)
    assert made.num_groups == groups
    if channels > 1:  # a group of one feature would be 0 for every sample
        assert float(made(torch.rand(16, channels)).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 8), r"channels must be at least 1, got 0"), ((8, 0), r"batch_size must be at least 1, got 0"),
        ((8, 8.0), r"batch_size must be an integer, got 8.0"), ((True, 8), r"channels must be an integer, got True"),
    ],
)  # fmt: skip
def test_bad_sizes(arguments: tuple[Any, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        normalization_layer(*arguments)
    with pytest.raises(ValueError, match=r"dims must be 1, 2 or 3, got 4"):
        normalization_layer(8, 8, dims=4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.BatchNorm1d(6)
        self.body = nn.Sequential(nn.Linear(4, 6), shared, nn.Linear(6, 6), shared)
        self.sync, self.plain = nn.SyncBatchNorm(10), nn.BatchNorm2d(16, affine=False, eps=0.1)
        self.kept = nn.InstanceNorm1d(4)


def test_replaced_in_place_with_the_same_parameters() -> None:
    model = Model().double()
    model.body[1].weight.requires_grad_(False)
    model.plain.eval()
    held = dict(model.named_parameters())
    optimizer = fastloop.AdamW(model.parameters())
    assert replace_batchnorm(model) == ["body.1", "body.3", "sync", "plain"]
    after: dict[str, Any] = dict(model.named_parameters())
    assert after.keys() == held.keys()
    assert all(after[name] is held[name] for name in held)
    assert model.body[1] is model.body[3]
    assert isinstance(model.body[1], nn.GroupNorm)
    made: Any = [model.sync, model.plain, model.body[1]]
    assert [each.num_groups for each in made] == [5, 8, 3]
    assert (made[1].weight, made[1].affine, made[1].eps, made[1].training) == (None, False, 0.1, False)
    assert not list(model.buffers())
    assert isinstance(model.kept, nn.InstanceNorm1d)
    model.body(torch.rand(3, 4).double()).square().sum().backward()
    before = model.body[2].weight.detach().clone()
    optimizer.step()  # goes on with what it holds
    assert not torch.equal(model.body[2].weight, before)
    assert replace_batchnorm(model) == []


def test_what_cannot_be_replaced_is_refused_before_anything_is() -> None:
    with pytest.raises(ValueError, match=r"the model itself is a BatchNorm"):
        replace_batchnorm(nn.BatchNorm1d(3))
    lazy = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"1 is lazy"):
        replace_batchnorm(lazy)
    assert isinstance(lazy[0], nn.BatchNorm1d)
    parametrized = nn.Sequential(nn.BatchNorm1d(3))
    parametrize.register_parametrization(parametrized[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"0 is parametrized"):
        replace_batchnorm(parametrized)

    class WithActivation(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    active = nn.Sequential(nn.BatchNorm2d(4), WithActivation(4))
    with pytest.raises(ValueError, match=r"1 is a WithActivation, whose forward may do more"):
        replace_batchnorm(active)
    assert isinstance(active[0], nn.BatchNorm2d)
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
        replace_batchnorm(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"groups must be at least 1"):
        replace_batchnorm(Model(), groups=0)
