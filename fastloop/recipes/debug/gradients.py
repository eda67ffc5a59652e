# SPDX-License-Identifier: Apache-2.0
"""Backward against central differences of the loss, in fp64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastloop.checks.undisturbed import model_kept
from fastloop.findings import Finding, listed
from fastloop.loop import random_state
from fastloop.loop.data import map_tensors
from fastloop.loop.probe import device_of, first_batch, loss_of, moved
from fastloop.loop.strategy import unwrapped
from fastloop.recipes.results import Result
from fastloop.texts import columns

AREA = "check_gradients"
SMALLER = (1.0, 0.1, 0.01, 10.0)  # steps that are tried in turn: a kink is farther away than a small one
ROUNDINGS = 100.0  # of the loss, in one difference


@dataclass
class GradientCheck(Result):
    """Attributes:

    differences: by parameter, the largest |backward - difference| / max(|backward|, |difference|) of its elements.
    passed: all are within `tolerance`.
    elements: how many were compared. kinks: how many lie where the loss has a kink, as ReLU's at 0: backward is there
        one of the two one-sided differences, which counts as right.
    """

    practice: ClassVar[str] = AREA
    passed: bool
    differences: dict[str, float]
    tolerance: float
    elements: int
    kinks: int
    findings: list[Finding] = field(default_factory=list)

    def table(self) -> str:
        """The verdict, the findings, and the difference of each parameter, the worst first."""
        head = f"{'passed' if self.passed else 'failed'}: {self.elements} elements, {self.kinks} at kinks"
        rows = [[name, value, "" if value <= self.tolerance else "wrong"] for name, value in self._worst_first()]
        return "\n".join(
            part for part in (head, listed(self.findings, ""), columns(["parameter", "difference", ""], rows)) if part
        )

    def _worst_first(self) -> list[tuple[str, float]]:
        return sorted(self.differences.items(), key=lambda item: -item[1] if item[1] == item[1] else -math.inf)


def check_gradients(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    *,
    elements: int = 4,
    step: float = 1e-6,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> GradientCheck:
    """Compares backward with (loss(w + h) - loss(w - h)) / 2h on random elements of each parameter.

    On a copy in fp64, in the modes that the model is in, with the same random numbers in each forward, so that dropout
    and BatchNorm are functions too. h = step * max(1, |w|); where the two differ, steps of a tenth, a hundredth and ten
    times that are tried.

    Args:
        model, loss_fn: as `Loop` takes them; both can be copied.
        batch: or a loader, whose first batch is taken. Its floats become fp64.
        elements: of each parameter, drawn with `seed`.
        tolerance: of the relative difference; what the rounding of the loss makes of a difference is allowed beside it.

    Raises:
        TypeError: a model or loss_fn that is none.
        ValueError: an argument out of range, a loss that is no finite number, or a model that cannot be copied.
    """
    _check(model, elements, step, tolerance)
    with model_kept(model, loss_fn):  # a loss function may count, or train something
        copied, criterion = _in_fp64(unwrapped(model), loss_fn)
        batch = map_tensors(moved(first_batch(batch), device_of(copied)), _to_fp64)
        function = loss_of(criterion)
        state = random_state.capture()

        def loss() -> Tensor:
            random_state.restore(state)
            return function(copied, batch)[0]

        return _compared(copied, loss, elements, step, tolerance, torch.Generator().manual_seed(seed))


def _check(model: Any, elements: Any, step: Any, tolerance: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{AREA}] model must be a torch.nn.Module, got {type(model).__name__}")
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError(f"[{AREA}] the model has parameters without values; call it once with a batch first")
    if isinstance(elements, bool) or not isinstance(elements, int) or elements < 1:
        raise ValueError(f"[{AREA}] elements must be an integer of at least 1, got {elements!r}")
    for name, value in (("step", step), ("tolerance", tolerance)):
        if not 0 < value < 1:
            raise ValueError(f"[{AREA}] {name} must lie in (0, 1), got {value!r}")


def _in_fp64(model: nn.Module, loss_fn: Any) -> tuple[nn.Module, Any]:
    try:
        copied = copy.deepcopy(model).double()
        criterion = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"[{AREA}] the model must be one that copy.deepcopy copies and .double() makes fp64: {error}; build it "
            "anew and check that"
        ) from error
    return copied, criterion


def _to_fp64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _compared(
    model: nn.Module,
    loss: Callable[[], Tensor],
    elements: int,
    step: float,
    tolerance: float,
    generator: torch.Generator,
) -> GradientCheck:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point() and p.numel()}
    model.zero_grad()
    with torch.enable_grad():
        value = loss()
        if value.dim() or not bool(value.isfinite()):
            raise ValueError(f"[{AREA}] the loss must be a finite number, got {value.detach()!r:.80}")
        if value.requires_grad:
            value.backward()
    made = GradientCheck(True, {}, tolerance, 0, 0)
    if not parameters:
        made.findings.append(Finding("note", "model", "no parameter requires a gradient: nothing was compared"))
        return made
    with torch.no_grad():
        base = float(value.detach())
        if float(loss()) != base:
            what = "the loss differs between two forwards with the same random numbers: nothing can be compared"
            made.findings.append(
                Finding("error", "loss", what, "make it deterministic, e.g. without generators of its own")
            )
            made.passed = False
            return made
        if value.dtype != torch.float64:
            what = f"the loss is {value.dtype} though model and batch are fp64: differences are lost in its rounding"
            made.findings.append(Finding("warning", "loss", what, "remove casts to a fixed dtype"))
        resolution = ROUNDINGS * torch.finfo(value.dtype).eps * max(abs(base), 1e-3)
        for name, parameter in parameters.items():
            compare = _Element(loss, base, step, tolerance, resolution)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            chosen = torch.randperm(parameter.numel(), generator=generator)[:elements].tolist()
            results = [compare.at(parameter, int(i), float(gradient.flatten()[i])) for i in chosen]
            made.differences[name] = max((d for d, _ in results), key=lambda d: d if d == d else math.inf)
            made.elements += len(results)
            made.kinks += sum(kink for _, kink in results)
    _verdict(made, parameters)
    return made


def _verdict(made: GradientCheck, parameters: Mapping[str, Tensor]) -> None:
    wrong = [name for name, difference in made.differences.items() if not difference <= made.tolerance]
    made.passed = not wrong
    for name in wrong:
        what = f"backward differs from the difference by {made.differences[name]:.3g} (of {made.tolerance:g} allowed)"
        remedy = "look at the backward of what it goes through: an autograd.Function, a detach, a change in place"
        if parameters[name].grad is None:
            what = "backward gives none, and the loss depends on it"
            remedy = "look for detach, no_grad, .data or numpy on its way"
        made.findings.append(Finding("error", name, what, remedy))
    if made.kinks:
        what = f"{made.kinks} of {made.elements} elements lie at a kink, where the two one-sided differences differ"
        made.findings.append(Finding("note", "kinks", what))


@dataclass
class _Element:
    """Compares single elements."""

    loss: Callable[[], Tensor]
    base: float
    step: float
    tolerance: float
    resolution: float  # of the loss

    def at(self, parameter: Tensor, index: int, backward: float) -> tuple[float, bool]:
        """The relative difference, and whether there is a kink."""
        best, kink = math.inf, False
        if not math.isfinite(backward):
            return math.nan, False
        for factor in SMALLER:
            h, up, down = self._losses(parameter, index, factor)
            noise = self.resolution / h
            sides = [(up - down) / (2 * h), (up - self.base) / h, (self.base - down) / h]
            best = min(best, self._relative(backward, sides[0], noise))
            if best <= self.tolerance:
                return best, False
            # at a kink backward may be any number between the two slopes; elsewhere these are equal up to h
            apart = abs(sides[1] - sides[2])
            between = min(sides[1:]) - noise <= backward <= max(sides[1:]) + noise
            if between and apart > 2 * noise and apart > 0.01 * max(abs(sides[1]), abs(sides[2])):
                kink = True
        return (0.0, True) if kink else (best, False)

    def _losses(self, parameter: Tensor, index: int, factor: float) -> tuple[float, float, float]:
        flat = parameter.view(-1) if parameter.is_contiguous() else None
        place = (
            (index,)
            if flat is not None
            else tuple(int(i) for i in torch.unravel_index(torch.tensor(index), parameter.shape))
        )
        target = parameter if flat is None else flat
        before = float(target[place])
        h = self.step * factor * max(1.0, abs(before))
        target[place] = before + h
        up = float(self.loss())
        target[place] = before - h
        down = float(self.loss())
        target[place] = before
        return h, up, down

    def _relative(self, a: float, b: float, noise: float) -> float:
        """0 where the two differ by less than the loss's rounding makes of a difference."""
        apart = abs(a - b)
        return 0.0 if apart <= noise else apart / max(abs(a), abs(b))
