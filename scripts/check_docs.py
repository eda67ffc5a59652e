# SPDX-License-Identifier: Apache-2.0
"""Checks the Markdown pages: links resolve, Python blocks compile, and those of the pages in EXECUTED run.

A block marked `python needs=lightning` runs where that package can be imported; elsewhere the output says that it was
skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
PAGES_THAT_RUN = ["loop", "checkpoints", "debugging", "deploying", "distributed", "fine-tuning", "tuning"]
EXECUTED = {
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in PAGES_THAT_RUN),
    *ROOT.glob("docs/from-*.md"),
}

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```\s*$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    slugs: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number, name = 0, slug
        while name in slugs:
            number += 1
            name = f"{slug}-{number}"
        slugs.add(name)
    return slugs


def broken_links(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`", "", text)
    problems = []
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"^[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            problems.append(f"{page.relative_to(ROOT)}: link to '{link}': no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            problems.append(f"{page.relative_to(ROOT)}: link to '{link}': no such heading")
    return problems


def python_blocks(page: Path) -> list[tuple[int, str, list[str]]]:
    """(line, code, packages needed) of the fenced blocks marked `python`, at any indentation."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        info = re.fullmatch(r"python(?: needs=(?P<needs>[\w,]+))?", match["info"].strip())
        if info is not None:
            indent = len(match["indent"])
            code = "".join(line[indent:] if line.strip() else line for line in match["code"].splitlines(True))
            line = text.count("\n", 0, match.start("code")) + 1
            blocks.append((line, code, info["needs"].split(",") if info["needs"] else []))
    return blocks


def code_errors(page: Path) -> list[str]:
    problems = []
    for line, code, _ in python_blocks(page):
        try:
            compile("\n" * (line - 1) + code, str(page.relative_to(ROOT)), "exec")
        except SyntaxError as error:
            problems.append(f"{page.relative_to(ROOT)}:{error.lineno}: {error.msg}")
    return problems


def missing(needs: list[str]) -> list[str]:
    return [name for name in needs if not importable(name)]


@functools.cache
def importable(name: str) -> bool:
    """An installed package may not fit another one: torchvision is built for one torch."""
    if importlib.util.find_spec(name) is None:
        return False
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def run_errors(page: Path) -> list[str]:
    """Runs the page's blocks one after the other in one process, as a reader would type them."""
    code = "".join(f"{block}\n" for _, block, needs in python_blocks(page) if not missing(needs))
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "examples.py"
        script.write_text(code, encoding="utf-8")
        result = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, check=False)
    return [] if result.returncode == 0 else [f"{page.relative_to(ROOT)}: its examples fail:\n{result.stderr}"]


def skipped(page: Path) -> list[str]:
    return [
        f"{page.relative_to(ROOT)}:{line}: skipped, needs {', '.join(missing(needs))}"
        for line, _, needs in python_blocks(page)
        if page in EXECUTED and missing(needs)
    ]


def main() -> int:
    problems: list[str] = []
    for page in PAGES:
        problems += broken_links(page) + code_errors(page)
        if page in EXECUTED and not problems:
            problems += run_errors(page)
        print("".join(f"{line}\n" for line in skipped(page)), end="")
    print("\n".join(problems) or f"docs: {len(PAGES)} pages, links and examples are good")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
