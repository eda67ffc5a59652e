# SPDX-License-Identifier: Apache-2.0
"""Schedules as pictures and as rows of text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from fastloop import schedules
from fastloop.extras import MissingExtra
from fastloop.recipes.schedule import command, plot_schedule
from fastloop.recipes.schedule.plot import rates_of, resolved

PNG = b"\x89PNG"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers(required=True))
    options = parser.parse_args([command.NAME, *arguments])
    return int(options.run(options))


def rows(text: str) -> list[list[float]]:
    lines = [line.split() for line in text.splitlines()]
    return [[float(cell) for cell in line] for line in lines if len(line) == 2 and line[0].isdigit()]


@pytest.mark.parametrize("name", schedules.names())
def test_every_schedule_is_shown_with_what_it_computes(name: str, capsys: Any) -> None:
    assert run(name, "--steps", "100", "--lr", "0.01") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}(")
    assert next(window for window, _ in rows(text)) == 0
    assert [window for window, _ in rows(text)][-1] == 99
    assert 10 <= len(rows(text)) <= 12
    if name != "plateau":
        made = command.described(name, {}, 100)
        for window, rate in rows(text):
            assert rate == pytest.approx(0.01 * made(int(window)), rel=1e-3)


def test_all_of_them(capsys: Any, tmp_path: Path) -> None:
    assert run("all", "--steps", "40", "--plot", str(tmp_path / "pictures")) == 0
    text = capsys.readouterr().out
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [each.name for each in pictures] == [f"{name}.png" for name in schedules.names()]
    assert all(each.read_bytes().startswith(PNG) for each in pictures)
    assert [line.split()[0] for line in text.splitlines()[1:-1]] == schedules.names()


def test_arguments_are_those_of_the_schedule(capsys: Any) -> None:
    run("multi_step", "milestones=30,60", "gamma=.5", "--steps", "100")
    assert dict(rows(capsys.readouterr().out)) == {
        0: 1.0, 9: 1.0, 19: 1.0, 29: 1.0, 39: 0.5, 49: 0.5, 59: 0.5, 69: 0.25, 79: 0.25, 89: 0.25, 99: 0.25
    }  # fmt: skip
    run("one_cycle", "three_phase=true", "anneal=linear", "--steps", "50")
    assert capsys.readouterr().out.startswith("one_cycle(total_steps=50")
    run("cyclic", "up_steps=5", "down_steps=null")
    assert "down_steps=None" in capsys.readouterr().out
    run("plateau", "patience=2", "factor=0.5", "--steps", "100")
    out = capsys.readouterr().out
    assert "patience=2" in out
    assert "50 evaluations of a metric that falls, then stays" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cosin"], r"did you mean 'cosine'"),
        (["cosine", "gamma"], r"arguments must be KEY=VALUE, got 'gamma'"),
        (["cosine", "gamma=1"], r"unexpected .*'gamma'.* it takes total_steps"),
        (["cosine", "name=step"], r"the name is the first argument"),
        (["multi_step", "milestones=3"], r"milestones must be a list of int, got 3"),
        (["cosine", "--steps", "0"], r"total_steps must be an integer of at least 1, got 0"),
        (["cosine", "--lr", "-1"], r"lr must be above 0, got -1.0"),
        (["cosine", "--lr", "nan"], r"lr must be above 0, got nan"),
        (["all", "gamma=1"], r"all takes no arguments"),
        (["cosine", "--plot", "missing/a.png"], r"the plot's folder must exist"),
        (["cosine", "--plot", "a.txt"], r"the file's ending must be one of"),
    ],
)
def test_wrong_use(arguments: list[str], said: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=said):
        run(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_trainings(steps: int, tmp_path: Path, capsys: Any) -> None:
    for name in schedules.names():
        if name == "one_cycle" and steps == 1:
            continue  # needs 2
        assert run(name, "--steps", str(steps)) == 0
        assert len(rows(capsys.readouterr().out)) == steps


def test_a_picture_of_each_kind_of_schedule(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    assert plot_schedule(schedules.cosine(), 10, path) == path
    assert b"<svg" in path.read_bytes()
    for given in ("cosine", {"name": "step", "step_size": 3}, lambda step: 0.9**step):
        assert plot_schedule(given, 10, str(tmp_path / "b.png"), lr=0.1).read_bytes().startswith(PNG)
    plot_schedule("plateau", 10, tmp_path / "c.png", values=[3.0, 3.0, 2.0])


def test_plateau_follows_the_values() -> None:
    made = resolved(schedules.plateau(0.5, patience=0), 10)
    # After windows 2, 5, 8 and 10, the last of which nothing follows.
    assert rates_of(made, 10, 2.0, [3.0, 3.0, 2.0, 2.0]) == [2.0] * 5 + [1.0] * 5


def test_a_folder_takes_one_picture_too(tmp_path: Path, capsys: Any) -> None:
    assert run("cosine", "--steps", "20", "--plot", str(tmp_path)) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["cosine.png"]
    with pytest.raises(ValueError, match=r"--plot must be a folder for all of them, .*cosine.png is a file"):
        run("all", "--steps", "20", "--plot", str(tmp_path / "cosine.png"))


def test_plots_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"rates must be finite, got inf of window 309"):
        plot_schedule({"name": "exponential", "gamma": 10.0}, 400, path)
    with pytest.raises(TypeError, match=r"values must be numbers, got \(1, 2.0\).*loop.history\['val/loss'\]"):
        plot_schedule("plateau", 10, path, values=[(1, 2.0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"values are needed for 'plateau'.*pass e\.g\. the validation losses"):
        plot_schedule("plateau", 10, path)
    with pytest.raises(ValueError, match=r"values are needed for 'plateau'.*leave them out"):
        plot_schedule("cosine", 10, path, values=[1.0])
    with pytest.raises(ValueError, match=r"values must be at least 1 and at most total_steps = 2, got 3 of them"):
        plot_schedule("plateau", 2, path, values=[1.0, 1.0, 1.0])
    with pytest.raises(TypeError, match=r"schedule must be a name.*got int"):
        plot_schedule(3, 10, path)  # type: ignore[arg-type]
    assert not path.exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"the plot of a schedule needs matplotlib.*fastloop\[plots\]"):
        plot_schedule("cosine", 10, tmp_path / "a.png")
