# SPDX-License-Identifier: Apache-2.0
"""The oracle: what a step must compute, in numpy, from the formulas of the specification.

It shares no code with the package. Every rule is written once, with operators and numpy's ufuncs only, so
that the same lines serve twice:

* on float64 arrays (`np.longdouble` for float64 parameters) they give the exact value;
* on `tolerances.Rounded` operands they give the value and the bound of its rounding errors.

Every hyperparameter is rounded once (`scalar`), as the package promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Values = Any  # an ndarray of floats, or tolerances.Rounded
Scalar = Callable[[Any], Any]  # rounds a hyperparameter to what the kernel multiplies by
Rule = Callable[..., tuple[Values, dict[str, Values]]]


def exact(value: Any, condition: Any = 1.0) -> Any:
    """A hyperparameter as it is: the `scalar` of exact evaluation. `condition` matters to bounds alone."""
    return value


def double(value: Any, condition: Any = 1.0) -> Any:
    """The same in float64: exact enough, and faster, where float32 results are judged."""
    return np.float64(value)


def bias_correction(beta: Any, t: int) -> tuple[Any, Any]:
    """1 - beta^t, and by how much the difference magnifies a rounding error of beta^t."""
    correction = 1 - beta**t
    return correction, 1 + beta**t / correction


# -- gradients -----------------------------------------------------------------------------------------------


def total_norm(grads: Iterable[np.ndarray], norm_type: float = 2.0) -> np.floating:
    """(sum over all of |g|^p)^(1/p); max |g| for p = inf; 0 without elements."""
    flat = [np.abs(g).astype(np.longdouble).ravel() for g in grads]
    values = np.concatenate(flat) if flat else np.zeros(0, np.longdouble)
    if values.size == 0:
        return np.longdouble(0)
    if math.isinf(norm_type):
        return values.max()
    return (values**norm_type).sum() ** (np.longdouble(1) / norm_type)


def clip_factor(norm: Any, max_norm: float) -> Any:
    """clip = min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_."""
    return np.minimum(max_norm / (norm + 1e-6), 1.0)


def effective_gradient(
    grad: Values,
    *,
    inv_scale: Any = None,
    clip: Any = None,
    max_value: Any = None,
    maximize: bool = False,
) -> Values:
    """g = grad / grad_scale * clip, then clip by value, then the sign of maximize."""
    if inv_scale is not None:
        grad = grad * inv_scale
    if clip is not None:
        grad = grad * clip
    if max_value is not None:
        grad = np.minimum(np.maximum(grad, -max_value), max_value)
    return -grad if maximize else grad


# -- rules: (p, g, state, t, settings) -> (p, state) ---------------------------------------------------------


def adam(p: Values, g: Values, state: Mapping[str, Values], t: int, s: Mapping[str, Any],
         scalar: Scalar = exact) -> tuple[Values, dict[str, Values]]:  # fmt: skip
    """Adam with its decay added to the gradient, or decoupled (AdamW) where the setting says so.

    p = p * (1 - lr*wd)                              decoupled
    g = g + wd*p                                     else
    m = m + (1-b1)*(g - m)
    v = b2*v + (1-b2)*g*g
    p = p - lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)      amsgrad: max(v, earlier maxima) in place of v
    """
    wide = np.longdouble
    lr, wd, eps = wide(s["lr"]), wide(s["weight_decay"]), wide(s["eps"])
    b1, b2 = (wide(b) for b in s["betas"])
    m = state.get("exp_avg", p * 0)
    v = state.get("exp_avg_sq", p * 0)

    if wd != 0:
        if s["decoupled_weight_decay"]:
            p = p * scalar(1 - lr * wd)
        else:
            g = g + p * scalar(wd)
    m = m + (g - m) * scalar(1 - b1)
    v = v * scalar(b2) + g * scalar(1 - b2) * g
    after = {"exp_avg": m, "exp_avg_sq": v}
    if s["amsgrad"]:
        v = after["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", p * 0), v)
    correction1, condition1 = bias_correction(b1, t)
    correction2, condition2 = bias_correction(b2, t)
    denominator = np.sqrt(v) / scalar(np.sqrt(correction2), condition2) + scalar(eps)
    return p - m * scalar(lr / correction1, condition1) / denominator, after


def sgd(p: Values, g: Values, state: Mapping[str, Values], t: int, s: Mapping[str, Any],
        scalar: Scalar = exact) -> tuple[Values, dict[str, Values]]:  # fmt: skip
    """SGD with momentum; the first step with a parameter copies its gradient into the buffer, undampened.

    g = g + wd*p
    b = mu*b + (1-dampening)*g;  b = g at first
    g = g + mu*b (nesterov), or b
    p = p - lr*g
    """
    wide = np.longdouble
    lr, wd, mu, dampening = (wide(s[k]) for k in ("lr", "weight_decay", "momentum", "dampening"))
    after = {}
    if wd != 0:
        g = g + p * scalar(wd)
    if mu != 0:
        buffer = state.get("momentum_buffer")
        buffer = g if buffer is None else buffer * scalar(mu) + g * scalar(1 - dampening)
        after["momentum_buffer"] = buffer
        g = g + buffer * scalar(mu) if s["nesterov"] else buffer
    return p - g * scalar(lr), after


def ema(average: Values, p: Values, decay: float, scalar: Scalar = exact) -> Values:
    """ema = d*ema + (1-d)*p"""
    return average * scalar(np.longdouble(decay)) + p * scalar(1 - np.longdouble(decay))


# -- a whole optimizer over a dict of arrays -----------------------------------------------------------------


@dataclass
class Oracle:
    """An optimizer over named arrays: exact trajectories, no storage rounding.

    `settings` is one mapping for all parameters or, per name, one each. `max_norm` spans the parameters whose
    settings do not say `max_grad_norm=None` themselves.
    """

    rule: Rule
    params: dict[str, np.ndarray]
    settings: Mapping[str, Any]
    max_norm: float | None = None
    max_value: float | None = None
    ema_decay: float | None = None
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    averages: dict[str, np.ndarray] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    norm: Any = None

    def settings_of(self, name: str) -> Mapping[str, Any]:
        own = self.settings.get(name)
        return own if isinstance(own, Mapping) else self.settings

    def step(self, grads: Mapping[str, np.ndarray], grad_scale: float | None = None, found_inf: bool = False) -> None:
        inv_scale = None if grad_scale is None else 1 / np.longdouble(grad_scale)
        unit = 1 if inv_scale is None else inv_scale
        clip = None
        if self.max_norm is not None:
            normed = [n for n in grads if self.settings_of(n).get("max_grad_norm", self.max_norm) is not None]
            self.norm = total_norm([grads[n] * unit for n in normed])
            clip = clip_factor(self.norm, self.max_norm)
        if found_inf or (clip is not None and not np.isfinite(self.norm)):
            self.skipped += 1
            return
        for name, grad in grads.items():
            own = self.settings_of(name)
            clipped = own.get("max_grad_norm", self.max_norm) is not None
            g = effective_gradient(
                grad,
                inv_scale=inv_scale,
                clip=clip if clipped else None,
                max_value=self.max_value,
                maximize=own.get("maximize", False),
            )
            t = self.steps[name] = self.steps.get(name, 0) + 1
            before = self.params[name]
            self.params[name], self.state[name] = self.rule(before, g, self.state.get(name, {}), t, own)
            if self.ema_decay is not None:
                average = self.averages.get(name, before)
                self.averages[name] = ema(average, self.params[name], self.ema_decay)
