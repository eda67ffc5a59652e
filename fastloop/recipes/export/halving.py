# SPDX-License-Identifier: Apache-2.0
"""A copy of a model in 16 bits, for inference."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from fastloop.loop.data import map_tensors

BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def half_precision(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy in eval mode whose floating-point parameters and buffers are of `dtype`; the model stays as it is.

    BatchNorm keeps its parameters and statistics in fp32: a running variance does not fit into fp16 above 65504, and
    has 3 digits in bf16. Integers and booleans stay. Inputs of other floating-point types are converted; outputs are of
    `dtype`.

    Args:
        model: of fp32 or fp64.
        dtype: torch.bfloat16 or torch.float16.

    Raises:
        ValueError: another dtype, or values that fp16 cannot hold.
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[half_precision] model must be an nn.Module, got {type(model).__name__}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"[half_precision] dtype must be torch.bfloat16 or torch.float16, got {dtype}")
    made = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in made.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        kept = torch.float32 if isinstance(module, BATCHNORM) else dtype
        for key, tensor in own:
            if tensor is None or not tensor.is_floating_point():
                continue
            converted = tensor.detach().to(kept)
            if bool(converted.isinf().any()) and not bool(tensor.isinf().any()):
                place = f"{name}.{key}" if name else key
                raise ValueError(
                    f"[half_precision] {place} has values up to {float(tensor.abs().max()):.3g}, fp16 ends at "
                    "65504; use torch.bfloat16"
                )
            tensor.data = converted
    made.register_forward_pre_hook(functools.partial(_inputs_to, dtype), with_kwargs=True)
    return made


def _inputs_to(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> Any:
    del module
    return map_tensors((args, kwargs), lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
