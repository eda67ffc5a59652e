# SPDX-License-Identifier: Apache-2.0
"""Memory of a training by part: parameters, buffers, gradients, states, inputs, activations.

An estimate before the first step, from shapes and dtypes and from what one forward saves for its backward.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.bench.memory import resident_bytes, tensors_in

FEW = (2, 4)  # samples of the two forwards from which a batch's activations are extrapolated
STAND_IN = 4  # largest size of a dimension of the tensors that stand in for the parameters


@dataclass(frozen=True)
class Parts:
    """Bytes by part. None: not known."""

    parameters: int
    buffers: int
    gradients: int
    states: int | None
    inputs: int
    activations: int | None

    @property
    def known(self) -> int:
        return sum(each or 0 for each in vars(self).values())

    def peak(self, accumulates: bool) -> int | None:
        """What is there at once: activations go as gradients come, but those of earlier micro-batches stay."""
        if self.states is None or self.activations is None:
            return None
        fixed = self.parameters + self.buffers + self.states + self.inputs
        both = (self.activations, self.gradients)
        return fixed + (sum(both) if accumulates else max(both))


def estimate(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, activations: int | None) -> Parts:
    """Before the first step."""
    trained = _trained(optimizer)
    return Parts(
        parameters=resident_bytes(model.parameters()),
        buffers=resident_bytes(model.buffers()),
        gradients=sum(p.numel() * (getattr(p, "grad_dtype", None) or p.dtype).itemsize for p in trained),
        states=estimated_states(optimizer),
        inputs=resident_bytes(tensors_in(batch)),
        activations=activations,
    )


def held(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, gradients: int, activations: int) -> Parts:
    """After a step: the storages that are there. Gradients and activations come and go; they were counted before."""
    return Parts(
        parameters=resident_bytes(model.parameters()),
        buffers=resident_bytes(model.buffers()),
        gradients=gradients,
        states=resident_bytes(tensors_in(list(optimizer.state.values()))),
        inputs=resident_bytes(tensors_in(batch)),
        activations=activations,
    )


def gradient_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the gradients that are there."""
    return resident_bytes(p.grad for p in _trained(optimizer) if p.grad is not None)


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


# ---- states


def estimated_states(optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes that are there after the first step; None where the optimizer cannot be stepped on tensors that stand in.

    A copy of it steps small tensors of the parameters' dtypes. Whatever state has its tensor's shape grows with it.
    """
    trained = _trained(optimizer)
    stand_ins = {id(p): _stand_in(p) for group in optimizer.param_groups for p in group["params"]}
    try:
        states = {stand_ins[id(p)]: _shrunk(state, p, stand_ins[id(p)]) for p, state in optimizer.state.items()}
        memo: dict[int, Any] = {**stand_ins, id(optimizer.state): defaultdict(dict, states)}
        small = copy.deepcopy(optimizer, memo)
        with torch.enable_grad():
            small.step()
    except Exception:  # an optimizer of anybody's: it may ask for sparse gradients, a closure, certain shapes
        return None
    total = 0
    for p in {id(p): p for p in trained}.values():
        stand_in = stand_ins[id(p)]
        for state in tensors_in(small.state.get(stand_in, {})):
            total += (p.numel() if state.shape == stand_in.shape else state.numel()) * state.dtype.itemsize
    return total


def _stand_in(p: Tensor) -> nn.Parameter:
    """With a gradient where `p` is trained."""
    shape = [min(size, STAND_IN) for size in p.shape]
    stand_in = nn.Parameter(torch.zeros(shape, dtype=p.dtype, device=p.device), requires_grad=p.requires_grad)
    if p.requires_grad:
        stand_in.grad = torch.zeros_like(stand_in)
    return stand_in


def _shrunk(state: dict[str, Any], p: Tensor, stand_in: Tensor) -> dict[str, Any]:
    """States that are there before the first step, such as master weights, in the size of what stands in."""

    def small(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == p.shape:
            return torch.zeros(stand_in.shape, dtype=value.dtype, device=value.device)
        return copy.copy(value)

    return {name: small(value) for name, value in state.items()}


# ---- activations


class _Kept:
    """A tensor that autograd keeps for a backward; it goes when autograd lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that `forward` has saved for its backward when it ends.

    Args:
        forward: returns what keeps the graph alive, such as the loss.
        known: tensors, such as parameters and inputs, that are counted elsewhere.
    """
    kept: list[weakref.ref[_Kept]] = []

    def pack(tensor: Tensor) -> _Kept:
        one = _Kept(tensor.detach())  # an output that knows its own graph would keep it alive
        kept.append(weakref.ref(one))
        return one

    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in known}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        graph = forward()
    alive = [one.tensor for one in (reference() for reference in kept) if one is not None]
    total = resident_bytes(t for t in alive if t.untyped_storage().data_ptr() not in elsewhere)
    del graph
    return total


def extrapolated(bytes_of: Callable[[int], int], samples: int) -> int:
    """`bytes_of(samples)`, from two small batches where `samples` is larger: so that it cannot run out of memory."""
    small, large = FEW
    if samples <= large:
        return bytes_of(samples)
    at_small, at_large = bytes_of(small), bytes_of(large)
    return round(at_small + (at_large - at_small) / (large - small) * (samples - small))
