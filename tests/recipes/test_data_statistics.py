# SPDX-License-Identifier: Apache-2.0
"""Analysis and normalization: against NumPy in fp64 on the whole, in one pass over parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fastloop.recipes.data import (
    Analysis,
    Normalization,
    analyze,
    fit_normalization,
    split,
    synthetic_data,
)
from fastloop.recipes.data.moments import Moments
from fastloop.recipes.evidence import recorded


def labelled(x: Tensor) -> TensorDataset:
    return TensorDataset(x, torch.arange(len(x)) % 2)


def images(n: int = 100) -> Tensor:
    """Each image has a brightness of its own, so that deviations within images are not those of the whole."""
    generator = torch.Generator().manual_seed(0)
    brightness = torch.rand(n, 1, 1, 1, generator=generator) * 3
    return (
        brightness + 0.1 * torch.randn(n, 3, 6, 5, generator=generator) + torch.tensor([0.0, 10.0, -5.0])[:, None, None]
    )


# ---- normalization


@pytest.mark.parametrize("dims", ["channel", "feature", "all"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_statistics_are_those_of_the_whole_in_fp64(dims: str, batch_size: int) -> None:
    x = images()
    made = fit_normalization(labelled(x), dims=dims, batch_size=batch_size)
    axis = {"channel": (0, 2, 3), "feature": (0,), "all": None}[dims]
    whole = x.numpy().astype(numpy.float64)
    eps = numpy.finfo(numpy.float64).eps
    numpy.testing.assert_allclose(made.mean.numpy().squeeze(), whole.mean(axis=axis), rtol=64 * eps, atol=640 * eps)
    numpy.testing.assert_allclose(made.std.numpy().squeeze(), whole.std(axis=axis), rtol=64 * eps)
    assert made.count == 100
    assert made.mean.dtype == torch.float64


def test_the_mean_of_the_deviations_of_images_is_another_number() -> None:
    """What is often written in its place, and what it is not: most of the variance is between the images."""
    x = images()
    of_images = x.flatten(2).std(2).mean(0)
    assert (fit_normalization(labelled(x)).std.flatten() / of_images > 5).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_a_large_mean_costs_no_digits(offset: float) -> None:
    """sum(x*x) - sum(x)**2/n would have none left at 1e8, where NumPy's own mean of a column errs in the tenth."""
    x = torch.randn(5000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset
    made = fit_normalization(labelled(x), batch_size=64)
    exact = (x - offset).numpy()  # without rounding: both are multiples of the last digit of x
    numpy.testing.assert_allclose(made.std.numpy(), exact.std(axis=0), rtol=1e-12)
    whole = fit_normalization(labelled(x), dims="all", batch_size=64)
    numpy.testing.assert_allclose(whole.std.numpy(), exact.std(), rtol=1e-12)
    moments = Moments(3)
    moments.add(x)
    numpy.testing.assert_allclose(moments.merged().std.numpy(), exact.std(), rtol=1e-12)


def test_numbers_that_differ_in_their_last_digit_are_not_constant() -> None:
    x = torch.full((100, 2), 1e8, dtype=torch.float64)
    x[::2, 1] += 2**-26
    made = fit_normalization(labelled(x))
    assert made.constant.tolist() == [True, False]
    assert made.std.tolist() == [1.0, 2**-27]


def test_parts_of_any_size_merge_to_the_same() -> None:
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double()
    x[17, 0], x[400:, 1] = math.nan, math.inf
    moments = Moments(2)
    for part in x.split([0, 1, 399, 600]):
        moments.add(part)
    finite = [column[column.isfinite()].numpy() for column in x.T]
    assert moments.count.tolist() == [999, 400]
    wanted = [column.mean() for column in finite]  # near 0: what rounds are the values
    numpy.testing.assert_allclose(moments.mean.numpy(), wanted, rtol=1e-13, atol=1e-15)
    numpy.testing.assert_allclose(moments.std.numpy(), [column.std() for column in finite], rtol=1e-13)
    both = numpy.concatenate(finite)
    numpy.testing.assert_allclose(moments.merged().std.item(), both.std(), rtol=1e-13)


def test_it_normalizes_a_sample_and_a_batch_and_back() -> None:
    x = images()
    made = fit_normalization(labelled(x))
    normal = made(x)
    assert normal.dtype == torch.float32
    numpy.testing.assert_allclose(normal.double().mean(dim=(0, 2, 3)).numpy(), 0, atol=1e-6)
    numpy.testing.assert_allclose(normal.double().std(dim=(0, 2, 3), correction=0).numpy(), 1, rtol=1e-6)
    assert torch.equal(made(x[3]), normal[3])
    torch.testing.assert_close(made.inverse(normal), x)
    assert made(x.half()).dtype == torch.float16


def test_digits_are_kept_where_the_dtype_of_the_data_has_few() -> None:
    """Seconds since 1970 differ by 128 at least in fp32; 1/std of small halves and a large mean overflow in fp16."""
    seconds = 1_700_000_000 + torch.arange(100)[:, None]
    made = fit_normalization(seconds)
    normal = made(seconds)
    assert normal.dtype == torch.float32
    assert float(normal.std(correction=0)) == pytest.approx(1, rel=1e-6)
    assert len(normal.unique()) == 100
    large = fit_normalization(torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) * 1e6)
    x = torch.tensor([[100.0, 60000.0]], dtype=torch.float16)
    torch.testing.assert_close(large(x), large(x.double()).half(), rtol=0, atol=0)
    torch.testing.assert_close(made.inverse(normal.double()), seconds.double(), rtol=1e-13, atol=100 * 2**-24)


def test_pixels_become_floats() -> None:
    x = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    made = fit_normalization(labelled(x))
    assert made.mean.item() == pytest.approx(x.double().mean().item(), rel=1e-14)
    assert made(x).dtype == torch.float32


def test_of_a_split_the_train_part_is_taken() -> None:
    data = synthetic_data("regression", 200)
    made = split(data)
    whole, part = fit_normalization(data, dims="feature"), fit_normalization(made, dims="feature")
    numpy.testing.assert_allclose(part.mean, data.tensors[0][made.train.indices].double().mean(0), rtol=1e-12)
    assert part.count == 160
    assert not torch.equal(part.mean, whole.mean)


class Pictures(Dataset):
    """Of different sizes, with a channel that is 7 everywhere."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        made = torch.randn(2, 3 + index, 4, generator=torch.Generator().manual_seed(index))
        made[1] = 0.1
        return made, index % 2


def test_constant_channels_stay_finite_and_are_told() -> None:
    made = fit_normalization(Pictures(), batch_size=3)
    values = torch.cat([Pictures()[i][0][0].flatten() for i in range(10)]).double().numpy()
    assert made.std.flatten().tolist() == [pytest.approx(values.std(), rel=1e-12), 1.0]
    assert made.constant.flatten().tolist() == [False, True]
    assert made.to_json()["constant"] == [1]
    assert "constant: std taken as 1" in str(made)
    assert made(Pictures()[2][0])[1].abs().max() < 1e-7


def test_it_is_a_module_with_a_state() -> None:
    made = fit_normalization(labelled(images()))
    model = nn.Sequential(made, nn.Flatten())
    fresh = nn.Sequential(Normalization(), nn.Flatten())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh[0].mean, made.mean)
    assert torch.equal(fresh[0].std, made.std)
    assert fresh[0].count == 100
    assert not list(made.parameters())
    x = images()
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(torch.export.export(made, (x,)).module()(x), made(x))


def test_it_is_written_down(tmp_path: Path) -> None:
    fit_normalization(labelled(images())).record(tmp_path)
    assert recorded(tmp_path)["fit_normalization"]["count"] == 100


def test_bad_inputs_are_refused() -> None:
    x = images(10)
    x[4, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="inputs must be finite, sample 4 has NaN"):
        fit_normalization(labelled(x), batch_size=3)
    with pytest.raises(ValueError, match="dims must be one of channel, feature, all, got 'batch'"):
        fit_normalization(labelled(x), dims="batch")
    with pytest.raises(ValueError, match='one shape for dims="feature"'):
        fit_normalization(Pictures(), dims="feature")
    with pytest.raises(ValueError, match='"channel", got single numbers'):
        fit_normalization((torch.zeros(3), torch.zeros(3)))
    with pytest.raises(ValueError, match="must have one input, got a, b"):
        fit_normalization([{"a": 1.0, "b": 2.0, "label": 0}])
    with pytest.raises(ValueError, match="inputs must be numbers, got str"):
        fit_normalization([("text", 0)])
    with pytest.raises(TypeError, match=r"pass loader\.dataset"):
        fit_normalization(DataLoader(labelled(x)))
    with pytest.raises(ValueError, match="std must be above 0"):
        Normalization(0.0, 0.0)
    made = fit_normalization(labelled(images()))
    with pytest.raises(ValueError, match=r"samples that end in \[3, 1, 1\] \(1: any size\), got \[1, 6, 5\]"):
        made(torch.zeros(1, 6, 5))
    with pytest.raises(ValueError, match="samples with 1 channel"):
        Normalization(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))(torch.zeros(2, 3, 4, 4))


# ---- analysis


def found(analysis: Analysis, what: str) -> list[str]:
    return [each.level for each in analysis.findings if what in each.what]


def test_numbers_are_those_of_numpy() -> None:
    x = images()
    data = TensorDataset(x, torch.tensor([0] * 50 + [1] * 30 + [2] * 20))
    made = analyze(data, batch_size=7)
    whole = x.numpy().astype(numpy.float64)
    assert (made.size, made.looked_at) == (100, 100)
    assert made.mean["input"] == pytest.approx(whole.mean(), rel=1e-12)
    assert made.std["input"] == pytest.approx(whole.std(), rel=1e-12)
    assert (made.minimum["input"], made.maximum["input"]) == (whole.min(), whole.max())
    assert made.shapes == {"input": [(3, 6, 5)]}
    assert made.dtypes == {"input": ["float32"]}
    assert made.labels == {0: 50, 1: 30, 2: 20}
    assert made.imbalance == 2.5
    assert made.duplicates == 0
    assert found(made, "unequal") == []


def test_normalized_data_of_equal_classes_give_no_finding() -> None:
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    made = analyze(labelled(x))
    assert made.findings == []
    assert "nothing found" in made.table()


def test_what_is_not_finite_is_counted_and_left_out_of_the_statistics() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    x[3, 1], x[3, 2], x[70, 0], x[80, 0] = math.nan, math.nan, math.inf, -math.inf
    made = analyze(labelled(x), batch_size=64)
    finite = x[x.isfinite()].double().numpy()
    assert made.nan == {"input": 2}
    assert made.infinite == {"input": 2}
    assert made.mean["input"] == pytest.approx(finite.mean(), rel=1e-12)
    assert made.maximum["input"] == finite.max()
    assert [each.what for each in made.findings] == [
        "2 values are NaN, in 3 of 200 samples", "2 values are infinite, in 3 of 200 samples"
    ]  # fmt: skip
    json.dumps(made.to_json(), allow_nan=False)


def test_every_value_not_a_number() -> None:
    made = analyze(labelled(torch.full((4, 2), math.nan)))
    assert made.mean == {"input": None}
    assert found(made, "values are NaN") == ["error"]
    json.dumps(made.to_json(), allow_nan=False)


def test_classes_that_are_unequal_missing_alone_or_out_of_range() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))

    def of(labels: list[int], **options: Any) -> Analysis:
        return analyze((x, torch.tensor(labels)), **options)

    assert found(of([0] * 76 + [1] * 24), "unequal, 3.167 to 1") == ["warning"]
    assert found(of([0] * 75 + [1] * 25), "unequal") == []  # 3, and not above it
    assert found(of([0] * 50 + [2] * 50), "1 of 3 classes have no sample: 1") == ["warning"]
    assert found(of([0] * 50 + [1] * 50, classes=4), "2 of 4 classes have no sample: 2, 3") == ["warning"]
    assert found(of([1] * 100), "all samples are of class 1") == ["error"]
    assert found(of([0] * 50 + [5] * 50, classes=5), "label 5 is not below the number of classes, 5 (50") == ["error"]
    assert found(of([0] * 50 + [-1] * 50), "label -1 is below 0 (50") == ["error"]
    assert found(of([0] * 50 + [1] * 40 + [-100] * 10), "below 0") == []  # torch's ignore_index
    names = [(x[i], "cat" if i % 2 else "dog") for i in range(100)]
    assert found(analyze(names), "labels are text") == ["error"]
    assert analyze(names).labels == {"cat": 50, "dog": 50}


def test_features_that_are_constant_or_of_another_scale() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[:, 3] = 0.1, x[:, 3] * 1000
    made = analyze(labelled(x))
    assert made.constant_features == {"input": [1]}
    assert found(made, "1 of 4 features are the same in all samples: 1") == ["note"]
    assert found(made, "values are not normalized") == ["warning"]
    assert found(made, "features have standard deviations from") == ["warning"]
    assert found(analyze(labelled(torch.full((5, 2), 3.0))), "2 of 2 features are the same") == ["error"]


def test_duplicates_and_their_contradictions() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    x[50:53] = x[:3]
    y = torch.arange(100) % 2
    y[51] = 1 - y[1]
    y[[50, 52]] = y[[0, 2]]
    made = analyze((x, y), batch_size=8)
    assert made.duplicates == 3
    assert found(made, "3 of 100 have the same inputs as an earlier one") == ["warning"]
    assert found(made, "inputs occur with several targets, 1 times") == ["warning"]


def test_tokens_images_dicts_and_several_inputs() -> None:
    tokens = analyze(synthetic_data("sequences", 100, classes=9))
    assert set(tokens.labels) == set(range(9))
    assert (tokens.minimum["input"], tokens.maximum["input"]) == (0, 8)
    assert found(tokens, "not normalized") == []
    assert found(tokens, "several targets") == []
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    assert found(analyze(labelled(pixels)), "not normalized") == ["warning"]
    rows = [{"ids": [1, 2, 3][: 1 + i % 3], "size": float(i), "text": "a", "label": i % 2} for i in range(10)]
    made = analyze(rows)
    assert made.shapes == {"ids": [(1,), (2,), (3,)], "size": [()], "text": []}
    assert found(made, "3 different shapes") == ["note"]
    assert found(made, "samples are str, not numbers") == ["note"]
    pair = analyze([((torch.zeros(2), torch.ones(3) * i), i % 2) for i in range(4)])
    assert list(pair.mean) == ["input.0", "input.1"]
    assert pair.mean["input.1"] == 1.5


def test_numbers_as_targets() -> None:
    x, y = synthetic_data("regression", 300).tensors
    made = analyze((x, 1000 * y + 5))
    assert made.labels == {}
    assert made.imbalance is None
    assert made.std["target"] == pytest.approx(float((1000 * y).std(correction=0)), rel=1e-6)
    assert found(made, "targets have mean") == ["note"]
    assert found(analyze((x, torch.ones(300))), "all targets are 1") == ["error"]
    assert found(analyze((x, y.where(y > -2, math.nan))), "values are NaN") == ["error"]


class Counting(Dataset):
    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.randn(3, generator=torch.Generator().manual_seed(index)), index % 4


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2) * i, i % 2) for i in range(30)])


def test_targets_that_are_ignored_are_no_class() -> None:
    x, y = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    y[:2] = -100
    made = analyze((x, y))
    assert made.labels == {-100: 2, 0: 31, 1: 31}
    assert made.imbalance == 1
    assert "2 classes, imbalance 1" in str(made)
    assert made.findings == []


def test_a_batch_of_a_loader_and_inputs_alone_are_data() -> None:
    """A DataLoader gives a list of two tensors, which are no two samples."""
    data = synthetic_data(samples=50)
    batch = next(iter(DataLoader(data, 50)))
    assert isinstance(batch, list)
    assert analyze(batch) == analyze(data)
    inputs = data.tensors[0]
    assert analyze(inputs).looked_at == analyze(inputs.numpy()).looked_at == 50
    assert torch.equal(fit_normalization(inputs).mean, fit_normalization(data).mean)
    assert analyze([torch.zeros(3), torch.ones(3), torch.zeros(3)]).looked_at == 3


class WithoutLength(Dataset):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2), 0


def test_a_part_is_chosen_at_random_and_each_sample_is_read_once() -> None:
    data = Counting()
    analyze(data)
    assert data.read == list(range(1000))
    data.read = []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    made = analyze(data, samples=50)
    assert (made.size, made.looked_at, len(set(data.read))) == (1000, 50, 50)
    assert max(data.read) > 500
    assert torch.equal(torch.get_rng_state(), state)
    assert analyze(Counting(), samples=50) == made
    other = Counting()
    analyze(other, samples=50, seed=1)
    assert other.read != data.read


def test_a_stream_is_read_once() -> None:
    made = analyze(Stream())
    assert (made.size, made.labels) == (30, {0: 15, 1: 15})
    with pytest.raises(ValueError, match="samples=5 needs a data set with an index"):
        analyze(Stream(), samples=5)


def test_memory_is_that_of_a_batch() -> None:
    """Nothing of the samples stays but statistics, fingerprints and 16 pictures."""
    made = analyze(labelled(torch.rand(200, 1, 8, 8)), batch_size=10)
    assert len(made.pictures) == 16
    labels = [label for _, label in made.pictures]
    assert set(labels) == {0, 1}


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = synthetic_data("images", 40, classes=3)
    for name, analysis in (("images", analyze(data)), ("rows", analyze(synthetic_data()))):
        assert analysis.plot(tmp_path / f"{name}.png").stat().st_size > 3000
    with pytest.raises(ValueError, match="nothing to draw"):
        analyze(synthetic_data("regression")).plot(tmp_path / "none.png")


def test_wrong_use(tmp_path: Path) -> None:
    for options in ({"samples": 0}, {"batch_size": 0}, {"classes": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer of at least 1, got 0"):
            analyze(synthetic_data(), **options)
    with pytest.raises(ValueError, match="has no samples"):
        analyze([])
    with pytest.raises(TypeError, match="WithoutLength has no __len__"):
        analyze(WithoutLength())
    with pytest.raises(ValueError, match="got a target alone"):
        analyze([{"label": 1}])
    with pytest.raises(TypeError, match="got a DataLoader"):
        analyze(DataLoader(synthetic_data()))
    with pytest.raises(ValueError, match="the same parts"):
        analyze([{"a": 1.0}, {"b": 1.0}])
    made = analyze(synthetic_data())
    made.record(tmp_path)
    assert recorded(tmp_path)["analyze"]["size"] == 1000
    assert "pictures" not in made.to_json()
