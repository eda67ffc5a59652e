# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""The update rules: the reading of csrc/rules, where the formulas and their sources stand.

A rule is two functions and a line in RULES:
    prepare(row, t, COMPUTE) -> h     hyperparameters of step t (the first is 1), computed in double, rounded once
    step(p, g, s, h) -> p, s          elements of parameter, gradient and states, in the compute dtype
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from .layout import HYPER, HYPER_ADDRESS
from .memory import double, scalar


@triton.jit
def hyper(row, k):
    """Hyperparameter k of a row: the scalar on the device where there is one, else the row's own number."""
    return scalar(tl.load(row + HYPER_ADDRESS + k), double(row + HYPER + k))


@triton.jit
def one_minus_power(base, t):
    """1 - base^t in double, by squaring: 1 - b^(i+j) = x + y*(1 - x) with x = 1 - b^i and y = 1 - b^j.

    No step cancels, so the error is a few units for each bit of t. base^t itself would lose 1/(1 - base^t) of them.
    """
    y = 1.0 - base
    x = y * 0.0
    while t > 0:
        x = tl.where((t & 1) != 0, x + y * (1.0 - x), x)
        y = y * (2.0 - y)
        t = t >> 1
    return x


@triton.jit
def sqrt(x):
    """Rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Rounded to nearest."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def adam_prepare(row, t, COMPUTE: tl.constexpr):
    lr = hyper(row, 0)
    beta1 = hyper(row, 1)
    beta2 = hyper(row, 2)
    eps = hyper(row, 3)
    weight_decay = hyper(row, 4)
    decoupled = hyper(row, 5) != 0
    l2 = tl.where(decoupled, 0.0, weight_decay).to(COMPUTE)
    decay_factor = tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(COMPUTE)
    one_minus_beta1 = (1.0 - beta1).to(COMPUTE)
    one_minus_beta2 = (1.0 - beta2).to(COMPUTE)
    inv_sqrt_correction2 = (1.0 / tl.sqrt(one_minus_power(beta2, t))).to(COMPUTE)
    step_size = (lr / one_minus_power(beta1, t)).to(COMPUTE)
    return (
        l2,
        decay_factor,
        one_minus_beta1,
        beta2.to(COMPUTE),
        one_minus_beta2,
        inv_sqrt_correction2,
        eps.to(COMPUTE),
        step_size,
    )


@triton.jit
def adam_step(p, g, s, h):
    l2, decay_factor, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size = h
    g = tl.where(l2 != 0, g + l2 * p, g)  # not 0*p: a parameter may be -inf
    p = p * decay_factor
    m = s[0] + one_minus_beta1 * (g - s[0])
    v = beta2 * s[1] + one_minus_beta2 * g * g
    if len(s) == 3:
        second = tl.maximum(s[2], v, propagate_nan=tl.PropagateNan.ALL)
        states = (m, v, second)
    else:
        second = v
        states = (m, v)
    p = p - divide(step_size * m, sqrt(second) * inv_sqrt_correction2 + eps)
    return p, states


@triton.jit
def sgd_prepare(row, t, COMPUTE: tl.constexpr):
    lr = hyper(row, 0)
    momentum = hyper(row, 1)
    grad_weight = tl.where(t == 1, 1.0, 1.0 - hyper(row, 2))
    l2 = hyper(row, 3)
    nesterov = hyper(row, 4) != 0
    return lr.to(COMPUTE), momentum.to(COMPUTE), grad_weight.to(COMPUTE), l2.to(COMPUTE), nesterov


@triton.jit
def sgd_step(p, g, s, h):
    lr, momentum, grad_weight, l2, nesterov = h
    g = tl.where(l2 != 0, g + l2 * p, g)  # not 0*p: a parameter may be -inf
    if len(s) == 1:
        b = momentum * s[0] + grad_weight * g
        g = tl.where(nesterov, g + momentum * b, b)
        states = (b,)
    else:
        states = s
    return p - lr * g, states


@dataclass(frozen=True, slots=True)
class Rule:
    states: int  # arrays of state per parameter
    prepare: Any
    step: Any


RULES = {
    "adam": Rule(2, adam_prepare, adam_step),
    "adam_amsgrad": Rule(3, adam_prepare, adam_step),
    "sgd": Rule(0, sgd_prepare, sgd_step),
    "sgd_momentum": Rule(1, sgd_prepare, sgd_step),
}
