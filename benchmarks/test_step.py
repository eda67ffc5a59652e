# SPDX-License-Identifier: Apache-2.0
"""The cases of `python -m fastloop.bench`, driven by pytest-benchmark: `pytest --benchmark-only benchmarks`.

pytest-benchmark times here. Its numbers are milliseconds of one contender: they show where time goes. `compare A.json
B.json` judges two such files as far as unpaired times can be; `run` and `ab` take paired ratios.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastloop.bench import cases, checks, runner
from fastloop.bench.contenders import CONTENDERS

_PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}") for case in cases.CASES for name in (case.ours, *case.peers)
] + [
    pytest.param(cases.CONTROL, cases.CONTROL.ours, id="control"),  # what `compare` needs to judge by
]


@pytest.mark.parametrize(("case", "name"), _PAIRS)
def test_step(case: cases.Case, name: str, benchmark: Any) -> None:
    """Check one contender's result, then time its step."""
    reason = runner.lacking_memory(case)
    if reason is not None:
        pytest.skip(reason)
    unavailable = CONTENDERS[name].unavailable(len(case.build()))
    if unavailable is not None:
        pytest.skip(unavailable)
    try:
        built = runner.build_checked(case, name)
    except checks.WrongResult as error:
        if CONTENDERS[name].outside:
            pytest.skip(str(error))
        raise
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = case.traffic.bytes
    benchmark.extra_info["control"] = case is cases.CONTROL
    benchmark(built.stepper.step)
