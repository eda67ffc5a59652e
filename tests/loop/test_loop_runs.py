# SPDX-License-Identifier: Apache-2.0
"""Several calls, several runs and evaluations in between: each goes on where the one before ended."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.loop.checkpoint import Store
from fastloop.loop.logs import read_rows


def data(samples: int = 40, batch_size: int = 4) -> DataLoader:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=batch_size, shuffle=True)


def loop_of(run_dir: Path | None = None, **options) -> fastloop.Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = fastloop.AdamW(model.parameters(), lr=options.pop("lr", 0.01))
    settings = {"seed": 1, "curves": False, "log_every": 1, "progress": False, **options}
    return fastloop.Loop(model, optimizer, nn.CrossEntropyLoss(), run_dir=run_dir, **settings)


def weights(loop: fastloop.Loop) -> list[torch.Tensor]:
    return list(loop.model.state_dict().values())


def same(a: fastloop.Loop, b: fastloop.Loop) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_a_longer_fit_resolves_its_schedule_anew() -> None:
    loop = loop_of(schedule="cosine")
    loop.fit(data(), epochs=1)
    loop.fit(data(), epochs=3)
    rates = [lr for _, lr in loop.history["lr"]][10:]
    assert all(lr > 0 for lr in rates)


def test_a_run_at_its_end_keeps_its_place_in_the_data(tmp_path: Path) -> None:
    whole = loop_of(tmp_path / "whole")
    whole.fit(data(), epochs=3)
    for max_steps in (13, 13):  # the second has nothing to do, and writes no other place over the first's
        loop_of(tmp_path / "parts", save_every_steps=13).fit(data(), epochs=3, max_steps=max_steps)
    parts = loop_of(tmp_path / "parts")
    parts.fit(data(), epochs=3)
    assert parts.global_step == whole.global_step == 30
    assert same(parts, whole)


def test_a_final_that_was_not_written_is_written_with_the_place(tmp_path: Path) -> None:
    whole = loop_of(tmp_path / "whole")
    whole.fit(data(), epochs=3)
    loop_of(tmp_path / "run", save_every_steps=13).fit(data(), epochs=3, max_steps=13)
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in (checkpoints / "final-000000013").iterdir():  # killed before it was written
        path.unlink() if path.is_file() else [inner.unlink() for inner in path.iterdir()]
    loop_of(tmp_path / "run").fit(data(), epochs=3, max_steps=13)
    run = loop_of(tmp_path / "run")
    run.fit(data(), epochs=3)
    assert run.global_step == 30
    assert same(run, whole)


def test_two_phases_resume_in_the_second(tmp_path: Path) -> None:
    def program(folder: str, stop: int | None) -> fastloop.Loop:
        loop = loop_of(tmp_path / folder, save_every_steps=1)
        loop.fit(data(), epochs=2)
        loop.fit(data(80, 8), epochs=4, max_steps=stop)
        return loop

    whole = program("whole", None)
    program("parts", 25)
    parts = program("parts", None)
    assert parts.global_step == whole.global_step == 40
    assert same(parts, whole)


def test_evaluating_an_older_checkpoint_leaves_the_log(tmp_path: Path) -> None:
    loop_of(tmp_path, save_every_steps=5, keep_last=9).fit(data(), epochs=2)
    before = read_rows(tmp_path / "metrics.jsonl")
    loop_of(tmp_path, resume="step-000000005").evaluate(data(), name="test")
    after = read_rows(tmp_path / "metrics.jsonl")
    assert after[: len(before)] == before
    assert [sorted(row) for row in after[len(before) :]] == [["epoch", "step", "test/accuracy", "test/loss"]]


def test_no_resume_sets_the_earlier_run_aside(tmp_path: Path) -> None:
    loop_of(tmp_path).fit(data(), data(), epochs=3)
    new = loop_of(tmp_path, resume=False)
    new.fit(data(), data(), epochs=1)
    assert {c.step for c in [Store(tmp_path / "checkpoints", monitors={"val/loss": "min"}).best()]} == {10}
    assert len(list(tmp_path.glob("checkpoints.old-*/step-000000030"))) == 1


def test_best_is_kept_whoever_evaluates_too(tmp_path: Path) -> None:
    class Tests:
        def on_epoch_end(self, loop: fastloop.Loop) -> None:
            loop.evaluate(data(), name="test")

    loop = loop_of(tmp_path, callbacks=[Tests()])
    loop.fit(data(), data(), epochs=3)
    best = min(loop.history["val/loss"], key=lambda point: point[1])
    found = Store(tmp_path / "checkpoints", monitors={"val/loss": "min"}).best()
    assert found is not None
    assert (found.step, found.metrics["val/loss"]) == best
    assert len(loop.history["test/loss"]) == 3


def test_best_of_a_loop_of_ones_own_has_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, save_every_epochs=None)
    kept: dict[int, list[torch.Tensor]] = {}
    for window in loop.windows(data(), epochs=2):
        if loop.global_step in (5, 12):
            loop.evaluate(data())
            kept[loop.global_step] = [w.clone() for w in weights(loop)]
        for x, y in window:
            loop.backward(nn.functional.cross_entropy(loop.model(x), y))
        loop.step()
    best = min(loop.history["val/loss"], key=lambda point: point[1])[0]
    loop.load("best")
    assert loop.global_step == best
    assert all(torch.equal(a, b) for a, b in zip(weights(loop), kept[best], strict=True))


@pytest.mark.parametrize("monitor", ["val_loss", "train/loss", "val/f1"])
def test_a_monitor_that_never_comes_raises(monitor: str) -> None:
    with pytest.raises(ValueError, match=r"is none of the metrics .*val/loss"):
        loop_of(monitor=monitor, patience=1).fit(data(), data(), epochs=2)


def test_accuracy_leaves_ignored_targets_out() -> None:
    model = nn.Linear(4, 3)
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    loop = fastloop.Loop(model, fastloop.AdamW(model.parameters()), criterion)
    x = torch.randn(30, 4)
    target = torch.cat([torch.zeros(20, dtype=torch.long), model(x[20:])[:, 1:].argmax(1) + 1])
    right = (model(x).argmax(1) == target)[20:].double().mean()
    assert loop.evaluate([(x, target)])["accuracy"] == pytest.approx(right.item())


def test_load_inside_a_run_and_a_run_inside_a_run_are_refused(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, save_every_steps=1)
    loop.fit(data(), max_steps=2)
    windows = loop.windows(data(), epochs=1)
    next(windows)
    with pytest.raises(RuntimeError, match="would move the weights and not the data"):
        loop.load("latest")
    with pytest.raises(RuntimeError, match="running already"):
        next(loop.windows(data(), epochs=1))
    windows.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    loop.load("latest")


def test_a_signal_during_the_last_evaluation_ends_the_program(tmp_path: Path) -> None:
    class Asks:
        def on_evaluate(self, loop: fastloop.Loop, values: dict[str, float]) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        loop_of(tmp_path, callbacks=[Asks()]).fit(data(), data(), max_steps=3)
    assert ended.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "checkpoints" / "final-000000003").is_dir()


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_signal_to_a_loop_that_is_left_is_not_lost(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the end takes its time, as for a save that is still being written."""
    loop = loop_of()
    end = loop._reporter.end
    monkeypatch.setattr(loop._reporter, "end", lambda *args: (time.sleep(seconds), end(*args)))

    def left() -> None:
        for window in loop.windows(data(), epochs=1):
            for x, y in window:
                loop.backward(nn.functional.cross_entropy(loop.model(x), y))
            loop.step()
            signal.raise_signal(signal.SIGINT)
            break
        time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        left()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_evaluating_a_seeded_data_set_leaves_its_epoch() -> None:
    seeded = fastloop.loop.SeededDataset(data().dataset)
    loader = DataLoader(seeded, batch_size=4)
    loop = loop_of()
    epochs = []
    for window in loop.windows(loader, epochs=2):
        for x, y in window:
            loop.backward(nn.functional.cross_entropy(loop.model(x), y))
        loop.step()
        loop.evaluate(loader)
        epochs.append(seeded.epoch)
    assert epochs == [0] * 10 + [1] * 10


def test_many_rows_of_history_are_packed_quickly_and_exactly(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, save_every_epochs=None)
    loop.fit(data(), max_steps=2)
    loop.history["train/loss"] += [(step, step / 7) for step in range(3, 1000)] + [(1000, float("nan"))]
    loop.save()
    again = loop_of(tmp_path)
    assert again.history["train/loss"][:-1] == loop.history["train/loss"][:-1]
    assert again.history["train/loss"][-1][0] == 1000
    assert isinstance(again.history["train/loss"][0][0], int)


def test_saving_to_a_path_replaces_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    loop = loop_of()
    loop.fit(data(), max_steps=2)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        loop.save(photos)
    assert (photos / "a.jpg").read_bytes() == b"mine"
    assert loop.save(tmp_path / "kept") == loop.save(tmp_path / "kept") == tmp_path / "kept"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["kept", "photos"]
