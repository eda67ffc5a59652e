# SPDX-License-Identifier: Apache-2.0
"""The figures that training guides promise, each tried on this machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from time import perf_counter

import torch

from fastloop import machine
from fastloop.bench.checks import WrongResult
from fastloop.bench.claims import (
    activations,
    gpus,
    loading,
    memory_table,
    precision,
    quantized,
    training_time,
)
from fastloop.bench.claims.record import (
    SECONDS,
    Claim,
    Finding,
    Here,
    Row,
    Unavailable,
    Verdict,
    document,
    torch_threads,
    useful_threads,
)  # fmt: skip

__all__ = ["CLAIMS", "Claim", "Finding", "Here", "Row", "Unavailable", "Verdict", "document", "run", "select"]

BUDGET = 80.0  # seconds, after which no scenario starts: the last one ends within 90 on 2 cores

# Loading first: its workers are forked, and may not be after CUDA has started. Then what counts bytes, then what takes
# time: if that runs out, the rest of the rows are there.
CLAIMS: tuple[Claim, ...] = (
    *loading.CLAIMS,
    *memory_table.CLAIMS,
    *precision.CLAIMS,
    *quantized.CLAIMS,
    *activations.CLAIMS,
    *training_time.CLAIMS,
    *gpus.CLAIMS,
)


def select(pattern: str | None) -> list[Claim]:
    """Claims with `pattern` in their name, or whose name is like the shell pattern; all without one."""
    return [each for each in CLAIMS if pattern is None or pattern in each.name or fnmatch(each.name, pattern)]


def gpu_count() -> int:
    return torch.cuda.device_count()


def try_claim(claim: Claim, here: Here, present: int) -> Finding:
    """What a claim's scenario found; an error in it is its finding and ends nothing."""
    if claim.gpus > present:
        needs = "needs a GPU" if claim.gpus == 1 else f"needs {claim.gpus} GPUs"
        return Finding("-", Verdict.NEEDS, needs)
    try:
        torch.manual_seed(0)
        random.seed(0)
        return claim.measure(here)
    except Unavailable as error:
        return Finding("-", Verdict.ERROR, str(error))
    except WrongResult as error:
        return Finding("-", Verdict.WRONG, str(error))
    except Exception as error:
        return Finding("-", Verdict.ERROR, f"{type(error).__name__}: {error}")


def run(
    claims: Sequence[Claim],
    on_row: Callable[[Row], object] | None = None,
    budget: float = BUDGET,
    clock: Callable[[], float] = perf_counter,
) -> list[Row]:
    """Try each claim, on the first GPU where there is one.

    budget: seconds for all of them; once they are spent no further scenario starts, and its row says so.
    on_row: called with each row when it is done.
    """
    present = gpu_count()
    device = torch.device("cuda", 0) if present else torch.device("cpu")
    end = clock() + budget
    rows: list[Row] = []
    with torch_threads(useful_threads()):
        for number, claim in enumerate(claims):
            start = clock()
            here = Here(device, min(SECONDS, max(end - start, 0.0) / (len(claims) - number)))
            late = start >= end and claim.gpus <= present
            finding = _no_time(claim, budget) if late else try_claim(claim, here, present)
            rows.append(Row(claim, finding, _device(claim, finding, present), clock() - start))
            if on_row is not None:
                on_row(rows[-1])
    return rows


def _no_time(claim: Claim, budget: float) -> Finding:
    return Finding("-", Verdict.ERROR, f"no time left of {budget:.0f} s; `claims -k {claim.name}` tries it alone")


def _device(claim: Claim, finding: Finding, present: int) -> str:
    """Where the row was tried; the claim's own need where it was not."""
    if finding.verdict is Verdict.NEEDS:
        return finding.note
    threads = torch.get_num_threads()
    return machine.gpu_model() if present and not claim.on_cpu else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
