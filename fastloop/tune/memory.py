# SPDX-License-Identifier: Apache-2.0
"""Where a training's memory goes, and what each remedy gives: estimated before the first step, measured after it.

Nothing is recommended for being smaller alone: a remedy costs time, or changes the numbers. Only where the present
settings do not fit, the first remedy that fits is, in the order below, which is that of what they change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastloop.bench.stats import median_interval
from fastloop.tune import memory_words as words
from fastloop.tune import trial
from fastloop.tune.losses import relative_difference
from fastloop.tune.report import Report, Trial
from fastloop.tune.session import OnTrial, Session, broken

MEASURE = "fastloop.tune.memory_trial:measure_memory"
LONGEST_TRIAL = 2.0  # seconds of samples in one trial,
SHARE_OF_TRIAL = 1 / 60  # and of the budget
MEASURED = ("parts", "phases", "allocated", "reserved", "nvml", "nvml_reason", "peak")

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Remedy:
    """One way to take less memory.

    Args:
        name: in words.
        options: of Loop that it is.
        split: each micro-batch in so many.
        state_dtype, keep_gradients: see `memory_trial`.
        skip: why it cannot be tried, "" if it can.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    split: int = 1
    state_dtype: str | None = None
    keep_gradients: bool = False
    skip: str = ""

    def settings(self, facts: Facts) -> dict[str, Any]:
        """As the report shows it."""
        shown = dict(self.options)
        if self.split > 1:
            shown = {**_split(self.split, facts), **shown}
        if self.state_dtype is not None:
            shown["state_dtype"] = self.state_dtype
        if self.keep_gradients:
            shown["gradients_kept"] = True
        return shown


def memory(
    target: Any = None,
    *,
    budget: float = 120.0,
    timeout: float = 60.0,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    memory_limit: int | None = None,
    fresh: bool = False,
    on_trial: OnTrial | None = None,
) -> Report:
    """Memory of a training by part, and what each remedy would give and gave.

    `Trial.extra` has "estimate", "parts", "allocated", "reserved", "nvml" (bytes; None: not known) and "phases";
    `parts_table` shows them. `Trial.error`: of the losses of 5 windows from the same seed on the same batches.

    Args:
        target, budget, timeout, arguments, options, settings, memory_limit, fresh, on_trial: see `Session`.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong type.
        TargetError: the target cannot be imported, or its first trial fails for another reason than memory.
    """
    session = Session(
        "memory", target, budget=budget, timeout=timeout, arguments=arguments, options=options, settings=settings,
        memory_limit=memory_limit, fresh=fresh, on_trial=on_trial,
    )  # fmt: skip
    if session.cached is not None:
        return session.cached
    _Memory(session, min(LONGEST_TRIAL, SHARE_OF_TRIAL * budget)).answer()
    return session.finish()


def parts_table(report: Report) -> str:
    """Bytes by part of the present settings, estimated and measured; "" of a report without them."""
    return "" if report.present is None else words.table(report.present.extra)


class _Memory:
    """The trials of one target."""

    def __init__(self, session: Session, seconds: float) -> None:
        self.session, self.report, self.seconds = session, session.report, seconds
        self.facts: Facts = {}
        self.losses: list[float] = []
        self.batches: int | None = None

    def answer(self) -> None:
        report = self.report
        present = report.present = report.best = self._present()
        report.findings += words.present(present, self.facts)
        if self.session.target.options.get("cuda_graph"):
            report.findings.append("Measured without cuda_graph: a captured graph keeps what it needs at its peak.")
        fitting: list[tuple[Remedy, Trial]] = []
        for remedy in remedies(self.facts, self.session.target.options):
            settings = remedy.settings(self.facts)
            if remedy.skip:
                self.session.skip(settings, remedy.skip)
                continue
            if self.session.left() <= 0:
                self.session.skip(settings, "the budget was spent")
                continue
            made, outcome = self.session.try_out(settings, MEASURE, self._arguments(remedy), add=False)
            self._take(made, outcome)
            report.findings.append(words.remedy(remedy.name, made, present))
            if made.status == trial.OK and not remedy.keep_gradients:
                fitting.append((remedy, made))
        if present.status != trial.OK:
            self._recommend(fitting)

    def _present(self) -> Trial:
        made, outcome = self.session.try_out({}, MEASURE, self._arguments(Remedy("")), add=False)
        if outcome.status not in (trial.OK, trial.OUT_OF_MEMORY) or "facts" not in outcome.notes:
            self.session.done(made)
            raise broken(self.session.target.function, outcome)
        self.facts = outcome.notes["facts"]
        if outcome.status == trial.OK:
            self.losses, self.batches = outcome.result["losses"], outcome.result["batches"]
        self._take(made, outcome)
        return made

    def _arguments(self, remedy: Remedy) -> dict[str, Any]:
        return {
            "options": remedy.options, "split": remedy.split, "state_dtype": remedy.state_dtype,
            "keep_gradients": remedy.keep_gradients, "batches": self.batches, "seconds": self.seconds,
            "memory_limit": self.session.memory_limit,
        }  # fmt: skip

    def _take(self, made: Trial, outcome: trial.Outcome) -> None:
        notes = outcome.notes
        made.extra = {name: notes[name] for name in ("estimate", "estimated_peak") if name in notes}
        if outcome.status == trial.OK:
            found = outcome.result
            made.rate = median_interval(found["rates"])
            made.extra |= {
                name: found[name]
                for name in ("parts", "phases", "allocated", "reserved", "nvml", "nvml_reason", "peak")
            }
            if found["peak"]["bytes"] is not None:
                made.peak_bytes = found["peak"]["bytes"]
            if self.losses:
                made.error = relative_difference(self.losses, found["losses"])
        self.session.done(made)

    def _recommend(self, fitting: list[tuple[Remedy, Trial]]) -> None:
        """The present settings do not fit: what does, and changes least."""
        report = self.report
        for remedy, made in fitting:
            if remedy.state_dtype is not None:
                continue  # an argument of the target's optimizer, which no config sets
            report.best, report.keep = made, False
            report.loop = dict(remedy.options)
            if remedy.split > 1:
                parts = _split(remedy.split, self.facts)
                report.loader = {"batch_size": parts["batch_size"]}
                report.loop["accumulation_steps"] = parts["accumulation_steps"]
            report.findings.append(f"The present settings do not fit; {remedy.name} is the least change that does.")
            return
        report.findings.append("The present settings do not fit, and none of the remedies that were tried does.")


def remedies(facts: Facts, options: Mapping[str, Any]) -> list[Remedy]:
    """What there is to try, or why not; first what changes the numbers least.

    Args:
        facts: what the target is, from `memory_trial`.
        options: of Loop, the present ones.
    """
    fp32 = "" if facts["precision"] == "fp32" else f"precision is {facts['precision']} already"
    in_bf16 = fp32 or ("" if facts["bf16"] else "the device does not compute in bf16")
    pure = in_bf16 or _no_master_weights(facts)
    given = options.get("activation_checkpointing")
    checkpoints = f"activation_checkpointing is {given!r} already" if given else ""
    if not checkpoints and options.get("cuda_graph"):
        checkpoints = "does not go with cuda_graph"
    if not checkpoints and not facts["blocks"]:
        checkpoints = "the model has no ModuleList or Sequential of several blocks; give names of layers"
    return [
        Remedy("accumulation over half micro-batches", split=2, skip=_not_split(facts, 2)),
        Remedy("accumulation over quarter micro-batches", split=4, skip=_not_split(facts, 4)),
        Remedy("activation checkpointing of every block", {"activation_checkpointing": 1}, skip=checkpoints),
        Remedy("bf16 autocast", {"precision": "bf16"}, skip=in_bf16),
        Remedy("bf16 weights with fp32 master weights", {"precision": "bf16-pure"}, skip=pure),
        Remedy("bf16 states of the optimizer", state_dtype="bfloat16", skip=_no_state_dtype(facts)),
        Remedy("gradients freed between steps", keep_gradients=True),
    ]


def _no_master_weights(facts: Facts) -> str:
    if not facts["ours"]:
        return f"{facts['optimizer']} keeps no fp32 master weights; the optimizer of that name from fastloop does"
    if facts["state_dtype"] == "torch.bfloat16":
        return "master weights come with fp32 states, and the optimizer has state_dtype=torch.bfloat16"
    return ""


def _no_state_dtype(facts: Facts) -> str:
    if not facts["ours"]:
        return f"{facts['optimizer']} has no state_dtype; the optimizer of that name from fastloop has"
    if facts["state_dtype"] == "torch.bfloat16":
        return "the states are bf16 already"
    return "" if facts["precision"] != "bf16-pure" else "master weights come with fp32 states"


def _not_split(facts: Facts, count: int) -> str:
    """Why a batch cannot be had in `count` equal parts."""
    size = facts["batch_size"]
    if size is None:
        return "the loader makes its batches itself: its batch size cannot be set from here"
    return "" if size % count == 0 else f"a batch of {size} has no {count} equal parts"


def _split(count: int, facts: Facts) -> dict[str, Any]:
    return {"batch_size": facts["batch_size"] // count, "accumulation_steps": facts["accumulation_steps"] * count}


__all__ = ["Remedy", "memory", "parts_table", "remedies"]
