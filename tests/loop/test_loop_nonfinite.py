# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients that are not finite, windows that weigh nothing, memory that runs out."""

from __future__ import annotations

import itertools
import json
import logging
import math
from typing import Any, NamedTuple

import pytest
import torch
from by_hand import OPTIMIZERS, batches, cross_entropy, network
from support import bits
from tolerances import unit_roundoff
from torch import Tensor, nn

import fastloop
from fastloop import Loop
from fastloop.loop.nonfinite import load_batches

BAD = 3  # the batch, from 0


def data(poison: float = math.nan) -> list[tuple[Tensor, Tensor]]:
    made = batches([4] * 8)
    made[BAD][0][2, 1] = poison
    return made


def weights(model: nn.Module) -> list[Any]:
    return [bits(p) for p in model.parameters()]


def rows_of(run_dir: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- skip, stop, raise


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skip_leaves_the_weights_and_counts(optimizer: str, accumulation: int) -> None:
    model, other = network(), network()
    loop = Loop(model, OPTIMIZERS[optimizer](model.parameters()), accumulation_steps=accumulation)
    window_of_bad, before, skipped = BAD // accumulation, [], []
    for window in loop.windows(data(), epochs=1):
        before.append(weights(model))
        for batch in window:
            loop.backward(cross_entropy(loop.model, batch))
        skipped.append(loop.step().skipped.item())
    before.append(weights(model))
    assert skipped == [float(i == window_of_bad) for i in range(8 // accumulation)]
    assert [a == b for a, b in itertools.pairwise(before)] == [bool(s) for s in skipped]
    # as if the window had not been there, but for the count of windows
    rest = data()
    start = window_of_bad * accumulation
    del rest[start : start + accumulation]
    shorter = Loop(other, OPTIMIZERS[optimizer](other.parameters()), cross_entropy, accumulation_steps=accumulation)
    shorter.fit(rest, epochs=1)
    assert weights(other) == weights(model)
    assert loop.global_step == shorter.global_step + 1 == 8 // accumulation


def test_the_schedule_moves_on_over_a_skipped_window() -> None:
    model = network()
    loop = Loop(
        model, fastloop.AdamW(model.parameters(), lr=1.0), cross_entropy, schedule=lambda step: step, log_every=1
    )
    assert loop.fit(data(), epochs=1)["lr"] == [(step + 1, float(step)) for step in range(8)]


def test_a_nan_is_visible_in_the_log(tmp_path: Any, caplog: Any) -> None:
    """trl#6702 averaged over the finite ones alone, and the run looked well."""
    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), cross_entropy, run_dir=tmp_path, log_every=2)
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        history = loop.fit(data(), epochs=1)
    assert [math.isnan(value) for _, value in history["train/loss"]] == [False, True, False, False]
    rows = rows_of(tmp_path)
    assert [row["train/loss"] is None or isinstance(row["train/loss"], str) for row in rows] == [
        False,
        True,
        False,
        False,
    ]
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1]
    assert "step 4: loss nan, gradient norm nan, nothing was updated" in caplog.text


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "torch.SGD"])
def test_stop_saves_the_run_and_the_batch(optimizer: str, poison: float, tmp_path: Any) -> None:
    model = network()
    loop = Loop(model, OPTIMIZERS[optimizer](model.parameters()), cross_entropy, run_dir=tmp_path, nonfinite="stop",
                accumulation_steps=2, loggers=())  # fmt: skip
    loop.fit(data(poison), epochs=1)
    assert loop.stop_reason == "nonfinite"
    assert loop.global_step == 2
    (file,) = (tmp_path / "nonfinite").iterdir()
    saved = load_batches(file)
    assert [[bits(t) for t in batch] for batch in saved] == [[bits(t) for t in batch] for batch in data(poison)[2:4]]
    again = network(seed=5)
    assert Loop(again, OPTIMIZERS[optimizer](again.parameters()), run_dir=tmp_path, loggers=()).global_step == 2
    assert weights(again) == weights(model)


def test_raise(tmp_path: Any) -> None:
    model = network()
    loop = Loop(
        model, fastloop.AdamW(model.parameters()), cross_entropy, run_dir=tmp_path, nonfinite="raise", loggers=()
    )
    with pytest.raises(
        FloatingPointError, match=r"\[Loop\] step 4: loss nan.*its batches are in .*step-000000004-rank-0"
    ):
        loop.fit(data(), epochs=1)
    assert len(load_batches(next((tmp_path / "nonfinite").iterdir()))) == 1


class Pair(NamedTuple):
    x: Tensor
    same: Tensor


def test_batches_whose_tensors_share_memory_are_saved(tmp_path: Any) -> None:
    """As the inputs and targets of a language model, which are one block shifted by one."""
    block = torch.full((1, 7), math.nan)
    model = nn.Linear(6, 1)
    batch = {"pair": Pair(block[:, :-1], block[:, 1:]), "whole": block, "more": [1, "text", None]}
    loop = Loop(model, fastloop.AdamW(model.parameters()), lambda m, b: m(b["pair"].x).mean(), run_dir=tmp_path,
                nonfinite="stop", loggers=())  # fmt: skip
    loop.fit([batch], epochs=1)
    (saved,) = load_batches(next((tmp_path / "nonfinite").iterdir()))
    assert bits(saved["pair"][0]) == bits(block[:, :-1])
    assert bits(saved["whole"]) == bits(block)
    assert saved["more"] == [1, "text", None]


def test_a_batch_that_cannot_be_saved_is_no_second_accident(tmp_path: Any, caplog: Any) -> None:
    class Own:
        x = torch.full((2, 6), math.nan)

    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), lambda m, b: m(b.x).mean(), run_dir=tmp_path,
                nonfinite="stop", loggers=())  # fmt: skip
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        loop.fit([Own()], epochs=1)
    assert loop.stop_reason == "nonfinite"
    assert "the batch could not be saved" in caplog.text


def test_a_loss_that_is_not_finite_with_gradients_that_are(caplog: Any) -> None:
    """Said as it is: the weights were updated."""
    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), lambda m, b: cross_entropy(m, b) + math.inf)
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        loop.fit(batches([4]), epochs=1)
    assert "loss inf" in caplog.text
    assert "the weights were updated" in caplog.text
    assert weights(model) != weights(network())


def test_a_spike_is_reported_and_counted(caplog: Any) -> None:
    losses = iter([1.0, 1.1, 0.9, 1.05] * 8 + [50.0] + [1.0] * 7)
    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), lambda m, b: cross_entropy(m, b) * 0 + next(losses))
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        loop.fit(batches([4] * 40), epochs=1)
    assert "step 33: loss 50 is a spike" in caplog.text
    assert caplog.text.count("spike") == 1


# ---- windows and batches of weight 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_window_that_weighs_nothing(optimizer: str, precision: str, caplog: Any) -> None:
    """No update, no wrong alarm, no lower loss scale, and the windows go on being counted."""
    model = network()
    loop = Loop(model, OPTIMIZERS[optimizer](model.parameters()), precision=precision, nonfinite="raise")
    scaler, seen = loop._update.scaler, []
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        for i, window in enumerate(loop.windows(batches([4] * 3), epochs=1)):
            before = weights(model)
            for batch in window:
                with loop.autocast():
                    loss = cross_entropy(loop.model, batch)
                loop.backward(loss * math.nan if i == 1 else loss, weight=0 if i == 1 else None)
            result = loop.step()
            seen.append(
                (result.skipped.item(), weights(model) == before, None if scaler is None else scaler.get_scale())
            )
    assert [s[:2] for s in seen] == [(0.0, False), (1.0, True), (0.0, False)]
    assert len({s[2] for s in seen}) == 1
    assert "step 2: the window weighs nothing" in caplog.text
    assert "loss nan" not in caplog.text
    assert loop.global_step == 3


# ---- auto_microbatch


class Memory:
    """A loss_fn with room for `room` samples, and no knowledge of the loop."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        x, y = batch
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("no room")
        loss = cross_entropy(model, (x, y))
        return loss, {"right": (model(x).argmax(1) == y).double().mean()}


@pytest.mark.parametrize("room", [8, 5, 4, 2, 1])
def test_micro_batches_are_halved_until_they_fit(room: int, caplog: Any) -> None:
    """The effective batch stays: the run is that of enough memory, but for the order of a sum of 11 rows.

    Memory may run out when gradients of the window are there already, which are then not to be counted twice.
    """
    sizes = [3, 8, 8, 3]
    models = [network(), network()]
    memory = Memory(room)
    loops = [
        Loop(model, fastloop.SGD(model.parameters(), lr=0.5), loss_fn, auto_microbatch=auto, accumulation_steps=2,
             log_every=1)
        for model, loss_fn, auto in zip(models, (memory, Memory(99)), (True, False), strict=True)
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        histories = [loop.fit(batches(sizes), epochs=1) for loop in loops]
    parts = {8: 1, 5: 2, 4: 2, 2: 4, 1: 8}[room]
    assert loops[0]._parts == parts
    assert caplog.text.count("out of memory") == int(math.log2(parts))
    assert list(histories[0]) == list(histories[1])
    for (_, a), (_, b) in zip(histories[0]["train/right"], histories[1]["train/right"], strict=True):
        assert abs(a - b) < 1e-12  # a share of 16 samples, in float64
    # 16 rows, two steps; gradients and weights are below 2
    bound = 2 * 2 * (16 + 20) * unit_roundoff(torch.float32)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (p - q).abs().max() <= bound
    assert (models[0][0].weight - network()[0].weight).abs().max() > 100 * bound
    assert loops[0].global_step == 2


def test_a_single_sample_without_room_raises() -> None:
    model = network()
    loop = Loop(model, fastloop.SGD(model.parameters(), lr=0.5), Memory(0), auto_microbatch=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"no room"):
        loop.fit(batches([4]), epochs=1)


def test_the_number_of_parts_stays_for_the_run_and_its_resumes(tmp_path: Any) -> None:
    def loop(memory: Memory) -> Loop:
        model = network()
        return Loop(model, fastloop.SGD(model.parameters(), lr=0.5), memory, auto_microbatch=True, run_dir=tmp_path,
                    loggers=())  # fmt: skip

    first, second = Memory(4), Memory(4)
    loop(first).fit(batches([8] * 3), max_steps=2)
    assert first.sizes == [8, 4, 4, 4, 4]
    loop(second).fit(batches([8] * 3), max_steps=3)
    assert second.sizes == [4, 4]


def test_windows_and_strategies_refuse_auto_microbatch() -> None:
    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), auto_microbatch=True)
    with pytest.raises(ValueError, match=r"auto_microbatch=True needs fit\(\)"):
        loop.windows([], epochs=1)
    with pytest.raises(ValueError, match=r"auto_microbatch=True is for one process"):
        Loop(model, fastloop.AdamW(model.parameters()), auto_microbatch=True, strategy="ddp")
