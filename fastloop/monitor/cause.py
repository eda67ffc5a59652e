# SPDX-License-Identifier: Apache-2.0
"""Why a GPU is not busy, as far as numbers tell."""

from __future__ import annotations

from collections.abc import Mapping

from fastloop import machine

BUSY = 0.80  # of the time: from here on a GPU counts as used
EXHAUSTED = 0.90  # of the usable CPUs
ONE_CPU = 0.80  # of one CPU: the thread that launches never rests
HELD = 0.25  # of the samples, in which power or temperature held the clocks down


def likely_cause(summary: Mapping[str, float | None], wait_share: float | None) -> str | None:
    """What most likely keeps the GPU from being busy, and the remedy, in sentences.

    summary: of a Monitor.
    wait_share: the part of the time (0 to 1) in which the training waited for data; None: unknown.
    None where the GPU is used for 80 % of the time or more, and where there is none.

    Raises ValueError for a `wait_share` outside 0 to 1.
    """
    if wait_share is not None and not 0 <= wait_share <= 1:
        raise ValueError(
            f"[monitor] wait_share must lie in 0 to 1, got {wait_share!r}; pass the part, not the percentage"
        )
    used = summary.get("gpu_utilization")
    if used is None or used >= BUSY:
        return None
    idle = 1 - used
    found = [f"The GPU is used {used:.0%} of the time."]
    if wait_share is None:
        found.append(
            "How long the training waits for data is unknown: `python -m fastloop.bench tune loader` measures it."
        )
    elif wait_share >= idle / 2:
        found.append(_data(summary, wait_share))
    else:
        found.append(_host(summary, wait_share))
    found += _clocks(summary)
    ranks = summary.get("ranks") or 1
    if ranks > 1:
        found.append(
            f"Of {ranks:.0f} ranks, one that waits in an NCCL kernel counts as busy: an idle one is the one that the "
            "others wait for. Compare the ranks, and try larger micro-batches or more accumulation between reductions "
            "(`python -m fastloop.bench tune batch`)."
        )
    return " ".join(found)


def _data(summary: Mapping[str, float | None], wait_share: float) -> str:
    text = f"The likely cause is the data: the training waits for it {wait_share:.0%} of the time."
    busy = summary.get("cpu_utilization")
    if busy is not None and busy >= EXHAUSTED:
        return (
            f"{text} The {machine.usable_cpus()} usable CPUs are {busy:.0%} busy, so that more workers will not help: "
            "make a sample cheaper (decode and resize ahead of time, or on the GPU); "
            "`python -m fastloop.bench tune loader` shows what each setting gives."
        )
    return f"{text} `python -m fastloop.bench tune loader` finds the workers and the prefetching that remove the wait."


def _host(summary: Mapping[str, float | None], wait_share: float) -> str:
    text = f"It is not the data (waited for {wait_share:.0%} of the time)."
    process = summary.get("process_cpu")
    if process is not None and process < ONE_CPU:
        return (
            f"{text} This process keeps {process:.1f} CPUs busy, so it waits itself: for `.item()`, logging, saving or "
            "evaluation between steps, for a synchronisation, or for the network; "
            "`python -m fastloop.bench tune flags` times the step without them."
        )
    return (
        f"{text} The likely cause is the host: kernels are too small, or too many, for it to launch them in time. A "
        "larger micro-batch makes each larger (`python -m fastloop.bench tune batch`); torch.compile and CUDA graphs "
        "launch fewer (`python -m fastloop.bench tune flags`)."
    )


def _clocks(summary: Mapping[str, float | None]) -> list[str]:
    found = []
    power, thermal = summary.get("gpu_throttle_power"), summary.get("gpu_throttle_thermal")
    if power is not None and power >= HELD:
        found.append(
            f"Power held the clocks down in {power:.0%} of the samples: raise the power limit, or use a cheaper number "
            "format (`python -m fastloop.bench tune flags`)."
        )
    if thermal is not None and thermal >= HELD:
        found.append(
            f"Heat held the clocks down in {thermal:.0%} of the samples: see to the cooling; no setting of "
            "`python -m fastloop.bench tune` helps against it."
        )
    return found
