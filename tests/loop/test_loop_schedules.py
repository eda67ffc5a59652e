# SPDX-License-Identifier: Apache-2.0
"""Each schedule by name in Loop: the rate of every window against torch's scheduler, also across a resume."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import batches, cross_entropy, network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lr

import fastloop
from fastloop import Loop, schedules
from fastloop.loop.plateau import Plateau

WINDOWS, EPOCH, CUT = 24, 6, 13  # the cut is in the middle of an epoch
DATA = batches([4] * EPOCH)
BASES = (0.1, 0.02)
VALUES = [5.0, 4.0, 4.0, 4.0, 3.0, 3.5, 3.0, 3.0, 2.9999, 2.0, 2.0, 2.0, 2.0]  # one for each two windows


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch, one_thread):
    """Many short runs: no waiting for the disk, which loses no power here, nor of two threads for each other."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def grouped(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """SGD of two groups of different rates."""
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": BASES[0]}, {"params": others, "lr": BASES[1]}], **settings)


def looped(schedule: Any, seen: list[Any], read: Callable[[dict[str, Any]], Any], **options: Any) -> Loop:
    """A loop that notes what its groups say in each window; its validation loss is the next of VALUES."""
    model = network()
    optimizer = grouped(model, momentum=0.9)
    made = schedule(optimizer) if callable(schedule) else schedule

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        if model.training:
            seen.append([read(group) for group in optimizer.param_groups])
            return cross_entropy(model, batch)
        value = VALUES[loop.global_step // 2 - 1]
        return torch.tensor(value), {"score": torch.tensor(-value)}

    loop = Loop(model, optimizer, loss_fn, schedule=made, loggers=(), curves=False, progress=False, **options)
    return loop


def rate(group: dict[str, Any]) -> float:
    return float(group["lr"])


def seen_by_loop(
    schedule: Any, folder: Path, read: Callable[[dict[str, Any]], Any] = rate, **options: Any
) -> list[Any]:
    """What each window was trained with; asserts that a run resumed at CUT is trained with the same from there."""
    fit = {"max_steps": WINDOWS, "evaluate_every_steps": 2}
    seen: list[Any] = []
    settings = {"run_dir": folder, "save_every_steps": CUT, "save_every_epochs": None, "keep_best": 0, **options}
    looped(schedule, seen, read, **settings).fit(DATA, DATA[:1], **fit)
    (saved,) = [each for each in (folder / "checkpoints").iterdir() if f"{CUT}" in each.name]
    other = folder.with_name("resumed")
    shutil.copytree(saved, other / "checkpoints" / saved.name)
    again: list[Any] = []
    resumed = looped(schedule, again, read, **settings | {"run_dir": other})
    assert resumed.global_step == CUT
    resumed.fit(DATA, DATA[:1], **fit)
    assert again == seen[CUT:]
    assert len(seen) == WINDOWS
    return seen


def of_torch(make: Callable[[Any], Any]) -> list[float]:
    """Rates of torch's scheduler for a base of 1, stepped after each window."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(WINDOWS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def warmed(then: Callable[[Any], Any]) -> list[float]:
    first = lambda o: lr.LinearLR(o, 1 / 5, 1.0, 4)  # noqa: E731
    return of_torch(lambda o: lr.SequentialLR(o, [first(o), then(o)], [4]))


def stable(step: int) -> float:
    return (step + 1) / 5 if step < 4 else 1.0 if step < 16 else 0.1 + 0.9 * (24 - step) / 8


EXPECTED: dict[str, tuple[dict[str, Any], list[float]]] = {
    "warmup_cosine": (
        {"warmup_steps": 4, "min_factor": 0.1},
        warmed(lambda o: lr.CosineAnnealingLR(o, WINDOWS - 4, 0.1)),
    ),
    "warmup_linear": ({"warmup_steps": 4}, warmed(lambda o: lr.LinearLR(o, 1.0, 0.0, WINDOWS - 4))),
    "warmup_stable_decay": (
        {"warmup_steps": 4, "decay_steps": 8, "min_factor": 0.1},
        [stable(step) for step in range(WINDOWS)],
    ),
    "one_cycle": ({}, of_torch(lambda o: lr.OneCycleLR(o, 1.0, WINDOWS, cycle_momentum=False))),
    "cyclic": (
        {"up_steps": 5, "down_steps": 2, "min_factor": 0.2, "mode": "triangular2"},
        of_torch(lambda o: lr.CyclicLR(o, 0.2, 1.0, 5, 2, "triangular2", cycle_momentum=False)),
    ),
    "step": ({"step_size": 7, "gamma": 0.5}, of_torch(lambda o: lr.StepLR(o, 7, 0.5))),
    "multi_step": ({"milestones": [3, 14, 20]}, of_torch(lambda o: lr.MultiStepLR(o, [3, 14, 20]))),
    "exponential": ({"gamma": 0.9}, of_torch(lambda o: lr.ExponentialLR(o, 0.9))),
    "cosine_restarts": (
        {"first_steps": 3, "multiplier": 2},
        of_torch(lambda o: lr.CosineAnnealingWarmRestarts(o, 3, 2)),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_rate_of_each_window_is_torchs(name: str, tmp_path: Path) -> None:
    arguments, factors = EXPECTED[name]
    seen = seen_by_loop({"name": name, **arguments}, tmp_path / "run")
    for window, (rates, factor) in enumerate(zip(seen, factors, strict=True)):
        for found, base in zip(rates, BASES, strict=True):
            assert found == pytest.approx(base * factor, rel=1e-12, abs=1e-14), (window, name)


# ---- plateau


def plateau_of_torch(values: list[float], mode: str = "min", **arguments: Any) -> list[float]:
    """Factors after each value, by torch's scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = lr.ReduceLROnPlateau(optimizer, mode=mode, eps=0.0, **arguments)
    found = []
    for value in values:
        scheduler.step(value)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("options", [{}, {"monitor": ["val/score", "val/loss"], "mode": ["max", "min"]}])
def test_plateau_is_stepped_after_each_evaluation_and_resumed_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    """Evaluations after windows 2, 4, ...: 12 of them, some at the end of an epoch, where only one is made."""
    arguments = {"factor": 0.5, "patience": 1, "threshold": 0.01, "cooldown": 1, "min_factor": 0.2}
    seen = seen_by_loop({"name": "plateau", **arguments}, tmp_path / "run", **options)
    after = [1.0, *plateau_of_torch(VALUES, factor=0.5, patience=1, threshold=0.01, cooldown=1, min_lr=0.2)]
    assert len(set(after[:12])) >= 3  # or nothing would be tested
    assert seen == [[base * after[window // 2] for base in BASES] for window in range(WINDOWS)]


@given(
    values=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    least=st.sampled_from([0.0, 0.1]),
)
def test_plateau_is_torchs_rule(values: list[int], mode: str, patience: int, cooldown: int, least: float) -> None:
    ours = Plateau(schedules.plateau(0.5, patience, 0.15, cooldown, least), mode)
    given_to = {"factor": 0.5, "patience": patience, "threshold": 0.15, "cooldown": cooldown, "min_lr": least}
    found = []
    for value in values:
        ours.update(float(value))
        found.append(ours.factor)
        state = ours.state_dict()
        ours = Plateau(schedules.plateau(0.5, patience, 0.15, cooldown, least), mode)
        ours.load_state_dict(state)
    assert found == plateau_of_torch([float(value) for value in values], mode, **given_to)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_a_metric_below_0_and_one_that_is_not_finite(mode: str, sign: float) -> None:
    """torch takes -1 for better than -1: its bound is -1 * (1 - threshold)."""
    follower = Plateau(schedules.plateau(0.5, patience=1, threshold=0.1), mode)
    for value, factor in ((math.nan, 1.0), (-1.0 * sign, 1.0), (-1.0 * sign, 1.0), (-1.05 * sign, 0.5)):
        follower.update(value)
        assert follower.factor == factor
    assert follower.best == -1.0 * sign
    follower.update(-math.inf * sign)
    assert follower.best == -1.0 * sign
    follower.update(-2.0 * sign)
    assert follower.best == -2.0 * sign


def test_an_evaluation_cut_short_by_a_signal_counts_once(tmp_path: Path) -> None:
    """Each evaluation has 2 batches; the signal comes in the first one's, and the run that goes on makes it anew."""

    def run(folder: str, cut: int | None) -> tuple[list[Any], Any]:
        model, seen, evaluated = network(), [], []
        optimizer = grouped(model)

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            if model.training:
                seen.append((loop.global_step, rate(optimizer.param_groups[1])))
                return cross_entropy(model, batch)
            evaluated.append(loop.global_step)
            if len(evaluated) == cut:
                os.kill(os.getpid(), signal.SIGTERM)
            return torch.tensor(1.0 + 0.0 * loop.global_step)

        schedule = schedules.plateau(0.5, patience=1, threshold=0.01, cooldown=1)
        loop = Loop(model, optimizer, loss_fn, schedule=schedule, run_dir=tmp_path / folder, curves=False,
                    progress=False)  # fmt: skip
        try:
            loop.fit(DATA, DATA[:2], epochs=3, evaluate_every_steps=2)
        except SystemExit:
            assert cut is not None
        return seen, loop._rates.state_dict()

    whole, state = run("whole", None)
    assert len({factor for _, factor in whole}) >= 3  # or nothing would be tested
    for cut in (1, 5, 7):
        before, _ = run(f"cut at {cut}", cut)
        assert 0 < len(before) < len(whole)
        after, ended = run(f"cut at {cut}", None)
        assert before + after == whole
        assert ended == state


def test_plateau_needs_evaluations() -> None:
    model = network()
    said = r"schedule follows a metric and needs evaluations, got no val_loader; pass one to fit"
    with pytest.raises(ValueError, match=said):
        Loop(model, grouped(model), cross_entropy, schedule="plateau").fit(DATA, epochs=1)
    optimizer = grouped(model)
    with pytest.raises(ValueError, match=said):
        Loop(model, optimizer, cross_entropy, schedule=lr.ReduceLROnPlateau(optimizer)).fit(DATA, epochs=1)

    class Evaluating:
        def on_epoch_end(self, loop: Loop) -> None:
            loop.evaluate(DATA[:1])

    model = network()
    loop = Loop(model, grouped(model), cross_entropy, schedule="plateau", callbacks=[Evaluating()])
    loop.fit(DATA, epochs=1)
    assert loop._rates.state_dict()["plateau"]["best"] is not None


def test_plateau_from_a_config(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[loop]\nschedule = {name = "plateau", factor = 0.5, patience = 0, threshold = 0.5}\n')
    model = network()
    loop = Loop.from_config(config, model, fastloop.AdamW(model.parameters(), lr=1e-9), cross_entropy)
    loop.fit(DATA, DATA[:1], epochs=3)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(1e-9 / 4)
    config.write_text('[loop]\nschedule = {name = "plateau", factor = 2}\n')
    with pytest.raises(ValueError, match=r"config.toml:2\].*factor must lie in \(0, 1\), got 2.0"):
        Loop.from_config(config, model, fastloop.AdamW(model.parameters()), cross_entropy)


def test_a_group_that_is_added_follows_the_plateau_too() -> None:
    model = network()
    optimizer = torch.optim.SGD(list(model[0].parameters()), lr=0.1)
    loop = Loop(model, optimizer, cross_entropy, schedule=schedules.plateau(0.5, patience=0, threshold=0.9))
    loop.fit(DATA, DATA[:1], epochs=2)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.4})
    loop.fit(DATA, DATA[:1], epochs=3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 4, 0.4 / 4]


def test_a_checkpoint_of_another_kind_of_schedule_begins_anew_and_says_so(tmp_path: Path, caplog: Any) -> None:
    def run(schedule: Any, epochs: int) -> Loop:
        model = network()
        optimizer = grouped(model)
        made = schedule(optimizer) if callable(schedule) else schedule
        loop = Loop(model, optimizer, cross_entropy, schedule=made, run_dir=tmp_path / "run", curves=False)
        loop.fit(DATA, DATA[:1], epochs=epochs)
        return loop

    run("cosine", 1)  # has no state, and "plateau" and torch's need one
    for schedule in ("plateau", lambda optimizer: lr.ExponentialLR(optimizer, 0.9)):
        with caplog.at_level(logging.WARNING, "fastloop.loop"):
            run(schedule, 1)
        assert "another kind of schedule" in caplog.text
        caplog.clear()
    shutil.rmtree(tmp_path / "run")
    run(lambda optimizer: lr.ExponentialLR(optimizer, 0.9), 1)
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        loop = run("plateau", 2)
    assert "another kind of schedule" in caplog.text
    assert loop._rates.state_dict()["plateau"]["factor"] == 1.0
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        run(lambda optimizer: lr.ExponentialLR(optimizer, 0.9), 3)
    assert "another kind of schedule" in caplog.text


# ---- torch's own, given as objects


MOMENTUM: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr.OneCycleLR(o, [each["lr"] for each in o.param_groups], WINDOWS, cycle_momentum=True),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.01, 0.1, 5, mode="triangular2", cycle_momentum=True),
}


@pytest.mark.parametrize("name", MOMENTUM)
def test_momentum_goes_round_with_the_rate(name: str, tmp_path: Path) -> None:
    both = lambda group: (rate(group), group["momentum"])  # noqa: E731
    seen = seen_by_loop(MOMENTUM[name], tmp_path / "run", both)
    optimizer = grouped(network(), momentum=0.9)
    scheduler = MOMENTUM[name](optimizer)
    for window in seen:
        assert window == [both(group) for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
    assert len({momentum for (_, momentum), _ in seen}) > 5
