# SPDX-License-Identifier: Apache-2.0
"""Rows of metrics in files: what is read back, what a resumed run leaves, what a kill and a full disk leave."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.extras import MissingExtra
from fastloop.loop import logs, trackers
from fastloop.loop.logs import Csv, JsonLines, Loggers, make_loggers, read_rows
from fastloop.loop.rank_log import LOGGER, RankLog

ROWS: list[dict[str, Any]] = [
    {"step": 1, "train/loss": 2.5, "lr": 0.1},
    {"step": 2, "train/loss": 1.0 / 3.0, "lr": 0.1},
    {"step": 2, "val/loss": 2.25, "val/acc": None},
    {"step": 3, "train/loss": math.nan, "lr": -math.inf},
    {"step": 4, "train/loss": 1e-300, "lr": 5, "note": 'a "quoted", text\nof two lines'},
    {"step": 4, "val/loss": 2.0, "val/acc": 0.5},
]


def write(run_dir: Path, rows: list[dict[str, Any]], resume_step: int | None = None) -> None:
    loggers = make_loggers(("jsonl", "csv"))
    loggers.open(run_dir, resume_step)
    for row in rows:
        loggers.log(row)
    loggers.sync()
    loggers.close()


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run_dir.iterdir())}


def same(left: object, right: object) -> bool:
    return left == right or (isinstance(left, float) and isinstance(right, float) and math.isnan(left + right))


# ---- what is read back --------------------------------------------------------------------------------


def test_jsonl_is_strict_json_and_reads_back(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    write(tmp_path, ROWS)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(ROWS)
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert parsed[3] == {
        "step": 3,
        "train/loss": None,
        "lr": None,
        "not_finite": {"train/loss": "nan", "lr": "-inf"},
    }
    for row, again in zip(ROWS, read_rows(tmp_path / "metrics.jsonl"), strict=True):
        assert row.keys() == again.keys()
        assert all(same(row[name], again[name]) for name in row), (row, again)


def test_csv_reads_back(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["step", "train/loss", "lr", "val/loss", "note", "val/acc"]
    for row, again in zip(ROWS, rows, strict=True):
        for name in reader.fieldnames:
            value = row.get(name)
            if isinstance(value, str) or value is None:
                assert again[name] == (value or "")
            else:
                assert same(float(again[name]), float(value))


def test_numpy_scalars_are_numbers_and_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [{"step": np.int64(1), "a": np.float32(0.5), "b": np.float32("nan"), "c": True}])
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["a"], row["c"]) == (1, 0.5, True)
    assert math.isnan(row["b"])
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b,c\n1,0.5,nan,True\n"
    for logger in (JsonLines(), Csv()):
        logger.open(tmp_path, None)
        with pytest.raises(TypeError, match=r"\[logs\] a row holds numbers, texts and None, got tensor"):
            logger.log({"step": 1, "loss": torch.ones(())})  # type: ignore[dict-item]
        logger.close()


def test_step_is_the_first_column_wherever_it_stands_in_the_row(tmp_path: Path) -> None:
    write(tmp_path, [{"loss": 1.0, "step": 1}])
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,1.0\n"


def test_a_row_is_in_the_file_when_log_returns(tmp_path: Path) -> None:
    loggers = make_loggers(("jsonl", "csv"))
    loggers.open(tmp_path, None)
    loggers.log({"step": 1, "loss": 1.5})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.5}]
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,1.5\n"
    loggers.close()


# ---- resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume_step", range(5))
@pytest.mark.parametrize("killed_after", range(len(ROWS) + 1))
@pytest.mark.parametrize("half", [b"", b'{"step": 9, "tra', b"9,0.12"])
def test_a_resumed_run_leaves_the_files_of_one_never_killed(
    tmp_path: Path, resume_step: int, killed_after: int, half: bytes
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write(whole, ROWS)
    kept = [row for row in ROWS if row["step"] <= resume_step]
    done = ROWS[: max(killed_after, len(kept))]  # a checkpoint has its rows before it
    write(resumed, done)
    for path in resumed.iterdir():
        with path.open("ab") as file:
            file.write(half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a half-written line is nothing to warn about
        write(resumed, ROWS[len(kept) :], resume_step)
    assert contents(resumed) == contents(whole)


def test_a_column_goes_with_the_rows_that_brought_it(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    write(tmp_path, [{"step": 2, "new": 1.0}], resume_step=1)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss,lr,new\n1,2.5,0.1,\n2,,,1.0\n"


VALUES = st.one_of(st.none(), st.integers(-5, 5), st.floats(), st.sampled_from(["", "a,b", '"', "x\ny"]))


@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abcdef"), VALUES, max_size=4), max_size=12),
    resume_step=st.integers(0, 12),
    killed_after=st.integers(0, 12),
)
def test_resume_of_any_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], resume_step: int, killed_after: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    steps = [{"step": step, **row} for step, row in enumerate(rows, 1)]
    write(folder / "whole", steps)
    write(folder / "resumed", steps[: max(killed_after, resume_step)])
    write(folder / "resumed", steps[resume_step:], resume_step)
    assert contents(folder / "resumed") == contents(folder / "whole")


def test_resume_where_no_row_was_kept_or_no_file_is(tmp_path: Path) -> None:
    write(tmp_path / "whole", ROWS)
    write(tmp_path / "none", ROWS, resume_step=0)
    assert contents(tmp_path / "none") == contents(tmp_path / "whole")


def test_a_new_run_sets_the_rows_of_the_last_one_aside(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    before = contents(tmp_path)
    write(tmp_path, ROWS[:1])
    after = contents(tmp_path)
    assert after["metrics.jsonl.old"] == before["metrics.jsonl"]
    assert after["metrics.csv.old"] == before["metrics.csv"]
    assert after["metrics.csv"] == b"step,train/loss,lr\n1,2.5,0.1\n"


def test_a_damaged_line_is_named_and_left_out(tmp_path: Path) -> None:
    write(tmp_path, ROWS[:3])
    for name, damaged in {"metrics.jsonl": b'{"step": 1\n', "metrics.csv": b"x,,\n"}.items():
        path = tmp_path / name
        path.write_bytes(damaged.join([path.read_bytes(), b""]))
        with pytest.warns(RuntimeWarning, match=rf"line 4|line 5 of .*{name}"):
            write(tmp_path, [], resume_step=9)
    write(tmp_path / "whole", ROWS[:3])
    assert {name: contents(tmp_path / "whole")[name] for name in ("metrics.jsonl", "metrics.csv")} == {
        path.name: path.read_bytes() for path in tmp_path.glob("metrics.*")
    }


WRITER = """
import sys
from fastloop.loop.logs import make_loggers
loggers = make_loggers(("jsonl", "csv"))
loggers.open(sys.argv[1], None)
step = 0
while True:
    step += 1
    row = {"step": step, "loss": 1 / step}
    if step % 50 == 0:
        row[f"metric {step}"] = 1.0  # a new column: the file is made anew
    loggers.log(row)
    if step == 60:
        print("running", flush=True)
"""


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    for attempt, later in enumerate((0.0, 0.02)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        time.sleep(later)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps = [row["step"] for row in read_rows(folder / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= 60
        with (folder / "metrics.csv").open(newline="") as file:
            in_csv = [int(row["step"]) for row in csv.DictReader(file)]
        assert in_csv == list(range(1, len(in_csv) + 1))
        assert 0 <= len(steps) - len(in_csv) <= 1  # it was killed between the two


FULL = """
import resource, signal, sys, warnings
from fastloop.loop.logs import make_loggers
loggers = make_loggers(("jsonl", "csv"))
loggers.open(sys.argv[1], None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(100):
        if step == 3:  # neither file may grow beyond 250 bytes: the row at the limit is written in part
            resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))
        if step == 90:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        loggers.log({"step": step, "loss": 0.123456789})
loggers.close()
print(*sorted(str(each.message) for each in caught), sep="\\n")
"""


def test_a_full_disk_loses_whole_rows_and_warns_once(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    warned = result.stdout.splitlines()
    assert len(warned) == 2, result.stdout
    assert warned[0].startswith("[logs] 'csv' could not write the row of step ")
    assert warned[1].startswith("[logs] 'jsonl' could not write the row of step ")
    steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    lost = set(range(100)) - set(steps)
    assert lost == set(range(min(lost), 90))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["loss"] for row in rows} == {"0.123456789"}
    assert [int(row["step"]) for row in rows][-10:] == list(range(90, 100))


# ---- several loggers ---------------------------------------------------------------------------------


class Recorder:
    """A logger of a user: the three methods of the protocol and no more."""

    def __init__(self, fails: type[Exception] | None = None) -> None:
        self.calls: list[Any] = []
        self.fails = fails

    def open(self, run_dir: Path | None, resume_step: int | None) -> None:
        self.calls.append(("open", run_dir, resume_step))

    def log(self, row: Mapping[str, Any]) -> None:
        if self.fails is not None:
            raise self.fails("no")
        self.calls.append(dict(row))

    def close(self) -> None:
        self.calls.append("close")
        if self.fails is not None:
            raise self.fails("not closed")


def test_an_own_logger(tmp_path: Path) -> None:
    recorder = Recorder()
    loggers = make_loggers(["jsonl", recorder])
    loggers.open(tmp_path, 7)
    loggers.log({"step": 8})
    loggers.sync()
    loggers.close()
    loggers.close()
    assert recorder.calls == [("open", tmp_path, 7), {"step": 8}, "close"]


def test_without_a_folder_only_files_are_left_out() -> None:
    recorder = Recorder()
    loggers = make_loggers(["jsonl", "csv", recorder])
    loggers.open(None, None)
    loggers.log({"step": 1})
    loggers.close()
    assert recorder.calls == [("open", None, None), {"step": 1}, "close"]
    with pytest.raises(ValueError, match=r"\[csv\] metrics.csv needs a folder"):
        Csv().open(None, None)


def test_ranks_above_0_log_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    loggers = make_loggers(["jsonl", recorder], rank=1)
    loggers.open(tmp_path / "run", None)
    loggers.log({"step": 1})
    loggers.close()
    assert recorder.calls == []
    assert not (tmp_path / "run").exists()


def test_errors_of_a_logger() -> None:
    """The disk's are warned about once, all others raised; the others are closed all the same."""
    failing, recorder = Recorder(OSError), Recorder()
    loggers = Loggers([failing, recorder])
    loggers.open(None, None)
    with pytest.warns(RuntimeWarning, match=r"'Recorder' could not write the row of step 1: no; the training goes on"):
        loggers.log({"step": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.log({"step": 2})
    with pytest.raises(OSError, match="not closed"):
        loggers.close()
    assert recorder.calls[1:] == [{"step": 1}, {"step": 2}, "close"]
    wrong = Loggers([Recorder(KeyError)])
    wrong.open(None, None)
    with pytest.raises(KeyError):
        wrong.log({"step": 1})


def test_wrong_loggers() -> None:
    with pytest.raises(ValueError, match=r"one of 'jsonl', 'csv', 'tensorboard', 'wandb', 'mlflow', got 'json'"):
        make_loggers(["json"])
    with pytest.raises(ValueError, match=r"got 'csv' twice"):
        make_loggers(["csv", "jsonl", "csv"])
    for wrong in (3, Recorder):
        with pytest.raises(TypeError, match=r"\[logs\] a logger must have open, log and close"):
            make_loggers([wrong])  # type: ignore[list-item]
    assert len(make_loggers("csv").loggers) == 1
    with pytest.raises(ValueError, match=r"\[jsonl\] the log must be open"):
        JsonLines().log({"step": 1})


# ---- TensorBoard, W&B --------------------------------------------------------------------------------


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, rows in ((None, ROWS), (2, [{"step": 3, "train/loss": 7.0}])):
        logger = trackers.TensorBoard()
        logger.open(tmp_path, resume_step)
        for row in rows:
            logger.log(row)
        logger.sync()
        logger.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("val/loss")] == [(2, 2.25)]
    losses = [(each.step, each.value) for each in read.Scalars("train/loss")]
    assert losses == [(1, 2.5), (2, np.float32(1 / 3)), (3, 7.0)]  # step 4 was purged, step 3 is the resumed run's


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.calls.append(row)

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """Stands in for the service: what `init` was given, and its run."""
    module = types.SimpleNamespace(Error=RuntimeError, given=[], run=FakeRun())

    def init(**settings: Any) -> FakeRun:
        module.given.append(settings)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_keeps_its_id_over_a_resume(tmp_path: Path, wandb: types.SimpleNamespace) -> None:
    for resume_step in (None, 3, None):
        logger = trackers.Wandb({"project": "speech"})
        logger.open(tmp_path, resume_step)
        logger.log({"step": 1, "loss": 2.0, "none": None})
        logger.close()
    first, resumed, anew = wandb.given
    assert first == {"resume": "allow", "dir": str(tmp_path), "id": first["id"], "project": "speech"}
    assert resumed["id"] == first["id"] != anew["id"]
    assert wandb.run.calls[:4] == [("step", None), ("*", "step"), {"step": 1, "loss": 2.0}, "finish"]


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "tracking")]
)
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'fastloop\[{extra}\]'"):
        make_loggers([name]).open(tmp_path, None)


# ---- messages ----------------------------------------------------------------------------------------


CONSOLE = """
import logging, sys
from fastloop.loop.rank_log import LOGGER, RankLog
shown = []
for rank, write in ((0, None), (1, None), (0, shown.append)):
    messages = RankLog(sys.argv[1], rank, write)
    logging.getLogger("fastloop.loop").info("of rank %d", rank)
    logging.getLogger("fastloop.loop").debug("not shown")
    messages.close()
    LOGGER.info("after it")
assert shown == ["INFO of rank 0"], shown
assert not LOGGER.handlers and LOGGER.level == logging.NOTSET
"""


def test_each_rank_has_its_file_and_rank_0_the_console(tmp_path: Path) -> None:
    """In a program of its own: pytest listens at the root, and would be taken for the program's own logging."""
    command = [sys.executable, "-c", CONSOLE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "INFO of rank 0\n")
    for rank, times in ((0, 2), (1, 1)):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert len(lines) == times
        assert all(line.endswith(f"INFO fastloop.loop: of rank {rank}") for line in lines)


def test_a_program_with_logging_of_its_own_shows_it_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    messages = RankLog(tmp_path, 0)  # pytest has a handler at the root
    LOGGER.info("hello")
    messages.close()
    assert "hello" not in capsys.readouterr().err
    assert "hello" in caplog.text
    assert "hello" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_no_file_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        write(tmp_path, ROWS, resume_step=2)
        RankLog(tmp_path, 3).close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not list(tmp_path.glob(".*"))


def test_names_of_the_module() -> None:
    assert isinstance(JsonLines(), logs.Logger)
    assert isinstance(Csv(), logs.Logger)
    assert isinstance(trackers.TensorBoard(), logs.Logger)
    assert isinstance(trackers.Wandb(), logs.Logger)
