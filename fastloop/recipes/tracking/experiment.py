# SPDX-License-Identifier: Apache-2.0
"""An experiment: a folder that its config names, so that the same config is the same run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from fastloop.loop.files import replace_file
from fastloop.recipes.tracking.run_folder import CONFIG

DIGITS = 8  # of the id; 1000 experiments of one base meet by chance once in 8600


class Experiment:
    """A folder for a run, `base/id`, with the config in `config.json`.

    id = the first 8 hexadecimal digits of SHA-256 over the config as canonical JSON: sorted keys, no spaces, tuples as
    lists, paths as text, 1.0 as 1. So the same config has the same id anywhere, and a run under it goes on:

        experiment = Experiment({"lr": 1e-3, "width": 64})
        Loop(..., run_dir=experiment.run_dir, config=experiment.config)

    Args:
        config: a mapping or a dataclass of numbers, texts, None, paths, dtypes, lists and mappings.
        base: folder of the experiments; made if it is not there.

    Attributes:
        id, run_dir, config (as it is in the file).

    Raises:
        TypeError: something else in the config; the error says where.
        ValueError: a number that is not finite, two keys of one text, or a folder of this id with another config.
        OSError: the folder cannot be written.
    """

    def __init__(self, config: Any, *, base: str | os.PathLike[str] = "experiments") -> None:
        if not isinstance(config, Mapping) and not _is_instance(config):
            raise TypeError(
                f"[Experiment] config must be a mapping or a dataclass, got {type(config).__name__}; of argparse pass "
                "vars(args)"
            )
        self.config: dict[str, Any] = canonical(config)
        self.id = experiment_id(self.config)
        self.run_dir = Path(base) / self.id
        path = self.run_dir / CONFIG
        if path.exists():
            self._check(path)
        else:
            replace_file(path, json.dumps(self.config, indent=2, sort_keys=True) + "\n")

    def _check(self, path: Path) -> None:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if there != self.config:
            what = "is damaged" if there is None else f"differs in {', '.join(_differing(there, self.config))}"
            raise ValueError(
                f"[Experiment] {path} must hold the config of the id {self.id}, it {what}; somebody has edited it, or "
                "two configs have met in one id: take another base, or a config with one more key"
            )

    def __repr__(self) -> str:
        return f"Experiment({self.id!r}, run_dir={str(self.run_dir)!r})"


def experiment_id(config: Any) -> str:
    """The id of a config; see `Experiment`."""
    text = json.dumps(canonical(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def canonical(value: Any, where: str = "config") -> Any:
    """The value as JSON in one form, whichever of Python's types it came in.

    Raises:
        TypeError, ValueError: as Experiment.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (numpy.bool_, numpy.integer, numpy.floating)):
        return canonical(float(value) if isinstance(value, numpy.floating) else value.item(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _number(value, where)
    if isinstance(value, os.PathLike):
        return Path(value).as_posix()
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if _is_instance(value):
        return _mapping({each.name: getattr(value, each.name) for each in fields(value)}, where)
    if isinstance(value, (list, tuple)):
        return [canonical(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, Mapping):
        return _mapping(value, where)
    raise TypeError(
        f"[Experiment] {where} must be a number, a text, a path, None, a list or a mapping of these, got "
        f"{type(value).__name__}; write what it was made from"
    )


def _number(value: float, where: str) -> float | int:
    if not math.isfinite(value):
        raise ValueError(f"[Experiment] {where} must be finite, got {value}; write None or a text for it")
    return int(value) if value == int(value) and abs(value) < 2**53 else float(value)


def _mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, each in value.items():
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise TypeError(f"[Experiment] keys of {where} must be texts or integers, got {key!r}")
        if str(key) in found:
            raise ValueError(f"[Experiment] {where} has two keys that are written {str(key)!r}; rename one")
        found[str(key)] = canonical(each, f"{where}.{key}")
    return found


def _is_instance(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _differing(there: Any, here: dict[str, Any]) -> list[str]:
    if not isinstance(there, dict):
        return ["being no object"]
    return sorted(key for key in {*there, *here} if key not in there or key not in here or there[key] != here[key])
