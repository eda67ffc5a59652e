# SPDX-License-Identifier: Apache-2.0
"""Correct before fast: compare what a contender's first steps made with the reference's, element by element.

The reference takes the global norm in fp64, clips with it, and lets torch's AdamW step. torch's own norm is not
exact enough to be the reference: its fp32 sum over one tensor of 38 M elements (GPT-2's embedding) is off by 0.3 %.

Two trainings have no bound per element: training magnifies a rounding. How much is not guessed but measured, by
shadows: the reference's training once more, with each parameter moved by up to one rounding step after every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NORM = 1.0
LR = 1e-3
CHECKED_STEPS = 2  # the second one sees states that are not zero and, with torch, gradients clipped already
BLOCK = 2**17  # elements at a time: temporaries of 512 KB stay in the cache (2^20: 6 times slower)

SHADOWS = 2
MARGIN = 8.0  # over the worse shadow: the roundings of a whole step are a few, and two draws of a random walk differ

# Roundings of one step to the storage dtype or coarser, in one implementation: unscale or clip, the copy of the
# clipped gradient that torch stores, 1-b times, the difference, the sum, the store.
_ROUNDINGS = 6
# One fp32 accumulator of a norm adds at most 2^10 squares (2^14 elements in a chunk, 16 accumulators).
_NORM_ERROR = 2.0**10 * 2.0**-24


class WrongResult(Exception):
    """A contender's result differs from the reference: its time would mean nothing."""


@dataclass(frozen=True)
class Outcome:
    """Parameters after `CHECKED_STEPS` steps and, where the optimizer keeps them under torch's keys, both moments."""

    parameters: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]


Check = Callable[[Outcome, Outcome, float], None]


def outcome(parameters: Sequence[Tensor], optimizer: object) -> Outcome:
    """What an optimizer made of `parameters`, without copying."""
    state = getattr(optimizer, "state", {})
    states = [state.get(parameter, {}) for parameter in parameters]
    if not all("exp_avg" in each and "exp_avg_sq" in each for each in states):
        return Outcome(parameters, (), ())
    return Outcome(parameters, [each["exp_avg"] for each in states], [each["exp_avg_sq"] for each in states])


def exact_norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all elements together, in fp64."""
    squares = (
        float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        for tensor in tensors
        for block in tensor.detach().reshape(-1).split(BLOCK)
    )
    return math.sqrt(math.fsum(squares))


def norm_error(tensors: Sequence[Tensor]) -> float:
    """Relative error of torch's own total norm of `tensors`, which its clipping inherits."""
    exact = exact_norm(tensors)
    return abs(float(torch.nn.utils.get_total_norm(tensors)) - exact) / exact if exact else 0.0


def _packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    return list(flat.split([tensor.numel() for tensor in tensors]))


def reference(parameters: Sequence[Tensor]) -> Outcome:
    """Clip by the fp64 norm, then `CHECKED_STEPS` steps of torch's AdamW, in place on `parameters`.

    The result is copied into one block per kind, so that all of the caller's and the optimizer's tensors can be
    freed: thousands of them left on the heap scatter what is allocated next between them, and the first
    contender to be built was 10 % slower than the second, the same code (bench: control).
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, min(1.0, MAX_NORM / (exact_norm(gradients) + 1e-6)))
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    for _ in range(CHECKED_STEPS):
        optimizer.step()
    result = outcome(parameters, optimizer)
    return Outcome(_packed(result.parameters), _packed(result.exp_avg), _packed(result.exp_avg_sq))


def _blocks(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Matching blocks of the flattened tensors, in fp32; empty tensors give none."""
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.numel() == 0:
            continue
        for u, v in zip(x.detach().reshape(-1).split(BLOCK), y.detach().reshape(-1).split(BLOCK), strict=True):
            yield index, u.float(), v.float()


def _agree(what: str, got: Sequence[Tensor], wanted: Sequence[Tensor], relative: float, absolute: float) -> None:
    """Raise WrongResult unless |got - wanted| <= relative * |wanted| + absolute everywhere; a NaN never is."""
    for index, a, b in _blocks(got, wanted):
        excess = (a - b).abs_().sub_(b.abs(), alpha=relative)
        if not float(excess.max()) <= absolute:
            outside = ~(excess <= absolute)
            at = int(outside.nonzero()[0])
            raise WrongResult(
                f"[bench] {what} of tensor {index} after {CHECKED_STEPS} steps: wanted {float(b[at]):.9g} "
                f"within {relative:.2g} of it plus {absolute:.2g}, got {float(a[at]):.9g} "
                f"({int(outside.sum())} of {outside.numel()} elements of this block differ)"
            )


def check_step(got: Outcome, wanted: Outcome, clip_error: float = 0.0) -> None:
    """Raise WrongResult unless clip + AdamW gave the reference's parameters and moments.

    With u the unit roundoff of the storage and r the relative error of the clip factor, after k steps:
    exp_avg within 2k * 6u + r (both sides round), exp_avg_sq within twice that (a square), a parameter within
    4k * u of itself (two roundings a step and side) plus k * lr times the update's own relative error, the
    update being at most 1. clip_error is what the contender's norm adds to r (`norm_error` for torch's).
    """
    dtype = wanted.parameters[0].dtype
    unit = torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).tiny
    # torch rounds a bf16 norm to bf16 per tensor, in total, in the factor, and in the product: 4 roundings.
    clip = clip_error + max(_NORM_ERROR, 4 * unit)
    moment = 2 * CHECKED_STEPS * _ROUNDINGS * unit + 2 * clip
    update = 2 * moment + 8 * unit
    if got.exp_avg:
        _agree("exp_avg", got.exp_avg, wanted.exp_avg, moment, tiny)
        _agree("exp_avg_sq", got.exp_avg_sq, wanted.exp_avg_sq, 2 * moment, tiny)
    _agree(
        "parameter",
        got.parameters,
        wanted.parameters,
        4 * CHECKED_STEPS * unit,
        CHECKED_STEPS * LR * update,
    )


# ---- Whole trainings


def move_by_a_rounding(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    """What makes a shadow: move each fp32 element by up to one rounding step of its own, at random."""
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.rand(parameter.shape, generator=generator, device=parameter.device)
            parameter.addcmul_(parameter, noise.sub_(0.5).mul_(2 * 2.0**-23))


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The 2-norm of all differences, in fp64; inf where one is not finite.

    Of a training's roundings the norm is reproducible where the largest difference is not: an element whose
    gradient is nearly 0 may go either way in Adam's first steps.
    """
    total = exact_norm([x.detach().double() - y.detach().double() for x, y in zip(a, b, strict=True)])
    return total if math.isfinite(total) else math.inf


def check_training(got: Sequence[Tensor], wanted: Sequence[Tensor], shadows: Sequence[Sequence[Tensor]]) -> None:
    """Raise WrongResult unless `got` is as near to `wanted` as MARGIN times the farther shadow is.

    Without shadows it has to be the same bit for bit.
    """
    if not shadows:
        for index, (x, y) in enumerate(zip(got, wanted, strict=True)):
            if not torch.equal(x, y):
                off = int((x != y).sum())
                raise WrongResult(
                    f"[bench] weights of tensor {index}: wanted the same bits, {off} of {x.numel()} differ"
                )
        return
    bound = MARGIN * max(distance(shadow, wanted) for shadow in shadows)
    off_by = distance(got, wanted)
    if not off_by <= bound:
        raise WrongResult(
            f"[bench] weights: wanted within {bound:.2g} of torch's (2-norm), they are off by {off_by:.2g}"
        )
