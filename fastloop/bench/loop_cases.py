# SPDX-License-Identifier: Apache-2.0
"""The cases of whole training loops: ours against one written by hand and those of frameworks, per step.

A sample is one training run: model, optimizer and framework are built anew, and the clock runs between two batches well
inside it (`loops.Clock`). So trainers that own their loop take part, and nobody's set-up counts.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastloop import machine
from fastloop.bench import checks, measure, stats
from fastloop.bench.loops import BARE, LOG_EVERY, LOOPS, OWN_STEP, WIDTHS, Loop, Task, by_hand
from fastloop.bench.results import Row
from fastloop.bench.runner import NO_TIME, Plan, Progress, decided, record

GROUP = "loop"
CHECKED_STEPS = 20
CALL_STEPS = 10 * LOG_EVERY  # what a sample takes once or several times: each side writes its loss equally often
FRAMEWORKS = ("fabric", "accelerate", "lightning", "transformers")
# Ours takes at most 0.7, 0.55, 0.4, 0.35 and 0.35 of the peer's time.
GOALS = {BARE: 1 / 0.7, "fabric": 1 / 0.55, "accelerate": 1 / 0.4, "lightning": 1 / 0.35, "transformers": 1 / 0.35}
COST_GOAL = 40e-6


@dataclass(frozen=True)
class LoopCase:
    """One of our loops against others. `ready`: batches are there before the loop starts, and not collated in it.

    cost_goal: seconds per step that ours may take longer than the peer.
    """

    name: str
    title: str
    ours: str
    peers: tuple[str, ...]
    threads: int
    ready: bool = True
    goals: Mapping[str, float] = field(default_factory=dict)
    cost_goal: float | None = None
    extra_peers: tuple[str, ...] = ()
    small: bool = False

    def run(self, plan: Plan, progress: Progress) -> list[Row]:
        """Measure ours against each peer. All are compared with the loop by hand before anything is timed."""
        rows = [self._row(name) for name in plan.peers(self)]
        with measure.quiet_interpreter(self.threads):
            reference: Reference | None = None
            for row in rows:
                reason = lacking(self.threads, plan)
                if reason is not None:
                    row.status, row.reason = "skipped", reason
                    continue
                progress(f"{self.title}: {LOOPS[row.peer].title}", 0)
                reference = reference or Reference(self.ready)
                row.status, row.reason = reference.verdict(LOOPS[self.ours])
                if row.status == "ok":
                    row.status, row.reason = reference.verdict(LOOPS[row.peer])
                if row.status == "ok":
                    self._time(row, plan, progress)
        return rows

    def _row(self, peer: str) -> Row:
        return Row(
            case=self.name,
            peer=peer,
            group=GROUP,
            title=self.title,
            tensors=2 * (len(WIDTHS) - 1),
            elements=sum(a * b + b for a, b in pairwise(WIDTHS)),
            dtype="float32",
            threads=self.threads,
            goal=self.goals.get(peer),
            cost_goal=self.cost_goal,
        )

    def _time(self, row: Row, plan: Plan, progress: Progress) -> None:
        effort = plan.headline if row.peer == self.peers[0] else plan.others
        gc.freeze()  # what is there stays there: collecting after each sample looks at that sample's leavings alone
        try:
            pairs = measure.measure_pairs(
                LOOPS[row.peer],
                LOOPS[self.ours],
                # The interval is of the ratio: for a goal in seconds all the pairs are taken.
                decided=decided(row.goal) if self.cost_goal is None else lambda ratio: False,
                pairs=effort.pairs,
                deadline=min(perf_counter() + effort.seconds, plan.deadline),
                threads=self.threads,
                on_pair=lambda count: progress(f"{self.title}: {LOOPS[row.peer].title}", count),
                sampler=self._sample,
            )
        finally:
            gc.unfreeze()
        record(row, pairs, CALL_STEPS)
        row.cost = stats.difference_interval(row.ours_seconds, row.peer_seconds)

    def _sample(self, loop: Loop, repetitions: int) -> float:
        gc.collect()  # of the sample before: a trainer is full of cycles
        gc.disable()  # a loop may have switched it on again
        return train(loop, repetitions * CALL_STEPS, self.ready)[1] * CALL_STEPS


def train(loop: Loop, steps: int, ready: bool) -> tuple[nn.Module, float]:
    """Run a contender from the start: the trained model, and seconds per step."""
    with TemporaryDirectory(prefix="fastloop-bench-") as folder:
        task = Task(steps, ready, Path(folder))
        model = loop.train(task)
    return model, task.clock.seconds


def lacking(threads: int, plan: Plan) -> str | None:
    """Why a case of so many threads cannot be measured now, or None."""
    if threads > machine.usable_cpus():
        return f"needs {threads} cores, {machine.usable_cpus()} are usable"
    return NO_TIME if perf_counter() > plan.deadline else None


# ---- Correct before fast


class Reference:
    """What the loop by hand makes of the model, and how far roundings carry it: two shadows (`checks`)."""

    def __init__(self, ready: bool, steps: int = CHECKED_STEPS) -> None:
        self.ready, self.steps = ready, steps
        self.wanted = self._weights(LOOPS[BARE])
        self.shadows = [self._weights(_shadow(seed)) for seed in range(checks.SHADOWS)]
        self._verdicts: dict[str, tuple[str, str]] = {}

    def _weights(self, loop: Loop) -> list[Tensor]:
        return [parameter.detach() for parameter in train(loop, self.steps, self.ready)[0].parameters()]

    def verdict(self, loop: Loop) -> tuple[str, str]:
        """A row's status and reason for this contender. A framework that fails or differs is skipped, not wrong."""
        if loop.name not in self._verdicts:
            self._verdicts[loop.name] = self._judge(loop)
        return self._verdicts[loop.name]

    def _judge(self, loop: Loop) -> tuple[str, str]:
        reason = loop.unavailable()
        if reason is not None:
            return "skipped", reason
        try:
            checks.check_training(self._weights(loop), self.wanted, [] if loop.exact else self.shadows)
        except checks.WrongResult as error:
            return "wrong" if loop.package is None else "skipped", f"{error} [{loop.title}]"
        except Exception as error:
            if loop.package is None:
                raise
            return "skipped", f"failed: {type(error).__name__}: {error}"
        return "ok", ""


def _shadow(seed: int) -> Loop:
    def run(task: Task) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)

        def move(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            checks.move_by_a_rounding(optimizer.param_groups[0]["params"], generator)

        handle = register_optimizer_step_post_hook(move)
        try:
            return by_hand(task)
        finally:
            handle.remove()

    return Loop("shadow", "the loop by hand, moved by roundings", run)


# ---- The cases


MODEL = "MLP 64-64-64-10, batch 32"
PEERS = (BARE, *FRAMEWORKS)


def _cases(threads: int) -> tuple[LoopCase, ...]:
    end, words = f"{threads}t", f"{threads} thread{'s' if threads > 1 else ''}"
    ready, collated = f"{MODEL}, ready batches, {words}", f"{MODEL}, collated from samples, {words}"
    return (
        LoopCase(f"loop-mlp-{end}", ready, "fit", PEERS, threads, goals=GOALS),
        LoopCase(f"loop-mlp-collate-{end}", collated, "fit", PEERS, threads, ready=False, goals=GOALS),
        LoopCase(f"loop-windows-{end}", ready, "windows", (BARE,), threads, goals=GOALS),
        LoopCase(
            f"loop-cost-{end}", f"beside fetch and step, {ready}", "fit", (OWN_STEP,), threads, cost_goal=COST_GOAL
        ),
    )


CASES: tuple[LoopCase, ...] = (*_cases(1), *_cases(2))
