# SPDX-License-Identifier: Apache-2.0
"""benchmarks/train_digits.py, the whole way in one program: what it leaves in the run's folder, and what it tells."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import programs
import pytest
import torch
from safetensors.torch import load_file

PLOTS = ("data", "overfit", "lr", "schedule", "augmentation", "training_curves", "layers", "errors")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """The module; `run(...)` calls its main with the arguments of a command line."""
    module = programs.program("benchmarks/train_digits.py", monkeypatch)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train_digits.py", *arguments])
        return module.main()

    module.run = run
    return module


@pytest.mark.slow
def test_the_whole_way(program, tmp_path, capsys):
    for extra in ("sklearn", "matplotlib", "onnxruntime", "onnxscript"):
        pytest.importorskip(extra)
    first, second = tmp_path / "a", tmp_path / "b"
    program.run("--run-dir", str(first), "--epochs", "4")
    told = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"^(\d+)\. ", told, re.M)] == list(range(1, 11))
    assert all((first / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/accuracy" in row for row in rows) == 4
    tested = [row["test/accuracy"] for row in rows if "test/accuracy" in row]
    assert len(tested) == 1
    assert tested[0] > 0.9
    assert {"digits.onnx", "digits.pt2"} <= {path.name for path in (first / "export").iterdir()}
    assert "test/accuracy" in (first / "MODEL_CARD.md").read_text()
    done = {json.loads(line)["practice"] for line in (first / "practices.jsonl").read_text().splitlines()}
    assert {"analyze", "baselines", "overfit_one_batch", "lr_range_test", "error_analysis", "export_model"} <= done
    assert "not done: the test set" not in told

    program.run("--run-dir", str(second), "--epochs", "4")  # the same seed: the same training
    one, other = (load_file(next(run.glob("checkpoints/final-*/rank-00000.safetensors"))) for run in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("accuracy", "well"), [(0.98, False), (0.99, False), (0.994, False), (0.996, True)])
def test_half_the_errors_of_the_best_baseline_are_wanted(program, tmp_path, monkeypatch, accuracy, well):
    scores = {"linear": {"accuracy": 0.96}, "shallow": {"accuracy": 0.99}}
    found = SimpleNamespace(scores=scores, best="shallow", table=lambda **_: "", record=lambda _: None)
    monkeypatch.setattr(program.recipes, "baselines", lambda *_, **__: found)
    parts, options = SimpleNamespace(train=None, test=None), SimpleNamespace(run_dir=tmp_path, seed=0)
    assert program.compare(accuracy, parts, options, program.Story()) is well


def test_above_the_baselines_but_below_the_goal_is_not_enough(program, tmp_path, monkeypatch):
    found = SimpleNamespace(scores={"linear": {"accuracy": 0.5}}, best="linear", table=lambda **_: "", record=print)
    monkeypatch.setattr(program.recipes, "baselines", lambda *_, **__: found)
    parts, options = SimpleNamespace(train=None, test=None), SimpleNamespace(run_dir=tmp_path, seed=0)
    assert not program.compare(program.GOAL - 0.001, parts, options, program.Story())
    assert program.compare(program.GOAL, parts, options, program.Story())


def test_images_are_moved_by_a_pixel_and_nothing_else(program):
    image = torch.zeros(1, 8, 8)
    image[0, 3, 4] = 1.0
    places = {tuple(program.shifted(image)[0].nonzero()[0].tolist()) for _ in range(300)}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_without_scikit_learn_it_says_so(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="needs scikit-learn"):
        program.digits()


def test_too_few_epochs_are_wrong_use(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.run("--epochs", "1")
    assert stopped.value.code == 2
    assert "--epochs must be at least 2, got 1" in capsys.readouterr().err
