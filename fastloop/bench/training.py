# SPDX-License-Identifier: Apache-2.0
"""A real training, twice with the same seeds: torch's clipping and AdamW, and ours. Do the loss curves agree?

Two correct implementations differ by roundings, and training magnifies a rounding. How much is not guessed but
measured, by shadows (`checks`): ours may stray from torch's curve as far as the worst of two has strayed so far,
times 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastloop.bench import chargpt, stats
from fastloop.bench.checks import MARGIN, SHADOWS, move_by_a_rounding
from fastloop.bench.measure import quiet_interpreter

LR = 3e-3
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0
FEWEST_SAMPLES = 10
STEPS_PER_SAMPLE = 4  # of one side in a row: more than 20 ms on 2 cores, and the curves still grow side by side


@dataclass
class Side:
    """One model in training: its losses, and seconds spent in whole steps and in clip + optimizer step."""

    model: torch.nn.Module
    update: Callable[[], object]
    optimizer: Any
    losses: list[Tensor] = field(default_factory=list)
    step_seconds: float = 0.0
    update_seconds: float = 0.0

    def train(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Take one step per batch; returns seconds per step, and of these the ones for clip + optimizer step."""
        update_seconds, start = 0.0, perf_counter()
        for batch in batches:
            loss = chargpt.loss(self.model, batch)
            loss.backward()
            before = perf_counter()
            self.update()
            update_seconds += perf_counter() - before
            self.optimizer.zero_grad(set_to_none=False)  # the gradients stay the same tensors, as in every case
            self.losses.append(loss.detach())
        return (perf_counter() - start) / len(batches), update_seconds / len(batches)


def _model(size: chargpt.Size) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return chargpt.CharGPT(size)


def torch_side(size: chargpt.Size) -> Side:
    """clip_grad_norm_ and AdamW(fused=True): the headline peer."""
    model = _model(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return Side(model, update, optimizer)


def our_side(size: chargpt.Size) -> Side:
    """fastloop.AdamW, clipping included."""
    model = _model(size)
    # Through the module's attribute, so that what is measured is what a user's import gets.
    optimizer = import_module("fastloop").AdamW(
        model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM
    )
    return Side(model, optimizer.step, optimizer)


def shadow_side(size: chargpt.Size, seed: int) -> Side:
    """torch's side with each parameter moved by up to one rounding step, at random, after every step."""
    side, generator = torch_side(size), torch.Generator().manual_seed(seed)
    parameters = list(side.model.parameters())
    unmoved = side.update

    def update() -> None:
        unmoved()
        move_by_a_rounding(parameters, generator)

    side.update = update
    return side


def bounds(plain: Sequence[float], shadows: Sequence[Sequence[float]]) -> list[float]:
    """How far a loss may be from `plain` at each step: 8 times the shadows' worst distance up to there.

    At first the distance is that of fp32 losses themselves: 4 rounding steps of the loss.
    """
    result, worst = [], 0.0
    for step, loss in enumerate(plain):
        worst = max(worst, 4 * 2.0**-24 * abs(loss), *(abs(shadow[step] - loss) for shadow in shadows))
        result.append(MARGIN * worst)
    return result


def disagreement(plain: Sequence[float], ours: Sequence[float], limits: Sequence[float]) -> str | None:
    """The first step at which the curves differ by more than the bound, in words; None if they agree."""
    for step, (a, b, limit) in enumerate(zip(plain, ours, limits, strict=True)):
        if not abs(a - b) <= limit:
            return (
                f"[bench] loss at step {step}: wanted {a:.7f} (torch) within {limit:.2g}, got {b:.7f} (fastloop); "
                "the two optimizers do not take the same steps"
            )
    return None


def train(
    steps: int = 240,
    size: chargpt.Size | None = None,
    progress: Callable[[str, int], None] | None = None,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Train both sides on the same batches, interleaved sample by sample in the order A B B A, then the shadows.

    No sample starts later than `seconds` after the first, once 10 are taken: fewer steps, and the same comparison.
    Returns the part of the result file called "training"; `status` is "wrong" when the curves do not agree.
    Raises chargpt.NoText where there is no text to train on.
    """
    size = size or chargpt.Size()
    text = chargpt.standard_library()
    data = chargpt.batches(text, size, steps)
    sides = (torch_side(size), our_side(size))
    samples: list[list[tuple[float, float]]] = [[], []]
    with quiet_interpreter():
        deadline = perf_counter() + seconds
        for index, start in enumerate(range(0, steps, STEPS_PER_SAMPLE)):
            if index >= FEWEST_SAMPLES and perf_counter() > deadline:
                steps = start
                break
            part = data[start : start + STEPS_PER_SAMPLE]
            for side in (0, 1) if index % 2 == 0 else (1, 0):
                samples[side].append(sides[side].train(part))
            if progress is not None:
                progress("training a character-level GPT: both optimizers", start + len(part))
    shadows = []
    for seed in range(SHADOWS):
        if progress is not None:
            progress("training a character-level GPT: how far roundings carry", seed)
        shadow = shadow_side(size, seed)
        shadow.train(data[:steps])
        shadows.append([float(loss) for loss in shadow.losses])
    plain, ours = ([float(loss) for loss in side.losses] for side in sides)
    limits = bounds(plain, shadows)
    problem = disagreement(plain, ours, limits)
    # The first sample of each side holds the first step's allocations.
    whole = [(a[0], b[0]) for a, b in zip(samples[0], samples[1], strict=True)][1:]
    update = [(a[1], b[1]) for a, b in zip(samples[0], samples[1], strict=True)][1:]
    return {
        "status": "ok" if problem is None else "wrong",
        "reason": problem or "",
        "steps": steps,
        "batch": size.batch,
        "context": size.context,
        "parameters": sum(parameter.numel() for parameter in sides[0].model.parameters()),
        "tensors": len(list(sides[0].model.parameters())),
        "text_characters": len(text),
        "step": _comparison(whole),
        "update": _comparison(update),
        "samples_per_second": {
            name: size.batch / float(torch.tensor([pair[side] for pair in whole]).median())
            for side, name in enumerate(("torch", "fastloop"))
        },
        "first_loss": plain[0],
        "last_loss": {"torch": plain[-1], "fastloop": ours[-1]},
        "largest_difference": max(abs(a - b) for a, b in zip(plain, ours, strict=True)),
        "bound": limits[-1],
        "losses": {"torch": plain, "fastloop": ours, "bound": limits},
        "samples": {"step": whole, "update": update},
    }


def _comparison(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    interval = stats.median_interval([a / b for a, b in pairs])
    times = torch.tensor(pairs, dtype=torch.float64).median(dim=0).values.tolist()
    return {
        "torch_seconds": times[0],
        "fastloop_seconds": times[1],
        "ratio": interval.median,
        "low": interval.low,
        "high": interval.high,
        "pairs": len(pairs),
    }
