# SPDX-License-Identifier: Apache-2.0
"""The optimizer: whose parameters it has, learning rates for its kind, weight decay, gradients left over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastloop.checks.layers import named
from fastloop.findings import Finding

# Lowest and highest usual learning rate by the optimizer's name. Adam's highest and SGD's lowest are the documents'
# bounds for all; the others are around the defaults of torch and of the papers. Those left out (Adadelta, LBFGS, Rprop,
# Adafactor, Muon and others) have units of their own.
ADAM = (1e-6, 1e-2)
USUAL_RATES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam", "AMSGrad"), ADAM),
    "RMSprop": (1e-6, 1e-2),
    "Lion": (1e-7, 1e-3),
    "SGD": (1e-5, 1.0),
    "Adagrad": (1e-5, 0.1),
}


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> list[Finding]:
    """Parameters that nobody trains, learning rates out of the usual, weight decay that acts as L2, old gradients."""
    return check_parameters(model, optimizer) + check_rates(optimizer) + _weight_decay(optimizer) + _stale(model)


def check_parameters(model: nn.Module, optimizer: Optimizer) -> list[Finding]:
    """Parameters of the model that the optimizer does not have, and the other way round."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    known = {id(p) for p in model.parameters()}
    missing = [name for name, p in trained if id(p) not in held]
    findings = []
    if not trained:
        findings.append(Finding("error", "model", "no parameter requires a gradient", "unfreeze what is to be trained"))
    elif len(missing) == len(trained):
        what = "none of the model's parameters is in the optimizer"
        remedy = "make the optimizer after the model is whole and on its device: optimizer(model.parameters())"
        findings.append(Finding("error", "optimizer", what, remedy))
    elif missing:
        what = f"{len(missing)} of {len(trained)} trainable parameters are not in the optimizer: {named(missing)}"
        remedy = "give them to it (a layer that was replaced after it was made?), or requires_grad_(False)"
        findings.append(Finding("warning", "optimizer", what, remedy))
    if len(missing) < len(trained):
        strange = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
        if strange:
            what = f"it has {strange} parameters that are not the model's"
            remedy = "make it anew where layers were replaced; those of a criterion belong there"
            findings.append(Finding("note", "optimizer", what, remedy))
    return findings


def check_rates(optimizer: Optimizer) -> list[Finding]:
    """Learning rates out of the usual for the kind of optimizer."""
    findings = []
    name = type(optimizer).__name__
    usual = USUAL_RATES.get(name)
    highest = max((rate_of(group) for group in optimizer.param_groups), default=0.0)
    for number, group in enumerate(optimizer.param_groups):
        rate = rate_of(group)
        where = "learning rate" if len(optimizer.param_groups) == 1 else f"learning rate, group {number}"
        if rate == 0:
            findings.append(Finding("warning", where, "it is 0: the group is not trained", "give it a learning rate"))
        elif usual is not None and rate > usual[1]:
            what = f"{rate:g} is high for {name}, which is usually at most {usual[1]:g}"
            remedy = "start with 1e-3" if usual is ADAM else f"start below {usual[1] / 10:g}"
            findings.append(Finding("warning", where, what, f"{remedy}, or find it: fastloop.tune.lr_range_test"))
        elif usual is not None and rate < usual[0] and rate == highest:  # others are low on purpose
            what = f"{rate:g} is low for {name}, which is usually at least {usual[0]:g}"
            findings.append(Finding("note", where, what, "find it: fastloop.tune.lr_range_test"))
    return findings


def rate_of(group: dict[str, Any]) -> float:
    """The group's highest learning rate that is known: a schedule may have begun with a small one."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


def check_schedule(optimizer: Optimizer | None, schedule: Any) -> list[Finding]:
    """No schedule, in no way that can be seen."""
    scheduled = optimizer is not None and any("initial_lr" in group for group in optimizer.param_groups)
    if schedule is not None or scheduled:
        return []
    what = "the learning rate stays as it is"
    return [Finding("note", "schedule", what, "a decay gains accuracy: Loop(schedule='warmup_cosine')")]


def _weight_decay(optimizer: Optimizer) -> list[Finding]:
    if type(optimizer).__name__ != "Adam" or isinstance(optimizer, torch.optim.AdamW):
        return []
    rates = [group["weight_decay"] for group in optimizer.param_groups if not group.get("decoupled_weight_decay")]
    if not any(rates):
        return []
    what = f"weight_decay={max(rates):g} of Adam is added to the gradient, whose size Adam divides out again"
    return [
        Finding(
            "note", "optimizer", what, "use AdamW, which decays the weights themselves (Loshchilov and Hutter 2019)"
        )
    ]


def _stale(model: nn.Module) -> list[Finding]:
    held = [name for name, p in model.named_parameters() if _is_some(p.grad)]
    if not held:
        return []
    what = f"{len(held)} parameters hold gradients of before, which the first backward adds to"
    return [Finding("warning", "gradients", what, "call optimizer.zero_grad() before each backward; Loop does")]


def _is_some(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient.coalesce().values() if gradient.is_sparse else gradient).any())
