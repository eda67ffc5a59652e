# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does on the union of their batches: DDP and FSDP2, uneven batches, uneven ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from by_hand import Mean
from tolerances import unit_roundoff
from torch import Tensor

import fastloop
from fastloop import Loop

# micro-batches of each rank; the second runs out early, which must cost neither a wrong mean nor a hang
SIZES = {"equal": ([4, 4, 4, 4], [4, 4, 4, 4]), "uneven": ([4, 1, 7, 3, 2], [2, 5, 1])}


def data_of(rank: int, sizes: str) -> list[Tensor]:
    made = torch.Generator().manual_seed(rank)
    return [torch.randn(n, Mean.FEATURES, generator=made) for n in SIZES[sizes][rank]]


def gradients(rank: int, strategy: str, sizes: str, accumulation: int, optimizer: str) -> dict[str, Any]:
    """The gradient of each window, as SGD with a learning rate of 1 subtracts it from zero."""
    model = Mean()
    made = {"fastloop": fastloop.SGD, "torch": torch.optim.SGD}[optimizer](model.parameters(), lr=1.0)
    loop = Loop(model, made, strategy=strategy, accumulation_steps=accumulation)
    reductions: list[int] = []
    if strategy == "ddp":

        def counted(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at the annotations
            reductions.append(loop.global_step)
            return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)

        loop.model.register_comm_hook(None, counted)  # type: ignore[operator]
    found, losses, samples = [], [], []
    for window in loop.windows(data_of(rank, sizes), epochs=1):
        with torch.no_grad():
            model.w.zero_()
        for batch in window:
            loop.backward(loop.model(batch).mean() + 1.0)
        losses.append(loop.step().loss.item())
        w: Any = model.w.detach()
        found.append((w.full_tensor() if hasattr(w, "full_tensor") else w).neg().tolist())
        samples.append(window.samples)
    return {"gradients": found, "losses": losses, "samples": samples, "reductions": reductions}


def every_case(rank: int) -> dict[str, Any]:
    """One pair of processes for all cases: starting them is what takes long."""
    import torch.distributed.algorithms.ddp_comm_hooks.default_hooks  # noqa: F401

    return {repr(case): gradients(rank, *case) for case in CASES}


CASES = [
    (strategy, sizes, accumulation, optimizer)
    for strategy in ("ddp", "fsdp2")
    for sizes in SIZES
    for accumulation in (1, 2)
    for optimizer in ("fastloop", "torch")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return ranks.run(every_case, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_union_of_the_batches(case: tuple[str, str, int, str], results: list[dict[str, Any]]) -> None:
    _, sizes, accumulation, _ = case
    both = [result[repr(case)] for result in results]
    assert both[0]["gradients"] == both[1]["gradients"], "the ranks have drifted apart"
    assert both[0]["losses"] == both[1]["losses"]
    data = [data_of(rank, sizes) for rank in range(2)]
    count = -(-max(map(len, data)) // accumulation)
    assert len(both[0]["gradients"]) == len(both[1]["gradients"]) == count
    for index, found in enumerate(both[0]["gradients"]):
        here = slice(index * accumulation, (index + 1) * accumulation)
        rows = torch.cat([batch for rank in data for batch in rank[here]])
        n = len(rows)
        # as in test_loop_equality: n + 8 roundings on the way of a row, and the sum and the mean over the ranks
        bound = (n + 11) * unit_roundoff(torch.float32) * rows.double().abs().sum(0) / n
        off = (torch.tensor(found, dtype=torch.float64) - rows.double().mean(0)).abs()
        assert (off <= bound).all(), (index, off, bound)
        # the model's output for weights of 0, and 1.0; summed with weights of at most n in float64
        assert both[0]["losses"][index] == pytest.approx(1.0, abs=1e-14)
        assert [r["samples"][index] for r in both] == [sum(map(len, rank[here])) for rank in data]


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "ddp"], ids=repr)
def test_gradients_are_reduced_once_a_window(case: Any, results: list[dict[str, Any]]) -> None:
    """accelerate#1153 reduced them after each micro-batch, or after none of the last window's."""
    windows = len(results[0][repr(case)]["gradients"])
    for result in results:
        assert result[repr(case)]["reductions"] == list(range(windows))


def plain_model_under_a_group(rank: int) -> str:
    model = Mean()
    with pytest.raises(RuntimeError, match=r"2 processes would each train a model of their own") as caught:
        Loop(model, fastloop.SGD(model.parameters()))
    return str(caught.value)


def test_several_processes_need_a_strategy(tmp_path: Path) -> None:
    """Also where the group was made by hand, as under mp.spawn, and no variable tells."""
    for text in ranks.run(plain_model_under_a_group, 2, tmp_path):
        assert 'strategy="ddp"' in text
