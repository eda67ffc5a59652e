# SPDX-License-Identifier: Apache-2.0
"""Loggers for services that are extras: TensorBoard, Weights & Biases, MLflow. Their packages are imported at use."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from fastloop.extras import need
from fastloop.loop.files import replace_file
from fastloop.loop.logs import Row

MOST_UNDER_WAY = 1000  # rows that MLflow's threads may be behind


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

    def log_image(self, name: str, image: NDArray[numpy.uint8], step: int) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", 0)

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
        self._wandb: Any = None
        self._run: Any = None

    def open(self, run_dir: Path | None, resume_step: int | None) -> None:
        self._wandb = need("wandb", "wandb", "this logger")
        settings: dict[str, Any] = {"resume": "allow"}
        if run_dir is not None:
            run_dir = Path(run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            settings |= {"dir": str(run_dir), "id": self._id(run_dir, resume_step is not None)}
        self._run = self._wandb.init(**{**settings, **self._settings})
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
        with _as_os_error(self._wandb.Error):
            self._run.log({name: value for name, value in row.items() if value is not None})

    def log_image(self, name: str, image: NDArray[numpy.uint8], step: int) -> None:
        with _as_os_error(self._wandb.Error):
            self._run.log({name: self._wandb.Image(image), "step": step})

    def log_config(self, config: Mapping[str, Any]) -> None:
        with _as_os_error(self._wandb.Error):
            self._run.config.update(dict(config), allow_val_change=True)

    def close(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            with _as_os_error(self._wandb.Error):
                run.finish()
        except OSError as error:
            _warn_of_end(error)


class Mlflow:
    """A run of MLflow, resumed under its id, which `run_dir/mlflow-id.txt` keeps.

    Numbers are metrics at the row's "step", texts are tags, the config is its parameters, of which MLflow keeps the
    first value. Rows are sent by threads of MLflow. Rows that a resumed run logs again stand there twice, since MLflow
    deletes none.

    Args:
        tracking_uri: None: what `mlflow.set_tracking_uri` or MLFLOW_TRACKING_URI says, else files in `run_dir/mlruns`;
            MLflow shows these by `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri run_dir/mlruns`.
        experiment: None: MLFLOW_EXPERIMENT_NAME, else "Default".
        run_name: None: the name of run_dir.

    Raises:
        MissingExtra: on open, without the mlflow or mlflow-skinny package.
        ValueError: on open, with neither a run_dir nor a tracking URI.
        OSError: what MLflow raises.
    """

    name = "mlflow"

    def __init__(
        self, *, tracking_uri: str | None = None, experiment: str | None = None, run_name: str | None = None
    ) -> None:
        self._uri, self._experiment, self._run_name = tracking_uri, experiment, run_name
        self._mlflow: Any = None
        self._client: Any = None
        self._run: str | None = None
        self._known: dict[str, str] = {}  # parameters
        self._under_way: list[Any] = []

    def open(self, run_dir: Path | None, resume_step: int | None) -> None:
        self._mlflow = need("mlflow", "tracking", 'the logger "mlflow"')
        uri, is_set = self._uri, self._mlflow.is_tracking_uri_set()
        if uri is None and not is_set:
            if run_dir is None:
                raise ValueError(
                    "[mlflow] runs are kept in a folder or by a server, got run_dir=None and no tracking URI; pass "
                    "run_dir= to the loop, or set MLFLOW_TRACKING_URI"
                )
            uri = (Path(run_dir).absolute() / "mlruns").as_uri()
        with _as_os_error(self._mlflow.MlflowException):
            with _file_store_allowed():
                self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            self._run = self._resumed(run_dir) if resume_step is not None else None
            if self._run is None:
                name = self._run_name or (None if run_dir is None else Path(run_dir).absolute().name)
                self._run = self._client.create_run(self._experiment_id(), run_name=name).info.run_id
                self._known = {}
                if run_dir is not None:
                    replace_file(Path(run_dir) / "mlflow-id.txt", f"{self._run}\n")

    def _resumed(self, run_dir: Path | None) -> str | None:
        """The run that the folder names, running again; None where this store does not have it."""
        file = None if run_dir is None else Path(run_dir) / "mlflow-id.txt"
        if file is None or not file.exists():
            return None
        kept = file.read_text(encoding="utf-8").strip()
        try:
            run = self._client.get_run(kept)
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        self._known = dict(run.data.params)
        self._client.update_run(kept, status="RUNNING")
        return kept

    def _experiment_id(self) -> str:
        name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def log(self, row: Row) -> None:
        entities, now = self._mlflow.entities, int(time.time() * 1000)
        step = int(row["step"])  # type: ignore[arg-type]
        metrics = [
            entities.Metric(_key(name), float(value), now, step)
            for name, value in row.items()
            if value is not None and not isinstance(value, str) and name != "step"
        ]
        tags = [entities.RunTag(_key(name), value[:5000]) for name, value in row.items() if isinstance(value, str)]
        with _as_os_error(self._mlflow.MlflowException):
            sent = self._client.log_batch(self._run, metrics=metrics, tags=tags, synchronous=False)
            self._under_way.append(sent)
            if len(self._under_way) > MOST_UNDER_WAY:  # of a run without checkpoints, at which they are waited for
                self._under_way.pop(0).wait()

    def log_image(self, name: str, image: NDArray[numpy.uint8], step: int) -> None:
        with _as_os_error(self._mlflow.MlflowException):
            self._client.log_image(self._run, image, key=_key(name).replace("/", "."), step=step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        given = {_key(name)[:250]: str(value)[:5000] for name, value in config.items()}
        new = [self._mlflow.entities.Param(name, value) for name, value in given.items() if name not in self._known]
        with _as_os_error(self._mlflow.MlflowException):
            for start in range(0, len(new), 100):  # the most that MLflow takes at once
                self._client.log_batch(self._run, params=new[start : start + 100])
        self._known = {**given, **self._known}

    def sync(self) -> None:
        under_way, self._under_way = self._under_way, []
        with _as_os_error(self._mlflow.MlflowException):
            for sent in under_way:
                sent.wait()

    def close(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            self.sync()
            with _as_os_error(self._mlflow.MlflowException):
                self._client.set_terminated(run)
        except OSError as error:
            _warn_of_end(error)


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)


@contextmanager
def _as_os_error(kind: type[Exception]) -> Iterator[None]:
    """What a service raises as an OSError, which a training outlives."""
    try:
        yield
    except kind as error:
        raise OSError(f"[{kind.__module__.partition('.')[0]}] {error}") from error


def _warn_of_end(error: OSError) -> None:
    """A service that is away at the end is no error: the training is done."""
    warnings.warn(f"{error}; the run could not be ended there", RuntimeWarning, stacklevel=3)


@contextmanager
def _file_store_allowed() -> Iterator[None]:
    """Newer versions of MLflow keep runs in plain files only where they are told that this is meant, which it is."""
    name = "MLFLOW_ALLOW_FILE_STORE"
    before = os.environ.get(name)
    os.environ.setdefault(name, "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
