# SPDX-License-Identifier: Apache-2.0
"""Programs of the repository that are no part of the package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of a path in the repository such as "benchmarks/train_gpt.py", for the length of the test."""
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # where dataclasses look up their own module
    spec.loader.exec_module(module)
    return module
