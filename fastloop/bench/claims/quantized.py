# SPDX-License-Identifier: Apache-2.0
"""int8 for inference: dynamic quantization, its size and its speed, on a CPU."""

from __future__ import annotations

import io
import warnings
from importlib import import_module

import torch
from torch import Tensor, nn

from fastloop.bench.checks import WrongResult
from fastloop.bench.claims.record import Claim, Finding, Here, Unavailable, Verdict, about, both, faster, times
from fastloop.bench.claims.resnet import ResNet50

OUTPUT_ERROR = 0.05  # relative to the output's norm: three layers of 8 bits, activations quantized as well
SIZE, SPEED = 4.0, 2.0


def quantize(model: nn.Module) -> nn.Module:
    """As the guides do it: linear layers and convolutions are asked for, int8."""
    try:
        dynamic = import_module("torch.ao.quantization").quantize_dynamic
    except (ImportError, AttributeError):
        raise Unavailable("this torch has no torch.ao.quantization.quantize_dynamic") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move to torchao
        quantized: nn.Module = dynamic(model.eval(), {nn.Linear, nn.Conv2d}, dtype=torch.qint8)
    return quantized


def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 1000))


def saved_size(model: nn.Module) -> int:
    """Bytes of its state on disk."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def output_error(model: nn.Module, quantized: nn.Module, inputs: Tensor) -> float:
    """Relative difference of the outputs. Raises WrongResult where int8 does not explain it."""
    with torch.inference_mode():
        expected, got = model(inputs), quantized(inputs)
    error = float((got - expected).norm() / expected.norm())
    if not error <= OUTPUT_ERROR:
        raise WrongResult(f"[bench claims] the quantized model's output differs by {error:.1%} of its norm")
    return error


def size_linear(here: Here) -> Finding:
    """A model of linear layers on disk, in fp32 and in int8."""
    model = linear_model()
    quantized = quantize(model)
    error = output_error(model, quantized, torch.randn(16, 1024))
    ratio = saved_size(model) / saved_size(quantized)
    note = f"linear layers, torch.save; outputs differ by {error:.1%}"
    return Finding(f"{ratio:.2f}x smaller", about(ratio, SIZE, 0.05), note, numbers={"ratio": ratio})


def size_resnet(here: Here) -> Finding:
    """ResNet-50 on disk after the same call, which has no kernels for convolutions and leaves them as they are."""
    model = ResNet50()
    ratio = saved_size(model) / saved_size(quantize(model))
    verdict = about(ratio, SIZE, 0.05)
    note = "the call leaves convolutions in fp32, without a word"
    return Finding(f"{ratio:.2f}x smaller", verdict, note, numbers={"ratio": ratio})


def speed(here: Here) -> Finding:
    """Latency of fp32 over that of int8, for one input and for 64."""
    model = linear_model()
    quantized = quantize(model)
    halves = Here(torch.device("cpu"), here.seconds / 2)
    found = {}
    for batch in (1, 64):
        inputs = torch.randn(batch, 1024)
        output_error(model, quantized, inputs)
        with torch.inference_mode():
            found[batch] = halves.pairs(lambda x=inputs: model(x), lambda x=inputs: quantized(x), SPEED)  # type: ignore[misc]
    (one, pairs), (many, _) = found[1], found[64]
    verdict: Verdict = both(faster(one, SPEED), faster(many, SPEED))
    words = f"batch 1: {times(one)}; batch 64: {times(many)}"
    note = f"linear layers, engine {torch.backends.quantized.engine}; the interval is batch 1's"
    return Finding(words, verdict, note, one, pairs.ratios, {"batch 64": many.median})


CLAIMS = (
    Claim("int8-size", "dynamic quantization, linear layers", "4x smaller", size_linear, on_cpu=True),
    Claim("int8-size-conv", "dynamic quantization, ResNet-50", "4x smaller", size_resnet, on_cpu=True),
    Claim("int8-speed", "dynamic quantization, latency", "2-4x faster", speed, on_cpu=True),
)
