# SPDX-License-Identifier: Apache-2.0
"""Tables as plain text and as Markdown, numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def columns(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows in columns as wide as their widest cell, numbers to the right; no line has spaces at its end."""
    cells = [[number(cell) for cell in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    table = [list(head), *cells] if any(head) else cells
    widths = [max((len(row[i]) for row in table), default=0) for i in range(len(head))]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table in Markdown; what Markdown would take for its own is escaped in the cells."""
    escaped = [[number(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *escaped]]
    return "\n".join(lines)


def number(value: Any, digits: int = 4) -> str:
    """A float to so many significant digits, an integer whole, None as "-", anything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if math.isfinite(value) and value == int(value) and abs(value) < 10**digits:
        return str(int(value))
    return f"{value:.{digits}g}"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
