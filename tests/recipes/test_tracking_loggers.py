# SPDX-License-Identifier: Apache-2.0
"""The services' own readers find what a training logged: MLflow in files, Weights & Biases offline, TensorBoard."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastloop import AdamW, Loop
from fastloop.loop import trackers

PICTURE = np.zeros((4, 6, 3), np.uint8)
DATA = [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))] * 3


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def trained(run_dir: Path, loggers: Any, max_steps: int = 3, **options: Any) -> Loop:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    loop = Loop(
        model, AdamW(model.parameters(), lr=0.5), torch.nn.CrossEntropyLoss(), run_dir=run_dir, loggers=loggers,
        log_every=1, curves=False, **options,
    )  # fmt: skip
    loop.fit(DATA, DATA[:1], max_steps=max_steps)
    return loop


@pytest.fixture(scope="module")
def mlflow() -> Any:
    return pytest.importorskip("mlflow", reason="needs mlflow or mlflow-skinny")


def client_of(mlflow: Any, folder: Path) -> Any:
    with trackers._file_store_allowed():
        return mlflow.MlflowClient(tracking_uri=folder.absolute().as_uri())


# ---- MLflow


def test_mlflow_has_the_metrics_the_parameters_and_the_pictures(tmp_path: Path, mlflow: Any) -> None:
    loop = trained(tmp_path, ["jsonl", "mlflow"], config={"width": 4, "data": {"kind": "toy"}})
    loop.log_image("worst", PICTURE)
    loop.log_confusion_matrix("confusion", [[3, 0], [1, 2]])
    client = client_of(mlflow, tmp_path / "mlruns")
    run_id = (tmp_path / "mlflow-id.txt").read_text().strip()
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    parameters = run.data.params
    assert (parameters["width"], parameters["data.kind"], parameters["lr"]) == ("4", "toy", "0.5")
    for metric in ("train/loss", "val/loss", "val/accuracy", "lr"):
        logged = [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]
        assert sorted(logged) == loop.history[metric], metric  # MLflow's threads may write a later row first
    names = [Path(each.path).name for each in client.list_artifacts(run_id, "images")]
    assert any(name.startswith("worst") for name in names)
    assert any(name.startswith("confusion") for name in names)
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ


def test_mlflow_goes_on_with_its_run(tmp_path: Path, mlflow: Any) -> None:
    trained(tmp_path, "mlflow", config={"width": 4})
    first = (tmp_path / "mlflow-id.txt").read_text()
    trained(tmp_path, "mlflow", max_steps=5, config={"width": 5, "depth": 1})  # MLflow keeps a parameter's first value
    assert (tmp_path / "mlflow-id.txt").read_text() == first
    client = client_of(mlflow, tmp_path / "mlruns")
    run = client.get_run(first.strip())
    assert (run.data.params["width"], run.data.params["depth"]) == ("4", "1")
    assert sorted(point.step for point in client.get_metric_history(first.strip(), "train/loss")) == [1, 2, 3, 4, 5]
    (tmp_path / "mlflow-id.txt").write_text("0" * 32 + "\n")  # of another store
    trained(tmp_path, "mlflow", max_steps=6)
    assert (tmp_path / "mlflow-id.txt").read_text() not in (first, "0" * 32 + "\n")
    trained(tmp_path, "mlflow", resume=False)
    assert len(client.search_runs(["0"])) == 3


def test_mlflow_takes_odd_names_values_and_texts(tmp_path: Path, mlflow: Any) -> None:
    logger = trackers.Mlflow(tracking_uri=(tmp_path / "store").as_uri(), experiment="speech", run_name="mine")
    logger.open(None, None)
    logger.log({"step": 1, "f1@5 (%)": 2.0, "loss": math.nan, "note": "text", "none": None})
    logger.log_config({"a" * 400: "b" * 9000, "list": "[1]"})
    logger.sync()
    logger.close()
    logger.close()
    client = client_of(mlflow, tmp_path / "store")
    (run,) = client.search_runs([client.get_experiment_by_name("speech").experiment_id])
    assert run.info.run_name == "mine"
    assert run.data.metrics["f1_5 ___"] == 2.0
    assert math.isnan(run.data.metrics["loss"])
    assert run.data.tags["note"] == "text"
    assert len(run.data.params) == 2


def test_mlflow_needs_a_place(mlflow: Any) -> None:
    with pytest.raises(ValueError, match=r"\[mlflow\] runs are kept in a folder or by a server, got run_dir=None"):
        trackers.Mlflow().open(None, None)


def test_a_server_that_is_away_stops_no_training(tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*given: Any, **named: Any) -> None:
        raise mlflow.MlflowException("no connection")

    logger = trackers.Mlflow()
    opened = logger.open

    def open_and_lose(*given: Any) -> None:
        opened(*given)
        for name in ("log_batch", "log_image", "set_terminated"):
            monkeypatch.setattr(logger._client, name, away)

    monkeypatch.setattr(logger, "open", open_and_lose)
    with pytest.warns(RuntimeWarning) as caught:
        loop = trained(tmp_path, ["jsonl", logger])
    assert len(loop.history["train/loss"]) == 3
    texts = [str(each.message) for each in caught]
    assert sum("'mlflow' could not write" in text for text in texts) == 1  # said once
    assert any("[mlflow] no connection; the run could not be ended there" in text for text in texts)


def test_mlflow_is_waited_for_where_it_falls_behind(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    logger = trackers.Mlflow()
    logger.open(tmp_path, None)
    monkeypatch.setattr(trackers, "MOST_UNDER_WAY", 2)
    monkeypatch.setattr(
        logger._client,
        "log_batch",
        lambda *given, metrics, **named: SimpleNamespace(wait=lambda: waited.append(metrics[0].step)),
    )
    for step in range(1, 6):
        logger.log({"step": step, "train/loss": 1.0})
    assert waited == [1, 2, 3]
    logger.close()
    assert waited == [1, 2, 3, 4, 5]


def test_a_server_that_is_away_at_the_start_is_an_error(tmp_path: Path, mlflow: Any) -> None:
    with pytest.raises(OSError, match=r"\[mlflow\]"):
        trackers.Mlflow(tracking_uri="nosuch://place").open(tmp_path, None)


# ---- Weights & Biases, TensorBoard


def test_wandb_s_errors_stop_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AwayError(Exception):
        pass

    def away(*given: Any, **named: Any) -> None:
        raise AwayError("no connection")

    run = SimpleNamespace(
        log=away, finish=away, define_metric=lambda *given, **named: None, config=SimpleNamespace(update=away)
    )
    wandb = SimpleNamespace(Error=AwayError, Image=lambda image: image, init=lambda **settings: run)
    monkeypatch.setattr(trackers, "need", lambda *given: wandb)
    with pytest.warns(RuntimeWarning) as caught:
        loop = trained(tmp_path, ["jsonl", "wandb"])
    assert len(loop.history["train/loss"]) == 3
    texts = [str(each.message) for each in caught]
    assert sum("'wandb' could not write" in text for text in texts) == 1  # said once
    assert any("no connection; the run could not be ended there" in text for text in texts)


@pytest.mark.slow  # it starts a service of its own
def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    seen: dict[str, Any] = {}

    class Look:
        def on_evaluate(self, loop: Any, values: Any) -> None:
            seen["config"], seen["offline"] = dict(wandb.run.config), wandb.run.offline
            loop.log_image("worst", PICTURE)

    trained(tmp_path, "wandb", config={"width": 4}, callbacks=[Look()])
    assert seen["offline"] is True
    assert seen["config"]["width"] == 4
    assert seen["config"]["optimizer"] == "fastloop.optim.adamw.AdamW"
    assert wandb.run is None  # it is finished
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    kept = (tmp_path / "wandb-id.txt").read_text().strip()
    assert folder.name.endswith(kept)
    assert list(folder.glob("*.wandb"))
    assert list(folder.glob("files/media/images/worst*.png"))


def test_tensorboard_has_pictures_and_the_config(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = trained(tmp_path, "tensorboard", config={"width": 4})
    loop.log_image("worst", PICTURE)  # after the run: its own file, which hides nothing of the others
    loop.evaluate(DATA, name="test")
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Images("worst")] == [3]
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in read.Scalars("test/loss")] == [3]
    assert b'"width": 4' in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
