# SPDX-License-Identifier: Apache-2.0
"""The gradients of the first step, by parameter: are they there, finite, neither vanishing nor exploding?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastloop.findings import Finding, listed, ordered
from fastloop.loop.probe import device_of, first_batch, loss_of, moved
from fastloop.loop.restore import restored
from fastloop.recipes.model.branches import NORMS
from fastloop.recipes.model.summary import check_model
from fastloop.recipes.results import Result
from fastloop.texts import columns

WHERE = "[check_initial_gradients]"


@dataclass(frozen=True)
class GradientReport(Result):
    """Norms of the gradients of one batch.

    Args:
        loss: of the batch.
        norms: by name of the parameter, the 2-norm in fp64; None without a gradient. Frozen parameters are left out.
        findings: what is wrong with them.
    """

    practice: ClassVar[str] = "check_initial_gradients"
    loss: float
    norms: dict[str, float | None]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        """Whether nothing but notes was found."""
        return all(finding.level == "note" for finding in self.findings)

    def table(self) -> str:
        """The norms, and the findings below."""
        rows = [(name, norm) for name, norm in self.norms.items()]
        return f"{columns(('parameter', 'gradient norm'), rows)}\n\nloss {self.loss:.4g}\n{listed(self.findings)}"


def check_initial_gradients(
    model: nn.Module, loss_fn: Any, batch: Any, *, low: float = 1e-7, high: float = 100.0
) -> GradientReport:
    """One forward and backward in train mode: norms of the gradients by parameter, and what is wrong with them.

    Model, modes, statistics, gradients and random states are afterwards what they were.

    Args:
        loss_fn: as `Loop` takes it.
        batch: one, or a loader, whose first batch is taken.
        low, high: norms below and above which a gradient vanishes or explodes.

    Raises:
        ValueError: a loss without a gradient, or no scalar; parameters without values; low and high out of order.
    """
    if not 0.0 <= low < high:
        raise ValueError(f"{WHERE} low and high must be 0 <= low < high, got {low} and {high}")
    check_model(model, WHERE)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not trained:
        raise ValueError(f"{WHERE} at least one parameter must be trained, got none; unfreeze some")
    loss_of_batch, given = loss_of(loss_fn), moved(first_batch(batch), device_of(model))
    with restored([model]), torch.enable_grad():
        model.train()
        value = _backward(loss_of_batch(model, given)[0])
        norms = {name: _norm(each) for name, each in trained.items()}
        stopped = [name for name, norm in norms.items() if norm == 0.0]
        if stopped and _open_norms(model):
            model.zero_grad()
            _backward(loss_of_batch(model, given)[0])
            stopped = [name for name in stopped if _norm(trained[name])]
        else:
            stopped = []
    frozen = sum(not each.requires_grad for each in model.parameters())
    return GradientReport(value, norms, ordered(_findings(value, norms, stopped, frozen, low, high)))


def _backward(loss: Tensor) -> float:
    if loss.numel() != 1:
        raise ValueError(f"{WHERE} the loss must be a scalar, got shape {tuple(loss.shape)}; take its mean")
    if not loss.requires_grad:
        raise ValueError(f"{WHERE} the loss must depend on the parameters, got one without a gradient; look for "
                         "detach(), no_grad() or argmax in the model and loss_fn")  # fmt: skip
    loss.backward()
    return float(loss.detach())


def _norm(parameter: Tensor) -> float | None:
    if parameter.grad is None:
        return None
    grad = parameter.grad.detach()
    values = grad.coalesce().values() if grad.is_sparse else grad
    return float(torch.linalg.vector_norm(values.double()))


def _findings(
    loss: float, norms: dict[str, float | None], stopped: list[str], frozen: int, low: float, high: float
) -> list[Finding]:
    found = []
    if not math.isfinite(loss):
        found.append(Finding("error", "loss", f"the loss is {loss}", "look for log, division or sqrt of 0 and for NaN "
                             "in the data"))  # fmt: skip
    if frozen:
        found.append(Finding("note", "", f"{frozen} frozen parameters were not looked at"))
    if stopped:
        what = f"{len(stopped)} gradients are exactly 0, {stopped[0]} the first: normalizations of weight 0 stop them"
        found.append(Finding("note", "", what, "as it should be at the start of a residual branch (residual_zero)"))
    for name, norm in norms.items():
        finding = None if name in stopped else _finding(name, norm, norms, low, high)
        if finding is not None:
            found.append(finding)
    return found


@torch.no_grad()
def _open_norms(model: nn.Module) -> bool:
    """Set the weights of normalizations that are 0 to 1; whether there were any."""
    weights = [module.weight for module in model.modules() if isinstance(module, NORMS)]
    zeroed = [weight for weight in weights if isinstance(weight, Tensor) and not weight.any()]
    for weight in zeroed:
        weight.fill_(1.0)
    return bool(zeroed)


def _finding(name: str, norm: float | None, norms: dict[str, float | None], low: float, high: float) -> Finding | None:
    if norm is None:
        remedy = "is its module called, and nothing detached behind it? Else freeze it"
        return Finding("warning", name, "no gradient: it is not connected to the loss", remedy)
    if not math.isfinite(norm):
        remedy = "lower the initial weights; look for log, division or sqrt of 0 in the forward"
        return Finding("error", name, f"gradient norm {norm}", remedy)
    if norm > high:
        remedy = "normalize inputs and targets, use initialize_weights, clip by max_grad_norm"
        return Finding("warning", name, f"gradient norm {norm:.3g} is above {high:g}: exploding", remedy)
    if norm >= low:
        return None
    weight = norms.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
    if weight is not None and weight >= low:
        what = f"gradient norm {norm:.3g}, and {weight:.3g} of its weight: the bias has no effect"
        return Finding("note", name, what, "leave it out (bias=False), as in front of a normalization")
    if norm == 0.0:
        remedy = "look for dead ReLUs (dead_relus), a saturated loss and an input that is 0"
        return Finding("warning", name, "the gradient is exactly 0", remedy)
    remedy = "use initialize_weights, normalization or residual connections"
    return Finding("warning", name, f"gradient norm {norm:.3g} is below {low:g}: vanishing", remedy)


__all__ = ["GradientReport", "check_initial_gradients"]
