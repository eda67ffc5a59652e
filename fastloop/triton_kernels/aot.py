# SPDX-License-Identifier: Apache-2.0
"""The kernels compiled ahead of time, without a GPU: their machine code can be inspected anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

from .memory import INTERPRETED
from .norm import norm_constants, norm_kernel
from .settings import Settings, settings_of
from .update import update_constants, update_kernel

F32, BF16, F16, F64 = tl.float32, tl.bfloat16, tl.float16, tl.float64

# name -> dtype of the gradients
NORMS = {"norm_fp32": F32, "norm_bf16": BF16}
# name -> rule, param, grad, state, master, ema
UPDATES = {
    "adam_fp32": ("adam", F32, F32, F32, False, False),
    "adam_fp32_ema": ("adam", F32, F32, F32, False, True),
    "adam_bf16_master": ("adam", BF16, BF16, F32, True, False),
    "adam_bf16": ("adam", BF16, BF16, BF16, False, False),
    "adam_fp16_master": ("adam", F16, F16, F32, True, False),
    "adam_amsgrad_fp32": ("adam_amsgrad", F32, F32, F32, False, False),
    "sgd_fp32": ("sgd", F32, F32, F32, False, False),
    "sgd_momentum_fp32": ("sgd_momentum", F32, F32, F32, False, False),
}
NAMES = (*NORMS, *UPDATES)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one architecture."""

    name: str  # of the tables above
    entry: str  # the kernel's symbol in the cubin
    cubin: bytes
    ptx: str
    shared_bytes: int
    warps: int


def kernels(settings: Settings) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, constants) of what is compiled ahead of time, with the constants of the launches."""
    for name, grad in NORMS.items():
        yield name, norm_kernel, norm_constants(grad, settings)
    for name, storage in UPDATES.items():
        yield name, update_kernel, update_constants(*storage, reports=True, settings=settings)


POINTERS = {"table": "*i64", "sums": "*fp64", "ticket": "*i32", "result": "*fp64", "skipped": "*i64"}


def compile_all(arch: int, names: Sequence[str] = NAMES) -> list[Compiled]:
    """Compile the kernels of NAMES for CUDA architecture `arch`: 80, 90, 100.

    Needs no GPU, and a process in which TRITON_INTERPRET is not set. Results are cached as Triton's always are. Cubins
    can be read with cuobjdump and nvdisasm, which Triton brings along (triton/backends/nvidia/bin).

    Args:
        arch: compute capability, 90 for 9.0.
        names: some of NAMES.

    Raises:
        RuntimeError: the process interprets its kernels.
    """
    if INTERPRETED.value:
        raise RuntimeError("[fastloop.triton_kernels.aot] TRITON_INTERPRET is set: nothing can be compiled; unset it")
    settings = settings_of(arch)
    options = settings.cuda_options()
    out = []
    for name, kernel, constants in kernels(settings):
        if name not in names:
            continue
        signature = {p: "constexpr" if p in constants else POINTERS.get(p, "i32") for p in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = compile_source(source, target=GPUTarget("cuda", arch, 32), options=options)
        asm, metadata = compiled.asm, compiled.metadata
        out.append(Compiled(name, metadata.name, asm["cubin"], asm["ptx"], metadata.shared, metadata.num_warps))
    return out
