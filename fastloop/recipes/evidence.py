# SPDX-License-Identifier: Apache-2.0
"""What was done for a run, in a file of its folder: the checklist and the model card read it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

FILE = "practices.jsonl"


def record(run_dir: str | os.PathLike[str], practice: str, details: Mapping[str, Any] | None = None) -> None:
    """Append that `practice` was done, as a line of `run_dir/practices.jsonl`.

    Args:
        run_dir: of the run; made if it is not there.
        practice: name of the function that did it, as "overfit_one_batch".
        details: what a reader of the checklist wants to see; written as `plain` makes it.

    Raises:
        OSError: the file cannot be written.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.time(), "practice": practice, "details": plain(details or {})})
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


def plain(value: Any) -> Any:
    """The value in what JSON has: tensors and arrays as lists, tuples too, non-finite numbers null, paths as text."""
    if isinstance(value, (Tensor, numpy.ndarray, numpy.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if is_dataclass(value) and not isinstance(value, type):
        return fields_of(value)
    return str(value)


def fields_of(value: Any) -> dict[str, Any]:
    """Of a dataclass, those with `repr`, by name, as `plain` gives them."""
    return {each.name: plain(getattr(value, each.name)) for each in fields(value) if each.repr}
