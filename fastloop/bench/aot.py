# SPDX-License-Identifier: Apache-2.0
"""What the compilers made of the GPU kernels: registers, spills and 128-bit accesses, read from the machine code.

Needs no GPU. It is not speed, but the way to lose speed that does not depend on a machine's mood: a spilled register
or a 16-byte access that fell apart fails `--check`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "benchmarks" / "aot-golden.json"
SCHEMA = "fastloop-aot/1"
ARCHITECTURES = (80, 90, 100)
MORE_REGISTERS = 8  # above the golden number: a compiler's mood; more is ours

# The CUDA kernels that the golden file holds, by their demangled names. Spills are looked for in all of them.
REPRESENTATIVES = re.compile(
    r"norm<(float|BF16|F16|double), 1>"
    r"|norm<float, (?!1>)\d+>"
    r"|update<(Adam|Sgd)<float, (false|true)>, float, float, float, false, (false|true)>"
    r"|update<Adam<float, false>, BF16, BF16, (BF16|float), (false|true), (false|true)>"
    r"|update<Adam<float, false>, F16, F16, float, true, false>"
    r"|update<Adam<double, false>, double, double, double, false, false>"
)


class Unavailable(Exception):
    """This machine lacks what is needed to compile or read the kernels; the message says what."""


class DoesNotCompile(Exception):
    """A kernel's source does not compile."""


class NoGolden(Exception):
    """There is no golden file, or it is not one."""


@dataclass(frozen=True)
class Code:
    """What one kernel's machine code holds. Accesses are those of global memory, counted in the program text."""

    registers: int
    stack: int  # bytes per thread: spilled registers, or an array that is not in registers
    local: int
    local_accesses: int
    loads_128: int  # 16 bytes; one of 32 bytes counts twice
    loads_narrow: int
    stores_128: int
    stores_narrow: int


Kernels = dict[str, Code]  # by "cuda sm_90 norm<float, 1>"


# ---- Reading machine code


def readable(demangled: str) -> str:
    """`void fastloop::device::norm<float, 1>(...)` as `norm<float, 1>`."""
    name = re.sub(r"fastloop::(device::)?", "", demangled.strip()).removeprefix("void ")
    return name[: name.rindex("(")] if name.endswith(")") else name


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """Symbol -> REG, STACK, LOCAL and the rest, from `cuobjdump --dump-resource-usage`."""
    found = re.findall(r"^ *Function (\S+):\s*\n\s*(.+)$", text, re.M)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)} for name, usage in found}


def parse_accesses(text: str) -> dict[str, dict[str, int]]:
    """Symbol -> counts of memory accesses by `Code` field, from `cuobjdump -sass`."""
    counts: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    names = ("local_accesses", "loads_128", "loads_narrow", "stores_128", "stores_narrow")
    for line in text.splitlines():
        if "Function :" in line:
            current = counts.setdefault(line.split("Function :")[1].strip(), dict.fromkeys(names, 0))
            continue
        # "        /*0090*/    @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x... */"
        match = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", line)
        if match is None:
            continue
        operation, width = match[1], re.search(r"\.(128|256)\b", match[2])
        if operation in ("LDL", "STL"):
            current["local_accesses"] += 1
        elif operation in ("LD", "LDG", "LDGSTS", "ST", "STG"):
            kind = "stores" if operation.startswith("ST") else "loads"
            current[f"{kind}_128" if width else f"{kind}_narrow"] += int(width[1]) // 128 if width else 1
    return counts


def codes(resources: str, disassembly: str) -> dict[str, Code]:
    """Symbol -> Code, from both outputs of cuobjdump. Raises Unavailable if they do not speak of the same kernels."""
    usage, accesses = parse_resources(resources), parse_accesses(disassembly)
    if not usage or usage.keys() != accesses.keys():
        raise Unavailable(
            f"[bench aot] cuobjdump's resource usage names {len(usage)} kernels, its disassembly {len(accesses)}; "
            "use the cuobjdump of the toolkit that compiled them"
        )
    return {
        symbol: Code(registers=each["REG"], stack=each["STACK"], local=each["LOCAL"], **accesses[symbol])
        for symbol, each in usage.items()
    }


# ---- Tools


def _run(command: Sequence[str | Path], text: str | None = None) -> str:
    result = subprocess.run([str(word) for word in command], input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Unavailable(f"[bench aot] {Path(command[0]).name} failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def _tool(name: str, remedy: str) -> str:
    """A program beside this Python, on PATH, of the CUDA toolkit, or of Triton's package, in this order."""
    folders = [os.path.dirname(sys.executable), *os.get_exec_path(), "/usr/local/cuda/bin"]
    folders += [f"{os.environ[root]}/bin" for root in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(root)]
    try:
        triton = importlib.import_module("triton")
        folders += [f"{folder}/backends/nvidia/bin" for folder in triton.__path__]
    except ImportError:
        pass  # then another folder must have it
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise Unavailable(f"[bench aot] {name} is not on this machine; {remedy}")
    return found


def read_cubin(path: Path) -> dict[str, Code]:
    """Symbol -> Code of every kernel in a file of machine code."""
    cuobjdump = _tool("cuobjdump", "pip install triton brings it")
    resources = _run([cuobjdump, "--dump-resource-usage", path])
    return codes(resources, _run([cuobjdump, "-sass", path]))


def _demangled(symbols: Iterable[str]) -> dict[str, str]:
    symbols = list(symbols)
    text = _run([_tool("c++filt", "install binutils")], "\n".join(symbols))
    return dict(zip(symbols, map(readable, text.splitlines()), strict=True))


# ---- Compiling


def cuda_kernels(architectures: Sequence[int], folder: Path | None = None) -> tuple[Kernels, str]:
    """Compile csrc/cuda by CMake's target `cubins`, and the version of nvcc. A second call compiles what changed.

    Raises:
        Unavailable: no checkout, no CMake, no CUDA toolkit that works.
        DoesNotCompile: nvcc refuses a source.
    """
    if not (ROOT / "csrc" / "cuda" / "launch.cu").exists():
        raise Unavailable(
            f"[bench aot] compiles the CUDA sources, and there are none beside {ROOT / 'fastloop'}: run it in a "
            "checkout of fastloop (`make build` there), or with --backend triton"
        )
    folder = folder or ROOT / "build" / "aot"
    names = ";".join(map(str, architectures))
    cmake = _tool("cmake", "pip install cmake")
    _run([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja', 'pip install ninja')}",
          f"-DPython_EXECUTABLE={sys.executable}", "-DFASTLOOP_BUILD_MODULE=OFF", "-DFASTLOOP_CUDA=ON",
          f"-DFASTLOOP_CUDA_ARCHITECTURES={names}", f"-DFASTLOOP_CUBINS={names}"])  # fmt: skip
    build = subprocess.run(
        [cmake, "--build", str(folder), "--target", "cubins"], capture_output=True, text=True, check=False
    )
    if build.returncode:
        raise DoesNotCompile(f"[bench aot] nvcc failed:\n{build.stdout[-4000:]}{build.stderr}")
    kernels: Kernels = {}
    for architecture in architectures:
        paths = sorted((folder / "nvcc").glob(f"*.sm_{architecture}.cubin"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # disassembling takes a second or two each
            found = {symbol: code for codes in pool.map(read_cubin, paths) for symbol, code in codes.items()}
        for symbol, name in _demangled(found).items():
            kernels[f"cuda sm_{architecture} {name}"] = found[symbol]
    return kernels, _nvcc_version(folder)


def _nvcc_version(folder: Path) -> str:
    cache = (folder / "CMakeCache.txt").read_text(encoding="utf-8")
    nvcc = re.search(r"^FASTLOOP_NVCC_TRIAL:INTERNAL=([^;\n]+)", cache, re.M)
    release = re.search(r"\bV(\d[\d.]*)", _run([nvcc[1], "--version"])) if nvcc else None
    return release[1] if release else "unknown"


def triton_kernels(architectures: Sequence[int]) -> tuple[Kernels, str]:
    """Compile the Triton kernels for each architecture, and the version of Triton. Raises Unavailable."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise Unavailable(f"[bench aot] Triton does not import ({error}); pip install triton") from error
    ahead: Any = importlib.import_module("fastloop.triton_kernels.aot")
    kernels: Kernels = {}
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            for each in ahead.compile_all(architecture):
                path = Path(folder) / f"{each.name}.cubin"
                path.write_bytes(each.cubin)
                kernels[f"triton sm_{architecture} {each.name}"] = read_cubin(path)[each.entry]
    return kernels, triton.__version__


# ---- The golden file


def is_representative(key: str) -> bool:
    backend, _, name = key.split(" ", 2)
    return backend == "triton" or REPRESENTATIVES.fullmatch(name) is not None


def _is_norm(key: str) -> bool:
    return key.split(" ", 2)[2].startswith("norm")


def faults(kernels: Kernels) -> Iterator[str]:
    """What no kernel may do, whatever the golden file says."""
    for key, code in kernels.items():
        if code.stack or code.local or code.local_accesses:
            local = f"{code.local} B and {code.local_accesses} accesses of local memory"
            yield f"{key}: spills: {code.stack} B of stack, {local}"
        if code.loads_128 == 0 or (code.stores_128 == 0 and not _is_norm(key)):
            yield f"{key}: {code.loads_128} loads and {code.stores_128} stores of 128 bits: its accesses fell apart"


def differences(kernels: Kernels, golden: Kernels) -> Iterator[str]:
    """Where the representative kernels are worse than the golden file says, or not the same ones."""
    for key in sorted(golden.keys() - kernels.keys()):
        yield f"{key}: in the golden file and not compiled"
    for key in sorted(kernels.keys() - golden.keys()):
        yield f"{key}: not in the golden file"
    for key in sorted(kernels.keys() & golden.keys()):
        code, wanted = kernels[key], golden[key]
        if code.registers > wanted.registers + MORE_REGISTERS:
            yield f"{key}: {code.registers} registers, {wanted.registers} in the golden file"
        for name in ("loads_128", "stores_128"):
            if getattr(code, name) < getattr(wanted, name):
                what = name.replace("_128", " of 128 bits")
                yield f"{key}: {getattr(code, name)} {what}, {getattr(wanted, name)} in the golden file"


def to_json(kernels: Kernels, compilers: dict[str, str]) -> str:
    """The golden file: one kernel a line, so that a change to one is one line of a diff."""
    lines = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(asdict(kernels[key]))}" for key in sorted(kernels))
    return f'{{"schema": "{SCHEMA}",\n "compilers": {json.dumps(compilers)},\n "kernels": {{\n  {lines}\n }}}}\n'


def load(path: Path) -> tuple[Kernels, dict[str, str]]:
    """Kernels and compilers of a golden file. Raises NoGolden with what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise NoGolden(f"[bench aot] wanted schema {SCHEMA}, got {document['schema']} in {path}; run aot --update")
        return {key: Code(**code) for key, code in document["kernels"].items()}, dict(document["compilers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoGolden(
            f"[bench aot] no golden file {path}: {type(error).__name__}: {error}; run aot --update"
        ) from error


def measure(backends: Sequence[str], architectures: Sequence[int]) -> tuple[Kernels, dict[str, str]]:
    """Compile and read all kernels of some backends; the compilers' versions. Raises Unavailable, DoesNotCompile."""
    kernels: Kernels = {}
    compilers = {}
    for backend in backends:
        found, version = (cuda_kernels if backend == "cuda" else triton_kernels)(architectures)
        kernels |= found
        compilers["nvcc" if backend == "cuda" else "triton"] = version
    return kernels, compilers


def part(kernels: Kernels, backends: Sequence[str], architectures: Sequence[int]) -> Kernels:
    """Those of some backends and architectures."""
    wanted = {f"{backend} sm_{architecture}" for backend in backends for architecture in architectures}
    return {key: code for key, code in kernels.items() if " ".join(key.split(" ")[:2]) in wanted}
