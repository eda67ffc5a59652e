# SPDX-License-Identifier: Apache-2.0
"""What a check has found: how bad it is, where, what, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found.

    Args:
        level: "error": the training cannot come right; "warning": it likely suffers; "note": worth knowing.
        where: a layer, an option, a metric: as the reader would look for it; "" for the whole.
        what: what was seen, with its numbers.
        remedy: what to do; "" for a note that asks for nothing.
    """

    level: Level
    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f" {self.where}:" if self.where else ""
        return f"{self.level}:{place} {self.what}" + (f"; {self.remedy}" if self.remedy else "")

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON."""
        return asdict(self)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes, each in the order in which they were found."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def listed(findings: Sequence[Finding], nothing: str = "nothing found") -> str:
    """A line for each, the worst first; `nothing` where there is none."""
    return "\n".join(str(finding) for finding in ordered(findings)) or nothing
