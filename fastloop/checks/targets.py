# SPDX-License-Identifier: Apache-2.0
"""Targets against outputs: labels outside of the classes, types, shapes that are broadcast, the loss to begin with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloop.checks.activations import activation, class_dimension
from fastloop.checks.look import Call
from fastloop.findings import Finding

NUMBERS = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
TOO_HIGH = 2.0  # times the loss of equal probabilities
ONE_CLASS = "labels of the batch are"
FEW = 8  # samples, from which on a batch of one class is no chance

Judged = tuple[list[Finding], bool]


def examine(call: Call) -> Judged:
    """Findings on a loss that is about to be computed, and whether it can be."""
    if call.name == "difference":
        return _difference(call), True
    findings: list[Finding] = []
    can_be = True
    if call.name in ("cross_entropy", "nll_loss"):
        findings, can_be = _classes(call)
    elif call.name in BINARY:
        findings, can_be = _labels(call)
    elif call.name in NUMBERS:
        findings, can_be = _numbers(call)
    if can_be:
        ends_in = activation(call)
        findings = findings + ends_in
        can_be = not (call.name == "binary_cross_entropy" and ends_in)
    return findings, can_be


def check_initial_loss(calls: list[Call]) -> list[Finding]:
    """A first loss far above that of a model that knows nothing: log(classes), or log(2) for labels of 0 and 1."""
    for call in calls:
        expected = expected_loss(call)
        if expected is None or call.result is None or call.result.dim() > 0:
            continue
        value = float(call.result)
        if math.isfinite(value) and value > TOO_HIGH * expected:
            return [
                Finding(
                    "warning", "loss",
                    f"the loss begins at {value:.4g}, and that of equal probabilities is {expected:.4g}: the model is "
                    "sure of wrong answers before it has learned",
                    "normalize the inputs, and initialize the last layer with small weights",
                )
            ]  # fmt: skip
    return []


def expected_loss(call: Call) -> float | None:
    """Mean loss of equal probabilities: log(classes) or log(2); None where it depends on more."""
    options = call.options
    if options.get("reduction", "mean") != "mean" or options.get("weight") is not None:
        return None
    if call.name in ("cross_entropy", "nll_loss"):
        classes = call.input.shape[class_dimension(call)]
        return math.log(classes) if classes > 1 else None
    return math.log(2) if call.name in BINARY and options.get("pos_weight") is None else None


def labels_of_classes(call: Call) -> Tensor | None:
    """The classes that a loss was computed for, those ignored left out."""
    if call.target is None or call.target.is_floating_point() or call.name not in ("cross_entropy", "nll_loss"):
        return None
    return call.target[call.target != call.options.get("ignore_index", -100)]


# ---- classes


def _classes(call: Call) -> Judged:
    outputs, target = call.input, call.target
    assert target is not None
    classes = outputs.shape[class_dimension(call)] if outputs.dim() else 0
    if outputs.dim() and classes == 1:
        return _error(
            "targets", f"{call.name} over a single class is always 0 (outputs {_shape(outputs)})",
            "use BCEWithLogitsLoss for one output, or give the model an output for each class",
        ), True  # fmt: skip
    if target.is_floating_point():
        return _class_probabilities(call)
    wanted = outputs.shape[:1] + outputs.shape[2:] if outputs.dim() > 1 else torch.Size([])
    if target.shape != wanted:
        return _error("targets", _shapes(call, wanted), _remedy_of_shape(outputs, target)), False
    if target.dtype not in (torch.int64, torch.uint8):
        return _error(
            "targets", f"{call.name} takes labels of int64, got {target.dtype}", "give it target.long()"
        ), False
    labels = labels_of_classes(call)
    assert labels is not None
    if labels.numel() == 0:
        return [Finding("warning", "targets", "every label of the batch is ignored: the loss is NaN")], True
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        from_one = low == 1 and high == classes
        remedy = "labels begin at 0: subtract 1" if from_one else f"labels must lie in 0..{classes - 1}"
        return _error("targets", f"labels lie in {low}..{high}, and the model has {classes} outputs", remedy), False
    if labels.numel() >= FEW and low == high:
        what = f"all {labels.numel()} {ONE_CLASS} {low}"
        return [
            Finding("warning", "targets", what, "shuffle the training data, and look at how the labels are made")
        ], True
    return [], True


def _class_probabilities(call: Call) -> Judged:
    outputs, target = call.input, call.target
    assert target is not None
    if target.shape == outputs.shape and call.name == "cross_entropy":
        sums = target.double().sum(class_dimension(call))
        if bool((target < 0).any()) or bool(((sums - 1).abs() > 1e-2).any()):
            what = f"targets are class probabilities, and sum to {float(sums.min()):.4g}..{float(sums.max()):.4g}"
            return [Finding("warning", "targets", what, "divide each by its sum, or give class indices")], True
        return [], True
    remedy = (
        "give it target.long()" if target.dim() == outputs.dim() - 1 else "give class indices of int64, one a sample"
    )
    return _error("targets", f"{call.name} takes labels of int64, got {target.dtype} {_shape(target)}", remedy), False


def _remedy_of_shape(outputs: Tensor, target: Tensor) -> str:
    if target.dim() == outputs.dim() and target.shape[1:2] == (1,):
        return "give it target.squeeze(1)"
    if target.shape == outputs.shape:
        return "give it target.float() for probabilities (one-hot), or target.argmax(1)"
    if target.shape == outputs.shape[:-1]:
        return "the classes are dimension 1: give it outputs.flatten(0, -2) and target.flatten()"
    return "make the target the outputs' shape without its dimension 1"


# ---- labels of 0 and 1


def _labels(call: Call) -> Judged:
    outputs, target = call.input, call.target
    assert target is not None
    if target.shape != outputs.shape:
        remedy = "make them one shape, e.g. outputs.squeeze(1)"
        if outputs.dim() == target.dim() + 1 and outputs.shape[1] > 1 and not target.is_floating_point():
            remedy = "one class of several is for CrossEntropyLoss"
        return _error("targets", _shapes(call, outputs.shape), remedy), False
    if not target.is_floating_point():
        return _error("targets", f"{call.name} takes floats, got {target.dtype}", "give it target.float()"), False
    if target.numel() and not bool(((target >= 0) & (target <= 1)).all()):
        what = f"{call.name} takes labels in [0, 1], got {float(target.min()):.4g}..{float(target.max()):.4g}"
        return _error("targets", what, "map them to 0 and 1; for -1 and 1: (target + 1) / 2"), False
    findings = []
    if call.name == "binary_cross_entropy" and target.dtype != outputs.dtype and target.dtype == torch.float64:
        what = f"targets are {target.dtype}, outputs {outputs.dtype}: backward raises"
        findings = _error("targets", what, "give it target.float()")
    if target.dim() == 2 and target.shape[1] > 2 and target.shape[0] >= FEW and _is_one_hot(target):
        what = "each sample has exactly one label: a loss over the classes together knows that, this one does not"
        findings = [*findings, Finding("note", "targets", what, "use CrossEntropyLoss with class indices")]
    return findings, True


def _is_one_hot(target: Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all()) and bool((target.sum(1) == 1).all())


# ---- numbers


def _numbers(call: Call) -> Judged:
    outputs, target = call.input, call.target
    assert target is not None
    if target.shape == outputs.shape:
        return [], True
    if (
        outputs.dim() == 2
        and outputs.shape[1] > 1
        and target.shape == outputs.shape[:1]
        and not target.is_floating_point()
    ):
        return _error("targets", f"{call.name} is given class labels {_shape(target)} for outputs {_shape(outputs)}",
                      "use CrossEntropyLoss"), False  # fmt: skip
    try:
        together = tuple(torch.broadcast_shapes(outputs.shape, target.shape))
    except RuntimeError:
        return _error("targets", _shapes(call, outputs.shape), "make them one shape"), False
    if target.numel() == 1:  # one number for all: real or fake, say
        return [], True
    what = f"{call.name} of outputs {_shape(outputs)} and targets {_shape(target)} is broadcast to {together}"
    remedy = "make them one shape, e.g. outputs.squeeze(-1) or targets.unsqueeze(-1)"
    if together in (tuple(outputs.shape), tuple(target.shape)):
        return [Finding("warning", "targets", what, f"unless that is meant, {remedy}")], True
    return _error("targets", f"{what}: each output is compared with the targets of other samples", remedy), True


def _difference(call: Call) -> list[Finding]:
    """[N, 1] minus [N]: [N, N], in a loss written by hand."""
    assert call.target is not None
    first, second = sorted((call.input.shape, call.target.shape), key=len)
    if len(first) != 1 or first[0] < 2 or second != (first[0], 1):
        return []
    what = f"{_shape(call.input)} minus {_shape(call.target)} is broadcast to {(first[0], first[0])}"
    return [Finding("warning", "targets", what, "unless that is meant, make them one shape, e.g. outputs.squeeze(-1)")]


def _shapes(call: Call, wanted: torch.Size) -> str:
    assert call.target is not None
    return (
        f"{call.name} of outputs {_shape(call.input)} takes targets of shape {tuple(wanted)}, got {_shape(call.target)}"
    )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _error(where: str, what: str, remedy: str) -> list[Finding]:
    return [Finding("error", where, what, remedy)]
