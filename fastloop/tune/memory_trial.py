# SPDX-License-Identifier: Apache-2.0
"""What the process of one memory trial does: estimate by part, train a few windows, then measure one by part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from fastloop.loop import Loop
from fastloop.loop.data import map_tensors, samples_in, sliced
from fastloop.loop.random_state import seed_everything
from fastloop.loop.strategy import repeated_blocks
from fastloop.optim.base import FusedOptimizer
from fastloop.tune import child, parts
from fastloop.tune.longest import Looked, look
from fastloop.tune.losses import Losses
from fastloop.tune.peaks import nvml_bytes, peak
from fastloop.tune.phases import Marks, Phases, phases_of
from fastloop.tune.step import SEED, Steps, first_batches, measure, settings_of, training

LOSS_WINDOWS = 5  # whose losses are compared
BATCH_SECONDS = 3.0  # of reading batches for them


def measure_memory(
    spec: Mapping[str, Any],
    options: Mapping[str, Any],
    split: int,
    state_dtype: str | None,
    keep_gradients: bool,
    batches: int | None,
    seconds: float,
    memory_limit: int | None,
) -> dict[str, Any]:
    """Memory by part with one remedy, samples/s, and the losses of the first windows, as JSON.

    The estimate and what the target is are notes: they are there also if memory runs out.

    Args:
        options: of Loop, on top of the present ones.
        split: each batch in so many micro-batches, the window having as many samples as before.
        state_dtype: of the optimizer's states, "bfloat16"; None as they are.
        keep_gradients: between steps, as zeros, instead of freeing them.
        batches: for the losses; None: as many as can be read in a short time.
    """
    loop, loader = _made(spec, options, split, state_dtype)
    prepare = _fill_gradients if keep_gradients else _nothing
    looked = look(loader)
    longest = list(_pieces(looked.longest, split))
    child.note(facts=_facts(loop, loader, looked))
    count = loop.accumulation_steps
    guess = _estimate(loop, longest[0])
    child.note(estimate=asdict(guess), estimated_peak=guess.peak(count > 1 or keep_gradients))

    seed_everything(SEED)
    wanted = LOSS_WINDOWS * count // split if batches is None else batches
    read = first_batches(loader, wanted, BATCH_SECONDS if batches is None else float("inf"))
    source = Switch([piece for batch in read for piece in _pieces(batch, split)])
    _before_each_loss(loop, lambda: prepare(loop))
    with Steps(loop, source) as steps:
        heard = Losses(loop)
        for _ in range(LOSS_WINDOWS):
            steps.step()
        losses = heard.values
        heard.close()
        source.pieces = longest
        steps.step()
        source.pieces = list(_pieces(looked.typical, split))
        rates = measure(steps, seconds, warmup=1).rates
        most = peak(loop.device, memory_limit)
        nvml, why = nvml_bytes(loop.device, os.getpid())
        reserved = torch.cuda.max_memory_reserved(loop.device) if loop.device.type == "cuda" else None
        source.pieces = longest
        held, found = _phases(loop, steps, count, longest[0], lambda: prepare(loop))
    return {
        "losses": losses, "batches": len(read), "rates": rates, "peak": asdict(most),
        "parts": asdict(held), "phases": {"ends": found.ends, "peaks": found.peaks, "peak_phase": found.peak_phase},
        "allocated": _begin(loop, held) + found.peak, "reserved": reserved, "nvml": nvml, "nvml_reason": why,
    }  # fmt: skip


def _nothing(loop: Loop) -> None:
    del loop


def _fill_gradients(loop: Loop) -> None:
    for group in loop.optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)


def _made(spec: Mapping[str, Any], options: Mapping[str, Any], split: int, state_dtype: str | None) -> tuple[Loop, Any]:
    made = training(spec, {**options, "cuda_graph": False})  # a captured graph keeps all of its memory
    loop = made.loop
    loop.accumulation_steps *= split
    if state_dtype is not None:
        assert isinstance(loop.optimizer, FusedOptimizer)
        loop.optimizer.defaults["state_dtype"] = getattr(torch, state_dtype)
        loop.optimizer._forget_plan()
    return loop, made.train_loader


def _facts(loop: Loop, loader: Any, looked: Looked) -> dict[str, Any]:
    """What decides which remedies there are."""
    optimizer = loop.optimizer
    ours = isinstance(optimizer, FusedOptimizer)
    return {
        "device": str(loop.device),
        "batch_size": settings_of(loader).get("batch_size"),
        "samples": samples_in(looked.longest),
        "accumulation_steps": loop.accumulation_steps,
        "looked": looked.how,
        "precision": loop.precision,
        "optimizer": f"{'fastloop' if ours else 'torch'}'s {type(optimizer).__name__}",
        "ours": ours,
        "state_dtype": str(optimizer.defaults.get("state_dtype")),
        "blocks": len(repeated_blocks(loop.model)),
        "bf16": loop.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False),
    }


# ---- batches


class Switch:
    """Micro-batches, again and again; `pieces` may be replaced between two windows."""

    def __init__(self, pieces: list[Any]) -> None:
        self._next = 0
        self.pieces = pieces

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "pieces":
            self._next = 0

    def __iter__(self) -> Switch:
        return self

    def __next__(self) -> Any:
        piece = self.pieces[self._next]
        self._next = (self._next + 1) % len(self.pieces)
        return piece


def _pieces(batch: Any, split: int) -> Iterator[Any]:
    """The batch in `split` parts, each in memory of its own."""
    if split == 1:
        yield batch
        return
    size = samples_in(batch)
    for i in range(split):
        part = sliced(batch, size * i // split, size * (i + 1) // split)
        if samples_in(part) > 0:
            yield map_tensors(part, lambda tensor: tensor.clone())


# ---- before the first step


def _estimate(loop: Loop, piece: Any) -> parts.Parts:
    """From shapes and dtypes, and from forwards of a few samples; buffers are put back."""
    loss_fn = loop.loss_fn
    assert loss_fn is not None
    there = map_tensors(piece, lambda tensor: tensor.to(loop.device))
    buffers = [(buffer, buffer.detach().clone()) for buffer in loop.model.buffers()]
    known = [*loop.model.parameters(), *loop.model.buffers()]

    def of(samples: int) -> int:
        few = sliced(there, 0, samples)

        def forward() -> Any:
            with loop.autocast():
                return loss_fn(loop.model, few)

        return parts.saved_bytes(forward, [*known, *parts.tensors_in(there)])

    size = samples_in(there)
    try:
        activations: int | None = parts.extrapolated(of, size)
    except (RuntimeError, ValueError, IndexError):  # a model of batches of one size, or a part that cannot be sliced
        activations = of(size)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return parts.estimate(loop.model, loop.optimizer, there, activations)


# ---- after it


def _before_each_loss(loop: Loop, prepare: Any) -> None:
    inner = loop.loss_fn
    assert inner is not None

    def prepared(model: Any, batch: Any) -> Any:
        prepare()
        return inner(model, batch)

    loop.loss_fn = prepared


def _phases(loop: Loop, steps: Steps, count: int, piece: Any, prepare: Any) -> tuple[parts.Parts, Phases]:
    """One window on the longest batch, by phase and by part."""

    def window(mark: Marks) -> None:
        inner, calls, marked = loop.loss_fn, 0, False
        assert inner is not None

        def watched(model: Any, batch: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                prepare()
                mark("earlier micro-batches")
            result = inner(model, batch)
            if calls == count:
                mark("forward")
            return result

        def before_step(*_: Any) -> None:
            nonlocal marked
            marked = True
            mark("backward")

        hook = loop.optimizer.register_step_pre_hook(before_step)
        loop.loss_fn = watched
        try:
            steps.step()
        finally:
            loop.loss_fn = inner
            hook.remove()
        if not marked:  # the step was skipped
            mark("backward")
        mark("step")

    found = phases_of(window, loop.optimizer, loop.device)
    return parts.held(loop.model, loop.optimizer, piece, found.gradients, found.activations), found


def _begin(loop: Loop, held: parts.Parts) -> int:
    """Bytes that were there when the window began: between two steps gradients and activations are gone."""
    if loop.device.type == "cuda":
        return torch.cuda.memory_allocated(loop.device)
    return held.known - held.gradients - (held.activations or 0)
