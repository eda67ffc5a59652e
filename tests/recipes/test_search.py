# SPDX-License-Identifier: Apache-2.0
"""Searches: what they train, what they make of failures, and how they go on. Most trials here are functions."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from fastloop.extras import MissingExtra
from fastloop.loop import Loop
from fastloop.loop.config import build, read
from fastloop.recipes.search import Choice, Float, Int, SearchReport, command, search, searching
from fastloop.recipes.search.importance import by_ranks, importances
from fastloop.recipes.search.study import FILE, Study, held
from fastloop.recipes.search.trial import VALUE
from fastloop.tune import trial as trials_of
from fastloop.tune.trial import Outcome

LINE = "search_targets:line"
LR = {"arguments.lr": Float(1e-4, 1.0, log=True)}
Value = Callable[[dict[str, Any]], Any]


def bowl(arguments: dict[str, Any]) -> float:
    """Least at lr = 0.01."""
    return (math.log10(arguments["lr"]) + 2) ** 2


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[Value], list[dict[str, Any]]]:
    """Puts a function of the arguments in the place of processes; gives back the tables of each trial."""

    def install(value: Value) -> list[dict[str, Any]]:
        tables: list[dict[str, Any]] = []

        def run(function: str, given: dict[str, Any], *, on_note: Any, **others: Any) -> Outcome:
            del function, others
            tables.append(given["tables"])
            found = value(given["tables"]["arguments"])
            if isinstance(found, Outcome):
                return found
            values = found if isinstance(found, list) else [found]
            for each in values:
                on_note({VALUE: each}, None)
            return Outcome("ok", {"values": values, "steps": 8})

        monkeypatch.setattr(trials_of, "run", run)
        return tables

    return install


def run(folder: Path, space: Any = LR, **options: Any) -> SearchReport:
    return search(LINE, space, **{"folder": folder, "trials": 6, "fit": {"epochs": 2}, **options})


def rates(report: SearchReport) -> list[float]:
    return [trial.settings["arguments.lr"] for trial in report.trials]


# ---- what is trained


def test_the_best_trial_is_that_of_the_best_value(tmp_path: Path, trained: Any) -> None:
    tables = trained(bowl)
    report = run(tmp_path, trials=12)
    values = [bowl(each["arguments"]) for each in tables]
    assert [trial.value for trial in report.trials] == values
    assert report.best is not None
    assert report.best.value == min(values)
    assert tables[0]["loop"]["seed"] == 0
    assert tables[0]["loop"]["monitor"] == "val/loss"
    assert tables[0]["fit"] == {"epochs": 2}


def test_the_best_evaluation_counts_and_the_last_row_of_other_metrics(tmp_path: Path, trained: Any) -> None:
    trained(lambda arguments: [3.0, 1.0, 2.0])
    values = {
        (metric, mode): run(tmp_path / f"{metric[:3]}{mode}", metric=metric, mode=mode, trials=1).trials[0].value
        for metric, mode in [("val/loss", "min"), ("val/accuracy", "max"), ("train/loss", "min")]
    }
    assert list(values.values()) == [1.0, 3.0, 2.0]


def test_the_same_seed_draws_the_same(tmp_path: Path, trained: Any) -> None:
    trained(bowl)
    a, b, c = (run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert rates(a) == rates(b)
    assert len({*rates(a), *rates(c)}) == 12


def test_every_combination_of_a_grid_is_trained_once(tmp_path: Path, trained: Any) -> None:
    trained(lambda arguments: float(arguments["a"]))
    space = {"loop.accumulation_steps": Int(1, 3), "loop.precision": Choice(["fp32", "bf16"])}
    trained(lambda arguments: 1.0)
    report = run(tmp_path, space, method="grid", trials=100)
    found = [tuple(trial.settings.values()) for trial in report.trials]
    assert sorted(found) == [(n, p) for n in (1, 2, 3) for p in ("bf16", "fp32")]


def test_a_grid_goes_on(tmp_path: Path, trained: Any) -> None:
    tables = trained(lambda arguments: 1.0)
    space = {"loop.accumulation_steps": Int(1, 5)}
    run(tmp_path, space, method="grid", trials=2)
    run(tmp_path, space, method="grid", trials=9)
    assert sorted(each["loop"]["accumulation_steps"] for each in tables) == [1, 2, 3, 4, 5]


def test_the_bayesian_search_comes_nearer_than_the_random_one(tmp_path: Path, trained: Any) -> None:
    trained(bowl)
    late = {m: run(tmp_path / m, method=m, trials=30, pruning=False).trials[15:] for m in ("random", "bayesian")}
    middle = {method: sorted(trial.value for trial in trials)[7] for method, trials in late.items()}  # type: ignore[type-var]
    assert middle["bayesian"] < 0.5 * middle["random"]


# ---- failures


@pytest.mark.parametrize(
    ("found", "status", "reason"),
    [
        (Outcome("failed", reason="crashed (SIGABRT)"), "failed", "crashed (SIGABRT)"),
        (Outcome("out of memory", reason="took 9 GiB"), "out of memory", "took 9 GiB"),
        (Outcome("timeout", reason="not done after 3 s"), "timeout", "not done after 3 s"),
        ([1.0, math.nan, 1.0], "failed", "val/loss is nan at evaluation 2"),
        ([math.inf], "failed", "val/loss is inf at evaluation 1"),
    ],
)
def test_a_trial_that_fails_is_a_row_of_the_table(
    tmp_path: Path, trained: Any, found: Any, status: str, reason: str
) -> None:
    trained(lambda arguments: found)
    report = run(tmp_path, trials=2)
    assert [(trial.status, trial.reason, trial.value) for trial in report.trials] == [(status, reason, None)] * 2
    assert report.best is None
    assert reason in report.table()
    with pytest.raises(ValueError, match="no trial has come to its end"):
        report.toml()
    with pytest.raises(ValueError, match="nothing to draw"):
        report.plot(tmp_path / "plot.png")


def test_what_a_failed_trial_said_is_kept(tmp_path: Path, trained: Any) -> None:
    trained(lambda arguments: Outcome("failed", reason="KeyError: 'x'", traceback="line 3", output="hello"))
    run(tmp_path, trials=1)
    assert (tmp_path / "trials" / "0000" / "failure.txt").read_text() == "KeyError: 'x'\n\nline 3\n\nhello\n"


def test_a_trial_worse_than_the_median_is_pruned(tmp_path: Path, trained: Any) -> None:
    count = iter(range(100))
    ends: list[int] = []

    def value(arguments: dict[str, Any]) -> list[float]:
        worse = 10.0 if next(count) == 6 else 1.0
        return [worse, worse, worse, worse]

    trained(value)
    report = run(tmp_path, trials=8, on_trial=lambda trial: ends.append(len(trial.values)))
    assert [trial.status for trial in report.trials] == ["ok"] * 6 + ["pruned", "ok"]
    assert ends == [4, 4, 4, 4, 4, 4, 2, 4]  # at its second evaluation
    assert "worse than the median" in report.trials[6].reason
    count = iter(range(100))
    assert {trial.status for trial in run(tmp_path / "all", trials=8, pruning=False).trials} == {"ok"}


# ---- going on


def test_the_same_call_goes_on_to_the_number_of_trials(tmp_path: Path, trained: Any) -> None:
    tables = trained(bowl)
    run(tmp_path, trials=2)
    report = run(tmp_path, trials=5)
    assert len(tables) == len(report.trials) == 5
    assert rates(report) == rates(run(tmp_path / "at once", trials=5))
    assert len(run(tmp_path, trials=5).trials) == 5
    assert len(tables) == 10


@pytest.mark.parametrize("method", ["random", "bayesian", "grid"])
def test_ctrl_c_saves_and_the_trial_is_repeated(tmp_path: Path, trained: Any, method: str) -> None:
    space = {"arguments.lr": Choice([0.1, 0.2, 0.3, 0.4])} if method == "grid" else LR
    trained(bowl)
    whole = run(tmp_path / "whole", space, method=method, trials=4)
    left = iter([False, False, True])

    def interrupted(arguments: dict[str, Any]) -> float:
        if next(left, False):
            raise KeyboardInterrupt
        return bowl(arguments)

    trained(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", space, method=method, trials=4)
    report = run(tmp_path / "parts", space, method=method, trials=4)
    assert [trial.status for trial in report.trials] == ["ok", "ok", "interrupted", "ok", "ok"]
    assert rates(report)[2] == rates(report)[3]
    assert [rate for i, rate in enumerate(rates(report)) if i != 2] == rates(whole)


def test_a_trial_that_ran_when_the_search_was_killed_is_repeated(tmp_path: Path, trained: Any) -> None:
    trained(bowl)
    report = run(tmp_path, trials=2)
    question = {
        "target": LINE, "arguments": {}, "options": {}, "settings": {}, "fit": {"epochs": 2}, "metric": "val/loss",
        "seed": 0,
    }  # fmt: skip
    with held(tmp_path):
        asked = Study(tmp_path, LR, "random", "min", question, 0).next()
    assert asked is not None
    with open(tmp_path / FILE, "ab") as journal:
        journal.write(b'{"op_code": 6, "worker')  # a line that it had not finished
    (tmp_path / f"{FILE}.lock").symlink_to(tmp_path / FILE)  # nor had it given back Optuna's lock
    report = run(tmp_path, trials=4)
    assert [trial.status for trial in report.trials] == ["ok", "ok", "interrupted", "ok", "ok"]
    assert report.trials[3].settings == asked[1] == report.trials[2].settings


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"space": {"arguments.lr": Float(1e-4, 0.5, log=True)}}, "another space: space was"),
        ({"fit": {"epochs": 3}}, r'fit was {"epochs": 2}, and is {"epochs": 3}'),
        ({"metric": "val/accuracy"}, "another metric"),
        ({"mode": "max"}, "another mode"),
        ({"seed": 1}, "another seed"),
        ({"arguments": {"optimizer": "adam"}}, "another arguments"),
    ],
)
def test_a_folder_of_another_question_is_refused(
    tmp_path: Path, trained: Any, options: dict[str, Any], problem: str
) -> None:
    tables = trained(bowl)
    run(tmp_path, trials=1)
    with pytest.raises(ValueError, match=problem):
        run(tmp_path, **options)
    assert len(tables) == 1


def test_the_method_may_change(tmp_path: Path, trained: Any) -> None:
    trained(bowl)
    run(tmp_path, trials=3, method="random")
    assert len(run(tmp_path, trials=6, method="bayesian").trials) == 6


def test_two_searches_in_one_folder_are_refused(tmp_path: Path, trained: Any) -> None:
    trained(bowl)
    with held(tmp_path), pytest.raises(RuntimeError, match="another search is running"):
        run(tmp_path)


def test_no_trial_begins_after_the_budget(tmp_path: Path, trained: Any) -> None:
    tables = trained(bowl)
    report = run(tmp_path, budget=1e-9)
    assert tables == report.trials == []
    assert "trial" in report.table()


def test_a_search_in_which_all_failed_begins_anew(tmp_path: Path, trained: Any) -> None:
    broken = trained(lambda arguments: Outcome("failed", reason="KeyError: 'x'"))
    assert len(run(tmp_path, trials=8).trials) == len(broken) == 5  # the sixth would fail too
    trained(bowl)
    report = run(tmp_path, trials=8)
    assert [trial.status for trial in report.trials] == ["failed"] * 5 + ["ok"] * 8
    assert rates(report)[5:] == rates(run(tmp_path / "whole", trials=8))
    tables = trained(bowl)
    assert len(run(tmp_path, trials=8).trials) == 13
    assert tables == []


def test_failures_for_several_reasons_do_not_end_a_search(tmp_path: Path, trained: Any) -> None:
    count = iter(range(100))
    trained(lambda arguments: Outcome("failed", reason=f"layer {next(count) % 2}"))
    assert len(run(tmp_path, trials=8).trials) == 8


# ---- wrong use


@pytest.mark.parametrize(
    ("space", "options", "problem"),
    [
        ({"arguments.lrr": Float(0.1, 1.0)}, {}, "takes no 'lrr'; did you mean 'lr'"),
        ({"loop.precison": Choice(["fp32"])}, {}, "'loop.precison'; did you mean 'precision'"),
        ({"loop.accumulation_steps": Float(1.0, 4.0)}, {}, "must be an integer"),
        ({"loop.run_dir": Choice(["a", "b"])}, {}, "the search's own"),
        ({"loader.batchsize": Int(1, 4)}, {}, "did you mean 'batch_size'"),
        ({"loader.batch_size": Choice([0, 8])}, {}, "batch_size"),
        ({"fit.epoch": Int(1, 4)}, {}, "did you mean 'epochs'"),
        ({"lr": Float(0.1, 1.0)}, {}, "arguments.NAME"),
        ({"arguments.lr": (0.1, 1.0)}, {}, "a Float, an Int or a Choice"),
        ({}, {}, "the space is empty"),
        (LR, {"fit": None}, "how long is a trial"),
        (LR, {"fit": {"epoch": 1}}, "did you mean 'epochs'"),
        (LR, {"arguments": {"lr": 0.1}}, "is in the space, and fixed to 0.1"),
        (LR, {"arguments": {"depth": 1}}, "takes no 'depth'"),
        (LR, {"options": {"run_dir": "x"}}, "the search's own"),
        (LR, {"options": {"precison": "x"}}, "precision"),
        (LR, {"settings": {"workers": 1}}, "settings of a loader"),
        (LR, {"method": "hill"}, "one of grid, random, bayesian"),
        (LR, {"method": "grid"}, "that can be counted"),
        (LR, {"mode": "best"}, '"min" or "max"'),
        (LR, {"trials": 0}, "trials must be"),
        (LR, {"seed": -1}, "seed must be"),
        (LR, {"timeout": 0.0}, "timeout must be"),
        (LR, {"timeout": math.inf}, "a finite number"),
        (LR, {"budget": -1.0}, "budget must be"),
        (LR, {"fit": 3}, "fit must be a dict"),
        ([("arguments.lr", 1)], {}, "space must be a dict"),
        ({"arguments.lr": Int(1, 10**9)}, {"method": "grid"}, "1,000,000,000 combinations"),
        (LR, {"metric": ""}, "metric must name"),
    ],
)
def test_wrong_use_is_an_error_before_any_trial(
    tmp_path: Path, trained: Any, space: Any, options: dict[str, Any], problem: str
) -> None:
    tables = trained(bowl)
    with pytest.raises((ValueError, TypeError), match=problem):
        run(tmp_path / "new", space, **options)
    assert tables == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("no_such_module:f", "cannot be imported"),
        ("search_targets:lin", "cannot be imported"),
        ("search", "module:func"),
    ],
)
def test_a_target_that_is_not_there_is_refused(tmp_path: Path, target: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        search(target, LR, folder=tmp_path, fit={"epochs": 1})


def test_the_default_space_is_what_the_target_takes(tmp_path: Path, trained: Any) -> None:
    trained(lambda arguments: 1.0)
    assert list(run(tmp_path, None, trials=1).space) == ["arguments.lr", "loader.batch_size"]
    with pytest.raises(ValueError, match="must take some of lr, batch_size"):
        search("search_targets:notes_without_end", None, folder=tmp_path / "other", fit={"epochs": 1})


def test_without_optuna_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"fastloop\[search\]"):
        run(tmp_path)


# ---- the report


def report_of(folder: Path, trained: Any, trials: int = 12) -> SearchReport:
    trained(lambda arguments: bowl(arguments) + 0.01 * (arguments["optimizer"] == "adam"))
    space = {**LR, "arguments.optimizer": Choice(["sgd", "adam"]), "loop.max_grad_norm": Choice([None, 1.0])}
    return run(folder, space, trials=trials)


def test_the_report_as_text_json_and_toml(tmp_path: Path, trained: Any) -> None:
    report = report_of(tmp_path / "study", trained)
    best = report.best
    assert best is not None
    assert str(report).splitlines()[0].split() == [
        "trial", "status", "val/loss", "lr", "optimizer", "max_grad_norm", "seconds", "reason",
    ]  # fmt: skip
    assert str(report).splitlines()[1].split()[0] == str(best.number)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["best"]["settings"] == best.settings
    assert len(found["trials"]) == 12
    file = tmp_path / "best.toml"
    file.write_text(report.toml())
    training = build(Loop, read(file))
    assert training.loop.optimizer.param_groups[0]["lr"] == best.settings["arguments.lr"]
    assert training.options == {"epochs": 2}
    report.record(tmp_path)
    assert (tmp_path / "practices.jsonl").exists()


def test_the_setting_that_decides_is_the_most_important(tmp_path: Path, trained: Any) -> None:
    report = report_of(tmp_path, trained)
    assert max(report.importances, key=lambda key: report.importances[key]) == "arguments.lr"
    assert sum(report.importances.values()) == pytest.approx(1.0)
    assert report.importance_method in report.table()


def test_importance_by_ranks_is_the_correlation_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = pytest.importorskip("scipy.stats")
    column, values = [0.1, 0.5, 0.3, 0.3, 0.9, 0.7], [1.0, 5.0, 2.0, 2.5, 3.0, 9.0]
    kinds = ["a", "b", "a", "b", "a", "b"]
    space = {"arguments.x": Float(0.0, 1.0), "arguments.k": Choice(["a", "b"])}
    rows = [({"arguments.x": x, "arguments.k": k}, v) for x, k, v in zip(column, kinds, values, strict=True)]
    found = by_ranks(rows, space)
    number = abs(stats.spearmanr(column, values).statistic)
    kind = abs(stats.spearmanr([k == "b" for k in kinds], values).statistic)  # of two groups they are the same
    assert found["arguments.x"] == pytest.approx(number / (number + kind))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no scikit-learn
    assert importances(rows, space, 0) == (found, "rank correlation")
    assert importances(rows[:3], space, 0) == ({}, "")


def test_nothing_is_important_where_the_settings_are_the_same() -> None:
    rows = [({"arguments.x": 0.5, "arguments.k": "a"}, float(value)) for value in range(6)]
    assert importances(rows, {"arguments.x": Float(0.0, 1.0), "arguments.k": Choice(["a", "b"])}, 0) == ({}, "")


def test_a_plot_is_drawn(tmp_path: Path, trained: Any) -> None:
    pytest.importorskip("matplotlib")
    path = report_of(tmp_path / "study", trained).plot(tmp_path / "plot.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="ending"):
        report_of(tmp_path / "study", trained).plot(tmp_path / "plot.docx")


# ---- the command


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers(required=True))
    options = parser.parse_args(["search", *arguments])
    return options.run(options)


def test_the_command_searches_and_writes(tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trained(bowl)
    space = tmp_path / "space.toml"
    space.write_text("[arguments]\nlr = {low = 1e-4, high = 1.0, log = true}\n")
    files = [str(tmp_path / name) for name in ("best.toml", "report.json")]
    code = call(
        "--target", LINE, "--space", str(space), "--folder", str(tmp_path / "study"), "--trials", "3", "--set",
        "fit.epochs=2", "--toml", files[0], "--json", files[1],
    )  # fmt: skip
    assert code == 0
    said = capsys.readouterr()
    assert "val/loss" in said.out
    assert said.err.count("trial ") == 3
    assert read(files[0]).values["target"] == LINE
    assert len(json.loads(Path(files[1]).read_text())["trials"]) == 3


def test_the_command_takes_a_config(tmp_path: Path, trained: Any) -> None:
    tables = trained(bowl)
    config = tmp_path / "train.toml"
    config.write_text(f'target = "{LINE}"\n[arguments]\noptimizer = "adam"\n[loop]\nrun_dir = "x"\n[fit]\nepochs = 3\n')
    assert call("--config", str(config), "--folder", str(tmp_path / "s"), "--trials", "1") == 0
    assert tables[0]["arguments"]["optimizer"] == "adam"
    assert tables[0]["fit"] == {"epochs": 3}
    assert "run_dir" not in tables[0]["loop"]  # each trial has its own


def test_exit_codes_of_the_command(tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--target", LINE, "--set", "fit.epochs=1", "--trials", "1", "--folder"]
    trained(lambda arguments: math.nan)
    assert call(*given, str(tmp_path / "a")) == 1
    assert f"what they said is in {tmp_path / 'a' / 'trials'}" in capsys.readouterr().err

    def interrupted(arguments: dict[str, Any]) -> float:
        raise KeyboardInterrupt

    trained(interrupted)
    assert call(*given, str(tmp_path / "b")) == 130
    with pytest.raises(ValueError, match="--target MODULE:FUNCTION, or --config"):
        call("--folder", str(tmp_path / "c"))
    with held(tmp_path / "d"), pytest.raises(ValueError, match="another search is running"):
        call(*given, str(tmp_path / "d"))


# ---- processes


def test_a_trial_in_a_process_trains_what_its_config_trains(tmp_path: Path) -> None:
    report = run(tmp_path, trials=1, options={"threads": 1})
    trial = report.trials[0]
    assert (trial.status, trial.reason) == ("ok", "")
    history = build(Loop, read(report.tables())).fit()
    assert trial.values == tuple(value for _, value in history["val/loss"])
    assert (tmp_path / "trials" / "0000" / "metrics.jsonl").exists()
    assert (tmp_path / "trials" / "0000" / "checkpoints").exists()


@pytest.mark.slow
def test_trials_in_processes_fail_with_a_reason(tmp_path: Path) -> None:
    space = {"arguments.fail": Choice(["", "raise", "crash"])}
    report = run(tmp_path, space, method="grid", options={"threads": 1})
    trials = {trial.settings["arguments.fail"]: trial for trial in report.trials}
    assert {name: trial.status for name, trial in trials.items()} == {"": "ok", "raise": "failed", "crash": "failed"}
    assert trials["raise"].reason == "RuntimeError: the data are gone"
    assert "SIGABRT" in trials["crash"].reason


def test_a_trial_that_is_not_done_in_time_is_ended(tmp_path: Path) -> None:
    trial = run(tmp_path, trials=1, timeout=0.2).trials[0]
    assert (trial.status, trial.reason) == ("timeout", "not done after 0.2 s")


@pytest.mark.slow
def test_notes_do_not_put_off_the_end_of_a_trial() -> None:
    notes: list[Any] = []
    for timeout in (8.0, 30.0, 100.0):  # a busy machine may take the first ones to import torch
        outcome = trials_of.run(
            "search_targets:notes_without_end", {}, timeout=timeout, memory_limit=None, renew=False,
            folders=[str(Path(__file__).parent)], on_note=lambda values, peak: notes.append(values),
        )  # fmt: skip
        assert outcome.status == "timeout"
        if notes:
            break
    assert notes


def test_a_trial_without_validation_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'val/loss' needs a val_loader"):
        searching_trial({"arguments": {"validate": False}}, tmp_path, "val/loss")
    with pytest.raises(ValueError, match=r"'train/f1' is none of .*train/loss"):
        searching_trial({}, tmp_path, "train/f1")
    assert searching_trial({}, tmp_path, "train/loss")["steps"] == 4


def searching_trial(tables: dict[str, Any], folder: Path, metric: str) -> dict[str, Any]:
    from fastloop.recipes.search.trial import train

    given = {"target": LINE, "fit": {"epochs": 1}, "loop": {**searching.OF_A_TRIAL, "log_every": 1}, **tables}
    return train(given, str(folder), metric)
