# SPDX-License-Identifier: Apache-2.0
"""The control of `ab`: torch alone, which no change of a project touches. Runs in the worker."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastloop.bench


@fastloop.bench.case(name="fastloop-control", setup=True, control=True)
def control() -> Callable[[], object]:
    """torch's fused AdamW, 4 tensors"""
    parameters = [torch.ones(2**16).requires_grad_(True) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    return torch.optim.AdamW(parameters, fused=True).step
