# SPDX-License-Identifier: Apache-2.0
"""The trainings that scenarios run: a character-level GPT of a size that the device takes tenths of a second for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastloop.bench import chargpt
from fastloop.bench.claims.record import Here

Step = Callable[[], Tensor]  # one training step; returns its loss


def size(here: Here) -> chargpt.Size:
    if here.is_gpu:
        return chargpt.Size(layers=12, width=768, heads=12, context=1024, batch=8)
    return chargpt.Size(layers=4, width=256, heads=4, context=128, batch=4)


def build(here: Here, of: chargpt.Size | None = None) -> tuple[chargpt.CharGPT, tuple[Tensor, Tensor]]:
    """A model, always the same, and a batch of real text."""
    of = of or size(here)
    torch.manual_seed(0)
    model = chargpt.CharGPT(of).to(here.device)
    characters, targets = chargpt.batches(chargpt.standard_library(200_000), of, 1)[0]
    return model, (characters.to(here.device), targets.to(here.device))


def autocast(here: Here, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(here.device.type, dtype=dtype)


def step(here: Here, dtype: torch.dtype | None, of: chargpt.Size | None = None) -> tuple[Step, nn.Module]:
    """A training step under autocast to `dtype`, scaled where it is fp16; None: fp32. Gradients stay allocated."""
    model, batch = build(here, of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(here.device.type, enabled=dtype is torch.float16)

    def one() -> Tensor:
        with autocast(here, dtype):
            loss = chargpt.loss(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return one, model
