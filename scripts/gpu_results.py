# SPDX-License-Identifier: Apache-2.0
"""Writes docs/gpu-results.md and the README's GPU table from committed result files: no figure is typed by hand.

python scripts/gpu_results.py            rewrite both from the newest file of each device in benchmarks/results
python scripts/gpu_results.py --check    fail if they are not what that would write
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastloop.bench.gpu_record import CONTROL, SPECS, GpuRow, GpuRun, Spec, load, slug

ROOT = Path(__file__).resolve().parent.parent
PAGE, README, RESULTS = ROOT / "docs" / "gpu-results.md", ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- gpu table: python scripts/gpu_results.py -->\n", "<!-- gpu end -->"
NOT_YET = "not yet measured"

INTRODUCTION = """# GPU results

Written by `scripts/gpu_results.py` from the newest result file of each device; `make gpu` writes such a file.

How the figures come about: both sides run in one process on the same shapes, are compared with a reference before they
are timed, and are timed in turn (A B B A); a figure is the median of the paired ratios with its 98 % bootstrap interval
([benchmarking.md](benchmarking.md#statistics)). "Times as fast" is the peer's time over ours. The clock is that of the
device (events around the step) or of the host (wall clock until the device is done, Python included). Cold: the data do
not fit the L2 cache, or are rotated through more copies than fit. The ceiling is the best that this device moved in the
same run: a copy, a triad, or as many streams as clip + AdamW has.
"""


def runs(results: Path = RESULTS) -> list[GpuRun]:
    """The newest run of each device, by its own account. Stops at a file that must not be committed."""
    newest: dict[str, GpuRun] = {}
    for path in sorted(results.glob("*/*.json")):
        run = load(path)
        if run.commit.endswith("-dirty") or run.commit == "unknown":
            raise SystemExit(f"gpu_results: {path} is of commit '{run.commit}': only a clean commit's result counts")
        if run.void:
            raise SystemExit(f"gpu_results: {path} is void: its control moved by more than 2 %; measure again")
        if run.device not in newest or run.created > newest[run.device].created:
            newest[run.device] = run
    return [newest[device] for device in sorted(newest)]


def _reached(value: float, goal: float | None) -> str:
    return "" if goal is None else f"{'reached' if value >= goal else 'not reached'}"


def _goals(spec: Spec) -> str:
    goals = [f"{spec.goal:.3g}x"] if spec.goal is not None else []
    goals += (
        [f"{spec.ceiling_goal:.0%}".replace("%", " %") + " of the ceiling"] if spec.ceiling_goal is not None else []
    )
    return ", ".join(goals)


def _found(run: GpuRun | None, spec: Spec) -> GpuRow | None:
    return next((row for row in run.rows if row.name == spec.name), None) if run else None


def _figures(spec: Spec, row: GpuRow | None) -> str:
    """Ratio, whether it reached its goal, GB/s and part of the ceiling: three cells."""
    if row is None or row.status != "ok" or row.ratio is None:
        reason = f": {row.reason}" if row is not None and row.reason else ""
        return f"{NOT_YET}{reason} | | "
    ratio = f"{row.ratio.median:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})"
    top = verdict = ""
    if row.ceiling is not None:
        top = f"{row.gbps:.0f} GB/s, {100 * row.ceiling.median:.0f} % of {row.ceiling_kind}"
        verdict = _reached(row.ceiling.median, spec.ceiling_goal)
    verdicts = ", ".join(filter(None, (_reached(row.ratio.median, spec.goal), verdict)))
    return f"{ratio} | {top} | {verdicts}"


def _table(run: GpuRun | None) -> str:
    lines = [
        "| work | against | cache | clock | goal | times as fast | bandwidth | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for spec in SPECS:
        if spec.name == CONTROL:
            continue
        what = f"{spec.title} | {spec.peer} | {spec.cache} | {spec.clock} | {_goals(spec)}"
        lines.append(f"| {what} | {_figures(spec, _found(run, spec))} |")
    return "\n".join(lines) + "\n"


def _device(run: GpuRun) -> str:
    where, loaded = run.environment, run.clocks.get("loaded", {})
    ceilings = ", ".join(f"{name} {top['gbps']:.0f} GB/s" for name, top in run.ceilings.items())
    states = "; ".join(
        f"{when} {state.get('clocks.sm', '?')} SM, {state.get('clocks.mem', '?')} memory, "
        f"throttled by {', '.join(state.get('throttling', ['?'])) or 'nothing'}"
        for when, state in run.clocks.items()
    )
    control = next((row.ratio for row in run.rows if row.name == CONTROL), None)
    noise = f"{control.median:.3f} ({control.low:.3f} to {control.high:.3f})" if control else NOT_YET
    name = f"{slug(run.device)}/{slug(run.commit)}.json"
    return (
        f"\n## {run.device}\n\n"
        f"Commit {run.commit}, {run.created}: [{name}](../benchmarks/results/{name}). torch {where.get('torch')}, CUDA "
        f"{where.get('torch_cuda')}, driver {loaded.get('driver_version', '?')}, Triton {where.get('triton')}, Python "
        f"{where.get('python')}.\n\nCeilings: {ceilings}. Clocks: {states}. Torch against itself: {noise}.\n\n"
        f"{_table(run)}"
    )


def page(found: list[GpuRun]) -> str:
    """docs/gpu-results.md."""
    if not found:
        return f"{INTRODUCTION}\n## No device yet\n\n{_table(None)}"
    return INTRODUCTION + "".join(map(_device, found))


def readme_table(found: list[GpuRun]) -> str:
    """The rows with goals, of the device that was measured last."""
    run = max(found, key=lambda each: each.created) if found else None
    lines = ["| on a GPU | against | goal | times as fast |", "| --- | --- | --- | --- |"]
    title = ""
    for spec in SPECS:
        title = title if spec.title == "the same" else spec.title
        if spec.goal is None and spec.ceiling_goal is None:
            continue
        row = _found(run, spec)
        if row is None or row.status != "ok" or row.ratio is None:
            figure = NOT_YET
        else:
            figure = f"{row.ratio.median:.2f}"
            figure += f", {100 * row.ceiling.median:.0f} % of the ceiling" if row.ceiling is not None else ""
        lines.append(f"| {title} | {spec.peer} | {_goals(spec)} | {figure} |")
    where = f"{run.device}, commit {run.commit}. " if run else ""
    return "\n".join(lines) + f"\n\n{where}[All rows, and how they are measured](docs/gpu-results.md).\n"


def write(page_path: Path = PAGE, readme: Path = README, results: Path = RESULTS, *, check: bool) -> None:
    """Write both, or stop if they are not what would be written."""
    found = runs(results)
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"gpu_results: {readme.name} has no place for the table; put in {BEGIN!r} and {END!r}")
    head, rest = text.split(BEGIN)
    wanted = {page_path: page(found), readme: head + BEGIN + readme_table(found) + END + rest.split(END, 1)[1]}
    for path, content in wanted.items():
        if not check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"gpu_results: {path.name} is not what the result files say; run scripts/gpu_results.py")


if __name__ == "__main__":
    write(check="--check" in sys.argv[1:])
