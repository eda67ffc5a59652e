# SPDX-License-Identifier: Apache-2.0
"""Checks of what a step is given, made before anything is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Every element once, in one block without gaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Same shape, and the same stride in every dimension of more than one element."""
    if a.shape != b.shape:
        return False
    return all(n <= 1 or x == y for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def check_grad(where: str, param: Tensor, grad: Tensor) -> None:
    """Raise unless the gradient can update the parameter.

    Raises:
        RuntimeError: sparse gradient, or one whose shape, device or kind differs from the parameter's; a parameter
            made in inference mode.
    """
    if param.is_inference():
        raise RuntimeError(
            f"[{where}] cannot update a parameter of shape {tuple(param.shape)} that was made in inference mode; "
            "clone it outside"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"[{where}] does not support sparse gradients, got one of layout {grad.layout} for a parameter of shape "
            f"{tuple(param.shape)}; use torch.optim.SparseAdam or a dense embedding (sparse=False)"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"[{where}] a gradient must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
        )
    if grad.device != param.device:
        raise RuntimeError(f"[{where}] a gradient must be on its parameter's device {param.device}, got {grad.device}")
    if grad.is_complex() != param.is_complex():
        raise RuntimeError(
            f"[{where}] a gradient must be complex if and only if its parameter is: parameter {param.dtype}, "
            f"gradient {grad.dtype}"
        )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, as in an expanded tensor. Conservative for interleaved strides."""
    if tensor.numel() <= 1:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_no_overlap(where: str, tensors: Iterable[Tensor]) -> None:
    """Raise if parameters share memory: each would be updated twice, by two threads at once.

    Raises:
        RuntimeError: an expanded parameter, or two parameters that share elements.
    """
    spans: list[tuple[int, int, Tensor]] = []
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if overlaps_itself(tensor):
            raise RuntimeError(
                f"[{where}] a parameter must not overlap itself in memory, got shape {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}; pass param.clone() instead of an expanded view"
            )
        begin = tensor.data_ptr()
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((begin, begin + (reach + 1) * tensor.element_size(), tensor))
    spans.sort(key=lambda span: span[:2])
    last: tuple[int, int, Tensor] | None = None
    for span in spans:
        if last is not None and span[0] < last[1] and _share_elements(last[2], span[2]):
            raise RuntimeError(
                f"[{where}] parameters must not overlap in memory, got shapes {tuple(last[2].shape)} and "
                f"{tuple(span[2].shape)} in one storage; pass each weight once"
            )
        if last is None or span[1] > last[1]:
            last = span


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Exact for tensors with gaps: interleaved columns of one matrix share a range of addresses, but no element."""
    if is_dense(a) and is_dense(b):
        return True
    return bool(torch.isin(_addresses(a), _addresses(b)).any())


def _addresses(tensor: Tensor) -> Tensor:
    addresses = torch.tensor([tensor.data_ptr()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        addresses = (addresses[:, None] + torch.arange(size) * stride * tensor.element_size()).flatten()
    return addresses
