# SPDX-License-Identifier: Apache-2.0
"""What a model has to beat: chance, the commonest answer, a linear model and a shallow network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloop
from fastloop.loop.random_state import seed_everything, unmoved
from fastloop.recipes.data.labels import labels_of
from fastloop.recipes.data.normalization import Normalization, fit_normalization
from fastloop.recipes.data.samples import as_dataset, batches, only_input, with_index
from fastloop.recipes.results import Result
from fastloop.recipes.sampling import generator_of
from fastloop.texts import columns

AREA = "baselines"
KINDS = {
    "classification": ("random", "majority", "linear", "shallow"),
    "regression": ("mean", "median", "linear", "shallow"),
}
SCORES = {"classification": ("accuracy", "loss"), "regression": ("mse", "mae")}
Score = dict[str, float]


@dataclass
class Baselines(Result):
    """Scores on the test data, of each kind; the first of a score's numbers is what counts."""

    practice: ClassVar[str] = AREA
    task: str
    scores: dict[str, Score]
    train_samples: int
    test_samples: int
    classes: list[int] | None = None  # the labels, in the order of the models' outputs; None for numbers

    @property
    def metric(self) -> str:
        """What counts: "accuracy" (more is better) or "mse" (less is better)."""
        return SCORES[self.task][0]

    @property
    def best(self) -> str:
        """The kind that is hardest to beat."""
        return min(self.scores, key=lambda kind: self._cost(self.scores[kind][self.metric]))

    def _cost(self, value: float) -> float:
        if math.isnan(value):
            return math.inf
        return -value if self.task == "classification" else value

    def beaten_by(self, score: float | Score) -> bool:
        """Whether a score, a number of `metric` or a dict that has it, is better than the best baseline's.

        Raises:
            ValueError: a dict without it, or an accuracy outside of [0, 1].
        """
        return self._cost(self._value(score)) < self._cost(self.scores[self.best][self.metric])

    def _value(self, score: Any) -> float:
        if isinstance(score, dict):
            if self.metric not in score:
                raise ValueError(f"[{AREA}] a score must have {self.metric!r}, got {', '.join(score) or 'none'}")
            score = score[self.metric]
        value = float(score)
        if self.task == "classification" and not (0 <= value <= 1 or math.isnan(value)):
            raise ValueError(f"[{AREA}] an accuracy must lie in [0, 1], got {value}; divide per cent by 100")
        return value

    def table(self, **models: float | Score) -> str:
        """A row for each baseline, then for each of `models`, whether it beats them all.

        Args:
            models: by name, what `beaten_by` takes.
        """
        first, second = SCORES[self.task]
        rows: list[list[Any]] = [
            [kind, score[first], score[second], "best baseline" if kind == self.best else ""]
            for kind, score in self.scores.items()
        ]
        for name, score in models.items():
            other = score.get(second) if isinstance(score, dict) else None
            rows.append([name, self._value(score), other, "better" if self.beaten_by(score) else "NOT better"])
        return columns(["", first, second, ""], rows)


def baselines(
    train: Any,
    test: Any,
    *,
    kinds: Sequence[str] | None = None,
    task: str | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 1e-2,
    hidden: int = 128,
    seed: int = 0,
) -> Baselines:
    """Scores of simple predictions on the test data, all that is learned being learned of the training data.

    "random" is the expectation for equal chances (accuracy 1/C, loss log(C)), "majority" the commonest class with the
    classes' shares as probabilities, "mean" and "median" those of the targets. "linear" and "shallow" (one hidden
    layer, ReLU) are trained by fastloop.AdamW on inputs that are flattened and standardized by the training data;
    targets that are numbers are standardized too, and scored in their own units.

    Args:
        train, test: data sets of (input, target), or pairs of tensors. Labels may be any integers: they are mapped to
            0 to C-1 in ascending order, `classes` has them.
        kinds: None: all of the task.
        task: "classification" or "regression"; None: by the dtype of the targets.
        epochs, batch_size, lr, hidden: of "linear" and "shallow"; hidden of "shallow" alone.
        seed: results are a function of it; torch's own random state is neither read nor changed.

    Raises:
        TypeError: no data sets.
        ValueError: an unknown kind or task, numbers out of range, labels of the test data that the training data has
            not, targets that are neither one class nor numbers, inputs that are not finite.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("hidden", hidden)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"[{AREA}] {name} must be an integer of at least 1, got {value!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"[{AREA}] lr must be above 0, got {lr}; pass e.g. 1e-2")
    generator_of(seed)
    data, held_out = (with_index(as_dataset(each, AREA), AREA) for each in (train, test))
    known, asked = labels_of(data), labels_of(held_out)
    task = _task(task, known)
    chosen = _kinds(kinds, task)
    problem = (_Classes if task == "classification" else _Numbers)(known, asked)
    scores: dict[str, Score] = {}
    normalization = fit_normalization(data, dims="feature") if {"linear", "shallow"} & {*chosen} else None
    for kind in chosen:
        if normalization is None or kind not in ("linear", "shallow"):
            scores[kind] = problem.constant(kind)
            continue
        width = hidden if kind == "shallow" else None
        with unmoved():
            seed_everything(seed % 2**32)
            model = _network(normalization, width, problem.outputs)
        _train(model, data, problem, epochs, batch_size, lr, seed)
        scores[kind] = problem.score(_predicted(model, held_out))
    return Baselines(task, scores, len(data), len(held_out), problem.labels)


def _task(task: str | None, targets: Tensor) -> str:
    if task is None:
        task = "regression" if targets.is_floating_point() else "classification"
    if task not in KINDS:
        raise ValueError(f"[{AREA}] task must be one of {', '.join(KINDS)}, got {task!r}")
    if task == "classification" and (targets.is_floating_point() or targets.dim() != 1):
        raise ValueError(
            f"[{AREA}] targets must be one integer for each sample, got {targets.dtype} of shape {[*targets.shape]}; "
            'pass task="regression" for numbers'
        )
    return task


def _kinds(kinds: Sequence[str] | None, task: str) -> list[str]:
    chosen = list(KINDS[task] if kinds is None else kinds)
    unknown = [kind for kind in chosen if kind not in KINDS[task]]
    if isinstance(kinds, str) or unknown or not chosen:
        raise ValueError(f"[{AREA}] kinds of {task} are {', '.join(KINDS[task])}, got {kinds!r}")
    return chosen


class _Classes:
    """Targets that are classes."""

    def __init__(self, train: Tensor, test: Tensor) -> None:
        labels, self.targets, counts = train.unique(return_inverse=True, return_counts=True)
        self.labels: list[int] | None = labels.tolist()
        if test.is_floating_point() or test.dim() != 1:
            raise ValueError(f"[{AREA}] targets of test must be as those of train, got {test.dtype} {[*test.shape]}")
        unknown = test[~torch.isin(test, labels)]
        if len(unknown):
            raise ValueError(
                f"[{AREA}] every label of test must be in train, {int(unknown[0])} is not; split by class: "
                "split(dataset, stratify=True)"
            )
        self.outputs = len(labels)
        self._shares = counts.double() / len(train)
        self._test = torch.searchsorted(labels, test)

    def constant(self, kind: str) -> Score:
        if kind == "random":
            return {"accuracy": 1 / self.outputs, "loss": math.log(self.outputs)}
        right = (self._test == self._shares.argmax()).double().mean()
        return {"accuracy": float(right), "loss": float(-self._shares[self._test].log().mean())}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor) -> Score:
        right = (outputs.argmax(1) == self._test).double().mean()
        return {"accuracy": float(right), "loss": float(F.cross_entropy(outputs.double(), self._test))}


class _Numbers:
    """Targets that are numbers, standardized; scores are in their own units."""

    labels = None

    def __init__(self, train: Tensor, test: Tensor) -> None:
        own = train.double().reshape(len(train), -1)
        self._test = test.double().reshape(len(test), -1)
        if own.shape[1] != self._test.shape[1]:
            raise ValueError(f"[{AREA}] targets of test must be as those of train, got {[*test.shape]}")
        if not (bool(own.isfinite().all()) and bool(self._test.isfinite().all())):
            raise ValueError(f"[{AREA}] targets must be finite, got NaN or infinity; leave out such samples")
        self._mean, std = own.mean(0), own.std(0, correction=0)
        self._std = std.where(std > 0, 1.0)
        self._median = torch.from_numpy(numpy.median(own.numpy(), axis=0))  # torch's is the lower of two
        self.targets = ((own - self._mean) / self._std).float()
        self.outputs = own.shape[1]

    def constant(self, kind: str) -> Score:
        return self._scored((self._mean if kind == "mean" else self._median).expand_as(self._test))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def score(self, outputs: Tensor) -> Score:
        return self._scored(outputs.double() * self._std + self._mean)

    def _scored(self, predicted: Tensor) -> Score:
        difference = predicted - self._test
        return {"mse": float(difference.square().mean()), "mae": float(difference.abs().mean())}


def _network(normalization: Normalization, hidden: int | None, outputs: int) -> nn.Module:
    features = normalization.mean.numel()
    layers = (
        [nn.Linear(features, outputs)]
        if hidden is None
        else [nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    )
    return nn.Sequential(normalization, _Rows(), *layers)


class _Rows(nn.Module):
    """[N, ...] as [N, features]; samples that are single numbers have one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1).float()


def _train(
    model: nn.Module, data: Any, problem: _Classes | _Numbers, epochs: int, batch_size: int, lr: float, seed: int
) -> None:
    optimizer = fastloop.AdamW(model.parameters(), lr=lr)
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=generator_of(seed, epoch))
        for chosen, (inputs, _) in zip(order.split(batch_size), batches(data, batch_size, order.tolist()), strict=True):
            optimizer.zero_grad()
            problem.loss(model(_together(inputs)), problem.targets[chosen]).backward()
            optimizer.step()


@torch.no_grad()
def _predicted(model: nn.Module, data: Any) -> Tensor:
    return torch.cat([model(_together(inputs)) for inputs, _ in batches(data, 1024)])


def _together(inputs: Any) -> Tensor:
    """Inputs of a batch, on the CPU.

    Raises:
        ValueError: of different shapes.
    """
    values = only_input(inputs, AREA)
    if isinstance(values, list):
        raise ValueError(f"[{AREA}] inputs must all have one shape and dtype, they differ; bring them to one size")
    return values.cpu()
