# SPDX-License-Identifier: Apache-2.0
"""A trial's process: whatever the target does, there is an outcome, and nothing is left running."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from fastloop.tune import trial, watch
from fastloop.tune.child import is_out_of_memory
from fastloop.tune.watch import Watch, descendants, marked

HERE = str(Path(__file__).parent)
MIB = 2**20


def run(function: str, arguments: dict[str, Any] | None = None, **more: Any) -> trial.Outcome:
    given = {"timeout": 120.0, "memory_limit": None, "folders": [HERE], **more}
    return trial.run(f"targets:{function}", arguments or {}, **given)


def test_arguments_and_result_travel() -> None:
    outcome = run("echo", {"a": [1, None, "ü"], "b": {"c": 0.5}})
    assert (outcome.status, outcome.result) == (trial.OK, {"a": [1, None, "ü"], "b": {"c": 0.5}})
    assert outcome.exit_code == 0
    assert outcome.peak_bytes is None or outcome.peak_bytes > MIB


def test_an_exception_keeps_its_traceback() -> None:
    outcome = run("raises")
    assert (outcome.status, outcome.exit_code) == (trial.FAILED, 1)
    assert outcome.reason == "KeyError: 'no such table'"
    assert "in raises" in outcome.traceback
    assert "child.py" not in outcome.traceback


def test_exit_without_an_answer() -> None:
    outcome = run("vanishes")
    assert (outcome.status, outcome.exit_code) == (trial.FAILED, 0)
    assert "without an answer" in outcome.reason


def test_sys_exit() -> None:
    outcome = run("exits", {"code": 3})
    assert (outcome.status, outcome.exit_code) == (trial.FAILED, 3)
    assert "sys.exit(3)" in outcome.reason


def test_a_crash_says_where() -> None:
    outcome = run("segfaults")
    assert (outcome.status, outcome.exit_code) == (trial.FAILED, -11)
    assert "SIGSEGV" in outcome.reason
    assert "in segfaults" in outcome.traceback


def test_a_hang_ends_with_all_that_it_started() -> None:
    for timeout in (10.0, 40.0, 160.0):  # on a busy machine the imports alone may take the first one
        outcome = run("hangs", {"start_another": True}, timeout=timeout)
        assert (outcome.status, outcome.exit_code) == (trial.TIMEOUT, None)
        if "in hangs" in outcome.traceback:
            break
    assert "in hangs" in outcome.traceback
    assert not _sleeps(outcome.notes["other"])


def _sleeps(pid: int) -> bool:
    try:
        return b"time.sleep(3600)" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_memory_over_the_limit() -> None:
    outcome = run("takes_memory", memory_limit=700 * MIB)
    assert outcome.status == trial.OUT_OF_MEMORY
    assert "700 are allowed" in outcome.reason
    assert outcome.peak_bytes > 700 * MIB


def test_memory_over_the_limit_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system remembers the most that the process had."""
    looks: list[int] = []

    def least(pid: int) -> int:
        looks.append(pid)
        return MIB

    monkeypatch.setattr(watch, "resident_bytes", least)
    outcome = run("takes_memory_for_a_moment", memory_limit=700 * MIB, environment={"OMP_NUM_THREADS": "1"})
    assert looks
    assert outcome.status == trial.OUT_OF_MEMORY
    assert outcome.peak_bytes > 700 * MIB


def test_an_allocation_that_fails() -> None:
    outcome = run("asks_for_too_much")
    assert outcome.status == trial.OUT_OF_MEMORY
    assert "in asks_for_too_much" in outcome.traceback


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory is what this text says"), False),
    ],
)
def test_what_is_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cause_counts_too() -> None:
    error = RuntimeError("the model does not fit")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


def test_a_target_that_prints_much() -> None:
    outcome = run("prints", {"megabytes": 200})
    assert (outcome.status, outcome.result) == (trial.OK, {"printed": 200})
    assert outcome.output.endswith("the last line\n")
    assert len(outcome.output) < MIB


def test_notes_arrive_before_the_end_and_survive_a_crash() -> None:
    heard = []
    outcome = run("notes_then_vanishes", on_note=lambda note, peak: heard.append(note))
    assert outcome.status == trial.FAILED
    assert outcome.notes == {"first": 1, "second": 2}
    assert heard == [{"first": 1}, {"second": 2}]


def test_an_interrupt_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def interrupted(self: Any) -> str | None:
        seen.append(self.process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(trial.Watch, "until_it_ends", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("hangs")
    assert not Path(f"/proc/{seen[0]}").exists()


# ---- forks


def test_a_fork_answers() -> None:
    outcome = trial.run_forked(lambda: {"pid": os.getpid()}, timeout=60.0, memory_limit=None)
    assert outcome.status == trial.OK
    assert outcome.result["pid"] != os.getpid()


def test_a_fork_that_raises_hangs_or_crashes() -> None:
    def raises() -> None:
        raise KeyError("x")

    assert trial.run_forked(raises, timeout=60.0, memory_limit=None).reason == "KeyError: 'x'"
    assert trial.run_forked(lambda: time.sleep(3600), timeout=1.0, memory_limit=None).status == trial.TIMEOUT
    gone = trial.run_forked(lambda: os._exit(0), timeout=60.0, memory_limit=None)
    assert (gone.status, gone.exit_code) == (trial.FAILED, 0)


def test_what_a_fork_has_of_its_parent_is_not_its_own() -> None:
    ballast = bytearray(b"x") * (256 * MIB)

    def takes(size: int) -> None:
        taken = bytearray(b"x") * size
        time.sleep(1.0)
        del taken

    within = trial.run_forked(lambda: takes(16 * MIB), timeout=60.0, memory_limit=128 * MIB)
    assert within.status == trial.OK
    # Pages of files, which a fork does not begin with, count as its parent's: it may take so much more.
    beyond = trial.run_forked(lambda: takes(1024 * MIB), timeout=60.0, memory_limit=128 * MIB)
    assert beyond.status == trial.OUT_OF_MEMORY
    assert len(ballast) == 256 * MIB


def test_a_fork_never_returns_into_the_caller(tmp_path: Path) -> None:
    file = tmp_path / "pids"

    def interrupts() -> None:
        raise KeyboardInterrupt

    trial.run_forked(interrupts, timeout=60.0, memory_limit=None)
    with file.open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    assert file.read_text() == f"{os.getpid()}\n"


def test_no_fork_after_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="cannot fork"):
        trial.run_forked(dict, timeout=1.0, memory_limit=None)
    assert trial.run_here(lambda: os.getpid()).result == os.getpid()


# ---- watching


def test_what_was_noted_before_the_memory_limit_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        pid, returncode = 0, None

        def wait(self, seconds: float) -> None:
            raise subprocess.TimeoutExpired("it", seconds)

    heard: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as answer:
        answer.write(b'{"note": {"found": 1}}\n')
        answer.flush()
        made = Watch(Endless(), time.monotonic() + 60.0, 10, output, answer, lambda note, peak: heard.append(note))
        monkeypatch.setattr(made, "_look_at_memory", lambda now: setattr(made, "peak", 20))
        assert made.until_it_ends() == trial.OUT_OF_MEMORY
    assert heard == [{"found": 1}]
    assert made.peak == 20


def test_descendants_are_of_every_thread_and_generation() -> None:
    done, started, pids = threading.Event(), threading.Event(), []
    mark = uuid.uuid4().hex  # another run of this test may be under way

    def fork_in_a_thread() -> None:
        last = "import time; print('up', flush=True); time.sleep(600)"  # by then it has its environment
        code = f"import subprocess,sys,time; subprocess.Popen([sys.executable,'-c',{last!r}]); time.sleep(600)"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE, env={**os.environ, trial.MARK: mark}, start_new_session=True,
        )  # fmt: skip
        process.stdout.readline()
        pids.append(process.pid)
        started.set()
        done.wait()
        trial._end(process, mark)
        process.stdout.close()

    thread = threading.Thread(target=fork_in_a_thread)
    thread.start()
    try:
        assert started.wait(60)
        assert pids[0] in descendants(os.getpid())
        assert len(descendants(pids[0])) == 2
        assert len(list(marked(mark))) == 2
    finally:
        done.set()
        thread.join()
    assert not list(marked(mark))
