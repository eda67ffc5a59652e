# SPDX-License-Identifier: Apache-2.0
"""The loss of each example; the callback that updates."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy
import pytest
import torch
from support import bits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastloop
from fastloop.recipes.curriculum import HardExamples, LossCurriculum, UpdateLosses, example_losses
from fastloop.recipes.data import FocalLoss

COUNT = 11
SEED = torch.Generator().manual_seed(4)
X = torch.randn(COUNT, 6, generator=SEED)
CLASSES = torch.randint(0, 3, (COUNT,), generator=SEED)
PIXELS = torch.randint(0, 3, (COUNT, 2), generator=SEED)
PIXELS[3] = torch.tensor([-100, 1])
NUMBERS = torch.randn(COUNT, 6, generator=SEED)
SHARES = torch.softmax(torch.randn(COUNT, 6, generator=SEED), 1)
WEIGHT = torch.tensor([0.5, 2.0, 1.0])


class Sides(nn.Module):
    """6 numbers as 3 classes of 2 pixels."""

    def forward(self, x: Any) -> Any:
        return x.reshape(-1, 3, 2)


def network(last: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 6), last)


torch.manual_seed(4)
three = nn.Sequential(nn.Linear(6, 3))
CRITERIA = {
    "cross entropy": (three, nn.CrossEntropyLoss(), CLASSES),
    "weighted": (three, nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), CLASSES),
    "pixels": (Sides(), nn.CrossEntropyLoss(weight=WEIGHT), PIXELS),
    "ignored": (three, nn.CrossEntropyLoss(ignore_index=2), CLASSES),
    "focal": (three, FocalLoss(2.0, WEIGHT, label_smoothing=0.1), CLASSES),
    "focal, pixels": (Sides(), FocalLoss(1.0, WEIGHT), PIXELS),
    "shares": (nn.Identity(), nn.CrossEntropyLoss(), SHARES),
    "nll": (nn.Sequential(Sides(), nn.LogSoftmax(1)), nn.NLLLoss(), PIXELS),
    "mse": (nn.Identity(), nn.MSELoss(), NUMBERS),
    "huber": (nn.Identity(), nn.HuberLoss(), NUMBERS),
    "bce": (nn.Identity(), nn.BCEWithLogitsLoss(pos_weight=torch.full((6,), 3.0)), SHARES),
    "kl, batchmean": (nn.LogSoftmax(1), nn.KLDivLoss(reduction="batchmean"), SHARES),
    "kl, mean": (nn.LogSoftmax(1), nn.KLDivLoss(), SHARES),
}


class Bare(nn.Module):
    """A criterion that has no reduction."""

    def forward(self, output: Any, target: Any) -> Any:
        return (output - target).square().sum(1).mean()


class Stubborn(Bare):
    """And one that has it and does not follow it."""

    reduction = "mean"


@pytest.mark.parametrize("name", [*CRITERIA, "bare", "stubborn"])
def test_each_has_the_loss_of_a_batch_of_its_own(name: str) -> None:
    last, criterion, target = CRITERIA.get(name, (nn.Identity(), Stubborn() if name == "stubborn" else Bare(), NUMBERS))
    model = network(last)
    got = example_losses(model, criterion, TensorDataset(X, target), batch_size=4)
    forwards: list[int] = []
    if isinstance(criterion, FocalLoss):
        model.register_forward_pre_hook(lambda module, given: forwards.append(len(given[0])))
        example_losses(model, criterion, TensorDataset(X, target), batch_size=4)
        assert forwards == [4, 4, 3]
    model.eval()
    with torch.no_grad():
        wanted = [criterion(model(X[i : i + 1]), target[i : i + 1]).item() for i in range(COUNT)]
    assert got.dtype == torch.float64
    assert got.shape == (COUNT,)
    assert numpy.allclose(got.numpy(), wanted, rtol=2e-6, atol=1e-7, equal_nan=True)
    assert math.isnan(wanted[0]) == (name == "ignored" and int(CLASSES[0]) == 2)
    if hasattr(criterion, "reduction"):
        assert criterion.reduction == ("batchmean" if "batchmean" in name else "mean")


def test_a_function_is_asked_for_one_example_at_a_time_or_gives_them_all() -> None:
    model, data = network(nn.Identity()), TensorDataset(X, NUMBERS)
    sizes = []

    def mean(model: nn.Module, batch: Any) -> Any:
        sizes.append(len(batch[0]))
        return nn.functional.mse_loss(model(batch[0]), batch[1]), {"a": 1.0}, 7

    def each(model: nn.Module, batch: Any) -> Any:
        return (model(batch[0]) - batch[1]).square().mean(1)

    wanted = example_losses(model, nn.MSELoss(), data)
    assert torch.allclose(example_losses(model, mean, data, batch_size=4), wanted, rtol=1e-5)
    assert sizes == [4, 1, 1, 1, 1, 4, 1, 1, 1, 1, 3, 1, 1, 1]
    assert torch.allclose(example_losses(model, each, data, batch_size=4), wanted, rtol=1e-5)


def test_dicts_and_what_a_loader_collates() -> None:
    """Sequences of other lengths need the loader's collate_fn; its order and its generator do not matter."""
    texts = [torch.arange(1.0, n + 1) for n in (3, 1, 4)]

    def collate(items: Any) -> Any:
        return {
            "tokens": nn.utils.rnn.pad_sequence(items, batch_first=True),
            "n": torch.tensor([len(i) for i in items]),
        }

    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(texts, 2, shuffle=True, collate_fn=collate, generator=generator)  # type: ignore[arg-type]
    before = generator.get_state()

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return (batch["tokens"].sum(1) / batch["n"]).mean()

    assert example_losses(nn.Linear(1, 1), loss_fn, loader, batch_size=2).tolist() == [2.0, 1.0, 2.5]
    assert torch.equal(generator.get_state(), before)


def test_nothing_is_changed_by_looking() -> None:
    model = network(nn.Identity())
    model[1].eval()
    model(X).sum().backward()
    state = {name: bits(value) for name, value in model.state_dict().items()}
    grads = [bits(p.grad) for p in model.parameters() if p.grad is not None]
    modes = [module.training for module in model.modules()]
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    drawn = random.random(), numpy.random.rand(), torch.rand(1).item()

    def draws(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).mean() + random.random() + numpy.random.rand() + torch.rand(()).item()

    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    losses = example_losses(model, draws, TensorDataset(X), batch_size=4)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == drawn
    assert not losses.requires_grad
    assert {name: bits(value) for name, value in model.state_dict().items()} == state
    assert [bits(p.grad) for p in model.parameters() if p.grad is not None] == grads
    assert [module.training for module in model.modules()] == modes


def test_an_error_leaves_the_modes() -> None:
    model = network(nn.Identity())

    def fails(model: nn.Module, batch: Any) -> Any:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        example_losses(model, fails, TensorDataset(X))
    assert all(module.training for module in model.modules())


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"dataset": Stream()}, TypeError, "dataset must be map-style, .* got Stream"),
        ({"dataset": DataLoader(Stream())}, TypeError, "got Stream"),
        ({"dataset": 3}, TypeError, "got int"),
        ({"dataset": []}, ValueError, "must have examples, got an empty one"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a criterion or a function"),
        ({"loss_fn": nn.MSELoss(reduction="sum")}, ValueError, 'must have reduction="mean"'),
        ({"dataset": TensorDataset(X, X, X)}, TypeError, r"needs batches of \(input, target\)"),
    ],
    ids=str,
)
def test_bad_input(change: Any, error: type[Exception], text: str) -> None:
    arguments = {"loss_fn": nn.MSELoss(), "dataset": TensorDataset(X, NUMBERS)} | change
    with pytest.raises(error, match=text):
        example_losses(network(nn.Identity()), **arguments)


# ---- the callback


def looped(callbacks: Any, **settings: Any) -> fastloop.Loop:
    model = network(nn.Identity())
    return fastloop.Loop(
        model, fastloop.AdamW(model.parameters()), nn.MSELoss(), callbacks=callbacks, seed=1, progress=False, **settings
    )


@pytest.mark.parametrize("kind", [LossCurriculum, HardExamples])
def test_the_sampler_gets_the_losses_of_the_model_as_it_is(kind: Any) -> None:
    data = TensorDataset(X, NUMBERS)
    sampler = kind(torch.ones(COUNT), **({"epochs": 2} if kind is LossCurriculum else {}))
    found: list[Any] = []

    class Looks:
        def on_epoch_end(self, loop: Any) -> None:
            found.append(sampler.losses)
            assert (loop.epoch % 2 == 0) == torch.equal(
                sampler.losses, example_losses(loop.model, nn.MSELoss(), data, batch_size=3)
            )

    update = UpdateLosses(sampler, data, every_epochs=2, batch_size=3)
    looped([update, Looks()]).fit(DataLoader(data, 4, sampler=sampler, drop_last=True), epochs=4)
    assert torch.equal(found[0], torch.ones(COUNT).double())
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[2], found[3])


def test_an_update_leaves_the_training_as_it_was() -> None:
    data = TensorDataset(X, NUMBERS)
    weights = []
    for more in ([], [UpdateLosses(HardExamples(torch.ones(COUNT)), data)]):
        loop = looped(more)
        loop.fit(DataLoader(data, 4, shuffle=True), epochs=2)
        weights.append(bits(loop.model[0].weight))
    assert weights[0] == weights[1]


def test_a_loss_that_is_not_finite_leaves_the_earlier_one() -> None:
    wrong = X.clone()
    wrong[4] = math.nan
    sampler = HardExamples(torch.arange(COUNT) + 50.0)
    loop = looped([UpdateLosses(sampler, TensorDataset(wrong, NUMBERS))])
    with pytest.warns(
        UserWarning, match="after epoch 1 the losses of 1 of 11 examples are not finite, the first at in"
    ):
        loop.fit(DataLoader(TensorDataset(X, NUMBERS), 4, sampler=sampler), epochs=1)
    assert sampler.losses[4] == 54
    assert (sampler.losses < 50).sum() == COUNT - 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.utils.data.SequentialSampler(X), X), TypeError, "sampler must go by losses, .* got SequentialSampler"),
        ((HardExamples([1.0, 2.0]), X), ValueError, "dataset must have the sampler's 2 examples, got 11"),
    ],
)
def test_a_callback_of_other_things(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        UpdateLosses(*arguments)


@pytest.mark.parametrize("name", ["every_epochs", "batch_size"])
def test_numbers_of_the_callback(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        UpdateLosses(HardExamples(torch.ones(COUNT)), X, **{name: 0})
