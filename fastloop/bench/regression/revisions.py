# SPDX-License-Identifier: Apache-2.0
"""`ab` from its arguments to its report: which cases, which builds, what was found."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter

from fastloop.bench import env, stats
from fastloop.bench.regression import ab, builds
from fastloop.bench.regression.ab import CaseFile, Progress, Sides
from fastloop.bench.regression.record import Change, Report

OWN_CASES = Path("benchmarks") / "perf_cases.py"
KEPT_BUILDS = 6


class WrongUse(Exception):
    """A request that cannot be served; the text says what to pass."""


@dataclass(frozen=True)
class Asked:
    """What to compare and how. cases: module or file, None for fastloop's own in a checkout of fastloop."""

    base: str
    head: str | None = None  # None: the working tree
    cases: str | None = None
    pattern: str | None = None
    pairs: tuple[int, ...] = stats.PAIRS
    rerun: bool = True
    install: bool = True
    seconds: float = ab.SECONDS  # for measuring; building comes on top

    def wanted(self, name: str) -> bool:
        """Whether a case of this name is to be measured."""
        return self.pattern is None or self.pattern in name or fnmatch.fnmatch(name, self.pattern)


def case_file(cases: str | None, folder: Path) -> CaseFile:
    """Where the cases are, in a folder of sources.

    Raises:
        WrongUse: no such file, or none named in a project that is not fastloop.
    """
    if cases is None:
        project = folder / "pyproject.toml"
        own = project.exists() and re.search(r'^name = "fastloop"$', project.read_text(encoding="utf-8"), re.MULTILINE)
        if not own:
            raise WrongUse("[bench] which cases? pass --cases MODULE, e.g. --cases mypkg.perf")
        cases = str(OWN_CASES)
    if cases.endswith(".py"):
        places, module = [folder / cases], Path(cases).stem
    else:
        below = Path(*cases.split("."))
        places = [top / below.with_suffix(".py") for top in (folder, folder / "src")]
        places += [place.with_suffix("") / "__init__.py" for place in places]
        module = cases
    for place in places:
        if place.is_file():
            return CaseFile(place, module)
    raise WrongUse(f"[bench] there are no cases {cases!r} in {folder}; looked for {', '.join(map(str, places))}")


def prepare(asked: Asked, cache: Path, tell: Progress, folder: Path | None = None) -> Sides:
    """Both builds. `folder`: somewhere in the project's checkout; default: the current one.

    Raises:
        WrongUse, BuildError.
    """
    repository = builds.repository_of(folder or Path.cwd())
    made = {}
    for side, name in (("base", asked.base), ("head", asked.head)):
        tell(f"building {side}: {name or 'working tree'}", 0)
        made[side] = builds.build(repository, name, cache, asked.install)
    builds.keep_newest(cache, KEPT_BUILDS)
    return Sides(made["base"], made["head"], case_file(asked.cases, made["head"].source), repository)


def measure(asked: Asked, sides: Sides, tell: Progress) -> list[Change]:
    """Every case's change."""
    return ab.compare(sides, tell, pairs=asked.pairs, wanted=asked.wanted, rerun=asked.rerun, seconds=asked.seconds)


def run(asked: Asked, cache: Path, tell: Progress, folder: Path | None = None) -> Report:
    """Build, measure, judge.

    Args:
        cache: folder of builds.
        folder: somewhere in the project's checkout; default: the current one.

    Raises:
        WrongUse, BuildError, NoCases.
    """
    start = perf_counter()
    sides = prepare(asked, cache, tell, folder)
    found = Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=env.environment().as_dict(),
        head=sides.head.commit,
        base=sides.base.commit,
        changes=measure(asked, sides, tell),
    )
    if sides.base.tree == sides.head.tree:
        found.notes.append("base and head are the same sources")
    found.seconds = perf_counter() - start
    return found
