# SPDX-License-Identifier: Apache-2.0
"""What a rule answers: a status, and the evidence in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastloop.recipes.checklist.practices import how
from fastloop.recipes.tracking.run_folder import RunFolder

Status = Literal["done", "not done", "not applicable", "unknown"]
STATUSES: tuple[Status, ...] = ("done", "not done", "not applicable", "unknown")


@dataclass(frozen=True)
class Answer:
    """What the folder says of a line; the evidence of one that is not done says how it is done."""

    status: Status
    evidence: str


Rule = Callable[[RunFolder], Answer]


def done(evidence: str) -> Answer:
    return Answer("done", evidence)


def not_done(evidence: str, remedy: str) -> Answer:
    return Answer("not done", f"{evidence}: {remedy}")


def not_applicable(evidence: str) -> Answer:
    return Answer("not applicable", evidence)


def unknown(evidence: str, remedy: str) -> Answer:
    return Answer("unknown", f"{evidence}: {remedy}")


def no_description(run: RunFolder) -> Answer:
    """For rules that read run.json."""
    state = "is damaged" if "run.json" in run.damaged else "is not there"
    return unknown(f"run.json, which fit writes, {state}", "train once more with this run_dir")


def no_rows(run: RunFolder) -> Answer:
    """For rules that read metrics.jsonl."""
    return not_done("metrics.jsonl has no row", "train with run_dir= and the logger 'jsonl'")


def practised(name: str, also: str = "") -> Rule:
    """A rule: done where the practice is recorded.

    Args:
        name: of the practice.
        also: a key of its details to be shown.
    """

    def rule(run: RunFolder) -> Answer:
        details = run.practices.get(name)
        if details is None:
            return not_done(f"{name} is not recorded", how(name))
        shown = f", {also} {details[also]}" if details.get(also) is not None else ""
        return done(f"{name} is recorded{shown}")

    return rule


def stated(name: str) -> Rule:
    """A rule: done where a person has recorded it; else nothing in the folder can tell."""

    def rule(run: RunFolder) -> Answer:
        if name in run.practices:
            details = {key: value for key, value in run.practices[name].items() if key != "time"}
            return done(f"{name!r} is recorded" + (f", {_short(details)}" if details else ""))
        return unknown("nothing in the folder can tell", how(name))

    return rule


def parts(*rules: Rule) -> Rule:
    """A rule for a heading: done where all that apply are."""

    def rule(run: RunFolder) -> Answer:
        answers = [each(run) for each in rules]
        applying = [each for each in answers if each.status != "not applicable"]
        finished = sum(each.status == "done" for each in applying)
        evidence = f"{finished} of {len(applying)} parts that apply are done"
        for status in ("not done", "unknown"):
            if any(each.status == status for each in applying):
                return Answer(status, f"{evidence}: see the lines below")  # type: ignore[arg-type]
        return done(evidence) if applying else not_applicable("none of its parts applies")

    return rule


def _short(details: dict[str, object]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in details.items())
    return text if len(text) <= 160 else text[:157] + "..."
