# SPDX-License-Identifier: Apache-2.0
"""The batch tuner: which sizes it tries, what it recommends, and what it says where nothing can be won."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastloop import tune
from fastloop.tune import size_trial, trial
from fastloop.tune.batch import COMPARE, batch
from fastloop.tune.longest import elements, fixed_batches, look, samples_of
from fastloop.tune.session import Session
from fastloop.tune.sizes import Line, Search, Tried, divisors, line_through
from fastloop.tune.target import TargetError

MIB = 2**20


# ---- arithmetic


@given(st.integers(1, 5000))
def test_divisors_are_all_of_them_in_order(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@given(st.integers(0, 10**9), st.integers(1, 10**6), st.sets(st.integers(1, 4096), min_size=2, max_size=8))
def test_the_line_goes_through_points_on_a_line(fixed: int, per_sample: int, sizes: set[int]) -> None:
    line = line_through([(size, fixed + per_sample * size) for size in sizes])
    assert line is not None
    assert line.per_sample == pytest.approx(per_sample, rel=1e-6)
    assert line.fixed == pytest.approx(fixed, rel=1e-6, abs=1e-3 * per_sample)
    exact = Line(fixed, per_sample)
    assert exact.largest(fixed + per_sample * 100.5) == 100


def test_no_line_goes_through_one_size() -> None:
    assert line_through([(8, 100), (8, 120)]) is None
    assert Line(5.0, 0.0).largest(100.0) is None


# ---- the search, on a machine that is a formula


def explored(search: Search, rate: Any, peak: Any, breaks: float = math.inf) -> list[int]:
    """Try what the search asks for; the sizes in order. Above `breaks` bytes a trial runs out of memory."""
    order: list[int] = []
    while (size := search.next()) is not None:
        assert size not in order
        order.append(size)
        assert len(order) < 60
        worked = peak(size) <= breaks
        search.tell(Tried(size, rate(size), peak(size)) if worked else Tried(size, None))
    return order


def saturating(size: int) -> float:
    """A fixed cost of 10 ms and 1 ms a sample."""
    return size / (0.010 + 0.001 * size)


def peaked(size: int) -> float:
    """The same, and above 200 samples another 2 ms for each: the fastest is 200."""
    return size / (0.010 + 0.001 * size + 0.002 * max(0, size - 200))


def flat(size: int) -> float:
    return 100.0


def linear(size: int) -> int:
    return (100 + size) * MIB


def test_a_peak_in_the_middle_is_found_without_going_far_beyond_it() -> None:
    search = Search(16, limit=10**12)
    order = explored(search, peaked, linear)
    assert search.best is not None
    assert peaked(search.best.size) >= 0.97 * peaked(200)
    assert max(order) <= 16 * 200 / 2
    assert len(order) <= 12


@given(st.integers(1, 600), st.floats(120.0, 2000.0))
def test_what_is_chosen_fits_and_is_near_the_bound_where_larger_is_faster(start: int, mib: float) -> None:
    def rising(size: int) -> float:
        return float(size)

    limit = mib * MIB
    search = Search(start, limit=limit)
    explored(search, rising, linear, breaks=limit / 0.9)
    bound = math.floor(mib - 100)
    assert search.best is not None
    assert search.best.peak is not None
    assert search.best.peak <= limit
    assert search.best.size >= bound / 1.3 - 1


def test_out_of_memory_at_the_start_goes_down() -> None:
    search = Search(1024, limit=200 * MIB)
    order = explored(search, saturating, linear, breaks=220 * MIB)
    assert order[:5] == [1024, 512, 256, 128, 64]
    assert search.best is not None
    assert 64 <= search.best.size <= 100


def test_a_size_that_the_line_rules_out_is_not_tried() -> None:
    search = Search(8, limit=400 * MIB)
    order = explored(search, saturating, lambda size: (100 + 4 * size) * MIB)
    assert 128 not in order
    assert search.hopeless[128] == pytest.approx(612 * MIB)
    assert max(order) <= 75


def test_nothing_fits() -> None:
    search = Search(8, limit=50 * MIB)
    assert explored(search, saturating, linear) == [8, 4, 2, 1]
    assert search.best is None


@given(st.integers(1, 200), st.integers(1, 200))
def test_no_size_is_above_the_largest(start: int, largest: int) -> None:
    search = Search(min(start, largest), largest=largest)
    order = explored(search, saturating, linear)
    assert max(order) <= largest
    assert largest in order  # it is the fastest


@given(st.integers(1, 500), st.integers(1, 500))
def test_only_allowed_sizes_are_tried(effective: int, start: int) -> None:
    search = Search(start, allowed=divisors(effective))
    order = explored(search, saturating, linear)
    assert order
    assert all(effective % size == 0 for size in order)
    assert effective in order  # larger is faster here


def test_equal_rates_choose_the_smallest() -> None:
    search = Search(32)
    order = explored(search, flat, linear)
    assert search.best is not None
    assert search.best.size == min(order)


# ---- the longest batch


class Sentences(Dataset):
    """Sample i is as long as `lengths[i]` says."""

    def __init__(self, lengths: list[int], told: bool = False) -> None:
        self._lengths = lengths
        if told:
            self.lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((self._lengths[index],), index)


def padded(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)


LENGTHS = [3, 9, 4, 9, 1, 7, 2, 8]


def test_the_longest_samples_make_the_batch() -> None:
    found = look(DataLoader(Sentences(LENGTHS), batch_size=3, shuffle=True, collate_fn=padded))
    assert found.varies
    assert found.longest.shape == (3, 9)
    assert sorted(found.longest[:, 0].tolist()) == [1, 3, 7]
    assert found.typical.shape[0] == 3
    assert "1 to 9 elements" in found.how


def test_a_dataset_that_knows_its_lengths_is_asked() -> None:
    loader = DataLoader(Sentences(LENGTHS, told=True), batch_size=3, shuffle=True, collate_fn=padded)
    found = look(loader, most=1)
    assert sorted(found.longest[:, 0].tolist()) == [1, 3, 7]
    assert "dataset.lengths" in found.how


def test_looking_ends_with_the_time() -> None:
    times = iter(range(100))
    found = look(
        DataLoader(Sentences(LENGTHS), batch_size=4, collate_fn=padded), seconds=2.5, clock=lambda: float(next(times))
    )
    assert found.longest.shape[0] == 4
    assert "the longest of 3 samples" in found.how
    assert "1 of its 4 are repeated" in found.how


def test_equal_samples_need_no_longest_batch() -> None:
    found = look(DataLoader(Sentences([5] * 6), batch_size=4))
    assert not found.varies
    assert found.longest is found.typical


def test_samples_are_taken_from_the_loaders_own_sampler() -> None:
    loader = DataLoader(Sentences(LENGTHS), batch_size=2, sampler=[4, 6], collate_fn=padded)
    assert look(loader).longest.shape == (2, 2)
    assert samples_of(loader) == 2


def test_a_batch_is_no_larger_than_the_data() -> None:
    assert look(DataLoader(Sentences([2, 2, 2]), batch_size=8)).longest.shape == (3, 2)
    with pytest.raises(ValueError, match="gives no batch"):
        look(DataLoader(Sentences([2, 2, 2]), batch_size=8, drop_last=True))


class Flow(IterableDataset):
    def __iter__(self) -> Any:
        return iter([torch.ones(3), torch.ones(3)] * 10)


def test_batches_that_the_loader_makes_itself() -> None:
    assert fixed_batches(DataLoader(Flow(), batch_size=2)) is None
    assert look(DataLoader(Flow(), batch_size=5)).longest.shape == (5, 3)
    own = DataLoader(Sentences(LENGTHS), batch_sampler=[[0], [1, 3], [2]], collate_fn=padded)
    assert "batch_sampler" in str(fixed_batches(own))
    assert look(own).longest.shape == (2, 9)
    assert fixed_batches([torch.ones(2, 3)]) is not None
    with pytest.raises(ValueError, match="gave no batch"):
        look([])


def test_elements_of_nested_samples() -> None:
    assert elements({"text": "four", "x": (torch.ones(2, 3), [1, 2.0])}) == 4 + 6 + 2


# ---- the answer, with trials that are formulas


class Machine:
    """In place of processes: rates and peaks by formula.

    Args:
        now: the present (batch size, accumulation steps). notes: what differs of what a process would note.
        gain: the paired run's answer, None if it fails.
    """

    def __init__(
        self,
        now: tuple[int, int] = (32, 1),
        rate: Any = saturating,
        peak: Any = linear,
        capacity: int = 1000 * MIB,
        gain: float | None = 1.5,
        **notes: Any,
    ) -> None:
        self.now, self.rate, self.peak, self.capacity, self.gain = now, rate, peak, capacity, gain
        self.notes, self.tried, self.paired = notes, [], []

    def run(self, function: str, arguments: dict[str, Any], **_: Any) -> trial.Outcome:
        if function == COMPARE:
            self.paired.append((arguments["a"], arguments["b"]))
            if self.gain is None:
                return trial.Outcome(trial.TIMEOUT, reason="not done after 60 s")
            interval = {"median": self.gain, "low": self.gain - 0.01, "high": self.gain + 0.01}
            return trial.Outcome(trial.OK, {"gain": interval, "pairs": 5})
        size = arguments["batch_size"] or self.now[0]
        self.tried.append((size, arguments["accumulation_steps"] or self.now[1]))
        notes = {
            "batch_size": self.now[0], "accumulation_steps": self.now[1], "samples": None, "fixed": None,
            "looked": "all alike", "varies": False, "batch_samples": size, **self.notes,
        }  # fmt: skip
        if self.peak(size) > self.capacity:
            return trial.Outcome(trial.OUT_OF_MEMORY, notes=notes, reason="too much")
        value = self.rate(size)
        return trial.Outcome(
            trial.OK, notes=notes,
            result={
                "rate": {"median": value, "low": value, "high": value}, "windows": 5,
                "peak": {"bytes": self.peak(size), "capacity": self.capacity, "what": "a formula"},
            },
        )  # fmt: skip


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Run the tuner on a Machine."""
    monkeypatch.chdir(tmp_path)

    def run(machine: Machine, **options: Any) -> Any:
        monkeypatch.setattr(trial, "run", machine.run)
        report = batch("json:loads", fresh=True, **options)
        assert [t.settings for t in report.trials if t.status != "skipped"] == [
            {"batch_size": a, "accumulation_steps": b} for a, b in machine.tried
        ]
        return report

    return run


def test_without_another_effective_batch_what_is_learned_stays(on: Any) -> None:
    report = on(Machine((16, 4)))
    assert report.loader["batch_size"] * report.loop["accumulation_steps"] == 64
    assert report.loader == {"batch_size": 64}
    assert not report.keep
    assert report.gain.median == 1.5
    said = " ".join(report.findings)
    assert "another learning rate" in said
    assert "effective_batch=" in said


def test_the_wanted_effective_batch_is_split(on: Any) -> None:
    machine = Machine((16, 1), capacity=200 * MIB)  # 180 may be taken: 80 samples
    report = on(machine, effective_batch=480)
    assert report.loader["batch_size"] * report.loop["accumulation_steps"] == 480
    assert 40 <= report.loader["batch_size"] <= 80
    assert all(size * steps == 480 for size, steps in machine.tried[1:])


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(120, 2000))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_split_is_exact_and_fits(on: Any, effective: int, now: int, mib: int) -> None:
    machine = Machine((now, 1), capacity=mib * MIB)
    report = on(machine, effective_batch=effective)
    assert all(size * steps == effective for size, steps in machine.tried[1:])
    if report.keep:
        return
    taken = report.best.settings
    assert taken["batch_size"] * taken["accumulation_steps"] == effective
    assert report.best.peak_bytes <= 0.9 * mib * MIB


def test_a_slower_split_is_recommended_where_it_was_asked_for(on: Any) -> None:
    report = on(Machine((16, 1), gain=0.8), effective_batch=64)
    assert not report.keep
    assert report.gain.median == 0.8


def test_an_effective_batch_without_divisors_is_told(on: Any) -> None:
    report = on(Machine((16, 1), capacity=200 * MIB), effective_batch=997)
    assert report.loader == {"batch_size": 1}
    assert any("must divide 997" in each and " would" in each for each in report.findings)


def test_the_margin_stays_free(on: Any) -> None:
    report = on(Machine((16, 1), rate=float), effective_batch=960)
    assert report.best.peak_bytes <= 900 * MIB
    assert on(Machine((16, 1), rate=float), effective_batch=960, margin=0.5).best.peak_bytes <= 500 * MIB
    over = [t for t in report.trials if (t.peak_bytes or 0) > 900 * MIB]
    assert all("above 90%" in t.reason for t in over)


def test_nothing_won_keeps_the_present(on: Any) -> None:
    report = on(Machine((32, 1), rate=flat, capacity=10**12))
    assert report.keep
    assert report.best is report.present
    assert report.loader == {}
    assert report.loop == {}
    assert any("No other batch size" in each for each in report.findings)


def test_a_win_that_the_paired_run_does_not_see_is_none(on: Any) -> None:
    machine = Machine((16, 4), gain=1.0)
    report = on(machine)
    assert machine.paired == [((16, 4), (64, 1))]
    assert report.keep
    assert report.best is report.present


def test_a_paired_run_that_fails_is_said(on: Any) -> None:
    report = on(Machine((16, 4), gain=None))
    assert report.gain is None
    assert any("paired run" in each for each in report.findings)
    assert (report.keep, report.loader, report.loop) == (True, {}, {})
    assert report.best is report.present


def test_a_present_size_that_runs_out_of_memory_is_replaced(on: Any) -> None:
    machine = Machine((64, 1), peak=lambda size: (100 + 20 * size) * MIB)
    report = on(machine)
    assert report.present.status == "out of memory"
    assert not report.keep
    assert report.loader["batch_size"] * report.loop["accumulation_steps"] == 64
    assert report.best.peak_bytes <= 900 * MIB
    assert machine.paired == []


def test_where_nothing_fits_nothing_is_recommended(on: Any) -> None:
    report = on(Machine((4, 1), peak=lambda size: 2000 * MIB))
    assert report.keep
    assert report.loader == {}
    assert any("No split" in each for each in report.findings)


def test_data_smaller_than_the_batch(on: Any) -> None:
    machine = Machine((64, 1), samples=50)
    report = on(machine)
    assert max(size for size, _ in machine.tried[1:]) <= 50
    assert any("50 samples" in each for each in report.findings)


def test_the_largest_is_kept(on: Any) -> None:
    machine = Machine((16, 1), rate=float)
    on(machine, largest=48)
    assert max(size for size, _ in machine.tried) == 48


def test_a_loader_that_makes_its_batches(on: Any) -> None:
    machine = Machine((16, 1), fixed="[loader] batch_size=1 for a loader with a batch_sampler of its own")
    report = on(machine)
    assert report.keep
    assert len(machine.tried) == 1
    assert any("batch_sampler" in each for each in report.findings)


def test_the_budget_ends_the_search(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine((16, 1))
    monkeypatch.setattr(Session, "left", lambda self: 100.0 if len(machine.tried) < 4 else 0.0)
    report = on(machine)
    assert len(machine.tried) == 4
    assert any("budget" in each for each in report.findings)
    assert report.keep
    assert report.loader == {}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"effective_batch": 0}, ValueError, "effective_batch"),
        ({"effective_batch": 2.5}, ValueError, "effective_batch"),
        ({"largest": True}, ValueError, "largest"),
        ({"margin": 1.0}, ValueError, "margin"),
        ({"margin": "10%"}, ValueError, "margin"),
        ({"budget": -1.0}, ValueError, "budget"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"\[tune\].*{words}"):
        batch("json:loads", **options)


@pytest.mark.slow
def test_both_sides_are_compared_without_graphs() -> None:
    """A loop keeps a graph of one shape; and here, without a GPU, one with cuda_graph cannot be made at all."""
    spec = {"function": "tune_sizes:perceptron", "arguments": {}, "options": {"cuda_graph": True}, "loader": {}}
    found = size_trial.compare_sizes(spec, (8, 1), (4, 2), 0.0)
    assert found["pairs"] >= 5


def test_graphs_left_out_of_the_paired_run_are_told(on: Any) -> None:
    report = on(Machine((16, 4)), options={"cuda_graph": True})
    assert report.gain is not None
    assert any("without cuda_graph" in each for each in report.findings)


# ---- real processes


@pytest.mark.slow
def test_a_size_under_the_limit_is_found_and_running_out_costs_nothing(monkeypatch: Any, tmp_path: Any) -> None:
    """34 samples take about 560 MiB, 17 take 280; there are 450 beside what a process with one sample takes.

    What a process has beside its tensors differs by some 50 MiB from one to the next.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(Session, "left", lambda self: 60.0)  # on a busy machine the first trial may take all of it
    here = [str(Path(__file__).parent)]
    one = trial.run("tune_sizes:peak_of_one", {}, timeout=120.0, memory_limit=None, folders=here)
    limit = one.result + 450 * MIB
    report = batch("tune_sizes:hungry", arguments={"batch_size": 34}, budget=60.0, timeout=120.0, effective_batch=34,
                   margin=0.01, memory_limit=limit, fresh=True)  # fmt: skip
    assert report.present.status == "out of memory"
    assert report.best.status == "ok"
    assert report.best.peak_bytes <= 0.99 * limit
    assert report.loader["batch_size"] * report.loop["accumulation_steps"] == 34
    assert {t.settings["batch_size"]: t.status for t in report.trials}[17] == "ok"


def test_a_broken_target_is_told(on: Any, monkeypatch: Any) -> None:
    machine = Machine()
    failed = trial.Outcome(trial.FAILED, reason="KeyError: 'no such table'", traceback="Traceback ...", exit_code=1)
    monkeypatch.setattr(machine, "run", lambda *_, **__: failed)
    with pytest.raises(TargetError, match="no such table") as raised:
        on(machine)
    assert (raised.value.traceback, raised.value.exit_code) == ("Traceback ...", 1)


def test_it_is_where_the_reference_says() -> None:
    assert tune.batch is batch
