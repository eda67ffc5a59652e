# SPDX-License-Identifier: Apache-2.0
"""`ci`: counts against committed values, ratios against floors, and the two revisions where there is a base."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from types import ModuleType

import torch

from fastloop.bench import aot, env, usercases
from fastloop.bench.regression import builds, callgrind, evidence, floors, revisions, worker
from fastloop.bench.regression.ab import CaseFile, NoCases, Sides
from fastloop.bench.regression.evidence import CountingError, Found, Place
from fastloop.bench.regression.record import Count, Ratio, Report
from fastloop.bench.regression.revisions import Asked
from fastloop.bench.runner import Progress

EVIDENCE = Path("benchmarks") / "evidence.json"
FLOORS = Path("benchmarks") / "floors.json"
EMULATED = Path("build") / "emulated" / "_cuda.so"
SECONDS = 120.0  # for timing both revisions
EMULATED_CASE, EMULATED_COUNTS = "step, CUDA backend, 100 tensors", ("kernel launches", "copies to the device")
OWN_INSTRUCTIONS = ("step-mlp", "step-300-tensors")  # of fastloop's cases; a project's own are all counted
# What never changes how a program runs: ab is left out where nothing else differs.
SILENT_SUFFIXES = (".md", ".rst", ".png", ".svg", ".html", ".css")
SILENT_FOLDERS = ("docs/", ".github/", ".ci/", "tests/", "test/", "benchmarks/results/")
SILENT_FILES = ("LICENSE", ".gitignore", "Makefile")


@dataclass(frozen=True)
class Request:
    """What `ci` is asked for.

    Args:
        base: revision to compare with, or None.
        cases: module or file; None: fastloop's own.
        floors, evidence: files; None: under benchmarks/ of the project.
        update: write what was counted into the file of evidence.
        install: False: the sources of both revisions are imported as they are.
        seconds: for timing both revisions.
        cache: folder of builds.
    """

    base: str | None = None
    cases: str | None = None
    floors: Path | None = None
    evidence: Path | None = None
    update: bool = False
    install: bool = True
    seconds: float = SECONDS
    cache: Path = Path(".fastloop") / "builds"


@dataclass
class Project:
    """Where things are: top of the checkout, or the current folder outside of one."""

    top: Path
    cases: CaseFile
    own: bool  # fastloop itself

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(str(each) for each in (self.top / "src", self.top) if each.is_dir())


@dataclass
class Guard:
    """One run of `ci`.

    Raises (from `run`):
        WrongUse, NoCases: no such cases. BuildError: no such base, or it does not build.
        NoEvidence, NoFloors: a file is missing, or says nothing about a case.
    """

    request: Request
    tell: Progress
    report: Report = field(init=False)

    def run(self) -> Report:
        start = perf_counter()
        project = _project(self.request.cases)
        rows = [] if self.request.update and not self._evidence(project).exists() else self._rows(project)
        limits = self._floors(project)
        module = None if project.own else _load(project)
        self.report = Report(
            datetime.now(timezone.utc).isoformat(timespec="seconds"), env.environment().as_dict(), _commit(project)
        )
        sides = self._sides(project)
        self._count(project, sides)
        where = {**evidence.places(), callgrind.WHAT: callgrind.where()}
        if project.own:  # what a step asks of a device is the same in every environment
            where |= {f"{EMULATED_CASE}: {what}": evidence.EVERYWHERE for what in EMULATED_COUNTS}
        if self.request.update:
            rows = evidence.updated(rows, self.report.counts, where)
            evidence.save(rows, self._evidence(project))
            self.report.notes.append(f"written: {self._evidence(project)}; commit it")
        evidence.judge(self.report.counts, rows, where, self._base_rows(project, sides))
        if module is None:
            self.report.ratios += floors.own(limits, self.tell)
        else:
            self.report.ratios += floors.users(usercases.collect(module), limits, self.tell)
        if sides is not None:
            self.report.changes = revisions.measure(self._asked(), sides, self.tell)
        self.report.seconds = perf_counter() - start
        return self.report

    # ---- files

    def _evidence(self, project: Project) -> Path:
        return self.request.evidence or project.top / EVIDENCE

    def _rows(self, project: Project) -> list[evidence.Allowed]:
        return evidence.load(self._evidence(project))

    def _floors(self, project: Project) -> dict[str, float]:
        path = self.request.floors or project.top / FLOORS
        # A project may set its floors beside its cases; a file that was named must be there.
        optional = self.request.floors is None and not project.own
        return {} if optional and not path.exists() else floors.load(path)

    # ---- the base

    def _sides(self, project: Project) -> Sides | None:
        """Both builds; None, with a note, where there is no base or nothing that runs differs from it."""
        if self.request.base is None:
            self.report.notes.append("no base: times were not compared; pass --base REF")
            return None
        repository = builds.repository_of(project.top)
        builds.hide(self.request.cache)
        self.report.base, base_tree = builds.revision(repository, self.request.base)
        self.report.head, head_tree = builds.revision(repository, None)
        changed = builds.changed_files(repository, base_tree, head_tree)
        if not any(map(runs, changed)):
            what = f"{len(changed)} files differ" if changed else "base and head are the same sources"
            self.report.notes.append(f"times were not compared: nothing that runs differs from the base ({what})")
            return None
        return revisions.prepare(self._asked(), self.request.cache, self.tell)

    def _asked(self) -> Asked:
        wanted = self.request
        return Asked(str(wanted.base), cases=wanted.cases, install=wanted.install, seconds=wanted.seconds)

    def _base_rows(self, project: Project, sides: Sides | None) -> list[evidence.Allowed] | None:
        """The values that the base has committed; None where they cannot be known."""
        path = self._evidence(project).resolve()
        if sides is None or not path.is_relative_to(project.top.resolve()):
            return None
        try:
            return evidence.load(sides.base.source / path.relative_to(project.top.resolve()))
        except evidence.NoEvidence:
            return []

    # ---- counts

    def _count(self, project: Project, sides: Sides | None) -> None:
        head = Place(project.cases, project.path)
        base = None
        if sides is not None:
            outside = str(sides.checkout)
            head = Place(sides.cases, sides.head.path, outside)
            base = Place(sides.cases, sides.base.path, outside)
        self.tell("counting calls, operators, allocations", 0)
        found, before = _both(evidence.count, head, base, self.report.notes)
        self.report.counts += evidence.counted(found, before)
        self.report.ratios += [
            Ratio(case, "its check", None, note=reason, wrong=True) for case, reason in found.wrong.items()
        ]
        self._note_device()
        self._instructions(project, head, base)
        if project.own:
            self.tell("GPU kernels: launches, machine code", 0)
            self.report.counts += own_counts(project.top)

    def _note_device(self) -> None:
        if not any(count.what in evidence.DEVICE for count in self.report.counts):
            reason = "no case works on the GPU" if torch.cuda.is_available() else "there is no GPU"
            self.report.notes.append(f"{' and '.join(evidence.DEVICE)} were not counted: {reason}")

    def _instructions(self, project: Project, head: Place, base: Place | None) -> None:
        reason = callgrind.unavailable()
        if reason is not None:
            self.report.notes.append(f"instructions were not counted: {reason}")
            return
        only = OWN_INSTRUCTIONS if project.own else ()
        self.tell("counting instructions", 0)
        try:
            found, before = _both(lambda place: callgrind.count(place, only), head, base, self.report.notes)
        except CountingError as error:
            self.report.notes.append(f"instructions were not counted: {error}")
            return
        self.report.counts += callgrind.counted(found, before)


def runs(path: str) -> bool:
    """Whether a changed file can change how the project runs."""
    return not (path.endswith(SILENT_SUFFIXES) or path.startswith(SILENT_FOLDERS) or path in SILENT_FILES)


def _both(
    count: Callable[[Place], Found], head: Place, base: Place | None, notes: list[str]
) -> tuple[Found, Found | None]:
    """Counts of head and of base, at the same time. A base that cannot be counted is a note."""
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(count, base) if base is not None else None
        found = pool.submit(count, head).result()
        try:
            return found, before.result() if before else None
        except CountingError as error:
            notes.append(f"nothing was counted in the base: {error}")
            return found, None


def _commit(project: Project) -> str:
    try:
        return builds.checkout(builds.repository_of(project.top))
    except builds.BuildError:
        return "no commit"


def _project(cases: str | None) -> Project:
    """Raises WrongUse: no such cases."""
    try:
        top = builds.repository_of(Path.cwd())
    except builds.BuildError:
        top = Path.cwd()
    return Project(top, revisions.case_file(cases, top), cases is None)


def _load(project: Project) -> ModuleType:
    """The module of cases, in this process. Raises NoCases with what it raised."""
    sys.path[:0] = [each for each in project.path if each not in sys.path]
    try:
        module = worker.load_file(project.cases.module, str(project.cases.file))
        usercases.collect(module)
    except Exception as error:
        known = isinstance(error, usercases.CaseError)
        raise NoCases(
            str(error) if known else f"[bench] {project.cases.module} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module


# ---- counts that only fastloop has


def own_counts(top: Path) -> list[Count]:
    """Launches of a step of the CUDA backend, and what the compilers made of its kernels."""
    return [*emulated_launches(top / EMULATED), kernel_faults()]


def emulated_launches(module: Path) -> list[Count]:
    """Launches and copies of a step, by the emulated kernels: what a step asks of a device needs no device."""
    import fastloop
    from fastloop.ops import cuda

    case, kinds = EMULATED_CASE, EMULATED_COUNTS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    emulate = device == "cpu" and not cuda.is_emulated()
    if emulate:
        if not module.exists():
            note = f"needs a GPU, or the emulated kernels: make emulated ({module.name} is not built)"
            return [Count(case, what, None, note=note) for what in kinds]
        spec = importlib.util.spec_from_file_location("_cuda", module)
        assert spec is not None
        assert spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        cuda.emulate(kernels)
    try:
        made = [torch.ones(64, device=device, requires_grad=True) for _ in range(100)]
        for each in made:
            each.grad = torch.ones_like(each)
        optimizer = fastloop.AdamW(made, lr=1e-3, max_grad_norm=1.0, backend="cuda")
        for _ in range(3):
            optimizer.step()
        with fastloop.count_launches() as seen:
            optimizer.step()
    finally:
        if emulate:
            cuda.emulate(None)
    return [Count(case, what, value) for what, value in zip(kinds, (seen.launches, seen.copies), strict=True)]


def kernel_faults() -> Count:
    """How many of the GPU kernels are worse than the golden file, or spill: at most none."""
    found = Count("GPU kernels", "faults in machine code", None, allowed=0)
    try:
        golden, known = aot.load(aot.GOLDEN)
        kernels, compilers = aot.measure(("cuda", "triton"), aot.ARCHITECTURES)
    except (aot.Unavailable, aot.NoGolden) as error:
        found.note = str(error)
        return found
    except aot.DoesNotCompile as error:
        found.value, found.failed, found.note = 1, True, str(error)
        return found
    chosen = {key: code for key, code in kernels.items() if aot.is_representative(key)}
    faults, worse = list(aot.faults(kernels)), list(aot.differences(chosen, golden))
    if worse and any(known.get(name) != version for name, version in compilers.items()):
        found.note = f"the golden file is of {known}, these kernels of {compilers}: only spills were judged"
        worse = []
    found.value = len(faults) + len(worse)
    found.failed = found.value > 0
    found.note = found.note or "; ".join((faults + worse)[:5])
    return found
