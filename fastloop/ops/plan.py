# SPDX-License-Identifier: Apache-2.0
"""A step over many parameters: planned once, checked and run at every step.

A `StepPlan` divides the parameters among the native kernels and the reference. Where all are plain CPU tensors, a step
is one native call. Otherwise (DTensor parameters, gradients in another layout, a norm that spans processes, parameters
that no kernel serves) the same passes run one after the other, with the norm completed in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastloop.ops import reference
from fastloop.ops.backends import native
from fastloop.ops.checks import is_dense, same_strides

DONE, SKIPPED, STOPPED, STALE = range(4)  # csrc/bindings/py_plan.h: Outcome

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Group = dict[str, Any]


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


@dataclass(frozen=True, slots=True)
class Controls:
    """What a step is asked for beside the settings of the groups."""

    max_norm: float | None = None
    grad_scale: float = 1.0
    found_inf: bool = False
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
    norm: float | None = None  # of the last step, before clipping
    _native: Any = None
    _kernel_params: list[Tensor] = field(default_factory=list)
    _outside: list[_Outside] = field(default_factory=list)
    direct: bool = True  # one native call does it all and reads .grad itself
    _locals: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # DTensors and the shards that the plan knows
    _seen: Any = None  # what the plan was built from, where no native plan watches it

    # ---- building

    def build(self, groups: list[Group], state: dict[Any, Any], slots: Sequence[Slots], backend: str) -> None:
        """Divide `slots` among the kernels and the reference and remember groups and state as they are."""
        module = native() if backend in ("auto", "cpu") else None
        if module is not None and any(not g.get("differentiable") for g in groups):
            self._native = module.Plan(list(self.hyper), list(self.structure))
        elsewhere = []
        for s in slots:
            differentiable = bool(groups[s.group].get("differentiable"))
            if self._native is not None and not differentiable and self._add_native(s):
                self._kernel_params.append(s.param)
            else:
                self._outside.append(_Outside(s, s.steps_done))
                elsewhere.append(s.param)
        if self._native is not None:
            self._native.finish(groups, state, elsewhere)
        touched = [t for s in slots for t in (s.param, *s.states, s.master, s.ema, s.step) if t is not None]
        self._locals = [(t, local_shard(t)) for t in touched if not _plain(t)]
        self.direct = self._may_be_direct()
        if self._outside or self._native is None:
            self._seen = self._fingerprint(groups, state)

    def _may_be_direct(self) -> bool:
        if self._native is None or self._outside or self.norm_group is not None:
            return False
        return all(_plain(p) and not _is_foreign(p) for p in self._kernel_params)

    def _fingerprint(self, groups: list[Group], state: dict[Any, Any]) -> Any:
        """Everything whose change makes the plan stale, as the native plan checks it for its own parameters."""
        planned = {id(p) for p in (*self._kernel_params, *self.outside)}
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

    def _add_native(self, s: Slots) -> bool:
        local = local_shard(s.param)
        tensors = [local_shard(t) for t in (*s.states, s.master, s.ema) if t is not None]
        if local.device.type != "cpu" or local.dtype not in NATIVE_DTYPES or not is_dense(local):
            return False
        if local.is_neg() or not all(same_strides(local, t) for t in tensors):
            return False
        return bool(
            self._native.add(
                s.param,
                local,
                s.rule,
                [local_shard(t) for t in s.states],
                None if s.master is None else local_shard(s.master),
                None if s.ema is None else local_shard(s.ema),
                None if s.step is None else local_shard(s.step),
                s.steps_done,
                s.group,
            )
        )

    @property
    def outside(self) -> list[Tensor]:
        """Parameters that the reference steps."""
        return [o.slots.param for o in self._outside]

    def steps_done(self) -> dict[int, int]:
        """Updates done so far, by id of the parameter: what a rebuilt plan goes on from."""
        done = {id(o.slots.param): o.steps_done for o in self._outside}
        if self._native is not None:
            done |= dict(zip(map(id, self._kernel_params), self._native.steps_done(), strict=True))
        return done

    # ---- stepping

    def step(self, groups: list[Group], state: dict[Any, Any], c: Controls) -> int:
        """Run one step. Returns DONE, SKIPPED, STOPPED or STALE; after the last two nothing was touched."""
        if self.direct:
            outcome, self.norm = self._native.step(
                groups, state, c.grad_scale, c.found_inf, c.check_finite, c.stop_nonfinite, c.zero_grads
            )
            if c.zero_grads and outcome in (DONE, SKIPPED):
                torch.autograd.graph.increment_version([g for p in self._kernel_params if (g := p.grad) is not None])
            return int(outcome)
        return self._step_in_parts(groups, state, c)

    def _step_in_parts(self, groups: list[Group], state: dict[Any, Any], c: Controls) -> int:
        if self._may_be_direct():  # gradients that came in another layout do so no more
            self.direct = True
            return self.step(groups, state, c)
        if any(local_shard(t) is not local for t, local in self._locals):
            return STALE
        if self._seen is not None and self._seen != self._fingerprint(groups, state):
            return STALE
        if not self.serves_sparse and any(_is_sparse(p.grad) for p in (*self._kernel_params, *self.outside)):
            return STALE
        grads = [_grad_like(p) for p in self._kernel_params]
        if self._native is not None and not self._native.gather(groups, state, grads):
            return STALE
        outside = [(o, _local_grad(o.slots.param)) for o in self._outside]
        active = [(o, g) for o, g in outside if g is not None]
        measured = c.max_norm is not None or c.check_finite
        squares, finite = self._measure(groups, grads, outside, c) if measured else (torch.zeros(()), True)
        norm = squares.sqrt() / abs(c.grad_scale) if c.grad_scale != 0 else squares * math.inf
        finite = finite and (not measured or math.isfinite(float(norm.detach())))
        outcome = DONE
        if c.found_inf or not finite:
            outcome = STOPPED if c.stop_nonfinite and not finite else SKIPPED
        if outcome == DONE:  # first what may still raise
            for o, g in active:
                self._step_outside(o, g, groups[o.slots.group], norm, c)
        if self._native is not None:
            native_outcome, _ = self._native.update(
                float(squares.detach()), finite, measured, c.grad_scale, c.found_inf, c.stop_nonfinite, False
            )
            assert native_outcome == outcome, (native_outcome, outcome)
        if c.zero_grads and outcome != STOPPED:
            self._zero_grads()
        self.norm = float(norm) if c.max_norm is not None else None
        return outcome

    def _measure(
        self,
        groups: list[Group],
        grads: Sequence[Tensor | None],
        outside: Sequence[tuple[_Outside, Tensor | None]],
        c: Controls,
    ) -> tuple[Tensor, bool]:
        """Sum of squares of the scaled gradients in the norm, over all processes, and whether all are finite.

        Every process makes the same sums in the same order, whatever gradients it has: they end in collectives.
        """
        group_of = {id(p): g for g in groups for p in g["params"]}
        pairs = [*zip(self._kernel_params, grads, strict=True)]
        pairs += [(o.slots.param, g) for o, g in outside]
        sums: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        if self.norm_group is not None:
            sums[None] = ([], [])
        for p, g in pairs:
            in_norm, excluded = sums.setdefault(_reduction(p), ([], []))
            if g is not None:
                (in_norm if group_of[id(p)].get("max_grad_norm") is not None else excluded).append(g)
        total, others = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for kind, (in_norm, excluded) in sums.items():
            both = torch.stack([_squares(in_norm), _squares(excluded if c.check_finite else [])])
            for process_group in _process_groups(kind, self.norm_group):
                torch.distributed.all_reduce(both, group=process_group)
            total, others = total + both[0].cpu(), others + both[1].cpu()
        return total, math.isfinite(float(total.detach())) and math.isfinite(float(others.detach()))

    def _step_outside(self, o: _Outside, grad: Tensor, group: Group, norm: Tensor, c: Controls) -> None:
        s = o.slots
        factor: Any = (-1.0 if group["maximize"] else 1.0) / c.grad_scale
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
            for p in (*self._kernel_params, *self.outside):
                if p.grad is not None:
                    p.grad.zero_()


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
    sharded = tuple(i for i, placement in enumerate(placements) if placement.is_shard())
    return mesh, sharded


def _process_groups(kind: Any, norm_group: Any) -> list[Any]:
    if kind is None:
        return [] if norm_group is None else [norm_group]
    mesh, sharded = kind
    return [mesh.get_group(dim) for dim in sharded]
