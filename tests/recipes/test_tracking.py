# SPDX-License-Identifier: Apache-2.0
"""Experiments named by their config, runs compared, a model card: on folders of real, tiny trainings."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastloop import AdamW, Loop
from fastloop.recipes.evidence import record
from fastloop.recipes.tracking import Experiment, compare_experiments, model_card
from fastloop.recipes.tracking.experiment import canonical, experiment_id
from fastloop.recipes.tracking.run_folder import NoSuchRun, RunFolder, runs_below

SEED = torch.Generator().manual_seed(0)
DATA = [(torch.randn(4, 2, generator=SEED), torch.tensor([0, 1, 0, 1])) for _ in range(3)]


def trained(run_dir: Path, lr: float = 0.1, **options: Any) -> Loop:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    settings: dict[str, Any] = {"curves": False, "log_every": 1, **options}
    loop = Loop(model, AdamW(model.parameters(), lr=lr), torch.nn.CrossEntropyLoss(), run_dir=run_dir, **settings)
    loop.fit(DATA, DATA[:1], epochs=2)
    return loop


# ---- experiments


@dataclass
class Settings:
    lr: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)


def test_the_id_is_of_the_config_alone(tmp_path: Path) -> None:
    config = {"lr": 1e-3, "sizes": (1, 2), "data": Path("a") / "b", "stages": {0: "weak", 5: "strong"}}
    again = {"stages": {"5": "strong", "0": "weak"}, "data": "a/b", "sizes": [1, 2], "lr": np.float64(0.001)}
    text = '{"data":"a/b","lr":0.001,"sizes":[1,2],"stages":{"0":"weak","5":"strong"}}'
    assert experiment_id(config) == experiment_id(again) == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert experiment_id(Settings()) == experiment_id({"lr": 1e-3, "sizes": [1.0, 2]})
    assert experiment_id({"lr": 1}) == experiment_id({"lr": 1.0}) != experiment_id({"lr": True})
    assert experiment_id({"a": 0.1 + 0.2}) != experiment_id({"a": 0.3})
    assert experiment_id({"a": np.longdouble(0.5)}) == experiment_id({"a": 0.5})
    assert experiment_id({"a": -0.0}) == experiment_id({"a": 0})
    assert canonical({"dtype": torch.float32, "big": 2.0**60}) == {"dtype": "torch.float32", "big": 2.0**60}


def test_an_experiment_is_a_folder_that_a_run_goes_on_in(tmp_path: Path) -> None:
    first = Experiment({"lr": 0.1}, base=tmp_path / "e")
    assert first.run_dir == tmp_path / "e" / first.id
    assert json.loads((first.run_dir / "config.json").read_text()) == {"lr": 0.1} == first.config
    trained(first.run_dir, config=first.config)
    again = Experiment({"lr": 0.1}, base=tmp_path / "e")
    assert (again.id, again.run_dir) == (first.id, first.run_dir)
    assert Experiment({"lr": 0.2}, base=tmp_path / "e").id != first.id
    assert first.id in repr(first)


@pytest.mark.parametrize("content", ['{"lr": 0.2}', "{", "[]"])
def test_an_id_with_another_config_is_refused(tmp_path: Path, content: str) -> None:
    made = Experiment({"lr": 0.1}, base=tmp_path)
    (made.run_dir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"must hold the config of the id {made.id}"):
        Experiment({"lr": 0.1}, base=tmp_path)
    assert (made.run_dir / "config.json").read_text() == content


@pytest.mark.parametrize(
    ("config", "error", "why"),
    [
        (argparse.Namespace(lr=1), TypeError, r"pass vars\(args\)"),
        (Settings(lr=threading.Lock()), TypeError, r"config\.lr must be"),  # type: ignore[arg-type]
        ([1], TypeError, "a mapping or a dataclass, got list"),
        ({"a": {"b": [1, {2}]}}, TypeError, r"config\.a\.b\[1\] must be a number"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, r"config\.model must be"),
        ({"a": math.nan}, ValueError, r"config\.a must be finite, got nan"),
        ({"a": [math.inf]}, ValueError, r"config\.a\[0\] must be finite"),
        ({"a": {1: 0, "1": 0}}, ValueError, "two keys that are written '1'"),
        ({(1, 2): 0}, TypeError, "keys of config must be"),
    ],
)
def test_configs_that_have_no_id(tmp_path: Path, config: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        Experiment(config, base=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- comparison


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("experiments")
    for lr in (0.1, 1e-3):
        experiment = Experiment({"lr": lr, "width": 4, "data": {"kind": "toy"}}, base=base)
        trained(experiment.run_dir, lr, config=experiment.config)
    trained(base / "deep" / "er", 0.5)  # without a config of its own
    Experiment({"lr": 7.0, "width": 4, "data": {"kind": "toy"}}, base=base)  # not trained yet
    return base


def test_runs_in_order_of_the_metric(runs: Path) -> None:
    found = compare_experiments(runs)
    assert [run.best for run in found.runs][-1] is None
    values = [run.best for run in found.runs if run.best is not None]
    assert values == sorted(values)
    assert len(values) == 3
    worst_first = compare_experiments(runs, mode="max")
    assert [run.best for run in worst_first.runs][-1] is None
    tops = [run.best for run in worst_first.runs if run.best is not None]
    assert tops == sorted(tops, reverse=True)
    assert found.best is found.runs[0]
    for run in found.runs[:3]:
        rows = [json.loads(line) for line in (runs / run.name / "metrics.jsonl").read_text().splitlines()]
        logged = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
        assert (run.best_step, run.best) == min(logged, key=lambda point: point[1])
        assert (run.last_step, run.last, run.steps) == (*logged[-1], 6)
        assert (run.seconds or 0) > 0


def test_only_settings_that_differ_are_shown(runs: Path) -> None:
    found = compare_experiments(runs)
    assert "lr" in found.differing
    named = [run for run in found.runs if run.config.get("data.kind") == "toy"]
    assert [run.config["width"] for run in named] == [4, 4, 4]
    found.runs = named
    assert found.differing == ["lr"]
    head, *rows = str(found).splitlines()
    assert head.split()[-1] == "lr"
    assert len(rows) == 3
    assert found.markdown().splitlines()[0].startswith("| run | best val/loss |")
    content = found.to_json()
    json.dumps(content, allow_nan=False)
    assert content["runs"][0]["config"]["lr"] in (0.1, 1e-3)


def test_a_picture_of_the_comparison(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = compare_experiments(runs, metric="train/loss").plot(tmp_path / "runs.png")
    assert path.stat().st_size > 5000
    empty = compare_experiments(tmp_path)
    assert str(empty) == "no runs"
    with pytest.raises(ValueError, match="nothing to draw"):
        empty.plot(tmp_path / "none.png")


def test_comparisons_that_cannot_be(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run .* has the metric 'val/f1'; pass one of .*val/loss"):
        compare_experiments(runs, metric="val/f1")
    with pytest.raises(ValueError, match='mode must be "min" or "max", got \'best\''):
        compare_experiments(runs, mode="best")
    with pytest.raises(FileNotFoundError, match="there is no"):
        compare_experiments(tmp_path / "none")


def test_values_that_are_not_finite_are_no_best(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = ['{"step": 1, "val/loss": null, "not_finite": {"val/loss": "-inf"}}', '{"step": 2, "val/loss": 3.0}', "{"]
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run,) = compare_experiments(tmp_path).runs
    assert (run.best, run.best_step, run.last, run.steps, run.seconds) == (3.0, 2, 3.0, 2, None)


# ---- a run's folder


def test_a_run_of_another_shape_is_compared_without_values(tmp_path: Path) -> None:
    trained(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/run.json").write_text('{"format": "fastloop-run", "version": 1, "starts": [{"time": 1}]}')
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/metrics.jsonl").write_text('{"step": NaN, "val/loss": 1}\n{"step": 3, "val/loss": 1e9}\n')
    (tmp_path / ".cache/run").mkdir(parents=True)
    (tmp_path / ".cache/run/metrics.jsonl").write_text("")
    found = compare_experiments(tmp_path).runs
    assert [(run.name, run.best_step is not None) for run in found] == [("good", True), ("odd", True), ("bad", False)]
    assert found[1].best_step == 3


def test_seconds_of_starts_that_are_left_out_count(tmp_path: Path) -> None:
    first = {"time": 1.0, "end": {"seconds": 2.0}, "left_out": {"starts": 5, "seconds": 10.0}}
    content = {"format": "fastloop-run", "version": 1, "starts": [first, {"time": 9.0, "end": {"seconds": 3.0}}]}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert RunFolder(tmp_path).seconds == 15.0


def test_folders_of_runs(runs: Path, tmp_path: Path) -> None:
    assert len(list(runs_below(runs))) == 4
    assert list(runs_below(runs / "deep" / "er")) == [runs / "deep" / "er"]
    with pytest.raises(NoSuchRun, match="pass the run_dir of a Loop"):
        RunFolder(tmp_path)
    with pytest.raises(NoSuchRun, match="project must be a folder"):
        RunFolder(runs / "deep" / "er", tmp_path / "none")


def test_damaged_files_say_nothing(tmp_path: Path) -> None:
    trained(tmp_path)
    for name in ("run.json", "config.json", "checks.json"):
        (tmp_path / name).write_text("{")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('no row\n{"step": 1, "not_finite": 3}\n')
    (tmp_path / "practices.jsonl").write_bytes(b"\xff\xfe")
    for manifest in (tmp_path / "checkpoints").glob("final*/manifest.json"):
        manifest.write_text("{}")
    run = RunFolder(tmp_path)
    assert (run.starts, run.rows, run.config, run.checks, run.practices) == ([], [], {}, None, {})
    assert {"run.json", "metrics.jsonl", "config.json", "checks.json"} < set(run.damaged)
    assert run.damaged_checkpoints == ["final-000000006"]
    assert run.steps == 6  # the other checkpoints know it
    assert "Unknown" in model_card(tmp_path)


def test_exported_files_are_no_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path)
    assert RunFolder(tmp_path).exported == []
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").write_bytes(b"")
    project = tmp_path / "project"
    project.mkdir()
    (project / "b.pt2").write_bytes(b"")
    record(project, "analyze", {"size": 3})
    run = RunFolder(tmp_path, project)
    assert {path.name for path in run.exported} == {"model.onnx", "b.pt2"}
    assert run.practices["analyze"]["size"] == 3
    record(tmp_path, "analyze", {"size": 4})
    assert RunFolder(tmp_path, project).practices["analyze"]["size"] == 4  # the run's own goes before


# ---- the card


def test_a_card_says_what_the_folder_knows(tmp_path: Path) -> None:
    loop = trained(tmp_path, config={"width": 4}, monitor="val/accuracy", mode="max", seed=1)
    record(tmp_path, "baselines", {"scores": {"majority": {"accuracy": 0.5, "loss": 0.7}}})
    findings = [{"where": "class 1", "what": "often missed"}]
    record(tmp_path, "error_analysis", {"samples": 8, "metrics": {"accuracy": 0.75}, "findings": findings})
    text = model_card(
        tmp_path, name="Toy", intended_use="Tests.", limitations="Many | more.", results={"test/f1": 0.625}
    )
    assert (tmp_path / "MODEL_CARD.md").read_text() == text
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert text.startswith("# Toy\n")
    assert list(sections) == [
        "Model", "Intended use", "Limitations", "Training data", "Training", "Hyperparameters", "Evaluation",
        "Error analysis", "How to load the weights", "What was done",
    ]  # fmt: skip
    assert "| parameters | 6 |" in sections["Model"]
    assert "Tests." in sections["Intended use"]
    assert "Many | more." in sections["Limitations"]
    assert "| config: width | 4 |" in sections["Hyperparameters"]
    assert "| seed | 1 |" in sections["Hyperparameters"]
    assert "| lr | 0.1 |" in sections["Hyperparameters"]
    assert "| test/f1 | 0.625 |" in sections["Evaluation"]
    assert "| majority | 0.5 | 0.7 |" in sections["Evaluation"]
    assert f"| val/loss | {loop.history['val/loss'][-1][1]:.4g} | 6 |" in sections["Evaluation"]
    assert "Best checkpoint by val/accuracy (max)" in sections["Evaluation"]
    assert "- class 1: often missed" in sections["Error analysis"]
    assert "| samples | 8 |\n| accuracy | 0.75 |" in sections["Error analysis"]
    assert "| windows (optimizer steps) | 6 |" in sections["Training"]
    assert "| error_analysis |" in sections["What was done"]


def test_the_card_s_way_to_load_the_weights_works(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from fastloop.loop.__main__ import main

    trained(tmp_path)
    command = model_card(tmp_path).split("python -m fastloop.loop ")[1].split("\n")[0].split()
    folder, target = tmp_path / command[1], tmp_path / command[3]
    assert main([command[0], str(folder), command[2], str(target)]) == 0
    model = torch.nn.Linear(2, 2)
    model.load_state_dict(load_file(target))


def test_what_nobody_has_said_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    text = model_card(tmp_path)
    for words in (
        "written down the intended use",
        "written down the limitations",
        "Baselines: none",
        "error_analysis(",
    ):
        assert words in text
    assert text.startswith(f"# {tmp_path.name}\n")
    with pytest.raises(NoSuchRun):
        model_card(tmp_path / "none")


def test_a_description_of_another_shape_makes_a_card_all_the_same(tmp_path: Path) -> None:
    starts = [{"time": 1.0, "model": 3, "optimizer": [], "train_loader": "a"}]
    content = {"format": "fastloop-run", "version": 1, "starts": starts}
    (tmp_path / "run.json").write_text(json.dumps(content))
    text = model_card(tmp_path)
    assert text.count("not as fastloop writes them") >= 3
    assert "## What was done" in text
