# SPDX-License-Identifier: Apache-2.0
"""`ci` on scratch projects: exit codes, files, floors; the workflow; files of pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastloop
from fastloop.bench import cases, cli, measure, pytest_json, stats
from fastloop.bench.regression import builds, callgrind, ci, evidence, floors, record, revisions
from fastloop.bench.regression.ab import CaseFile
from fastloop.bench.regression.evidence import Found
from fastloop.bench.regression.record import Count, Ratio
from fastloop.bench.stats import Verdict
from fastloop.bench.usercases import UserCase

ROOT = Path(__file__).resolve().parents[2]
TINY = cases.step_case("tiny", "three tensors", [(5, 7), (0,), (3,)], peers=("torch-fused",), small=True)
PERF = """
import torch
from fastloop.bench import case

x = torch.ones(10)

@case
def slow_way():
    for _ in range(200):
        x.neg()

@case(peer="slow-way", floor={floor})
def fast_way():
    {body}
"""


def silent(text: str, count: int) -> None:
    pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is one call, the control is tiny and calm, and there is no valgrind."""
    monkeypatch.setattr(cases, "CONTROL", replace(cases.CONTROL, build=TINY.build, traffic=TINY.traffic))
    monkeypatch.setattr("fastloop.bench.measure.calibrate", lambda call, sampler=None: 1)
    monkeypatch.setattr(stats, "CONTROL_MOVED", float("inf"))
    monkeypatch.setattr(stats, "PAIRS", (5,))
    monkeypatch.setattr(stats, "RERUN_PAIRS", 5)
    monkeypatch.setattr(callgrind, "unavailable", lambda: "left out of this test")


@pytest.fixture
def project(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of one file of cases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (tmp_path / "scratchpkg").mkdir()
    (tmp_path / "scratchpkg" / "__init__.py").touch()
    write(tmp_path)
    return tmp_path


def write(folder: Path, floor: float = 0.001, body: str = "x.neg()") -> None:
    (folder / "scratchpkg" / "perf.py").write_text(PERF.format(floor=floor, body=body))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Counts that a test sets, in the place of a process that counts."""
    lines = {name: {"case": name, "counts": {"torch operators": 3}} for name in ("slow-way", "fast-way")}
    monkeypatch.setattr(evidence, "count", lambda place: Found(lines))
    return lines


def run(*arguments: str | Path) -> int:
    return cli.main(["ci", "--cases", "scratchpkg.perf", *map(str, arguments)])


def test_from_the_first_run_to_a_planted_operator(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without fakes: what was counted in a process of its own is compared with what was committed."""
    assert run() == 5
    assert "--update" in capsys.readouterr().err
    assert run("--update") == 0
    assert run("--output", "out") == 0
    report = record.load(project / "out" / "result.json")
    operators = {count.case: count.value for count in report.counts if count.what == "torch operators"}
    assert operators == {"slow-way": 200, "fast-way": 1}
    assert (report.ratios[0].case, report.ratios[0].verdict) == ("fast-way", Verdict.PASS)
    assert (project / "out" / "report.md").read_text()
    assert "<html" in (project / "out" / "report.html").read_text()
    write(project, body="x.neg().neg()")
    capsys.readouterr()
    assert run("--output", "out") == 1
    failed = {(count.case, count.what) for count in record.load(project / "out" / "result.json").counts if count.failed}
    assert ("fast-way", "torch operators") in failed
    assert "slow-way" not in {case for case, _ in failed}


def test_a_ratio_below_its_floor(project: Path, known: Any) -> None:
    write(project, floor=1e9)
    assert run("--update") == 1
    # a file of floors goes before the decorator's
    (project / "low.json").write_text('{"schema": "fastloop-floors/2", "floors": {"fast-way": 0.001}}')
    assert run("--floors", "low.json") == 0


def test_a_void_machine_is_neutral_but_counts_fail(project: Path, known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "CONTROL_MOVED", -1.0)
    write(project, floor=1e9)
    assert run("--update") == 0
    known["fast-way"]["counts"]["torch operators"] = 4
    assert run() == 1


def test_a_case_that_is_found_wrong(project: Path, known: Any) -> None:
    known["fast-way"] = {"case": "fast-way", "error": "wanted 9", "wrong": True}
    assert run("--update") == 3


def test_update_is_written_into_the_file_that_is_named(project: Path, known: Any) -> None:
    assert run("--update", "--evidence", "mine.json") == 0
    assert not (project / "benchmarks").exists()
    assert {row.case for row in evidence.load(project / "mine.json")} == {"slow-way", "fast-way"}
    assert run("--evidence", "mine.json") == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--cases", "scratchpkg.nothing"], 2),
        (["--floors", "none.json"], 5),
        (["--evidence", "none.json"], 5),
        (["--base", "no-such-revision"], 4),
    ],
)
def test_what_is_not_there(project: Path, known: Any, arguments: list[str], code: int) -> None:
    assert run("--update") == 0
    assert run(*arguments) == code


@pytest.mark.parametrize("text", ["import no_such_module\n", "x = 1\n", "def f(:\n"])
def test_a_broken_file_of_cases_is_wrong_use(
    project: Path, known: Any, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "scratchpkg" / "perf.py").write_text(text)
    assert run("--update") == 2
    assert "[bench]" in capsys.readouterr().err


def test_no_cases_outside_of_fastloop(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ci"]) == 2
    assert "--cases" in capsys.readouterr().err


def git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True)


def test_times_are_not_compared_where_nothing_that_runs_has_changed(project: Path, known: Any) -> None:
    assert run("--update") == 0
    git(project, "init")
    (project / ".gitignore").write_text(".fastloop/\n__pycache__/\n")
    git(project, "add", "-A")
    git(project, "commit", "-m", "first")
    (project / "README.md").write_text("words")
    assert run("--base", "HEAD", "--output", ".fastloop/out") == 0
    report = record.load(project / ".fastloop" / "out" / "result.json")
    assert report.changes == []
    assert any("nothing that runs differs" in note for note in report.notes)
    assert report.head.endswith("-dirty")


def test_without_a_base_nothing_is_written_into_the_repository(project: Path, known: Any) -> None:
    git(project, "init")
    git(project, "add", "-A")
    git(project, "commit", "-m", "first")
    objects = {path for path in (project / ".git" / "objects").rglob("*") if path.is_file()}
    (project / "large.bin").write_text("data")
    assert run("--update", "--output", "out") == 0
    assert record.load(project / "out" / "result.json").head.endswith("-dirty")
    assert {path for path in (project / ".git" / "objects").rglob("*") if path.is_file()} == objects


def test_how_to_compare_is_passed_on(project: Path, known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    git(project, "init")
    git(project, "add", "-A")
    git(project, "commit", "-m", "first")
    write(project, body="x.abs()")
    asked: list[Any] = []

    def refuse(wanted: Any, cache: Path, tell: Any) -> Any:
        asked.append(wanted)
        raise builds.BuildError("enough")

    monkeypatch.setattr(revisions, "prepare", refuse)
    assert run("--update") == 0
    assert run("--base", "HEAD", "--no-install", "--seconds", "7") == 4
    assert run("--base", "HEAD") == 4
    assert [(each.install, each.seconds) for each in asked] == [(False, 7.0), (True, ci.SECONDS)]
    assert (project / ".fastloop" / ".gitignore").read_text() == "*\n"
    with pytest.raises(SystemExit):
        run("--seconds", "nan")


def test_the_bases_values_are_those_of_its_sources(tmp_path: Path) -> None:
    top, base = tmp_path / "top", tmp_path / "base"
    guard = ci.Guard(ci.Request("main"), silent)
    project = ci.Project(top, CaseFile(top / "perf.py", "perf"), False)
    sides: Any = SimpleNamespace(base=SimpleNamespace(source=base))
    assert guard._base_rows(project, None) is None
    assert guard._base_rows(project, sides) == []
    evidence.save([evidence.Allowed("a", "allocations", 1)], base / ci.EVIDENCE)
    assert guard._base_rows(project, sides) == [evidence.Allowed("a", "allocations", 1)]
    elsewhere = ci.Guard(ci.Request("main", evidence=tmp_path / "mine.json"), silent)
    assert elsewhere._base_rows(project, sides) is None


def test_what_pip_can_install(tmp_path: Path) -> None:
    for text, answer in (("[tool.ruff]\n", False), ("[project.urls]\n", False), ("# x\n[project]\nname='a'\n", True),
                         ("[build-system]\n", True)):  # fmt: skip
        (tmp_path / "pyproject.toml").write_text(text)
        assert builds._is_package(tmp_path) is answer
    (tmp_path / "pyproject.toml").unlink()
    assert not builds._is_package(tmp_path)
    (tmp_path / "setup.py").touch()
    assert builds._is_package(tmp_path)


def test_changed_files_are_named_as_they_are(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("x = 1\n" * 20)
    (tmp_path / "docs" / "\u00e4 b.md").write_text("y\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "docs" / "\u00e4 b.md").write_text("z\n")
    (tmp_path / "code.py").rename(tmp_path / "docs" / "code.py")
    _, base = builds.revision(tmp_path, "HEAD")
    _, head = builds.revision(tmp_path, None)
    assert builds.changed_files(tmp_path, base, head) == ["code.py", "docs/code.py", "docs/\u00e4 b.md"]


@pytest.mark.parametrize(
    ("path", "answer"),
    [("docs/x.py", False), ("README.md", False), ("tests/test_x.py", False), ("fastloop/x.py", True),
     ("csrc/cpu/step.cpp", True), ("pyproject.toml", True), ("benchmarks/perf_cases.py", True)],
)  # fmt: skip
def test_what_runs(path: str, answer: bool) -> None:
    assert ci.runs(path) is answer


# ---- floors


def test_the_committed_floors_cover_every_small_case() -> None:
    assert {case.name for case in cases.CASES if case.small} <= set(floors.load(ROOT / "benchmarks" / "floors.json"))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{}",
        '{"schema": "fastloop-floors/1", "floors": {}}',
        '{"schema": "fastloop-floors/2"}',
        '{"schema": "fastloop-floors/2", "floors": {"a": "b"}}',
        '{"schema": "fastloop-floors/2", "floors": {"a": {"ratio": 3}}}',
        '{"schema": "fastloop-floors/2", "floors": {"a": -1}}',
    ],
)
def test_bad_floors(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "floors.json").write_text(text)
    with pytest.raises(floors.NoFloors):
        floors.load(tmp_path / "floors.json")


def test_floors_of_fastloops_own_cases(quick: None) -> None:
    found = floors.own({"tiny": 1e-6}, silent, (TINY, replace(TINY, name="large", small=False)))
    assert [(each.case, each.verdict, each.wrong) for each in found] == [
        ("tiny", Verdict.PASS, False), ("control (torch-fused)", Verdict.PASS, False), ("large", None, False),
    ]  # fmt: skip
    assert "agrees with the reference" in found[2].note
    below = floors.own({"tiny": 1e6}, silent, (TINY,))
    assert below[0].verdict is Verdict.REGRESSED
    with pytest.raises(floors.NoFloors, match="tiny"):
        floors.own({}, silent, (TINY,))


def test_a_wrong_result_is_found_whether_timed_or_not(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fastloop.AdamW
    monkeypatch.setattr(fastloop, "AdamW", lambda tensors, **options: original(tensors, **{**options, "lr": 2e-3}))
    found = floors.own({"tiny": 1e-6}, silent, (TINY, replace(TINY, name="large", small=False)))
    assert [each.case for each in found if each.wrong] == ["tiny", "large"]


def taking(*runs: list[float]) -> tuple[floors.Take, list[tuple[int, ...]]]:
    """A measurement that finds these ratios one after the other, and the pairs that it was asked for."""
    asked: list[tuple[int, ...]] = []

    def take(pairs: Any, floor: float | None, seconds: float) -> Ratio:
        ratios = runs[len(asked)]
        asked.append(tuple(pairs))
        return Ratio("a", "b", None, stats.median_interval(ratios) if ratios else None, ratios=ratios)

    return take, asked


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([[1.0] * 20, [3.0] * 40], Verdict.INCONCLUSIVE),
        ([[1.92] * 20, [1.92] * 40], Verdict.REGRESSED),  # 4 % below, surely
        ([[1.0] * 20, [1.0] * 39], Verdict.INCONCLUSIVE),  # the rerun was cut short
        ([[1.0] * 20, []], Verdict.INCONCLUSIVE),  # or could not be taken
        ([[1.9, 2.1] * 10], Verdict.INCONCLUSIVE),
        ([[2.05] * 20], Verdict.PASS),
    ],
)
def test_a_ratio_regresses_if_two_runs_are_surely_below_the_floor(runs: list[list[float]], verdict: Verdict) -> None:
    take, asked = taking(*runs)
    assert floors.judged(take, 2.0).verdict is verdict
    assert asked == [stats.PAIRS, (stats.RERUN_PAIRS,)][: len(runs)]


def test_pairs_are_taken_while_the_floor_is_in_the_interval(
    project: Path, known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def measured(theirs: Any, ours: Any, *, decided: Any, **options: Any) -> Any:
        seen.append(decided(stats.Interval(2.0, 1.9, 2.1)))
        return measure.Pairs((2.0,) * 40, (1.0,) * 40, (1, 1), "limit")

    monkeypatch.setattr(measure, "measure_pairs", measured)
    case, peer = UserCase("a", lambda: None, peer="b", bytes=3 * 10**9), UserCase("b", lambda: None)
    for floor in (2.0, 1.0):
        floors.users([case, peer], {"a": floor}, silent)
    assert seen[0] is False
    assert seen[-1] is True
    assert floors.users([case, peer], {}, silent)[0].note == "3 GB/s"


def test_of_a_void_run_no_ratio_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_with(control: Verdict | None) -> Ratio:
        take, _ = taking([1.0] * 20, [1.0] * 40, [1.0] * 20, [1.0] * 40)
        monkeypatch.setattr(floors, "control", lambda tell: Ratio("control", "itself", control))
        return floors._with_control({"a": (take, 2.0)}, silent)[0]

    assert run_with(Verdict.PASS).verdict is Verdict.REGRESSED
    assert run_with(Verdict.VOID).verdict is Verdict.VOID
    assert run_with(None).verdict is Verdict.INCONCLUSIVE


def test_a_control_without_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloop.bench.runner.lacking_memory", lambda case: "needs more memory")
    found = floors.control(silent, TINY)
    assert (found.verdict, found.note) == (None, "needs more memory")


# ---- counts that only fastloop has


def test_launches_of_the_emulated_kernels(tmp_path: Path) -> None:
    if not (ROOT / ci.EMULATED).exists():
        pytest.skip("needs the emulated kernels: make emulated")
    found = ci.emulated_launches(ROOT / ci.EMULATED)
    assert [(each.what, each.value) for each in found] == [("kernel launches", 2), ("copies to the device", 0)]


def test_faults_of_gpu_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, compilers = ci.aot.load(ci.aot.GOLDEN)
    monkeypatch.setattr(ci.aot, "measure", lambda backends, architectures: (golden, compilers))
    assert (ci.kernel_faults().value, ci.kernel_faults().failed) == (0, False)
    name, code = next(iter(golden.items()))
    spilled = {**golden, name: replace(code, local=16)}
    monkeypatch.setattr(ci.aot, "measure", lambda backends, architectures: (spilled, compilers))
    found = ci.kernel_faults()
    assert (found.value, found.failed) == (1, True)
    assert "spills" in found.note
    fewer = {key: replace(code, loads_128=code.loads_128 - 1) for key, code in golden.items()}
    monkeypatch.setattr(ci.aot, "measure", lambda backends, architectures: (fewer, {**compilers, "nvcc": "1.0"}))
    assert "only spills" in ci.kernel_faults().note


def test_without_compilers_the_kernels_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backends: Any, architectures: Any) -> Any:
        raise ci.aot.Unavailable("no nvcc here")

    monkeypatch.setattr(ci.aot, "measure", refuse)
    assert ci.kernel_faults() == Count(
        "GPU kernels", "faults in machine code", None, allowed=0, note="no nvcc here"
    )  # fmt: skip


# ---- the workflow


def workflows() -> dict[str, str]:
    """fastloop's own, and the one that docs/guarding.md gives to others."""
    page = (ROOT / "docs" / "guarding.md").read_text(encoding="utf-8")
    ready = page.split("```yaml\n")[1].split("```")[0]
    return {"own": (ROOT / ".github" / "workflows" / "perf.yml").read_text(encoding="utf-8"), "ready": ready}


@pytest.mark.parametrize("name", ["own", "ready"])
def test_the_workflow(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    text = workflows()[name]
    document = yaml.safe_load(text)
    assert "pull_request" in document[True]  # YAML 1.1 reads `on` so
    assert document["permissions"] == {"contents": "read"}
    job, comment = document["jobs"]["guard"], document["jobs"]["comment"]
    assert "permissions" not in job
    assert comment["permissions"] == {"pull-requests": "write"}
    steps = job["steps"]
    assert steps[0]["with"] == {"fetch-depth": 0, "persist-credentials": False}
    (guard,) = [step for step in steps if "fastloop.bench ci" in step.get("run", "")]
    assert "--base HEAD^1" in guard["run"]  # of the merge: the event's base may be older
    assert 'exit "$code"' in guard["run"]
    assert job["outputs"]["code"] == f"${{{{ steps.{guard['id']}.outputs.code }}}}"
    assert all("${{" not in step.get("run", "") for step in steps)
    assert "head.repo.full_name == github.repository" in comment["if"]
    assert "!cancelled()" in comment["if"]
    assert all("checkout" not in step["uses"] for step in comment["steps"])
    script = comment["steps"][-1]["with"]["script"]
    assert "report.md" in script
    assert "No report" in script


# ---- files of pytest-benchmark


def saved(path: Path, machine: str = "one", **times: float) -> Path:
    """A file with a benchmark for each name; its rounds are spread by 1 %. "control" is one."""
    rows = [
        {
            "fullname": f"test_x.py::test_{name}",
            "extra_info": {"control": name == "control"},
            "stats": {"data": [seconds * (1 + 0.01 * (i % 7 - 3) / 3) for i in range(200)]},
        }
        for name, seconds in times.items()
    ]
    machine_info = {"cpu": {"brand_raw": machine}, "python_version": "3.11.7", "node": str(path)}
    path.write_text(json.dumps({"machine_info": machine_info, "benchmarks": rows, "version": "5"}))
    return path


def compared(*arguments: Path | str) -> int:
    return cli.main(["compare", *map(str, arguments)])


def test_unpaired_times_regress_only_with_a_control_and_a_second_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = saved(tmp_path / "a.json", step=1e-3, control=1e-3)
    slow, again = (
        saved(tmp_path / "b.json", step=1.2e-3, control=1e-3),
        saved(tmp_path / "c.json", step=1.2e-3, control=1e-3),
    )
    assert compared(before, before) == 0
    assert "PASS" in capsys.readouterr().out
    assert compared(before, slow) == 0
    assert "INCONCLUSIVE" in capsys.readouterr().out
    assert compared(before, slow, "--confirm", again) == 1
    assert "REGRESSED" in capsys.readouterr().out
    same = saved(tmp_path / "d.json", step=1e-3, control=1e-3)
    assert compared(slow, before, "--confirm", same) == 0
    assert "IMPROVED" in capsys.readouterr().out
    assert compared(before, slow, "--confirm", same) == 0  # the second run does not agree


def test_what_confirms_is_a_run_of_its_own_with_a_control_and_enough_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = saved(tmp_path / "a.json", step=1e-3, control=1e-3)
    slow = saved(tmp_path / "b.json", step=1.2e-3, control=1e-3)
    copy = tmp_path / "copy.json"
    copy.write_bytes(slow.read_bytes())
    for same in (before, slow, copy):
        assert compared(before, slow, "--confirm", same) == 2
    assert "the same" in capsys.readouterr().err
    assert compared(before, slow, "--confirm", saved(tmp_path / "bare.json", step=1.2e-3)) == 0
    short = saved(tmp_path / "short.json", step=1.2e-3, control=1e-3)
    document = json.loads(short.read_text())
    for each in document["benchmarks"]:
        del each["stats"]["data"][4:]
    short.write_text(json.dumps(document))
    assert compared(before, slow, "--confirm", short) == 0


def test_without_a_control_nothing_regresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, slow = saved(tmp_path / "a.json", step=1e-3), saved(tmp_path / "b.json", step=2e-3)
    assert compared(before, slow, "--confirm", saved(tmp_path / "c.json", step=2e-3)) == 0
    assert "INCONCLUSIVE" in capsys.readouterr().out


def test_a_moved_control_or_another_machine_is_void(tmp_path: Path) -> None:
    before = saved(tmp_path / "a.json", step=1e-3, control=1e-3)
    assert compared(before, saved(tmp_path / "b.json", step=1.2e-3, control=1.05e-3)) == 4
    assert compared(before, saved(tmp_path / "c.json", "two", step=1e-3, control=1e-3)) == 4


def test_bad_files_of_pytest_benchmark(tmp_path: Path) -> None:
    good, bare = saved(tmp_path / "a.json", step=1e-3), tmp_path / "bare.json"
    document = json.loads(good.read_text())
    del document["benchmarks"][0]["stats"]["data"]
    bare.write_text(json.dumps(document))
    assert compared(good, bare) == 2
    assert compared(tmp_path / "none.json", good) == 5
    assert compared(good, tmp_path / "none.json") == 2
    assert compared(good, saved(tmp_path / "other.json", another=1e-3)) == 5
    with pytest.raises(pytest_json.BadResult, match="--benchmark-save-data"):
        pytest_json.load(bare)


def test_blocks_hold_every_round() -> None:
    assert pytest_json.blocks([3.0]) == [3.0]
    assert pytest_json.blocks(list(map(float, range(7)))) == list(map(float, range(7)))
    found = pytest_json.blocks([1.0] * 100 + [2.0] * 100)
    assert found == [1.0] * 20 + [2.0] * 20
