# SPDX-License-Identifier: Apache-2.0
"""What results share: text, JSON without what JSON has not, a line in the run's folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from fastloop.findings import Finding
from fastloop.recipes.evidence import plain, record, recorded
from fastloop.recipes.results import Result


@dataclass
class Measured(Result):
    practice: ClassVar[str] = "measure"
    values: Any
    findings: list[Finding] = field(default_factory=list)
    pictures: Any = field(default=None, repr=False)

    def table(self) -> str:
        return "a table"


def test_text_is_the_table() -> None:
    assert str(Measured([])) == "a table"


def test_json_has_lists_for_tensors_and_null_for_what_is_not_finite() -> None:
    values = {
        "tensor": torch.tensor([1.0, math.nan]),
        "scalar": torch.tensor(2),
        "array": numpy.array([[math.inf, 1.0]]),
        "numpy": numpy.float64(0.5),
        3: (True, None, Path("a/b")),
    }
    made = Measured(values, [Finding("note", "here", "this")], pictures=object()).to_json()
    assert made == {
        "values": {"tensor": [1.0, None], "scalar": 2, "array": [[None, 1.0]], "numpy": 0.5, "3": [True, None, "a/b"]},
        "findings": [{"level": "note", "where": "here", "what": "this", "remedy": ""}],
    }
    json.dumps(made, allow_nan=False)


def test_details_of_any_kind_are_written_down(tmp_path: Path) -> None:
    """`record` and `to_json` write values in the same way."""
    values = {"tensor": torch.tensor([1.0, math.inf]), "finding": Finding("note", "a", "b"), "path": Path("c")}
    record(tmp_path, "by hand", values)
    made = recorded(tmp_path)["by hand"]
    made.pop("time")
    assert made == plain(values) == Measured(values).to_json()["values"]
    assert made["tensor"] == [1.0, None]


def test_it_is_written_down_under_the_functions_name(tmp_path: Path) -> None:
    Measured([math.inf]).record(tmp_path / "run")
    details = recorded(tmp_path / "run")["measure"]
    assert (details["values"], details["findings"]) == ([None], [])
    assert details["time"] > 0
