# SPDX-License-Identifier: Apache-2.0
"""What was done for a run, in a file of its folder: the checklist and the model card read it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "practices.jsonl"


def record(run_dir: str | os.PathLike[str], practice: str, details: Mapping[str, Any] | None = None) -> None:
    """Append that `practice` was done, as a line of `run_dir/practices.jsonl`.

    Args:
        run_dir: of the run; made if it is not there.
        practice: name of the function that did it, as "overfit_one_batch".
        details: of JSON; what a reader of the checklist wants to see. Numbers that are not finite become null.

    Raises:
        TypeError: details that are no JSON.
        OSError: the file cannot be written.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.time(), "practice": practice, "details": _finite(dict(details or {}))})
    descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def recorded(run_dir: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The latest details of each practice that was recorded, with "time" (seconds since 1970); {} without the file.

    A line that is no JSON, as the last one of a killed process may be, is left out.
    """
    path = Path(run_dir) / FILE
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            found[row["practice"]] = {**row["details"], "time": row["time"]}
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
