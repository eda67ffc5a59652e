# SPDX-License-Identifier: Apache-2.0
"""Counts: what is planted is found, what is the same twice is not, and the file of allowed values is read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastloop.bench import memory
from fastloop.bench.regression import callgrind, counter, evidence
from fastloop.bench.regression.ab import CaseFile
from fastloop.bench.regression.evidence import EVERYWHERE, Allowed, CountingError, Found, NoEvidence, Place
from fastloop.bench.regression.record import Count

X = torch.ones(100)
HERE = {"": "these versions", "instructions": "this valgrind"}


def plain() -> None:
    X.neg_()


def one_more_call() -> None:
    plain()


def one_more_operator() -> None:
    X.neg_().neg_()


def one_more_allocation() -> None:
    X.copy_(X.neg())


def counted(call: Any) -> list[Count]:
    return [Count("case", what, value) for what, value in counter.counts(call, memory).items()]


@pytest.mark.parametrize(
    ("call", "failed"),
    [
        (plain, set()),
        (one_more_call, {"Python calls"}),
        (one_more_operator, {"torch operators"}),
        (one_more_allocation, {"torch operators", "allocations", "peak bytes"}),
    ],
)
def test_what_is_planted_is_found_and_nothing_else(call: Any, failed: set[str]) -> None:
    allowed = evidence.updated([], counted(plain), HERE)
    counts = counted(call)
    evidence.judge(counts, allowed, HERE)
    assert {each.what for each in counts if each.failed} == failed


def test_a_call_that_allocates_every_other_time_is_counted_when_it_does() -> None:
    turns = iter(range(100))
    found = counter.counts(lambda: X.neg() if next(turns) % 2 else None, memory)
    assert found["allocations"] == 1
    assert found["peak bytes"] == 400


def test_kernels_and_waits_of_a_profile() -> None:
    """The profiler's events on a GPU, made by hand: copies, ranges and the wait after the call are left out."""
    kind = SimpleNamespace(CPU=0, CUDA=1)

    def event(name: str, device: int, start: float, end: float = 0.0) -> Any:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    events = [
        event("counted call", 0, 10, 20),
        event("counted call", 1, 10, 20),
        event("norm", 1, 12),
        event("update", 1, 30),  # runs after the host has gone on
        event("Memcpy HtoD (Pinned -> Device)", 1, 13),
        event("cudaLaunchKernel", 0, 12),
        event("cudaStreamSynchronize", 0, 15),
        event("cudaDeviceSynchronize", 0, 25),
    ]
    assert counter.launches_and_waits(events, kind) == (2, 1)


# ---- the process that counts

CASES = """
import os
import torch
from fastloop.bench import case

@case(setup=True)
def good():
    x = torch.ones(10)
    return lambda: x.neg()

@case
def raises():
    raise RuntimeError("no such data")

def not_nine(value):
    assert value == 9, "wanted 9"

@case(check=not_nine)
def wrong():
    return 8

@case(control=True)
def control():
    return None

@case
def ends():
    os._exit(7)

@case
def later():
    return None
"""


def place(folder: Path, text: str = CASES) -> Place:
    (folder / "scratch_cases.py").write_text(text)
    return Place(CaseFile(folder / "scratch_cases.py", "scratch_cases"), (str(folder),))


def test_cases_that_raise_are_wrong_or_end_the_process(tmp_path: Path) -> None:
    found = evidence.count(place(tmp_path))
    assert set(found.lines) == {"good", "raises", "wrong", "ends", "later"}
    assert found.lines["good"]["counts"] == {
        "Python calls": 1, "torch operators": 1, "allocations": 1, "peak bytes": 40,
    }  # fmt: skip
    assert "no such data" in found.lines["raises"]["error"]
    assert list(found.wrong) == ["wrong"]
    assert "exit code 7" in found.lines["ends"]["error"]
    assert found.lines["later"]["error"] == "not reached"
    failed = {each.case for each in evidence.counted(found) if each.failed}
    assert failed == {"raises", "wrong", "ends", "later"}


def test_a_file_of_cases_that_cannot_be_imported(tmp_path: Path) -> None:
    with pytest.raises(CountingError, match="no_such_module"):
        evidence.count(place(tmp_path, "import no_such_module\n"))


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    hanging = place(tmp_path, "while True:\n    pass\n")
    with pytest.raises(CountingError, match="not done within 0 s"):
        evidence.run(hanging, [], {"valgrind": False}, seconds=0.2)


# ---- what is allowed


def test_a_value_holds_where_it_was_counted_and_zero_everywhere() -> None:
    rows = evidence.updated([], [Count("a", "torch operators", 3), Count("a", "allocations", 0)], HERE)
    assert [(row.what, row.where) for row in rows] == [
        ("allocations", EVERYWHERE), ("torch operators", "these versions"),
    ]  # fmt: skip
    elsewhere = [Count("a", "torch operators", 9), Count("a", "allocations", 1)]
    evidence.judge(elsewhere, rows, {"": "others"})
    assert [each.failed for each in elsewhere] == [False, True]
    assert "reported only" in elsewhere[0].note


def test_update_keeps_other_environments_and_what_was_not_counted() -> None:
    rows = [Allowed("a", "torch operators", 5, "others"), Allowed("b", "kernel launches", 2, "a GPU")]
    updated = evidence.updated(rows, [Count("a", "torch operators", 4), Count("b", "kernel launches", None)], HERE)
    assert set(updated) == {*rows, Allowed("a", "torch operators", 4, "these versions")}


def test_update_replaces_a_zero_that_held_everywhere_and_keeps_what_was_written_by_hand() -> None:
    was_zero = evidence.updated([Allowed("a", "allocations", 0)], [Count("a", "allocations", 2)], HERE)
    assert was_zero == [Allowed("a", "allocations", 2, "these versions")]
    by_hand = evidence.updated([Allowed("a", "kernel launches", 3)], [Count("a", "kernel launches", 2)], HERE)
    assert by_hand == [Allowed("a", "kernel launches", 2, EVERYWHERE)]


def test_a_zero_here_and_a_value_elsewhere_live_together() -> None:
    elsewhere, here = {"": "others"}, [Count("a", "allocations", 0)]
    rows = evidence.updated(
        [Allowed("a", "allocations", 2, "others"), Allowed("a", "allocations", 1, HERE[""])], here, HERE
    )
    assert rows == [Allowed("a", "allocations", 0, EVERYWHERE), Allowed("a", "allocations", 2, "others")]
    assert evidence.updated(rows, [Count("a", "allocations", 2)], elsewhere) == rows
    counts = [Count("a", "allocations", 2)]
    evidence.judge(counts, rows, elsewhere)
    assert not counts[0].failed


def test_what_holds_everywhere_by_its_nature_is_written_so() -> None:
    where = {**HERE, "step: kernel launches": EVERYWHERE}
    rows = evidence.updated(
        [Allowed("step", "kernel launches", 3, "others")], [Count("step", "kernel launches", 2)], where
    )
    assert rows == [Allowed("step", "kernel launches", 2, EVERYWHERE)]
    more = [Count("step", "kernel launches", 3)]
    evidence.judge(more, rows, {"": "others"})
    assert more[0].failed


def test_where_a_count_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.__version__ in evidence.versions()
    assert torch.backends.cpu.get_cpu_capability() in evidence.versions()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    where = evidence.places()
    for what in ("kernel launches", "host-device syncs", "GPU allocations", "GPU peak bytes"):
        assert "some GPU" in evidence.place_of(Count("a", what, 1), where)
    assert "some GPU" not in evidence.place_of(Count("a", "peak bytes", 1), where)


def test_without_a_committed_value_the_base_decides() -> None:
    counts = [Count("a", "torch operators", 4, base=3), Count("b", "torch operators", 4, base=4)]
    evidence.judge(counts, [], HERE)
    assert [each.failed for each in counts] == [True, False]
    allowed = [Count("a", "torch operators", 4, base=3)]  # the change raises the committed value: it is meant
    evidence.judge(allowed, [Allowed("a", "torch operators", 4)], HERE)
    assert not allowed[0].failed


def test_a_case_that_nothing_is_known_of_has_no_baseline() -> None:
    with pytest.raises(NoEvidence, match="allowed counts for b"):
        evidence.judge(
            [Count("a", "allocations", 0), Count("b", "allocations", 0)], [Allowed("a", "allocations", 0)], HERE
        )


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        '{"schema": "x"}',
        '{"schema": "fastloop-evidence/1"}',
        '{"schema": "fastloop-evidence/1", "allowed": [{"case": "a"}]}',
        '{"schema": "fastloop-evidence/1", "allowed": [{"case": "a", "what": "b", "allowed": "3"}]}',
        '{"schema": "fastloop-evidence/1", "allowed": [{"case": "a", "what": "b", "allowed": true}]}',
    ],
)
def test_a_bad_file_is_no_evidence(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(NoEvidence):
        evidence.load(path)


def test_a_file_reads_back_as_written(tmp_path: Path) -> None:
    rows = [Allowed("a", "allocations", 0), Allowed("a", "instructions", 1234, "a long place")]
    evidence.save(rows, tmp_path / "new" / "evidence.json")
    assert evidence.load(tmp_path / "new" / "evidence.json") == rows


def test_the_committed_file_knows_every_case_of_fastloop() -> None:
    root = Path(__file__).resolve().parents[2] / "benchmarks"
    rows = evidence.load(root / "evidence.json")
    text = (root / "perf_cases.py").read_text()
    named = {row.case for row in rows}
    cases = {chunk.split("def ")[1].split("(")[0].replace("_", "-") for chunk in text.split("\n@case")[1:]}
    assert len(cases) > 5
    assert cases <= named
    assert ("step-mlp", "allocations", EVERYWHERE) in {row.key for row in rows}


# ---- instructions

DUMP = """version: 1
events: Ir
summary: 1150

ob=(3) /usr/lib/libc.so.6
fl=(1) ???
fn=(10) malloc
0 100
cob=(5) /usr/bin/python3.11
cfi=(2) ceval.c
cfn=(11) eval
calls=2 7
12 9999
+3 50

ob=(5)
fn=(11)
12 600
* 300

ob=(7) /project/fastloop/_native.cpython-311-x86_64-linux-gnu.so
fn=(12) step
-4 100
totals: 1150
"""


def test_instructions_by_object_leave_out_what_the_called_function_did() -> None:
    assert callgrind.by_object(DUMP) == {
        "/usr/lib/libc.so.6": 150,
        "/usr/bin/python3.11": 900,
        "/project/fastloop/_native.cpython-311-x86_64-linux-gnu.so": 100,
    }


def test_instructions_per_call_are_less_the_empty_region(tmp_path: Path) -> None:
    whole, empty = tmp_path / "whole", tmp_path / "empty"
    whole.write_text(DUMP)
    empty.write_text("ob=(1) /usr/bin/python3.11\nfn=(1) eval\n1 400\n")
    assert counter.total(str(whole)) == 1150
    assert callgrind._per_call(whole, empty, 5) == {
        "instructions": 150, "instructions, native": 20, "instructions, Python": 100,
    }  # fmt: skip


@pytest.mark.parametrize(("native", "failed"), [(1000, False), (1029, False), (1031, True), (1100, True), (900, False)])
def test_ten_per_cent_more_instructions_are_flagged_and_noise_is_not(native: int, failed: bool) -> None:
    def found(count: int) -> Found:
        return Found({"step": {"case": "step", "counts": {"instructions, native": count}}})

    against_base = callgrind.counted(found(native), found(1000))
    evidence.judge(against_base, [], HERE)
    assert against_base[0].failed is failed
    committed = callgrind.counted(found(native))
    evidence.judge(committed, [Allowed("step", "instructions, native", 1000, "this valgrind")], HERE)
    assert committed[0].failed is failed
    elsewhere = callgrind.counted(found(native))
    evidence.judge(elsewhere, [Allowed("step", "instructions, native", 1, "another valgrind")], HERE)
    assert not elsewhere[0].failed


def test_the_base_decides_about_instructions_whatever_is_committed() -> None:
    counts = [Count("step", "instructions", 1100, base=1000)]
    evidence.judge(counts, [Allowed("step", "instructions", 2000, "this valgrind")], HERE)
    assert counts[0].failed


def test_a_committed_growth_raises_the_limit() -> None:
    def failed(before: list[Allowed] | None) -> bool:
        counts = [Count("step", "instructions", 1100, base=1000)]
        evidence.judge(counts, [Allowed("step", "instructions", 1100, "this valgrind")], HERE, before)
        return counts[0].failed

    assert not failed([Allowed("step", "instructions", 1000, "this valgrind")])
    assert not failed([])
    assert failed([Allowed("step", "instructions", 1100, "this valgrind")])  # it was there before: nothing was meant
    assert failed(None)


@pytest.mark.parametrize(("total", "failed"), [(990, False), (1000, True)])
def test_a_part_may_grow_while_the_whole_shrinks(total: int, failed: bool) -> None:
    counts = [Count("step", "instructions, native", 600, base=500), Count("step", "instructions", total, base=1000)]
    evidence.judge(counts, [], HERE)
    assert [each.failed for each in counts] == [failed, False]


def test_a_case_that_has_become_too_heavy_fails() -> None:
    heavy = Found({"step": {"case": "step", "error": "too many instructions", "at_least": 4.5e8}})
    base = Found({"step": {"case": "step", "counts": {"instructions": 3e8}}})
    (found,) = counts = callgrind.counted(heavy, base)
    evidence.judge(counts, [], HERE)
    assert found.failed
    assert "at least" in found.note
    assert callgrind.counted(heavy) == [Count("step", "instructions", None, note="too many instructions")]


def test_a_call_that_is_too_heavy_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counter, "total", lambda dump: 5e8)
    regions: Any = SimpleNamespace(count=lambda call, times: "")
    assert counter.instructions(plain, regions)["at_least"] == 5e8


def test_where_instructions_hold_without_valgrind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no valgrind" in callgrind.where()


def test_what_valgrind_cannot_count_is_said_and_does_not_fail() -> None:
    counts = callgrind.counted(Found({"big": {"case": "big", "error": "too many instructions"}}))
    evidence.judge(counts, [], HERE)
    assert counts == [Count("big", "instructions", None, note="too many instructions")]


def test_without_valgrind_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "valgrind is not installed" in str(callgrind.unavailable())
    with pytest.raises(CountingError, match="apt-get install valgrind"):
        callgrind.count(place(tmp_path))


@pytest.mark.slow
def test_valgrind_sees_a_planted_tenth(tmp_path: Path) -> None:
    reason = callgrind.unavailable()
    if reason is not None:
        pytest.skip(reason)
    text = """
import os
from fastloop.bench import case

@case
def additions(times=1000):
    total = 0
    for i in range(times):
        total += i

@case
def more_additions():
    additions(1100)
"""
    found = callgrind.count(place(tmp_path, text))
    once, more = (found.lines[name]["counts"]["instructions"] for name in ("additions", "more-additions"))
    assert once > 5000
    assert 1.05 < more / once < 1.15
    assert json.dumps(found.lines["additions"]["counts"])
