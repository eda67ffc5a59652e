# SPDX-License-Identifier: Apache-2.0
"""The result file, the report and the plots, from runs that are made up."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastloop.bench import compare, env, plots, report, results, stats
from fastloop.bench.results import BadResult, Row, Run
from fastloop.bench.stats import Verdict

MEMORY = {"resident_bytes": 2**30, "transient_bytes": 2**20, "allocations": 0}
ENVIRONMENT: dict[str, Any] = {
    "cpu": "made up", "cores": 2, "threads": 2, "torch": "2.13.0", "isa": "avx2", "torch_isa": "AVX2",
    "memory_bytes": 2**34, "available_bytes": 2**33, "load": 0.1, "backends": {"cpu": "available"},
    "fastloop": "0.1.0", "commit": "0123456789ab",
}  # fmt: skip


def made_up_row(case: str = "mlp", ratio: float = 2.0, group: str = "clip+step") -> Row:
    """A row whose 20 ratios are `ratio`, give or take half a percent."""
    ratios = [ratio * (1 + (index % 11 - 5) * 1e-3) for index in range(20)]
    return Row(
        case=case, peer="torch-fused", group=group, title=case.upper(), tensors=6, elements=1000, dtype="float32",
        threads=2, bytes=32_000, ratios=ratios, ratio=stats.median_interval(ratios), stopped="decided",
        ours_seconds=[1e-5] * 20, peer_seconds=[1e-5 * each for each in ratios], repetitions=(1000, 2000),
        ceiling=stats.Interval(0.9, 0.88, 0.93), ceiling_gbps=20.0, ceiling_method="native", goal=1.6,
        ours_memory=MEMORY, peer_memory=MEMORY,
    )  # fmt: skip


def made_up_run(*rows: Row, control: float = 1.0) -> Run:
    options = {"name": "full", "pattern": None}
    return Run(
        "2026-01-02T03:04:05+00:00", dict(ENVIRONMENT), options, [*rows, made_up_row("control", control, "control")]
    )


def text_of(run: Run, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report.render(run))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("compact", [False, True])
def test_a_result_survives_its_file(compact: bool, tmp_path: Path) -> None:
    run = made_up_run(made_up_row())
    results.save(run, tmp_path / "deep" / "result.json", compact=compact)
    again = results.load(tmp_path / "deep" / "result.json")
    assert again.rows[0].ratios == pytest.approx(run.rows[0].ratios, rel=1e-4)
    assert again.rows[0].ratio is not None
    assert again.rows[0].ratio.low == pytest.approx(run.rows[0].ratio.low, rel=1e-4)  # type: ignore[union-attr]
    assert again.environment == run.environment
    assert len(again.rows[0].ours_seconds) == (1 if compact else 20)


def test_schema_of_the_file() -> None:
    document = json.loads(results.to_json(made_up_run(made_up_row())))
    assert document["schema"] == "fastloop-bench/1"
    assert {"created", "environment", "options", "rows", "training", "seconds"} <= set(document)
    row = document["rows"][0]
    assert {"case", "peer", "status", "ratios", "ratio", "ours_seconds", "peer_seconds", "bytes", "threads"} <= set(row)
    assert set(row["ratio"]) == {"median", "low", "high"}
    assert len(row["ratios"]) == len(row["ours_seconds"]) == len(row["peer_seconds"])


def test_a_compact_file_of_all_cases_is_small() -> None:
    ratios = [1.23456789] * 80
    rows = [Row(**{**vars(made_up_row(f"case-{index}")), "ratios": ratios}) for index in range(30)]  # 6 cases, 5 peers
    assert len(results.to_json(made_up_run(*rows), compact=True)) < 50_000


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "other/1"}', '{"schema": "fastloop-bench/1", "rows": [{}]}']
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BadResult, match=r"other\.json"):
        results.load(path)


def test_report_says_ratio_goal_ceiling_and_memory() -> None:
    text = text_of(made_up_run(made_up_row(ratio=2.0), made_up_row("slow", ratio=1.1)))
    assert "2x" in text
    assert "1.6x reached" in text
    assert "1.6x MISSED" in text
    assert "90% of 20" in text
    assert "1 GiB" in text
    assert "control, torch against itself: 1.000" in text


def test_report_says_what_is_wrong_or_missing() -> None:
    wrong = Row("mlp", "torch-fused", "clip+step", "MLP", status="wrong", reason="exp_avg of tensor 3")
    skipped = Row("gpt2", "apex", "clip+step", "GPT-2", status="skipped", reason="apex is not installed")
    run = made_up_run(wrong, skipped, control=1.05)
    run.environment["load"] = 4.0
    for text in (text_of(run), report.markdown(run)):
        assert "WRONG RESULT, not timed: mlp/torch-fused: exp_avg of tensor 3" in text
        assert "skipped: gpt2/apex: apex is not installed" in text
        assert "VOID" in text
        assert "the machine was busy" in text
    assert run.wrong


def test_a_void_run_judges_no_goal() -> None:
    text = text_of(made_up_run(made_up_row(ratio=1.1), control=0.9))
    assert "1.6x (void)" in text
    assert "MISSED" not in text


def test_markdown_has_a_table_and_the_plots() -> None:
    text = report.markdown(made_up_run(made_up_row()), ["ratios.png"])
    assert "| mlp | torch-fused | 2x |" in text
    assert "![ratios.png](ratios.png)" in text
    assert "- cpu: made up" in text


@pytest.mark.parametrize(("value", "wanted"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (1e-5, "10 us"), (5e-8, "50 ns")])
def test_seconds(value: float, wanted: str) -> None:
    assert report.seconds(value) == wanted


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra fastloop[plots]")
    run = made_up_run(made_up_row())
    run.training = {"losses": {"torch": [3.0, 2.0], "fastloop": [3.0, 2.0], "bound": [1e-5, 1e-5]}}
    names = plots.write(run, tmp_path)
    assert names == ["ratios.png", "bandwidth.png", "loss.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(plots, "import_module", missing)
    with pytest.raises(plots.MissingExtra, match=r"fastloop\[plots\]"):
        plots.write(made_up_run(made_up_row()), tmp_path)


@pytest.mark.parametrize(
    ("after", "rerun", "wanted", "code"),
    [
        (2.0, None, Verdict.PASS, 0),
        (1.6, 1.6, Verdict.REGRESSED, 1),
        (1.6, 2.0, Verdict.INCONCLUSIVE, 0),
        (1.6, None, Verdict.INCONCLUSIVE, 0),
        (2.6, 2.6, Verdict.IMPROVED, 0),
    ],
)
def test_compare(after: float, rerun: float | None, wanted: Verdict, code: int) -> None:
    ratios = made_up_row(ratio=rerun).ratios if rerun else None
    judged = compare.compare(made_up_run(made_up_row()), made_up_run(made_up_row(ratio=after)), lambda row: ratios)
    assert [each.verdict for each in judged] == [wanted]
    assert compare.exit_code(judged) == code


def test_compare_is_void_when_a_control_moved_and_lacks_a_baseline_without_common_rows() -> None:
    before, moved = made_up_run(made_up_row()), made_up_run(made_up_row(ratio=1.0), control=1.03)
    judged = compare.compare(before, moved, lambda row: row.ratios)
    assert [each.verdict for each in judged] == [Verdict.VOID]
    assert compare.exit_code(judged) == 4
    judged = compare.compare(before, made_up_run(made_up_row("another")), lambda row: row.ratios)
    assert compare.exit_code(judged) == 5


def test_environment_names_no_host_and_compares_what_matters() -> None:
    here = env.environment().as_dict()
    assert {"cpu", "threads", "isa", "torch", "fastloop", "python", "commit", "memory_bytes"} <= set(here)
    assert not {"host", "user", "node"} & set(here)
    assert env.same_machine(here, {**here, "load": 9.0, "available_bytes": 1})
    assert not env.same_machine(here, {**here, "threads": 64})
    assert env.same_build({"fastloop": "1", "commit": "a"}, {"fastloop": "1", "commit": "a"})
    assert not env.same_build({"fastloop": "1", "commit": "a-dirty"}, {"fastloop": "1", "commit": "a-dirty"})
