# SPDX-License-Identifier: Apache-2.0
"""One invocation that measures: the cases in order, the control, the training, within a budget of time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from fastloop.bench import cases, chargpt, env, loop_cases, runner, saving, training
from fastloop.bench.cases import Case
from fastloop.bench.loop_cases import LoopCase
from fastloop.bench.results import Row, Run
from fastloop.bench.runner import Effort, Plan, Progress
from fastloop.bench.saving import SaveCase

AnyCase = Case | LoopCase | SaveCase
LOOP_CASES: tuple[LoopCase | SaveCase, ...] = (*loop_cases.CASES, *saving.CASES)
TRAINING = "chargpt"
TRAINING_SECONDS = 20.0  # in a run with a cap; it takes about 4 on 2 cores that are idle


@dataclass(frozen=True)
class Options:
    """What to measure. `seconds` is the hard cap on starting and continuing measurements; checks come on top."""

    name: str
    plan: Plan
    seconds: float = math.inf
    pattern: str | None = None
    small_only: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pattern": self.pattern,
            "pairs": list(self.plan.headline.pairs),
            "pairs_others": list(self.plan.others.pairs),
            "seconds": None if math.isinf(self.seconds) else self.seconds,
        }


def default_options() -> Options:
    """About a minute on 2 cores: the headline peer in full, the others with 10 pairs on chosen cases."""
    plan = Plan(Effort(seconds=8.0), Effort((10,), seconds=4.0), every_peer=False)
    return Options("default", plan, seconds=100.0)


def full_options(pattern: str | None) -> Options:
    """Every case against every peer, 20 to 80 pairs."""
    return Options("full", Plan(), pattern=pattern)


def quick_options(pattern: str | None) -> Options:
    """The headline peer only, 20 pairs, the small cases unless a pattern asks for others."""
    plan = Plan(Effort((20,), seconds=5.0), every_peer=False)
    return Options("quick", plan, pattern=pattern, small_only=pattern is None)


def selected(options: Options) -> tuple[list[AnyCase], bool]:
    """The cases to run, and whether to train. Whole loops take minutes: the default run leaves them out."""
    loops = [] if options.name == "default" else cases.select(options.pattern, LOOP_CASES)
    found: list[AnyCase] = [*cases.select(options.pattern), *loops]
    chosen = [case for case in found if case.small or not options.small_only]
    if options.name == "quick":
        chosen = [replace(case, extra_peers=()) for case in chosen]
    train = not options.small_only and (options.pattern is None or options.pattern in TRAINING)
    return chosen, train


def _rows(case: AnyCase, plan: Plan, progress: Progress) -> list[Row]:
    return runner.run_case(case, plan, progress) if isinstance(case, Case) else case.run(plan, progress)


def _control(plan: Plan, progress: Progress) -> list[Row]:
    """The control case, whatever time is left: it says whether the rest means anything. Tried once more if it moved."""
    rows: list[Row] = []
    for _ in range(2):
        rows = runner.run_case(cases.CONTROL, replace(plan, headline=Effort(seconds=5.0), deadline=math.inf), progress)
        if not Run("", {}, {}, rows).void:
            break
    return rows


def _train(progress: Progress, seconds: float) -> dict[str, Any]:
    try:
        return training.train(progress=progress, seconds=seconds)
    except chargpt.NoText as error:
        return {"status": "skipped", "reason": str(error)}


def measure(options: Options, progress: Progress) -> Run:
    """Measure what `options` ask for. Nothing is printed and nothing is written."""
    start = perf_counter()
    deadline = start + options.seconds
    plan = replace(options.plan, deadline=deadline)
    chosen, train = selected(options)
    run = Run(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        env.environment().as_dict(),
        options.as_dict(),
    )
    if chosen:
        run.rows += _control(plan, progress)
    for index, case in enumerate(chosen):
        # A case that is slow here may use up its share of the time, not that of the cases after it.
        share = (deadline - perf_counter()) / (len(chosen) - index)
        run.rows += _rows(case, replace(plan, deadline=perf_counter() + share), progress)
    if train:
        run.training = _train(progress, TRAINING_SECONDS if math.isfinite(options.seconds) else math.inf)
    run.seconds = perf_counter() - start
    return run


def folder(base: Path, run: Run) -> Path:
    """The run's own folder under `base`: its time in UTC, which sorts."""
    return base / run.created.replace(":", "").replace("-", "").removesuffix("+0000")


def rerun(row: Row, pairs: int, progress: Progress) -> Row:
    """Measure one row of a result again, with a fixed count of pairs."""
    known: list[AnyCase] = [*cases.CASES, *LOOP_CASES]
    case = next(case for case in known if case.name == row.case)
    plan = Plan(Effort((pairs,)), Effort((pairs,)), ceilings=False)
    return _rows(replace(case, peers=(row.peer,), extra_peers=()), plan, progress)[0]
