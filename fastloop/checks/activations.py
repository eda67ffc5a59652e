# SPDX-License-Identifier: Apache-2.0
"""What a model ends in, against what its loss expects: logits, log-probabilities or probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloop.checks.look import Call, last_operation
from fastloop.findings import Finding, Level

CONTAIN_SOFTMAX = {"cross_entropy": "cross_entropy", "log_softmax": "log_softmax in the loss"}
SQUASHING = ("Softmax", "Sigmoid")
NEITHER = 0.1  # farthest from 1 that the sum of probabilities comes by rounding, half precision included


def activation(call: Call) -> list[Finding]:
    """Findings on what the loss's input has been through."""
    if call.name in CONTAIN_SOFTMAX:
        return _before_softmax(call)
    if call.name == "binary_cross_entropy_with_logits":
        return _before_sigmoid(call)
    if call.name in ("nll_loss", "kl_div"):
        return _log_probabilities(call)
    if call.name == "binary_cross_entropy":
        return _probabilities(call)
    return []


def class_dimension(call: Call) -> int:
    """Where the classes are: as cross entropy takes them, and last for those that take any shape."""
    if call.name in ("cross_entropy", "nll_loss") and call.input.dim() > 1:
        return 1
    return -1


def are_probabilities(values: Tensor, dim: int = -1) -> bool:
    """Whether the values along `dim` are at least 0 and sum to 1, and are not so by chance.

    By chance are: a single class, a single row, rows that are all the same, and rows of zeros and ones.
    """
    if values.dim() == 0 or not values.is_floating_point() or values.numel() == 0:
        return False
    rows = values.detach().movedim(dim, -1).flatten(0, -2) if values.dim() > 1 else values.detach()[None]
    if rows.shape[0] < 2 or rows.shape[1] < 2:
        return False
    tolerance = 1e-4 if values.dtype in (torch.float32, torch.float64) else 1e-2
    rows = rows.double()
    if bool((rows < 0).any()) or bool(((rows.sum(1) - 1).abs() > tolerance).any()):
        return False
    return not bool(((rows == 0) | (rows == 1)).all()) and not bool((rows == rows[0]).all())


def _before_softmax(call: Call) -> list[Finding]:
    name, last = CONTAIN_SOFTMAX[call.name], last_operation(call.input)
    if last == "Softmax" or (
        last not in ("LogSoftmax", "Sigmoid") and are_probabilities(call.input, class_dimension(call))
    ):
        return [
            Finding(
                "error", "output activation",
                f"the model's outputs are probabilities (a softmax), and {name} applies a softmax of its own: the loss "
                f"cannot fall below {_floor_of_double_softmax(call):.3g}, and its gradients are small",
                "give the loss the logits: remove the softmax from the model, and apply it to predictions only",
            )
        ]  # fmt: skip
    if last == "Sigmoid":
        return [
            Finding(
                "error", "output activation",
                f"the model ends in a sigmoid, and {name} expects logits of any size: between 0 and 1 they cannot tell "
                "classes apart",
                "remove the sigmoid; for several labels per sample keep the logits and use BCEWithLogitsLoss",
            )
        ]  # fmt: skip
    if last == "LogSoftmax" and call.name == "cross_entropy":
        return [
            Finding(
                "note", "output activation",
                "the model ends in a log-softmax, which cross_entropy applies again: the result is the same",
                "use NLLLoss, or remove the log-softmax from the model",
            )
        ]  # fmt: skip
    if last == "Relu":
        return [
            Finding(
                "warning", "output activation",
                f"the model ends in a ReLU, and {name} expects logits of either sign: outputs at 0 get no gradient",
                "remove the last ReLU",
            )
        ]  # fmt: skip
    return []


def _floor_of_double_softmax(call: Call) -> float:
    """-log softmax of a row with a single 1: log(1 + (C - 1) / e)."""
    classes = call.input.shape[class_dimension(call)]
    return float(torch.log1p(torch.tensor((classes - 1) / torch.e, dtype=torch.float64)))


def _before_sigmoid(call: Call) -> list[Finding]:
    last = last_operation(call.input)
    if last not in SQUASHING and not are_probabilities(call.input):
        return []
    kind = "sigmoid" if last == "Sigmoid" else "softmax"
    return [
        Finding(
            "error", "output activation",
            f"the model ends in a {kind}, and binary_cross_entropy_with_logits applies a sigmoid of its own: "
            "probabilities below 0.5 cannot come out",
            f"remove the {kind} from the model, and apply it to predictions only",
        )
    ]  # fmt: skip


def _log_probabilities(call: Call) -> list[Finding]:
    last, dim = last_operation(call.input), class_dimension(call)
    if last == "LogSoftmax" or call.input.numel() == 0:
        return []
    if call.name == "kl_div" and call.input.dim() < 2:
        return []
    wrong = None
    if last == "Softmax" or are_probabilities(call.input, dim):
        wrong = "probabilities (a softmax)"
    else:
        sums = call.input.detach().double().exp().sum(dim)
        if bool(((sums - 1).abs() > NEITHER).any()):
            wrong = f"not log-probabilities: their exponentials sum to {_range(sums)} instead of 1"
    if wrong is None:
        return []
    # kl_div is a loss for distributions over anything, along any dimension
    level: Level = "error" if call.name == "nll_loss" or last == "Softmax" else "warning"
    remedy = "use CrossEntropyLoss on the logits" if call.name == "nll_loss" else "give it log_softmax of the logits"
    return [
        Finding(
            level, "output activation", f"{call.name} expects log-probabilities, and the outputs are {wrong}",
            f"{remedy}, or end the model in a log-softmax" if call.name == "nll_loss" else remedy,
        )
    ]  # fmt: skip


def _probabilities(call: Call) -> list[Finding]:
    values = call.input.detach()
    if values.numel() == 0 or bool(((values >= 0) & (values <= 1)).all()) or bool(values.isnan().any()):
        return []
    return [
        Finding(
            "error", "output activation",
            f"binary_cross_entropy expects probabilities in [0, 1], and the outputs lie in {_range(values)}",
            "use BCEWithLogitsLoss on these outputs, or end the model in a sigmoid",
        )
    ]  # fmt: skip


def _range(values: Tensor) -> str:
    return f"[{float(values.min()):.4g}, {float(values.max()):.4g}]"
