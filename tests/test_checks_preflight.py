# SPDX-License-Identifier: Apache-2.0
"""All checks before a training: healthy models of several kinds pass, each mistake is found, nothing is changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import Encoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastloop
from fastloop.checks import CheckFailed, Finding, check_layer_order, check_normalization, preflight

CE = nn.CrossEntropyLoss()


pytestmark = pytest.mark.usefixtures("one_thread")


def loaders(x: Tensor, y: Tensor, **options: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    most = len(x) * 3 // 4
    train = DataLoader(TensorDataset(x[:most], y[:most]), **{"batch_size": 32, "shuffle": True, **options})
    return train, DataLoader(TensorDataset(x[most:], y[most:]), batch_size=32)


def looked(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Any = CE, **options: Any) -> list[Finding]:
    optimizer = options.pop("optimizer", torch.optim.AdamW(model.parameters(), lr=1e-3))
    ours = {key: options.pop(key) for key in ("schedule", "epochs", "patience") if key in options}
    return preflight(model, loss_fn, *loaders(x, y, **options), optimizer, **{"schedule": "cosine", **ours})


def said(findings: list[Finding], *levels: str) -> str:
    return "\n".join(str(finding) for finding in findings if finding.level in (levels or ("error", "warning", "note")))


def mlp(*last: nn.Module, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs), *last)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0]).transpose(1, 2)


def cnn() -> nn.Module:
    block = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*block, nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 3))


DRAWN = torch.Generator().manual_seed(1)  # this module is read before any test is seeded
X, Y = torch.randn(128, 8, generator=DRAWN), torch.randint(0, 3, (128,), generator=DRAWN)
TOKENS = torch.randint(0, 20, (128, 7), generator=DRAWN)
HEALTHY: dict[str, Any] = {
    "mlp": lambda: (mlp(), X, Y, CE),
    "cnn": lambda: (cnn(), torch.randn(128, 3, 6, 6), Y, CE),
    "transformer": lambda: (Encoder(), torch.randn(128, 5, 16), Y, CE),
    "lstm": lambda: (Recurrent(), TOKENS[:, :-1], TOKENS[:, 1:], CE),
    "regression": lambda: (mlp(outputs=1), X, torch.randn(128, 1), nn.MSELoss()),
    "binary": lambda: (mlp(nn.Flatten(0), outputs=1), X, (Y > 0).float(), nn.BCEWithLogitsLoss()),
    "several labels": lambda: (mlp(), X, torch.randint(0, 2, (128, 3)).float(), nn.BCEWithLogitsLoss()),
    "one's own loss": lambda: (mlp(), X, Y, lambda model, batch: F.nll_loss(model(batch[0]).log_softmax(1), batch[1])),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_trainings_have_no_findings(name: str) -> None:
    model, x, y, loss_fn = HEALTHY[name]()
    assert said(looked(model, x, y, loss_fn)) == ""


def test_each_mistake_is_found() -> None:
    assert "a softmax of its own" in said(looked(mlp(nn.Softmax(1)), X, Y), "error")
    assert "labels lie in 0..2" in said(looked(mlp(outputs=2), X, Y), "error")
    nan = X.clone()
    nan[::7, 3] = torch.nan
    assert "NaN" in said(looked(mlp(), nan, Y), "error")
    assert "normalize them" in said(looked(mlp(), 100 * X + 128, Y), "warning")
    assert "begins at" in said(looked(mlp(), 100 * X, Y), "warning")
    assert "not shuffled" in said(looked(mlp(), X, Y, shuffle=False), "warning")
    assert "stays as it is" in said(looked(mlp(), X, Y, schedule=None), "note")
    assert "100 epochs without early stopping" in said(looked(mlp(), X, Y, epochs=100), "note")
    assert said(looked(mlp(), X, Y, epochs=100, patience=5)) == ""


def test_no_validation_is_a_warning_and_for_one_epoch_a_note() -> None:
    train = loaders(X, Y)[0]
    for epochs, level in ((None, "warning"), (5, "warning"), (1, "note")):
        assert "no validation data" in said(preflight(mlp(), CE, train, epochs=epochs), level)


def test_validation_labels_outside_of_the_classes_are_found() -> None:
    train = loaders(X, Y)[0]
    other = DataLoader(TensorDataset(torch.randn(40, 8), torch.full((40,), 7)), batch_size=8)
    found = preflight(mlp(), CE, train, other)
    assert "targets (validation)" in said(found, "error")
    assert "7..7" in said(found, "error")


# ---- optimizer


def rates(kind: Any, lr: float, **options: Any) -> list[str]:
    model = mlp()
    found = looked(model, X, Y, optimizer=kind(model.parameters(), lr=lr, **options))
    return [finding.level for finding in found]


@pytest.mark.parametrize(
    ("kind", "lr", "expected"),
    [
        (torch.optim.Adam, 1e-3, []),
        (torch.optim.Adam, 0.1, ["warning"]),
        (torch.optim.SGD, 0.1, []),
        (torch.optim.SGD, 5.0, ["warning"]),
        (torch.optim.SGD, 1e-7, ["note"]),
        (fastloop.AdamW, 0.05, ["warning"]),
        (torch.optim.Adadelta, 1.0, []),
        (torch.optim.AdamW, 0.0, ["warning"]),
    ],
)
def test_learning_rates_are_judged_by_the_kind_of_optimizer(kind: Any, lr: float, expected: list[str]) -> None:
    assert rates(kind, lr) == expected


def test_a_schedule_that_begins_at_0_is_judged_by_its_highest_rate() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert looked(model, X, Y, optimizer=optimizer, schedule=None) == []


def test_weight_decay_of_adam_is_a_note() -> None:
    assert rates(torch.optim.Adam, 1e-3, weight_decay=0.1) == ["note"]
    assert rates(torch.optim.AdamW, 1e-3, weight_decay=0.1) == []


def test_parameters_and_optimizer_that_do_not_match() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model[2] = nn.Linear(16, 3)  # a new head, after the optimizer was made
    found = looked(model, X, Y, optimizer=optimizer)
    assert "2 of 4 trainable" in said(found, "warning")
    assert "2.weight" in said(found, "warning")
    assert "has 2 parameters that are not the model's" in said(found, "note")
    other = torch.optim.AdamW(mlp().parameters(), lr=1e-3)
    assert "none of the model's parameters" in said(looked(mlp(), X, Y, optimizer=other), "error")
    frozen = mlp()
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=1e-3)
    frozen.requires_grad_(False)
    assert "no parameter requires" in said(looked(frozen, X, Y, optimizer=optimizer), "error")


# ---- gradients and loss


def test_gradients_that_are_missing_left_over_or_not_finite() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    assert "2 of 4 parameters get no gradient" in said(looked(Unused(), X, Y), "warning")
    detached = looked(mlp(), X, Y, lambda model, batch: F.cross_entropy(model(batch[0]).detach(), batch[1]))
    assert "depends on no parameter" in said(detached, "error")
    model = mlp()
    CE(model(X), Y).backward()
    assert "gradients of before" in said(looked(model, X, Y), "warning")

    def root(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * 0).sum().sqrt()

    assert "not finite" in said(looked(mlp(), X, Y, root), "error")
    overflowing = mlp()
    nn.init.constant_(overflowing[0].weight, torch.inf)
    infinite = looked(overflowing, X, Y)
    assert "as its outputs are" in said(infinite, "error")
    flat = looked(mlp(), X, Y, lambda model, batch: F.relu(model(batch[0]) - 100).mean())
    assert "all gradients" in said(flat, "warning")
    several = looked(mlp(), X, Y, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"))
    assert "take its mean" in said(several, "error")


def test_an_error_of_the_users_own_is_a_note_for_the_training_to_raise() -> None:
    found = looked(nn.Linear(5, 3), X, Y)
    assert said(found, "error") == ""
    assert "could not be computed: RuntimeError: mat1 and mat2" in said(found, "note")


# ---- modes and layers


def test_models_in_eval_mode_and_dropout_that_never_stops() -> None:
    assert "in eval mode" in said(looked(mlp().eval(), X, Y), "warning")
    model = cnn()
    model[1].eval()
    assert "frozen" in said(looked(model, torch.randn(128, 3, 6, 6), Y), "note")

    class Forgets(nn.Module):
        def __init__(self, stops: bool) -> None:
            super().__init__()
            self.linear, self.stops = nn.Linear(8, 3), stops

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.linear(x), 0.2, training=self.training if self.stops else True)

    assert "drops in eval mode too: dropout(p=0.2)" in said(looked(Forgets(False), X, Y), "warning")
    assert looked(Forgets(True), X, Y) == []


@pytest.mark.parametrize(("size", "levels"), [(64, []), (32, []), (31, ["note"]), (15, ["warning"]), (1, ["error"])])
def test_small_batches_under_batchnorm(size: int, levels: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert [f.level for f in check_normalization(model, size)] == levels
    assert check_normalization(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4)), size) == []
    model[1].eval()  # frozen
    assert check_normalization(model, size) == []


def test_one_sample_is_an_error_only_where_torch_raises() -> None:
    assert [f.level for f in check_normalization(nn.BatchNorm2d(4), 1)] == ["warning"]
    for size in (0, True, 2.0):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            check_normalization(nn.BatchNorm2d(4), size)


def test_a_last_batch_of_one_sample_is_tried() -> None:
    dense = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(130, 8), torch.randint(0, 3, (130,))  # 97 for training
    assert "raises for" in said(looked(dense, x, y), "error")
    assert looked(dense, x, y, drop_last=True) == []
    assert looked(mlp(), x, y) == []
    images = looked(cnn(), torch.randn(130, 3, 6, 6), y)
    assert "of that one" in said(images, "warning")
    assert said(images, "error") == ""


def test_the_order_of_layers() -> None:
    def kinds(*layers: nn.Module) -> list[str]:
        return [finding.where for finding in check_layer_order(nn.Sequential(*layers))]

    conv, bare = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, bias=False)
    assert kinds(bare, nn.BatchNorm2d(4), nn.ReLU()) == []
    assert kinds(nn.BatchNorm2d(4), nn.ReLU(), bare, nn.BatchNorm2d(4), nn.ReLU(), bare) == []  # before activation
    assert kinds(bare, nn.ReLU(), nn.BatchNorm2d(4)) == ["2"]
    assert kinds(conv, nn.BatchNorm2d(4), nn.ReLU()) == ["0"]
    assert kinds(nn.Sequential(bare, nn.ReLU()), nn.Sequential(nn.Identity(), nn.BatchNorm2d(4))) == ["1.1"]
    assert kinds(nn.Dropout(), nn.BatchNorm1d(4)) == ["1"]


# ---- nothing is changed


def test_everything_is_as_before_bit_for_bit() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    CE(model(X), Y).backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters()]
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), gradients])
    generator = torch.Generator().manual_seed(9)
    train, other = loaders(X, Y, generator=generator)
    states = [torch.get_rng_state(), random.getstate(), generator.get_state()]
    preflight(model, CE, train, other, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert str(before[1]) == str(optimizer.state_dict())
    assert all(
        p.grad is g and torch.equal(g, b) for p, g, b in zip(model.parameters(), gradients, before[2], strict=True)
    )
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert torch.equal(states[2], generator.get_state())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_loaders_that_can_be_gone_through_once_are_not_touched() -> None:
    def stream() -> Iterator[Any]:
        yield X, Y

    class Once(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("touched")

    for given in (stream(), DataLoader(Once(), batch_size=4)):
        found = preflight(mlp(), CE, given, given)
        assert "no batch is tried: the loader gives none by an index" in said(found, "note")
        assert "AssertionError" not in said(found)
    given = stream()
    preflight(mlp(), CE, given)
    assert len(list(given)) == 1


def test_a_check_that_fails_is_a_note() -> None:
    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise OSError("no such file")

    found = preflight(mlp(), CE, DataLoader(Broken(X, Y), batch_size=8, shuffle=True))
    assert said(found, "error") == ""
    assert "OSError: no such file" in said(found, "note")


def test_lazy_layers_are_a_note() -> None:
    found = preflight(nn.Sequential(nn.LazyLinear(3)), CE, *loaders(X, Y))
    assert said(found, "error") == ""
    assert "without values" in said(found, "note")


def test_wrong_use_raises() -> None:
    train, other = loaders(X, Y)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        preflight("model", CE, train)
    with pytest.raises(TypeError, match="optimizer must be one"):
        preflight(mlp(), CE, train, other, "adam")
    with pytest.raises(ValueError, match='reduction="mean"'):
        preflight(mlp(), nn.CrossEntropyLoss(reduction="sum"), train)


def test_a_failure_lists_all_findings_the_worst_first() -> None:
    error = CheckFailed([Finding("note", "a", "b"), Finding("error", "c", "d", "e")])
    assert isinstance(error, ValueError)
    assert [f.level for f in error.findings] == ["error", "note"]
    assert str(error).splitlines() == [
        "[checks] 1 error before the training; check=False trains anyway",
        "error: c: d; e",
        "note: a: b",
    ]
