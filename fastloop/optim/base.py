# SPDX-License-Identifier: Apache-2.0
"""What every fastloop optimizer shares: a `torch.optim.Optimizer` whose step is one plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastloop.ops import checks
from fastloop.ops.plan import DONE, SKIPPED, STALE, STOPPED, Controls, StepPlan, local_shard
from fastloop.optim.ema import AveragingOptimizer
from fastloop.optim.loading import LoadableOptimizer
from fastloop.optim.settings import WHOLE_KEYS, check_group, check_numbers, check_served, check_settings


class FusedOptimizer(LoadableOptimizer, AveragingOptimizer):
    """Base of AdamW, Adam and SGD.

    A subclass says what its rule needs (see StatefulOptimizer). Everything else (clipping, AMP, EMA, master weights,
    checkpoints, backends) is here and in the bases.
    """

    _step_supports_amp_scaling = True

    # As torch's: a step divides gradients by `grad_scale` and is skipped where `found_inf` is above 0. Whoever sets
    # them deletes them.
    grad_scale: float | Tensor | None
    found_inf: float | Tensor | None

    _controls: tuple[Controls, Controls] | None = None  # of a step, and of one inside scaled_by()
    _norm: float | Tensor | None = None
    _found_inf: bool | Tensor | None = False
    _scaler_asks: bool = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **ours: Any) -> None:
        where = type(self).__name__
        settings = check_settings(where, defaults, ours)
        super().__init__(params, {**defaults, **settings})
        if defaults.get("fused") and defaults.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        if defaults.get("fused") and defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        measured = "max_grad_norm" if settings["max_grad_norm"] is not None else "error_if_nonfinite"
        if settings[measured] and settings["norm_group"] is None and _built_by_zero():
            raise ValueError(
                f"[{where}] {measured} under ZeroRedundancyOptimizer needs norm_group=, the process group over which "
                "the norm is summed: each rank sees a part of the parameters and would clip, or raise, by its own norm"
            )

    # ---- the step

    def _run_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        attributes = self.__dict__
        plan = attributes.get("_plan")
        if plan is None or not (plan.direct or (plan.on_device and not attributes["_controls"][0].stop_nonfinite)):
            self._step_slowly()
            return loss
        if self._swapped:
            raise RuntimeError(f"[{type(self).__name__}] step() inside ema_weights(): leave the context first")
        if self._master_versions is not None and self._masters_moved():
            self._sync_masters()
        if plan.on_device:
            _check_graph_capture(self)
        outcome = plan.step(
            self.param_groups,
            self.state,
            attributes["_controls"][self._scaler_asks],
            attributes.get("grad_scale"),
            attributes.get("found_inf"),
        )
        if outcome == DONE:
            self._norm = plan.norm
            self._found_inf = plan.skipped_flag if plan.on_device else False
            if self._master_versions is not None:
                self._remember_masters()
        elif outcome == STALE:
            self._step_slowly()
        else:
            self._after_skip(plan, outcome)
        return loss

    def _step_slowly(self) -> None:
        """The step with everything that is rare: building the plan, validation of changed settings."""
        if self._swapped:
            raise RuntimeError(f"[{type(self).__name__}] step() inside ema_weights(): leave the context first")
        _check_graph_capture(self)
        self._controls = self._current_controls()
        controls = self._controls[self._scaler_asks]
        for _ in range(2):
            if self._plan is None:
                self._build_plan()
            plan = self._plan
            assert plan is not None
            if self._master_versions is not None and self._masters_moved():
                self._sync_masters()
            if (not plan.on_device or controls.stop_nonfinite) and _is_capturing():
                raise RuntimeError(
                    f"[{type(self).__name__}] this step waits for the device and cannot be captured in a graph: "
                    "error_if_nonfinite=True, or parameters on the reference backend"
                )
            outcome = plan.step(
                self.param_groups,
                self.state,
                controls,
                self.__dict__.get("grad_scale"),
                self.__dict__.get("found_inf"),
            )
            if outcome != STALE:
                break
            self._forget_plan()
        else:
            raise RuntimeError(
                f"[{type(self).__name__}] parameters or settings change while they are being read; another thread?"
            )
        self._found_inf = plan.skipped_flag if plan.on_device and outcome == DONE else outcome != DONE
        if outcome == DONE:
            self._norm = plan.norm
            self._remember_masters()
        else:
            self._after_skip(plan, outcome)

    def _after_skip(self, plan: StepPlan, outcome: int) -> None:
        self._found_inf = True
        if outcome == STOPPED:
            for name in ("grad_scale", "found_inf"):  # torch's scaler would not come to delete them
                self.__dict__.pop(name, None)
            raise RuntimeError(
                f"[{type(self).__name__}] the gradients are not finite (total norm {plan.norm}) and "
                "error_if_nonfinite=True; nothing was changed, optimizer.nonfinite_parameters() names them"
            )
        assert outcome == SKIPPED, outcome
        self._norm = plan.norm
        if not plan.counts_skips:
            self.skipped_steps.add_(1)
        if not self._counts_steps:
            self._drop_unused_states()

    def _current_controls(self) -> tuple[Controls, Controls]:
        """Settings that hold for the whole optimizer, read and checked anew: of a step, and of one that a scaler asks.

        The fast path goes on with them; what groups say is read by the native plan at every step.
        """
        where = type(self).__name__
        max_norm = None
        for group in self.param_groups:
            check_group(where, group)
            check_numbers(where, group, self._hyper)
            given = group.get("max_grad_norm")
            if given is not None:
                if max_norm is not None and given != max_norm:
                    raise ValueError(
                        f"[{where}] max_grad_norm bounds the norm of the whole optimizer and must be the same in "
                        f"every group, or None to leave a group out; got {max_norm} and {given}"
                    )
                max_norm = given
        settings = self.defaults
        plain = Controls(
            max_norm=max_norm,
            check_finite=bool(settings.get("error_if_nonfinite")),
            stop_nonfinite=bool(settings.get("error_if_nonfinite")),
            zero_grads=bool(settings.get("zero_grads")),
        )
        return plain, replace(plain, check_finite=True)

    def scaled_by(self, scale: float | Tensor) -> AbstractContextManager[None]:
        """Steps inside unscale by `scale` and look for gradients that are not finite; for GradScaler.

        A `grad_scale` that is set already is multiplied by it. Afterwards there is none, as torch's scaler leaves it.
        """
        return _ScaledBy(self.__dict__, scale)

    def found_inf_of_last_step(self, device: torch.device) -> Tensor:
        """1.0 if the last step was skipped for gradients that were not finite, else 0.0; waits for no device."""
        if isinstance(self._found_inf, Tensor):
            blocking = device.type == "cpu"
            return self._found_inf.to(device=device, dtype=torch.float32, copy=True, non_blocking=not blocking)
        return torch.full((), float(bool(self._found_inf)), dtype=torch.float32, device=device)

    # ---- building the plan

    def _build_plan(self) -> None:
        where = type(self).__name__
        backend = self.defaults.get("backend", "auto")
        if _is_capturing():
            raise RuntimeError(
                f"[{where}] parameters, gradients or settings are not those of the last step, and a graph is being "
                "captured: make one step outside of the capture first"
            )
        checks.check_no_overlap(
            where,
            (
                local_shard(p)
                for g in self.param_groups
                for p in g["params"]
                if p.layout == torch.strided and _has_memory(p)
            ),
        )
        # Everything is checked before the first state is made.
        stepped = []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                grad = p.grad
                if grad is None and not self.state.get(p):
                    continue
                if grad is not None and grad.layout != torch.strided and self._serves_sparse:
                    grad = None
                if grad is not None:
                    checks.check_grad(where, p, grad)
                if p.is_meta and group["fused"]:
                    raise RuntimeError(
                        f"[{where}] `fused=True` requires all the params to be floating point Tensors of supported "
                        f"devices, got {p.dtype} on the meta device; materialize the model first"
                    )
                if not (p.is_floating_point() or p.is_complex()):
                    raise RuntimeError(f"[{where}] parameters must be floating-point or complex, got dtype {p.dtype}")
                if backend not in ("auto", "reference"):
                    check_served(where, p, backend, bool(group["differentiable"]))
                self._check_state(p, self._state_names(group))
                stepped.append((index, group, p))
        slots = [self._slots(index, group, p) for index, group, p in stepped]
        slots = self._with_device_counts(slots, backend)
        _ = self.skipped_steps  # there before a device writes it
        plan = StepPlan(self._hyper, self._structure, self._serves_sparse, self.defaults.get("norm_group"))
        plan.build(self.param_groups, self.state, slots, backend)
        self._plan = plan
        self._sync_masters()

    # ---- what a step leaves behind

    @property
    def grad_norm(self) -> Tensor | None:
        """Total norm of the last step's gradients, unscaled and before clipping; None without `max_grad_norm`.

        A 0-dim tensor, float32 (float64 if a parameter is). Reading it does not wait for the device.
        """
        norm = self._norm
        if norm is None:
            return None
        wide = any(p.dtype in (torch.float64, torch.complex128) for g in self.param_groups for p in g["params"])
        dtype = torch.float64 if wide else torch.float32
        return norm.to(dtype, copy=True) if isinstance(norm, Tensor) else torch.tensor(norm, dtype=dtype)

    def nonfinite_parameters(self) -> list[str] | list[int]:
        """The parameters whose gradients are not finite: names where the optimizer knows them, else numbers.

        A number counts the parameters in the order of the groups, from 0. Waits for the device.
        """
        names: list[Any] = []
        for group in self.param_groups:
            known = group.get("param_names")
            names += known if known is not None else range(len(names), len(names) + len(group["params"]))
        params = [p for group in self.param_groups for p in group["params"]]
        return [
            name
            for name, p in zip(names, params, strict=True)
            if p.grad is not None and not bool(torch.isfinite(_values(p.grad)).all())
        ]

    # ---- torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        where = type(self).__name__
        if isinstance(param_group, dict):
            for key in WHOLE_KEYS:
                if key in param_group and param_group[key] != self.defaults[key]:  # ZeRO repeats the defaults
                    raise ValueError(
                        f"[{where}] {key} holds for the whole optimizer and not for one group; pass it to {where}()"
                    )
            check_group(where, param_group)
        super().add_param_group(param_group)
        for key in WHOLE_KEYS:
            self.param_groups[-1].pop(key, None)
        if len(self.param_groups) == 1:
            _ = self.skipped_steps  # there from the start, so that a state_dict always has it
        self._forget_plan()


class _ScaledBy:
    """The context of FusedOptimizer.scaled_by; a generator would cost three times as much."""

    __slots__ = ("_attributes", "_scale")

    def __init__(self, attributes: dict[str, Any], scale: float | Tensor) -> None:
        self._attributes = attributes  # of the optimizer
        self._scale = scale

    def __enter__(self) -> None:
        earlier = self._attributes.get("grad_scale")
        self._attributes["grad_scale"] = self._scale if earlier is None else self._scale * earlier
        self._attributes["_scaler_asks"] = True

    def __exit__(self, *raised: object) -> None:
        self._attributes["_scaler_asks"] = False
        self._attributes.pop("grad_scale", None)


def _check_graph_capture(optimizer: Optimizer) -> None:
    if "capturable" not in optimizer.defaults:
        return  # SGD: torch's has no such setting, and may be captured
    name = "_accelerator_graph_capture_health_check"  # torch before 2.10 has it under CUDA's name
    getattr(optimizer, name, optimizer._cuda_graph_capture_health_check)()


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _has_memory(p: Tensor) -> bool:
    try:
        return local_shard(p).data_ptr() != 0
    except RuntimeError:  # fake and functional tensors have no address
        return False


def _values(grad: Tensor) -> Tensor:
    return grad._values() if grad.layout == torch.sparse_coo else grad


def _built_by_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer is constructing this optimizer for its part of the parameters."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    frames: Iterable[Any] = _callers(sys._getframe(1), 12)
    return any(type(f.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer" for f in frames)


def _callers(frame: Any, most: int) -> Iterator[Any]:
    for _ in range(most):
        if frame is None:
            return
        yield frame
        frame = frame.f_back
