# SPDX-License-Identifier: Apache-2.0
"""The cases by which two revisions of fastloop are compared: `python -m fastloop.bench ab --base REF`.

Public names alone are used, so that older revisions run them. Shapes and seeds are fixed; each case's sizes are such
that its data stay in a cache (what they time is our code, not the memory), but for the last two. One thread: on a
machine of few cores anything else that runs would stop one of several, and all would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import fastloop
from fastloop.bench import case

torch.set_num_threads(1)

Result = tuple[Callable[[], object], Sequence[Tensor]]


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """N(0, 0.02) with gradients N(0, 1), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        parameter = torch.randn(shape, generator=generator).mul_(0.02).to(dtype).requires_grad_(True)
        parameter.grad = torch.randn(shape, generator=generator).to(dtype)
        made.append(parameter)
    return made


def agrees_with_torch(stepped: Sequence[Tensor]) -> None:
    """One step of clip + AdamW, against torch's: the first update is lr in size, so a relative bound of 1e-3 of it."""
    wanted = parameters([tuple(each.shape) for each in stepped], stepped[0].dtype)
    torch.nn.utils.clip_grad_norm_(wanted, 1.0)
    torch.optim.AdamW(wanted, lr=1e-3).step()
    bound = 1e-3 * 1e-3 if stepped[0].dtype == torch.float32 else 2.0**-7
    for got, want in zip(stepped, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=1e-3 * 1e-3 if bound < 1e-3 else 1e-3)


def clip_and_step(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Result:
    """(step, the parameters after the first of them)."""
    made = parameters(shapes, dtype)
    optimizer = fastloop.AdamW(made, lr=1e-3, max_grad_norm=1.0)
    optimizer.step()
    return optimizer.step, [each.detach().clone() for each in made]


@case(setup=True, check=agrees_with_torch)
def step_mlp() -> Result:
    """clip + AdamW, MLP 64-64-64-10: 6 tensors"""
    return clip_and_step([(64, 64), (64,), (64, 64), (64,), (10, 64), (10,)])


@case(setup=True, check=agrees_with_torch)
def step_300_tensors() -> Result:
    """clip + AdamW, 300 tensors of 1024"""
    return clip_and_step([(1024,)] * 300)


@case(setup=True, check=agrees_with_torch)
def step_in_cache() -> Result:
    """clip + AdamW, 4 tensors of 32 K"""
    return clip_and_step([(2**15,)] * 4)


@case(setup=True)
def clip_alone() -> Callable[[], object]:
    """clip_grad_norm_, 100 tensors of 1024"""
    made = parameters([(1024,)] * 100)
    return lambda: fastloop.clip_grad_norm_(made, 1.0)


class Batches:
    """Ready batches, the same ones in each epoch: [32, 64] and their classes."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._batches = []
        for _ in range(count):
            x = torch.randn(32, 64, generator=generator)
            self._batches.append((x, x[:, :10].argmax(1)))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


@case(setup=True)
def loop_40_windows() -> Callable[[], object]:
    """Loop.fit, 40 windows of an MLP 64-64-64-10"""
    batches, start = Batches(40), torch.Generator().manual_seed(1)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1, generator=start)

    def train() -> None:
        optimizer = fastloop.AdamW(model.parameters(), lr=1e-4)
        loop = fastloop.Loop(model, optimizer, nn.CrossEntropyLoss(), max_grad_norm=1.0, progress=False)
        loop.fit(batches, epochs=1)

    return train


@case(setup=True, check=agrees_with_torch)
def step_from_memory() -> Result:
    """clip + AdamW, 8 M elements in 4 tensors"""
    return clip_and_step([(2**21,)] * 4)


@case(setup=True, check=agrees_with_torch)
def step_bf16_from_memory() -> Result:
    """clip + AdamW in bf16, 16 M elements in 4 tensors"""
    return clip_and_step([(2**22,)] * 4, torch.bfloat16)
