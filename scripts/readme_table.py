# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of CPU results from a committed result file, so that no figure is typed by hand.

python scripts/readme_table.py            rewrite them from the newest files in benchmarks/results: in README.md that of
                                          the step, in docs/benchmarking.md that of whole training loops
python scripts/readme_table.py --check    fail if a page is not what that would write
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md", "<!-- table: python scripts/readme_table.py -->\n", "<!-- end -->"
LOOPS = (
    ROOT / "docs" / "benchmarking.md",
    "<!-- loop table: python scripts/readme_table.py -->\n",
    "<!-- loop end -->",
)
SCHEMA = "fastloop-bench/1"
PEERS = {"torch-fused": "`clip_grad_norm_` + `AdamW(fused=True)`", "torch-default": "`clip_grad_norm_` + `AdamW()`"}


def newest(*, of_loops: bool) -> Path:
    """The result file that was created last, by its own account, of those with rows of whole loops or of the step."""
    created = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        run = json.loads(path.read_text())
        if run.get("schema") != SCHEMA:  # of another kind: the claims
            continue
        if any((row["group"] == "loop") == of_loops for row in run["rows"] if row["group"] != "control"):
            created[path] = str(run["created"])
    if not created:
        raise SystemExit("readme_table: no such result file in benchmarks/results")
    return max(created, key=created.__getitem__)


def table(path: Path) -> str:
    """Markdown of the rows against PEERS, with what they were measured on."""
    run: dict[str, Any] = json.loads(path.read_text())
    lines = ["| clip + step | against | times as fast | 98 % interval | goal |", "| --- | --- | --- | --- | --- |"]
    for row in run["rows"]:
        if row["status"] != "ok" or row["peer"] not in PEERS or row["group"] in ("control", "loop"):
            continue
        ratio, goal = row["ratio"], row["goal"]
        verdict = "" if goal is None else f"{goal:g}, {'reached' if ratio['median'] >= goal else 'not reached'}"
        figures = f"{ratio['median']:.2f} | {ratio['low']:.2f} to {ratio['high']:.2f}"
        lines.append(f"| {row['title']} | {PEERS[row['peer']]} | {figures} | {verdict} |")
    return "\n".join([*lines, "", source(run, path, README[0])]) + "\n"


def loop_table(path: Path) -> str:
    """Markdown of whole loops: the part of the peer's time that ours takes, or what it takes more."""
    run: dict[str, Any] = json.loads(path.read_text())
    rows = [row for row in run["rows"] if row["group"] == "loop" and row["status"] == "ok"]
    if not rows:
        return "Not yet measured.\n"
    lines = [
        "| training | against | ours takes of its time | 98 % interval | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio, goal, verdict = row["ratio"], row["goal"], ""
        figures = f"{1 / ratio['median']:.2f} | {1 / ratio['high']:.2f} to {1 / ratio['low']:.2f}"
        if goal is not None:
            verdict = f"at most {1 / goal:.2f}, {'reached' if ratio['median'] >= goal else 'not reached'}"
        if row["cost_goal"] is not None:
            low, middle, high, goal = (
                1e6 * x for x in (*map(row["cost"].get, ("low", "median", "high")), row["cost_goal"])
            )
            figures = f"{middle:.0f} µs more | {low:.0f} to {high:.0f} µs"
            verdict = f"under {goal:.0f} µs, {'reached' if middle <= goal else 'not reached'}"
        lines.append(f"| {row['title']} | {row['peer']} | {figures} | {verdict} |")
    return "\n".join([*lines, "", source(run, path, LOOPS[0])]) + "\n"


def source(run: dict[str, Any], path: Path, page: Path) -> str:
    """What the figures were measured on, and a link to them."""
    env, link = run["environment"], os.path.relpath(path, page.parent)
    return (
        f"{env['cpu']}, {env['threads']} threads, {env['isa']}, torch {env['torch']}, fastloop {env['fastloop']} at "
        f"commit {str(env['commit'])[:12]}: [{path.name}]({link}), medians of paired runs."
    )


def main() -> None:
    tables = ((README, table(newest(of_loops=False))), (LOOPS, loop_table(newest(of_loops=True))))
    for (page, begin, end), written in tables:
        text = page.read_text()
        head, rest = text.split(begin)
        wanted = head + begin + written + end + rest.split(end, 1)[1]
        if "--check" not in sys.argv[1:]:
            page.write_text(wanted)
        elif wanted != text:
            raise SystemExit(f"readme_table: {page.name} is not what its result file says; run scripts/readme_table.py")


if __name__ == "__main__":
    main()
