# SPDX-License-Identifier: Apache-2.0
"""The states of an optimizer: which a parameter has, in which dtype and layout, and the master weights among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastloop.ops import backends, checks
from fastloop.ops.device import on_device
from fastloop.ops.native import native
from fastloop.ops.plan import Slots, StepPlan, local_shard
from fastloop.ops.reference import as_real, compute_dtype

HUGE_PAGE_BYTES = 4 * 2**20  # two huge pages: below that a state gains nothing from them


class StatefulOptimizer(Optimizer):
    """The part of FusedOptimizer that makes and keeps states.

    A subclass says what its rule needs: `_hyper` and `_structure` (see StepPlan), `_rule`, `_state_names` and
    `_counts_steps`.
    """

    _hyper: ClassVar[Sequence[tuple[str, int]]]
    _structure: ClassVar[Sequence[str]]
    _counts_steps: ClassVar[bool] = True  # whether the state has torch's "step"
    _serves_sparse: ClassVar[bool] = False  # whether a sparse gradient is stepped as its dense form

    # Defaults of everything private: pickle and deepcopy keep only defaults, state and param_groups.
    _plan: StepPlan | None = None
    _steps_done: Mapping[int, int] = MappingProxyType({})  # by id of the parameter, from plans that were dropped
    _device_counts: Mapping[int, Tensor] = MappingProxyType({})  # by id of the parameter: its count on its device
    _captured_plans: tuple[StepPlan, ...] = ()  # graphs that were captured address their memory
    _master_versions: tuple[list[Tensor], list[int]] | None = None

    # ---- what a subclass says

    def _rule(self, group: dict[str, Any]) -> str:
        raise NotImplementedError

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    # ---- the plan that knows their addresses

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

    # ---- making them

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

    def _drop_unused_states(self) -> None:
        """Without a count in the state, a buffer is what says that a first step has been done."""
        for _, p, names in self._unused_states():
            for name in names:
                self.state[p].pop(name, None)

    def _unused_states(self) -> list[tuple[int, Tensor, tuple[str, ...]]]:
        """Number, parameter and names of states that no step has used yet."""
        done = {} if self._plan is None else self._plan.steps_done()
        done.update(numbers(self._device_counts))
        members = ((p, group) for group in self.param_groups for p in group["params"])
        return [(i, p, self._state_names(group)) for i, (p, group) in enumerate(members) if done.get(id(p)) == 0]

    @property
    def skipped_steps(self) -> Tensor:
        """Number of skipped steps: int64, 0-dim, kept in the first group and so in the state_dict."""
        group = self.param_groups[0]
        count = group.get("skipped_steps")
        if not isinstance(count, Tensor):
            device = next((p.device for p in group["params"] if not p.is_meta), torch.device("cpu"))
            count = group["skipped_steps"] = torch.tensor(int(count or 0), dtype=torch.int64, device=device)
        return count

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


# ---- tensors


def step_tensor(count: float, p: Tensor, group: dict[str, Any], on_device: bool = False) -> Tensor:
    """torch's 0-dim count of steps, where torch keeps it; beside its parameter where a device counts."""
    on_device = on_device or bool(group.get("capturable") or group.get("fused"))
    dtype = torch.float32 if group.get("fused") else scalar_dtype()
    return torch.full((), float(count), dtype=dtype, device=p.device if on_device else "cpu")


def scalar_dtype() -> torch.dtype:
    """dtype of torch's count of steps: float64 under a float64 default dtype."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def numbers(scalars: Mapping[Any, Tensor]) -> dict[Any, float]:
    """Values of scalars on devices, with one wait for each device."""
    by_device: dict[torch.device, list[Any]] = {}
    for key, scalar in scalars.items():
        by_device.setdefault(scalar.device, []).append(key)
    result: dict[Any, float] = {}
    for keys in by_device.values():
        stacked = torch.stack([scalars[key].detach().to(torch.float64) for key in keys])
        result.update(zip(keys, stacked.tolist(), strict=True))
    return result


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
