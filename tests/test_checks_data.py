# SPDX-License-Identifier: Apache-2.0
"""Loaders and splits: order, overlap, leaking statistics; and that looking changes nothing."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset

from fastloop.checks import check_leakage, check_loader
from fastloop.checks.undisturbed import data_kept
from fastloop.loop.seeded import SeededDataset


def numbers(count: int = 100, seed: int = 0, **labels: Any) -> TensorDataset:
    drawn = torch.Generator().manual_seed(seed)
    given = labels.get("labels")
    return TensorDataset(
        torch.randn(count, 4, generator=drawn),
        torch.randint(0, 3, (count,), generator=drawn) if given is None else given,
    )


def said(findings: list[Any], level: str | None = None) -> str:
    return "\n".join(str(finding) for finding in findings if level in (None, finding.level))


class Draws(Dataset):
    """Images that are different each time, from a generator of its own."""

    def __init__(self, count: int = 20, random_too: bool = True) -> None:
        self.count, self.random_too = count, random_too
        self.python, self.numpy = random.Random(0), numpy.random.default_rng(0)
        self.old, self.torch = numpy.random.RandomState(0), torch.Generator()
        self.seen: dict[int, int] = {}
        self.order: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.seen[index] = self.seen.get(index, 0) + 1
        self.order.append(index)
        image = torch.full((3, 8, 8), float(index))
        if self.random_too:
            image += self.python.random() + self.numpy.random() + self.old.rand() + torch.rand(1, generator=self.torch)
            image += torch.rand(1) + random.random() + numpy.random.rand()
        return image, index % 2


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        raise AssertionError("a stream must not be touched")


# ---- order


def test_healthy_loaders_have_no_findings() -> None:
    train = DataLoader(numbers(), batch_size=16, shuffle=True)
    assert check_loader(train, DataLoader(numbers(30, 1), batch_size=16)) == []


def test_unshuffled_training_data_are_a_warning_and_sorted_ones_an_error() -> None:
    assert "not shuffled" in said(check_loader(DataLoader(numbers(), batch_size=16)), "warning")
    by_class = numbers(labels=torch.arange(100) // 34)
    assert "sorted by label (0 to 2)" in said(check_loader(DataLoader(by_class, batch_size=16)), "error")
    assert check_loader(DataLoader(by_class, batch_size=16, shuffle=True)) == []
    for labels in (
        torch.arange(100),
        torch.zeros(100).long(),
        torch.rand(100).sort()[0],
    ):  # an index, one class, numbers
        assert said(check_loader(DataLoader(numbers(labels=labels), batch_size=16)), "error") == ""


def test_distributed_samplers_are_looked_into() -> None:
    data = numbers()
    for shuffle, count in ((True, 0), (False, 1)):
        sampler = DistributedSampler(data, 2, 0, shuffle=shuffle)
        assert len(check_loader(DataLoader(data, batch_size=16, sampler=sampler))) == count


def test_streams_and_generators_are_not_touched() -> None:
    assert "an iterable data set" in said(check_loader(DataLoader(Stream(), batch_size=2)), "note")
    batches = iter([1, 2])
    assert "cannot be seen" in said(check_loader(batches, batches), "note")
    assert list(batches) == [1, 2]


def test_what_is_wrong_with_validation_is_said() -> None:
    train = DataLoader(numbers(), batch_size=16, shuffle=True)
    other = numbers(30, 1)
    assert "shuffled" in said(check_loader(train, DataLoader(other, batch_size=16, shuffle=True)), "note")
    assert "leaves 14 validation" in said(
        check_loader(train, DataLoader(other, batch_size=16, drop_last=True)), "warning"
    )
    assert "two evaluations" in said(check_loader(train, DataLoader(Draws(), batch_size=4)), "warning")
    assert said(check_loader(train, DataLoader(Draws(random_too=False), batch_size=4)), "warning") == ""


def test_no_augmentation_is_a_note_for_images_alone() -> None:
    assert "no augmentation" in said(check_loader(DataLoader(Draws(random_too=False), shuffle=True)), "note")
    assert check_loader(DataLoader(Draws(), shuffle=True)) == []


def test_draws_of_an_epoch_are_no_lack_of_augmentation() -> None:
    seeded = SeededDataset(Draws(random_too=True))
    assert "no augmentation" not in said(check_loader(DataLoader(seeded, shuffle=True)), "note")


# ---- leakage


def test_shared_indices_are_errors_and_disjoint_ones_none() -> None:
    data = numbers()
    a, b, c = Subset(data, range(60)), Subset(data, range(59, 100)), Subset(data, range(60, 100))
    assert "1 of 41 samples" in said(check_leakage(a, b), "error")
    assert check_leakage(a, c) == []
    assert "100 of 100" in said(check_leakage(data, data), "error")


def test_subsets_of_subsets_are_resolved() -> None:
    data = numbers()
    inner = Subset(Subset(data, range(50, 100)), range(10, 20))  # 60..69
    assert "as number 65 is" in said(check_leakage(inner, Subset(data, [3, 65])), "error")
    assert check_leakage(inner, Subset(data, [3, 75])) == []


def test_copied_samples_are_found_by_their_bytes() -> None:
    data = numbers(1000)
    copied = TensorDataset(torch.cat([data.tensors[0][500:540], 9 + torch.randn(60, 4)]), torch.zeros(100))
    found = check_leakage(data, copied)
    assert [f.level for f in found] == ["warning"]
    assert "40 of 100 inputs" in found[0].what
    assert check_leakage(data, numbers(100, 7)) == []


def test_data_of_few_values_repeat_without_leaking() -> None:
    drawn = torch.Generator().manual_seed(0)
    parts = [TensorDataset(torch.randint(0, 3, (300, 3), generator=drawn)) for _ in range(2)]
    assert check_leakage(*parts) == []


def test_files_in_both_are_found_without_reading_them() -> None:
    class Folder(Dataset):
        def __init__(self, files: list[str]) -> None:
            self.samples = [(file, 0) for file in files]

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("not read")

    assert "2 files" in said(check_leakage(Folder(["a", "b", "c"]), Folder(["c", "a", "d"])), "warning")


def test_random_inputs_cannot_be_compared() -> None:
    assert "inputs are random" in said(check_leakage(Draws(), Draws()), "note")


def test_statistics_of_more_than_the_training_split_are_errors() -> None:
    class Normalization:
        def __init__(self, count: Any) -> None:
            self.count = count

    assert "of 100 samples, and the training split has 60" in said(
        check_leakage(numbers(60), normalization=Normalization(100)), "error"
    )
    assert check_leakage(numbers(60), normalization=Normalization(60)) == []
    assert "no count" in said(check_leakage(numbers(60), normalization=object()), "note")


@pytest.mark.parametrize("over", [(0,), (0, 1)])
def test_normalized_before_the_split_is_seen(over: tuple[int, ...]) -> None:
    x = 5 + 3 * torch.randn(500, 4)
    for correction in (0, 1):
        std, mean = torch.std_mean(x, over, correction=correction)
        data = TensorDataset((x - mean) / std)
        before = check_leakage(Subset(data, range(400)), Subset(data, range(400, 500)))
        assert "over all splits together" in said(before, "warning")
    std, mean = torch.std_mean(x[:400], over)
    right = TensorDataset((x - mean) / std)
    assert check_leakage(Subset(right, range(400)), Subset(right, range(400, 500))) == []


def test_bad_arguments_and_empty_data() -> None:
    with pytest.raises(ValueError, match="samples must be an integer of at least 1"):
        check_leakage(numbers(), numbers(), samples=0)
    assert "no index" in said(check_leakage(Stream(), numbers()), "note")
    assert "no index" in said(check_leakage(numbers(), Stream()), "note")
    assert check_leakage(numbers(), TensorDataset(torch.zeros(0, 4))) == []


# ---- nothing is changed


def test_reading_inside_of_data_kept_leaves_no_trace() -> None:
    data, untouched = Draws(), Draws()
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    torch.manual_seed(0)
    with data_kept(loader):
        list(loader)
        data.extra = 1
        del data.count
    assert data.seen == {}
    assert data.order == []
    assert not hasattr(data, "extra")
    assert data.count == 20
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    states = [random.getstate(), numpy.random.get_state(), torch.get_rng_state()]
    first = data[3][0]
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert torch.equal(first, untouched[3][0])


def test_generators_behind_functions_are_kept_too() -> None:
    drawn = random.Random(1)
    data = TensorDataset(torch.zeros(4, 2))
    loader = DataLoader(data, collate_fn=lambda samples: (samples, drawn.random()))
    with data_kept(loader):
        list(loader)
    assert drawn.random() == random.Random(1).random()


def test_checks_read_a_bounded_number_of_samples() -> None:
    class Counted(Draws):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    train, other = (DataLoader(Counted(100_000, False), batch_size=8) for _ in range(2))
    check_loader(train, other)
    assert 0 < Counted.reads < 1000
