# SPDX-License-Identifier: Apache-2.0
"""Find the fastest safe settings of a training on this machine: `python -m fastloop.bench tune`.

A target is a function that returns what a Loop takes. Each trial calls it in a process of its own, which may crash,
hang or run out of memory; the answer is a `Report`. docs/tuning.md is the user's page.
"""

from __future__ import annotations

from fastloop.tune.batch import batch
from fastloop.tune.everything import everything
from fastloop.tune.flags import flags
from fastloop.tune.loader import loader
from fastloop.tune.lr import lr
from fastloop.tune.lr_range import LRRange, lr_range_test
from fastloop.tune.memory import memory
from fastloop.tune.report import Report, Trial
from fastloop.tune.target import TargetError

__all__ = [
    "LRRange",
    "Report",
    "TargetError",
    "Trial",
    "batch",
    "everything",
    "flags",
    "loader",
    "lr",
    "lr_range_test",
    "memory",
]
