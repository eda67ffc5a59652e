# SPDX-License-Identifier: Apache-2.0
"""The checklists of the documents, answered from a run's folder."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from fastloop import texts
from fastloop.recipes.checklist.answers import STATUSES, Answer, Status, unknown
from fastloop.recipes.checklist.items import ITEMS, Item
from fastloop.recipes.results import Result
from fastloop.recipes.tracking.run_folder import RunFolder

MARKS: dict[Status, str] = {"done": "[x]", "not done": "[ ]", "not applicable": "[-]", "unknown": "[?]"}


@dataclass
class Line:
    """One line: where it stands, what it asks for, and what the folder says.

    Args:
        status: "done", "not done", "not applicable", or "unknown", where nothing in the folder can tell.
        evidence: in a sentence; of what is missing also how it is done.
    """

    source: str
    section: str
    text: str
    status: Status
    evidence: str


@dataclass
class Checklist(Result):
    """All lines, in the order of the documents.

    Args:
        run: the folder.
        items: the lines.
        damaged: files that could not be read, and why.
    """

    run: str
    items: list[Line]
    damaged: dict[str, str]
    practice: ClassVar[str] = "checklist"

    @property
    def counts(self) -> dict[str, int]:
        """Lines by status."""
        found = Counter(line.status for line in self.items)
        return {status: found[status] for status in STATUSES}

    def table(self) -> str:
        """As text, section by section."""
        rows = []
        for (source, section), lines in groupby(self.items, key=lambda line: (line.source, line.section)):
            rows.append(f"\n{section} ({source})")
            cells = [(MARKS[line.status], line.text, line.evidence) for line in lines]
            rows.append(texts.columns(("", "", ""), cells))
        legend = ", ".join(f"{MARKS[status]} {count} {status}" for status, count in self.counts.items())  # type: ignore[index]
        return "\n".join([f"{self.run}: {legend}", *self._damages(), *rows])

    def markdown(self) -> str:
        """As a page with a table for each section."""
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        parts = [f"# Checklist of {self.run}", counts, *self._damages()]
        for (source, section), lines in groupby(self.items, key=lambda line: (line.source, line.section)):
            parts.append(f"## {section} ({source})")
            parts.append(
                texts.markdown(("line", "status", "evidence"), [(x.text, x.status, x.evidence) for x in lines])
            )
        return "\n\n".join(parts) + "\n"

    def _damages(self) -> list[str]:
        return [f"{name} cannot be read in whole: {why}" for name, why in self.damaged.items()]


def checklist(run_dir: str | os.PathLike[str], *, project: str | os.PathLike[str] | None = None) -> Checklist:
    """Answer every checklist line of the documents from the folder of a run; nothing is trained, loaded or changed.

    Args:
        run_dir: of a Loop.
        project: another folder whose practices.jsonl, exported files and documents count too, as for what is done once
            for many runs.

    Raises:
        FileNotFoundError: there is no run in `run_dir`, or no folder `project`.
    """
    run = RunFolder(run_dir, project)
    lines = []
    for item in ITEMS:
        answer = _answered(item, run)
        lines.append(Line(item.source, item.section, item.text, answer.status, answer.evidence))
    return Checklist(str(run.path), lines, dict(run.damaged))


def _answered(item: Item, run: RunFolder) -> Answer:
    """A file may be whole JSON and still not be as fastloop writes it; one line then cannot tell, the others can."""
    try:
        return item.rule(run)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        what = f"the run's files are not as fastloop writes them ({type(error).__name__}: {error})"
        return unknown(what, "train once more with this run_dir")
