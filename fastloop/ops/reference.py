# SPDX-License-Identifier: Apache-2.0
"""The update rules in plain torch, written for reading: the fallback for what no kernel serves.

A rule takes a parameter, its gradient and its states in the compute dtype (float64 for float64, else float32), the
hyperparameters of its group, and the number t of this step (the first is 1). It returns the new parameter and states.
Nothing is modified, so a rule can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Hyper = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor, Sequence[Tensor], Hyper, int], tuple[Tensor, list[Tensor]]]


def adam(p: Tensor, g: Tensor, s: Sequence[Tensor], h: Hyper, t: int) -> tuple[Tensor, list[Tensor]]:
    """Adam and AdamW, see csrc/rules/adam.h for the formula. States: m, v and, with amsgrad, the maximum of v."""
    lr, (beta1, beta2), eps, weight_decay = h["lr"], h["betas"], h["eps"], h["weight_decay"]
    if h["decoupled_weight_decay"]:
        p = p * (1 - lr * weight_decay)
    elif not _is_zero(weight_decay):
        g = g + weight_decay * p
    m = s[0] + (1 - beta1) * (g - s[0])
    v = beta2 * s[1] + (1 - beta2) * g * g
    states = [m, v]
    second = v
    if len(s) == 3:
        second = torch.maximum(s[2], v)
        states.append(second)
    denominator = second.sqrt() / (1 - beta2**t) ** 0.5 + eps
    return p - lr / (1 - beta1**t) * m / denominator, states


def sgd(p: Tensor, g: Tensor, s: Sequence[Tensor], h: Hyper, t: int) -> tuple[Tensor, list[Tensor]]:
    """SGD, see csrc/rules/sgd.h for the formula. State, with momentum: the momentum buffer.

    The first buffer is no function of the gradient to autograd: so in torch, and differentiable=True means as there.
    """
    if not _is_zero(h["weight_decay"]):
        g = g + h["weight_decay"] * p
    states = []
    if s:
        buffer = g.detach() if t == 1 else h["momentum"] * s[0] + (1 - h["dampening"]) * g
        g = g + h["momentum"] * buffer if h["nesterov"] else buffer
        states.append(buffer)
    return p - h["lr"] * g, states


def _is_zero(value: float | Tensor) -> bool:
    """Whether a term may be left out: 0 * p is not 0 for an infinite p. A tensor stays, for its gradient."""
    return not isinstance(value, Tensor) and value == 0


RULES: dict[str, Rule] = {"adam": adam, "adam_amsgrad": adam, "sgd": sgd, "sgd_momentum": sgd}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for 64-bit floats and complex128, float32 for all others."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of reals, as torch's optimizers treat them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares of all elements in float64, on the device of the first gradient."""
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for g in grads:
        total = total + as_real(g).to(torch.float64).square().sum().to(device)
    return total


def update(
    rule: str,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    master: Tensor | None,
    ema: Tensor | None,
    hyper: Hyper,
    t: int,
    grad_factor: float | Tensor,
    clip_value: float | None,
    ema_decay: float,
) -> None:
    """One parameter's step, in place: the reading of csrc/cpu/loops.h."""
    dtype = compute_dtype(param.dtype)
    copy = torch.is_grad_enabled()  # a graph keeps what it read; the storage is overwritten below
    p_storage, s_storage = as_real(param), [as_real(s) for s in states]
    p = (p_storage if master is None else as_real(master)).to(dtype, copy=copy)
    g = as_real(grad).to(dtype) * grad_factor
    if clip_value is not None:
        g = g.clamp(-clip_value, clip_value)
    p, new_states = RULES[rule](p, g, [s.to(dtype, copy=copy) for s in s_storage], hyper, t)
    for storage, new in zip(s_storage, new_states, strict=True):
        storage.copy_(new)
    if master is not None:
        as_real(master).copy_(p)
    p_storage.copy_(p)
    if ema is not None:
        seen = p if master is not None else p_storage.to(dtype)
        as_real(ema).copy_(ema_decay * as_real(ema) + (1 - ema_decay) * seen)
