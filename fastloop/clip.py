# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping with the functions of torch.nn.utils, in one pass per operation whatever the number of tensors."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastloop.ops.native import native
from fastloop.ops.plan import local_shard
from fastloop.ops.reference import compute_dtype

Tensors = Tensor | Iterable[Tensor]


@torch.no_grad()
def get_total_norm(
    tensors: Tensors, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    r"""Norm of all tensors together, as if they were one vector.

    norm = (sum |x|^p)^(1/p), for p = inf the largest |x|.

    Args:
        tensors: tensors of any shape and dtype, or one tensor.
        norm_type: p, above 0; inf for the largest absolute value. 1, 2 and inf run on the kernels, others on torch.
        error_if_nonfinite: raise if the norm is NaN or infinite.
        foreach: accepted as in torch; changes nothing.

    Returns:
        0-dim tensor: float64 if a tensor is, else float32, also for float16 and bfloat16 (whose norm overflows in their
        own dtype). A DTensor if the tensors are, all on one mesh. `tensor(0.)` for no tensors. Bitwise the same for
        every number of threads and, below float64, for every instruction set.

    Raises:
        RuntimeError: the norm is not finite and error_if_nonfinite.

    Source: torch.nn.utils.get_total_norm.
    """
    del foreach
    listed = _listed(tensors)
    norm_type = float(norm_type)
    if not listed:
        return torch.tensor(0.0)
    total = _total_norm(listed, norm_type)
    if error_if_nonfinite and not math.isfinite(float(total)):
        raise RuntimeError(
            f"[get_total_norm] The total norm of order {norm_type} for gradients is non-finite ({float(total)}), so it "
            "cannot be clipped; pass error_if_nonfinite=False to go on all the same"
        )
    return total


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    r"""Scale the gradients of `parameters` in place by min(1, max_norm / (total_norm + 1e-6)).

    Args:
        parameters: parameters, or one; those without a gradient are passed over.
        max_norm: bound of the norm.
        total_norm: the norm before clipping, as from `get_total_norm`.
        foreach: accepted as in torch; changes nothing.

    Source: torch.nn.utils.clip_grads_with_norm_.
    """
    del foreach
    grads = _grads(_listed(parameters))
    if not grads:
        return
    total = _full(total_norm)
    if total.device.type == "cpu":
        factor = min_factor(float(max_norm), float(total))
        if factor != 1.0:
            _scale(grads, factor)
        return
    on_device = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)  # stays there: no host sync
    for (device, _), same in _by_kind([local_shard(g) for g in grads]).items():
        factor_there = on_device.to(device, non_blocking=device.type != "cpu")
        if all(grad.layout == torch.strided for grad in same):
            torch._foreach_mul_(same, factor_there)
        else:
            for grad in same:
                grad.mul_(factor_there)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Clip the total norm of the gradients of `parameters` in place.

    g = g * min(1, max_norm / (norm + 1e-6)). With a fastloop optimizer pass `max_grad_norm` to it instead: that costs
    no pass of its own and leaves the gradients as they are.

    Args:
        parameters: parameters, or one; those without a gradient are passed over.
        max_norm: bound of the norm.
        norm_type: see `get_total_norm`.
        error_if_nonfinite: raise if the norm is NaN or infinite, before a gradient is changed.
        foreach: accepted as in torch; changes nothing.

    Returns:
        The norm before clipping, see `get_total_norm`.

    Raises:
        RuntimeError: the norm is not finite and error_if_nonfinite.

    Source: torch.nn.utils.clip_grad_norm_.
    """
    if isinstance(parameters, types.GeneratorType):
        listed = list(parameters)
        if not listed:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    else:
        listed = _listed(parameters)
    total = get_total_norm(_grads(listed), norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(listed, max_norm, total, foreach)
    return total


@torch.no_grad()
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    r"""Bound every element of the gradients of `parameters` to [-clip_value, clip_value], in place.

    Args:
        parameters: parameters, or one; those without a gradient are passed over.
        clip_value: the bound. NaN elements stay NaN.
        foreach: accepted as in torch; changes nothing.

    Source: torch.nn.utils.clip_grad_value_.
    """
    del foreach
    _scale(_grads(_listed(parameters)), 1.0, float(clip_value))


def min_factor(max_norm: float, norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)); NaN for a NaN norm, as torch."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor


# ---- tensors


def _listed(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [g for p in parameters if (g := p.grad) is not None]


def _by_kind(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.device, t.dtype), []).append(t)
    return kinds


def _full(norm: Tensor) -> Tensor:
    """A DTensor norm as a plain tensor, summed over its mesh."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _total_norm(tensors: list[Tensor], p: float) -> Tensor:
    module = native()
    wide = any(compute_dtype(t.dtype) == torch.float64 for t in tensors)
    dtype = torch.float64 if wide else torch.float32
    if module is not None and p in (1.0, 2.0, math.inf) and not any(map(_needs_torch, tensors)):
        total = module.norm(tensors, p)
        if total is not None:
            return torch.tensor(math.sqrt(total) if p == 2.0 else total, dtype=dtype, device=tensors[0].device)
    device = tensors[0].device
    if device.type != "cpu" and not any(_needs_torch_on_a_device(t) for t in tensors):
        norms = [torch.zeros((), dtype=dtype, device=device)]
        # torch's kernels for many tensors, in a dtype that does not overflow
        for (_, kind), same in _by_kind([t for t in tensors if t.numel() > 0]).items():
            norms += [n.to(device, non_blocking=True) for n in torch._foreach_norm(same, p, dtype=compute_dtype(kind))]
        return torch.linalg.vector_norm(torch.stack([n.to(dtype) for n in norms]), p)
    # No kernel for this: norms one by one in a dtype that does not overflow, on the first tensor's device.
    norms = [_norm(t, p).to(device) for t in tensors]
    meshes = {getattr(n, "device_mesh", None) for n in norms}
    if None not in meshes and len(meshes) == 1:
        return torch.linalg.vector_norm(torch.stack(norms), p)
    # Several meshes, or plain tensors beside DTensors, of which torch makes no sum: each norm is completed first.
    return torch.linalg.vector_norm(torch.stack([_full(n).to(dtype) for n in norms]), p)


def _norm(t: Tensor, p: float) -> Tensor:
    dtype = _norm_dtype(t)
    if p != math.inf or _is_partial(t):
        return torch.linalg.vector_norm(t, p, dtype=dtype)
    # The largest of nothing is 0 here; torch refuses it, and a rank may well hold nothing of a small parameter.
    local = local_shard(t)
    norm = torch.linalg.vector_norm(local, p, dtype=dtype) if local.numel() else local.new_zeros((), dtype=dtype).abs()
    if local is t:
        return norm
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
    # not is_shard(), which is False for strided shards
    parts = [placement if placement.is_replicate() else Partial("max") for placement in placements]
    return DTensor.from_local(norm, mesh, parts).redistribute(placements=[Replicate()] * mesh.ndim)


def _is_partial(t: Tensor) -> bool:
    """Whether a DTensor's elements are yet to be summed over processes."""
    return any(placement.is_partial() for placement in getattr(t, "placements", ()))


def _norm_dtype(t: Tensor) -> torch.dtype:
    wide = compute_dtype(t.dtype)
    return torch.promote_types(wide, torch.complex64) if t.is_complex() else wide


def _needs_torch(t: Tensor) -> bool:
    return (
        hasattr(t, "_local_tensor")
        or t.layout != torch.strided
        or t.device.type != "cpu"
        or t.is_complex()
        or t.is_neg()
    )


def _needs_torch_on_a_device(t: Tensor) -> bool:
    return hasattr(t, "_local_tensor") or t.layout != torch.strided or t.is_complex()


def _scale(grads: list[Tensor], factor: float, clip_value: float = math.inf) -> None:
    local = [local_shard(g) for g in grads]
    module = native()
    served = module is not None and clip_value >= 0 and not any(map(_needs_torch_to_write, local))
    if clip_value != math.inf and any(map(_is_partial, grads)):
        served = False  # and torch, below, says that this cannot be done in place
    if module is not None and served and module.scale(local, factor, clip_value):
        torch.autograd.graph.increment_version(grads)
        return
    with torch.no_grad():
        for g in grads:
            if factor != 1.0:
                g.mul_(factor)
            if clip_value != math.inf:
                g.clamp_(-clip_value, clip_value)


def _needs_torch_to_write(t: Tensor) -> bool:
    return t.layout != torch.strided or t.device.type != "cpu" or t.is_complex() or t.is_neg()


__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]
