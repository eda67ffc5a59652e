# SPDX-License-Identifier: Apache-2.0
"""One file of data per optimizer: which rule of the oracle it follows, and the settings it is tried with."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import oracle


@dataclass(frozen=True)
class Case:
    """An optimizer class by its exported name, and everything the tests need to know of it."""

    optimizer: str
    rule: oracle.Rule
    defaults: Mapping[str, Any]  # every hyperparameter that the rule reads, with its default
    settings: Mapping[str, Mapping[str, Any]]  # name -> constructor arguments to be tried
    example: str  # the richest of the settings, for tests that try one
    states: tuple[str, ...]  # the states of the example, step left out
    torch_name: str | None = None  # its equal in torch.optim
    sparse: bool = False  # whether it steps sparse gradients, as torch's does


def discover() -> dict[str, Case]:
    modules = sorted(info.name for info in pkgutil.iter_modules(__path__))
    cases = [importlib.import_module(f"{__name__}.{name}").CASE for name in modules]
    return {case.optimizer: case for case in cases}


CASES = discover()
