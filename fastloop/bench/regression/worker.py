# SPDX-License-Identifier: Apache-2.0
"""A process that holds the cases of one build and times them when asked: JSON lines in, JSON lines out.

It runs as a script, in the environment of the build under test, which may be older than this file: it imports
nothing of fastloop by itself. The one who asks is `fastloop.bench.regression.process`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules must not hide the standard library's

import gc
import importlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from time import perf_counter_ns
from types import ModuleType
from typing import Any, TextIO


class Worker:
    """The cases of some files, prepared on demand.

    Args:
        usercases: file of `fastloop.bench.usercases`, of the build that asks.
    """

    def __init__(self, usercases: str) -> None:
        self._marks = load_file("_fastloop_usercases", usercases)
        self._cases: dict[str, Any] = {}
        self._calls: dict[str, Callable[[], Any]] = {}
        self._own = {Path(__file__).resolve(), Path(usercases).resolve()}  # not of the build, and need not be

    def load(self, file: str, module: str, outside: str) -> dict[str, Any]:
        """Import a file of cases under its name; names and titles of its cases.

        outside: a folder that no module may come from (the checkout, where the build is what is to be measured).
        """
        self._offer_decorator()
        found = self._marks.collect(load_file(module, file))
        self._own.add(Path(file).resolve())
        strays = [name for name in sorted(sys.modules) if _is_below(name, outside, self._own)]
        if strays:
            raise ImportError(f"{strays[0]} was imported from the checkout and not from the build; is it installed?")
        self._cases.update({each.name: each for each in found})
        return {"cases": [{"name": each.name, "title": each.title, "control": each.control} for each in found]}

    def _offer_decorator(self) -> None:
        """`fastloop.bench.case` for cases that import it where the build has none yet."""
        try:
            bench: Any = importlib.import_module("fastloop.bench")
        except ImportError:
            return  # a project without fastloop's bench: its file of cases says what it lacks
        if not hasattr(bench, "case"):
            bench.case = self._marks.case

    def prepare(self, case: str, check: bool) -> dict[str, Any]:
        """Set up, call once, check if asked to. Garbage is collected here, and not again while the case is timed."""
        gc.enable()
        try:
            self._calls[case] = self._marks.prepared(self._cases[case], check)
        except self._marks.CaseError as error:
            return {"error": str(error), "wrong": isinstance(error, self._marks.WrongCase)}
        gc.collect(1)
        gc.disable()
        return {}

    def sample(self, case: str, repetitions: int) -> dict[str, Any]:
        """Seconds per call over so many calls in a row."""
        call, finish = self._calls[case], _device_barrier()
        finish()
        start = perf_counter_ns()
        for _ in repeat(None, repetitions):
            call()
        finish()
        return {"seconds": (perf_counter_ns() - start) / repetitions * 1e-9}

    def drop(self, case: str) -> dict[str, Any]:
        """Free what a case holds."""
        self._calls.pop(case, None)
        gc.collect(1)
        return {}


def load_file(name: str, file: str) -> ModuleType:
    """Execute a file as the module of that name; its package, if it has one, is the build's."""
    parent = name.rpartition(".")[0]
    if parent:
        importlib.import_module(parent)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _is_below(name: str, folder: str, but: set[Path]) -> bool:
    where = getattr(sys.modules.get(name), "__file__", None)
    if not isinstance(where, str) or not os.path.isabs(where):  # torch.classes says "_classes.py"
        return False
    path = Path(where).resolve()
    if path in but or not path.is_relative_to(folder):
        return False
    if path.is_relative_to(sysconfig.get_path("stdlib")):  # an environment inside of the checkout
        return False
    return not {"site-packages", "dist-packages", ".fastloop"}.intersection(path.parts)


def _device_barrier() -> Callable[[], object]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.synchronize  # type: ignore[no-any-return]
    return lambda: None


def serve(requests: TextIO, answers: TextIO, usercases: str) -> None:
    """Answer until the requests end. What a case raises is an answer, not the end."""
    worker = Worker(usercases)
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    # Cases may print: what was stdout is for answers alone, and stdout is stderr from now on.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers, sys.argv[1])


if __name__ == "__main__":
    main()
