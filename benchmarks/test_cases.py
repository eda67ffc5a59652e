# SPDX-License-Identifier: Apache-2.0
"""The cases that `ab` and `ci` run, under pytest-benchmark: a project's own run in the same way (docs/guarding.md)."""

from __future__ import annotations

from typing import Any

import perf_cases
import pytest

from fastloop.bench.usercases import UserCase, collect, prepared


@pytest.mark.parametrize("case", collect(perf_cases), ids=lambda case: case.name)
def test_case(case: UserCase, benchmark: Any) -> None:
    benchmark.extra_info["control"] = case.control
    benchmark(prepared(case))
