# SPDX-License-Identifier: Apache-2.0
"""Loggers for services that are extras: TensorBoard and Weights & Biases. Their packages are imported at use."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastloop.extras import need
from fastloop.loop.logs import Row


class TensorBoard:
    """Event files in `run_dir/tensorboard`: numbers as scalars, texts as texts, at the row's "step".

    On resume the new file tells TensorBoard to hide what earlier ones hold of later steps.

    Raises:
        MissingExtra: on open, without the tensorboard package.
    """

    needs_run_dir = True
    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: Any = None

    def open(self, run_dir: Path | None, resume_step: int | None) -> None:
        if run_dir is None:
            raise ValueError("[tensorboard] event files need a folder, got run_dir=None; pass run_dir= to the loop")
        need("tensorboard", "tensorboard", "this logger")
        folder = Path(run_dir) / "tensorboard"
        used = folder.is_dir() and any(folder.iterdir())
        purge = None if not used else 0 if resume_step is None else resume_step + 1
        writer = need("torch.utils.tensorboard", "tensorboard", "this logger").SummaryWriter
        self._writer = writer(str(folder), purge_step=purge, flush_secs=10)

    def log(self, row: Row) -> None:
        step = row["step"]
        for name, value in row.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            elif value is not None and name != "step":
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Wandb:
    """A run of Weights & Biases, resumed under its id, which `run_dir/wandb-id.txt` keeps.

    "step" is logged as a metric and is every other metric's x-axis: rows that a resumed run logs again are drawn over
    the earlier ones, which the service cannot drop.

    Args:
        settings: arguments of `wandb.init`, as {"project": "speech", "mode": "offline"}.

    Raises:
        MissingExtra: on open, without the wandb package.
    """

    name = "wandb"

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._settings = dict(settings or {})
        self._run: Any = None

    def open(self, run_dir: Path | None, resume_step: int | None) -> None:
        wandb = need("wandb", "wandb", "this logger")
        settings: dict[str, Any] = {"resume": "allow"}
        if run_dir is not None:
            run_dir = Path(run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            settings |= {"dir": str(run_dir), "id": self._id(run_dir, resume_step is not None)}
        self._run = wandb.init(**{**settings, **self._settings})
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def _id(run_dir: Path, resumed: bool) -> str:
        file = run_dir / "wandb-id.txt"
        if resumed and file.exists():
            return file.read_text(encoding="utf-8").strip()
        fresh = uuid.uuid4().hex[:12]
        file.write_text(fresh + "\n", encoding="utf-8")
        return fresh

    def log(self, row: Row) -> None:
        self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()
