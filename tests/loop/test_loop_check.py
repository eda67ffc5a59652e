# SPDX-License-Identifier: Apache-2.0
"""Loop(check=True): the training is the same, bit for bit; errors end it, the rest is said once and written down."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastloop
from fastloop.checks import CheckFailed

X, Y = torch.randn(70, 8, generator=torch.Generator().manual_seed(2)), torch.arange(70) % 3
CE = nn.CrossEntropyLoss()


pytestmark = pytest.mark.usefixtures("one_thread")


class Augmented(Dataset):
    """Draws from a generator of its own, and counts."""

    def __init__(self) -> None:
        self.generator, self.reads = torch.Generator().manual_seed(4), 0

    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        noise = torch.randn(8, generator=self.generator) + torch.rand(1)
        return X[index] + 0.1 * self.reads * noise, Y[index]


def model_of(*last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3), *last)


def trained(check: bool, data: Any = None, **options: Any) -> tuple[list[Tensor], Any, Tensor, int]:
    data = Augmented() if data is None else data
    model = model_of()
    shuffled = torch.Generator().manual_seed(3)
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=1e-3), CE, seed=1, progress=False, check=check, log_every=1,
        **options,
    )  # fmt: skip
    val = DataLoader(TensorDataset(X[:20] + 9, Y[:20]), batch_size=8)
    history = loop.fit(DataLoader(data, batch_size=16, shuffle=True, generator=shuffled), val, epochs=3)
    curves = {name: history[name] for name in ("train/loss", "val/loss", "grad_norm")}
    return list(model.state_dict().values()), curves, torch.rand(3), getattr(data, "reads", 0)


@pytest.mark.filterwarnings("ignore:.checks.")
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16", "accumulation_steps": 2}, {"precision": "bf16-pure"}, {"max_grad_norm": 0.1}]
)
def test_a_checked_training_is_bitwise_the_same(options: dict[str, Any]) -> None:
    without, checked = trained(False, **options), trained(True, **options)
    assert all(torch.equal(a, b) for a, b in zip(without[0], checked[0], strict=True))
    assert without[1] == checked[1]
    assert torch.equal(without[2], checked[2])
    assert without[3] == checked[3] > 0  # reads of the data set


@pytest.mark.filterwarnings("ignore:.checks.")
def test_a_resumed_run_is_checked_and_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    results = []
    for check in (False, True):
        model = model_of()
        folder = tmp_path / str(check)
        for epochs in (1, 3):
            loop = fastloop.Loop(
                model, fastloop.AdamW(model.parameters(), lr=1e-3), CE, seed=1, progress=False, check=check,
                run_dir=folder, curves=False,
            )  # fmt: skip
            loop.fit(DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True), epochs=epochs)
            model = model_of() if epochs == 1 else model
        results.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert json.loads((tmp_path / "True" / "checks.json").read_text())["step"] == 5


def test_errors_end_the_run_before_anything_is_trained(tmp_path: Path) -> None:
    model = model_of(nn.Softmax(1))
    before = [value.clone() for value in model.state_dict().values()]
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=1e-3), CE, progress=False, check=True, run_dir=tmp_path / "a"
    )
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)
    with (
        warnings.catch_warnings(record=True, action="always") as told,
        pytest.raises(CheckFailed, match="a softmax of its own") as failed,
    ):
        loop.fit(loader, epochs=2)
    assert loop.global_step == 0
    assert not list((tmp_path / "a").glob("checkpoints/*"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    written = json.loads((tmp_path / "a" / "checks.json").read_text())
    assert written["error"] == 1
    assert written["findings"][0]["where"] == "output activation"
    assert {f["what"] for f in written["findings"]} == {f.what for f in failed.value.findings}
    assert ["no validation data" in str(w.message) for w in told] == [True]  # once
    assert [p.name for p in (tmp_path / "a").iterdir() if p.name.startswith(".")] == []


def test_without_check_the_same_run_trains(tmp_path: Path) -> None:
    model = model_of(nn.Softmax(1))
    loop = fastloop.Loop(model, fastloop.AdamW(model.parameters(), lr=1e-3), CE, progress=False, run_dir=tmp_path / "a")
    loop.fit(DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True), max_steps=1)
    assert loop.global_step == 1
    assert not (tmp_path / "a" / "checks.json").exists()


def test_notes_go_to_the_logger_and_warnings_are_warned(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    loop = fastloop.Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), CE, progress=False, check=True)
    train, val = DataLoader(TensorDataset(X, Y), batch_size=35), DataLoader(TensorDataset(X + 9, Y))
    with caplog.at_level(logging.INFO, "fastloop.loop"), pytest.warns(UserWarning, match="not shuffled"):
        loop.fit(train, val, max_steps=1)
    assert "check: note: schedule" in caplog.text


def test_streams_are_trained_on_whole() -> None:
    seen = []

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            for i in range(40):
                seen.append(i)
                yield X[i], Y[i]

    def batches() -> Iterator[Any]:
        yield X[:35], Y[:35]
        yield X[35:], Y[35:]

    for loader, steps in ((DataLoader(Stream(), batch_size=20), 2), (batches(), 2)):
        model = nn.Linear(8, 3)
        loop = fastloop.Loop(model, fastloop.AdamW(model.parameters(), lr=1e-3), CE, progress=False, check=True)
        loop.fit(loader, [(X, Y)], epochs=1)
        assert loop.global_step == steps
    assert seen == list(range(40))


def test_a_check_that_breaks_does_not_break_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastloop.checks import run as checks

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(checks, "inspect", broken)
    model = model_of()
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=1e-3), CE, progress=False, check=True, run_dir=tmp_path / "a"
    )
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "checks.json").mkdir()  # so that it cannot be written either
    loop.fit(DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True), max_steps=2)
    assert loop.global_step == 2


def test_check_is_true_or_false() -> None:
    model = nn.Linear(8, 3)
    with pytest.raises(TypeError, match="check must be True or False"):
        fastloop.Loop(model, fastloop.AdamW(model.parameters()), check="yes")


# ---- several ranks


def one_bad_rank(rank: int, strategy: str) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=1e-3), CE, strategy=strategy, progress=False, check=True
    )
    labels = torch.arange(16) % 3 + (3 if rank == 1 else 0)  # outside of the classes, on rank 1
    try:
        loop.fit([(torch.randn(16, 8), labels)], [(torch.randn(16, 8), torch.arange(16) % 3)], max_steps=1)
    except CheckFailed as error:
        return f"{str(error).splitlines()[0]} step {loop.global_step}"
    return "trained"


def healthy_ranks(rank: int, strategy: str) -> list[str]:
    results = []
    for check in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        loop = fastloop.Loop(
            model,
            fastloop.AdamW(model.parameters(), lr=1e-2),
            CE,
            strategy=strategy,
            progress=False,
            check=check,
            seed=3,
        )
        x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
        loop.fit(DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True), [(x, y)], epochs=2)
        tensors = [getattr(v, "_local_tensor", v) for v in loop.model.state_dict().values()]
        results.append([t.double().sum().item() for t in tensors])
    return ["same" if results[0] == results[1] else f"{results}"]


def rank_with_an_iterator(rank: int, strategy: str) -> int:
    """The loss has a collective; rank 1 cannot try a batch, and rank 0 would wait for it."""
    others = iter([X] * 9) if rank == 1 else [X] * 9

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert others is not None
        mean = model(batch[0]).mean()
        dist.all_reduce(mean.detach().clone())
        return CE(model(batch[0]), batch[1]) + 0 * mean

    model = nn.Linear(8, 3)
    loop = fastloop.Loop(model, fastloop.AdamW(model.parameters()), loss, strategy=strategy, progress=False, check=True)
    loop.fit([(torch.randn(16, 8), torch.arange(16) % 3)], max_steps=1)
    return loop.global_step


def test_ranks_agree_to_try_no_batch(tmp_path: Path) -> None:
    assert run(rank_with_an_iterator, 2, tmp_path, "ddp") == [1, 1]


def test_ranks_agree_to_raise(tmp_path: Path) -> None:
    said = run(one_bad_rank, 2, tmp_path, "ddp")
    assert "another rank has errors, which its output lists, before the training" in said[0]
    assert said[0].endswith("step 0")
    assert "1 error before" in said[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_train_as_without_checks(strategy: str, tmp_path: Path) -> None:
    assert run(healthy_ranks, 2, tmp_path, strategy) == [["same"], ["same"]]
