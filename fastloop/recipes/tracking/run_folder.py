# SPDX-License-Identifier: Apache-2.0
"""A run's folder as a reader sees it. Every file may be missing or damaged: then it says nothing."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from fastloop.loop import description
from fastloop.loop.logs import read_rows
from fastloop.loop.manifest import Checkpoint, scan
from fastloop.recipes.evidence import recorded

CONFIG = "config.json"
SIGNS = (description.FILE, "metrics.jsonl", "checkpoints")  # a folder with one of these is a run's
EXPORTED = (".onnx", ".pt2", ".torchscript.pt", ".safetensors")
NOT_EXPORTS = ("checkpoints", "mlruns", "wandb", "tensorboard", "images", "logs")

Points = list[tuple[int, float]]


class NoSuchRun(FileNotFoundError):
    """There is no folder of a run."""


class RunFolder:
    """What the folder of a run says.

    Args:
        path: of the run.
        project: another folder whose records and exported files count too; None for none.

    Attributes:
        damaged: what could not be read, by file; known once it has been asked for.

    Raises:
        NoSuchRun: no such folder, or one without any of a run's files.
    """

    def __init__(self, path: str | os.PathLike[str], project: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path)
        self.project = None if project is None else Path(project)
        self.damaged: dict[str, str] = {}
        if not is_run(self.path):
            raise NoSuchRun(
                f"[run] a run's folder has {', '.join(SIGNS)} or one of them, {self.path} has none; pass the run_dir "
                "of a Loop"
            )
        if self.project is not None and not self.project.is_dir():
            raise NoSuchRun(
                f"[run] project must be a folder, there is no {self.project}; leave it out, or make it first"
            )

    # ---- what the loop wrote

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Of run.json, oldest first."""
        path = self.path / description.FILE
        starts = description.read(path)
        if not starts and path.exists():
            self.damaged[description.FILE] = "cannot be read"
        return starts

    @property
    def start(self) -> dict[str, Any]:
        """The latest start; {} where nothing says."""
        return self.starts[-1] if self.starts else {}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rows = read_rows(path)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            self.damaged[path.name] = str(error)
            return []
        if caught:
            self.damaged[path.name] = f"{len(caught)} lines cannot be read"
        return [row for row in rows if _is_number(row["step"]) and math.isfinite(row["step"])]

    def points(self, metric: str) -> Points:
        """(step, value) of the rows that have a number for this metric; NaN too."""
        return [(int(row["step"]), float(row[metric])) for row in self.rows if _is_number(row.get(metric))]

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics that a row has a number for."""
        return list(dict.fromkeys(name for row in self.rows for name, value in row.items() if _is_number(value)))

    @property
    def steps(self) -> int:
        """Windows done, as far as any file says."""
        ended = self.start.get("end", {}).get("step", 0)
        saved = max((each.step for each in self.checkpoints), default=0)
        return max(ended, saved, max((int(row["step"]) for row in self.rows), default=0))

    @property
    def seconds(self) -> float | None:
        """Of training, over all starts; of one that was killed until its last row. None where nothing says."""
        if not self.starts:
            return None
        ended = [start["end"]["seconds"] for start in self.starts if "end" in start]
        ended.append(self.starts[0].get("left_out", {}).get("seconds", 0.0))
        log = self.path / "metrics.jsonl"
        if "end" not in self.start and log.exists():
            ended.append(max(log.stat().st_mtime - self.start["time"], 0.0))
        return math.fsum(ended)

    @cached_property
    def _scanned(self) -> tuple[list[Checkpoint], dict[str, list[str]]]:
        folder = self.path / "checkpoints"
        return scan(folder) if folder.is_dir() else ([], {})

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The whole ones, newest first; nothing is hashed."""
        return self._scanned[0]

    @property
    def damaged_checkpoints(self) -> list[str]:
        """Names of those that are not whole."""
        return sorted(self._scanned[1])

    def best_checkpoint(self, metric: str, mode: str) -> Checkpoint | None:
        """The whole one with the best value of `metric`, the earliest of equals, as the loop keeps them."""
        having = [each for each in self.checkpoints if _is_number(each.manifest["metrics"].get(metric))]
        finite = [each for each in having if math.isfinite(each.manifest["metrics"][metric])]
        sign = 1 if mode == "min" else -1
        return min(finite, key=lambda each: (sign * each.manifest["metrics"][metric], each.step), default=None)

    # ---- what was done beside it

    @cached_property
    def practices(self) -> dict[str, dict[str, Any]]:
        """The latest record of each practice; those of the run go before those of the project."""
        found: dict[str, dict[str, Any]] = {}
        for folder in self._folders():
            try:
                found |= recorded(folder)
            except (OSError, ValueError) as error:
                self.damaged[str(folder / "practices.jsonl")] = str(error)
        return found

    @cached_property
    def checks(self) -> list[dict[str, Any]] | None:
        """Findings of the checks before the training, as `Loop(check=True)` writes them; None where none ran."""
        content = self._json("checks.json")
        findings = content.get("findings") if isinstance(content, dict) else content
        if not isinstance(findings, list):
            return None
        return [each for each in findings if isinstance(each, dict)]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Of config.json, else what the loop was given as `config`; {} without either."""
        content = self._json(CONFIG)
        found = content if content is not None else self.start.get("config")
        return found if isinstance(found, dict) else {}

    @cached_property
    def exported(self) -> list[Path]:
        """Files of a model to be used elsewhere, in the run's folder and the project's; none of a checkpoint."""
        return [path for folder in self._folders() for path in _exported_in(folder)]

    def file(self, *names: str) -> Path | None:
        """The first of these files that is there, in the run's folder or the project's."""
        found = (folder / name for folder in reversed(self._folders()) for name in names)
        return next((path for path in found if path.is_file()), None)

    def _folders(self) -> list[Path]:
        return [self.path] if self.project is None else [self.project, self.path]

    def _json(self, name: str) -> Any:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            self.damaged[name] = str(error)
            return None


def is_run(path: Path) -> bool:
    """Whether the folder has any of a run's files."""
    return any((path / name).exists() for name in SIGNS)


def runs_below(base: Path) -> Iterator[Path]:
    """The folders of runs at and below `base`, in the order of their names; none inside of another."""
    for folder, inner, _ in os.walk(base):
        if is_run(Path(folder)) or (Path(folder) / CONFIG).exists():
            inner.clear()
            yield Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def _exported_in(folder: Path) -> list[Path]:
    found = []
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith((*NOT_EXPORTS, ".")))
        inner[:] = [name for name in inner if not is_run(Path(place) / name)]  # what other runs have made
        found += [Path(place) / name for name in sorted(files) if name.endswith(EXPORTED)]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
