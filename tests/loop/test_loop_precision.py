# SPDX-License-Identifier: Apache-2.0
"""fp16's loss scale, bf16 by autocast, pure bf16 with fp32 masters: as by hand, bit for bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from by_hand import FEATURES, OPTIMIZERS, batches, cross_entropy, network
from support import bits
from torch import Tensor, nn

import fastloop
from fastloop import Loop
from fastloop.loop.reporter import OVERFLOWS


def weights(model: nn.Module) -> list[Any]:
    return [bits(p) for p in model.parameters()]


def autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast("cpu", dtype=dtype)


def overflowing(at: set[int]) -> Callable[[nn.Module, Any], Tensor]:
    """A loss_fn with finite losses, whose gradients at calls `at` are above float32's range once they are scaled."""
    calls = -1

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = cross_entropy(model, batch)
        return loss * 1e36 if calls in at else loss

    return loss_fn


# ---- fp16


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 0.05}])
@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "fastloop.SGD", "torch.AdamW", "torch.SGD"])
def test_the_loss_scale_takes_torchs_course(optimizer: str, clip: dict[str, float], accumulation: int) -> None:
    """Growth, back-off and what is skipped; clipped after it is unscaled, which Lightning#9599 had the wrong way."""
    data, at, make = batches([4] * 24), {3, 4, 11, 20}, OPTIMIZERS[optimizer]
    ours, theirs = network(), network()
    loop = Loop(ours, make(ours.parameters()), precision="fp16", accumulation_steps=accumulation, **clip)
    scalers = [loop._update.scaler, torch.amp.GradScaler("cpu")]
    for scaler in scalers:
        assert scaler is not None
        scaler.set_growth_interval(3)
    courses: list[list[float]] = [[], []]
    loss_fn, skips = overflowing(at), []
    for window in loop.windows(data, epochs=1):
        for batch in window:
            with loop.autocast():
                loss = loss_fn(loop.model, batch)
            loop.backward(loss)
        skips.append(loop.step().skipped.item())
        courses[0].append(scalers[0].get_scale())

    class Note:
        def step(self) -> None:
            courses[1].append(scalers[1].get_scale())

    by_hand.train(
        theirs, make(theirs.parameters()), data, accumulation=accumulation, loss_of=overflowing(at), scheduler=Note(),
        autocast=autocast(torch.float16), scaler=scalers[1], **clip,
    )  # fmt: skip
    assert courses[0] == courses[1]
    assert len(set(courses[0])) > 2, "the scale has to go up and down for the test to see anything"
    skipped = {i for i, was_skipped in enumerate(skips) if was_skipped}
    assert skipped >= {i // accumulation for i in at}  # and where the scale has grown too far by itself
    assert len(skips) - len(skipped) > len(skips) // 2
    assert weights(ours) == weights(theirs)
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_fp16_with_uneven_batches_against_fp64() -> None:
    """The scale and the window's weight are divided out together."""
    data = batches([1, 8, 3])
    model, whole = network(), network().double()
    loop = Loop(model, fastloop.SGD(model.parameters(), lr=1.0), cross_entropy, precision="fp16", accumulation_steps=3)
    loop.fit(data, epochs=1)
    F.cross_entropy(whole(torch.cat([x for x, _ in data]).double()), torch.cat([y for _, y in data])).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert q.grad is not None
        # Each of about 12 roundings of fp16 (2^-11) in the forward and backward of two layers moves the gradient by
        # that part of terms below 4 in size; a scale or weight that is left in moves it by a factor of 3 or more.
        off = (q.detach() - q.grad - p.detach().double()).abs().max()
        assert off < 12 * 4 * 2.0**-11
    assert (network()[0].weight - model[0].weight).abs().max() > 0.05


@pytest.mark.parametrize("nonfinite", ["raise", "stop"])
@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "torch.SGD"])
def test_an_overflow_of_the_scale_is_no_accident(optimizer: str, nonfinite: str, caplog: Any) -> None:
    model = network()
    loop = Loop(model, OPTIMIZERS[optimizer](model.parameters()), overflowing({2, 3, 6}), precision="fp16",
                nonfinite=nonfinite, log_every=1)  # fmt: skip
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        history = loop.fit(batches([4] * 8), epochs=1)
    assert loop.global_step == 8
    assert loop.stop_reason is None
    assert "not finite" not in caplog.text
    assert "nothing was updated" not in caplog.text
    assert all(math.isfinite(value) for _, value in history["train/loss"])


def test_a_loss_that_is_nan_is_one_under_fp16_too() -> None:
    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), lambda m, b: cross_entropy(m, b) * math.nan,
                precision="fp16", nonfinite="raise")  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan"):
        loop.fit(batches([4]), epochs=1)


def test_overflows_without_end_are_no_matter_of_the_scale() -> None:
    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), overflowing(set(range(99))), precision="fp16",
                nonfinite="raise")  # fmt: skip
    scaler = loop._update.scaler
    assert scaler is not None
    with pytest.raises(FloatingPointError, match=f"step {OVERFLOWS}: "):
        loop.fit(batches([4] * 99), epochs=1)


# ---- bf16


@pytest.mark.parametrize("precision", ["bf16", "auto"])
@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "torch.AdamW"])
def test_bf16_autocast_bit_for_bit(optimizer: str, precision: str) -> None:
    data, make = batches([4, 2, 7, 4, 1]), OPTIMIZERS[optimizer]
    ours, theirs = network(), network()
    loop = Loop(ours, make(ours.parameters()), cross_entropy, precision=precision, accumulation_steps=2)
    loop.fit(data, epochs=2)
    by_hand.train(theirs, make(theirs.parameters()), data, epochs=2, accumulation=2, autocast=autocast(torch.bfloat16))
    assert loop.precision == "bf16"
    assert weights(ours) == weights(theirs) != weights(network())


def pure(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_pure_bf16_is_master_weights_by_hand(accumulation: int) -> None:
    data = batches([4] * 6)
    ours, theirs = pure(network()), pure(network()).bfloat16()
    optimizer = fastloop.AdamW(ours.parameters(), lr=0.05)
    other = fastloop.AdamW(theirs.parameters(), lr=0.05, master_weights=True)
    Loop(ours, optimizer, cross_entropy, precision="bf16-pure", accumulation_steps=accumulation).fit(data, epochs=2)
    by_hand.train(
        theirs, other, data, epochs=2, accumulation=accumulation,
        loss_of=lambda model, batch: cross_entropy(model, (batch[0].bfloat16(), batch[1])),
    )  # fmt: skip
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert weights(ours) == weights(theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine, hers = optimizer.state[p], other.state[q]
        assert {name: bits(t) for name, t in mine.items()} == {name: bits(t) for name, t in hers.items()}
        assert mine["exp_avg"].dtype == mine["master_param"].dtype == torch.float32


def test_pure_bf16_masters_start_from_the_fp32_values() -> None:
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = fastloop.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    Loop(model, optimizer, cross_entropy, precision="bf16-pure").fit(batches([4]), epochs=1)
    for p, before in zip(model.parameters(), start, strict=True):
        assert torch.equal(optimizer.state[p]["master_param"], before)
        assert torch.equal(p, before.bfloat16())


def test_pure_bf16_takes_fp32_inputs_and_leaves_others() -> None:
    seen: list[torch.dtype] = []

    class Model(nn.Linear):
        def forward(self, x: Tensor, *, index: Tensor, more: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            seen.extend((x.dtype, index.dtype, more["mask"].dtype, more["bias"].dtype))
            return super().forward(x) + more["bias"]

    model = Model(FEATURES, 2)
    loop = Loop(model, fastloop.AdamW(model.parameters()), precision="bf16-pure")
    for window in loop.windows([torch.randn(4, FEATURES)], max_steps=1):
        for x in window:
            more = {"mask": torch.ones(4, dtype=torch.bool), "bias": torch.ones(2)}
            loop.backward(loop.model(x, index=torch.arange(4), more=more).float().mean())
        loop.step()
    assert seen == [torch.bfloat16, torch.int64, torch.bool, torch.bfloat16]


def test_evaluating_averages_leaves_pure_bf16s_masters() -> None:
    """The averages pass through the parameters, whose versions move: no reason to make masters of their roundings."""

    def trained(evaluates: bool) -> list[Any]:
        model = network()
        optimizer = fastloop.AdamW(model.parameters(), lr=0.05, ema_decay=0.9)
        loop = Loop(model, optimizer, cross_entropy, precision="bf16-pure")
        for _ in range(3):
            loop.fit(batches([4] * 9), max_steps=loop.global_step + 3)
            if evaluates:
                loop.evaluate(batches([4]), ema=True)
        return [bits(optimizer.state[p][name]) for p in model.parameters() for name in ("master_param", "ema")]

    assert trained(True) == trained(False)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda params: torch.optim.AdamW(params), TypeError, "AdamW of torch does not keep"),
        (lambda params: fastloop.AdamW(params, state_dtype=torch.bfloat16), ValueError, "state_dtype=torch.bfloat16"),
    ],
)
def test_pure_bf16_refuses_optimizers_without_masters(make: Any, error: Any, text: str) -> None:
    model = network()
    with pytest.raises(error, match=text):
        Loop(model, make(model.parameters()), precision="bf16-pure")


def test_pure_bf16_refuses_an_optimizer_that_has_stepped() -> None:
    model = network()
    optimizer = fastloop.AdamW(model.parameters())
    cross_entropy(model, batches([4])[0]).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"stepped without master weights"):
        Loop(model, optimizer, precision="bf16-pure")


def test_an_unknown_precision() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"precision must be one of .*'bf16-pure'.*, got 'bf17'"):
        Loop(model, fastloop.AdamW(model.parameters()), precision="bf17")


def configured(**options: Any) -> Loop:
    model = network()
    return Loop(model, fastloop.SGD(model.parameters(), lr=0.1), cross_entropy, **options)


def test_settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own test helpers, which other test modules import, freeze the flags of torch.backends.
    module = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(module, "__allow_nonbracketed_mutation_flag", True)
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        configured()
        assert before == (
            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.get_num_threads(),
        )  # fmt: skip
        configured(cudnn_benchmark=True, matmul_precision="medium", threads=1)
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == 1
        configured(cudnn_benchmark=False)
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])
        torch.set_num_threads(before[2])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"matmul_precision": "tf32"}, "matmul_precision must be one of"),
        ({"threads": 0}, "threads must be an integer above 0"),
        ({"cudnn_benchmark": True, "deterministic": True}, "leave one of them out"),
    ],
)
def test_settings_that_are_none(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        configured(**options)
