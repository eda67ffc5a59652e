# SPDX-License-Identifier: Apache-2.0
"""Imports and includes point down only. A new module is given its floor here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Modules directly under fastloop/. A module may import its own floor and those below. `fastloop` itself, the
# list of what the package exports, stands above what it exports: those modules never import the package.
PYTHON_FLOORS = {
    "_version": 0,
    "_native": 0,
    "_cuda": 0,
    "extras": 0,
    "findings": 0,
    "texts": 0,
    "drawing": 0,
    "triton_kernels": 0,
    "ops": 1,
    "machine": 2,
    "optim": 2,
    "clip": 2,
    "amp": 2,
    "schedules": 2,
    "monitor": 2,
    "fastloop": 3,
    "loop": 3,
    "checks": 3,
    "train": 4,
    "bench": 4,
    "tune": 4,
    "recipes": 4,
}

# Folders of csrc/. A folder may include itself and the floors below; cpu and cuda do not meet.
NATIVE_FLOORS = {"core": 0, "rules": 1, "cpu": 2, "cuda": 2, "bindings": 3, "tests": 4}
IMPORTING = ("import_module", "load_extension")  # functions that import the module that they are given
TORCH_INCLUDE = re.compile(r"^(torch|ATen|c10|caffe2|THC?)(/|\.h)")
PYTHON_INCLUDE = re.compile(r"^(pybind11/|Python\.h)")


# ---- Python --------------------------------------------------------------------------------------


def unit_of(module: str) -> str:
    """fastloop.ops.plan -> ops; fastloop and fastloop.AdamW's home, the package itself -> fastloop."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "fastloop"


def imported_modules(module: str, is_package: bool, source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every fastloop module that a source imports, lazily too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join(kept + ([node.module] if node.module else []))
            # `from fastloop import clip` imports fastloop.clip; `from fastloop import AdamW` the package.
            names = [
                f"{base}.{alias.name}"
                if f"{base}.{alias.name}" in modules or (base, alias.name) == ("fastloop", "_native")
                else base
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTING) and node.args:
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        for name in names:
            if str(name).split(".")[0] == "fastloop":
                yield node.lineno, str(name)


def python_violations(sources: dict[str, str]) -> list[str]:
    """`sources`: path below the repository root -> text, of the whole package."""
    module_of = {path: ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__") for path in sources}
    modules = set(module_of.values())
    found = []
    for path, source in sources.items():
        module = module_of[path]
        unit = unit_of(module)
        if unit not in PYTHON_FLOORS:
            found.append(f"{path}: '{unit}' has no floor; give it one in {Path(__file__).name}")
            continue
        for line, name in imported_modules(module, path.endswith("__init__.py"), source, modules):
            target = unit_of(name)
            if PYTHON_FLOORS.get(target, 99) > PYTHON_FLOORS[unit]:
                found.append(f"{path}:{line}: '{unit}' imports '{name}', which is above it")
    return found


def package_sources() -> dict[str, str]:
    files = (ROOT / "fastloop").rglob("*.py")
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(files)}


def test_python_imports_point_down() -> None:
    sources = package_sources()
    assert sources, "no Python sources found"
    assert not python_violations(sources), "\n".join(python_violations(sources))


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("fastloop/ops/plan.py", "from fastloop.optim import AdamW"),
        ("fastloop/ops/plan.py", "from ..optim.base import FusedOptimizer"),
        ("fastloop/ops/plan.py", "from .. import clip"),
        ("fastloop/ops/plan.py", "import fastloop"),
        ("fastloop/ops/plan.py", "def lazy():\n    import fastloop.bench.stats"),
        ("fastloop/ops/plan.py", "import importlib\nimportlib.import_module('fastloop.amp')"),
        ("fastloop/optim/base.py", "from fastloop import AdamW"),
        ("fastloop/optim/base.py", "from fastloop.bench import stats"),
        ("fastloop/clip.py", "from .loop import train"),
        ("fastloop/somewhere.py", "x = 1"),
    ],
)
def test_a_planted_import_is_found(path: str, planted: str) -> None:
    package = dict.fromkeys(
        (
            "fastloop/__init__.py",
            "fastloop/clip.py",
            "fastloop/ops/plan.py",
            "fastloop/optim/__init__.py",
            "fastloop/optim/base.py",
        ),
        "",
    )
    package["fastloop/__init__.py"] = "from .optim import AdamW\nfrom . import clip\nfrom fastloop._version import v"
    package["fastloop/optim/base.py"] = "from fastloop import _native\nfrom ..ops import plan\nimport torch"
    assert python_violations(package) == []
    assert len(python_violations(package | {path: planted})) == 1


# ---- C++ -----------------------------------------------------------------------------------------


def native_violations(sources: dict[str, str]) -> list[str]:
    """`sources`: path below csrc -> text."""
    found = []
    for path, source in sources.items():
        folder = Path(path).parts[0]
        if folder not in NATIVE_FLOORS:
            found.append(f"csrc/{path}: '{folder}' has no floor; give it one in {Path(__file__).name}")
            continue
        for line, text in enumerate(source.splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', text)
            if match is None:
                continue
            include = match[1]
            where = f"csrc/{path}:{line}: '{folder}' includes '{include}'"
            target = Path(include).parts[0] if "/" in include else folder
            if TORCH_INCLUDE.match(include):
                found.append(f"{where}: native code never includes a torch header")
            elif PYTHON_INCLUDE.match(include) and folder != "bindings":
                found.append(f"{where}: only bindings know Python")
            elif include.startswith(".."):
                found.append(f'{where}: write includes from csrc, as in "core/dtype.h"')
            elif target in NATIVE_FLOORS and target != folder and NATIVE_FLOORS[target] >= NATIVE_FLOORS[folder]:
                found.append(f"{where}, which is not below it")
    return found


def native_sources() -> dict[str, str]:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    return {str(p.relative_to(ROOT / "csrc")): p.read_text(encoding="utf-8") for p in sorted(files)}


def test_native_includes_point_down() -> None:
    sources = native_sources()
    assert sources, "no native sources found"
    assert not native_violations(sources), "\n".join(native_violations(sources))


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("core/dtype.h", '#include "rules/adam.h"'),
        ("core/dtype.h", '#include "cpu/dispatch.h"'),
        ("core/dtype.h", "#include <c10/util/BFloat16.h>"),
        ("rules/adam.h", '#  include "bindings/arguments.h"'),
        ("cpu/loops.h", '#include "cuda/launch.h"'),
        ("cpu/loops.h", "#include <pybind11/pybind11.h>"),
        ("cpu/loops.h", '#include "../bindings/arguments.h"'),
        ("bindings/module.cpp", "#include <torch/extension.h>"),
        ("bindings/module.cpp", "#include <ATen/ATen.h>"),
        ("elsewhere/x.cpp", ""),
    ],
)
def test_a_planted_include_is_found(path: str, planted: str) -> None:
    sources = {
        "core/dtype.h": "#include <cstdint>",
        "rules/adam.h": '#include "core/dtype.h"\n#include "rules/rule.h"',
        "cpu/loops.h": '#include "rules/adam.h"\n#include <omp.h>',
        "bindings/module.cpp": '#include <pybind11/pybind11.h>\n#include "cpu/loops.h"',
        "tests/native_test.cpp": '#include "cpu/loops.h"',
    }
    assert native_violations(sources) == []
    assert len(native_violations(sources | {path: planted})) == 1
