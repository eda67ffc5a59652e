# SPDX-License-Identifier: Apache-2.0
"""Memory for time: activation checkpointing, gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastloop.bench import chargpt
from fastloop.bench.checks import WrongResult
from fastloop.bench.claims import training
from fastloop.bench.claims.record import Claim, Finding, Here, Verdict, gigabytes, times

DEEP = chargpt.Size(layers=12, width=128, heads=4, context=64, batch=4)
SAMPLES, MICRO_BATCHES = 32, 8
SHALLOW = chargpt.Size(layers=4, width=128, context=64, batch=SAMPLES)
SUM_ERROR = 1e-4  # of a gradient, relative: the same products, summed in another order
SAVED = 0.40  # at least this part is saved where half is claimed


def _gradients(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    model.zero_grad(set_to_none=False)
    run()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same_gradients(model: nn.Module, run: Callable[[], object], other: Callable[[], object], what: str) -> None:
    """Raises WrongResult if the gradients of the two differ by more than another order of summing explains."""
    first, second = _gradients(model, run), _gradients(model, other)
    norm = torch.stack([g.double().norm() for g in first]).norm()
    error = torch.stack([(a.double() - b.double()).norm() for a, b in zip(first, second, strict=True)]).norm() / norm
    if len(first) != len(second) or not error <= SUM_ERROR:
        raise WrongResult(f"[bench claims] gradients differ by {float(error):.1e} of their norm {what}")


def checkpointing(here: Here, every: int) -> Finding:
    """Every block, or every second one, is computed again in the backward instead of being kept."""
    model, batch = training.build(here, DEEP)

    def run(skip: int) -> None:
        x = model.embed(batch[0]) + model.position
        for index, block in enumerate(model.blocks):
            again = skip and index % skip == 0
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        logits = model.head(model.norm(x))
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()).backward()

    def whole() -> None:
        run(0)

    def recomputing() -> None:
        run(every)

    same_gradients(model, whole, recomputing, "with checkpointing")
    before, after = here.transient_bytes(whole), here.transient_bytes(recomputing)
    found, pairs = here.pairs(recomputing, whole, 1.0)
    saved = 1 - after / before
    verdict = Verdict.HOLDS if saved >= SAVED else Verdict.PARTLY if saved > 0.1 else Verdict.FAILS
    note = f"{gigabytes(before)} to {gigabytes(after)}; forward and backward take {times(found)} the time"
    return Finding(f"{saved:.0%} less", verdict, note, found, pairs.ratios, {"saved": saved})


def _accumulating(here: Here) -> tuple[nn.Module, Callable[[], None], Callable[[], None]]:
    model, (characters, targets) = training.build(here, SHALLOW)

    def run(micro_batches: int) -> None:
        for batch in zip(characters.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            (chargpt.loss(model, batch) / micro_batches).backward()

    def whole() -> None:
        run(1)

    def split() -> None:
        run(MICRO_BATCHES)

    same_gradients(model, whole, split, "with accumulation")
    return model, whole, split


def accumulation_memory(here: Here) -> Finding:
    """32 samples at once, and as 8 micro-batches of 4."""
    _, whole, split = _accumulating(here)
    before, after = here.transient_bytes(whole), here.transient_bytes(split)
    share = after / before
    verdict = Verdict.HOLDS if share <= 0.5 else Verdict.PARTLY if share < 0.95 else Verdict.FAILS
    note = f"{gigabytes(before)} to {gigabytes(after)} for {SAMPLES} samples in {MICRO_BATCHES} micro-batches"
    return Finding(f"{share:.0%} of the activations", verdict, note, numbers={"share": share})


def accumulation_speed(here: Here) -> Finding:
    """The time of both."""
    _, whole, split = _accumulating(here)
    found, pairs = here.pairs(split, whole, 1.0)
    verdict = Verdict.HOLDS if found.low > 1 else Verdict.FAILS
    note = f"{MICRO_BATCHES} micro-batches of {SAMPLES // MICRO_BATCHES} over a batch of {SAMPLES}; same gradients"
    return Finding(f"{times(found)} the time", verdict, note, found, pairs.ratios)


CLAIMS = (
    Claim("checkpoint-second", "checkpointing every second layer", "about half the activations",
          lambda here: checkpointing(here, 2)),
    Claim("checkpoint-each", "checkpointing each layer", "about half the activations",
          lambda here: checkpointing(here, 1)),
    Claim("accumulation-memory", "accumulation, same effective batch", "little memory", accumulation_memory),
    Claim("accumulation-speed", "the same accumulation", "slower than one large batch", accumulation_speed),
)  # fmt: skip
