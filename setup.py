# SPDX-License-Identifier: Apache-2.0
"""Drives CMake, and nothing else: what is compiled, and how, stands in CMakeLists.txt.

FASTLOOP_NATIVE=ON|OFF      OFF installs the Python package alone, which runs on the reference backend
FASTLOOP_CUDA=AUTO|ON|OFF   passed to CMake; see docs/installing.md
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OFF_HINT = (
    "To install without the native kernels (plain torch operations, no compiler needed) set "
    "FASTLOOP_NATIVE=OFF:\n    FASTLOOP_NATIVE=OFF pip install .\nSee docs/installing.md."
)


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """Value of an environment switch; a typo stops the build instead of being ignored."""
    value = os.environ.get(name, default).upper() or default
    value = {"1": "ON", "TRUE": "ON", "YES": "ON", "0": "OFF", "FALSE": "OFF", "NO": "OFF"}.get(value, value)
    if value not in allowed:
        raise SystemExit(f"[fastloop build] {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def find_tool(name: str) -> str | None:
    """The program of a pip package (`cmake`, `ninja`) where there is one, else the one on PATH."""
    try:
        package = importlib.import_module(name)
        folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", "")
        path = shutil.which(name, path=os.fspath(folder))
        if path is not None:
            return path
    except ImportError:
        pass  # no such pip package: PATH may have the program
    return shutil.which(name)


def find_compiler() -> str | None:
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named.split()[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def pybind11_cmake_dir() -> str | None:
    try:
        import pybind11
    except ImportError:
        return None
    return pybind11.get_cmake_dir()


def missing_tools() -> list[str]:
    """What a native build needs and this machine does not have, each with its remedy."""
    python_h = Path(sysconfig.get_path("include")) / "Python.h"
    needs = [
        (find_compiler(), "a C++17 compiler: install g++ (or name one in CXX)"),
        (find_tool("cmake"), "cmake: pip install cmake"),
        (find_tool("ninja"), "ninja: pip install ninja"),
        (pybind11_cmake_dir(), "pybind11: pip install pybind11"),
        (python_h.exists(), "Python.h: install this Python's development package (python3-dev)"),
    ]
    return [remedy for found, remedy in needs if not found]


class CMakeBuild(build_ext):
    """Configures and builds in build/native-<interpreter>, and copies the module to where it is wanted.

    The folder is kept, so that a second build compiles only what changed.
    """

    def build_extension(self, ext: Extension) -> None:
        missing = missing_tools()
        if missing:
            lines = "".join(f"\n  - {item}" for item in missing)
            raise SystemExit(f"\n[fastloop build] the native kernels cannot be built; missing:{lines}\n{OFF_HINT}\n")
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_cmake_dir()}",
            f"-DFASTLOOP_CUDA={switch('FASTLOOP_CUDA', 'AUTO', ('AUTO', 'ON', 'OFF'))}",
            f"-DFASTLOOP_WERROR={switch('FASTLOOP_WERROR', 'OFF', ('ON', 'OFF'))}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--target", "_native"], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"\n[fastloop build] the native build failed (see above): "
                f"{' '.join(map(str, error.cmd[:4]))} ... exited with {error.returncode}\n{OFF_HINT}\n"
            ) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: a process that has the old module loaded keeps it, instead of crashing.
        written = target.with_suffix(".new")
        self.copy_file(str(build / "_native.so"), str(written))
        written.replace(target)


# The native kernels are written for Linux; elsewhere the package runs on the reference backend.
native = switch("FASTLOOP_NATIVE", "ON" if sys.platform == "linux" else "OFF", ("ON", "OFF")) == "ON"
setup(
    ext_modules=[Extension("fastloop._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
