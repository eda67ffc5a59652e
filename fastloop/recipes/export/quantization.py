# SPDX-License-Identifier: Apache-2.0
"""A copy of a model with the weights of its Linear layers in 8 bits, by torchao."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.extras import need
from fastloop.recipes.export.comparing import stored_bytes
from fastloop.recipes.export.quiet import quiet

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SAMPLES = 32  # rows on which each layer is compared


@dataclass
class Quantization:
    """What was quantized.

    Attributes:
        errors: by Linear layer, largest difference over its largest output, on standard normal inputs.
        left: layers with weights that stay as they were, with the reason.
        bytes_before, bytes: parameters and buffers as stored.
    """

    bytes_before: int
    bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def quantize_int8(model: nn.Module, *, weight_only: bool = False) -> nn.Module:
    """A copy in eval mode whose Linear layers have int8 weights, one scale for each output.

    With inputs rounded to int8 as they come, one scale for each row, and products of integers; with `weight_only`
    weights are stored in int8 and computed with in the inputs' precision. No calibration data are needed. Convolutions
    stay as they are: torchao has no int8 kernels for them. The copy's `quantization` says what was done and how large
    each layer's error is; compare the whole with `verify_copy`, and its accuracy with `compare_models`.

    Args:
        model: of fp32, bf16 or fp16; stays as it is.
        weight_only: smaller, with almost the same outputs, not faster on most machines.

    Raises:
        MissingExtra: torchao is not installed.
        ValueError: no Linear layer to quantize.
        RuntimeError: torchao cannot do it for these layers, on this device.
        TypeError: no module.

    Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022 (scales by row
    and column).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[quantize_int8] model must be an nn.Module, got {type(model).__name__}")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if not linears:
        raise ValueError(
            "[quantize_int8] the model has no nn.Linear layer, and torchao quantizes no others; use half_precision"
        )
    with quiet():
        torchao = need("torchao.quantization", "export", "quantize_int8")
    config = torchao.Int8WeightOnlyConfig if weight_only else torchao.Int8DynamicActivationInt8WeightConfig
    made = copy.deepcopy(model).eval().requires_grad_(False)
    done = Quantization(stored_bytes(model))
    try:
        with quiet():
            torchao.quantize_(made, config(), filter_fn=lambda module, name: type(module) is nn.Linear)
        for name, before in linears.items():
            done.errors[name] = _error(before, made.get_submodule(name))
    except Exception as error:
        version = getattr(need("torchao", "export", "quantize_int8"), "__version__", "")
        raise RuntimeError(
            f"[quantize_int8] torchao {version} could not: {type(error).__name__}: {error}; "
            f"try weight_only={not weight_only}, or half_precision"
        ) from error
    done.bytes = stored_bytes(made)
    done.left = dict(_left(made, linears))
    made.quantization = done  # type: ignore[assignment]
    return made


def _left(model: nn.Module, linears: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            yield name, "torchao has no int8 kernels for convolutions"
        elif name not in linears and isinstance(module, (nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)):
            yield name, f"{type(module).__name__} is not quantized"


@torch.no_grad()
def _error(before: Any, after: Any) -> float:
    weight: Tensor = before.weight
    x = torch.randn(SAMPLES, before.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = nn.functional.linear(x, weight, before.bias).double()
    largest = float(expected.abs().max())
    return float((after(x).double() - expected).abs().max()) / largest if largest else 0.0
