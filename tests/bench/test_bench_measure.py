# SPDX-License-Identifier: Apache-2.0
"""Order, counts and limits of the measurement; no assertion depends on how fast anything is."""

from __future__ import annotations

import gc

import pytest
import torch

from fastloop.bench import ceiling, measure, memory, models
from fastloop.bench.cases import CASES, CONTROL, Pass, Traffic, parameters, select


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A clock that the calls move: `a` lasts 40 ms and `b` 25 ms, in a log of who was called."""
    log: list[str] = []
    now = [0]
    lasts = {"a": 40_000_000, "b": 25_000_000}

    class Calls(list[str]):
        def append(self, name: str) -> None:
            now[0] += lasts[name]
            super().append(name)

    monkeypatch.setattr(measure, "perf_counter_ns", lambda: now[0])
    log = Calls()
    return log


def test_pairs_are_taken_in_the_order_abba(clock: list[str]) -> None:
    pairs = measure.measure_pairs(lambda: clock.append("a"), lambda: clock.append("b"), pairs=(4,))
    # Two calls of each to warm up and calibrate, then the pairs.
    assert "".join(clock) == "aabb" + "abbaabba"
    assert pairs.repetitions == (1, 1)
    assert pairs.ratios == pytest.approx([1.6] * 4)


def test_undecided_ratios_get_more_pairs_up_to_the_limit(clock: list[str]) -> None:
    counts: list[int] = []

    def undecided(interval: object) -> bool:
        counts.append(len(clock))
        return False

    pairs = measure.measure_pairs(lambda: clock.append("a"), lambda: clock.append("b"), decided=undecided)
    assert (len(pairs.ratios), pairs.stopped, len(counts)) == (80, "limit", 3)


def test_a_deadline_stops_after_five_pairs(clock: list[str]) -> None:
    pairs = measure.measure_pairs(lambda: clock.append("a"), lambda: clock.append("b"), deadline=0.0)
    assert (len(pairs.ratios), pairs.stopped) == (measure.FEWEST_PAIRS, "deadline")


def test_short_calls_are_repeated_until_a_sample_lasts() -> None:
    assert measure.calibrate(lambda: None, seconds=0.1) > 1


def test_collection_is_off_while_timing_and_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with measure.quiet_interpreter(1):
        assert not gc.isenabled()
        assert torch.get_num_threads() == 1
    assert gc.isenabled()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        (models.gpt2(), 148, 124_439_808),
        (models.bert(), 199, 109_482_240),
        (models.resnet50(), 161, 25_557_032),
        (models.mlp(64, 64, 64, 10), 6, 8970),
    ],
)
def test_shapes_are_those_of_the_published_models(shapes: list[models.Shape], tensors: int, elements: int) -> None:
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == elements


def test_declared_bytes() -> None:
    by_name = {case.name: case for case in CASES}
    assert by_name["gpt2-124m"].traffic.bytes_per_element == 32
    assert by_name["gpt2-124m-bf16"].traffic.bytes_per_element == 16
    assert by_name["mlp"].traffic.bytes == 32 * 8970


def test_names_are_unique_and_patterns_select() -> None:
    names = [case.name for case in (*CASES, CONTROL)]
    assert len(set(names)) == len(names)
    assert [case.name for case in select("gpt2-*")] == ["gpt2-124m", "gpt2-124m-bf16"]
    assert [case.name for case in select("mlp")] == ["mlp"]
    assert select("nothing") == []


def test_parameters_are_the_same_at_every_call() -> None:
    first, second = (parameters([(3, 5), (0,), (7,)], torch.bfloat16) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
        assert a.is_leaf


@pytest.mark.parametrize("native", [True, False])
def test_ceiling_moves_what_it_says(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(ceiling, "_native_stream", lambda: None)
    elif ceiling._native_stream() is None:
        pytest.skip("needs the native module")
    top = ceiling.build(Traffic((Pass(1, 0), Pass(1, 3)), 1000, 4))
    top.run()
    assert top.bytes == 32_000
    assert top.method == ("native" if native else "torch")


def test_memory_counts_states_and_temporaries() -> None:
    tensors = parameters([(1000,)], torch.float32)
    optimizer = torch.optim.AdamW(tensors, foreach=True)
    optimizer.step()
    found = memory.measure(optimizer.step, tensors, optimizer)
    # parameter, gradient, two moments and the step count; the update's temporary is as large as the parameter
    assert found.resident_bytes == 4 * 4000 + 4
    assert found.transient_bytes >= 4000
    assert found.allocations >= 1
    assert memory.measure(lambda: None, tensors, optimizer).transient_bytes == 0
