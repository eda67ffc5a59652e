# SPDX-License-Identifier: Apache-2.0
"""What the process of one trial of a batch size does: the longest batch first, then the rate, then the peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any

from fastloop.bench.measure import measure_pairs
from fastloop.bench.stats import Interval, median_interval
from fastloop.loop import Loop
from fastloop.loop.data import map_tensors, samples_in
from fastloop.tune import child
from fastloop.tune.longest import Looked, fixed_batches, look, samples_of
from fastloop.tune.peaks import peak
from fastloop.tune.step import Again, Steps, measure, settings_of, training

LONGEST_WINDOWS = 2  # the first makes the optimizer's states, the second has them


def measure_size(
    spec: Mapping[str, Any],
    batch_size: int | None,
    accumulation_steps: int | None,
    seconds: float,
    memory_limit: int | None,
) -> dict[str, Any]:
    """Rate and peak of one size, as JSON; None for a size or for steps leaves the present ones.

    What the loader is, and how the longest batch was found, are notes: they are there also if memory runs out.
    """
    loop, looked = _made(spec, batch_size, accumulation_steps)
    source = Again(looked.longest)
    with Steps(loop, source) as steps:
        for _ in range(LONGEST_WINDOWS):
            steps.step()
        source.batch = looked.typical
        measured = measure(steps, seconds, warmup=1)
    found = peak(loop.device, memory_limit)
    return {"rate": asdict(measured.interval), "windows": measured.windows, "peak": asdict(found)}


def compare_sizes(spec: Mapping[str, Any], a: tuple[int, int], b: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Samples/s of `b` over those of `a`, each (batch size, accumulation steps), in turn on one model.

    One model and one optimizer: two of them would not fit where one is as large as it can be. Both without cuda_graph:
    a loop keeps a graph of one shape, so that the other side would never have one.
    """
    eager = {**spec, "options": {**spec["options"], "cuda_graph": False}}
    other = _made(eager, *b)[1].typical
    loop, looked = _made(eager, *a)
    sides = [(_on_device(looked.typical, loop), a[1]), (_on_device(other, loop), b[1])]
    source = Again(None)
    samples = [samples_in(batch) * count for batch, count in sides]
    with Steps(loop, source) as steps:

        def window(side: int) -> None:
            source.batch, loop.accumulation_steps = sides[side]
            steps.step()
            steps.wait()

        for side in (0, 1):
            source.batch, loop.accumulation_steps = sides[side]
            steps.step()
        pairs = measure_pairs(
            lambda: window(0), lambda: window(1), decided=_decided(samples), deadline=perf_counter() + seconds
        )
    ratios = [ratio * samples[1] / samples[0] for ratio in pairs.ratios]
    return {"gain": asdict(median_interval(ratios)), "pairs": len(ratios)}


def _decided(samples: list[int]) -> Any:
    """More pairs could not change whether one of the two has more samples/s."""

    def decided(times: Interval) -> bool:
        factor = samples[1] / samples[0]
        return times.low * factor > 1.0 or times.high * factor < 1.0

    return decided


def _made(spec: Mapping[str, Any], batch_size: int | None, accumulation_steps: int | None) -> tuple[Loop, Looked]:
    made = training(
        spec,
        {} if accumulation_steps is None else {"accumulation_steps": accumulation_steps},
        {} if batch_size is None else {"batch_size": batch_size},
    )
    loop, loader = made.loop, made.train_loader
    child.note(
        batch_size=settings_of(loader).get("batch_size"),
        accumulation_steps=loop.accumulation_steps,
        samples=samples_of(loader),
        fixed=fixed_batches(loader),
        device=str(loop.device),
    )
    looked = look(loader)
    child.note(looked=looked.how, varies=looked.varies, batch_samples=samples_in(looked.longest))
    return loop, Looked(_on_device(looked.longest, loop), _on_device(looked.typical, loop), looked.varies, looked.how)


def _on_device(batch: Any, loop: Loop) -> Any:
    return map_tensors(batch, lambda tensor: tensor.to(loop.device))
