# SPDX-License-Identifier: Apache-2.0
"""What a model ends in and its targets, against the loss: each mistake is found, and no right pair is accused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastloop.checks import check_output_activation

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(16) % 3
BITS = (torch.arange(16) % 2).float()


class Ends(nn.Module):
    """A linear layer, and then a function."""

    def __init__(self, outputs: int, last: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.linear = nn.Linear(8, outputs)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.linear(x))


def manual_softmax(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(1, keepdim=True)


def levels(model: nn.Module, loss_fn: Any, target: Tensor, x: Tensor = X) -> list[str]:
    return [finding.level for finding in check_output_activation(model, loss_fn, (x, target))]


def errors(model: nn.Module, loss_fn: Any, target: Tensor, x: Tensor = X) -> str:
    found = check_output_activation(model, loss_fn, (x, target))
    return "\n".join(str(finding) for finding in found if finding.level == "error")


torch.manual_seed(0)  # for the models of the tables
CE, NLL, BCE, BCEL, MSE = nn.CrossEntropyLoss(), nn.NLLLoss(), nn.BCELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()

RIGHT: dict[str, tuple[nn.Module, Any, Tensor]] = {
    "logits": (Ends(3), CE, CLASSES),
    "logits near a softmax's": (Ends(3, lambda x: x.softmax(1) + 0.01 * x), CE, CLASSES),
    "constant outputs of a zero head": (Ends(3, lambda x: x * 0 + 1 / 3), CE, CLASSES),
    "one-hot outputs": (Ends(3, lambda x: x * 0 + F.one_hot(CLASSES, 3)), CE, CLASSES),
    "attention inside": (Ends(3, lambda x: (x @ x.T).softmax(1) @ x), CE, CLASSES),
    "class probabilities": (Ends(3), CE, torch.full((16, 3), 1 / 3)),
    "an ignored label": (Ends(3), nn.CrossEntropyLoss(ignore_index=-1), CLASSES - (CLASSES == 2).long() * 3),
    "log-softmax, NLL": (nn.Sequential(Ends(3), nn.LogSoftmax(1)), NLL, CLASSES),
    "log of softmax, NLL": (Ends(3, lambda x: x.softmax(1).log()), NLL, CLASSES),
    "sigmoid, BCE": (Ends(1, lambda x: x.sigmoid().squeeze(1)), BCE, BITS),
    "probability of a class, BCE": (Ends(2, lambda x: x.softmax(1)[:, 1]), BCE, BITS),
    "logits, BCE with logits": (Ends(1, lambda x: x.squeeze(1)), BCEL, BITS),
    "small positive logits": (Ends(1, lambda x: x.squeeze(1).abs().clamp(0.1, 0.9)), BCEL, BITS),
    "regression": (Ends(1, lambda x: x.squeeze(1)), MSE, BITS),
    "regression onto probabilities": (Ends(3, lambda x: x.softmax(1)), MSE, torch.full((16, 3), 1 / 3)),
    "images": (nn.Conv2d(8, 3, 1), CE, torch.zeros(16, 2, 2).long() + CLASSES[:, None, None]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_pairs_are_not_accused(name: str) -> None:
    model, loss_fn, target = RIGHT[name]
    x = X[:, :, None, None].expand(-1, -1, 2, 2) if name == "images" else X
    assert check_output_activation(model, loss_fn, (x, target)) == []


WRONG: dict[str, tuple[nn.Module, Any, Tensor, str]] = {
    "softmax module": (nn.Sequential(Ends(3), nn.Softmax(1)), CE, CLASSES, "a softmax of its own"),
    "functional softmax": (Ends(3, lambda x: F.softmax(x, 1)), CE, CLASSES, "a softmax of its own"),
    "softmax, in another shape": (Ends(3, lambda x: x.softmax(1)[:, None].squeeze(1)), CE, CLASSES, "of its own"),
    "softmax by hand": (Ends(3, manual_softmax), CE, CLASSES, "a softmax of its own"),
    "sigmoid": (Ends(3, torch.sigmoid), CE, CLASSES, "ends in a sigmoid"),
    "sigmoid, BCE with logits": (Ends(1, lambda x: x.sigmoid().squeeze(1)), BCEL, BITS, "sigmoid of its own"),
    "softmax, BCE with logits": (Ends(3, lambda x: x.softmax(1)), BCEL, F.one_hot(CLASSES, 3).float(), "of its own"),
    "softmax, NLL": (Ends(3, lambda x: x.softmax(1)), NLL, CLASSES, "expects log-probabilities"),
    "logits, NLL": (Ends(3, lambda x: 3 * x), NLL, CLASSES, "expects log-probabilities"),
    "logits, BCE": (Ends(1, lambda x: 9 * x.squeeze(1)), BCE, BITS, "expects probabilities in"),
    "softmax, KL": (Ends(3, lambda x: x.softmax(1)), nn.KLDivLoss(), torch.full((16, 3), 1 / 3), "log-probabilities"),
    "label too high": (Ends(2), CE, CLASSES, "labels lie in 0..2, and the model has 2 outputs"),
    "label below 0": (Ends(3), CE, CLASSES - 1, "labels lie in -1..1"),
    "labels from 1": (Ends(3), CE, CLASSES + 1, "subtract 1"),
    "one output": (Ends(1), CE, CLASSES * 0, "a single class"),
    "int32 labels": (Ends(3), CE, CLASSES.int(), "target.long()"),
    "float labels": (Ends(3), CE, CLASSES.float(), "target.long()"),
    "labels in a column": (Ends(3), CE, CLASSES[:, None], "squeeze(1)"),
    "one-hot integers": (Ends(3), CE, F.one_hot(CLASSES, 3), "target.float()"),
    "column and row": (Ends(1), MSE, BITS, "broadcast to (16, 16)"),
    "row and column": (Ends(1, lambda x: x.squeeze(1)), nn.L1Loss(), BITS[:, None], "broadcast to (16, 16)"),
    "classes for a regression": (Ends(3), MSE, CLASSES, "CrossEntropyLoss"),
    "classes for BCE": (Ends(3), BCEL, CLASSES, "CrossEntropyLoss"),
    "labels of -1 and 1": (Ends(1, lambda x: x.squeeze(1)), BCEL, 2 * BITS - 1, "(target + 1) / 2"),
    "integers for BCE": (Ends(1, lambda x: x.squeeze(1)), BCEL, BITS.long(), "target.float()"),
    "fp64 labels for BCE": (Ends(1, lambda x: x.sigmoid().squeeze(1)), BCE, BITS.double(), "backward raises"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction")
def test_wrong_pairs_are_errors(name: str) -> None:
    model, loss_fn, target, text = WRONG[name]
    assert text in errors(model, loss_fn, target)


def test_classes_last_is_an_error_that_says_how_to_turn_them() -> None:
    model, x = Ends(3), X.reshape(4, 4, 8)
    assert "outputs.flatten(0, -2)" in errors(model, CE, CLASSES.reshape(4, 4), x)


def test_a_loss_function_of_ones_own_is_seen() -> None:
    def soft(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).softmax(-1), batch[1])

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        log = torch.log_softmax(model(batch[0]), 1)
        return -log.gather(1, batch[1][:, None]).mean()

    assert "a softmax of its own" in errors(Ends(3), soft, CLASSES)
    assert "log_softmax in the loss" in errors(Ends(3, lambda x: x.softmax(1)), by_hand, CLASSES)
    assert levels(Ends(3), by_hand, CLASSES) == []


def test_what_is_only_worth_knowing_is_no_error() -> None:
    assert levels(Ends(3, lambda x: x.log_softmax(1)), CE, CLASSES) == ["note"]
    assert levels(Ends(3, torch.relu), CE, CLASSES) == ["warning"]
    assert levels(Ends(3), BCEL, F.one_hot(CLASSES, 3).float()) == ["note"]  # one label each
    assert levels(Ends(3), CE, CLASSES * 0) == ["warning"]  # one class in the whole batch
    assert levels(Ends(3), CE, torch.full((16, 3), 0.5)) == ["warning"]  # sums to 1.5
    assert levels(Ends(3), nn.CrossEntropyLoss(ignore_index=0), CLASSES * 0) == ["warning"]  # NaN


def test_a_difference_by_hand_that_is_broadcast_is_a_warning() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    assert levels(Ends(1), loss, BITS) == ["warning"]
    assert levels(Ends(1), loss, BITS[:, None]) == []


def test_a_batch_of_one_row_is_not_taken_for_probabilities() -> None:
    given = torch.tensor([[0.25, 0.75]])
    assert levels(Ends(2, lambda x: x * 0 + given), CE, CLASSES[:1], X[:1]) == []


def test_the_model_comes_back_and_what_is_wrong_with_the_call_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert check_output_activation(model, CE, iter([(X, CLASSES)])) == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert not model._forward_hooks
    with pytest.raises(TypeError, match="loss_fn must be a criterion"):
        check_output_activation(model, "cross_entropy", (X, CLASSES))
    with pytest.raises(ValueError, match="must give a batch"):
        check_output_activation(model, CE, iter(()))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        check_output_activation(model, CE, (X[:, :5], CLASSES))
