# SPDX-License-Identifier: Apache-2.0
"""Drives CMake, and nothing else: what is compiled, and how, stands in CMakeLists.txt.

FASTLOOP_NATIVE=ON|OFF      OFF installs the Python package alone, which runs on the reference backend
FASTLOOP_CUDA=AUTO|ON|OFF   passed to CMake, as FASTLOOP_CUDA_ARCHITECTURES is; see docs/installing.md
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
    """Configures and builds in build/native-<interpreter>, and copies the modules to where they are wanted.

    The folder is kept, so that a second build compiles only what changed.
    """

    def run(self) -> None:
        if self.extensions:
            missing = missing_tools()
            if missing:
                lines = "".join(f"\n  - {item}" for item in missing)
                raise SystemExit(
                    f"\n[fastloop build] the native kernels cannot be built; missing:{lines}\n{OFF_HINT}\n"
                )
            self.build_folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
            self.configure()
        super().run()

    def cmake(self, *arguments: str) -> None:
        try:
            subprocess.run([find_tool("cmake"), *arguments], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"\n[fastloop build] the native build failed (see above): "
                f"{' '.join(map(str, error.cmd[:4]))} ... exited with {error.returncode}\n{OFF_HINT}\n"
            ) from None

    def configure(self) -> None:
        """Runs CMake, which knows whether there is a CUDA toolkit, and leaves out the module that it does not build."""
        switches = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_cmake_dir(),
            "FASTLOOP_CUDA": switch("FASTLOOP_CUDA", "AUTO", ("AUTO", "ON", "OFF")),
            "FASTLOOP_CUDA_ARCHITECTURES": os.environ.get("FASTLOOP_CUDA_ARCHITECTURES", ""),
            "FASTLOOP_WERROR": switch("FASTLOOP_WERROR", "OFF", ("ON", "OFF")),
        }
        definitions = [f"-D{name}={value}" for name, value in switches.items()]
        self.cmake("-S", str(ROOT), "-B", str(self.build_folder), "-G", "Ninja", *definitions)
        cache = (self.build_folder / "CMakeCache.txt").read_text(encoding="utf-8")
        if "FASTLOOP_CUDA_TARGET:INTERNAL=_cuda\n" not in cache:
            self.extensions = [ext for ext in self.extensions if ext.name != "fastloop._cuda"]
            if self.inplace or self.editable_mode:  # one of an earlier build would not fit the _native of this one
                (ROOT / "fastloop" / Path(self.get_ext_filename("_cuda")).name).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        self.cmake("--build", str(self.build_folder), "--target", *(ext.name.split(".")[-1] for ext in self.extensions))
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: a process that has the old module loaded keeps it, instead of crashing.
        written = target.with_suffix(".new")
        self.copy_file(str(self.build_folder / f"{ext.name.split('.')[-1]}.so"), str(written))
        written.replace(target)


# The native kernels are written for Linux; elsewhere the package runs on the reference backend.
native = switch("FASTLOOP_NATIVE", "ON" if sys.platform == "linux" else "OFF", ("ON", "OFF")) == "ON"
setup(
    ext_modules=[Extension(f"fastloop.{name}", sources=[]) for name in ("_native", "_cuda")] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
