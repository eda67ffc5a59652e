# SPDX-License-Identifier: Apache-2.0
"""The loader tuner: what it finds, what it leaves alone, and targets that fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import targets
import torch
from torch.utils.data import DataLoader

from fastloop import machine, tune
from fastloop.bench.stats import Interval
from fastloop.loop.forward import forward_backward
from fastloop.tune import loading, step, trial
from fastloop.tune.loader import _Search, candidates, smallest_near_best, won
from fastloop.tune.report import Trial
from fastloop.tune.session import Session

ONE = {"threads": 1}  # OpenMP's threads wait for each other on a busy machine,
PATIENT = 120.0  # where a process takes long to start


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where answers are kept


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: 2)


def always_left(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The budget is never spent: on a busy machine starting the trials may take all of it."""
    monkeypatch.setattr(Session, "left", lambda self: seconds)


def test_a_fast_data_set_is_not_the_bottleneck() -> None:
    report = tune.loader(targets.fast, budget=30.0, timeout=PATIENT, options=ONE)
    assert report.keep
    assert len(report.trials) == 1
    assert report.best is report.present
    assert "not the bottleneck" in report.findings[-1]
    again = tune.loader(targets.fast, budget=30.0, timeout=PATIENT, options=ONE)
    assert again.cached
    assert again.findings == report.findings


@pytest.mark.slow
def test_workers_remove_the_wait_of_a_slow_getitem(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> None:
    always_left(monkeypatch, 60.0)
    seen: list[Trial] = []
    report = tune.loader(
        targets.slow, arguments={"seconds": 0.01}, budget=60.0, timeout=PATIENT, options=ONE, on_trial=seen.append
    )
    assert not report.keep
    assert report.loader["num_workers"] == 2
    assert report.gain.low > 1.2
    assert report.present.wait_share > 0.5
    assert report.best.settings in [each.settings for each in report.trials if each.status == "ok"]
    assert seen == report.trials


def test_a_dataset_of_this_process(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> None:
    always_left(monkeypatch, 20.0)
    data = targets.Rows(count=4096, seconds=0.01)
    data.unpicklable = lambda: None
    report = tune.loader(data, settings={"batch_size": 4}, budget=8.0)
    assert not report.keep
    assert report.loader["num_workers"] == 2
    assert report.trials[0] is report.present
    assert "target" not in report.toml()


def test_a_broken_dataset_of_this_process() -> None:
    with pytest.raises(tune.TargetError, match="does not work") as caught:
        tune.loader(targets.Broken(), settings={"batch_size": 4}, budget=12.0)
    assert "in __getitem__" in caught.value.traceback


def test_workers_that_hang_are_reported(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> None:
    always_left(monkeypatch, 6.0)
    data = targets.Rows(seconds=0.002, hang_in_worker=True)
    report = tune.loader(data, settings={"batch_size": 4}, budget=6.0, timeout=5.0)
    assert report.keep
    assert "timeout" in [each.status for each in report.trials if each.settings["num_workers"]]
    assert all(each.status in ("timeout", "skipped") for each in report.trials if each.settings["num_workers"])


@pytest.mark.parametrize(
    ("function", "text", "code"),
    [("raises", "no such table", 1), ("segfaults", "SIGSEGV", -11)],
)
def test_a_broken_target(function: str, text: str, code: int) -> None:
    with pytest.raises(tune.TargetError, match=text) as caught:
        tune.loader(f"targets:{function}", budget=30.0, timeout=PATIENT)
    assert caught.value.exit_code == code


def test_a_target_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("import nothing_like_this\n")
    with pytest.raises(tune.TargetError, match="nothing_like_this") as caught:
        tune.loader("half:build", budget=30.0, timeout=PATIENT)
    assert "half.py" in caught.value.traceback


def test_a_loader_without_a_batch() -> None:
    with pytest.raises(tune.TargetError, match="gave no batch"):
        tune.loader(targets.no_batch, budget=30.0, timeout=PATIENT)


# ---- the search's parts


def present(**more: Any) -> dict[str, Any]:
    return {"num_workers": 0, "prefetch_factor": None, "pin_memory": False, "persistent_workers": False, **more}


def test_candidates_go_up_to_the_cpus() -> None:
    found = candidates(present(), 6, cuda=False)
    assert {each["num_workers"] for each in found} == {0, 1, 2, 4, 6}
    assert len({str(each) for each in found}) == len(found) == 9
    assert found == candidates(present(), 6, cuda=False)
    assert not any(each["pin_memory"] for each in found)
    assert any(each["pin_memory"] for each in candidates(present(), 2, cuda=True))


def test_the_present_setting_is_a_candidate() -> None:
    mine = present(num_workers=3, prefetch_factor=7, persistent_workers=True)
    assert mine in candidates(mine, 4, cuda=False)


def rated(rate: float | None, workers: int, queue: int | None = None, status: str = "ok") -> Trial:
    interval = None if rate is None else Interval(rate, rate, rate)
    return Trial(present(num_workers=workers, prefetch_factor=queue), status, rate=interval)


def test_the_smallest_within_two_percent() -> None:
    trials = [
        rated(97.0, 1, 2),
        rated(98.5, 2, 4),
        rated(98.4, 2, 2),
        rated(100.0, 8, 4),
        rated(None, 0, status="failed"),
    ]
    assert smallest_near_best(trials).settings["prefetch_factor"] == 2
    assert smallest_near_best(trials).settings["num_workers"] == 2
    assert smallest_near_best(trials[-1:]) is None


def test_what_is_won() -> None:
    assert won(Interval(1.1, 1.01, 1.2))
    assert not won(Interval(1.1, 0.99, 1.2))
    assert not won(Interval(1.01, 1.005, 1.02))


# ---- steps and streams


def test_a_stream_goes_on_after_its_end() -> None:
    loader = DataLoader(targets.Flow(count=10), batch_size=4)
    stream = step.Stream(loader)
    sizes = [len(next(stream)[0]) for _ in range(7)]
    assert sizes == [4, 4, 2, 4, 4, 2, 4]
    assert (stream.epochs, stream.batches, stream.samples) == (2, 7, 24)
    assert len(stream.epoch_rates) == 2


def test_a_map_style_loader_is_endless_and_shuffled_anew() -> None:
    loader = DataLoader(targets.Rows(count=8), batch_size=4, shuffle=True)
    stream = step.Stream(loader)
    rows = torch.cat([next(stream)[1] for _ in range(200)]).reshape(100, 8)
    assert stream.epochs == 0
    assert len({tuple(each.sort().values.tolist()) for each in rows}) == 1
    assert len({tuple(each.tolist()) for each in rows}) > 50


def test_a_loader_without_batches_says_so() -> None:
    with pytest.raises(ValueError, match="no batch"):
        next(step.Stream(DataLoader(targets.Flow(count=0), batch_size=4)))


def test_no_fork_after_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(targets.Rows(), num_workers=2)
    step.do_not_fork_after_cuda(loader)
    assert loader.multiprocessing_context is None
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    step.do_not_fork_after_cuda(loader)
    assert loader.multiprocessing_context.get_start_method() == "forkserver"


def test_the_queue_is_emptied_before_the_clock_starts() -> None:
    class Counted:
        def __init__(self, stream: step.Stream) -> None:
            self.source, self.taken = stream, 0

        def step(self) -> int:
            next(self.source)
            self.source.last_wait = 0.0  # never waited for: the queue is full
            self.taken += 1
            return 1

    stream = step.Stream(DataLoader(targets.Rows(), batch_size=4))
    stream.workers, stream.queued = 3, 12
    counted = Counted(stream)
    step.empty_queue(counted, stream)
    assert counted.taken == 12


def test_a_trial_neither_writes_nor_calls_back(tmp_path: Path) -> None:
    target = tune.target.resolve("targets:fast", options={"run_dir": str(tmp_path / "run"), "save_every_steps": 1})
    made = step.training(target, {"threads": torch.get_num_threads()})
    with step.Steps(made.loop, step.Again(step.first_batch(made.train_loader))) as steps:
        assert steps.step() == 16
    assert os.listdir(tmp_path) == []
    assert made.loop.global_step == 1


class Graphs:
    """In place of a loop's: trains without capturing."""

    def __init__(self, loop: Any) -> None:
        self.loop, self.windows = loop, 0

    def begin(self) -> None:
        self.windows = 0

    def end(self) -> None:
        pass

    def run(self, window: Any) -> None:
        self.windows += 1
        for batch in window:
            window.expect_backward()
            forward_backward(self.loop, batch)
        self.loop.step()


def test_steps_are_those_of_fit_where_there_are_graphs() -> None:
    loop = step.training(tune.target.resolve("targets:slow", options={"threads": torch.get_num_threads()})).loop
    loop._graphs = Graphs(loop)
    batch = (torch.ones(4, targets.FEATURES), torch.ones(4))
    with step.Steps(loop, step.Again(batch)) as steps:
        assert [steps.step(), steps.step()] == [4, 4]
    assert loop._graphs.windows == 2


class Clocked:
    """Batches that take so many seconds by a clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds, self.taken = 0.0, seconds, 0
        monkeypatch.setattr(step, "perf_counter", lambda: self.now)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> torch.Tensor:
        self.now += self.seconds
        self.taken += 1
        return torch.zeros(4)


def test_few_batches_are_taken_where_one_takes_longer_than_all_of_them_may(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Clocked(monkeypatch, 5.0)
    found = step.measure(step.Pulls(step.Stream(slow)), 1.0)
    assert found.rates == [pytest.approx(0.8)]
    assert slow.taken == 2
    fast = Clocked(monkeypatch, 0.01)
    assert len(step.measure(step.Pulls(step.Stream(fast)), 1.0).rates) >= 5


@pytest.mark.parametrize("name", ["dataset", "collate_fn"])
def test_what_cannot_be_sent_to_workers_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = targets.Rows(count=8)
    more: dict[str, Any] = {}
    if name == "dataset":
        data.local = lambda: None
    else:
        more["collate_fn"] = lambda batch: batch
    loader = DataLoader(data, num_workers=1, **more)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(ValueError, match=rf"^\[tune\] .*{name}.*top of a module"):
        step.do_not_fork_after_cuda(loader)
    assert not data.x.is_shared()


def test_workers_that_persist_end_with_the_stream() -> None:
    stream = step.Stream(DataLoader(targets.Rows(count=64), batch_size=4, num_workers=1, persistent_workers=True))
    next(stream)
    workers = list(stream._iterator._workers)
    assert all(each.is_alive() for each in workers)
    stream.close()
    assert not any(each.is_alive() for each in workers)


# ---- around the trials


def answered(monkeypatch: pytest.MonkeyPatch, both: dict[str, Any], pair: trial.Outcome | None = None) -> list[dict]:
    """The bottleneck is as given, and two workers twice as fast; what paired runs were asked."""
    asked: list[dict[str, Any]] = []
    rates = {"rates": [100.0] * 5, "wait_share": 0.0, "startup_seconds": 0.0, "startup_share": 0.0}

    def run(function: str, arguments: dict[str, Any], *, on_note: Any = None, **_: Any) -> trial.Outcome:
        if function.endswith(":bottleneck"):
            found = {"alone": rates, "cached": rates, "both": rates | both, "settings": present(), "kind": "DataLoader"}
            return trial.Outcome(trial.OK, {**found, "cuda": False})
        if function.endswith(":two"):
            asked.append(arguments)
            return pair or trial.Outcome(trial.OK, {"ratios": [2.0] * 5})
        for each in arguments["settings"]:
            found = rates | {"rates": [100.0 + 100.0 * (each["num_workers"] == 2)] * 5}
            on_note({"found": found, "seconds": 0.1}, None)
        return trial.Outcome(trial.OK)

    monkeypatch.setattr(trial, "run", run)
    return asked


def test_the_start_of_workers_counts_as_waiting(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> None:
    asked = answered(monkeypatch, {"rates": [70.0] * 5, "startup_share": 0.3})
    report = tune.loader("targets:slow", budget=120.0, timeout=10.0)
    assert report.loader["num_workers"] == 2
    assert asked[0]["seconds"] <= 5.0  # of the 10 that the trial has
    assert tune.loader("targets:slow", budget=120.0, timeout=10.0).cached


def test_an_answer_whose_paired_run_failed_is_not_kept(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> None:
    answered(monkeypatch, {"rates": [70.0] * 5, "wait_share": 0.3}, trial.Outcome(trial.TIMEOUT, reason="not done"))
    assert tune.loader("targets:slow", budget=120.0).keep
    assert not tune.loader("targets:slow", budget=120.0).cached


def test_in_this_process_a_batch_has_the_timeout(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> None:
    heard: list[float | None] = []

    def several_alone(given: Any, settings: Any, seconds: float, until: float, wait: float | None = None) -> None:
        heard.append(wait)
        raise RuntimeError("enough")

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr(loading, "several_alone", several_alone)
    with pytest.raises(tune.TargetError):
        tune.loader(targets.Rows(), settings={"batch_size": 4}, budget=5.0, timeout=3.0)
    assert heard == [3.0]
    assert loading._waiting(DataLoader(targets.Rows(), num_workers=1), 3.0).timeout == 3.0
    assert loading._waiting(DataLoader(targets.Rows()), 3.0).timeout == 0


def test_a_process_that_ends_badly_after_its_last_note() -> None:
    rates = {"rates": [100.0] * 5, "wait_share": 0.0, "startup_seconds": 0.0, "startup_share": 0.0}
    session = Session("loader", None, name="a DataLoader", budget=10.0, timeout=5.0)

    def attempt(settings: Any, seconds: float, until: float, on_note: Any) -> trial.Outcome:
        on_note({"found": rates, "seconds": 0.1}, None)
        return trial.Outcome(trial.OUT_OF_MEMORY, reason="took too much")

    found = _Search(session, present(), attempt, None, cuda=False)._tried([present()], 0.1, 5.0)
    assert [each.status for each in found] == ["ok"]
