# SPDX-License-Identifier: Apache-2.0
"""A run killed anywhere and resumed is the run that was never killed: weights, states, logs and data, bit for bit.

A run is trained once, and what lies in its folder is copied at each save. Each copy, with the logs of the moment before
the next save, is what a kill leaves behind: a new loop, made with other random states and other weights, goes on from
it, and has to end where the first one did.
"""

from __future__ import annotations

import csv
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from support import bits
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import fastloop
from fastloop import schedules
from fastloop.loop import documents, random_state
from fastloop.loop.logs import read_rows
from fastloop.loop.manifest import scan

SAMPLES, BATCH, EPOCHS = 23, 4, 2  # 6 batches an epoch, the last of 3 samples
STEPS = EPOCHS * -(-SAMPLES // BATCH)
TIMES = ("steps/s", "samples/s", "tokens/s", "data_wait", "memory/host")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Hundreds of short runs: no pictures of them, and no waiting for the disk, which loses no power here."""
    monkeypatch.setattr("fastloop.loop.fitting.plot_curves", lambda run_dir: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---- data


def augmented(index):
    """A sample that draws from every generator, as augmentations do."""
    x = torch.linspace(-1, 1, 6) * (index % 5 - 2) + random.random() + float(numpy.random.rand())
    return index, x + 0.1 * torch.randn(6), index % 3


class Samples(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return augmented(int(index))


class Stream(IterableDataset):
    """Shared by the workers, in an order that each draws."""

    def __iter__(self):
        info = get_worker_info()
        own = list(range(SAMPLES) if info is None else range(info.id, SAMPLES, info.num_workers))
        random.shuffle(own)
        for index in own:
            yield augmented(index)


class Plain:
    """No DataLoader: anything that can be iterated over again, and draws as it goes."""

    def __iter__(self):
        order = numpy.random.permutation(SAMPLES)
        for start in range(0, SAMPLES, BATCH):
            rows = [augmented(int(i)) for i in order[start : start + BATCH]]
            yield {"index": torch.tensor([r[0] for r in rows]), "x": torch.stack([r[1] for r in rows]),
                   "y": torch.tensor([r[2] for r in rows])}  # fmt: skip


class EpochSampler(torch.utils.data.Sampler):
    """Shuffles by the number of the epoch, as DistributedSampler does."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return iter(numpy.random.RandomState(self.epoch).permutation(SAMPLES).tolist())


def generator(fresh):
    """A user's own; a resumed script may have seeded it otherwise."""
    return torch.Generator().manual_seed(5 if fresh else 99)


def loader(fresh, **settings):
    return DataLoader(Samples(), **{"batch_size": BATCH, "shuffle": "sampler" not in settings} | settings)


def shared_generator(fresh, **settings):
    return loader(fresh, generator=generator(fresh), **settings)


def replacement(fresh, **settings):
    """Draws from the user's generator while the epoch goes on, 32 at a time, ahead of the batches with workers."""
    g = generator(fresh)
    return loader(fresh, sampler=RandomSampler(range(SAMPLES), True, 60, generator=g), batch_size=10, **settings)


def weighted(fresh, **settings):
    sampler = WeightedRandomSampler([1.0 + i % 3 for i in range(SAMPLES)], SAMPLES, generator=generator(fresh))
    return loader(fresh, sampler=sampler, **settings)


def subset(fresh, **settings):
    return loader(fresh, sampler=SubsetRandomSampler(range(1, SAMPLES)), **settings)


def by_epoch(fresh, **settings):
    return loader(fresh, sampler=EpochSampler(), **settings)


def stream(fresh, **settings):
    return DataLoader(Stream(), batch_size=BATCH, **settings)


def stateful(fresh, data=Samples, **settings):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    shuffle = {} if data is Stream else {"shuffle": True}
    return torchdata.StatefulDataLoader(data(), batch_size=BATCH, **shuffle, **settings)


def validation(fresh):
    return DataLoader(Samples(), batch_size=7, shuffle=True)


# ---- a training


class Net(nn.Module):
    """Dropout draws at each forward, BatchNorm keeps buffers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype))


def ours(model, **settings):
    return fastloop.AdamW(model.parameters(), **{"lr": 0.02} | settings)


def torchs(name, model, **settings):
    return getattr(torch.optim, name)(model.parameters(), **{"lr": 0.02} | settings)


def groups(model):
    """Two parameter groups of different rates, and one without momentum."""
    first, last = model.layers[0], model.layers[4]
    return torch.optim.SGD(
        [{"params": first.parameters(), "lr": 0.1}, {"params": last.parameters(), "momentum": 0.0}],
        lr=0.02, momentum=0.9,
    )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a script would build: functions, since each run builds its own.

    `stride`: of every so many saves one is resumed from, where a run takes long.
    """

    data: Callable[..., Any] = loader
    optimizer: Callable[..., Any] = ours
    schedule: Callable[..., Any] | None = None
    loop: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=lambda: {"epochs": EPOCHS})
    validate: bool = True
    stride: int = 1


class Snapshots:
    """Copies the folder at each save, as soon as it is written; a name says which save it was."""

    def __init__(self, folder):
        self.folder = folder
        self.taken = []

    def on_save(self, loop, path):
        loop._saver.store.wait()
        target = self.folder / f"{len(self.taken):03d}"
        target.mkdir(parents=True)
        for file in ("metrics.jsonl", "metrics.csv"):
            shutil.copy(loop.run_dir / file, target / file)
        shutil.copytree(path, target / "checkpoints" / path.name)
        self.taken.append((target, loop.global_step))


def make(recipe, run_dir, *, fresh=True, seen=None, **more):
    """A loop and its loader. One that is to resume is made from other weights and other random states."""
    random_state.seed_everything(1 if fresh else 2)
    model = Net()
    optimizer = recipe.optimizer(model)
    data = recipe.data(fresh)
    schedule = None if recipe.schedule is None else recipe.schedule(optimizer)

    def loss_fn(model, batch):
        index, x, y = batch.values() if isinstance(batch, dict) else batch
        if seen is not None and model.training:
            seen.append((loop.global_step, index.tolist(), x.tolist()))
        return nn.functional.cross_entropy(model(x).float(), y), {"mean": x.mean()}

    settings = {"seed": 11, "log_every": 2, "save_every_epochs": 1, "keep_last": 1000} | recipe.loop | more
    loop = fastloop.Loop(model, optimizer, loss_fn, schedule=schedule, run_dir=run_dir, progress=False, **settings)
    if not fresh:  # nothing that the resumed run needs may come from here
        random.random(), numpy.random.rand(), torch.rand(1)
    return loop, data


def train(recipe, run_dir, *, fit=None, **more):
    """Train to the end. What came out, as things to compare, and the batches that were trained on."""
    seen = []
    loop, data = make(recipe, run_dir, seen=seen, **more)
    begin = loop.global_step
    val = validation(more.get("fresh", True)) if recipe.validate else None
    loop.fit(data, val, **(fit or recipe.fit))
    return outcome(loop), seen, begin


def outcome(loop):
    """All that a resumed run must agree on."""
    states = {
        name: {k: bits(v) if isinstance(v, torch.Tensor) else v for k, v in sorted(loop.optimizer.state[p].items())}
        for name, p in loop.model.named_parameters()
    }
    groups = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in loop.optimizer.param_groups]
    now = random_state.capture()
    rows = [{k: repr(v) for k, v in row.items() if k not in TIMES} for row in read_rows(loop.run_dir / "metrics.jsonl")]
    final = [c for c in scan(loop.run_dir / "checkpoints")[0] if c.name.startswith("final")]
    with open(loop.run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        table = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return {
        "weights": {name: bits(value) for name, value in loop.model.state_dict().items()},
        "optimizer": states,
        "groups": groups,
        "rows": rows,
        "csv": table,
        "history": {k: repr(v) for k, v in loop.history.items()},
        "counters": (loop.global_step, loop.epoch, loop.stop_reason),
        "best": loop._best,
        "schedule": documents.pack(loop._rates.state_dict(), "schedule", {}),
        "final": [(c.name, c.step, c.metrics) for c in final],
        "random": (now["python"], bits(now["torch"]), now["numpy"]["state"]["key"].tolist()),
    }


def differences(got, wanted):
    return [name for name in wanted if got[name] != wanted[name]]


def check_resume_everywhere(recipe, folder):
    """Train once; then go on from each save, as after a kill just before the next one."""
    plain, batches, _ = train(recipe, folder / "plain")
    snapshots = Snapshots(folder / "snapshots")
    saving, _, _ = train(recipe, folder / "saving", save_every_steps=1, callbacks=[snapshots])
    assert not differences(saving, plain), "saving changes the run"
    taken = snapshots.taken
    assert len(taken) >= 4
    for number, (target, step) in enumerate(taken):
        if number % recipe.stride and number + 3 < len(taken):
            continue
        later = taken[number + 1][0] if number + 1 < len(taken) else folder / "saving"
        for file in ("metrics.jsonl", "metrics.csv"):
            shutil.copy(later / file, target / file)
        resumed, seen, begin = train(recipe, target, fresh=False)
        where = f"save {number}, at step {step}"
        assert begin == step
        assert seen == [b for b in batches if b[0] >= step], f"{where}: other batches"
        assert not differences(resumed, plain), where


# ---- the tests

BATCHES = {
    "shuffle": loader,
    "in order": partial(loader, shuffle=False),
    "own generator": shared_generator,
    "replacement": replacement,
    "weighted": weighted,
    "subset": subset,
    "by epoch": by_epoch,
    "iterable": stream,
    "no DataLoader": lambda fresh: Plain(),
    "drop_last": partial(loader, drop_last=True),
    "stateful": stateful,
    "stateful iterable": partial(stateful, data=Stream),
}
WORKERS = {
    "shuffle": partial(loader, num_workers=2),
    "persistent": partial(loader, num_workers=2, persistent_workers=True),
    "replacement": partial(replacement, num_workers=2, prefetch_factor=3),
    "iterable": partial(stream, num_workers=2),
    "stateful": partial(stateful, num_workers=2),
}
OPTIMIZERS = {
    "ours, EMA": partial(ours, ema_decay=0.9, weight_decay=0.1),
    "ours, clipped": partial(ours, max_grad_norm=0.1),
    "our SGD": lambda model: fastloop.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": partial(torchs, "AdamW", fused=True),
    "AdamW amsgrad": partial(torchs, "AdamW", amsgrad=True, foreach=False),
    "SGD": partial(torchs, "SGD", momentum=0.9),
    "Adagrad": partial(torchs, "Adagrad"),
    "NAdam": partial(torchs, "NAdam"),
    "RMSprop": partial(torchs, "RMSprop", centered=True, momentum=0.5),
    "Adafactor": partial(torchs, "Adafactor"),
    "groups": groups,
    "tensor lr": lambda model: ours(model, lr=torch.tensor(0.02)),
}
lr = torch.optim.lr_scheduler


class Doubling:
    """A function of the step that is an object with a state."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 1.0 + self.calls / 10


SCHEDULES = {
    "ours": lambda opt: schedules.warmup_cosine(warmup_steps=3),
    "by name": lambda opt: "one_cycle",
    "function": lambda opt: lambda step: 1 / (1 + step),
    "OneCycleLR": lambda opt: lr.OneCycleLR(opt, 0.1, total_steps=STEPS + 1),
    "LambdaLR": lambda opt: lr.LambdaLR(opt, lambda step: 0.9**step),
    "LambdaLR of an object": lambda opt: lr.LambdaLR(opt, Doubling()),
    "MultiStepLR": lambda opt: lr.MultiStepLR(opt, [3, 5, 8]),
    "CyclicLR": lambda opt: lr.CyclicLR(opt, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "warm restarts": lambda opt: lr.CosineAnnealingWarmRestarts(opt, 3),
    "SequentialLR": lambda opt: lr.SequentialLR(
        opt, [lr.LinearLR(opt, 0.1, total_iters=3), lr.LambdaLR(opt, lambda s: 0.9**s)], milestones=[3]
    ),
    "ChainedScheduler": lambda opt: lr.ChainedScheduler([lr.ConstantLR(opt, 0.1, 4), lr.ExponentialLR(opt, 0.9)]),
    "OneCycleLR with momentum": lambda opt: lr.OneCycleLR(opt, 0.1, total_steps=STEPS + 1, cycle_momentum=True),
    "CyclicLR with momentum": lambda opt: lr.CyclicLR(opt, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda opt: lr.ReduceLROnPlateau(opt, patience=0, threshold=0.5, factor=0.5),
    "plateau": lambda opt: {"name": "plateau", "factor": 0.5, "patience": 0, "threshold": 0.5, "cooldown": 1},
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name, tmp_path):
    check_resume_everywhere(Recipe(BATCHES[name]), tmp_path)


@pytest.mark.parametrize("name", WORKERS)
def test_workers(name, tmp_path):
    check_resume_everywhere(Recipe(WORKERS[name], stride=6), tmp_path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, tmp_path):
    recipe = Recipe(optimizer=OPTIMIZERS[name], stride=4)
    if name == "ours, EMA":
        recipe = replace(recipe, fit=recipe.fit | {"evaluate_ema": True})
    check_resume_everywhere(recipe, tmp_path)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, tmp_path):
    every = {"evaluate_every_steps": 3} if "lateau" in name else {}
    recipe = Recipe(schedule=SCHEDULES[name], fit={"epochs": EPOCHS, **every}, stride=3)
    check_resume_everywhere(recipe, tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-pure"])
def test_precisions(precision, tmp_path):
    check_resume_everywhere(Recipe(loop={"precision": precision, "max_grad_norm": 0.5}, stride=3), tmp_path)


def test_fp16_with_torchs_optimizer(tmp_path):
    recipe = Recipe(optimizer=partial(torchs, "AdamW"), loop={"precision": "fp16", "accumulation_steps": 2}, stride=3)
    check_resume_everywhere(recipe, tmp_path)


@pytest.mark.parametrize("steps", [2, 4])
def test_accumulation(steps, tmp_path):
    """Windows that do and do not fill the epoch."""
    check_resume_everywhere(Recipe(loop={"accumulation_steps": steps}), tmp_path)


@pytest.mark.parametrize("every", [1, 4])
def test_validation_in_between(every, tmp_path):
    """Evaluation draws too (its loader shuffles), and each improvement is saved."""
    check_resume_everywhere(Recipe(fit={"epochs": EPOCHS, "evaluate_every_steps": every}), tmp_path)


def test_end_in_the_middle_of_an_epoch(tmp_path):
    check_resume_everywhere(Recipe(fit={"max_steps": 8, "evaluate_every_steps": 3}), tmp_path)


def test_early_stopping(tmp_path):
    """A learning rate at which nothing gets better; killed after the last evaluation, the run must not train on."""
    recipe = Recipe(
        optimizer=partial(ours, lr=0.5), loop={"patience": 2},
        fit={"epochs": 20, "evaluate_every_steps": 2},
    )  # fmt: skip
    check_resume_everywhere(recipe, tmp_path)


def test_early_stopping_at_an_epochs_end(tmp_path):
    check_resume_everywhere(Recipe(optimizer=partial(ours, lr=0.5), loop={"patience": 1}, fit={"epochs": 9}), tmp_path)


def test_validation_with_a_generator_of_its_own(tmp_path, monkeypatch):
    """Its state is the run's too."""
    monkeypatch.setattr(
        sys.modules[__name__],
        "validation",
        lambda fresh: DataLoader(Samples(), batch_size=7, shuffle=True, generator=generator(fresh)),
    )
    check_resume_everywhere(Recipe(fit={"epochs": EPOCHS, "evaluate_every_steps": 2}, stride=3), tmp_path)


@pytest.mark.parametrize("data", [loader, partial(loader, num_workers=2), shared_generator, stateful, stream])
def test_in_parts(data, tmp_path):
    """max_steps, and then more: in one process, and in one for each part; with nothing to do in between."""
    recipe = Recipe(data)
    whole, batches, _ = train(recipe, tmp_path / "whole", fit={"max_steps": 9})
    loop, feed = make(recipe, tmp_path / "parts", seen=(seen := []))
    for steps in (2, 2, 6, 8, 9):
        loop.fit(feed, validation(True), max_steps=steps)
    assert seen == batches
    assert outcome(loop)["weights"] == whole["weights"]
    seen = []
    for steps in (2, 2, 6, 8, 9):
        resumed, more, _ = train(recipe, tmp_path / "runs", fit={"max_steps": steps}, fresh=steps == 2)
        seen += more
    assert seen == batches
    for name in ("weights", "optimizer", "groups", "counters"):
        assert resumed[name] == whole[name], name


def test_a_resumed_run_with_nothing_to_do_and_then_more(tmp_path):
    """In one process: where it stood in its epoch is not forgotten."""
    recipe = Recipe()
    whole, batches, _ = train(recipe, tmp_path / "whole", fit={"max_steps": 5})
    train(recipe, tmp_path / "parts", fit={"max_steps": 3})
    loop, feed = make(recipe, tmp_path / "parts", fresh=False, seen=(seen := []))
    loop.fit(feed, validation(False), max_steps=3)
    loop.fit(feed, validation(False), max_steps=5)
    assert seen == [b for b in batches if b[0] >= 3]
    assert outcome(loop)["weights"] == whole["weights"]


def test_a_finished_run_started_again_keeps_its_metrics(tmp_path):
    """The final checkpoint is what `best` may go by."""
    for _ in range(2):
        train(Recipe(), tmp_path)
        final = [c for c in scan(tmp_path / "checkpoints")[0] if c.name.startswith("final")]
        assert [c.step for c in final] == [STEPS]
        assert set(final[0].metrics) == {"val/loss", "val/mean"}


def test_evaluation_does_not_change_the_training(tmp_path):
    plain, batches, _ = train(Recipe(validate=False), tmp_path / "plain")
    often, seen, _ = train(Recipe(fit={"epochs": EPOCHS, "evaluate_every_steps": 1}), tmp_path / "often")
    assert seen == batches
    assert not [name for name in ("weights", "optimizer", "random") if often[name] != plain[name]]


# ---- errors in the middle


class Failing(Samples):
    """Raises at one fetch, once a process has seen so many."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __getitem__(self, index):
        self.count += 1
        if self.count == self.at:
            raise OSError("the disk of the data is gone")
        return super().__getitem__(index)


def failing(at):
    return Recipe(lambda fresh: DataLoader(Failing(at), batch_size=BATCH, shuffle=True), validate=False)


@pytest.mark.parametrize("at", [7, SAMPLES + 1, SAMPLES + 6])
@pytest.mark.parametrize("every", [1, None])
def test_a_loader_that_raises(at, every, tmp_path):
    """The run is saved, and no sample is lost or seen twice; with a checkpoint of that very step it goes on exactly."""
    recipe = Recipe(validate=False)
    whole, batches, _ = train(recipe, tmp_path / "whole")
    with pytest.raises(OSError, match="is gone"):
        train(failing(at), tmp_path / "run", save_every_steps=every)
    resumed, seen, begin = train(recipe, tmp_path / "run", fresh=False)
    assert begin == at // SAMPLES * 6 + (at % SAMPLES) // BATCH
    wanted = [b for b in batches if b[0] >= begin]
    rest = slice(0, 6 - begin % 6)  # of its epoch
    assert [b[:2] for b in seen[rest]] == [b[:2] for b in wanted[rest]]
    if every == 1 or at == SAMPLES + 1:
        assert seen == wanted
        assert not differences(resumed, whole)


@pytest.mark.parametrize("data", [loader, stateful])
def test_an_error_inside_a_window_repeats_the_window(data, tmp_path):
    """Of a window of two micro-batches the first is done: it comes again."""
    recipe = Recipe(data, loop={"accumulation_steps": 2}, validate=False)
    _, batches, _ = train(recipe, tmp_path / "whole")
    loop, feed = make(recipe, tmp_path / "run", seen=(seen := []))
    inner, loop.loss_fn = loop.loss_fn, lambda model, batch: 1 / 0 if len(seen) == 5 else inner(model, batch)
    with pytest.raises(ZeroDivisionError):
        loop.fit(feed, epochs=EPOCHS)
    assert seen == batches[:5]
    loop.loss_fn = inner
    _, again, begin = train(recipe, tmp_path / "run", fresh=False)
    assert begin == 2
    assert [b[:2] for b in again[:2]] == [b[:2] for b in batches[4:6]]
    del seen[4:]
    loop.fit(feed, epochs=EPOCHS)  # and in the process that went on
    assert [b[:2] for b in seen[:6]] == [b[:2] for b in batches[:6]]


def test_an_error_during_replay_spoils_no_checkpoint(tmp_path):
    """The loader raises while a resumed run fetches again what it has had."""
    recipe = Recipe(validate=False)
    whole, batches, _ = train(recipe, tmp_path / "whole", fit={"max_steps": 9})
    train(recipe, tmp_path / "run", fit={"max_steps": 4})
    with pytest.raises(OSError, match="is gone"):
        train(failing(5), tmp_path / "run", fresh=False)
    resumed, seen, begin = train(recipe, tmp_path / "run", fresh=False, fit={"max_steps": 9})
    assert begin == 4
    assert seen == [b for b in batches if b[0] >= 4]
    assert resumed["weights"] == whole["weights"]


def test_fewer_data_than_the_checkpoint_has_seen(tmp_path):
    train(Recipe(validate=False), tmp_path, fit={"max_steps": 4})
    short = Recipe(lambda fresh: DataLoader(torch.utils.data.Subset(Samples(), range(8)), BATCH), validate=False)
    with pytest.raises(RuntimeError, match=r"after 4 batches of epoch 0, and the loader has only 2"):
        train(short, tmp_path, fresh=False)


def test_an_error_inside_the_optimizers_step_is_not_saved(tmp_path):
    """Half the weights have moved: the step would be made twice."""
    loop, data = make(Recipe(validate=False), tmp_path)
    step = loop.optimizer.step

    def interrupted(*args, **kwargs):
        step(*args, **kwargs)
        if loop.global_step == 3:
            raise KeyboardInterrupt

    loop.optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        loop.fit(data, epochs=1)
    assert list(scan(tmp_path / "checkpoints")[0]) == []
