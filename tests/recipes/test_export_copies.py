# SPDX-License-Identifier: Apache-2.0
"""Copies for inference: fused, of half precision, quantized; and verify_copy, which compares them with their model."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastloop.recipes.export import fuse_conv_bn, half_precision, quantize_int8, verify_copy
from fastloop.recipes.export.comparing import difference, stored_bytes
from fastloop.recipes.export.quiet import quiet


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A latency of 2 pairs is enough to see that there is one."""
    monkeypatch.setattr("fastloop.recipes.export.comparing.PAIRS", 2)


def lived(model: nn.Module) -> nn.Module:
    """With BatchNorms that have seen data: statistics, scales and shifts of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.bias, -1, 1)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def image() -> Tensor:
    return torch.randn(4, 3, 9, 9)


class Block(nn.Module):
    """A residual block whose names are in another order than its calls."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.last_norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 8, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, width, 3, padding=1, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last_norm(self.conv2(self.relu(self.norm(self.conv1(x)))))


class Branching(nn.Module):
    """torch.fx cannot follow this; its blocks it can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.tail = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.block(x)) if float(x.sum()) > -1e9 else x


# ---- fuse_conv_bn


@pytest.mark.parametrize(
    ("build", "shape", "left"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, dilation=2), nn.BatchNorm2d(6), nn.ReLU()),
            (2, 3, 9, 9),
            0,
        ),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)), (2, 4, 9, 9), 0),
        (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6, affine=False)), (2, 3, 9), 0),
        (lambda: nn.Sequential(nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6)), (2, 3, 4, 4, 4), 0),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6)), (2, 3, 5, 5), 0),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5), 1),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), (4, 5), 0),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), (2, 3, 9, 9), 1),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)), (2, 3, 9, 9), 1),
        (Block, (2, 3, 9, 9), 0),
        (Branching, (2, 3, 9, 9), 0),
    ],
    ids=[
        "2d",
        "groups",
        "1d",
        "3d",
        "transposed",
        "transposed groups",
        "linear",
        "after relu",
        "before",
        "block",
        "branch",
    ],
)
def test_what_follows_is_folded_and_computes_the_same(build: Any, shape: tuple[int, ...], left: int) -> None:
    model = lived(build()).train()
    before = copy.deepcopy(model)
    made = fuse_conv_bn(model)
    assert norms(made) == left == len(made.fusion.left)
    assert not made.training
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = model.eval()(x)
        assert torch.allclose(made(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert all(error < 1e-5 for error in made.fusion.errors.values())
    model.train()
    assert str(model) == str(before)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x)


class Seen(nn.Module):
    """The convolution's own output is used besides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def shared() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize(
    "build",
    [
        Twice,
        Seen,
        shared,
        hooked,
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3)),
    ],
    ids=["called twice", "output seen", "shared", "hooked", "batch statistics", "parametrized"],
)
def test_what_cannot_be_folded_stays(build: Any) -> None:
    model = lived(build())
    made = fuse_conv_bn(model)
    assert made.fusion.errors == {}
    assert norms(made) == norms(model) == len(made.fusion.left)
    x = image()
    with torch.no_grad():
        assert torch.equal(made(x), model.eval()(x))


def test_models_without_anything_to_fuse() -> None:
    assert fuse_conv_bn(nn.ReLU()).fusion.errors == {}
    lazy = fuse_conv_bn(nn.Sequential(nn.LazyConv2d(3, 3), nn.BatchNorm2d(3)))
    assert lazy.fusion.errors == {}
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fuse_conv_bn("model")


def test_statistics_that_are_broken_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[1].running_mean[0] = float("nan")
    with pytest.raises(RuntimeError, match="0 and 1 fused differ"):
        fuse_conv_bn(model)


class Optional(nn.Module):
    """Normalizes where it is asked to only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, normalize: Any = None) -> Tensor:
        y = self.conv(x)
        return y if normalize is None else self.norm(y)


class Borrowed(nn.Module):
    """The forward takes the convolution's weight besides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


@pytest.mark.parametrize("build", [Optional, Borrowed])
def test_a_pair_that_is_one_at_times_only_stays(build: Any) -> None:
    model = lived(build())
    made = fuse_conv_bn(model)
    assert list(made.fusion.left) == ["norm"]
    x = image()
    with torch.no_grad():
        assert torch.equal(made(x), model.eval()(x))


class Remembers(Block):
    """The forward writes into the module."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, super().forward(x)
        return self.last


def test_looking_for_pairs_leaves_nothing_in_the_copy() -> None:
    made = fuse_conv_bn(lived(Remembers()))
    assert len(made.fusion.errors) == 2
    assert (made.calls, made.last) == (0, None)


def test_a_linear_over_sequences_is_not_folded_silently() -> None:
    """BatchNorm1d normalizes dimension 1: of [n, 6, 6] not the Linear's features."""
    model = lived(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    made = fuse_conv_bn(model)
    assert verify_copy(model, made, torch.randn(4, 5), tolerance=1e-5).passed
    with pytest.raises(ValueError, match=r"1 was folded for inputs \[n, features\], got \(2, 6, 6\)"):
        made(torch.randn(2, 6, 5))


# ---- half_precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_a_copy(dtype: torch.dtype) -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4)))
    model.register_buffer("seen", torch.tensor(7))
    model.register_buffer("scale", torch.tensor(0.5))
    made = half_precision(model, dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training
    assert (made[0].weight.dtype, made[4].bias.dtype, made.scale.dtype) == (dtype, dtype, dtype)
    assert (made[1].weight.dtype, made[1].running_var.dtype) == (torch.float32, torch.float32)
    assert (made.seen.dtype, made[1].num_batches_tracked.dtype) == (torch.int64, torch.int64)
    found = verify_copy(model, made, image(), tolerance=2e-2)
    assert found.passed, str(found)
    assert found.max_rel > 0
    assert found.bytes < 0.55 * found.bytes_before
    assert made(image()).dtype == dtype
    assert copy.deepcopy(made)(image().double()).dtype == dtype


def test_half_precision_refuses() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="dtype must be"):
        half_precision(model, torch.float32)
    nn.init.constant_(model.weight, 1e5)
    with pytest.raises(ValueError, match="weight has values up to 1e"):
        half_precision(model, torch.float16)
    assert half_precision(model).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"nn\.Module"):
        half_precision(torch.zeros(3))


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    made = half_precision(model)
    assert made[0].weight is made[1].weight


# ---- quantize_int8


@pytest.mark.parametrize("weight_only", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_quantized_linear_layers(weight_only: bool) -> None:
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(392, 64), nn.ReLU(), nn.Linear(64, 10))
    made = quantize_int8(model, weight_only=weight_only)
    assert type(model[2].weight.data) is Tensor
    assert model.training
    assert set(made.quantization.errors) == {"2", "4"}
    assert all(0 < error < 0.05 for error in made.quantization.errors.values())
    assert made.quantization.left == {"0": "torchao has no int8 kernels for convolutions"}
    found = verify_copy(model, made, image(), tolerance=5e-2)
    assert found.passed, str(found)
    # One byte a weight, a scale of 4 and a bias of 4 bytes an output; the zero point adds at most 8.
    weights, outputs, rest = 392 * 64 + 640, 74, 4 * (8 * 27 + 8)
    assert weights + 8 * outputs + rest <= found.bytes <= weights + 16 * outputs + rest
    assert found.bytes_before == 4 * (weights + outputs) + rest
    assert (made.quantization.bytes_before, made.quantization.bytes) == (found.bytes_before, found.bytes)


def test_a_transformer_can_be_quantized() -> None:
    pytest.importorskip("torchao")
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    made = quantize_int8(model, weight_only=True)
    assert set(made.quantization.errors) == {"linear1", "linear2"}
    assert "self_attn" in made.quantization.left
    assert verify_copy(model, made, torch.randn(2, 5, 16), tolerance=5e-2).passed


def test_quantize_refuses() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        quantize_int8(nn.Conv2d(3, 3, 3))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        quantize_int8(None)


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"fastloop\[export\]"):
        quantize_int8(nn.Linear(2, 2))


@pytest.mark.slow  # a process of its own, which imports torchao
def test_nothing_is_said_and_nothing_heavy_imported() -> None:
    code = (
        "import sys, torch, fastloop.recipes.export as export, fastloop.recipes.after\n"
        "heavy = ('torchao', 'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'scipy')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        "try:\n"
        "    export.quantize_int8(torch.nn.Linear(4, 4))\n"
        "except ImportError:\n"
        "    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- verify_copy


def test_a_copy_that_differs_fails() -> None:
    model = nn.Linear(4, 3)
    other = copy.deepcopy(model)
    assert verify_copy(model, other, torch.randn(2, 4), tolerance=0).passed
    with torch.no_grad():
        other.bias += 0.01
    found = verify_copy(model, other, torch.randn(2, 4), tolerance=1e-4)
    assert not found.passed
    assert found.latency is None
    assert found.max_abs == pytest.approx(0.01, rel=1e-3)
    assert "more than the tolerance" in found.reason
    assert verify_copy(model, other, torch.randn(2, 4), tolerance=1).passed
    json.dumps(found.to_json())
    assert "failed" in str(found)


def test_it_looks_at_other_inputs_than_the_example() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    example = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert verify_copy(Positive(), nn.Identity(), example, tolerance=0).passed  # drawn from the example: as positive
    assert not verify_copy(Positive(), nn.Identity(), torch.ones(2, 2), tolerance=0).passed


class Writes(nn.Module):
    """The forward changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(1) * 2


def test_models_that_write_into_their_inputs_get_the_same_ones() -> None:
    example = torch.randn(2, 4)
    before = example.clone()
    assert verify_copy(Writes(), Writes(), example, tolerance=0).passed
    assert torch.equal(example, before)


def test_silence_of_two_threads_ends() -> None:
    """The second waits for the first: it would else put back the first one's silence, for good."""

    def outside() -> tuple[Any, ...]:
        return sys.stdout, sys.stderr, logging.root.manager.disable, list(warnings.filters)

    before, entered, leave = outside(), threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with quiet(), quiet():  # one thread may come again
        thread.start()
        early = entered.wait(0.2)
    leave.set()
    thread.join(60)
    assert not early
    assert outside() == before
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert outside() == before


def test_modes_and_random_states_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    assert verify_copy(
        model, copy.deepcopy(model).eval(), torch.randn(2, 4, generator=torch.Generator()), tolerance=0
    ).passed
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_differences_of_outputs() -> None:
    nan, inf = float("nan"), float("inf")
    assert difference(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.5])).absolute == 0.5
    assert difference(torch.tensor([1.0]), torch.tensor([nan])).reason
    assert difference(torch.tensor([inf]), torch.tensor([-inf])).reason
    assert "shape" in difference(torch.zeros(2), torch.zeros(2, 1)).reason
    assert "2 outputs instead of 1" in difference(torch.zeros(2), [torch.zeros(2)] * 2).reason
    assert "no tensor" in difference(None, None).reason
    assert difference(torch.tensor([0.0]), torch.tensor([1e-9])).relative == inf
    assert difference(torch.tensor([2, 5]), torch.tensor([2, 4])).relative == 0.2


def test_bytes_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("view", model[0].weight.detach()[0])
    assert stored_bytes(model) == 4 * (16 + 4 + 4)
    assert stored_bytes(nn.ReLU()) == 0


def test_verify_refuses() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        verify_copy(nn.ReLU(), nn.ReLU(), torch.ones(2), tolerance=-1)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        verify_copy(nn.ReLU(), torch.relu, torch.ones(2), tolerance=0)
    silent = verify_copy(nn.ReLU(), nn.ReLU(), -torch.arange(1.0, 5), tolerance=0)
    assert any("all outputs are 0" in f.what for f in silent.findings)
