# SPDX-License-Identifier: Apache-2.0
"""Samplers and data sets of a curriculum: what each epoch shows, and that the same run shows the same."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy
import pytest
import torch
from support import bits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastloop
from fastloop.loop.seeded import SeededDataset
from fastloop.recipes.curriculum import HardExamples, LengthCurriculum, LossCurriculum, TaskStages, UpdateLosses

LOSSES = torch.tensor([0.5, 2.0, 0.1, 0.9, 3.0, 0.2, 0.7, 1.5, 0.3, 0.6])
HARDEST_FIRST = [4, 1, 7, 3, 6, 9, 0, 8, 5, 2]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloop.loop.fitting.plot_curves", lambda run_dir: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def epoch_of(sampler: Any, epoch: int) -> list[int]:
    """Also checks that the sampler says of itself what it does."""
    sampler.set_epoch(epoch)
    shown = list(sampler)
    assert shown == sampler.indices(epoch).tolist() == list(sampler)
    assert len(shown) == len(sampler) == sampler.length(epoch)
    assert all(type(index) is int for index in shown)
    return shown


# ---- samplers


def test_the_easiest_come_first_and_all_in_the_end() -> None:
    sampler = LossCurriculum(LOSSES, epochs=4, start=0.3)
    easiest = HARDEST_FIRST[::-1]
    for epoch, count in enumerate([3, 5, 7, 9, 10, 10]):  # ceil(10 * (0.3 + 0.7 * e / 4))
        shown = epoch_of(sampler, epoch)
        assert sorted(shown) == sorted(easiest[:count])


@pytest.mark.parametrize(("count", "start", "epochs"), [(1, 0.01, 3), (7, 0.1, 10), (1000, 0.7, 7), (10, 1.0, 1)])
def test_a_curriculum_never_shrinks(count: int, start: float, epochs: int) -> None:
    sampler = LossCurriculum(torch.rand(count), epochs=epochs, start=start)
    lengths = [sampler.length(epoch) for epoch in range(epochs + 2)]
    assert lengths == sorted(lengths)
    assert lengths[0] == max(1, math.ceil(round(count * start, 6)))
    assert lengths[epochs] == count


def test_no_share_is_empty() -> None:
    assert LossCurriculum(LOSSES, epochs=4, start=1e-12).length(0) == 1
    assert HardExamples(LOSSES, share=1e-12, uniform=0.0).indices(0).tolist() == [4]
    assert HardExamples(LOSSES, share=1e-12, uniform=1e-12).length(0) == 2


def test_lengths_may_be_numpys() -> None:
    lengths = numpy.arange(1, 11)
    sampler = LengthCurriculum(lengths, epochs=2, shortest=lengths[3], longest=lengths.max())
    assert sorted(epoch_of(sampler, 0)) == [0, 1, 2, 3]


def test_the_hardest_are_in_each_epoch_and_the_others_come_by_turns() -> None:
    sampler = HardExamples(LOSSES, share=0.3, uniform=0.25)
    others: set[int] = set()
    for epoch in range(40):
        shown = epoch_of(sampler, epoch)
        assert len(set(shown)) == len(shown) == 3 + 2  # ceil(7 * 0.25)
        assert {4, 1, 7} <= set(shown)
        others |= set(shown) - {4, 1, 7}
    assert others == set(range(10)) - {4, 1, 7}
    assert sorted(epoch_of(HardExamples(LOSSES, share=0.3, uniform=0.0), 0)) == [1, 4, 7]
    assert sorted(epoch_of(HardExamples(LOSSES, share=1.0), 0)) == list(range(10))
    assert sorted(epoch_of(HardExamples(LOSSES, share=0.3, uniform=1.0), 0)) == list(range(10))


def test_short_sequences_come_first() -> None:
    lengths = [3, 16, 9, 30, 4, 12, 30, 5]
    sampler = LengthCurriculum(lengths, epochs=3, shortest=5)
    assert [sampler.bound(epoch) for epoch in range(5)] == pytest.approx([5, 5 + 25 / 3, 5 + 50 / 3, 30, 30])
    for epoch, bound in enumerate([5, 13, 21, 30, 30]):
        assert sorted(epoch_of(sampler, epoch)) == [i for i, length in enumerate(lengths) if length <= bound]
    bounded = LengthCurriculum(lengths, epochs=2, shortest=4, longest=16)
    assert sorted(epoch_of(bounded, 99)) == [0, 1, 2, 4, 5, 7]  # those of 30 never come


SAMPLERS = {
    "losses": lambda seed: LossCurriculum(LOSSES, epochs=4, start=0.9, seed=seed),
    "hard": lambda seed: HardExamples(LOSSES, share=0.5, uniform=0.4, seed=seed),
    "lengths": lambda seed: LengthCurriculum(range(1, 11), epochs=4, shortest=9, seed=seed),
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_the_order_is_one_of_seed_epoch_and_losses_alone(make: Any) -> None:
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first = [epoch_of(make(3), epoch) for epoch in range(6)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]
    torch.manual_seed(9)
    assert [epoch_of(make(3), epoch) for epoch in reversed(range(6))][::-1] == first
    assert len({tuple(shown) for shown in first}) == 6  # none like another, and not in order
    assert not any(shown == sorted(shown) for shown in first)
    assert [epoch_of(make(4), epoch) for epoch in range(6)] != first
    assert [epoch_of(make(3), epoch + 1) for epoch in range(5)] != [epoch_of(make(4), epoch) for epoch in range(5)]


def test_other_losses_are_another_order() -> None:
    sampler = HardExamples(LOSSES, share=0.2, uniform=0.0)
    kept = sampler.state_dict()
    sampler.update(-LOSSES)
    assert sorted(epoch_of(sampler, 0)) == [2, 5]
    sampler.load_state_dict(kept)
    assert sorted(epoch_of(sampler, 0)) == [1, 4]
    given = LOSSES.clone()
    sampler.update(given)
    given.zero_()
    assert torch.equal(sampler.losses, LOSSES.double())


def test_losses_may_be_a_list_or_an_array() -> None:
    for given in (LOSSES.tolist(), LOSSES.double().numpy(), LOSSES.half()):
        assert sorted(epoch_of(LossCurriculum(given, epochs=2, start=0.2), 0)) == [2, 5]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LossCurriculum([], epochs=2), r"losses must be one number for each example, got shape \(0,\)"),
        (lambda: LossCurriculum(torch.ones(2, 2), epochs=2), r"got shape \(2, 2\)"),
        (lambda: LossCurriculum([1.0, math.nan, math.inf], epochs=2), r"2 of 3 that are not, the first at index 1"),
        (lambda: LossCurriculum([1.0], epochs=0), "epochs must be an integer of at least 1, got 0"),
        (lambda: LossCurriculum([1.0], epochs=2.5), "epochs must be an integer of at least 1, got 2.5"),
        (lambda: LossCurriculum([1.0], epochs=2, start=0), r"start must lie in \(0, 1\], got 0"),
        (lambda: LossCurriculum([1.0], epochs=2, start=1.5), r"start must lie in \[0, 1\], got 1.5"),
        (lambda: LossCurriculum([1.0], epochs=2, seed=-1), "seed must be an integer of at least 0, got -1"),
        (lambda: LossCurriculum([1.0], epochs=2).update([1.0, 2.0]), "of the sampler's 1 examples, got 2"),
        (lambda: HardExamples([1.0], share=0.0), r"share must lie in \(0, 1\], got 0"),
        (lambda: HardExamples([1.0], uniform=-0.1), r"uniform must lie in \[0, 1\], got -0.1"),
        (lambda: HardExamples([1.0], uniform=math.nan), r"uniform must lie in \[0, 1\], got nan"),
        (lambda: LengthCurriculum([5, 9], epochs=2, shortest=4), "at least the smallest length, 5, got 4"),
        (lambda: LengthCurriculum([5, 9], epochs=2, shortest=6, longest=5), "longest must be at least shortest"),
        (lambda: LengthCurriculum([5, 9], epochs=2, shortest=math.nan), "shortest must be a length, got nan"),
        (lambda: TaskStages({}), r"stages must be \{epoch: dataset, ...\}, got \{\}"),
        (lambda: TaskStages({1: [1]}), r"a stage must begin at epoch 0, got \[1\]"),
        (lambda: TaskStages({0: [1], -2: [1]}), "an integer of at least 0, got -2"),
        (lambda: TaskStages({0: [1], 3: []}), "the stage of epoch 3 must have examples"),
        (lambda: TaskStages({0: [1]}).set_epoch(True), "epoch must be an integer of at least 0, got True"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_a_stage_without_an_index_is_no_stage() -> None:
    with pytest.raises(TypeError, match="stage of epoch 0 must be a map-style data set, got list_iterator"):
        TaskStages({0: iter([1])})


# ---- stages


class Numbers(Dataset):
    def __init__(self, first: int, count: int) -> None:
        self.first, self.count, self.told = first, count, -1

    def set_epoch(self, epoch: int) -> None:
        self.told = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([self.first + index + 0.0]), torch.randn(1)


def test_a_stage_begins_at_its_epoch() -> None:
    easy, middle, hard = Numbers(0, 3), Numbers(100, 5), Numbers(200, 2)
    stages = TaskStages({4: hard, 0: easy, 1: middle})
    for epoch, (first, count) in enumerate([(0, 3), (100, 5), (100, 5), (100, 5), (200, 2), (200, 2)]):
        stages.set_epoch(epoch)
        assert len(stages) == stages.length(epoch) == count
        assert [int(stages[i][0]) for i in range(count)] == list(range(first, first + count))
    assert easy.told == hard.told == 5


# ---- in a loop


def trained(run_dir: Any, make: Any, max_steps: int | None = None, **settings: Any) -> Any:
    """A run of new objects: the steps' samples, the loop, the loader."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    loader, callbacks = make()
    seen: list[Any] = []

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            seen.append((loop.global_step, batch[0].tolist()))
        x = torch.cat([batch[0], batch[1]], dim=1)[:, :2]
        return nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())

    settings = {"seed": 2, "progress": False, "save_every_epochs": None} | settings
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=0.1), loss_fn, run_dir=run_dir, callbacks=callbacks, **settings
    )
    loop.fit(loader, epochs=4, max_steps=max_steps)
    return seen, loop, loader


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(20, 1, generator=generator), torch.randn(20, 1, generator=generator))


def updated(kind: Any, **more: Any) -> Any:
    def make() -> Any:
        data = points()
        sampler = kind(torch.rand(20, generator=torch.Generator().manual_seed(6)), **more)
        return DataLoader(data, 3, sampler=sampler), [UpdateLosses(sampler, data)]

    return make


def staged(**settings: Any) -> Any:
    def make() -> Any:
        data = TaskStages({0: Numbers(0, 7), 1: Numbers(100, 12), 3: Numbers(200, 5)})
        return DataLoader(data, 3, shuffle=True, **settings), []

    return make


def staged_and_seeded() -> Any:
    data = SeededDataset(TaskStages({0: Numbers(0, 7), 1: Numbers(100, 12), 3: Numbers(200, 5)}))
    return DataLoader(data, 3, shuffle=True), []


MAKERS = {
    "losses": updated(LossCurriculum, epochs=2),
    "hard": updated(HardExamples, share=0.4, uniform=0.3),
    "lengths": lambda: (DataLoader(points(), 3, sampler=LengthCurriculum(range(20), epochs=2, shortest=9)), []),
    "stages": staged(),
    "stages in workers": staged(num_workers=1, persistent_workers=True),
    "stages, seeded": staged_and_seeded,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(name: str, tmp_path: Any) -> None:
    """In the middle of an epoch whose order the losses of now would not give, and at one's start."""
    make = MAKERS[name]
    wanted, whole, _ = trained(None, make)
    for stop in (6, 11) if "workers" not in name else (5,):
        trained(tmp_path / f"{stop}", make, stop)
        seen, loop, loader = trained(tmp_path / f"{stop}", make)
        assert seen == [batch for batch in wanted if batch[0] >= stop], stop
        assert bits(loop.model[0].weight) == bits(whole.model[0].weight)
        assert loader.batch_size == 3


@pytest.mark.parametrize("name", ["losses", "lengths", "stages", "stages, seeded"])
def test_the_schedule_ends_with_the_training(name: str) -> None:
    _, loop, loader = trained(None, MAKERS[name], schedule={"name": "warmup_cosine", "warmup_steps": 2})
    lengths = {"losses": [10, 15, 20, 20], "lengths": [10, 15, 20, 20]}.get(name, [7, 12, 12, 5])
    assert loop.global_step == sum(math.ceil(length / 3) for length in lengths)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    del loader


def test_workers_have_the_stage_of_the_epoch() -> None:
    seen, _, _ = trained(None, MAKERS["stages in workers"])
    shown = [sorted(int(i) for _, batch in seen[a:b] for (i,) in batch) for a, b in ((0, 3), (3, 7), (7, 11), (11, 13))]
    assert shown == [list(range(7)), list(range(100, 112)), list(range(100, 112)), list(range(200, 205))]
