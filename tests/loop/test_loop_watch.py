# SPDX-License-Identifier: Apache-2.0
"""Spikes, early stopping, throughput, memory, FLOPs: each against its definition."""

from __future__ import annotations

import json
import math
import mmap
import random
import statistics
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastloop.loop import flops
from fastloop.loop.flops import model_flops, peak_flops
from fastloop.loop.watch import RISE, EarlyStopping, Spikes, Throughput, memory


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


# ---- spikes ------------------------------------------------------------------------------------------

# Whole numbers: medians and distances are exact in floats, and so are the two ways to compute them.
WHOLE = st.integers(-50, 50).map(float) | st.integers(-(2**20), 2**20).map(float)


@given(st.lists(WHOLE, max_size=60), st.integers(3, 12), st.sampled_from([0.5, 2.0, 10.0]), st.integers(1, 3))
def test_spikes_are_those_of_the_definition(values: list[float], window: int, k: float, least: int) -> None:
    spikes = Spikes(window, k, least)
    found = 0
    for place, value in enumerate(values):
        before = values[:place][-window:]
        expected = False
        if len(before) >= least:
            median = statistics.median(before)
            deviation = statistics.median(abs(x - median) for x in before)
            expected = value > median + RISE * abs(median) and value > median + k * deviation
        found += expected
        assert spikes.update(value) is expected, (before, value)
    assert spikes.count == found


def test_a_spike_in_a_noisy_curve_is_found_and_noise_is_not() -> None:
    noise = random.Random(0)
    spikes = Spikes()
    losses = [3 * math.exp(-step / 300) + 1 + noise.gauss(0, 0.05) for step in range(2000)]
    losses[1500] += 2
    assert [step for step, loss in enumerate(losses) if spikes.update(loss)] == [1500]


def test_among_constant_losses_a_tenth_more_is_no_spike() -> None:
    spikes = Spikes(window=10)
    one_up = float(torch.nextafter(torch.tensor(2.0), torch.tensor(3.0)))  # float32's next number
    assert not any(spikes.update(loss) for loss in [2.0] * 20 + [one_up, 2.19])
    assert spikes.update(2.21)


def test_values_that_are_not_finite_are_neither_spikes_nor_remembered() -> None:
    spikes = Spikes(window=3, least=1)
    for value in (1.0, math.nan, math.inf, -math.inf, 1.0):
        assert not spikes.update(value)
    assert spikes.state_dict() == {"count": 0, "recent": [1.0, 1.0]}


def test_a_new_level_becomes_usual() -> None:
    spikes = Spikes(window=10)
    for _ in range(10):
        spikes.update(1.0)
    assert [spikes.update(5.0) for _ in range(10)] == [True] * 5 + [False] * 5


@given(st.lists(WHOLE, max_size=40), st.integers(0, 40))
def test_spikes_resume(values: list[float], cut: int) -> None:
    whole, first, second = (Spikes(8, 2.0, 2) for _ in range(3))
    verdicts = [whole.update(value) for value in values]
    before = [first.update(value) for value in values[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.update(value) for value in values[cut:]] == verdicts
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("wrong", [{"window": 2}, {"k": 0.0}, {"k": math.nan}, {"least": 0}, {"window": 5, "least": 6}])
def test_wrong_settings_of_spikes(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^\[Spikes\] \w+ must .*; pass e\.g\."):
        Spikes(**wrong)


# ---- early stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "mode", "patience", "min_delta", "stops_at"),
    [
        ([3, 2, 1, 2, 2], "min", 2, 0.0, 4),
        ([3, 2, 1, 2, 0.5, 2, 2], "min", 2, 0.0, 6),
        ([1, 1, 1], "min", 2, 0.0, 2),  # equal is no better
        ([1, 2, 3, 2.5, 2.9], "max", 2, 0.0, 4),
        ([1, 0.95, 0.9, 0.85], "min", 3, 0.1, None),  # 0.85 is better than 1 by more than 0.1
        ([1, 0.95, 0.92, 0.91], "min", 3, 0.1, 3),
        ([math.nan, math.nan], "min", 2, 0.0, 1),
        ([math.nan, 1, math.nan, math.nan], "max", 2, 0.0, 3),
        ([math.inf, 5, 6], "min", 1, 0.0, 2),
        ([3, 2, 1], "min", 1, 0.0, None),
    ],
)
def test_early_stopping(values: list[float], mode: str, patience: int, min_delta: float, stops_at: int | None) -> None:
    stopping = EarlyStopping(patience, mode, min_delta)
    assert next((place for place, value in enumerate(values) if stopping.update(value)), None) == stops_at
    for cut in range(len(values)):  # resumed anywhere
        first, second = EarlyStopping(patience, mode, min_delta), EarlyStopping(patience, mode, min_delta)
        for value in values[:cut]:
            first.update(value)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        verdicts = [second.update(value) for value in values[cut:]]
        assert verdicts.index(True) + cut == stops_at if stops_at is not None and cut <= stops_at else True


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"patience": 1, "mode": "lower"}, {"patience": 1, "min_delta": -1}])
def test_wrong_settings_of_early_stopping(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^\[EarlyStopping\] \w+ must .*; pass "):
        EarlyStopping(**wrong)


# ---- throughput --------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput() -> None:
    clock = Clock()
    speed = Throughput(flops_per_sample=1e6, peak=1e9, ranks=2, clock=clock)
    assert speed.row() == {}
    for _ in range(4):
        clock.now += 0.5
        speed.add(32, 1000, waited=0.125)
    with speed.paused():
        clock.now += 60.0
    assert speed.row() == {
        "steps/s": 2.0,
        "samples/s": 128.0,  # of both ranks
        "data_wait": 0.25,
        "tokens/s": 4000.0,
        "mfu": 64 * 1e6 / 1e9,  # of one
    }
    assert speed.row() == {}  # begins anew
    clock.now += 1.0
    speed.add(8)
    assert speed.row() == {"steps/s": 1.0, "samples/s": 16.0, "data_wait": 0.0, "mfu": 8 * 1e6 / 1e9}


def test_throughput_pauses_over_an_exception_and_forgets() -> None:
    clock = Clock()
    speed = Throughput(clock=clock)
    with suppress(KeyError), speed.paused():
        clock.now += 5.0
        raise KeyError
    clock.now += 1.0
    speed.add(1, waited=3.0)
    assert speed.row() == {"steps/s": 1.0, "samples/s": 1.0, "data_wait": 1.0}
    speed.add(1)
    speed.restart()
    clock.now += 1.0
    assert speed.row() == {}


# ---- memory ------------------------------------------------------------------------------------------


def test_memory_of_the_host_follows_an_allocation() -> None:
    before = memory("cpu")
    assert before.keys() == {"memory/host"}
    with mmap.mmap(-1, 64 << 20) as block:  # of its own: an allocator may have that much at hand
        block.write(b"x" * (64 << 20))
        assert memory()["memory/host"] - before["memory/host"] > 32 << 20


@on_gpu
def test_memory_of_a_device() -> None:
    before = memory("cuda")
    block = torch.ones(16 << 20, dtype=torch.float32, device="cuda")
    after = memory(block.device)
    assert after["memory/allocated"] - before["memory/allocated"] == block.nbytes
    assert after["memory/reserved"] >= after["memory/allocated"]
    assert after["memory/peak"] >= after["memory/allocated"]


# ---- FLOPs -------------------------------------------------------------------------------------------


def test_flops_of_linear_layers() -> None:
    """A product of (B, I) and (I, O) takes 2BIO; backward has one for the weight and, but for the first, the input."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    first, second = 2 * 16 * 64 * 32, 2 * 16 * 32 * 10
    assert model_flops(model, torch.randn(16, 64)) == 2 * first + 3 * second
    assert model_flops(model, (torch.randn(16, 64), torch.zeros(16))) == 2 * first + 3 * second


def test_flops_of_frozen_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))
    model[0].requires_grad_(False)
    assert model_flops(model, torch.randn(16, 64)) == 2 * 16 * 64 * 32 + 2 * (2 * 16 * 32 * 10)
    model.requires_grad_(False)
    assert model_flops(model, torch.randn(16, 64)) == 2 * 16 * 64 * 32 + 2 * 16 * 32 * 10


def test_flops_with_a_loss() -> None:
    class Net(nn.Module):
        scale = 2.0

        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout()

        def forward(self, images: Tensor) -> Tensor:
            return self.drop(self.norm(self.convolution(images))).mean((2, 3))

    def loss_fn(model: Net, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch["images"]) * model.scale
        return nn.functional.cross_entropy(logits, batch["labels"]), {"logits": logits}

    model, batch = Net(), {"images": torch.randn(4, 3, 10, 10), "labels": torch.zeros(4, dtype=torch.long)}
    forward = 2 * 4 * (3 * 3 * 3) * 8 * 10 * 10
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert model_flops(model, batch, loss_fn) == 2 * forward
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    loss, _ = loss_fn(model, batch)
    loss.backward()  # and it still trains
    assert model.convolution.weight.grad is not None


def test_flops_of_tied_weights_and_attention() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = nn.functional.scaled_dot_product_attention(x, x, x)
            return self.head(x)

    counted = model_flops(Tied(), torch.zeros(2, 8, dtype=torch.long))
    assert counted is not None
    assert counted > 3 * 2 * 16 * 16 * 50  # the head's three products, and attention


def test_flops_that_cannot_be_counted() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    assert model_flops(Looks(), torch.ones(3)) is None
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert model_flops(hooked, torch.ones(3, 3)) is None


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, half: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, torch.float16) == half


def test_peaks_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", torch.float16) == 125e12
    assert peak_flops("Tesla V100-SXM2-16GB", torch.bfloat16) is None  # not in hardware
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float64) is None
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    for precision, peak in (("highest", 19.5e12), ("high", 156e12), ("medium", 156e12)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == peak
        assert peak_flops("Tesla T4", torch.float32) == 8.1e12


def test_the_table_of_peaks_is_in_order() -> None:
    """A sheet's TF32 is at most half of its half precision, and its plain fp32 at most its TF32, save rounding."""
    for _, peak in flops._PEAKS:
        if peak.tf32 is not None and peak.half:
            assert peak.fp32 <= peak.tf32 <= 0.51 * peak.half


@on_gpu
def test_peak_of_this_gpu_is_above_what_a_product_reaches() -> None:
    peak = peak_flops("cuda", torch.float16)
    if peak is None:
        pytest.skip(f"needs a GPU with a known peak, this is {torch.cuda.get_device_name()}")
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.float16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a @ a
    begin.record()
    for _ in range(10):
        a @ a
    end.record()
    torch.cuda.synchronize()
    reached = 10 * 2 * n**3 / (begin.elapsed_time(end) / 1e3)
    assert 0.2 * peak < reached < 1.05 * peak  # a table that forgot a factor of 2 fails on one side or the other
