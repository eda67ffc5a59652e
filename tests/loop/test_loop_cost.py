# SPDX-License-Identifier: Apache-2.0
"""What a step costs beside forward, backward and update: counted, not timed."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import OPTIMIZERS, batches, cross_entropy, network
from torch.utils._python_dispatch import TorchDispatchMode

import fastloop
from fastloop import Loop
from fastloop.loop.reporter import Reporter

PACKAGE = str(Path(fastloop.__file__).parent)
QUIET = 10**9  # windows between two rows: rows are kept in the history, and so grow


def run(loop: Loop, windows: int, look: Callable[[int], Any] = lambda step: None) -> None:
    """A loop by windows over one batch; `look` sees each step's number, outside of it."""
    data = batches([4]) * (windows * loop.accumulation_steps)
    for window in loop.windows(data, epochs=1):
        for batch in window:
            with loop.autocast():
                loss = cross_entropy(loop.model, batch)
            loop.backward(loss)
        loop.step()
        look(loop.global_step)


def looped(optimizer: str = "fastloop.AdamW", **options: Any) -> Loop:
    model = network()
    return Loop(model, OPTIMIZERS[optimizer](model.parameters()), log_every=QUIET, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"max_grad_norm": 1.0},
    "schedule": {"schedule": "constant"},
    "everything": {"max_grad_norm": 1.0, "max_grad_value": 1.0, "schedule": "cosine", "progress": True},
    "fp16": {"precision": "fp16"},
}

# Python functions of ours between two windows' ends, the optimizer's among them. A call is about 0.1 us: these are a
# tenth of the 40 us that a step may cost. What comes on top is to be looked at, and to be worth it.
CALLS = {"plain": 40, "clipping": 40, "schedule": 43, "everything": 43, "fp16": 47}


@pytest.mark.parametrize("name", OPTIONS)
def test_functions_called_per_step(name: str) -> None:
    calls: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    def look(step: int) -> None:  # from the end of window 20 to that of window 21
        sys.setprofile(count if step == 20 else None)

    run(looped(**OPTIONS[name]), 30, look)
    assert 5 < len(calls) <= CALLS[name], calls


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain", "clipping", "everything"])
def test_operators_of_torch_per_step(name: str) -> None:
    """One: the loss that is read. What backward begins with is made once, and not for each loss as torch does."""
    bare, inside, step = Operators(), Operators(), Operators()
    loop = looped(**OPTIONS[name])
    for window in loop.windows(batches([4] * 5), epochs=1):
        for batch in window:
            loss = cross_entropy(loop.model, batch)
            with inside:
                loop.backward(loss)
        with step if loop.global_step else nullcontext():  # the first makes the states
            loop.step()
    other = network()
    for batch in batches([4] * 5):
        other.zero_grad()
        loss = cross_entropy(other, batch)
        with bare:
            loss.backward()
    for _ in range(5):
        inside.names.remove("aten._local_scalar_dense.default")
        bare.names.remove("aten.ones_like.default")
    inside.names.remove("aten.full.default")
    assert inside.names == bare.names
    assert step.names == [], step.names


def test_gradients_are_divided_in_the_optimizers_own_pass() -> None:
    """Accumulation of unequal batches: no operator for a parameter."""
    step, loop = Operators(), looped(accumulation_steps=3, max_grad_norm=1.0)
    for window in loop.windows(batches([4, 2, 1, 5, 3]), epochs=1):
        for batch in window:
            loop.backward(cross_entropy(loop.model, batch))
        with step if loop.global_step else nullcontext():
            loop.step()
    assert step.names == []


# ---- memory


def bookkeeping(loop: Loop) -> None:
    """Let what grows to a bound and stays there be full: the window of the spikes, 100 losses."""
    assert isinstance(loop._reporter, Reporter)
    assert loop._reporter.spikes.window <= 200


@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "torch.AdamW"])
@pytest.mark.parametrize("name", ["plain", "everything", "fp16"])
def test_no_garbage_and_no_new_objects(name: str, optimizer: str) -> None:
    """Collection is off while windows are handed out: a cycle in each would stay."""
    loop, found, alive = looped(optimizer, **OPTIONS[name], accumulation_steps=2), [], []
    bookkeeping(loop)

    def look(step: int) -> None:
        if step in (250, 450):
            found.append(gc.collect())
            alive.append(len(gc.get_objects()))

    run(loop, 450, look)
    assert found[1] == 0, "cycles in 200 windows"
    assert abs(alive[1] - alive[0]) < 20, "objects in 200 windows"  # the measurement's own lists


def test_memory_does_not_grow_over_thousands_of_steps() -> None:
    loop, sizes = looped(max_grad_norm=1.0, schedule="cosine"), []
    bookkeeping(loop)

    def look(step: int) -> None:
        if step == 500:
            tracemalloc.start()
            gc.collect()
        if step in (600, 3000):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])

    try:
        run(loop, 3000, look)
    finally:
        tracemalloc.stop()
    # 2400 steps: one byte a step would be seen; floats of the spikes' window may be replaced by larger objects
    assert sizes[1] - sizes[0] < 2400, sizes


def test_tensors_do_not_pile_up() -> None:
    loop, counts = looped(accumulation_steps=2, precision="bf16"), []

    def look(step: int) -> None:
        if step in (20, 60):
            counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))

    run(loop, 60, look)
    assert counts[0] == counts[1]
