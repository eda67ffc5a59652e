# SPDX-License-Identifier: Apache-2.0
"""One batch by heart, and what a model has to beat: verdicts, their reasons, and numbers against closed forms."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastloop.recipes.data import split, synthetic_data
from fastloop.recipes.evidence import recorded
from fastloop.recipes.start import baselines, overfit_one_batch

FEATURES, CLASSES = 20, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def batch_of(kind: str = "classification", samples: int = 32, **options: Any) -> tuple[Tensor, Tensor]:
    if kind == "classification":
        options = {"classes": CLASSES, **options}
    x, y = synthetic_data(kind, samples, **options).tensors
    return x, y


# ---- one batch


def test_it_ends_as_soon_as_the_batch_is_known() -> None:
    result = overfit_one_batch(classifier(), nn.CrossEntropyLoss(), batch_of())
    assert result.passed
    assert 0 < result.steps < 300
    assert len(result.losses) == len(result.accuracies) == result.steps + 1
    assert result.accuracies[-1] >= 0.95 > max(result.accuracies[:-1])
    assert result.verdict.startswith("passed")
    assert result.findings == []


def test_a_loss_can_be_asked_for_beside_the_accuracy() -> None:
    easy = overfit_one_batch(classifier(), nn.CrossEntropyLoss(), batch_of())
    hard = overfit_one_batch(classifier(), nn.CrossEntropyLoss(), batch_of(), target_loss=0.01, lr=1e-2)
    assert hard.passed
    assert hard.losses[-1] <= 0.01 < easy.losses[-1]


def test_numbers_are_learned_to_one_per_cent_of_the_best_constant() -> None:
    x, y = batch_of("regression")
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 1))
    result = overfit_one_batch(model, nn.MSELoss(), (x, 5 * y + 100), lr=1e-1, steps=2000)
    variance = float((5 * y).var(correction=0))
    assert result.target_loss == pytest.approx(0.01 * variance, rel=1e-4)  # and not of the first loss, 10 000
    assert result.passed
    assert result.accuracies is None


def test_a_function_as_loss_fn_with_its_own_accuracy() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Any:
        logits = model(batch["x"])
        return nn.functional.cross_entropy(logits, batch["y"]), {
            "accuracy": (logits.argmax(1) == batch["y"]).float().mean()
        }

    x, y = batch_of()
    result = overfit_one_batch(classifier(), loss_fn, {"x": x, "y": y})
    assert result.passed
    assert result.accuracies[-1] >= 0.95


def test_the_first_batch_of_a_loader_is_taken() -> None:
    loader = DataLoader(TensorDataset(*batch_of(samples=64)), 16)
    alone = overfit_one_batch(classifier(), nn.CrossEntropyLoss(), next(iter(loader)))
    torch.manual_seed(0)
    assert overfit_one_batch(classifier(), nn.CrossEntropyLoss(), loader).losses == alone.losses


class Stateful(nn.Sequential):
    """With dropout, running statistics and gradients that were there before."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, CLASSES)
        )
        self[2].eval()
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("own", [True, False])
def test_everything_is_as_before(own: bool) -> None:
    model = Stateful()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    states = (random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist())
    result = overfit_one_batch(model, nn.CrossEntropyLoss(), batch_of(), optimizer=optimizer if own else None)
    assert result.steps > 0
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert numpy.random.get_state()[1].tolist() == states[2]


def frozen() -> nn.Module:
    return classifier().requires_grad_(False)


def detached() -> nn.Module:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[0](x).detach().relu() * 0.0)

    return Detached(*classifier())


def dead() -> nn.Module:
    model = classifier()
    with torch.no_grad():
        model[0].bias.fill_(-1e4)
        model[2].bias.zero_()
    model[2].bias.requires_grad_(False)
    return model


def spoiled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.index_fill(0, torch.tensor([3]), math.nan), y


def contradictory(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x[:1].expand_as(x), y


REASONS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str, str]] = {
    "nothing is trained": (frozen, None, {}, "error", "no parameter requires a gradient"),
    "a layer is cut off": (detached, None, {}, "warning", "no gradient reaches some parameters: 3 of 4.*0.weight"),
    "all units are dead": (dead, None, {}, "error", "no gradient reaches the parameters: 3 of 3"),
    "and so the loss is constant": (dead, None, {}, "error", "the loss is constant"),
    "the outputs are all the same": (dead, None, {}, "error", "outputs are the same for all samples"),
    "NaN in the batch": (classifier, spoiled, {}, "error", "the batch has NaN or infinity"),
    "labels contradict": (classifier, contradictory, {}, "error", "inputs occur with several targets, 3 times"),
    "a small learning rate": (classifier, None, {"lr": 1e-5}, "warning", "is still falling"),
    "few steps": (classifier, None, {"steps": 5}, "warning", "is still falling"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_failure_is_told_apart(name: str) -> None:
    build, spoil, options, level, what = REASONS[name]
    batch = batch_of() if spoil is None else spoil(*batch_of())
    result = overfit_one_batch(build(), nn.CrossEntropyLoss(), batch, **options)
    assert not result.passed
    assert result.verdict.startswith("failed")
    found = [each for each in result.findings if re.search(what, each.what)]
    assert [each.level for each in found] == [level], str(result)
    assert found[0].remedy


def test_a_large_learning_rate() -> None:
    """w <- w - 1.01 * 2w: each step turns w around and makes it 2 % larger."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.01)
    result = overfit_one_batch(
        model,
        lambda model, x: model.weight.square().sum() + 0 * model(x).sum(),
        torch.rand(2, 1),
        optimizer=optimizer,
        steps=20,
    )
    assert result.losses[-1] == pytest.approx(result.losses[0] * 1.02**40, rel=1e-4)
    assert [(each.level, "it rises" in each.what) for each in result.findings] == [("error", True)]


def test_classes_that_are_guessed() -> None:
    """Outputs that vary a little and are not changed by what is learned: noise in the place of the model."""

    class Noise(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.randn_like(x)) * 1e-3

    result = overfit_one_batch(Noise(FEATURES, CLASSES), nn.CrossEntropyLoss(), batch_of(), steps=50, lr=1e-4)
    assert not result.passed
    assert any("log(4) = 1.386" in each.what for each in result.findings), str(result)


def test_a_loss_that_becomes_infinite_names_the_step_and_the_rate() -> None:
    model = nn.Linear(FEATURES, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    result = overfit_one_batch(model, nn.MSELoss(), batch_of("regression"), optimizer=optimizer)
    assert not result.passed
    assert result.steps < 5
    assert "smaller learning rate" in result.findings[0].remedy
    json.dumps(result.to_json(), allow_nan=False)


def test_a_loss_without_a_graph() -> None:
    result = overfit_one_batch(nn.Linear(3, 1), lambda model, x: model(x).detach().square().mean(), torch.ones(4, 3))
    assert not result.passed
    assert "does not depend on any parameter" in result.verdict


def test_an_optimizer_of_another_model() -> None:
    other = torch.optim.SGD(classifier().parameters(), lr=0.1)
    result = overfit_one_batch(classifier(), nn.CrossEntropyLoss(), batch_of(), optimizer=other, steps=5)
    assert result.findings[0].what.startswith("the optimizer does not hold 4 of 4 parameters")


def test_a_softmax_before_the_cross_entropy_is_seen_even_where_the_batch_is_learned() -> None:
    model = nn.Sequential(*classifier(), nn.Softmax(dim=1))
    result = overfit_one_batch(model, nn.CrossEntropyLoss(), batch_of(), steps=3)
    assert any(each.level == "error" and "softmax" in each.what for each in result.findings), str(result)


def test_right_by_chance_is_not_learned() -> None:
    """One sample that is right from the start, and a model that cannot move."""
    model = dead()
    x, _ = batch_of(samples=4)
    guess = model(x[:1]).argmax(1)
    result = overfit_one_batch(model, nn.CrossEntropyLoss(), (x[:1], guess), steps=5)
    assert result.accuracies == [1.0] * 6
    assert not result.passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"target_accuracy": 95}, r"target_accuracy must lie in \(0, 1\]"),
        ({"target_loss": math.nan}, "target_loss must be finite"),
        ({"lr": 0.1, "optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)], 1.0)}, "leave one out"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overfit_one_batch(classifier(), nn.CrossEntropyLoss(), batch_of(), **options)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda y: y + 1, "labels lie in 1..4, and the model has 4 outputs"),
        (lambda y: y - 1, "labels lie in -1..2"),
        (lambda y: y.float(), "takes labels of int64, got torch.float32"),
        (lambda y: y[:, None], "takes targets of shape"),
    ],
)
def test_labels_that_the_loss_cannot_take_are_a_verdict_and_not_a_crash(spoil: Any, told: str) -> None:
    x, y = batch_of()
    result = overfit_one_batch(classifier(), nn.CrossEntropyLoss(), (x, spoil(y)))
    assert not result.passed
    assert result.accuracies is None
    assert (result.steps, result.losses) == (0, [])
    assert told in result.verdict
    json.dumps(result.to_json(), allow_nan=False)


def test_wrong_losses_and_batches() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="step without a closure, got LBFGS"):
        overfit_one_batch(model, nn.CrossEntropyLoss(), batch_of(), optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        overfit_one_batch(nn.Linear(FEATURES + 1, CLASSES), nn.CrossEntropyLoss(), batch_of())
    with pytest.raises(TypeError, match="loss_fn must be"):
        overfit_one_batch(classifier(), 3, batch_of())
    with pytest.raises(ValueError, match="must give a batch"):
        overfit_one_batch(classifier(), nn.CrossEntropyLoss(), DataLoader([]))
    with pytest.raises(ValueError, match="target_loss must be given"):
        overfit_one_batch(nn.Linear(3, 1), lambda model, x: model(x).mean() - 100, torch.ones(4, 3))


def test_the_curve_is_drawn_and_the_verdict_written_down(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, loss_fn, kind in (("a", nn.CrossEntropyLoss(), "classification"), ("b", nn.MSELoss(), "regression")):
        model = classifier() if name == "a" else nn.Linear(FEATURES, 1)
        result = overfit_one_batch(model, loss_fn, batch_of(kind), steps=20)
        assert result.plot(tmp_path / f"{name}.png").stat().st_size > 5000
    result.record(tmp_path)
    assert recorded(tmp_path)["overfit_one_batch"]["passed"] == result.passed


# ---- baselines


def test_chance_and_the_commonest_class_against_sklearn() -> None:
    data = synthetic_data("classification", 1000, classes=5, imbalance=6, seed=1)
    parts = split(data, (0.7, 0.1, 0.2), stratify=True)
    made = baselines(parts.train, parts.test, kinds=["random", "majority"])
    y = data.tensors[1].numpy()
    own, test = y[parts.train.indices], y[parts.test.indices]
    prior = DummyClassifier(strategy="prior").fit(own[:, None], own)
    assert made.scores["random"] == {"accuracy": 0.2, "loss": math.log(5)}
    assert made.scores["majority"]["accuracy"] == pytest.approx(prior.score(test[:, None], test))
    of_true = prior.predict_proba(test[:, None])[numpy.arange(len(test)), test]
    assert made.scores["majority"]["loss"] == pytest.approx(-numpy.log(of_true).mean())


def test_mean_median_and_linear_against_sklearn() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 3, generator=generator) * torch.tensor([1.0, 100.0, 1e-3]) + 50
    weight = torch.tensor([[2.0, 0.0], [0.03, -0.01], [500.0, 1000.0]])
    y = x @ weight + torch.randn(600, 2, generator=generator).exp()
    train, test = (x[:500], y[:500]), (x[500:], y[500:])
    made = baselines(train, test, epochs=60, lr=3e-3)
    for kind in ("mean", "median"):
        oracle = DummyRegressor(strategy=kind).fit(*(each.double().numpy() for each in train))
        error = oracle.predict(test[0].numpy()) - test[1].numpy()
        assert made.scores[kind]["mse"] == pytest.approx((error**2).mean(), rel=1e-5)
        assert made.scores[kind]["mae"] == pytest.approx(abs(error).mean(), rel=1e-5)
    fitted = LinearRegression().fit(*map(numpy.asarray, train))
    least = ((fitted.predict(test[0].numpy()) - test[1].numpy()) ** 2).mean()
    assert made.scores["linear"]["mse"] == pytest.approx(least, rel=0.05)
    assert made.metric == "mse"
    assert made.beaten_by(0.9 * least)
    assert not made.beaten_by(1e9)


def test_what_is_trained_beats_chance_and_only_the_network_learns_a_ring() -> None:
    x = torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))
    y = (x.square().sum(1) > 1.4).long()
    made = baselines((x[:1000], y[:1000]), (x[1000:], y[1000:]))
    assert made.scores["shallow"]["accuracy"] > 0.93 > 0.7 > made.scores["linear"]["accuracy"]
    assert made.best == "shallow"
    assert made.classes == [0, 1]


def test_results_are_a_function_of_the_seed_and_leave_the_random_states() -> None:
    data = split(synthetic_data("classification", 300, classes=3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = baselines(data.train, data.test, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert baselines(data.train, data.test, epochs=2) == first
    assert baselines(data.train, data.test, epochs=2, seed=1).scores["linear"] != first.scores["linear"]


def test_labels_of_any_integers_are_mapped_in_ascending_order() -> None:
    x, y = batch_of(samples=200, noise=0.0)
    names = torch.tensor([7, -1, 300, 12])
    made, plain = (baselines((x, each), (x, each), epochs=3) for each in (names[y], torch.tensor([1, 0, 3, 2])[y]))
    assert made.classes == [-1, 7, 12, 300]
    assert made.scores == plain.scores


def test_scales_of_the_test_data_are_not_used() -> None:
    """Standardized by the training data alone: a shifted test set is predicted wrongly."""
    x, y = batch_of(samples=400, noise=0.0, classes=2)
    made = baselines((x, y), (x + 20, y), kinds=["linear"], epochs=5)
    assert made.scores["linear"]["accuracy"] < 0.8 < baselines((x, y), (x, y), epochs=5).scores["linear"]["accuracy"]


def test_the_table_has_the_model_beside_them(tmp_path: Path) -> None:
    x, y = batch_of(samples=100)
    made = baselines((x, y), (x, y), kinds=["random", "majority"])
    table = made.table(mine=0.9, worse={"accuracy": 0.01, "loss": 3.5})
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert rows["mine"].endswith("  better")
    assert rows["worse"].endswith("NOT better")
    assert "best baseline" in rows[made.best]
    assert not made.beaten_by(math.nan)
    with pytest.raises(ValueError, match=r"an accuracy must lie in \[0, 1\], got 97"):
        made.beaten_by(97)
    with pytest.raises(ValueError, match="a score must have 'accuracy', got loss"):
        made.table(mine={"loss": 1.0})
    made.record(tmp_path)
    assert recorded(tmp_path)["baselines"]["scores"]["random"]["accuracy"] == 0.25


def test_samples_of_single_numbers_and_images() -> None:
    y = torch.arange(64) % 2
    assert baselines((y.float(), y), (y.float(), y), epochs=8).scores["linear"]["accuracy"] == 1
    images = (y[:, None, None, None] * 255).byte().expand(64, 1, 3, 3)
    assert baselines((images, y), (images, y), epochs=3).scores["shallow"]["accuracy"] == 1


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2), 0)])


def test_bad_data() -> None:
    x, y = batch_of(samples=40)
    with pytest.raises(ValueError, match="every label of test must be in train, 9 is not"):
        baselines((x, y), (x, y.where(y > 0, 9)))
    with pytest.raises(ValueError, match="inputs must be finite, sample 3 has NaN"):
        baselines(spoiled(x, y), (x, y))
    with pytest.raises(ValueError, match="targets must be finite"):
        baselines((x, y.float() / 0), (x, y.float()))
    with pytest.raises(ValueError, match="targets must be one integer for each sample"):
        baselines((x, y.float()), (x, y.float()), task="classification")
    with pytest.raises(ValueError, match="kinds of classification are random, majority, linear, shallow"):
        baselines((x, y), (x, y), kinds=["mean"])
    with pytest.raises(ValueError, match="task must be one of"):
        baselines((x, y), (x, y), task="ranking")
    with pytest.raises(TypeError, match="got a DataLoader"):
        baselines(DataLoader(TensorDataset(x, y)), (x, y))
    with pytest.raises(TypeError, match="Stream is an IterableDataset"):
        baselines(Stream(), (x, y))
    with pytest.raises(ValueError, match="has no samples"):
        baselines((x[:0], y[:0]), (x, y))
    with pytest.raises(ValueError, match="inputs must all have one shape and dtype"):
        baselines((x, y), [(x[0], 0), (x[0, :3], 1)], epochs=1)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 1"):
        baselines((x, y), (x, y), epochs=0)
    with pytest.raises(ValueError, match="equally many, got 40 and 39"):
        baselines((x, y[1:]), (x, y))
