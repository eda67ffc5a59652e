# SPDX-License-Identifier: Apache-2.0
"""predict: every sample once, in order, nested outputs too, and the model as it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from fastloop.recipes.after import predict

X = torch.arange(22.0).view(11, 2)


class Both(NamedTuple):
    double: Tensor
    more: Any


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"a": x * 2, "pair": Both(x + 1, [x[:, 0], None])}


class Words(Dataset):
    """Batches that are dicts, as tokenizers give them."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"ids": torch.tensor([i, i + 1]), "labels": torch.tensor(i)}


class OfDict(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.sum(1)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from X


@pytest.mark.parametrize(
    "data",
    [
        X,
        (X, torch.zeros(11)),
        TensorDataset(X),
        TensorDataset(X, torch.zeros(11)),
        DataLoader(TensorDataset(X), batch_size=3),
        DataLoader(TensorDataset(X), batch_size=None),
        Stream(),
        list(X.split(5)),
    ],
    ids=["tensor", "pair", "dataset", "dataset of pairs", "loader", "loader of samples", "stream", "list of batches"],
)
def test_every_sample_once_in_its_order(data: Any) -> None:
    model = nn.Identity()
    if isinstance(data, DataLoader) and data.batch_size is None:  # rows are vectors then: as many outputs as numbers
        assert torch.equal(predict(model, data), X.flatten())
        return
    assert torch.equal(predict(model, data, batch_size=4), X)


def test_nested_outputs_are_joined_and_one_can_be_picked() -> None:
    made = predict(Nested(), X, batch_size=4)
    assert torch.equal(made["a"], X * 2)
    assert isinstance(made["pair"], Both)
    assert torch.equal(made["pair"].double, X + 1)
    assert torch.equal(made["pair"].more[0], X[:, 0])
    assert made["pair"].more[1] is None
    assert torch.equal(predict(Nested(), X, output="a"), X * 2)
    assert torch.equal(predict(Nested(), X, output=lambda out: out["pair"].double), X + 1)
    assert torch.equal(predict(Nested(), X, output=lambda out: out["pair"][0].sum(1)), (X + 1).sum(1))


def test_dicts_are_keyword_arguments_without_the_target() -> None:
    assert predict(OfDict(), Words(), batch_size=2).tolist() == [1, 3, 5, 7, 9]


def test_eval_mode_and_nothing_left_behind() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(X), batch_size=4, generator=torch.Generator().manual_seed(1))
    drawn = loader.generator.get_state()
    made = predict(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), drawn)
    assert [model.training, model[1].training, model[2].training] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not made.requires_grad
    assert torch.allclose(made, model[0](X) / (1 + 1e-5) ** 0.5)
    made.sum().mul(model[0].weight.sum()).backward()  # usable in a graph: no inference tensor


def test_precision_is_autocasts() -> None:
    model = nn.Linear(2, 3)
    made = predict(model, X, precision="bf16")
    assert made.dtype == torch.bfloat16
    assert torch.allclose(made.float(), model(X), rtol=0.02, atol=0.05)
    assert predict(model, X, precision="fp32").dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (DataLoader(TensorDataset(X), shuffle=True), ValueError, "RandomSampler"),
        (DataLoader(TensorDataset(X), sampler=torch.utils.data.SubsetRandomSampler([1])), ValueError, "shuffle=False"),
        (DataLoader(TensorDataset(X), batch_sampler=[[1, 0]]), ValueError, "list"),
        (DataLoader(TensorDataset(X), batch_size=4, drop_last=True), ValueError, "drops its last"),
        (X[:0], ValueError, "at least one sample"),
        (TensorDataset(X[:0]), ValueError, "at least one sample"),
        ([], ValueError, "at least one sample"),
        (torch.tensor(1.0), ValueError, "scalar"),
        ((X, X[:3]), ValueError, "as many samples, got 11 and 3"),
        ((X, X, X), TypeError, "two tensors"),
        (TensorDataset(X, X, X), TypeError, "list of 3 parts"),
        (3, TypeError, "got int"),
        ("text", TypeError, "got str"),
    ],
)
def test_data_that_cannot_be(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        predict(nn.Identity(), data)


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"loss": x.sum(), "out": x}


class Ragged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : 1 + int(x[0, 0]) % 2]


def test_outputs_that_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match=r"row for each sample, got shape \(\) for 11"):
        predict(Scalar(), X)
    assert torch.equal(predict(Scalar(), X, output="out"), X)
    with pytest.raises(ValueError, match="is not in what the model gives"):
        predict(Scalar(), X, output="logits")
    with pytest.raises(ValueError, match="one shape in all batches"):
        predict(Ragged(), torch.tensor([[0.0, 0], [1, 1]]), batch_size=1)
    with pytest.raises(TypeError, match="got a object"):
        predict(nn.Identity(), X, output=lambda out: object())
    with pytest.raises(ValueError, match="another form"):
        predict(nn.Identity(), X, batch_size=10, output=lambda out: None if len(out) == 1 else out)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_batch_size_is_checked(size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        predict(nn.Identity(), X, batch_size=size)


def test_model_and_precision_are_checked() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        predict(lambda x: x, X)
    with pytest.raises(ValueError, match="bf16-pure"):
        predict(nn.Identity(), X, precision="bf16-pure")
    with pytest.raises(ValueError, match="precision"):
        predict(nn.Identity(), X, precision="fp8")


def test_loaders_that_drop_samples_in_other_ways() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(torch.randn(10, 3))

    data = TensorDataset(torch.randn(10, 3))
    for loader in (
        DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, drop_last=True)),
        DataLoader(Stream(), batch_size=4, drop_last=True),
    ):
        with pytest.raises(ValueError, match="drop"):
            predict(nn.Identity(), loader)
    whole = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 5, drop_last=True))
    assert len(predict(nn.Identity(), whole)) == 10
