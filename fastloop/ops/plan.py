# SPDX-License-Identifier: Apache-2.0
"""A step over many parameters: planned once, checked and run at every step.

A `StepPlan` divides the parameters among the native kernels, devices and the reference. Where all are plain CPU
tensors, a step is one native call. Where all are on devices, a step launches and does not wait. Otherwise (DTensor
parameters on the CPU, gradients in another layout, a norm that spans processes, parameters that no kernel serves) the
same passes run one after the other, with the norm completed in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastloop.ops import reference
from fastloop.ops.backends import device_kernels
from fastloop.ops.checks import is_dense, same_strides
from fastloop.ops.device import DevicePart
from fastloop.ops.launches import DeviceBackend
from fastloop.ops.native import native

DONE, SKIPPED, STOPPED, STALE = range(4)  # csrc/bindings/py_plan.h: Outcome

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Group = dict[str, Any]
Scalar = float | Tensor | None


@dataclass(frozen=True, slots=True)
class Slots:
    """Which tensors one parameter's step touches, and with which rule."""

    param: Tensor
    group: int
    rule: str
    states: tuple[Tensor, ...]
    master: Tensor | None
    ema: Tensor | None
    step: Tensor | None  # torch's 0-dim count of steps; None for rules that publish none
    steps_done: int = 0  # the count where there is no `step`
    count: Tensor | None = None  # on a device: int64 count of updates


@dataclass(frozen=True, slots=True)
class Controls:
    """What every step is asked for beside the settings of the groups."""

    max_norm: float | None = None
    check_finite: bool = False  # all gradients must be finite, those outside the norm too
    stop_nonfinite: bool = False  # leave everything as it is and report STOPPED
    zero_grads: bool = False


@dataclass(slots=True)
class _Outside:
    """A parameter on the reference backend."""

    slots: Slots
    steps_done: int


@dataclass(slots=True)
class StepPlan:
    """The parameters of one optimizer, ready to step.

    Args:
        hyper: names of the rule's hyperparameters in its order, as (key, index); index -1 for a plain number.
        structure: keys of groups whose truth decides slots or backend; a change makes the plan stale.
        serves_sparse: a sparse gradient is stepped as its dense form; else it makes the plan stale.
        norm_group: process group over which the norm of plain parameters is summed.
    """

    hyper: Sequence[tuple[str, int]]
    structure: Sequence[str]
    serves_sparse: bool = False
    norm_group: Any = None
    norm: float | Tensor | None = None  # of the last step, before clipping; a tensor where it stays on a device
    direct: bool = True  # one native call does it all and reads .grad itself
    on_device: bool = False  # all parameters are on devices: a step launches, and waits for nothing
    _native: Any = None
    _kernel_params: list[Tensor] = field(default_factory=list)
    _devices: list[DevicePart] = field(default_factory=list)
    _outside: list[_Outside] = field(default_factory=list)
    _locals: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # DTensors and the shards that the plan knows
    _seen: Any = None  # what the plan was built from, where no native plan watches it
    _kinds: list[Any] = field(default_factory=list)  # over what norms are summed, see _reduction
    _home: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where they are added up
    _skipped: Tensor | None = None  # the count of skipped steps, where a device writes it

    # ---- building

    def build(self, groups: list[Group], state: dict[Any, Any], slots: Sequence[Slots], backend: str) -> None:
        """Divide `slots` among the kernels, devices and the reference and remember groups and state as they are."""
        for s in slots:
            local = local_shard(s.param)
            kernels = None if groups[s.group].get("differentiable") else device_kernels(backend, local.device)
            if kernels is not None and (part := self._device_part(kernels, local.device)) and _add(part.plan, s):
                part.params.append(s.param)
            elif kernels is None and self._serves(groups, s, backend) and _add(self._cpu_plan(), s):
                self._kernel_params.append(s.param)
            else:
                self._outside.append(_Outside(s, s.steps_done))
        self._devices = [part for part in self._devices if part.params]
        if not self._devices and backend in ("auto", "cpu") and not all(g.get("differentiable") for g in groups):
            self._cpu_plan()  # watches the groups, if only for a first gradient
        self._kinds = [None] if self.norm_group is not None else []
        # Of all parameters, planned here or not: another process may have a gradient where this one has none.
        for kind in (_reduction(p) for g in groups for p in g["params"]):
            if kind not in self._kinds:
                self._kinds.append(kind)
        if self._native is not None:
            self._native.finish(groups, state, _others(slots, self._kernel_params))
        if self._devices:
            self._skipped = _skipped_on(self._devices[0].device, groups)
        for i, part in enumerate(self._devices):
            kinds = [self._kinds.index(_reduction(p)) for p in part.params]
            part.finish(groups, state, _others(slots, part.params), kinds, self._skipped if i == 0 else None)
            part.reads_grads = _readable(part.params)
        touched = [t for s in slots for t in (s.param, *s.states, s.master, s.ema, s.step) if t is not None]
        self._locals = [(t, local_shard(t)) for t in touched if not _plain(t)]
        self.direct = self._may_be_direct()
        self.on_device = bool(self._devices) and self._native is None and not self._outside
        if self.on_device:
            self._home = self._devices[0].device
        else:
            self._home = next((local_shard(p).device for g in groups for p in g["params"]), torch.device("cpu"))
        if self._outside or (self._native is None and not self._devices):
            self._seen = self._fingerprint(groups, state)

    def _cpu_plan(self) -> Any:
        if self._native is None:
            module = native()
            self._native = None if module is None else module.Plan(list(self.hyper), list(self.structure))
        return self._native

    def _device_part(self, kernels: DeviceBackend, device: torch.device) -> DevicePart:
        for part in self._devices:
            if part.device == device:
                return part
        self._devices.append(DevicePart(kernels, device, self.hyper, self.structure))
        return self._devices[-1]

    def _serves(self, groups: list[Group], s: Slots, backend: str) -> bool:
        """Whether the CPU kernels may be asked."""
        cpu = local_shard(s.param).device.type == "cpu" and native() is not None
        return cpu and backend in ("auto", "cpu") and not groups[s.group].get("differentiable")

    def _may_be_direct(self) -> bool:
        spread = any(_process_groups(kind, self.norm_group) for kind in self._kinds)
        if self._native is None or self._devices or self._outside or spread:
            return False
        return _readable(self._kernel_params)

    def _fingerprint(self, groups: list[Group], state: dict[Any, Any]) -> Any:
        """Everything whose change makes the plan stale, as the native plan checks it for its own parameters."""
        planned = {id(p) for p in self._params()}
        return (
            [
                (
                    [(id(p), p.data_ptr() if _plain(p) else 0, p.dtype, p.stride()) for p in group["params"]],
                    [bool(group.get(key)) for key in self.structure],
                    group.get("ema_decay") is None,
                    [p.grad is None for p in group["params"] if id(p) not in planned],
                )
                for group in groups
            ],
            [(id(p), [(k, id(v)) for k, v in values.items()]) for p, values in state.items()],
        )

    @property
    def outside(self) -> list[Tensor]:
        """Parameters that the reference steps."""
        return [o.slots.param for o in self._outside]

    def _params(self) -> list[Tensor]:
        return [*self._kernel_params, *(p for part in self._devices for p in part.params), *self.outside]

    def release(self) -> None:
        """Before the plan is dropped."""
        for part in self._devices:
            part.release()

    @property
    def in_graph(self) -> bool:
        """Whether a captured graph may hold the addresses of this plan."""
        return any(part.in_graph for part in self._devices)

    @property
    def counts_skips(self) -> bool:
        """Whether a device counts the skipped steps."""
        return bool(self._devices)

    @property
    def skipped_flag(self) -> Tensor | None:
        """On a device: 1.0 if the last step was skipped, else 0.0, float64."""
        return self._devices[0].result[1] if self._devices else None

    def steps_done(self) -> dict[int, int]:
        """Updates done so far, by id of the parameter: what a rebuilt plan goes on from."""
        done = {id(o.slots.param): o.steps_done for o in self._outside}
        if self._native is not None:
            done |= dict(zip(map(id, self._kernel_params), self._native.steps_done(), strict=True))
        return done

    # ---- stepping

    def step(
        self, groups: list[Group], state: dict[Any, Any], c: Controls, scale: Scalar = None, found_inf: Scalar = None
    ) -> int:
        """Run one step. Returns DONE, SKIPPED, STOPPED or STALE; after the last two nothing was touched.

        Args:
            scale: the gradients were multiplied by it; None for 1.
            found_inf: above 0 skips the step.
        """
        if self.direct:
            outcome, self.norm = self._native.step(
                groups, state, scale, found_inf, c.check_finite, c.stop_nonfinite, c.zero_grads
            )
            if c.zero_grads and outcome in (DONE, SKIPPED):
                torch.autograd.graph.increment_version([g for p in self._kernel_params if (g := p.grad) is not None])
            return int(outcome)
        if self.on_device and not c.stop_nonfinite:
            return self._step_on_devices(groups, state, c, scale, found_inf)
        return self._step_in_parts(groups, state, c, scale, found_inf)

    def _step_on_devices(
        self, groups: list[Group], state: dict[Any, Any], c: Controls, scale: Scalar, found_inf: Scalar
    ) -> int:
        """Launch and go on: DONE says that the device has been told, not that the step was not skipped."""
        if self._locals_moved() or not self._refresh_devices(groups, state, c, scale, found_inf):
            return STALE
        clips = self._devices[0].plan.clips
        measured = clips or c.check_finite
        for part in self._devices:
            part.norm(measured)
        sums = [part.sums for part in self._devices]
        if measured and (len(self._devices) > 1 or any(_process_groups(kind, self.norm_group) for kind in self._kinds)):
            total = self._totals([torch.zeros(2, dtype=torch.float64, device=self._home) for _ in self._kinds])
            sums = [_moved(total, part.device) for part in self._devices]
        for part, its_sums in zip(self._devices, sums, strict=True):
            part.update(its_sums)
        self._after_devices(c)
        self.norm = self._devices[0].result[0] if clips else None
        return DONE

    def _refresh_devices(
        self, groups: list[Group], state: dict[Any, Any], c: Controls, scale: Scalar, found_inf: Scalar
    ) -> bool:
        """False: stale."""
        if groups[0].get("skipped_steps") is not self._skipped:
            return False
        for part in self._devices:
            if not part.reads_grads:
                part.reads_grads = _readable(part.params)  # gradients in another layout may do so no more
            grads = None if part.reads_grads else [_grad_like(p) for p in part.params]
            if not part.refresh(groups, state, grads, scale, found_inf, c.check_finite, c.zero_grads):
                return False
        return True

    def _after_devices(self, c: Controls) -> None:
        if c.zero_grads:
            for part in self._devices:
                part.zero_grads()
            torch.autograd.graph.increment_version(
                [g for part in self._devices for p in part.params if (g := p.grad) is not None]
            )

    def _locals_moved(self) -> bool:
        return any(local_shard(t) is not local for t, local in self._locals)

    def _step_in_parts(
        self, groups: list[Group], state: dict[Any, Any], c: Controls, grad_scale: Scalar, found_inf: Scalar
    ) -> int:
        if self._may_be_direct():  # gradients that came in another layout do so no more
            self.direct = True
            return self.step(groups, state, c, grad_scale, found_inf)
        if self._locals_moved():
            return STALE
        if self._seen is not None and self._seen != self._fingerprint(groups, state):
            return STALE
        if not self.serves_sparse and any(_is_sparse(p.grad) for p in self._params()):
            return STALE
        if self._devices and not self._refresh_devices(groups, state, c, grad_scale, found_inf):
            return STALE
        grads = [_grad_like(p) for p in self._kernel_params]
        if self._native is not None and not self._native.gather(groups, state, grads):
            return STALE
        outside = [(o, _local_grad(o.slots.param)) for o in self._outside]
        active = [(o, g) for o, g in outside if g is not None]
        measured = c.max_norm is not None or c.check_finite
        if self._devices and c.max_norm is not None:
            self._check_one_kind_of_device()
        squares, finite = self._measure(groups, grads, outside, c) if measured else (torch.zeros(()), True)
        scale = 1.0 if grad_scale is None else float(grad_scale)
        skip = found_inf is not None and float(found_inf) > 0
        norm = squares.sqrt() / abs(scale) if scale != 0 else squares * math.inf
        finite = finite and (not measured or math.isfinite(float(norm.detach())))
        outcome = DONE
        if skip or not finite:
            outcome = STOPPED if c.stop_nonfinite and not finite else SKIPPED
        if outcome == DONE:  # first what may still raise
            for o, g in active:
                self._step_outside(o, g, groups[o.slots.group], norm, scale)
        if self._native is not None:
            native_outcome, _ = self._native.update(
                float(squares.detach()), finite, measured, scale, skip, c.stop_nonfinite
            )
            assert native_outcome == outcome, (native_outcome, outcome)
        if outcome != STOPPED:
            for part in self._devices:
                total = torch.tensor([[float(squares.detach()), 0.0 if finite else math.nan]], dtype=torch.float64)
                part.norm(False)
                part.update(total.to(part.device))
        if c.zero_grads and outcome != STOPPED:
            self._zero_grads()
        self.norm = float(norm) if c.max_norm is not None else None
        return outcome

    def _check_one_kind_of_device(self) -> None:
        kinds = {local_shard(p).device.type for p in self._params()}
        if len(kinds) > 1:
            raise RuntimeError(
                f"[max_grad_norm] one norm over parameters on {' and '.join(sorted(kinds))} would make the step wait "
                "for the devices; give each kind of device an optimizer of its own"
            )

    def _totals(self, totals: list[Tensor]) -> Tensor:
        """Adds the devices' sums of this step to `totals`, one for each of `_kinds`, and sums them over processes.

        Every process makes the same sums in the same order, whatever gradients it has: they end in collectives.
        Float64 [kinds, 2]: squares of the scaled gradients in the norm, and of the others; on the first device.
        """
        for i, kind in enumerate(self._kinds):
            for part in self._devices:
                totals[i] = totals[i] + _moved(part.sums_of_kind(i), totals[i].device)
            for process_group in _process_groups(kind, self.norm_group):
                torch.distributed.all_reduce(totals[i], group=process_group)
        return torch.stack(totals) if totals else torch.zeros((1, 2), dtype=torch.float64, device=self._home)

    def _measure(
        self,
        groups: list[Group],
        grads: Sequence[Tensor | None],
        outside: Sequence[tuple[_Outside, Tensor | None]],
        c: Controls,
    ) -> tuple[Tensor, bool]:
        """Sum of squares of the scaled gradients in the norm, over all processes, and whether all are finite."""
        group_of = {id(p): g for g in groups for p in g["params"]}
        sums: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in self._kinds]
        pairs = [*zip(self._kernel_params, grads, strict=True), *((o.slots.param, g) for o, g in outside)]
        for p, g in pairs:
            in_norm, excluded = sums[self._kinds.index(_reduction(p))]
            if g is not None:
                (in_norm if group_of[id(p)].get("max_grad_norm") is not None else excluded).append(g)
        for part in self._devices:
            part.norm(True)
        home = self._home
        local = [torch.stack([_squares(i).to(home), _squares(e if c.check_finite else []).to(home)]) for i, e in sums]
        total = self._totals(local).sum(dim=0).cpu()
        return total[0], math.isfinite(float(total[0].detach())) and math.isfinite(float(total[1].detach()))

    def _step_outside(self, o: _Outside, grad: Tensor, group: Group, norm: Tensor, scale: float) -> None:
        s = o.slots
        factor: Any = (-1.0 if group["maximize"] else 1.0) / scale
        if group.get("max_grad_norm") is not None:
            factor = factor * torch.clamp(group["max_grad_norm"] / (norm + 1e-6), max=1.0)
            if not group["differentiable"]:
                factor = float(factor)
        changed = s.step is not None and float(s.step) != float(o.steps_done)
        t = (int(s.step) if s.step is not None and changed else o.steps_done) + 1
        with torch.set_grad_enabled(bool(group["differentiable"])):
            reference.update(
                s.rule,
                local_shard(s.param),
                grad,
                [local_shard(x) for x in s.states],
                None if s.master is None else local_shard(s.master),
                None if s.ema is None else local_shard(s.ema),
                _hyper_values(group, bool(group["differentiable"])),
                t,
                factor,
                group.get("max_grad_value"),
                group.get("ema_decay") or 0.0,
            )
        if s.step is not None:
            local_shard(s.step).fill_(t)
        o.steps_done = t

    def _zero_grads(self) -> None:
        with torch.no_grad():
            for p in self._params():
                if p.grad is not None:
                    p.grad.zero_()


def _add(plan: Any, s: Slots) -> bool:
    """Hand one parameter to a native plan; False if its kernels do not serve it."""
    local = local_shard(s.param)
    tensors = [local_shard(t) for t in (*s.states, s.master, s.ema) if t is not None]
    if plan is None or local.dtype not in NATIVE_DTYPES or not is_dense(local):
        return False
    if local.is_neg() or not all(same_strides(local, t) for t in tensors):
        return False
    return bool(
        plan.add(
            s.param,
            local,
            s.rule,
            [local_shard(t) for t in s.states],
            None if s.master is None else local_shard(s.master),
            None if s.ema is None else local_shard(s.ema),
            None if s.step is None else local_shard(s.step),
            s.steps_done,
            s.group,
            s.count,
        )
    )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`: between GPUs without waiting; a copy to the CPU has to arrive before it is read."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _others(slots: Sequence[Slots], params: Sequence[Tensor]) -> list[Tensor]:
    mine = {id(p) for p in params}
    return [s.param for s in slots if id(s.param) not in mine]


def _skipped_on(device: torch.device, groups: list[Group]) -> Tensor:
    """The optimizer's count of skipped steps, moved to where the device writes it."""
    count: Tensor = groups[0]["skipped_steps"]
    if count.device != device:
        count = groups[0]["skipped_steps"] = count.to(device, non_blocking=True)
    return count


_NO_SETTINGS = ("params", "param_names", "skipped_steps")


def _hyper_values(group: Group, differentiable: bool) -> Mapping[str, Any]:
    """The group's settings; tensors become numbers unless they are to be differentiated."""
    if differentiable:
        return group

    def number(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.item()
        return tuple(map(number, value)) if isinstance(value, (tuple, list)) else value

    return {key: number(value) for key, value in group.items() if key not in _NO_SETTINGS}


# ---- DTensor: kernels work on the local shards


def _plain(tensor: Tensor) -> bool:
    return not hasattr(tensor, "_local_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def _is_sparse(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout != torch.strided


def _is_foreign(param: Tensor) -> bool:
    """Whether the gradient cannot be read as an array of its parameter's layout."""
    grad = param.grad
    return grad is not None and (_is_sparse(grad) or grad.is_neg() or not same_strides(param, grad))


def _readable(params: Sequence[Tensor]) -> bool:
    """Whether kernels can read the gradients where they are."""
    return all(_plain(p) and not _is_foreign(p) for p in params)


def _local_grad(param: Tensor) -> Tensor | None:
    grad = param.grad
    if grad is None:
        return None
    if _is_sparse(grad):
        grad = grad.to_dense()
    if not _plain(param) and not _plain(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    local = local_shard(grad)
    if hasattr(local, "wait"):  # the result of a collective that may still be under way
        local = local.wait()
    return local.resolve_conj().resolve_neg()


def _grad_like(param: Tensor) -> Tensor | None:
    """The gradient in its parameter's layout: itself where it has it, else a copy."""
    grad = _local_grad(param)
    local = local_shard(param)
    if grad is None or same_strides(local, grad):
        return grad
    return torch.empty_strided(local.shape, local.stride(), dtype=grad.dtype, device=grad.device).copy_(grad.detach())


def _squares(grads: Sequence[Tensor]) -> Tensor:
    module = native()
    if module is not None and not any(g.requires_grad for g in grads):
        squares = module.norm(list(grads), 2.0)
        if squares is not None:
            return torch.tensor(squares, dtype=torch.float64)
    return reference.sum_of_squares(grads)


def _reduction(param: Tensor) -> Any:
    """Over what the squares of a parameter's gradient are summed: None for a plain tensor."""
    if _plain(param):
        return None
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    # not is_shard(), which is False for the strided shards of FSDP2 over tensor parallelism
    sharded = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return mesh, sharded


def _process_groups(kind: Any, norm_group: Any) -> list[Any]:
    if kind is None:
        return [] if norm_group is None else [norm_group]
    mesh, sharded = kind
    return [mesh.get_group(dim) for dim in sharded]
