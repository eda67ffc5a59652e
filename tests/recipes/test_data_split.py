# SPDX-License-Identifier: Apache-2.0
"""Parts of a data set: sizes, classes, groups; labels read where they are; synthetic data."""

from __future__ import annotations

import functools
import operator
import tracemalloc
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from fastloop.loop.seeded import SeededDataset
from fastloop.recipes.data import labels_of, split, synthetic_data
from fastloop.recipes.evidence import recorded
from fastloop.recipes.start import baselines, overfit_one_batch

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n).float(), torch.zeros(n, dtype=torch.int64))


def indices(made: Any) -> list[list[int]]:
    return [list(part.indices) for part in made]


# ---- split


@pytest.mark.parametrize("n", [10, 11, 17, 103, 1000])
@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.7, 0.15, 0.15), (0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (1.0, 0)])
def test_sizes_add_up_and_no_sample_is_in_two_parts(n: int, fractions: tuple[float, ...]) -> None:
    made = split(rows(n), fractions)
    assert sorted(functools.reduce(operator.iadd, indices(made), [])) == list(range(n))
    for size, fraction in zip(made.sizes.values(), (*fractions, 0.0)[:3], strict=True):
        assert abs(size - n * fraction) < 1
    assert [len(part) for part in made] == list(made.sizes.values())


def test_order_is_shuffled_and_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    made = split(rows(100))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert indices(split(rows(100))) == indices(made) != indices(split(rows(100), seed=1))
    assert made.train.indices != sorted(made.train.indices)


@hypothesis.given(
    counts=st.lists(st.integers(3, 90), min_size=1, max_size=6),
    validation=st.floats(0.1, 0.3),
    test=st.floats(0.1, 0.3),
    seed=st.integers(0, 5),
)
def test_classes_keep_their_shares(counts: list[int], validation: float, test: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = len(labels)
    fractions = (1 - validation - test, validation, test)
    hypothesis.assume(min(n * validation, n * test) >= len(counts))
    made = split(rows(n), fractions, labels=labels, seed=seed)
    assert sorted(functools.reduce(operator.iadd, indices(made), [])) == list(range(n))
    plain = split(rows(n), fractions)
    assert made.sizes == plain.sizes
    for part, fraction in zip(made, fractions, strict=True):
        found = Counter(labels[part.indices].tolist())
        for label, count in enumerate(counts):
            assert found[label] >= 1
            if min(counts) * min(validation, test) >= 1:  # no class is lifted to 1 at the cost of the others
                assert abs(found[label] - count * fraction) < 2  # 1 of the rounding, 1 of the parts' sizes


def test_stratified_shares_are_those_of_the_class_where_they_are_whole() -> None:
    labels = torch.tensor([0] * 800 + [1] * 150 + [2] * 50)
    made = split(rows(1000), labels=labels)
    assert made.classes == {
        "train": {0: 640, 1: 120, 2: 40}, "validation": {0: 80, 1: 15, 2: 5}, "test": {0: 80, 1: 15, 2: 5}
    }  # fmt: skip
    assert "120" in made.table()
    assert made.stratified


def test_labels_are_taken_from_the_data_set_if_asked() -> None:
    data = synthetic_data("classification", 200, classes=4, imbalance=5)
    assert indices(split(data, stratify=True)) == indices(split(data, labels=labels_of(data)))
    assert split(data).classes is None


@pytest.mark.parametrize("stratify", [False, True])
def test_groups_are_never_divided(stratify: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 80, (2000,), generator=generator)
    labels = (torch.rand(2000, generator=generator) < 0.2).long()
    made = split(rows(2000), groups=groups, labels=labels if stratify else None)
    of_part = [set(groups[part.indices].tolist()) for part in made]
    assert not (of_part[0] & of_part[1])
    assert not (of_part[0] & of_part[2])
    assert not (of_part[1] & of_part[2])
    assert sum(made.sizes.values()) == 2000
    for part, wanted in zip(made, (1600, 200, 200), strict=True):
        assert abs(len(part) - wanted) <= 25  # the size of a group
        if stratify:
            assert float(labels[part.indices].double().mean()) == pytest.approx(0.2, abs=0.06)


def test_groups_of_any_kind_and_many_of_them_with_many_classes() -> None:
    names = [("a", None, 3, 1.5)[i % 4] for i in range(40)]
    parts = [{names[i] for i in part.indices} for part in split(rows(40), (0.5, 0.5), groups=names)]
    assert parts[0] | parts[1] == {"a", None, 3, 1.5}
    assert not parts[0] & parts[1]
    # a table of groups and classes would be 4000 x 2000 numbers, 64 MB
    tracemalloc.start()
    split(rows(4000), groups=numpy.arange(4000), labels=torch.arange(4000) % 2000, fractions=(0.5, 0.5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_groups_by_name_and_a_part_for_each_of_few_large_ones() -> None:
    made = split(rows(300), groups=["a"] * 100 + ["b"] * 100 + ["c"] * 100)
    assert made.sizes == {"train": 100, "validation": 100, "test": 100}
    with pytest.raises(ValueError, match="each part must have a group, got 2 groups for 3 parts"):
        split(rows(4), (0.5, 0.25, 0.25), groups=["a", "a", "b", "b"])


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (100, {"fractions": (0.8, 0.1)}, r"add up to 1, the first above 0, got \(0.8, 0.1\)"),
        (100, {"fractions": (1.2, -0.1, -0.1)}, "at least 0 that add up"),
        (100, {"fractions": (0.25,) * 4}, "two or three numbers"),
        (5, {}, "5 samples are too few"),
        (100, {"labels": torch.zeros(99).long()}, "labels must be one for each of the 100 samples"),
        (100, {"labels": torch.zeros(100)}, "classes must be integers, got torch.float32"),
        (100, {"labels": [0] * 98 + [1] * 2}, r"class 1 has 2 in all \(1 such classes\).*stratify=False"),
        (100, {"labels": [*range(33)] * 3 + [0]}, "validation has room for 10 of 33 classes"),
        (100, {"groups": [1, 2]}, "groups must be one for each"),
        (100, {"stratify": False, "labels": [0] * 100}, "leave one out"),
        (100, {"seed": -1}, "seed must be an integer of at least 0"),
        (0, {}, "has no samples"),
    ],
)
def test_what_cannot_be_split_says_why(n: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(rows(n), **options)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_only_data_with_an_index_is_split() -> None:
    with pytest.raises(TypeError, match="IterableDataset"):
        split(Stream())
    with pytest.raises(TypeError, match="data must be a data set or a pair of tensors, got int"):
        split(3)


def test_a_pair_of_arrays_is_a_data_set_and_the_split_is_written_down(tmp_path: Path) -> None:
    made = split((numpy.zeros((20, 3)), numpy.arange(20) % 2), stratify=True)
    x, y = made.test[0]
    assert x.shape == (3,)
    assert y in (0, 1)
    made.record(tmp_path)
    assert recorded(tmp_path)["split"]["sizes"] == {"train": 16, "validation": 2, "test": 2}
    assert "train" not in made.to_json()


# ---- labels_of


class Counting(Dataset):
    """Knows its targets, and counts the samples that are read."""

    def __init__(self, targets: Any, **more: Any) -> None:
        self.targets, self.read = targets, 0
        self.__dict__.update(more)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return torch.zeros(2), self.targets[index] * 10


def test_known_labels_are_taken_without_a_read() -> None:
    data = Counting([3, 1, 2, 0])
    nested = ConcatDataset([Subset(data, [1, 3]), SeededDataset(data)])
    assert labels_of(data).tolist() == [3, 1, 2, 0]
    assert labels_of(nested).tolist() == [1, 0, 3, 1, 2, 0]
    assert data.read == 0


def test_a_transform_of_targets_is_applied() -> None:
    assert labels_of(Counting([3, 1, 2, 0], target_transform=lambda y: y * 10)).tolist() == [30, 10, 20, 0]
    joint = Counting([3, 1, 2, 0], transforms=lambda x, y: (x, y * 10))  # nobody knows what it does to the target
    assert labels_of(joint).tolist() == [30, 10, 20, 0]
    assert joint.read == 4


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "samples",
    [
        [(torch.zeros(2), 1), (torch.ones(2), 0)],
        [{"x": 1.0, "label": 1}, {"x": 2.0, "label": 0}],
        [Pair(0, True), Pair(0, False)],
        [((torch.zeros(1), torch.zeros(2)), torch.tensor(1)), ((torch.zeros(1), torch.zeros(2)), torch.tensor(0))],
        [(torch.zeros(1), torch.zeros(2), 1), (torch.zeros(1), torch.zeros(3), 0)],
    ],
)
def test_labels_of_samples_of_any_form_are_read(samples: list[Any]) -> None:
    found = labels_of(samples)
    assert found.tolist() == [1, 0]
    assert found.dtype == torch.int64


def test_numbers_stay_numbers_and_names_are_refused() -> None:
    assert labels_of([(0, 0.5), (0, 1.5)]).dtype.is_floating_point
    with pytest.raises(TypeError, match=r"labels must be numbers, got str \('cat'\); map the names"):
        labels_of([(0, "cat"), (0, "dog")])
    with pytest.raises(ValueError, match="samples have no target"):
        labels_of([1.0, 2.0])
    with pytest.raises(ValueError, match="same shape"):
        labels_of([(0, torch.zeros(2)), (0, torch.zeros(3))])


# ---- synthetic_data


def test_shapes_and_ranges() -> None:
    x, y = synthetic_data("images", 50, classes=3, shape=(1, 8, 9)).tensors
    assert x.shape == (50, 1, 8, 9)
    assert x.min() >= 0
    assert x.max() <= 1
    assert set(y.tolist()) == {0, 1, 2}
    x, y = synthetic_data("regression", 50).tensors
    assert x.shape == (50, 20)
    assert y.shape == (50, 1)
    x, y = synthetic_data("sequences", 50, classes=7, noise=0.0).tensors
    assert x.shape == y.shape == (50, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    follows = {(a, b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)}
    assert len(follows) == 7  # without noise a token follows from the one before


def test_noise_is_a_share_of_the_labels_and_leaves_the_counts() -> None:
    clean = synthetic_data("classification", 1000, classes=4, noise=0.0, imbalance=10)
    noisy = synthetic_data("classification", 1000, classes=4, noise=0.4, imbalance=10)
    assert torch.equal(clean.tensors[0], noisy.tensors[0])
    assert torch.equal(clean.tensors[1].bincount(), noisy.tensors[1].bincount())
    assert 200 < int((clean.tensors[1] != noisy.tensors[1]).sum()) <= 400
    counts = clean.tensors[1].bincount().tolist()
    assert sum(counts) == 1000
    assert counts[0] / counts[-1] == pytest.approx(10, rel=0.03)


def test_regression_has_a_unit_signal_under_its_noise() -> None:
    x, y = synthetic_data("regression", 20000, noise=0.5).tensors
    assert float(y.var()) == pytest.approx(1.25, rel=0.05)
    left = y - x @ torch.linalg.lstsq(x, y).solution
    assert float(left.std()) == pytest.approx(0.5, rel=0.03)


def test_it_is_a_function_of_the_seed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = synthetic_data(seed=1).tensors
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, synthetic_data(seed=1).tensors, strict=True))
    assert not torch.equal(first[0], synthetic_data(seed=2).tensors[0])


@pytest.mark.parametrize("kind", ["classification", "images"])
def test_classes_can_be_learned(kind: str) -> None:
    parts = split(synthetic_data(kind, 400, classes=3, noise=0.1, **({"shape": (1, 8, 8)} if kind == "images" else {})))
    assert baselines(parts.train, parts.test, epochs=5).scores["linear"]["accuracy"] > 0.75


def test_sequences_can_be_learned() -> None:
    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x).movedim(-1, 1)

    torch.manual_seed(0)
    batch = synthetic_data("sequences", 16, classes=5, noise=0.0).tensors
    assert overfit_one_batch(Next(), nn.CrossEntropyLoss(), batch, lr=0.1).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "video"}, "kind must be one of classification, regression, images, sequences"),
        ({"shape": (3, 0)}, "shape must be sizes"),
        ({"kind": "images", "shape": (32, 32)}, "shape must be sizes"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"samples": 1}, "samples at least one for each"),
        ({"noise": 1.5}, r"noise must lie in \[0, 1\]"),
        ({"imbalance": 0.5}, "imbalance must be a ratio of at least 1"),
        ({"kind": "regression", "imbalance": 2.0}, "of kinds with a class for each sample"),
        ({"kind": "regression", "classes": 3}, "leave them out"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_data(**options)
