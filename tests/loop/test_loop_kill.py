# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a run ends as if it had never been: SIGKILL at random, also while it saves; signals; deaths.

The training is a child process that saves at every window, in the background, so that most kills hit a save.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time

import pytest
import ranks
import torch
from support import bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.loop.logs import read_rows
from fastloop.loop.manifest import scan

IN_A_WINDOW = "in-a-window"  # a file of the run: its first window has begun
TIMES = ("steps/s", "samples/s", "data_wait", "memory/host")
STEPS = 36
SLOW = 0.04  # seconds of a forward: the test's process may have to wait for a core while the training goes on


class Slow(nn.Module):
    """A model whose windows take long enough to be hit, with dropout and buffers."""

    def __init__(self, seconds, mark):
        super().__init__()
        self.seconds, self.mark = seconds, mark
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 3))

    def forward(self, x):
        if self.training:
            self.mark.touch()
            time.sleep(self.seconds)
        return self.layers(x)


def data(workers=0):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.argmax(dim=1) % 3), 8, shuffle=True, num_workers=workers)


def training(rank, run_dir, seconds=0.004, strategy=None, more=None, fit=None):
    """One attempt; returns what identifies the end."""
    fastloop.loop.loop.plot_curves = lambda folder: None
    begun = (run_dir / "checkpoints").exists() and any(run_dir.glob("checkpoints/step-*"))
    torch.manual_seed(os.getpid() if begun else 0)  # nothing of a resumed run may come from here
    model = Slow(seconds, run_dir / IN_A_WINDOW)
    optimizer = fastloop.AdamW(model.parameters(), lr=0.01, ema_decay=0.9)
    settings = {"save_every_steps": 1, "log_every": 1, "seed": 4, "accumulation_steps": 2, "progress": False}
    loop = fastloop.Loop(
        model, optimizer, nn.CrossEntropyLoss(), run_dir=run_dir, strategy=strategy, schedule="one_cycle",
        **settings | (more or {}),
    )  # fmt: skip
    started = loop.global_step
    loop.fit(data(), data(), **(fit or {"epochs": STEPS // 3, "evaluate_every_steps": 2}))
    return digest(loop), loop.global_step, started


def digest(loop):
    """Weights, states and logs but for times, as one line."""
    values = [(name, bits(full(t))) for name, t in loop.model.state_dict().items()]
    values += [
        (key, bits(full(v)) if isinstance(v, torch.Tensor) else v)
        for p in loop.model.parameters()
        for key, v in sorted(loop.optimizer.state[p].items())
    ]
    if loop.ranks.rank == 0:
        values += [
            sorted((k, repr(v)) for k, v in row.items() if k not in TIMES)
            for row in read_rows(loop.run_dir / "metrics.jsonl")
        ]
    return hashlib.sha256(repr(values).encode()).hexdigest()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def kill_until_done(folder, kills, world, *args):
    """Start, kill after a random time, start again; returns the results of the attempt that is let through."""
    chance = random.Random(0)
    reached = []
    for _ in range(kills):
        started = ranks.Started(training, world, folder, folder / "run", *args)
        newest = steps_of(folder)
        # Waits for a checkpoint more than there was, then a random part of a window: progress, and any phase of a save.
        while started.alive() and steps_of(folder) == newest:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)
        killed = started.alive()
        started.kill()
        started.wait()
        if not killed:
            break
        reached.append(max(steps_of(folder), default=0))
    return ranks.run(training, world, folder, folder / "run", *args), reached


def steps_of(folder):
    """Steps of the checkpoints, by the names of the folders."""
    try:
        names = os.listdir(folder / "run" / "checkpoints")
    except FileNotFoundError:
        return set()
    return {int(name.partition("-")[2]) for name in names if name.startswith(("step-", "final-"))}


def test_sigkill_at_random_moments(tmp_path):
    [(wanted, steps, _)] = ranks.run(training, 1, tmp_path, tmp_path / "whole")
    assert steps == STEPS
    [(got, steps, started)], reached = kill_until_done(tmp_path, 24, 1)
    assert steps == STEPS
    assert started > 0
    assert len(reached) >= 12  # kills that hit; each attempt gets a window further at least
    assert reached == sorted(reached)
    assert got == wanted
    good, damaged = scan(tmp_path / "run" / "checkpoints")
    assert good
    assert not damaged
    assert not [p for p in (tmp_path / "run" / "checkpoints").glob(".tmp-*") if p.stat().st_mtime < time.time() - 60]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sigkill_of_two_ranks(strategy, tmp_path):
    arguments = (0.004, strategy, None, {"epochs": 6, "evaluate_every_steps": 2})
    wanted = ranks.run(training, 2, tmp_path, tmp_path / "whole", *arguments)
    got, reached = kill_until_done(tmp_path, 6, 2, *arguments)
    assert len(reached) >= 4
    assert [r[:2] for r in got] == [r[:2] for r in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_dies(victim, tmp_path):
    """The other ends with an error, soon, though a save may wait for its part; the next attempt goes on."""
    arguments = (0.0, "ddp", None, {"epochs": 4})
    wanted = ranks.run(training, 2, tmp_path, tmp_path / "whole", *arguments)
    started = ranks.Started(training, 2, tmp_path, tmp_path / "run", SLOW, *arguments[1:])
    while started.alive() and not steps_of(tmp_path):
        time.sleep(0.002)
    started.kill(victim)
    codes = started.wait(seconds=60)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, -signal.SIGKILL)
    got = ranks.run(training, 2, tmp_path, tmp_path / "run", *arguments)
    assert [r[:2] for r in got] == [r[:2] for r in wanted]


# ---- signals that ask

# The signal comes a few windows after the start, and must come before the end.
RARELY = {"save_every_steps": None, "save_every_epochs": None}


def wait_for_rows(started, folder, count):
    file = folder / "metrics.jsonl"
    while started.alive() and (not file.exists() or file.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, tmp_path):
    [(wanted, _, _)] = ranks.run(training, 1, tmp_path, tmp_path / "whole", 0.0, None, RARELY)
    started = ranks.Started(training, 1, tmp_path, tmp_path / "run", SLOW, None, RARELY)
    wait_for_rows(started, tmp_path / "run", 3)
    started.kill(number=number)
    assert started.wait() == [143 if number == signal.SIGTERM else 1]  # a KeyboardInterrupt that nobody catches
    [checkpoint] = [c for c in scan(tmp_path / "run" / "checkpoints")[0] if c.manifest["reason"] == number.name]
    assert 2 <= checkpoint.step < STEPS
    [(got, _, begin)] = ranks.run(training, 1, tmp_path, tmp_path / "run", 0.0, None, RARELY)
    assert begin == checkpoint.step
    assert got == wanted


def test_sigusr1_saves_and_goes_on(tmp_path):
    started = ranks.Started(training, 1, tmp_path, tmp_path / "run", SLOW, None, RARELY | {"keep_best": 0})
    wait_for_rows(started, tmp_path / "run", 3)
    started.kill(number=signal.SIGUSR1)
    [(_, steps, _)] = started.results()
    assert steps == STEPS
    reasons = [c.manifest["reason"] for c in scan(tmp_path / "run" / "checkpoints")[0]]
    assert sorted(reasons) == ["asked", "end"]


def test_a_second_ctrl_c_does_not_wait_for_the_window(tmp_path):
    """Of a window that takes ten minutes."""
    started = ranks.Started(training, 1, tmp_path, tmp_path / "run", 600.0, None, {"accumulation_steps": 1})
    while started.alive() and not (tmp_path / "run" / IN_A_WINDOW).exists():
        time.sleep(0.01)
    started.kill(number=signal.SIGINT)
    time.sleep(1)  # two at once would be one
    assert started.alive()
    started.kill(number=signal.SIGINT)
    assert started.wait(seconds=60) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_a_signal_to_some_ranks(number, asked, tmp_path):
    """They agree, whichever was asked, and save one checkpoint together."""
    started = ranks.Started(
        training, 2, tmp_path, tmp_path / "run", SLOW, "ddp", RARELY | {"keep_best": 0}, {"epochs": 10}
    )
    wait_for_rows(started, tmp_path / "run", 3)
    started.kill(*asked, number=number)
    codes = started.wait()
    found = scan(tmp_path / "run" / "checkpoints")[0]
    assert all(c.manifest["world_size"] == 2 for c in found)
    if number == signal.SIGTERM:
        assert codes == [143, 143]
        assert len(found) == 1
    else:
        assert codes == [0, 0]
        assert sorted(c.manifest["reason"] for c in found)[:2] == ["asked", "end"]


class DiesOnce(torch.utils.data.Dataset):
    """A data set whose worker dies at one sample, as long as a file is not there."""

    def __init__(self, mark):
        self.mark = mark

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index == 17 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return torch.full((4,), float(index)), index % 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies(tmp_path):
    """The run ends with DataLoader's error, and is saved; started again it ends as one without the death."""
    ends = []
    for folder, dies in (("whole", False), ("died", True)):
        mark = tmp_path / f"{folder}.mark"
        if not dies:
            mark.touch()
        for attempt in range(1 + dies):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
            optimizer = fastloop.AdamW(model.parameters(), lr=0.01)
            loop = fastloop.Loop(
                model,
                optimizer,
                nn.CrossEntropyLoss(),
                run_dir=tmp_path / folder,
                seed=1,
                save_every_steps=1,
                curves=False,
            )
            loader = torch.utils.data.DataLoader(DiesOnce(mark), batch_size=2, num_workers=2)
            if dies and attempt == 0:
                with pytest.raises(RuntimeError, match="DataLoader worker"):
                    loop.fit(loader, epochs=2)
                assert 0 < loop.global_step < 12
            else:
                loop.fit(loader, epochs=2)
        ends.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
