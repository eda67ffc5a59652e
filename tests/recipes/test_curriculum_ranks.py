# SPDX-License-Identifier: Apache-2.0
"""A curriculum of two processes: each computes its share of the losses, both have all of them, a resume is exact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.loop.strategy import unwrapped
from fastloop.recipes.curriculum import LossCurriculum, UpdateLosses, example_losses

sys.path.append(str(Path(__file__).resolve().parent.parent / "loop"))
import ranks

COUNT = 17  # of which one rank has 9 and the other 8


def train(rank: int, run_dir: Any, strategy: str, **more: Any) -> Any:
    """Samples of each step, the sampler's losses, those of the model, the weights."""
    fastloop.loop.fitting.plot_curves = lambda folder: None
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.arange(COUNT), torch.randn(COUNT, 4, generator=generator), torch.arange(COUNT) % 3)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).sin())
    seen: list[Any] = []

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        if model.training:
            seen.append((loop.global_step, batch[0].tolist()))
        return nn.functional.cross_entropy(model(batch[1]), batch[2])

    sampler = LossCurriculum(torch.arange(float(COUNT)), epochs=2, start=0.4)
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=0.05), loss_fn, run_dir=run_dir, strategy=strategy, seed=1,
        callbacks=[UpdateLosses(sampler, data, batch_size=4)], progress=False, save_every_epochs=None, **more,
    )  # fmt: skip
    loop.fit(DataLoader(data, 4, sampler=sampler, drop_last=True), epochs=3)
    computed = example_losses(loop.model, loss_fn, data)
    bias = unwrapped(loop.model)[2].bias.detach()
    assert torch.allclose(sampler.losses, computed, rtol=1e-4)  # other batches round differently
    return seen, bits(sampler.losses), bits(computed), bits(bias.full_tensor() if strategy == "fsdp2" else bias)


def straight_and_resumed(rank: int, folder: Any) -> Any:
    """With a checkpoint after each step; then from the one in the middle of the third epoch, after two updates."""
    whole = train(rank, folder / "whole", "ddp", save_every_steps=1, keep_last=100)
    third = folder / "whole" / "checkpoints" / "step-000000003"
    return whole, train(rank, folder / "again", "ddp", resume=third)


def test_two_ranks(tmp_path: Path) -> None:
    (first, again), (other, other_again) = ranks.run(straight_and_resumed, 2, tmp_path, tmp_path)
    assert first[1] == other[1]
    assert [batch for _, batch in first[0]] != [batch for _, batch in other[0]]
    last = [index for seen, *_ in (first, other) for step, batch in seen if step >= 2 for index in batch]
    assert len(last) == len(set(last)) == COUNT - 1  # a rank has 9, and leaves out the one of a batch of its own
    for resumed, whole in ((again, first), (other_again, other)):
        assert resumed[0] == [batch for batch in whole[0] if batch[0] >= 3]
        assert resumed[1:] == whole[1:]


def fsdp2(rank: int) -> Any:
    return train(rank, None, "fsdp2")


@pytest.mark.slow
def test_sharded_models_take_as_many_forwards_on_each_rank(tmp_path: Path) -> None:
    first, other = ranks.run(fsdp2, 2, tmp_path)
    assert first[1] == other[1]
