# SPDX-License-Identifier: Apache-2.0
"""Two revisions in turn: verdicts on simulated machines, and a real project whose head is slower."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastloop.bench import stats, usercases
from fastloop.bench.commands import ab as command
from fastloop.bench.regression import ab, builds, revisions
from fastloop.bench.regression.process import Process, WorkerError
from fastloop.bench.regression.record import Report, from_json, to_json
from fastloop.bench.regression.worker import Worker
from fastloop.bench.stats import Verdict

# ---- a simulated machine: where a process finds its memory, and what else the machine does, at random


class Machine:
    """Seconds of a call: 1 us times the side's factor, a factor for each process and case, and noise of each sample.

    Args:
        slower: head's time over base's, by case.
        placement: standard deviation of what stays for as long as a process lives.
        noise: of each sample; one sample in ten is `bursts` times as long.
    """

    def __init__(self, seed: int, slower: dict[str, float], placement: float = 0.015, noise: float = 0.02) -> None:
        self.draw = np.random.default_rng(seed)
        self.slower, self.placement, self.noise = slower, placement, noise
        self.starts = 0

    def seconds(self, side: int, place: float, case: str) -> float:
        burst = 1.5 if self.draw.random() < 0.1 else 1.0
        return 1e-6 * (self.slower[case] if side else 1.0) * place * burst * (1 + self.noise * abs(self.draw.normal()))


class FakeProcess:
    alive = True

    def __init__(self, machine: Machine, side: int) -> None:
        self.machine, self.side = machine, side
        self.place = {case: 1 + machine.placement * machine.draw.normal() for case in machine.slower}
        machine.starts += 1

    def ask(self, do: str, case: str, repetitions: int = 0) -> dict[str, Any]:
        return {"seconds": self.machine.seconds(self.side, self.place[case], case)} if do == "sample" else {}

    def send(self, do: str, case: str, check: bool) -> None:
        pass

    def receive(self) -> dict[str, Any]:
        return {}


def judge(monkeypatch: pytest.MonkeyPatch, machine: Machine, **options: Any) -> dict[str, ab.Change]:
    """Changes by case, on that machine; the case named control is the control."""

    @contextmanager
    def both(sides: Any, first: int) -> Iterator[Any]:
        cases = {name: ab.Taken(name, control=name == "control") for name in machine.slower}
        yield FakeProcess(machine, 0), FakeProcess(machine, 1), cases

    monkeypatch.setattr(ab, "_both", both)
    monkeypatch.setattr(ab.measure, "calibrate", lambda call, sampler: 1)
    monkeypatch.setattr(ab.measure, "quiet_interpreter", lambda threads: nullcontext())  # nothing is timed here
    sides: Any = None
    return {change.case: change for change in ab.compare(sides, lambda text, count: None, **options)}


CASES = {"control": 1.0, "a": 1.0, "b": 1.0, "c": 1.0}


def test_the_same_code_is_not_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a noisy machine, with placement worth 1.5 %: 24 runs of 3 cases, no flag."""
    verdicts = [change.verdict for seed in range(24) for change in judge(monkeypatch, Machine(seed, CASES)).values()]
    assert not {Verdict.REGRESSED, Verdict.IMPROVED} & set(verdicts)
    assert verdicts.count(Verdict.PASS) > 0.7 * len(verdicts)


def test_ten_per_cent_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [judge(monkeypatch, Machine(seed, CASES | {"a": 1.10})) for seed in range(20)]
    flagged = [each["a"].verdict is Verdict.REGRESSED for each in found if each["control"].verdict is Verdict.PASS]
    assert len(flagged) > 12
    assert sum(flagged) >= 0.9 * len(flagged)
    assert not any(each[name].verdict is Verdict.REGRESSED for each in found for name in ("b", "c"))


def test_ten_per_cent_faster_is_an_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Machine(1, CASES | {"a": 1 / 1.10}, placement=0.002, noise=0.005)
    assert judge(monkeypatch, quiet)["a"].verdict is Verdict.IMPROVED


def test_placement_alone_is_no_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that differ by 6 % for as long as they live: pairs alone would call that a certain change."""
    machines = [Machine(seed, CASES, placement=0.06, noise=0.001) for seed in range(12)]
    found = [judge(monkeypatch, machine) for machine in machines]
    assert not any(change.verdict is Verdict.REGRESSED for each in found for change in each.values())
    first_rounds = [stats.median_interval(each["a"].rounds[0]) for each in found]
    assert sum(map(stats.looks_slower, first_rounds)) >= 2  # what a single start of the processes would have said


def test_a_control_that_moves_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0, CASES | {"control": 1.05, "a": 1.3}, placement=0.001, noise=0.002)
    found = judge(monkeypatch, machine)
    assert {change.verdict for change in found.values()} == {Verdict.VOID}
    assert machine.starts == 2 * 2 * 4  # tried once more, and given up after the first 20 pairs of either try


def test_decided_cases_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that needs 80 pairs does not make the others wait."""
    machine = Machine(3, {"control": 1.0, "quiet": 1.0, "edge": 1.0}, placement=0.0, noise=0.0)
    original = machine.seconds
    machine.seconds = lambda side, place, case: (  # type: ignore[method-assign]
        original(side, place, case) * (machine.draw.uniform(0.7, 1.5) if case == "edge" else 1.0)
    )
    machine.draw = np.random.default_rng(5)
    found = judge(monkeypatch, machine)
    assert found["edge"].pairs > found["quiet"].pairs >= 20


def test_without_a_rerun_nothing_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1, CASES | {"a": 1.3}, placement=0.002, noise=0.005)
    found = judge(monkeypatch, machine, rerun=False)["a"]
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "not measured again" in found.note


def test_time_that_runs_out_leaves_the_rest_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1, CASES | {"a": 1.3}, placement=0.002, noise=0.005)
    found = judge(monkeypatch, machine, seconds=0.0)
    assert found["a"].verdict is Verdict.INCONCLUSIVE
    assert found["a"].pairs == ab.FEWEST_ROUNDS * ab.ROUND_PAIRS


def test_rounds_interval_is_wider_than_that_of_pairs_alone() -> None:
    rounds = [[1.00, 1.01, 0.99], [1.10, 1.11, 1.09], [1.00, 1.01, 0.99], [1.10, 1.11, 1.09]]
    inner = stats.median_interval([ratio for each in rounds for ratio in each])
    outer = stats.rounds_interval(rounds)
    assert outer.median == inner.median
    assert outer.high - outer.low > 0.099
    with pytest.raises(ValueError, match="one length"):
        stats.rounds_interval([[1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="at least one"):
        stats.rounds_interval([])


# ---- cases that a project marks


def marked(**options: Any) -> usercases.UserCase:
    def example() -> tuple[Any, int]:
        """What it is. And more."""
        return (lambda: None, 7) if options.get("setup") else (len, 3)

    return getattr(usercases.case(**options)(example), usercases.MARK)


def test_a_mark_leaves_the_function_as_it_is() -> None:
    @usercases.case
    def twice_two() -> int:
        """Doubles."""
        return 4

    found = getattr(twice_two, usercases.MARK)
    assert twice_two() == 4
    assert (found.name, found.title, found.setup) == ("twice-two", "Doubles", False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"floor": 2.0}, ValueError, "pass peer="),
        ({"peer": "b", "floor": 0}, ValueError, "floor must be a number above 0, got 0"),
        ({"bytes": True}, ValueError, "bytes must be"),
        ({"check": 3}, TypeError, "check must be a function"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        marked(**options)


def test_a_case_takes_no_arguments() -> None:
    with pytest.raises(TypeError, match="without arguments, it needs size"):
        usercases.case(lambda size: size)
    with pytest.raises(TypeError, match="wanted a function"):
        usercases.case(3)  # type: ignore[arg-type]


def test_check_sees_the_result() -> None:
    seen: list[Any] = []
    assert usercases.prepared(marked(setup=True, check=seen.append))() is None
    usercases.prepared(marked(check=seen.append))
    assert seen == [7, (len, 3)]

    def refuse(result: Any) -> None:
        raise AssertionError(f"{result} is not 8")

    with pytest.raises(usercases.WrongCase, match="7 is not 8"):
        usercases.prepared(marked(setup=True, check=refuse))


def test_a_factory_must_return_something_to_call() -> None:
    with pytest.raises(usercases.CaseError, match="wanted a function"):
        usercases.prepared(usercases.UserCase("a", lambda: 3, setup=True))


# ---- a worker


PERF = """
import fastloop.bench
from project import work

@fastloop.bench.case(control=True)
def still():
    return sum(range(2000))

@fastloop.bench.case(check=lambda total: total == 1 / 0 if total != 499500 else None)
def sums():
    "Adds up."
    print("a case may print")
    return work.total()
"""
FAST = "def total():\n    return sum(range(1000))\n"
SLOW = "def total():\n    for _ in range(2):\n        sum(range(1000))\n    return sum(range(1000))\n"


def git(folder: Path, *arguments: str) -> None:
    author = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, env={**os.environ, **author}
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of two commits, of which the second is slower."""
    top = tmp_path / "checkout"
    (top / "project").mkdir(parents=True)
    (top / "project" / "__init__.py").touch()
    (top / "project" / "work.py").write_text(FAST)
    (top / "perf.py").write_text(PERF.replace("    print", "    0 and print"))
    git(tmp_path, "init", "-q", str(top))
    git(top, "add", "-A")
    git(top, "commit", "-qm", "fast")
    (top / "project" / "work.py").write_text(SLOW)
    git(top, "commit", "-qam", "slow")
    return top


def silent(text: str, count: int) -> None:
    pass


@pytest.mark.slow
def test_a_project_that_became_slower(project: Path, tmp_path: Path) -> None:
    report = revisions.run(revisions.Asked("HEAD~1", cases="perf"), tmp_path / "builds", silent, project)
    found = {change.case: change for change in report.changes}
    assert found["still"].control
    assert found["sums"].interval is not None
    assert 2.0 < found["sums"].interval.median < 4.5
    assert found["sums"].verdict in (Verdict.REGRESSED, Verdict.VOID)  # void where the machine is not quiet
    assert from_json(to_json(report)) == report


def test_the_working_tree_is_what_is_there(project: Path, tmp_path: Path) -> None:
    (project / "new.py").write_text("x = 1\n")
    (project / ".gitignore").write_text("*.log\n")
    (project / "a.log").write_text("noise")
    status = subprocess.run(["git", "-C", str(project), "status", "--porcelain"], capture_output=True, check=True)
    built = builds.build(project, None, tmp_path / "builds")
    assert built.commit.endswith("-dirty")
    assert (built.source / "new.py").exists()
    assert not (built.source / "a.log").exists()
    after = subprocess.run(["git", "-C", str(project), "status", "--porcelain"], capture_output=True, check=True)
    assert after.stdout == status.stdout  # the user's index is as it was
    base = builds.build(project, "HEAD~1", tmp_path / "builds")
    assert (base.source / "project" / "work.py").read_text() == FAST
    assert builds.changed_files(project, base.tree, built.tree) == [".gitignore", "new.py", "project/work.py"]


def test_a_build_is_made_once_and_old_ones_go(project: Path, tmp_path: Path) -> None:
    cache = tmp_path / "builds"
    first = builds.build(project, "HEAD~1", cache)
    (first.source / "mark").touch()
    assert (builds.build(project, "HEAD~1", cache).source / "mark").exists()
    os.utime(first.source.parent / "done", (1e9, 1e9))  # used long ago: a file's time may be one of whole seconds
    second = builds.build(project, "HEAD", cache)
    builds.keep_newest(cache, 1)
    assert second.source.exists()
    assert not first.source.exists()


def test_what_does_not_exist(project: Path, tmp_path: Path) -> None:
    with pytest.raises(builds.BuildError, match="no revision 'nowhere'"):
        builds.build(project, "nowhere", tmp_path / "builds")
    with pytest.raises(builds.BuildError, match="git rev-parse"):
        builds.repository_of(tmp_path)
    with pytest.raises(revisions.WrongUse, match="pass --cases MODULE"):
        revisions.case_file(None, project)
    with pytest.raises(revisions.WrongUse, match="no cases 'perff'"):
        revisions.case_file("perff", project)


def test_a_project_whose_build_fails_says_why(project: Path, tmp_path: Path) -> None:
    (project / "pyproject.toml").write_text("[project]\nname = 3\n")
    with pytest.raises(builds.BuildError, match=r"(?s)pass --no-install .*invalid pyproject.toml"):
        builds.build(project, None, tmp_path / "builds")
    assert builds.build(project, None, tmp_path / "builds", install=False).path


def test_a_worker_holds_the_cases_of_its_build(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "perf.py").write_text(PERF)
    with Process([str(project)]) as process:
        answer = process.ask("load", file=str(project / "perf.py"), module="perf", outside="/nowhere")
        assert answer["cases"][1] == {"name": "sums", "title": "Adds up", "control": False}
        assert process.ask("prepare", case="sums", check=True) == {}
        assert process.ask("sample", case="sums", repetitions=3)["seconds"] > 0
        with pytest.raises(WorkerError, match="KeyError"):
            process.ask("sample", case="none", repetitions=1)
        assert process.ask("drop", case="sums") == {}


def test_modules_of_the_checkout_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(project))
    for name in ("project", "project.work", "perf"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    worker = Worker(str(Path(usercases.__file__)))
    with pytest.raises(ImportError, match="was imported from the checkout"):
        worker.load(str(project / "perf.py"), "perf", str(project))


@pytest.mark.parametrize(
    ("does", "message"),
    [("import os; os._exit(7)", "exit code 7"), ("import os; os.kill(os.getpid(), 9)", "SIGKILL")],
)
def test_a_worker_that_dies_says_how(tmp_path: Path, does: str, message: str) -> None:
    (tmp_path / "perf.py").write_text(does)
    with Process([str(tmp_path)]) as process, pytest.raises(WorkerError, match=message):
        process.ask("load", file=str(tmp_path / "perf.py"), module="perf", outside="/nowhere")


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    (tmp_path / "perf.py").write_text("import time; time.sleep(1000)")
    process = Process([str(tmp_path)], seconds=0.5)
    with pytest.raises(WorkerError, match="no answer within"):
        process.ask("load", file=str(tmp_path / "perf.py"), module="perf", outside="/nowhere")
    assert process._process.poll() is not None


def test_cases_that_end_their_process_do_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five cases that crash in head, and only four rounds: each is named, and those that had no turn say so."""
    original = FakeProcess.ask

    def crash(self: FakeProcess, do: str, case: str, repetitions: int = 0) -> dict[str, Any]:
        if do == "sample" and case.startswith("bad") and self.side == 1:
            raise WorkerError("the process ended with signal SIGSEGV")
        return original(self, do, case, repetitions)

    monkeypatch.setattr(FakeProcess, "ask", crash)
    found = judge(monkeypatch, Machine(0, {"control": 1.0, **{f"bad{i}": 1.0 for i in range(18)}, "last": 1.0}))
    assert "SIGSEGV" in found["bad0"].note
    assert found["bad0"].wrong
    assert "before its turn" in found["last"].note
    assert Report("", {}, "b", "a", list(found.values())).exit_code() == 3


@pytest.mark.parametrize("side", ["base", "head"])
def test_what_fails_in_head_fails(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    monkeypatch.setattr(
        FakeProcess, "receive", lambda self: {"error": "E"} if ("base", "head")[self.side] == side else {}
    )
    (found,) = judge(monkeypatch, Machine(0, {"a": 1.0})).values()
    assert (found.note, found.wrong, found.verdict) == (f"{side}: E", side == "head", None)


def test_a_pattern_without_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ab.NoCases, match="no case matches; there are control, a, b, c"):
        judge(monkeypatch, Machine(0, CASES), wanted=lambda name: False)


@pytest.mark.parametrize("text", ["", "3", "20,x", "40,20", "20,20"])
def test_pairs_that_do_not_rise(text: str) -> None:
    with pytest.raises(command.argparse.ArgumentTypeError, match="rising counts"):
        command.pairs(text)


def test_exit_codes() -> None:
    def code(verdict: Verdict | None, wrong: bool = False) -> int:
        return Report("", {}, "b", "a", [ab.Change("x", verdict=verdict, wrong=wrong)]).exit_code()

    assert [code(each) for each in (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.REGRESSED, Verdict.VOID)] == [
        0,
        0,
        1,
        4,
    ]
    assert code(None, wrong=True) == 3
