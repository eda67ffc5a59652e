# SPDX-License-Identifier: Apache-2.0
"""Measure fastloop against torch on this machine: `python -m fastloop.bench`.

Cases declare the bytes they must move and check their result before they are timed; ratios are paired within one
run. docs/benchmarking.md is the user's page.
"""

from __future__ import annotations

from fastloop.bench.cases import Case, Pass, Traffic, step_case
from fastloop.bench.runner import Effort, Plan, build_checked, run_case
from fastloop.bench.usercases import case

__all__ = ["Case", "Effort", "Pass", "Plan", "Traffic", "build_checked", "case", "run_case", "step_case"]
