# SPDX-License-Identifier: Apache-2.0
"""Run cases: build, check, measure the memory, time against each peer and against the ceiling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from fastloop.bench import ceiling, checks, env, measure, memory, stats
from fastloop.bench.cases import HEADLINE, Case
from fastloop.bench.contenders import CONTENDERS, Contender, Stepper
from fastloop.bench.results import Row

CEILING_PAIRS = (10,)
# Below this the ceiling would time the call and not the memory.
SMALLEST_CEILING_BYTES = 8 * 2**20
NO_TIME = "no time left in this run; `run -k` measures it"
SPARE_BYTES = 2**30  # left to the rest of the machine


@dataclass(frozen=True)
class Effort:
    """How long to measure: the counts of pairs, and seconds for one row (at least 5 pairs are taken)."""

    pairs: tuple[int, ...] = stats.PAIRS
    seconds: float = math.inf


class HasPeers(Protocol):
    """A case of any kind: whom it is measured against, and whom a run with little time keeps beside the first."""

    @property
    def peers(self) -> tuple[str, ...]: ...

    @property
    def extra_peers(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Plan:
    """Which rows to measure and how long. `deadline` is a `time.perf_counter()` value for all of them together."""

    headline: Effort = field(default_factory=Effort)
    others: Effort = field(default_factory=Effort)
    every_peer: bool = True
    ceilings: bool = True
    deadline: float = math.inf

    def peers(self, case: HasPeers) -> tuple[str, ...]:
        """The peers of `case` to measure, the first one first. Peers that are not installed stay visible."""
        if self.every_peer:
            return case.peers
        return tuple(name for name in case.peers if name in (case.peers[0], *case.extra_peers))


Progress = Callable[[str, int], None]  # what is being done, pairs so far


def _silent(text: str, pairs: int) -> None:
    pass


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Built:
    """A contender with its own copy of the case's parameters, two checked steps old."""

    contender: Contender
    parameters: list[Tensor]
    stepper: Stepper


def _row(case: Case, peer: str) -> Row:
    return Row(
        case=case.name,
        peer=peer,
        group=case.group,
        title=case.title,
        elements=case.traffic.elements,
        threads=case.threads or torch.get_num_threads(),
        bytes=case.traffic.bytes,
        goal=case.goals.get(peer),
    )


def lacking_memory(case: Case) -> str | None:
    """Why there is not enough memory for `case`, or None."""
    available, needed = env.available_bytes(), case.workspace_bytes + SPARE_BYTES
    if available is None or available >= needed:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"


def _build(case: Case, name: str, wanted: checks.Outcome, norm_error: float) -> Built:
    """Build one contender and check its first steps. Raises WrongResult."""
    contender = CONTENDERS[name]
    parameters = case.build()
    stepper = contender.build(parameters)
    for _ in range(checks.CHECKED_STEPS):
        stepper.step()
    got = checks.outcome(parameters, stepper.optimizer)
    try:
        with _threads(1):  # thousands of short operations: a thread that waits for another program stalls each
            case.check(got, wanted, norm_error if contender.torch_norm else 0.0)
    except checks.WrongResult as error:
        raise checks.WrongResult(f"{error} [{contender.title}, case {case.name}]") from None
    return Built(contender, parameters, stepper)


def _reference(case: Case) -> tuple[checks.Outcome, float]:
    parameters = case.build()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    error = checks.norm_error(gradients)
    return checks.reference(parameters), error


def decided(goal: float | None) -> Callable[[stats.Interval], bool]:
    """Undecided is a ratio whose interval still holds 1 (nobody is faster) or its goal."""
    return lambda ratio: 1.0 not in ratio and (goal is None or goal not in ratio)


def _control_decided(ratio: stats.Interval) -> bool:
    """The control is decided once its interval lies on one side of each limit of 2 %."""
    return all(limit not in ratio for limit in (1 - stats.CONTROL_MOVED, 1 + stats.CONTROL_MOVED))


def build_checked(case: Case, name: str | None = None) -> Built:
    """Build a contender (ours by default) and check its first steps. Raises WrongResult; times nothing."""
    wanted, norm_error = _reference(case)
    return _build(case, name or case.ours, wanted, norm_error)


def _time(case: Case, ours: Built, peer: Built, effort: Effort, plan: Plan, row: Row, progress: Progress) -> None:
    pairs = measure.measure_pairs(
        peer.stepper.step,
        ours.stepper.step,
        decided=_control_decided if case.group == "control" else decided(row.goal),
        pairs=effort.pairs,
        deadline=min(perf_counter() + effort.seconds, plan.deadline),
        on_pair=lambda count: progress(f"{case.title}: {peer.contender.title}", count),
    )
    record(row, pairs)


def record(row: Row, pairs: measure.Pairs, steps: int = 1) -> None:
    """Put what was measured of the peer (a) and of ours (b) into `row`, for calls of so many steps."""
    row.ratios, row.ratio, row.stopped = list(pairs.ratios), stats.median_interval(pairs.ratios), pairs.stopped
    row.peer_seconds, row.ours_seconds = ([seconds / steps for seconds in side] for side in (pairs.a, pairs.b))
    row.repetitions = (pairs.repetitions[0] * steps, pairs.repetitions[1] * steps)


def _time_ceiling(case: Case, ours: Built, plan: Plan, row: Row) -> None:
    top = ceiling.build(case.traffic)
    pairs = measure.measure_pairs(top.run, ours.stepper.step, pairs=CEILING_PAIRS, deadline=plan.deadline)
    # Seconds per byte of the ceiling over ours: 1 is the speed of light.
    scale = case.traffic.bytes / top.bytes
    row.ceiling = stats.median_interval([ratio * scale for ratio in pairs.ratios])
    row.ceiling_gbps = top.bytes / stats.median_interval(pairs.a).median * 1e-9
    row.ceiling_method = top.method


def _peer_row(
    case: Case,
    name: str,
    ours: Built,
    wanted: checks.Outcome,
    norm_error: float,
    plan: Plan,
    progress: Progress,
) -> Row:
    row, contender = _row(case, name), CONTENDERS[name]
    row.tensors, row.dtype = len(ours.parameters), str(ours.parameters[0].dtype).removeprefix("torch.")
    row.norm_error = norm_error
    reason = contender.unavailable(len(ours.parameters))
    if reason is None and perf_counter() > plan.deadline:
        reason = NO_TIME
    if reason is not None:
        row.status, row.reason = "skipped", reason
        return row
    progress(f"{case.title}: {contender.title}", 0)
    try:
        peer = _build(case, name, wanted, norm_error)
    except checks.WrongResult as error:
        row.status, row.reason = ("skipped" if contender.outside else "wrong"), str(error)
        return row
    except Exception as error:
        if not contender.outside:
            raise
        row.status, row.reason = "skipped", f"failed: {type(error).__name__}: {error}"
        return row
    first = name == case.peers[0]
    _time(case, ours, peer, plan.headline if first else plan.others, plan, row, progress)
    row.peer_memory = asdict(memory.measure(peer.stepper.step, peer.parameters, peer.stepper.optimizer))
    row.ours_memory = asdict(memory.measure(ours.stepper.step, ours.parameters, ours.stepper.optimizer))
    if first and plan.ceilings and case.group != "control" and case.traffic.bytes >= SMALLEST_CEILING_BYTES:
        del peer  # a big model's peer and the ceiling's buffers need not be there together
        _time_ceiling(case, ours, plan, row)
    return row


def run_case(case: Case, plan: Plan, progress: Progress = _silent) -> list[Row]:
    """Measure one case against its peers.

    Ours is built once and steps on through all peers: nothing is restored, its gradients stay the same tensors.
    A result that differs from the reference makes a row of status "wrong" and is not timed.
    """
    first = _row(case, case.peers[0] if case.peers else HEADLINE)
    reason = lacking_memory(case)
    if reason is None and perf_counter() > plan.deadline:
        reason = NO_TIME
    if reason is not None:
        first.status, first.reason = "skipped", reason
        return [first]
    with _threads(case.threads):
        progress(f"{case.title}: check", 0)
        wanted, norm_error = _reference(case)
        try:
            ours = _build(case, case.ours, wanted, norm_error)
        except checks.WrongResult as error:
            first.status, first.reason = "wrong", str(error)
            return [first]
        return [_peer_row(case, name, ours, wanted, norm_error, plan, progress) for name in plan.peers(case)]
