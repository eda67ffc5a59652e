# SPDX-License-Identifier: Apache-2.0
"""What every fastloop optimizer shares: a `torch.optim.Optimizer` whose step is one plan."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, ParamsT

from fastloop.ops import backends, checks
from fastloop.ops.device import on_device
from fastloop.ops.native import native
from fastloop.ops.plan import DONE, NATIVE_DTYPES, SKIPPED, STALE, STOPPED, Controls, Slots, StepPlan, local_shard
from fastloop.ops.reference import as_real, compute_dtype

# Keys of a group that are ours; a checkpoint of torch's has none of them.
OUR_KEYS = ("max_grad_norm", "max_grad_value", "ema_decay")
# Settings of the whole optimizer: in `defaults`, where pickle and deepcopy keep them, but not in the groups.
WHOLE_KEYS = ("error_if_nonfinite", "norm_group", "state_dtype", "master_weights", "zero_grads", "backend")
# How torch's errors call a hyperparameter; code and tests search for its words.
TORCH_WORDS = {"lr": "learning rate", "eps": "epsilon value"}
HUGE_PAGE_BYTES = 4 * 2**20  # two huge pages: below that a state gains nothing from them


def hooked_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own hooks and profiler record around `step`, entered only when one of them is there.

    torch patches the step of every optimizer class with a wrapper that costs 7 us without any hook. A step that is
    marked as hooked is left alone, so the hooks fire once, here.
    """
    with_hooks = Optimizer.profile_hook_step(step)
    profiler = torch.autograd.profiler
    global_pre, global_post = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self).step is wrapper and (  # else a subclass's own step, which torch has hooked, is calling this one
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or global_pre
            or global_post
            or profiler._is_profiler_enabled
        ):
            return with_hooks(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]
    _keep_dynamo_out(wrapper)
    return wrapper


def _keep_dynamo_out(step: Any) -> None:
    """torch.compile breaks its graph at `step` and looks at nothing below it; at no cost to a step outside of it.

    A decorator from torch.compiler would do the same for half a microsecond a call.
    """
    step._torchdynamo_disable = True
    step._torchdynamo_disable_msg = "an optimizer of fastloop steps in one native call"
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:
        return  # it then tries, and breaks the graph all the same
    set_code_exec_strategy(step.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


class FusedOptimizer(Optimizer):
    """Base of AdamW, Adam and SGD.

    A subclass says what its rule needs: `_hyper` and `_structure` (see StepPlan), `_rule`, `_state_names` and
    `_counts_steps`. Everything else (clipping, AMP, EMA, master weights, checkpoints, backends) is here.
    """

    _step_supports_amp_scaling = True

    _hyper: ClassVar[Sequence[tuple[str, int]]]
    _structure: ClassVar[Sequence[str]]
    _counts_steps: ClassVar[bool] = True  # whether the state has torch's "step"
    _serves_sparse: ClassVar[bool] = False  # whether a sparse gradient is stepped as its dense form

    # Defaults of everything private: pickle and deepcopy keep only defaults, state and param_groups.
    _plan: StepPlan | None = None
    _steps_done: Mapping[int, int] = MappingProxyType({})  # by id of the parameter, from plans that were dropped
    _device_counts: Mapping[int, Tensor] = MappingProxyType({})  # by id of the parameter: its count on its device
    _captured_plans: tuple[StepPlan, ...] = ()  # graphs that were captured address their memory
    _controls: Controls | None = None
    _norm: float | Tensor | None = None
    _found_inf: bool | Tensor | None = False
    _scaler_asks: bool = False
    _swapped: bool = False
    _master_versions: tuple[list[Tensor], list[int]] | None = None

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

    # ---- what a subclass says

    def _rule(self, group: dict[str, Any]) -> str:
        raise NotImplementedError

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    # ---- the step

    def _run_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        attributes = self.__dict__
        plan = attributes.get("_plan")
        if (
            plan is None
            or not (plan.direct or plan.on_device)
            or "grad_scale" in attributes
            or "found_inf" in attributes
            or self._scaler_asks
        ):
            self._step_slowly()
            return loss
        if self._swapped:
            raise RuntimeError(f"[{type(self).__name__}] step() inside ema_weights(): leave the context first")
        if self._master_versions is not None and self._masters_moved():
            self._sync_masters()
        if plan.on_device:
            _check_graph_capture(self)
        outcome = plan.step(self.param_groups, self.state, attributes["_controls"])
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
        """The step with everything that is rare: building the plan, AMP, validation of changed settings."""
        if self._swapped:
            raise RuntimeError(f"[{type(self).__name__}] step() inside ema_weights(): leave the context first")
        _check_graph_capture(self)
        controls = self._current_controls()
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
            outcome = plan.step(self.param_groups, self.state, controls)
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

    def _drop_unused_states(self) -> None:
        """Without a count in the state, a buffer is what says that a first step has been done."""
        done = {} if self._plan is None else self._plan.steps_done()
        done.update(_numbers(self._device_counts))
        for group in self.param_groups:
            for p in group["params"]:
                if done.get(id(p)) == 0:
                    for name in self._state_names(group):
                        self.state[p].pop(name, None)

    def _current_controls(self) -> Controls:
        """Settings that hold for the whole optimizer, read and checked anew."""
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
        fixed = Controls(
            max_norm=max_norm,
            check_finite=bool(settings.get("error_if_nonfinite")),
            stop_nonfinite=bool(settings.get("error_if_nonfinite")),
            zero_grads=bool(settings.get("zero_grads")),
        )
        self._controls = fixed  # what the fast path uses; the native plan reads the groups itself
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None and not self._scaler_asks:
            return fixed
        return Controls(
            max_norm=max_norm,
            grad_scale=1.0 if scale is None else scale,
            found_inf=False if found is None else found,
            check_finite=fixed.check_finite or self._scaler_asks,
            stop_nonfinite=fixed.stop_nonfinite,
            zero_grads=fixed.zero_grads,
        )

    @contextmanager
    def scaled_by(self, scale: Tensor) -> Iterator[None]:
        """Steps inside unscale by `scale` and look for gradients that are not finite; for GradScaler."""
        earlier = getattr(self, "grad_scale", None)
        self.grad_scale = scale if earlier is None else scale * earlier
        self._scaler_asks = True
        try:
            yield
        finally:
            self._scaler_asks = False
            self.__dict__.pop("grad_scale", None)

    def found_inf_of_last_step(self, device: torch.device) -> Tensor:
        """1.0 if the last step was skipped for gradients that were not finite, else 0.0; waits for no device."""
        if isinstance(self._found_inf, Tensor):
            blocking = device.type == "cpu"
            return self._found_inf.to(device=device, dtype=torch.float32, copy=True, non_blocking=not blocking)
        return torch.full((), float(bool(self._found_inf)), dtype=torch.float32, device=device)

    # ---- building the plan

    def _forget_plan(self) -> None:
        """Drop addresses; the counts of steps that no tensor of the state publishes stay."""
        plan = self.__dict__.get("_plan")
        if plan is not None:
            self._steps_done = {**self._steps_done, **plan.steps_done()}
            plan.release()
            if plan.in_graph:
                self._captured_plans = (*self._captured_plans, plan)
        self._plan = None
        self._master_versions = None

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

    def _check_state(self, p: Tensor, names: tuple[str, ...]) -> None:
        """Raise if a state that was loaded or replaced does not fit its parameter."""
        for name in (*names, "master_param", "ema"):
            value = self.state.get(p, {}).get(name)
            if value is None:
                continue
            shape = as_real(p).shape if name == "ema" else p.shape
            if not isinstance(value, Tensor) or value.shape != shape or value.device != p.device:
                found = f"{tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
                raise RuntimeError(
                    f"[{type(self).__name__}] state {name!r} must have its parameter's shape {tuple(shape)} and device "
                    f"{p.device}, got {found}"
                )

    def _slots(self, index: int, group: dict[str, Any], p: Tensor) -> Slots:
        """The parameter's state, made where it is missing."""
        state = self.state.get(p, {})  # entered below: as in torch, a parameter without states has no entry
        names = self._state_names(group)
        done = 0
        device = local_shard(p).device
        if self._counts_steps:
            kernels = backends.device_kernels(self.defaults.get("backend", "auto"), device)
            if not isinstance(state.get("step"), Tensor):
                state["step"] = step_tensor(state.get("step", 0.0), p, group, on_device=kernels is not None)
            if kernels is not None and local_shard(state["step"]).device != device:
                state["step"] = state["step"].to(device, non_blocking=True)
            if kernels is None:
                done = self._steps_done.get(id(p), int(state["step"]))
        elif names and state.get(names[0]) is not None:
            done = self._steps_done.get(id(p), 1)
        copies = compute_dtype(p.dtype)
        has_master = bool(self.defaults.get("master_weights")) and p.dtype in (torch.bfloat16, torch.float16)
        for name in names:
            if state.get(name) is None:
                state[name] = zeros_like(p, self._dtype_of_states(p))
            else:
                loaded = state[name].to(copies) if has_master else state[name]  # master weights mean float32 states
                state[name] = laid_out_as(loaded, p)
        if has_master:
            if "master_param" not in state:
                state["master_param"] = p.detach().to(copies, memory_format=torch.preserve_format)
            state["master_param"] = laid_out_as(state["master_param"].to(copies), p)
        if group.get("ema_decay") is not None:
            if "ema" not in state:
                start = state.get("master_param", p).detach()
                state["ema"] = as_real(start).to(copies).clone(memory_format=torch.preserve_format)
            state["ema"] = laid_out_as(state["ema"].to(copies), as_real(p.detach()))
        if state:
            self.state[p] = state
        master = state["master_param"] if has_master else None
        return Slots(
            param=p,
            group=index,
            rule=self._rule(group),
            states=tuple(state[name] for name in names),
            master=master,
            ema=state.get("ema") if group.get("ema_decay") is not None else None,
            step=state.get("step") if self._counts_steps else None,
            steps_done=done,
        )

    def _with_device_counts(self, slots: list[Slots], backend: str) -> list[Slots]:
        """Slots of parameters on devices with the integer that counts their updates there.

        -1 differs from every count that a state publishes, which then wins.
        """
        new: dict[torch.device, list[Slots]] = {}
        for s in slots:
            device = local_shard(s.param).device
            if backends.device_kernels(backend, device) is None:
                continue
            count = self._device_counts.get(id(s.param))
            if count is None or count.device != device:
                new.setdefault(device, []).append(s)
        counts = dict(self._device_counts)
        for device, missing in new.items():
            start = torch.tensor([-1 if s.step is not None else s.steps_done for s in missing], dtype=torch.int64)
            counts |= zip((id(s.param) for s in missing), on_device(start, device).unbind(), strict=True)
        self._device_counts = counts
        return [replace(s, count=counts.get(id(s.param))) for s in slots]

    def _dtype_of_states(self, p: Tensor) -> torch.dtype:
        wanted = self.defaults.get("state_dtype")
        if p.is_complex():
            return p.dtype
        if wanted is not None:
            return wanted  # type: ignore[no-any-return]
        if self.defaults.get("master_weights") and p.dtype in (torch.bfloat16, torch.float16):
            return torch.float32
        return torch.float32 if p.dtype == torch.float16 else p.dtype  # fp16's range loses the second moment

    # ---- master weights: made anew where a parameter was changed from outside

    def _masters(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if "master_param" in self.state.get(p, ())]

    def _remember_masters(self) -> None:
        if self.defaults.get("master_weights"):
            params = self._masters() if self._master_versions is None else self._master_versions[0]
            self._master_versions = (params, [p._version for p in params])

    def _masters_moved(self) -> bool:
        assert self._master_versions is not None
        params, versions = self._master_versions
        return any(p._version != v for p, v in zip(params, versions, strict=True))

    @torch.no_grad()
    def _sync_masters(self) -> None:
        """Where a parameter is not its master's rounding, somebody wrote it: the master follows, element by element."""
        if not self.defaults.get("master_weights"):
            return
        for p in self._masters():
            master = self.state[p]["master_param"]
            changed = master.to(p.dtype) != p
            master.copy_(torch.where(changed, p.to(master.dtype), master))
        self._remember_masters()

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

    @property
    def skipped_steps(self) -> Tensor:
        """Number of skipped steps: int64, 0-dim, kept in the first group and so in the state_dict."""
        group = self.param_groups[0]
        count = group.get("skipped_steps")
        if not isinstance(count, Tensor):
            device = next((p.device for p in group["params"] if not p.is_meta), torch.device("cpu"))
            count = group["skipped_steps"] = torch.tensor(int(count or 0), dtype=torch.int64, device=device)
        return count

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

    # ---- EMA

    def ema_state_dict(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """`model.state_dict()` with the moving averages in the place of the parameters, and the live buffers.

        ema = ema_decay*ema + (1 - ema_decay)*p, kept in float32 (float64 for float64 parameters), starting at p.
        Averages come in that dtype, as copies; parameters without an average (frozen, or never stepped) as they are.

        Raises:
            RuntimeError: the optimizer was made without `ema_decay`.
        """
        self._check_has_ema()
        result = {}
        averaged = {id(p) for g in self.param_groups if g.get("ema_decay") is not None for p in g["params"]}
        for name, value in model.state_dict(keep_vars=True).items():
            ema = self.state.get(value, {}).get("ema") if id(value) in averaged else None
            if ema is not None:
                result[name] = (torch.view_as_complex(ema) if value.is_complex() else ema).clone()
            else:
                result[name] = value.detach() if isinstance(value, Tensor) else value
        return result

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """With the moving averages in the parameters; afterwards the parameters are as before, whatever happens.

        Raises:
            RuntimeError: the optimizer was made without `ema_decay`, or is inside this context already.
        """
        self._check_has_ema()
        if self._swapped:
            raise RuntimeError(f"[{type(self).__name__}] ema_weights() is active already")
        averaged = [
            p
            for g in self.param_groups
            if g.get("ema_decay") is not None
            for p in g["params"]
            if "ema" in self.state.get(p, ())
        ]
        with torch.no_grad():
            kept = [p.detach().clone() for p in averaged]
        self._swapped = True
        try:
            with torch.no_grad():
                for p in averaged:
                    as_real(p).copy_(self.state[p]["ema"])
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(averaged, kept, strict=True):
                    p.copy_(before)
            self._swapped = False

    def _check_has_ema(self) -> None:
        if all(group.get("ema_decay") is None for group in self.param_groups):
            raise RuntimeError(f"[{type(self).__name__}] keeps no moving average; pass ema_decay=, e.g. 0.999")

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

    def state_dict(self) -> dict[str, Any]:
        """As torch's: `step` is on the CPU unless a group is fused or capturable; reading it waits for the device.

        SGD's momentum buffers of parameters whose every step was skipped are left out.
        """
        if not self._counts_steps and self._device_counts:
            self._drop_unused_states()
        saved = super().state_dict()
        return self._with_steps_on_the_cpu(saved) if self._counts_steps else saved

    def _with_steps_on_the_cpu(self, saved: dict[str, Any]) -> dict[str, Any]:
        """torch's own optimizers read a count on a GPU once for each parameter and step, unless they are told."""
        steps = {}
        for group in saved["param_groups"]:
            if group.get("fused") or group.get("capturable"):
                continue
            for index in group["params"]:
                step = saved["state"].get(index, {}).get("step")
                if isinstance(step, Tensor) and local_shard(step).device.type not in ("cpu", "meta"):
                    steps[index] = step
        if not steps:
            return saved
        state = dict(saved["state"])
        for index, number in _numbers(steps).items():
            step = torch.full((), number, dtype=steps[index].dtype)
            state[index] = {**state[index], "step": step}
        return {**saved, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_plan()
        self._steps_done = {}
        self._device_counts = {}
        super().__setstate__(state)
        for group in self.param_groups:
            for key in OUR_KEYS:
                group.setdefault(key, self.defaults.get(key))
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)
        self._unwrap_loaded_state()
        for extra in self.param_groups[1:]:
            extra.pop("skipped_steps", None)  # groups that were put together from several optimizers
        _ = self.skipped_steps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of ours or of the torch optimizer of the same name.

        Every state keeps the dtype that it was saved with (torch casts to the parameter's, and so would round float32
        moments of bfloat16 parameters); float16 moments, which torch makes for float16 parameters, become float32.
        Settings that a checkpoint of torch's does not have stay as they were constructed.
        """
        kept = [{key: group[key] for key in OUR_KEYS if key in group} for group in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(_wrap_state)  # the last one: hooks of others see plain tensors
        fill = self.register_load_state_dict_pre_hook(functools.partial(_fill_groups, kept))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            fill.remove()

    def _unwrap_loaded_state(self) -> None:
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for param, values in self.state.items():
            if isinstance(param, Tensor) and isinstance(values, dict):
                group = group_of.get(id(param), {})
                for key, value in values.items():
                    if isinstance(value, _Kept):
                        values[key] = _placed(param, key, value.value, group)
                self._complete_state(param, values, group)

    def _complete_state(self, param: Tensor, values: dict[str, Any], group: dict[str, Any]) -> None:
        """A loaded count of steps may be a plain number."""
        if self._counts_steps and values and not isinstance(values.get("step"), Tensor):
            values["step"] = step_tensor(values.get("step", 0.0), param, group)


# ---- settings


def check_settings(where: str, defaults: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Our arguments, checked. Returns those that belong to defaults.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
        RuntimeError: a backend that cannot run here.
    """
    backends.check_backend(where, ours["backend"])
    check_group(where, {**defaults, **ours})
    state_dtype = ours["state_dtype"]
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"[{where}] state_dtype must be None (as torch), torch.float32 or torch.bfloat16, got {state_dtype!r}"
        )
    if ours["master_weights"] and state_dtype == torch.bfloat16:
        raise ValueError(
            f"[{where}] master_weights=True keeps float32 states, got state_dtype=torch.bfloat16; drop one of the two"
        )
    for name in ("error_if_nonfinite", "master_weights", "zero_grads"):
        if not isinstance(ours[name], bool):
            raise TypeError(f"[{where}] {name} must be a bool, got {ours[name]!r}")
    if ours["backend"] not in ("auto", "reference") and defaults.get("differentiable"):
        raise RuntimeError(
            f'[{where}] differentiable=True runs on the reference backend, got backend="{ours["backend"]}"; '
            'use backend="auto"'
        )
    return ours


def check_group(where: str, group: dict[str, Any]) -> None:
    """Check our settings of one group.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
    """
    for name in ("max_grad_norm", "max_grad_value"):
        value = group.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"[{where}] {name} must be a number or None, got {value!r}")
        if not value > 0:
            raise ValueError(f"[{where}] {name} must be above 0, or None for no clipping, got {value!r}")
    decay = group.get("ema_decay")
    if decay is not None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"[{where}] ema_decay must be a number or None, got {decay!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"[{where}] ema_decay must lie in [0, 1), got {decay!r}; pass e.g. 0.999")


def check_numbers(where: str, group: dict[str, Any], hyper: Sequence[tuple[str, int]]) -> None:
    """Raise TypeError if a hyperparameter of a group is no number: groups are edited by schedulers and by hand."""
    for key, index in hyper:
        value = group[key]
        try:
            number = value if index < 0 else value[index]
            if isinstance(number, Tensor) and number.numel() == 1 and not number.is_complex():
                continue  # its value may be on a device, and reading it would wait
            float(number)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            wanted = "a number" if index < 0 else "two numbers"
            raise TypeError(f"[{where}] {key} must be {wanted}, got {value!r} in a param group") from error


def check_served(where: str, p: Tensor, backend: str, differentiable: bool) -> None:
    """Raise if one backend was asked for and its kernels cannot serve the parameter."""
    local = local_shard(p)
    reason = None
    if backend == "cpu" and local.device.type != "cpu":
        reason = f"is on {local.device}"
    elif backend != "cpu" and backends.device_kernels(backend, local.device) is None:
        reason = f"is on {local.device}: {backends.why_not_on(backend, local.device)}"
    elif local.dtype not in NATIVE_DTYPES:
        reason = f"has dtype {local.dtype}"
    elif differentiable:
        reason = "is in a group with differentiable=True"
    if reason is not None:
        raise RuntimeError(
            f'[{where}] backend="{backend}" cannot step a parameter of shape {tuple(p.shape)} that {reason}; '
            'use backend="auto"'
        )


def check_number(where: str, name: str, value: Any, low: float, high: float | None, hint: str) -> None:
    """Raise ValueError unless low <= value (< high). Tensors of one element are numbers."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"[{where}] Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        value = value.detach().item()
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"[{where}] {name} must be a number, got {value!r}; pass e.g. {hint}")
    if not value >= low or (high is not None and not value < high) or math.isinf(value):
        bounds = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g})"
        as_torch = TORCH_WORDS.get(name, f"{name} value")
        raise ValueError(f"[{where}] Invalid {as_torch}: {value!r}; {name} must be {bounds}, pass e.g. {hint}")


def step_tensor(count: float, p: Tensor, group: dict[str, Any], on_device: bool = False) -> Tensor:
    """torch's 0-dim count of steps, where torch keeps it; beside its parameter where a device counts."""
    on_device = on_device or bool(group.get("capturable") or group.get("fused"))
    dtype = torch.float32 if group.get("fused") else scalar_dtype()
    return torch.full((), float(count), dtype=dtype, device=p.device if on_device else "cpu")


def scalar_dtype() -> torch.dtype:
    """dtype of torch's count of steps: float64 under a float64 default dtype."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


# ---- tensors


def _numbers(scalars: Mapping[Any, Tensor]) -> dict[Any, float]:
    """Values of scalars on devices, with one wait for each device."""
    by_device: dict[torch.device, list[Any]] = {}
    for key, scalar in scalars.items():
        by_device.setdefault(scalar.device, []).append(key)
    numbers: dict[Any, float] = {}
    for keys in by_device.values():
        stacked = torch.stack([scalars[key].detach().to(torch.float64) for key in keys])
        numbers.update(zip(keys, stacked.tolist(), strict=True))
    return numbers


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A zero state in the parameter's layout; large ones on huge pages where the system grants them."""
    module = native()
    bytes_ = p.numel() * dtype.itemsize
    if module is None or p.device.type != "cpu" or type(p.data) is not Tensor or bytes_ < HUGE_PAGE_BYTES:
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    state = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    module.advise_huge_pages(state.data_ptr(), bytes_)
    return state.zero_()


def laid_out_as(value: Tensor, p: Tensor) -> Tensor:
    """`value` in the strides of `p`: itself, or a copy where a checkpoint saved another layout."""
    if (
        not checks.is_dense(local_shard(p))
        or checks.same_strides(local_shard(value), local_shard(p))
        or value.shape != p.shape
    ):
        return value
    return torch.empty_like(p, dtype=value.dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(value)


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


# ---- loading without torch's cast to the parameter's dtype


class _Kept:
    """A tensor that torch's load_state_dict passes on as it is."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _wrap_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    del optimizer

    def wrap(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: _Kept(v) if isinstance(v, Tensor) else v for key, v in values.items()}

    return {**state_dict, "state": {k: wrap(v) for k, v in state_dict["state"].items()}}


def _fill_groups(kept: list[dict[str, Any]], optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    del optimizer
    groups = state_dict["param_groups"]
    if len(groups) != len(kept):
        return state_dict  # torch raises its own error
    return {**state_dict, "param_groups": [{**ours, **g} for ours, g in zip(kept, groups, strict=True)]}


def _placed(param: Tensor, key: str, value: Tensor, group: dict[str, Any]) -> Tensor:
    """A loaded tensor where torch would put it, in the dtype that it was saved with."""
    if key == "step":
        if group.get("capturable") or group.get("fused"):
            return value.to(dtype=torch.float32, device=param.device)
        return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)
    dtype = torch.float32 if value.dtype == torch.float16 else value.dtype
    return value.to(device=param.device, dtype=dtype)


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
