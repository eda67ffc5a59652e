# SPDX-License-Identifier: Apache-2.0
"""The end of a window: unscale, clip, skip what is not finite, update; with our optimizers in the step's own passes."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from fastloop.amp import GradScaler
from fastloop.clip import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from fastloop.ops.plan import local_shard
from fastloop.optim.base import FusedOptimizer

Scalar = float | Tensor


def weighted(value: Scalar, weight: Scalar) -> Scalar:
    """value * weight, and 0 for a weight of 0: a mean over nothing is NaN."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, value * weight)
    return value * weight if weight else 0.0


def updater(
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None,
    max_norm: float | None,
    max_value: float | None,
) -> OurUpdate | TorchUpdate:
    """How `optimizer` is stepped.

    Raises:
        TypeError: an optimizer that needs a closure.
        ValueError: bounds that contradict the optimizer's own.
    """
    step = inspect.signature(optimizer.step).parameters.get("closure")
    if step is not None and step.default is inspect.Parameter.empty:
        raise TypeError(
            f"[Loop] {type(optimizer).__name__}.step needs a closure that evaluates the model several times in one "
            "step, which windows, accumulation and exact resume cannot give it; write that loop by hand"
        )
    if isinstance(optimizer, FusedOptimizer):
        return OurUpdate(optimizer, scaler, max_norm, max_value)
    return TorchUpdate(optimizer, scaler, max_norm, max_value)


class OurUpdate:
    """A fastloop optimizer: everything happens in its two passes, on the device."""

    def __init__(
        self, optimizer: FusedOptimizer, scaler: GradScaler | None, max_norm: float | None, max_value: float | None
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self._set: dict[str, float] = {}
        for name, wanted in (("max_grad_norm", max_norm), ("max_grad_value", max_value)):
            # inf is no bound: an earlier Loop has left it there
            own = {float(g[name]) for g in optimizer.param_groups if g.get(name) not in (None, math.inf)}
            if wanted is not None and own and own != {wanted}:
                raise ValueError(
                    f"[Loop] {name}={wanted} here and {sorted(own)} in the optimizer; give it in one place"
                )
            if wanted is not None and not own:
                self._set[name] = float(wanted)
            elif name == "max_grad_norm" and not own:
                self._set[name] = math.inf  # measures, and so skips what is not finite; never clips
        self.settle()

    def settle(self) -> None:
        """Give the optimizer the bounds that Loop was given; again after its settings were loaded from a checkpoint."""
        for name, value in self._set.items():
            for group in self.optimizer.param_groups:
                group[name] = value
            self.optimizer.defaults[name] = value
        self.optimizer._forget_plan()

    def __call__(self, scale: Scalar, nothing: Scalar | bool = False) -> tuple[Scalar, Scalar]:
        """Step with the gradients divided by `scale`, not at all where `nothing`; returns norm and whether skipped."""
        optimizer = self.optimizer
        if nothing is not False:
            optimizer.found_inf = nothing
        if self.scaler is None and isinstance(scale, float) and scale == 1.0 and nothing is False:
            optimizer.step()
        else:
            optimizer.grad_scale = scale
            try:
                if self.scaler is None:
                    optimizer.step()
                else:
                    self.scaler.step(optimizer)
                    if isinstance(nothing, Tensor):
                        _no_overflow(self.scaler, optimizer, nothing)
                    self.scaler.update()
            finally:
                optimizer.__dict__.pop("grad_scale", None)
                optimizer.__dict__.pop("found_inf", None)
        norm, found = optimizer._norm, optimizer._found_inf
        if isinstance(norm, Tensor) and isinstance(found, Tensor):
            norm, found = torch.stack([norm, found]).unbind()  # the next step writes over its own
        return (math.nan if norm is None else norm), (float(found) if isinstance(found, bool) else found)  # type: ignore[arg-type,return-value]


def _no_overflow(scaler: GradScaler, optimizer: torch.optim.Optimizer, nothing: Tensor) -> None:
    """A window that weighs nothing is skipped for that, and says nothing about the scale."""
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for device in found:
        found[device] = found[device] * (1.0 - nothing.to(found[device].dtype))


def _lacks_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's fused SGD would make momentum buffers, which it leaves as they come if the step is skipped."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] and any(p.grad is not None and not optimizer.state.get(p) for p in group["params"])
        for group in optimizer.param_groups
    )


class TorchUpdate:
    """Any other optimizer: the gradients are scaled once and clipped by fastloop's kernels before its step.

    On a GPU, whether to skip is decided there for optimizers that take torch's `found_inf` (fused=True); for others the
    host has to ask the device.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: GradScaler | None,
        max_norm: float | None,
        max_value: float | None,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.max_norm = math.inf if max_norm is None else float(max_norm)
        self.max_value = max_value

    def settle(self) -> None:
        """As `OurUpdate`; the bounds are here and not in the optimizer."""

    def __call__(self, scale: Scalar, nothing: Scalar | bool = False) -> tuple[Scalar, Scalar]:
        """As `OurUpdate`."""
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        grads = [_elements(p) for p in params]
        if not (isinstance(scale, float) and scale == 1.0):
            _divide(grads, scale)
        norm = get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.max_norm != math.inf:
            clip_grads_with_norm_(params, self.max_norm, norm)
        if self.max_value is not None:
            clip_grad_value_([p for p in params if not p.grad.is_sparse], self.max_value)  # type: ignore[union-attr]
            for p, elements in zip(params, grads, strict=True):
                if p.grad is not None and p.grad.is_sparse:
                    elements.clamp_(-self.max_value, self.max_value)
        return self._step(norm, nothing)

    def _step(self, norm: Tensor, nothing: Scalar | bool) -> tuple[Scalar, Scalar]:
        optimizer = self.optimizer
        on_device = norm.device.type != "cpu" and all(g.get("fused") for g in optimizer.param_groups)
        if on_device and getattr(optimizer, "_step_supports_amp_scaling", False) and not _lacks_momentum(optimizer):
            skipped = (~torch.isfinite(norm)).float()
            if nothing is not False:
                skipped = torch.maximum(skipped, torch.as_tensor(nothing, dtype=torch.float32, device=norm.device))
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
            self._update_scale()
            return norm, skipped
        value = float(norm)
        skipped_here = not math.isfinite(value) or bool(nothing)
        if not skipped_here:
            optimizer.step()
        self._update_scale()
        return value, float(skipped_here)

    def _update_scale(self) -> None:
        if self.scaler is not None:
            self.scaler.update()  # unscale_ has looked for infinities already


def _elements(param: Tensor) -> Tensor:
    """The gradient's elements; of a sparse one, which adds up what it has twice first, those that it stores."""
    grad = param.grad
    assert grad is not None
    if not grad.is_sparse:
        return grad
    param.grad = grad.coalesce()
    return param.grad._values()


def _divide(grads: list[Tensor], scale: Scalar) -> None:
    with torch.no_grad():
        if isinstance(scale, float):
            factor: Any = 1.0 / scale
        else:
            factor = scale.reciprocal()
        by_kind: dict[Any, list[Tensor]] = {}
        for grad in grads:
            local = local_shard(grad)
            by_kind.setdefault((local.device, local.dtype), []).append(local)
        for (device, dtype), same in by_kind.items():
            if not isinstance(factor, Tensor):
                torch._foreach_mul_(same, factor)
                continue
            there = factor.to(device, non_blocking=True)
            if dtype in (torch.float32, torch.float64):
                torch._foreach_mul_(same, there.to(dtype))
            else:  # a factor of 8 bits would be off by up to 0.4 %
                for grad in same:
                    grad.copy_(grad.to(torch.float32) * there.to(torch.float32))


__all__ = ["OurUpdate", "TorchUpdate", "updater", "weighted"]
