# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table from a committed result file, so that no figure is typed by hand.

python scripts/readme_table.py            rewrite the table from the newest file in benchmarks/results
python scripts/readme_table.py --check    fail if the README is not what that would write
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table: python scripts/readme_table.py -->\n", "<!-- end -->"
PEERS = {"torch-fused": "`clip_grad_norm_` + `AdamW(fused=True)`", "torch-default": "`clip_grad_norm_` + `AdamW()`"}


def newest() -> Path:
    """The result file that was created last, by its own account."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if not files:
        raise SystemExit("readme_table: no result file in benchmarks/results")
    return max(files, key=lambda path: str(json.loads(path.read_text())["created"]))


def table(path: Path) -> str:
    """Markdown of the rows against PEERS, with what they were measured on."""
    run: dict[str, Any] = json.loads(path.read_text())
    lines = ["| clip + step | against | times as fast | 98 % interval | goal |", "| --- | --- | --- | --- | --- |"]
    for row in run["rows"]:
        if row["status"] != "ok" or row["peer"] not in PEERS or row["group"] == "control":
            continue
        ratio, goal = row["ratio"], row["goal"]
        verdict = "" if goal is None else f"{goal:g}, {'reached' if ratio['median'] >= goal else 'not reached'}"
        figures = f"{ratio['median']:.2f} | {ratio['low']:.2f} to {ratio['high']:.2f}"
        lines.append(f"| {row['title']} | {PEERS[row['peer']]} | {figures} | {verdict} |")
    env = run["environment"]
    lines.append("")
    lines.append(
        f"{env['cpu']}, {env['threads']} threads, {env['isa']}, torch {env['torch']}, fastloop {env['fastloop']} at "
        f"commit {str(env['commit'])[:12]}: [{path.name}](benchmarks/results/{path.name}), medians of paired runs."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    written = head + BEGIN + table(newest()) + END + rest.split(END, 1)[1]
    if "--check" in sys.argv[1:]:
        if written != text:
            raise SystemExit("readme_table: README.md is not what its result file says; run scripts/readme_table.py")
        return
    readme.write_text(written)


if __name__ == "__main__":
    main()
