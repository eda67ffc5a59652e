# SPDX-License-Identifier: Apache-2.0
"""A signal in an evaluation: honoured within a batch, and the run that goes on is the one that was not interrupted."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import batches, cross_entropy, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop

STEPS, VAL_BATCHES = 5, 4  # windows of an epoch; batches of an evaluation


def loaders() -> tuple[DataLoader, DataLoader]:
    shared = torch.Generator().manual_seed(7)  # both draw from it, in the order of the run
    [(x, y)] = batches([4 * STEPS])
    data = TensorDataset(x, y)
    noisy = TensorDataset(*batches([4 * VAL_BATCHES], seed=2)[0])
    train = DataLoader(data, batch_size=4, shuffle=True, generator=shared)
    return train, DataLoader(noisy, batch_size=4, shuffle=True, generator=shared)


class Loss:
    """Cross entropy; evaluations of the whole run are numbered from 1, and one is sent a signal."""

    def __init__(self, evaluation: int | None, kind: signal.Signals = signal.SIGTERM) -> None:
        self.evaluation, self.kind = evaluation, kind
        self.batches = 0  # evaluated

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        if not model.training:
            if self.evaluation is not None and self.batches == (self.evaluation - 1) * VAL_BATCHES + 1:
                os.kill(os.getpid(), self.kind)
            self.batches += 1
        # The order of an evaluation shows in the metric, of which the last batch's weight is the largest.
        return cross_entropy(model, batch), {"first": batch[0][0, 0].double()}, float(self.batches % VAL_BATCHES + 1)


def trained(folder: Path, loss: Loss, every: int | None, callbacks: Sequence[Any] = ()) -> fastloop.Loop:
    model = nn.Sequential(network(), nn.Dropout(0.2))
    optimizer = fastloop.AdamW(model.parameters(), lr=0.05)
    loop = fastloop.Loop(
        model, optimizer, loss, run_dir=folder, seed=0, log_every=1, progress=False, curves=False, patience=9,
        schedule=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.3),
        callbacks=callbacks,
    )  # fmt: skip
    loop.fit(*loaders(), epochs=3, evaluate_every_steps=every)
    return loop


def outcome(loop: fastloop.Loop) -> Any:
    history = {name: points for name, points in loop.history.items() if name != "data_wait"}
    return [p.tolist() for p in loop.model.parameters()], history, loop._best, loop._stopper.state_dict()


def finals(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").iterdir() if "final" in path.name]


@pytest.mark.parametrize("every", [2, None])
@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_the_run_goes_on_as_if_nothing_had_been(evaluation: int, every: int | None, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", Loss(None), every)
    loss = Loss(evaluation)
    with pytest.raises(SystemExit):
        trained(tmp_path / "parts", loss, every)
    assert loss.batches == (evaluation - 1) * VAL_BATCHES + 2
    parts = trained(tmp_path / "parts", Loss(None), every)
    assert outcome(parts) == outcome(whole)
    assert finals(tmp_path / "parts") == finals(tmp_path / "whole") != []


def test_a_ctrl_c_in_the_last_evaluation_leaves_no_final_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Loss(3, signal.SIGINT), None)
    assert finals(tmp_path) == []


def test_a_signal_to_save_interrupts_nothing(tmp_path: Path) -> None:
    loss = Loss(1, signal.SIGUSR1)
    loop = trained(tmp_path, loss, None)
    assert loss.batches == 3 * VAL_BATCHES
    assert len(loop.history["val/loss"]) == 3


class Seen:
    """What callbacks find: the metrics at the end of each epoch; each evaluation is saved by name."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.ends, self.evaluated_at = folder, [], []

    def on_epoch_end(self, loop: fastloop.Loop) -> None:
        self.ends.append((loop.epoch, loop.global_step, dict(loop._last_metrics), torch.rand(1).item()))

    def on_evaluate(self, loop: fastloop.Loop, values: dict[str, float]) -> None:
        if self.folder is not None:
            loop.save(self.folder / f"at-{loop.global_step}")
        self.evaluated_at.append((loop._evaluated_at, loop.state_dict()["loop"]["owes_evaluation"]))


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_an_epoch_ends_once_with_its_metrics(evaluation: int, tmp_path: Path) -> None:
    whole, first, rest = Seen(), Seen(), Seen()
    expected = trained(tmp_path / "whole", Loss(None), None, [whole])
    with pytest.raises(SystemExit):
        trained(tmp_path / "parts", Loss(evaluation), None, [first])
    assert len(first.ends) == evaluation - 1
    parts = trained(tmp_path / "parts", Loss(None), None, [rest])
    assert first.ends + rest.ends == whole.ends
    assert outcome(parts) == outcome(expected)


def test_a_checkpoint_of_an_evaluations_callback_knows_the_evaluation(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "saved")
    trained(tmp_path / "run", Loss(None), None, [seen])
    assert seen.evaluated_at == [(STEPS * epoch, False) for epoch in (1, 2, 3)]


def test_an_evaluation_that_nobody_makes_is_not_owed_later(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trained(tmp_path, Loss(1), None)
    model = nn.Sequential(network(), nn.Dropout(0.2))
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=0.05), Loss(None), run_dir=tmp_path, progress=False, curves=False,
    )  # fmt: skip
    loop.fit(loaders()[0], epochs=2)
    assert not loop._owes_evaluation
