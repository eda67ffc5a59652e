# SPDX-License-Identifier: Apache-2.0
"""Loaders rebuilt with other settings: the same samples in the same order, and a resume that stays exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

import fastloop
from fastloop.loop.loader import with_settings

NUMBERS = torch.arange(23.0)


class Numbers(Dataset):
    """Numbers with noise of torch's own generator, as an augmentation would add it."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return len(NUMBERS)

    def __getitem__(self, index: int) -> torch.Tensor:
        return NUMBERS[index].reshape(1) + self.noise * torch.rand(1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(NUMBERS.reshape(-1, 1))


class OwnIteration(DataLoader):
    def __iter__(self):
        return super().__iter__()


class Shortened:
    def __len__(self):
        return 2

    def set_epoch(self, epoch):
        """Stands for a loader that shuffles by the epoch."""


class OwnLength(Shortened, DataLoader):
    """What it does in its own way comes from a class that is no DataLoader."""


def collate(items):
    return torch.stack(items)


def told(worker: int) -> None:
    """Stands for a worker_init_fn."""


def epoch_of(loader: DataLoader, seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return list(loader)


def test_the_order_stays_whatever_the_workers() -> None:
    given = DataLoader(Numbers(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    expected = list(given)
    given.generator.manual_seed(5)
    rebuilt = with_settings(given, {"num_workers": 1, "prefetch_factor": 3, "persistent_workers": True})
    assert (rebuilt.num_workers, rebuilt.prefetch_factor, rebuilt.persistent_workers) == (1, 3, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, rebuilt, strict=True))


def test_what_is_not_named_stays() -> None:
    given = DataLoader(
        Numbers(), batch_size=4, sampler=RandomSampler(Numbers(), num_samples=9), num_workers=2, collate_fn=collate,
        drop_last=True, timeout=7, worker_init_fn=told, prefetch_factor=5, persistent_workers=True,
        multiprocessing_context="fork", in_order=False,
    )  # fmt: skip
    rebuilt = with_settings(given, {"batch_size": 3})
    same = (
        "dataset", "sampler", "num_workers", "collate_fn", "drop_last", "timeout", "worker_init_fn", "prefetch_factor",
        "persistent_workers", "multiprocessing_context", "in_order", "generator",
    )  # fmt: skip
    assert [getattr(rebuilt, name) for name in same] == [getattr(given, name) for name in same]
    assert (rebuilt.batch_size, given.batch_size, len(rebuilt)) == (3, 4, 3)
    alone = with_settings(given, {"num_workers": 0, "prefetch_factor": 4, "persistent_workers": True})
    assert (alone.num_workers, alone.prefetch_factor, alone.persistent_workers, alone.timeout) == (0, None, False, 0)
    given.timeout = 0
    assert len(list(alone)) == 2


def test_a_data_set_becomes_a_loader() -> None:
    shuffled = torch.cat(epoch_of(with_settings(Numbers(), {"batch_size": 5}))).flatten()
    assert not torch.equal(shuffled, NUMBERS)
    assert torch.equal(shuffled.sort().values, NUMBERS)
    streamed = with_settings(Stream(), {"batch_size": 5, "num_workers": 1})
    assert torch.equal(torch.cat(list(streamed)).flatten(), NUMBERS)
    assert len(list(with_settings(DataLoader(Stream(), batch_size=2), {"batch_size": 23}))) == 1


def test_a_loader_that_keeps_its_place_stays_one() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata").StatefulDataLoader
    given = stateful(Numbers(), batch_size=4, shuffle=True, snapshot_every_n_steps=3)
    rebuilt = with_settings(given, {"batch_size": 6})
    assert type(rebuilt) is stateful
    assert rebuilt.snapshot_every_n_steps == 3
    assert [len(batch) for batch in rebuilt] == [6, 6, 6, 5]


@pytest.mark.parametrize(
    ("given", "settings", "error", "text"),
    [
        (DataLoader(Numbers()), {"workers": 2}, TypeError, "batch_size, num_workers"),
        (DataLoader(Numbers()), {"num_workers": -1}, ValueError, "num_workers must be .* at least 0, got -1"),
        (DataLoader(Numbers()), {"batch_size": True}, ValueError, "batch_size must be an integer"),
        (DataLoader(Numbers()), {"pin_memory": 1}, ValueError, "pin_memory must be True or False"),
        (DataLoader(Numbers()), {"prefetch_factor": 4}, ValueError, "give num_workers too"),
        (DataLoader(Numbers(), batch_size=None), {"batch_size": 4}, ValueError, "batch_size=None"),
        (
            DataLoader(Numbers(), batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 4, False)),
            {"batch_size": 4}, ValueError, "batch_sampler of its own",
        ),
        (OwnIteration(Numbers()), {"num_workers": 1}, TypeError, "OwnIteration has __iter__ of its own"),
        (OwnLength(Numbers()), {"num_workers": 1}, TypeError, "OwnLength has __len__ and set_epoch of its own"),
        (Numbers(), {"num_workers": 1}, ValueError, "batch_size is not given"),
        ([NUMBERS], {"batch_size": 1}, TypeError, "for a DataLoader or a data set, got list"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(given, settings, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        with_settings(given, settings)


def test_a_batch_sampler_of_ones_own_takes_the_other_settings() -> None:
    batches = BatchSampler(SequentialSampler(NUMBERS), 10, True)
    rebuilt = with_settings(DataLoader(Numbers(), batch_sampler=batches), {"num_workers": 1})
    assert [len(batch) for batch in rebuilt] == [10, 10]
    assert rebuilt.batch_sampler is batches


def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path: Path) -> None:
    given = DataLoader(Numbers(noise=0.5), batch_size=2, shuffle=True)
    settings = {"batch_size": 4, "num_workers": 1, "persistent_workers": True}

    def trained(folder: str, max_steps: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        loop = fastloop.Loop(
            model, fastloop.SGD(model.parameters(), lr=1e-3), lambda model, batch: (model(batch) ** 2).mean(),
            run_dir=tmp_path / folder, seed=0, save_every_steps=1, progress=False, curves=False,
        )  # fmt: skip
        loop.fit(with_settings(given, settings), epochs=2, max_steps=max_steps)
        return model.weight.detach().clone()

    whole = trained("whole", None)
    assert not torch.equal(trained("parts", 8), whole)
    assert torch.equal(trained("parts", None), whole)
