# SPDX-License-Identifier: Apache-2.0
"""`everything`: what one tuner recommends is the present setting of the next; the last word has a paired run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastloop import tune
from fastloop.bench.stats import Interval
from fastloop.tune import trial
from fastloop.tune.report import Report, Trial

module = sys.modules["fastloop.tune.everything"]  # under its name in the package there is the function


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def tuners(
    monkeypatch: pytest.MonkeyPatch, ratio: float, broken: str = "", together: Any = None
) -> list[tuple[str, dict, dict]]:
    """Tuners that answer at once, and a paired run with that ratio; what each was asked."""
    asked: list[tuple[str, dict, dict]] = []
    answers = {"loader": ({}, {"num_workers": 2}), "flags": ({"threads": 1}, {}), "memory": ({"compile": True}, {})}

    def made(name: str) -> Any:
        def tuner(target: Any, **options: Any) -> Report:
            asked.append((name, target.options, target.loader))
            if name == broken:
                raise tune.TargetError("[tune] broken")
            loop, loader = answers.get(name, ({}, {}))
            one = Trial({"a": name}, rate=Interval(1.0, 1.0, 1.0))
            options["on_trial"](one)
            return Report(
                name, "a:b", trials=[one], present=one, best=one, gain=Interval(1.3, 1.2, 1.4),
                keep=not (loop or loader), loop=loop, loader=loader,
            )  # fmt: skip

        return tuner

    monkeypatch.setattr(module, "SHARES", {name: (made(name), share) for name, (_, share) in module.SHARES.items()})
    if together is not None:
        monkeypatch.setattr(trial, "run", lambda function, *a, **k: together(function, *a, **k))
        return asked
    result = {"ratios": [ratio] * 5, "before": [10.0] * 5, "after": [10.0 * ratio] * 5}
    monkeypatch.setattr(trial, "run", lambda *a, **k: trial.Outcome(trial.OK, result))
    return asked


def test_answers_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tuners(monkeypatch, 2.0)
    report = tune.everything("a:b", options={"max_grad_norm": 1.0})
    assert [name for name, _, _ in asked] == ["loader", "batch", "flags", "memory", "lr"]
    assert asked[0][1:] == ({"max_grad_norm": 1.0}, {})
    assert asked[-1][1:] == ({"max_grad_norm": 1.0, "threads": 1}, {"num_workers": 2})
    assert (report.keep, report.loop, report.loader) == (False, {"threads": 1}, {"num_workers": 2})
    assert report.gain.median == 2.0
    assert report.best is report.trials[-1]
    assert report.present is report.trials[-2]


def test_without_a_gain_together_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tuners(monkeypatch, 1.0)
    report = tune.everything("a:b")
    assert (report.keep, report.loop, report.loader) == (True, {}, {})
    assert report.best is report.present
    assert "keep yours" in report.findings[-1]


def test_a_tuner_that_fails_is_told_and_the_first_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tuners(monkeypatch, 2.0, broken="batch")
    assert "batch: [tune] broken" in tune.everything("a:b").findings
    tuners(monkeypatch, 2.0, broken="loader")
    with pytest.raises(tune.TargetError):
        tune.everything("a:b", fresh=True)


@pytest.mark.parametrize("timeout", [20.0, 60.0])
def test_the_last_run_ends_well_within_its_timeout(monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
    def together(function: str, arguments: dict[str, Any], *, timeout: float, **_: Any) -> trial.Outcome:
        planned.append((arguments["seconds"], timeout))
        return trial.Outcome(trial.TIMEOUT, reason="not done")

    planned: list[tuple[float, float]] = []
    tuners(monkeypatch, 2.0, together=together)
    assert tune.everything("a:b", budget=600.0, timeout=timeout).keep
    assert planned == [(timeout / 2, timeout)]
    assert not tune.everything("a:b", budget=600.0, timeout=timeout).cached  # what failed is not kept


def no_room_for_two(function: str, *_: Any, **__: Any) -> trial.Outcome:
    if function.endswith("together:two"):
        return trial.Outcome(trial.OUT_OF_MEMORY, reason="too much")
    return trial.Outcome(trial.OK, {"ratios": [1.5] * 5})


def test_without_memory_for_two_trainings_the_loaders_part_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    tuners(monkeypatch, 2.0, together=no_room_for_two)
    report = tune.everything("a:b")
    assert (report.keep, report.loop, report.loader) == (False, {}, {"num_workers": 2})
    assert report.gain.median == 1.3  # the loader tuner's own
    assert "does not hold the training twice" in report.findings[-1]


def test_loader_settings_need_no_second_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tuners(monkeypatch, 2.0, together=no_room_for_two)
    shares = {name: pair for name, pair in module.SHARES.items() if name != "flags"}
    monkeypatch.setattr(module, "SHARES", shares)
    report = tune.everything("a:b")
    assert (report.keep, report.loader) == (False, {"num_workers": 2})
    assert report.gain.median == 1.5
