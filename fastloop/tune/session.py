# SPDX-License-Identifier: Apache-2.0
"""What every tuner does around its trials: the budget, the report that they end up in, a broken target, the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import torch

from fastloop import machine
from fastloop.tune import cache, trial
from fastloop.tune.report import Report, Trial
from fastloop.tune.target import Target, TargetError, resolve
from fastloop.tune.watch import OnNote

OnTrial = Callable[[Trial], None]


class Session:
    """The trials of one tuner.

    Args:
        kind: "loader", "batch", "flags", "memory" or "lr".
        target, arguments, options, settings: see `target.resolve`.
        budget: seconds for all trials; `timeout`: for one.
        memory_limit: bytes that a trial's processes may take together; None: 80 % of what is available.
        fresh: do not take the answer of an earlier run.
        on_trial: called with each trial when it is done.
        question: what else the answer depends on, of JSON.
        name: of objects that are tuned in place of a target; their answer is not kept.

    Attributes:
        cached: the answer of an earlier run, if it holds here; else None.
        conclusive: False where the run that decides has failed: the answer is not kept.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong type.
    """

    def __init__(
        self,
        kind: str,
        target: Any,
        *,
        budget: float,
        timeout: float,
        arguments: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        memory_limit: int | None = None,
        fresh: bool = False,
        on_trial: OnTrial | None = None,
        question: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        _above_zero("budget", budget)
        _above_zero("timeout", timeout)
        if memory_limit is not None and (isinstance(memory_limit, bool) or not isinstance(memory_limit, int)):
            raise TypeError(f"[tune] memory_limit must be bytes, an integer, or None, got {memory_limit!r}")
        if memory_limit is not None:
            _above_zero("memory_limit", memory_limit)
        if on_trial is not None and not callable(on_trial):
            raise TypeError(f"[tune] on_trial must be a function of a Trial, got {on_trial!r}")
        self.kind, self.budget, self.timeout, self.on_trial = kind, budget, timeout, on_trial
        if name is None:
            self.target = resolve(target, arguments=arguments, options=options, settings=settings)
        else:
            self.target = Target(name, loader=dict(settings or {}))
        self.memory_limit = trial.memory_limit() if memory_limit is None else memory_limit
        self.begun = monotonic()
        self._end = self.begun + budget
        self.conclusive = True
        self.report = Report(
            kind, self.target.function, machine.fingerprint(), self.target.arguments, self.target.options,
            self.target.loader,
        )  # fmt: skip
        asked = {**(question or {}), "memory_limit": memory_limit, "timeout": timeout, "budget": budget}
        self._key = cache.key(kind, self.target, asked) if name is None else None
        self.cached = None if fresh or self._key is None else cache.load(kind, self.target, self._key)

    def left(self) -> float:
        """Seconds of the budget, 0 when it is spent."""
        return max(self._end - monotonic(), 0.0)

    def try_out(
        self,
        settings: Mapping[str, Any],
        function: str,
        arguments: Mapping[str, Any],
        *,
        must_work: bool = False,
        add: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[Trial, trial.Outcome]:
        """One trial: `function(**arguments)` in a fresh process.

        Args:
            settings: what the trial is of, as the report shows it.
            function: "module:function" to call; its `spec` argument, the target's, is added.
            must_work: the target is broken if this fails.
            add: put it into the report and tell `on_trial` now; else call `done` with it.

        Raises:
            TargetError: it failed and must work.
        """
        outcome = self.call(function, arguments, environment)
        return self.record(settings, outcome, must_work=must_work, add=add), outcome

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        on_note: OnNote | None = None,
    ) -> trial.Outcome:
        """`function(spec, **arguments)` in a fresh process."""
        return trial.run(
            function,
            {"spec": self.target.spec(), **arguments},
            timeout=self.timeout,
            memory_limit=self.memory_limit,
            folders=self.target.folders,
            environment=environment,
            on_note=on_note,
        )

    def call_here(self, function: Callable[[], Any], on_note: OnNote | None = None) -> trial.Outcome:
        """A function over objects of this process: in a fork, or here where CUDA forbids one, and nothing ends it."""
        if torch.cuda.is_initialized():
            return trial.run_here(function, on_note)
        return trial.run_forked(function, timeout=self.timeout, memory_limit=self.memory_limit, on_note=on_note)

    def record(
        self, settings: Mapping[str, Any], outcome: trial.Outcome, *, must_work: bool = False, add: bool = True
    ) -> Trial:
        """What `try_out` does with an outcome."""
        made = Trial.of(settings, outcome)
        if outcome.status != trial.OK and must_work:
            self.done(made)
            raise broken(self.target.function, outcome)
        if add:
            self.done(made)
        return made

    def skip(self, settings: Mapping[str, Any], reason: str) -> Trial:
        """A trial that was not made."""
        made = Trial(dict(settings), trial.SKIPPED, reason)
        self.done(made)
        return made

    def done(self, made: Trial) -> None:
        """Put a trial into the report."""
        self.report.trials.append(made)
        if self.on_trial is not None:
            self.on_trial(made)

    def finish(self) -> Report:
        """The report, which is kept for the next time if it is conclusive."""
        self.report.seconds = monotonic() - self.begun
        if self._key is not None and self.conclusive:
            cache.save(self.target, self.report, self._key)
        return self.report


def broken(name: str, outcome: trial.Outcome) -> TargetError:
    """The error about a target whose first trial has failed."""
    text = f"[tune] the target {name} does not work: {outcome.status}: {outcome.reason}"
    if outcome.status == outcome.reason or outcome.status == trial.FAILED:
        text = f"[tune] the target {name} does not work: {outcome.reason}"
    if outcome.status == trial.TIMEOUT:
        text += "; give each trial longer: --timeout 5m (timeout=)"
    return TargetError(text, outcome.traceback or outcome.output, outcome.exit_code)


def _above_zero(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"[tune] {name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"[tune] {name} must be a number above 0, got {value!r}")
