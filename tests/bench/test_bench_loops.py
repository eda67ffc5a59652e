# SPDX-License-Identifier: Apache-2.0
"""The cases of whole loops: what the clock counts, that results are compared first, and rows of every kind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from torch import nn

import fastloop
from fastloop.bench import (
    cases,
    chargpt,
    checks,
    cli,
    gpu_loop,
    loop_cases,
    loops,
    models,
    report,
    results,
    saving,
    session,
    stats,
)
from fastloop.bench.loop_cases import LoopCase, Reference
from fastloop.bench.loops import AFTER, BARE, BATCH, LOOPS, OWN_STEP, WARM_UP, Clock, Task
from fastloop.bench.runner import Effort, Plan

QUICK = Plan(Effort((5,)), Effort((5,)))
TINY = LoopCase("loop-tiny", "made up", OWN_STEP, (BARE,), 1)
FRAMEWORKS = [name for name, loop in LOOPS.items() if loop.package is not None]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is one step, a sample one call."""
    monkeypatch.setattr(loop_cases, "CALL_STEPS", 1)
    monkeypatch.setattr("fastloop.bench.measure.calibrate", lambda call, sampler=None: 1)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(ready=True)


# ---- The clock and the task


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_clock_counts_whole_steps_and_no_set_up(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0
    monkeypatch.setattr(loops, "perf_counter_ns", lambda: now)
    clock = Clock(steps=5, per_batch=2)
    indices = list(range(len(clock)))
    fetched = zip(iter(clock), indices, strict=True)
    for step in range(WARM_UP + 5 + AFTER):
        for _ in range(2 * (1 + ahead) if step == 0 else 2):  # a batch is 2 samples
            next(fetched, None)
        now += 1_000_000 if step < WARM_UP - ahead else 1000  # set-up and warm-up take longer
    assert clock.seconds == pytest.approx(1e-6)
    assert len(clock) == 2 * (WARM_UP + 5 + AFTER)


def test_a_run_that_ends_early_has_no_time() -> None:
    clock = Clock(steps=5)
    for _ in zip(range(WARM_UP + 1), clock, strict=False):
        pass
    with pytest.raises(AssertionError, match="not come to the end"):
        _ = clock.seconds


def test_both_kinds_of_loader_give_the_same_batches(tmp_path: Path) -> None:
    ready, collated = (list(Task(3, kind, tmp_path).loader()) for kind in (True, False))
    assert len(ready) == len(collated) == WARM_UP + 3 + AFTER
    for (x, y), (u, v) in zip(ready, collated, strict=True):
        assert x.shape == (BATCH, 64)
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_the_task_is_clipped_in_some_steps_and_not_in_others(tmp_path: Path) -> None:
    task = Task(20, True, tmp_path)
    model, norms = task.model(), []
    optimizer = loops.torch_optimizer(model)
    for batch in task.loader():
        loops.loss_of(model, batch).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), checks.MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) < checks.MAX_NORM < max(norms)


# ---- Correct before fast


@pytest.mark.parametrize("name", ["fit", "windows", OWN_STEP, BARE])
@pytest.mark.parametrize("ready", [True, False], ids=["ready", "collated"])
def test_ours_gives_the_weights_of_the_loop_by_hand(name: str, ready: bool) -> None:
    assert Reference(ready).verdict(LOOPS[name]) == ("ok", "")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_gives_the_same_bits(name: str, reference: Reference) -> None:
    if LOOPS[name].unavailable() is not None:
        pytest.skip(f"needs {' and '.join([str(LOOPS[name].package), *LOOPS[name].needs])}")
    assert reference.verdict(LOOPS[name]) == ("ok", "")


@pytest.mark.parametrize(
    "change", [{"lr": 1.001e-3}, {"betas": (0.9, 0.998)}, {"weight_decay": 0.02}, {"eps": 1e-6}, {"max_grad_norm": 1.1}]
)
def test_the_check_finds_another_optimizer(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    original = fastloop.AdamW
    monkeypatch.setattr(fastloop, "AdamW", lambda tensors, **options: original(tensors, **{**options, **change}))
    status, reason = reference._judge(LOOPS[OWN_STEP])
    assert status == "wrong"
    assert "2-norm" in reason
    monkeypatch.undo()
    assert reference._judge(LOOPS[OWN_STEP]) == ("ok", "")


def test_a_loop_that_leaves_out_a_step_or_changes_a_bit_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_bit(task: Task) -> nn.Module:
        model = loops.by_hand(task)
        with torch.no_grad():
            weight = next(model.parameters())
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(math.inf))
        return model

    for package, status in ((None, "wrong"), ("torch", "skipped")):
        monkeypatch.setitem(LOOPS, "peer", loops.Loop("peer", "made up", one_bit, package=package))
        (row,) = replace(TINY, peers=("peer",)).run(QUICK, lambda text, count: None)
        assert row.status == status
        assert "1 of 4096 differ" in row.reason
        assert row.ratio is None


def test_a_framework_that_fails_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task: Task) -> nn.Module:
        raise RuntimeError("needs a server")

    monkeypatch.setitem(LOOPS, "peer", loops.Loop("peer", "made up", fail, package="torch"))
    monkeypatch.setitem(LOOPS, "missing", loops.Loop("missing", "made up", fail, package="no_such_package"))
    rows = replace(TINY, peers=("peer", "missing")).run(QUICK, lambda text, count: None)
    assert [row.status for row in rows] == ["skipped", "skipped"]
    assert rows[0].reason == "failed: RuntimeError: needs a server"
    assert rows[1].reason == "no_such_package is not installed"


def test_distance_of_nan_is_infinite() -> None:
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    assert checks.distance([one * 4], [one]) == 3.0
    assert checks.distance([nan], [one]) == math.inf
    with pytest.raises(checks.WrongResult):
        checks.check_training([nan], [one], [[one * 2]])


# ---- Rows


def test_a_case_is_measured_against_each_peer() -> None:
    (row,) = TINY.run(QUICK, lambda text, count: None)
    assert (row.status, row.group, row.threads, len(row.ratios)) == ("ok", "loop", 1, 5)
    assert row.cost is not None
    differences = sorted(a - b for a, b in zip(row.ours_seconds, row.peer_seconds, strict=True))
    assert row.cost.median == pytest.approx(differences[2])


def test_no_time_or_too_few_cores_shows_as_skipped() -> None:
    (row,) = TINY.run(replace(QUICK, deadline=0.0), lambda text, count: None)
    assert (row.status, "no time left" in row.reason) == ("skipped", True)
    (row,) = replace(TINY, threads=4096).run(QUICK, lambda text, count: None)
    assert (row.status, "needs 4096 cores" in row.reason) == ("skipped", True)


def test_every_row_of_the_goals_has_a_case() -> None:
    found = {case.name for case in cases.select("loop", session.LOOP_CASES)}
    kinds = ("mlp", "mlp-collate", "windows", "cost", "save")
    assert found == {f"loop-{kind}-{threads}t" for kind in kinds for threads in (1, 2)}
    goals = {peer: 1 / ratio for peer, ratio in loop_cases.GOALS.items()}
    assert goals == pytest.approx(
        {BARE: 0.7, "fabric": 0.55, "accelerate": 0.4, "lightning": 0.35, "transformers": 0.35}
    )


def test_the_default_run_leaves_whole_loops_out() -> None:
    def names(options: session.Options) -> set[str]:
        return {case.name for case in session.selected(options)[0] if case.name.startswith("loop")}

    assert names(session.default_options()) == names(session.quick_options(None)) == set()
    assert len(names(session.full_options(None))) == len(names(session.quick_options("loop"))) == 10


@pytest.mark.parametrize(("cost", "text"), [(31e-6, "under 40 us reached"), (41e-6, "under 40 us MISSED")])
def test_a_goal_in_seconds(cost: float, text: str, tmp_path: Path) -> None:
    row = replace(TINY, cost_goal=40e-6)._row(OWN_STEP)
    row.ratios, row.ours_seconds, row.peer_seconds = [0.9] * 5, [1e-4] * 5, [9e-5] * 5
    row.ratio, row.cost = stats.median_interval(row.ratios), stats.Interval(cost, cost, cost)
    run = results.Run("2026-01-02T03:04:05+00:00", {}, {}, [row])
    results.save(run, tmp_path / "run.json")
    (again,) = results.load(tmp_path / "run.json").rows
    assert again.cost == row.cost
    assert text in report.cells(again)
    ((title, columns, _, _),) = report.tables(run)
    assert title == "whole loops"
    assert "GB/s" not in columns


def test_the_page_says_what_part_of_the_time_ours_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = programs.program("scripts/readme_table.py", monkeypatch)
    faster, dearer = replace(TINY, goals={BARE: 2.0})._row(BARE), replace(TINY, cost_goal=40e-6)._row(OWN_STEP)
    for row in (faster, dearer):
        row.ratio, row.cost = stats.Interval(2.5, 2.0, 4.0), stats.Interval(41e-6, 30e-6, 50e-6)
    environment = dict.fromkeys(("cpu", "threads", "isa", "torch", "fastloop", "commit"), "made up")
    path = tmp_path / "run.json"
    results.save(results.Run("2026-01-02T03:04:05+00:00", environment, {}, [faster, dearer]), path)
    text = script.loop_table(path)
    assert f"| made up | {BARE} | 0.40 | 0.25 to 0.50 | at most 0.50, reached |" in text
    assert f"| made up | {OWN_STEP} | 41 µs more | 30 to 50 µs | under 40 µs, not reached |" in text
    results.save(results.Run("2026-01-02T03:04:05+00:00", environment, {}), path)
    assert script.loop_table(path) == "Not yet measured.\n"


def test_run_and_list_know_whole_loops(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "LOOP_CASES", (TINY,))
    monkeypatch.setattr(session, "_control", lambda plan, progress: [])
    assert cli.main(["--output", str(tmp_path), "run", "-k", "loop"]) == 0
    (folder,) = tmp_path.iterdir()
    assert "## Whole loops" in (folder / "report.md").read_text()
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert f"{BARE} = a bare loop by hand" in out
    assert "loop-tiny" in out


# ---- Saving in the background

SMALL = saving.SaveCase("loop-save-small", "made up", 1, size=saving.Size(width=32, batch=2), pairs=5)


def test_a_training_is_timed_beside_its_saves() -> None:
    unsaved, copy = SMALL.run(QUICK, lambda text, count: None)
    for row in (unsaved, copy):
        assert (row.status, row.reason, len(row.ratios)) == ("ok", "", 5)
        assert row.goal is not None
    # The step that begins a save is compared with a step and a copy: more than a step alone.
    assert all(a > 0 for a in copy.peer_seconds)
    assert saving.Size().bytes == pytest.approx(500e6, rel=0.01)


def test_a_checkpoint_of_another_step_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = saving.Training._check

    def late(self: saving.Training, path: Path, wanted: list[torch.Tensor]) -> None:
        original(self, path, [tensor + 1e-7 for tensor in wanted])

    monkeypatch.setattr(saving.Training, "_check", late)
    for row in SMALL.run(QUICK, lambda text, count: None):
        assert (row.status, row.ratio) == ("wrong", None)


def test_what_cannot_be_saved_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LONGEST_SAVE", 0.0)
    assert {row.status for row in SMALL.run(QUICK, lambda text, count: None)} == {"skipped"}
    monkeypatch.setattr("fastloop.bench.env.available_bytes", lambda: 2**20)
    rows = SMALL.run(QUICK, lambda text, count: None)
    assert all("GiB of memory" in row.reason for row in rows)


# ---- GPT-2 on a GPU


def test_gpt2_is_gpt2() -> None:
    with torch.device("meta"):
        model = chargpt.CharGPT(gpu_loop.GPT2)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert sum(map(math.prod, shapes)) == 124_439_808
    assert sorted(map(sorted, shapes)) == sorted(map(sorted, models.gpt2()))  # GPT-2 stores them transposed
