# SPDX-License-Identifier: Apache-2.0
"""state_dicts that torch's optimizers of the same names can load, and theirs loaded by ours."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastloop.ops.plan import local_shard
from fastloop.optim.settings import OUR_KEYS
from fastloop.optim.states import StatefulOptimizer, numbers, step_tensor


class LoadableOptimizer(StatefulOptimizer):
    """The part of FusedOptimizer that saves and loads."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's: `step` is on the CPU unless a group is fused or capturable; reading it waits for the device.

        SGD's momentum buffers of parameters whose every step was skipped are left out.
        """
        saved = super().state_dict()
        if self._counts_steps:
            return self._with_steps_on_the_cpu(saved)
        return self._without_unused_states(saved) if self._device_counts else saved

    def _without_unused_states(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The optimizer keeps them: a plan, or a graph that was captured, may have their addresses."""
        state = dict(saved["state"])
        for index, _, names in self._unused_states():
            if index in state:
                state[index] = {key: value for key, value in state[index].items() if key not in names}
        return {**saved, "state": state}

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
        for index, number in numbers(steps).items():
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
