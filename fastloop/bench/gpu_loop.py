# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on a GPU, GPT-2 124M in bf16 autocast: `fastloop.Loop`, and the same loop with torch's parts.

Both fetch a batch from pinned memory, move it to the device, go forward and backward, clip, and step with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastloop.bench import chargpt, checks
from fastloop.bench.checks import MAX_NORM
from fastloop.bench.loops import Batch, Endless, our_optimizer, torch_optimizer

# 124,439,808 parameters.
GPT2 = chargpt.Size(layers=12, width=768, heads=12, context=1024, batch=8, vocabulary=50257, tied=True)
BATCHES = 4  # in turn

Step = Callable[[], object]


def model_of(size: chargpt.Size, device: torch.device) -> chargpt.CharGPT:
    """Bitwise the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return chargpt.CharGPT(size).to(device)


def batches(size: chargpt.Size, pinned: bool) -> list[Batch]:
    """Random tokens, and the same shifted by one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(size.vocabulary, (BATCHES, size.batch, size.context + 1), generator=generator)
    pairs = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]
    return [(x.pin_memory(), y.pin_memory()) for x, y in pairs] if pinned else pairs


def our_steps(model: chargpt.CharGPT, data: list[Batch]) -> Iterator[None]:
    """One step each time; clipping is the optimizer's."""
    device = next(model.parameters()).device
    optimizer = our_optimizer(model, max_grad_norm=MAX_NORM)
    loop = import_module("fastloop.loop").Loop(model, optimizer, precision="bf16", device=device, progress=False)
    for window in loop.windows(Endless(data), epochs=1):
        for batch in window:
            with loop.autocast():
                loss = chargpt.loss(loop.model, batch)
            loop.backward(loss)
        loop.step()
        yield


def torch_steps(
    model: chargpt.CharGPT, data: list[Batch], after: Callable[[Sequence[Tensor]], object] | None = None
) -> Iterator[None]:
    """One step each time. `after` is called with the parameters after each."""
    parameters = list(model.parameters())
    device, optimizer = parameters[0].device, torch_optimizer(model)
    for x, y in Endless(data):
        batch = (x.to(device, non_blocking=True), y.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16):
            loss = chargpt.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(parameters)
        yield


def checked(size: chargpt.Size, device: torch.device) -> tuple[Step, Step]:
    """Our step and torch's, both two steps old and their weights compared. Raises WrongResult."""
    data = batches(size, pinned=device.type == "cuda")

    def started(steps_of: Callable[..., Iterator[None]], **options: Any) -> tuple[Iterator[None], list[Tensor]]:
        model = model_of(size, device)
        steps = steps_of(model, data, **options)
        for _ in range(checks.CHECKED_STEPS):
            next(steps)
        return steps, [parameter.detach() for parameter in model.parameters()]

    peer, wanted = started(torch_steps)
    shadows = []
    for seed in range(checks.SHADOWS):
        generator = torch.Generator(device).manual_seed(seed)
        shadows.append(started(torch_steps, after=partial(checks.move_by_a_rounding, generator=generator))[1])
    mine, got = started(our_steps)
    checks.check_training(got, wanted, shadows)
    return partial(next, mine), partial(next, peer)
