# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.bench tune`: arguments, what is shown and written, exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastloop import tune
from fastloop.bench.commands import tune as command
from fastloop.bench.stats import Interval
from fastloop.loop.config import read
from fastloop.tune.report import Report, Trial

Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        command.add(parser.add_subparsers())
        args = parser.parse_args(["tune", *arguments])
        return args.run(Console(width=200), args)

    return run


def answers(monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[dict[str, Any]]:
    """The loader tuner answers at once; what it was asked."""
    asked: list[dict[str, Any]] = []

    def loader(target: Any, **options: Any) -> Report:
        asked.append({"target": target, **options})
        trials = [Trial({"num_workers": n}, rate=Interval(10.0 * n, 9.0, 40.0)) for n in (1, 2)]
        for each in trials:
            options["on_trial"](each)
        return Report(
            "loader", target.function, "a machine", target.arguments, target.options, target.loader, trials,
            trials[0], trials[1], Interval(2.0, 1.9, 2.1), False, {}, {"num_workers": 2}, ["it was slow"], **more,
        )  # fmt: skip

    monkeypatch.setitem(command.KINDS, "loader", (loader, ""))
    return asked


def test_an_answer_is_shown_and_written(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answers(monkeypatch)
    Path("train.toml").write_text('target = "targets:slow" # mine\n[fit]\nepochs = 2\n')
    arguments = ["--config", "train.toml", "--set", "loop.threads=1", "--budget", "2m", "--apply", "--json", "a/r.json"]
    assert main("loader", *arguments) == 0
    assert asked[0]["budget"] == 120.0
    assert asked[0]["target"].options == {"threads": 1}
    shown = capsys.readouterr()
    assert "it was slow" in shown.out
    assert "num_workers=2" in shown.out
    assert len(shown.err.splitlines()) == 2
    assert read("train.toml").table("loader") == {"num_workers": 2}
    assert "# mine" in Path("train.toml").read_text()
    assert Report.from_json(Path("a/r.json").read_text()).loader == {"num_workers": 2}


def test_keep_yours_is_an_answer(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch)
    original = command.KINDS["loader"][0]

    def kept(target: Any, **options: Any) -> Report:
        report = original(target, **options)
        report.keep, report.loader = True, {}
        return report

    monkeypatch.setitem(command.KINDS, "loader", (kept, ""))
    assert main("loader") == 0
    assert "Keep yours" in capsys.readouterr().out


def test_a_broken_target_has_its_traceback_and_code(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("loader", "--target", "targets:raises", "--timeout", "2m") == 6
    error = capsys.readouterr().err
    assert "in raises" in error
    assert "no such table" in error
    assert "exit code 1" in error


def test_a_hanging_target_ends(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("loader", "--target", "targets:hangs", "--timeout", "4s") == 6
    error = capsys.readouterr().err
    assert "not done after 4 s" in error
    assert "--timeout" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "no colon"], '[config] target must be "package.module:function", got'),
        (["--config", "not_there.toml"], "[not_there.toml] cannot be read: No such file or directory"),
        (["--config", "latin.toml"], "[latin.toml] is not UTF-8"),
        (["--set", "loop.presicion=bf16"], "unknown key 'loop.presicion'; did you mean 'precision'?"),
        (["--set", "loader.workers=2"], "got workers"),
        (["--apply"], "into that of --config, which is not given"),
        (["--apply", "other.toml"], "other.toml is the config of other:thing"),
        (["--target", "targets:slow", "--apply", "mine.toml"], "mine.toml has loop.precision"),
    ],
)
def test_wrong_use_is_told_before_anything_is_measured(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    asked = answers(monkeypatch)
    Path("latin.toml").write_bytes('target = "übung:los"'.encode("latin-1"))
    Path("other.toml").write_text('target = "other:thing"\n')
    Path("mine.toml").write_text('target = "targets:slow"\n[loop]\nprecision = "bf16"\n')
    assert main("loader", *arguments) == 2
    assert not asked
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nothing"], [], ["loader", "--budget", "soon"], ["loader", "--low", "1"]])
def test_wrong_arguments(main: Main, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 2


def test_times() -> None:
    assert [command.seconds(text) for text in ("90", "90s", "1.5m", "1h")] == [90.0, 90.0, 90.0, 3600.0]
    for text in ("", "s", "0", "-1s", "1d", "1..2"):
        with pytest.raises(argparse.ArgumentTypeError):
            command.seconds(text)


def test_every_kind_is_there() -> None:
    assert {name: function for name, (function, _) in command.KINDS.items()} == {
        "loader": tune.loader, "batch": tune.batch, "flags": tune.flags, "memory": tune.memory, "lr": tune.lr,
        "all": tune.everything,
    }  # fmt: skip
