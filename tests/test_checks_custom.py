# SPDX-License-Identifier: Apache-2.0
"""Trainings out of the ordinary: losses with a state, samplers, missing labels; none is accused or changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import fastloop
from fastloop.checks import check_loader, preflight
from fastloop.checks import trying as tries
from fastloop.checks.undisturbed import model_kept
from fastloop.recipes.debug import check_gradients, diagnose, layer_statistics

CE = nn.CrossEntropyLoss()
X, Y = torch.randn(128, 8, generator=torch.Generator().manual_seed(1)), torch.arange(128) % 3


pytestmark = pytest.mark.usefixtures("one_thread")


def loaders(x: Any = X, y: Any = Y, **options: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(TensorDataset(x[:96], y[:96]), **{"batch_size": 32, "shuffle": True, **options})
    return train, DataLoader(TensorDataset(x[96:], y[96:]), batch_size=32)


def mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))


def said(findings: list[Any], *levels: str) -> str:
    return "\n".join(str(f) for f in findings if f.level in (levels or ("error", "warning")))


def looked(model: nn.Module, loss_fn: Any = CE, x: Any = X, y: Any = Y, **options: Any) -> list[Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return preflight(model, loss_fn, *loaders(x, y, **options), optimizer, schedule="cosine")


# ---- the loss function's own state


class Adversary:
    """Trains a discriminator inside of the loss, and counts."""

    def __init__(self, kind: Any) -> None:
        torch.manual_seed(5)
        self.judge = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.optimizer = kind(self.judge.parameters(), lr=1e-2)
        self.center, self.calls, self.seen = torch.zeros(3), 0, []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        self.calls += 1
        self.seen.append(len(batch[0]))
        self.center.mul_(0.9).add_(outputs.detach().mean(0), alpha=0.1)
        if model.training and torch.is_grad_enabled():
            self.optimizer.zero_grad()
            F.mse_loss(self.judge(outputs.detach().float()), torch.tensor(0.0)).backward()
            self.optimizer.step()
        return F.cross_entropy(outputs - self.center, batch[1]) + self.judge(outputs.float()).square().mean()


@pytest.mark.filterwarnings("ignore:.checks.", "ignore:Using a target size")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, fastloop.AdamW])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loss_that_trains_by_itself_is_as_without_checks(kind: Any, wrapped: bool) -> None:
    results = []
    for check in (False, True):
        model, loss = mlp(), Adversary(kind)

        def closed(model: nn.Module, batch: Any, inner: Any = loss) -> Tensor:
            return inner(model, batch)

        loop = fastloop.Loop(
            model, fastloop.AdamW(model.parameters(), lr=1e-2), closed if wrapped else loss, progress=False,
            check=check, seed=1,
        )  # fmt: skip
        loop.fit(*loaders(), epochs=2)
        results.append([*model.state_dict().values(), *loss.judge.state_dict().values(), loss.center])
        results[-1].append(torch.tensor([loss.calls, *loss.seen]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


JUDGE = nn.Linear(3, 1)
STEPS = 0


def with_globals(model: nn.Module, batch: Any) -> Tensor:
    global STEPS
    STEPS += 1
    with torch.no_grad():
        JUDGE.weight += 1
    return F.cross_entropy(model(batch[0]), batch[1])


def test_what_a_loss_binds_anew_comes_back() -> None:
    before, calls = JUDGE.weight.clone(), 0

    def counting(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return with_globals(model, batch)

    with model_kept(mlp(), counting) as model:
        counting(model, (X, Y))
        assert (calls, STEPS) == (1, 1)
    assert (calls, STEPS) == (0, 0)
    assert torch.equal(before, JUDGE.weight)


def test_a_loss_with_an_iterator_is_not_tried() -> None:
    others = iter([X] * 5)

    def consistent(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + model(next(others)).square().mean()

    found = looked(mlp(), consistent)
    assert "no batch is tried: the loss function holds an iterator (list_iterator)" in said(found, "note")
    assert len(list(others)) == 5


def test_without_memory_for_a_copy_no_batch_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "available_bytes", lambda: 100)
    model = mlp()
    weight = model[0].weight.clone()
    assert "GiB of host memory" in said(looked(model), "note")
    assert torch.equal(weight, model[0].weight)
    monkeypatch.setattr(tries, "available_bytes", lambda: None)
    assert looked(model) == []


def test_optimizer_states_count_as_memory() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = tries.bytes_of(model, optimizer)
    CE(model(X), Y).backward()
    optimizer.step()
    assert weights == 4 * sum(p.numel() for p in model.parameters())
    assert 3 * weights <= tries.bytes_of(model, optimizer) <= 3 * weights + 100


# ---- targets


def test_missing_labels_that_the_loss_leaves_out_are_a_note() -> None:
    y = X[:, :3].clone()
    y[::3, 1] = torch.nan

    def masked(model: nn.Module, batch: Any) -> Tensor:
        known = ~batch[1].isnan()
        return F.mse_loss(model(batch[0])[known], batch[1][known])

    found = looked(mlp(), masked, y=y)
    assert said(found) == ""
    assert "the loss is finite all the same" in said(found, "note")
    assert "NaN" in said(looked(mlp(), nn.MSELoss(), y=y), "error")
    assert "NaN" in said(looked(mlp(), masked, x=torch.where(X > 1, torch.nan, X), y=y), "error")
    assert diagnose(mlp(), masked, (X, y)).findings[0].level == "note"


def test_validation_that_is_missing_labels_too() -> None:
    y = Y.clone().float()[:, None]
    y[100:] = torch.nan
    assert "(validation)" in said(looked(mlp(1), nn.MSELoss(), y=y), "error")


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("target", "level"), [(torch.tensor(1.0), ""), (torch.zeros(3), "warning")])
def test_a_target_that_is_broadcast_to_the_outputs_is_no_error(target: Tensor, level: str) -> None:
    found = looked(mlp(), lambda model, batch: F.mse_loss(model(batch[0]), target))
    assert {f.level for f in found} == ({level} if level else set())


def test_rare_classes_in_shuffled_data_are_a_note() -> None:
    y = (torch.arange(128) == 127).long()
    assert said(looked(mlp(2), y=y)) == ""
    assert "all 32 labels of the batch are 0" in said(looked(mlp(2), y=y), "note")
    assert "all 32 labels of the batch are 0" in said(looked(mlp(2), y=y, shuffle=False), "warning")


# ---- inputs


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - 128) / 100)


def test_a_model_that_normalizes_its_inputs_is_not_told_to() -> None:
    raw = 100 * X + 128
    assert looked(Scales(), x=raw) == []
    assert looked(nn.Sequential(nn.BatchNorm1d(8), mlp()), x=raw) == []
    assert "normalize them" in said(looked(mlp(), x=raw))
    recurrent = nn.LSTM(8, 3, batch_first=True)
    found = looked(recurrent, lambda model, batch: CE(model(batch[0][:, None])[0][:, 0], batch[1]), x=raw)
    assert "normalize them" in said(found)


# ---- loaders


class Balanced(Sampler[list[int]]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(3):
            yield torch.randperm(96)[:32].tolist()


def test_a_batch_sampler_of_ones_own_decides_the_order() -> None:
    data = TensorDataset(X[:96], Y[:96].sort().values)
    assert check_loader(DataLoader(data, batch_sampler=Balanced())) == []
    fixed = [list(range(i, i + 32)) for i in (0, 32, 64)]
    assert "sorted by label" in said(check_loader(DataLoader(data, batch_sampler=fixed)), "error")
    assert said(preflight(mlp(), CE, DataLoader(data, batch_sampler=Balanced()), epochs=1)) == ""


class Lengths(Dataset):
    """Sequences whose lengths agree within a bucket of eight."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4 + index // 8, 8), index / 32), index % 3


def test_validation_in_buckets_is_tried_by_its_own_batches() -> None:
    buckets = [list(range(i, i + 8)) for i in range(0, 32, 8)]
    loader = DataLoader(Lengths(), batch_sampler=buckets)

    def mean(model: nn.Module, batch: Any) -> Tensor:
        return CE(model(batch[0]).mean(1), batch[1])

    found = preflight(mlp(), mean, loaders()[0], loader)
    assert "could not be" not in said(found, "note")
    assert "could not be computed in eval mode" in said(
        preflight(mlp(), lambda m, b: mean(m, b) if m.training else CE(m(b[0]), None), loaders()[0], loader), "note"
    )
    broken = DataLoader(Lengths(), batch_size=16)
    assert "val_loader: no batch could be made: RuntimeError" in said(
        preflight(mlp(), CE, loaders()[0], broken), "note"
    )


def test_data_sets_of_batches_are_tried() -> None:
    data = TensorDataset(X[:96].reshape(3, 32, 8), Y[:96].reshape(3, 32))
    model = nn.Sequential(mlp(), nn.Softmax(1))
    assert "a softmax of its own" in said(
        preflight(model, CE, DataLoader(data, batch_size=None, shuffle=True)), "error"
    )


def test_layers_with_a_rate_that_is_low_on_purpose_are_no_note() -> None:
    model = mlp()
    groups = [{"params": [p], "lr": 1e-3 * 0.01**i} for i, p in enumerate(model.parameters())]
    assert preflight(model, CE, *loaders(), torch.optim.AdamW(groups), schedule="cosine") == []


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_functions_that_look_leave_the_losses_state() -> None:
    loss, model = Adversary(torch.optim.AdamW), mlp()
    before = [value.clone() for value in loss.judge.state_dict().values()]
    for look in (check_gradients, diagnose, layer_statistics):
        look(model, lambda model, batch: loss(model, batch).detach() * 0 + CE(model(batch[0]), batch[1]), (X, Y))
    assert loss.calls == 0
    assert all(torch.equal(a, b) for a, b in zip(before, loss.judge.state_dict().values(), strict=True))
