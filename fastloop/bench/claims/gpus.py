# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: cuDNN's search, how busy a GPU is, and several of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from time import perf_counter

import torch
from torch import nn

from fastloop.bench.checks import WrongResult
from fastloop.bench.claims import resnet, training
from fastloop.bench.claims.record import Claim, Finding, Here, Unavailable, Verdict, faster, times
from fastloop.monitor import Monitor, likely_cause

USED, IDLE = 0.90, 0.80
LOSS_ERROR = 1e-3  # relative: cuDNN's algorithms sum in other orders


def cudnn_benchmark(here: Here) -> Finding:
    """A training step of ResNet-50 at one input size, without and with cuDNN's search."""
    model = resnet.ResNet50().to(here.device)
    pixels, classes = resnet.images(32, here.device)

    def step(search: bool) -> float:
        with torch.backends.cudnn.flags(enabled=True, benchmark=search):
            loss = nn.functional.cross_entropy(model(pixels), classes)
            loss.backward()
        return float(loss.detach())

    plain, searched = step(False), step(True)
    if not abs(plain - searched) <= LOSS_ERROR * abs(plain):
        raise WrongResult(f"[bench claims] the loss is {searched:.5f} with cuDNN's search and {plain:.5f} without")
    found, pairs = here.pairs(lambda: step(False), lambda: step(True), 1.10)
    return Finding(times(found), faster(found, 1.10), "ResNet-50, batch 32, fp32", found, pairs.ratios)


def _watched(here: Here, step: Callable[[], object]) -> dict[str, float | None]:
    """Train for some seconds and say what the monitor saw."""
    with Monitor(0.2, device=here.device) as monitor:
        deadline = perf_counter() + max(here.seconds, 3.0)
        while perf_counter() < deadline:
            step()
            here.wait()
    summary = monitor.summary()
    if summary["gpu_utilization"] is None:
        latest = monitor.latest
        why = latest.reasons.get("gpu_utilization", "") if latest else "no sample was taken"
        raise Unavailable(f"the GPU does not say how busy it is: {why}")
    return summary


def utilization(here: Here) -> Finding:
    """A GPT on batches that are there already."""
    step, _ = training.step(here, torch.bfloat16)
    step()
    summary = _watched(here, step)
    used = summary["gpu_utilization"] or 0.0
    verdict = Verdict.HOLDS if used >= USED else Verdict.PARTLY if used >= IDLE else Verdict.FAILS
    return Finding(f"{used:.0%}", verdict, likely_cause(summary, 0.0) or "", numbers={"used": used})


def starved(here: Here) -> Finding:
    """The same, waiting for data as long as it computes: is the wait found, and named?"""
    step, _ = training.step(here, torch.bfloat16)
    here.timed(step)()
    start = perf_counter()
    here.timed(step)()
    took = perf_counter() - start

    def slow() -> None:
        time.sleep(took)
        step()

    summary = _watched(here, slow)
    used, cause = summary["gpu_utilization"] or 0.0, likely_cause(summary, 0.5) or ""
    verdict = Verdict.HOLDS if used < IDLE and "data" in cause else Verdict.FAILS
    return Finding(f"{used:.0%} with half of the time spent waiting", verdict, cause, numbers={"used": used})


def eight(here: Here) -> Finding:
    raise Unavailable(
        "not built: run `torchrun --nproc-per-node 8 -m fastloop.train` and with 1, and compare samples/s"
    )


CLAIMS = (
    Claim("cudnn-benchmark", "cudnn.benchmark at a fixed size", "10-20 % faster", cudnn_benchmark, gpus=1),
    Claim("gpu-utilization", "a training that is not held up", "90 % GPU use or more", utilization, gpus=1),
    Claim("gpu-starved", "waiting for data", "GPU use below 80 %", starved, gpus=1),
    Claim("eight-gpus", "8 A100 over one RTX 4090", "5-10x faster", eight, gpus=8),
)
