# SPDX-License-Identifier: Apache-2.0
"""Why a batch is not learned: told apart by the losses, the gradients and the outputs."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.findings import Finding
from fastloop.loop.data import map_tensors
from fastloop.texts import number

SAME = 1e-6  # relative change of a loss that has not moved: some roundings of fp32
STUCK = 0.05  # a loss within it of log(classes) says that the classes are guessed
FALLING = 0.01  # a loss that falls by this share over the last tenth of the steps is on its way,
STEADY = 0.25  # and one that falls then by this share of what an even fall would be
OF_A_CONSTANT = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
DEEPER = "diagnose(model, loss_fn, batch) looks further"


def classified(loss_fn: Any, batch: Any, outputs: list[Any]) -> tuple[Tensor, Tensor] | None:
    """Outputs [N, C, ...] and classes [N, ...] of a criterion; None where there are none."""
    if not isinstance(loss_fn, nn.Module) or not outputs or not isinstance(outputs[0], Tensor):
        return None
    if not isinstance(batch, (list, tuple)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return None
    output, target = outputs[0], batch[1]
    if target.is_floating_point() or output.dim() != target.dim() + 1 or output.shape[1] < 2:
        return None
    return output.detach(), target


def nothing_trained() -> Finding:
    """No parameter requires a gradient."""
    return Finding(
        "error",
        "model",
        "no parameter requires a gradient",
        "thaw what is to be trained: parameter.requires_grad_(True), or unfreeze(model)",
    )


class Trace:
    """What was seen on the way."""

    def __init__(self, model: nn.Module, loss_fn: Any, batch: Any) -> None:
        self.model, self.loss_fn, self.batch = model, loss_fn, batch
        self.losses: list[float] = []
        self.attached = True  # the loss depends on something that requires a gradient
        self.classes: int | None = None
        self.same_outputs = False
        self.unreached: list[str] = []  # parameters without a gradient, or with zeros alone, at the first step
        self.parameters = 0

    def take(self, loss: Tensor, outputs: list[Any]) -> None:
        """Of one forward."""
        self.losses.append(float(loss.detach()))
        self.attached = loss.requires_grad
        pair = classified(self.loss_fn, self.batch, outputs)
        self.classes = None if pair is None else pair[0].shape[1]
        output = outputs[0].detach() if outputs and isinstance(outputs[0], Tensor) else None
        self.same_outputs = (
            output is not None
            and output.dim() > 0
            and len(output) > 1
            and bool(torch.allclose(output, output[:1].expand_as(output), rtol=1e-5, atol=1e-8))
        )

    def take_gradients(self) -> None:
        """Of the first backward."""
        if len(self.losses) > 1:
            return
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.parameters = len(trained)
        self.unreached = [name for name, p in trained if p.grad is None or not bool(p.grad.detach().any())]

    def constant_loss(self) -> float | None:
        """Loss of the best constant prediction, of criteria that compare numbers; None where it is 0 or unknown."""
        if not isinstance(self.loss_fn, OF_A_CONSTANT) or not isinstance(self.batch, (list, tuple)):
            return None
        target = self.batch[-1].detach().double()  # integers have no mean
        middle = target.mean(0, keepdim=True) if isinstance(self.loss_fn, nn.MSELoss) else target.median(0, True)[0]
        value = float(self.loss_fn(middle.expand_as(target), target))
        return value if value > 0 else None

    def findings(self, optimizer: torch.optim.Optimizer) -> list[Finding]:
        """What explains that the target was not reached, the likeliest first; at least one."""
        if not math.isfinite(self.losses[-1]):
            return [self._not_finite()]
        if not self.attached:
            return [
                Finding(
                    "error",
                    "loss",
                    "the loss does not depend on any parameter",
                    "look for detach(), item(), argmax() or no_grad() between the model and the loss",
                )
            ]
        found = [*self._gradients(optimizer), *self._contradictions()]
        if self.same_outputs:
            found.append(
                Finding(
                    "error" if not self._moved() else "warning",
                    "model",
                    "the outputs are the same for all samples of the batch",
                    f"the inputs do not get through: look for dead units, zero weights and unscaled inputs; {DEEPER}",
                )
            )
        return [*found, self._curve()]

    def _moved(self) -> bool:
        span = max(self.losses) - min(self.losses)
        return span > SAME * max(abs(self.losses[0]), 1e-12)

    def _not_finite(self) -> Finding:
        step = len(self.losses) - 1
        bad: list[bool] = []
        map_tensors(self.batch, lambda tensor: bad.append(not bool(tensor.isfinite().all())))
        if any(bad):
            return Finding("error", "batch", "the batch has NaN or infinity", "repair the data: analyze(dataset)")
        if step == 0:
            return Finding(
                "error",
                "loss",
                f"the loss is {self.losses[0]} before the first step",
                "look for log(0), a division by 0, labels that are all ignored and weights that are not finite; "
                + DEEPER,
            )
        return Finding(
            "error",
            "loss",
            f"the loss is {self.losses[-1]} after {step} steps, and was {number(self.losses[0])} at first",
            "take a smaller learning rate, a tenth of it, and clip the gradients",
        )

    def _gradients(self, optimizer: torch.optim.Optimizer) -> list[Finding]:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        missed = [name for name, parameter in trained if id(parameter) not in held]
        found = []
        if missed:
            found.append(
                Finding(
                    "error" if len(missed) == len(trained) else "warning",
                    "optimizer",
                    f"the optimizer does not hold {len(missed)} of {len(trained)} parameters: {_named(missed)}",
                    "make the optimizer after the model, of model.parameters()",
                )
            )
        if self.unreached:
            every = len(self.unreached) == self.parameters
            found.append(
                Finding(
                    "error" if every else "warning",
                    "model",
                    ("no gradient reaches the parameters" if every else "no gradient reaches some parameters")
                    + f": {len(self.unreached)} of {self.parameters} have none or zeros: {_named(self.unreached)}",
                    f"look for detach(), dead units, zero weights and layers that are not used; {DEEPER}",
                )
            )
        return found

    def _contradictions(self) -> list[Finding]:
        """The same inputs with two targets: no model can learn both."""
        if not isinstance(self.batch, (list, tuple)) or len(self.batch) != 2:
            return []
        inputs, target = self.batch
        if not isinstance(inputs, Tensor) or not isinstance(target, Tensor) or len(inputs) != len(target):
            return []
        rows = inputs.detach().reshape(len(inputs), -1)
        both = torch.cat([rows.double(), target.detach().reshape(len(target), -1).double()], dim=1)
        count = len(both.unique(dim=0)) - len(rows.unique(dim=0))
        if count <= 0:
            return []
        return [
            Finding(
                "error",
                "batch",
                f"inputs occur with several targets, {count} times",
                "no model can learn both; correct the labels, or leave these samples out",
            )
        ]

    def _curve(self) -> Finding:
        losses = self.losses
        first, last = losses[0], losses[-1]
        fell = f"the loss went from {number(first)} to {number(last)}"
        if not self._moved():
            return Finding(
                "error",
                "loss",
                f"the loss is constant, {number(last)}",
                f"no gradient reaches the parameters, or the learning rate is far too small; {DEEPER}",
            )
        falling = last < first and self._falling()
        chance = None if self.classes is None else math.log(self.classes)
        guessed = chance is not None and self._guessing(chance)
        if falling and not (guessed and first - last < FALLING * first):
            return Finding(
                "warning",
                "loss",
                f"{fell} and is still falling",
                "take a larger learning rate, e.g. 3 or 10 times, or more steps",
            )
        if guessed:
            return Finding(
                "error",
                "loss",
                f"the loss is stuck at {number(last)}, about log({self.classes}) = "
                f"{number(chance)}: the classes are guessed",
                "look whether inputs and labels belong together, whether the outputs are logits (no softmax before "
                f"the cross entropy), and at the learning rate; {DEEPER}",
            )
        if last > first:
            return Finding("error", "loss", f"{fell}: it rises", "take a smaller learning rate, a tenth of it")
        return Finding(
            "error",
            "loss",
            f"{fell} and falls no more",
            "give the model more capacity, less dropout and weight decay, or a smaller learning rate if the loss jumps",
        )

    def _guessing(self, loss: float) -> bool:
        """Whether the losses of the last tenth are about this one, of equal chances."""
        return abs(statistics.median(self.losses[-max(1, len(self.losses) // 10) :]) - loss) <= STUCK * loss

    def _falling(self) -> bool:
        tenth = max(1, len(self.losses) // 10)
        before, now = self.losses[-2 * tenth : -tenth] or self.losses[:1], self.losses[-tenth:]
        mean_before, mean_now = sum(before) / len(before), sum(now) / len(now)
        fall, whole = mean_before - mean_now, self.losses[0] - self.losses[-1]
        # The deviation of an even fall is 0.3 of what it falls; that of noise is above what means of it differ by.
        steady = fall > STEADY * whole * tenth / len(self.losses) and fall > 2 * statistics.pstdev(now)
        return fall > FALLING * abs(mean_before) or steady


def _named(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
