# SPDX-License-Identifier: Apache-2.0
"""What is the user's and has a state, callbacks and the parts of the training loader, comes back with a checkpoint.

And what follows from samplers that decide an epoch's order: they are divided among ranks, and the schedule's length is
that of their epochs.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from typing import Any

import pytest
import ranks
import torch
from safetensors import safe_open
from support import bits
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

import fastloop
from fastloop.loop import own_state, saver, shares
from fastloop.loop.data import END, Feed, Position
from fastloop.loop.seeded import SeededDataset
from fastloop.loop.strategy import Ranks, unwrapped

SAMPLES, BATCH = 20, 3


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloop.loop.fitting.plot_curves", lambda run_dir: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Data(Dataset):
    """Each sample is its number and a value."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return index, torch.tensor([math.sin(index), 1.0])


class Counting(Data):
    """Its samples depend on how many were read before."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return index, torch.tensor([math.sin(index), 0.01 * self.reads])

    def state_dict(self) -> dict[str, Any]:
        return {"reads": self.reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reads = state["reads"]


class Growing(Data):
    """A longer one in each epoch."""

    def __init__(self) -> None:
        super().__init__(self.length(0))

    def length(self, epoch: int) -> int:
        return 10 + 4 * epoch

    def set_epoch(self, epoch: int) -> None:
        self.count = self.length(epoch)


class Ranked(Sampler):
    """Samples by a score that is its state, a longer part of them in each epoch."""

    def __init__(self) -> None:
        self.scores, self.epoch = torch.arange(SAMPLES, dtype=torch.float64), 0

    def length(self, epoch: int) -> int:
        return min(SAMPLES, 8 + 5 * epoch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def indices(self, epoch: int) -> torch.Tensor:
        return torch.argsort(self.scores, stable=True)[: self.length(epoch)]

    def __iter__(self) -> Any:
        yield from self.indices(self.epoch).tolist()  # lazily: with the first batch

    def __len__(self) -> int:
        return self.length(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = state["scores"]


class Rescores:
    """After each window the scores are others, by a state of its own."""

    def __init__(self, sampler: Ranked) -> None:
        self.sampler, self.calls, self.sum = sampler, 0, torch.zeros(2)

    def on_window(self, loop: Any, record: Any) -> None:
        self.calls += 1
        self.sum += self.calls
        self.sampler.scores = (self.sampler.scores * 7 + self.calls) % 11

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "sum": self.sum, "pair": (1, None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.sum = state["calls"], state["sum"]
        assert state["pair"] == (1, None)


class Plain:
    def on_log(self, loop: Any, row: Any) -> None:
        """Listens, and has no state."""


def looped(run_dir: Any, callbacks: Any = (), seen: Any = None, **settings: Any) -> fastloop.Loop:
    torch.manual_seed(1)
    model = nn.Linear(2, 1)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        index, x = batch
        if seen is not None:
            seen.append((loop.global_step, index.tolist(), x.tolist()))
        return model(x).square().mean()

    settings = {"seed": 2, "save_every_epochs": None, "progress": False, "log_every": 100} | settings
    loop = fastloop.Loop(
        model, fastloop.AdamW(model.parameters(), lr=0.01), loss_fn, run_dir=run_dir, callbacks=callbacks, **settings
    )
    return loop


def trained(run_dir: Any, make: Any, max_steps: int | None, epochs: int = 3) -> Any:
    """A run from new objects; its batches, its weights and the states of all objects."""
    loader, callbacks = make()
    seen: list[Any] = []
    loop = looped(run_dir, callbacks, seen)
    loop.fit(loader, epochs=epochs, max_steps=max_steps)
    states = own_state.capture({**own_state.of_loader(loader), **own_state.of_callbacks(callbacks)})
    return loop, seen, (bits(loop.model.weight), states)


def ranked(**settings: Any) -> Any:
    sampler = Ranked()
    return DataLoader(Data(), BATCH, sampler=sampler, **settings), [Rescores(sampler)]


def counting() -> Any:
    return DataLoader(Counting(), BATCH, shuffle=True), []


def both() -> Any:
    sampler = Ranked()
    return DataLoader(Counting(), BATCH, sampler=sampler), [Plain(), Rescores(sampler)]


def in_a_batch_sampler() -> Any:
    sampler = Ranked()
    return DataLoader(Data(), batch_sampler=BatchSampler(sampler, BATCH, True)), [Rescores(sampler)]


def seeded() -> Any:
    sampler = Ranked()
    return DataLoader(SeededDataset(Data()), BATCH, sampler=sampler), [Rescores(sampler)]


def in_torchdata() -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    sampler = Ranked()
    return module.StatefulDataLoader(Data(), BATCH, sampler=sampler), [Rescores(sampler)]


def torchdatas_sampler() -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader.sampler", reason="needs torchdata")
    return DataLoader(Data(), BATCH, sampler=module.StatefulDistributedSampler(Data(), 1, 0)), []


MAKERS = {
    "sampler": ranked,
    "workers": lambda: ranked(num_workers=1),
    "data set": counting,
    "both": both,
    "batch sampler": in_a_batch_sampler,
    "seeded": seeded,
    "torchdata's loader": in_torchdata,
    "torchdata's sampler": torchdatas_sampler,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumed_anywhere_is_the_run_that_was_not_stopped(name: str, tmp_path: Any) -> None:
    """In the first, the second and the last epoch, at their starts and in the middle."""
    make = MAKERS[name]
    loop, wanted, end = trained(None, make, None)
    steps = loop.global_step
    for stop in (2, 3, 5, 10) if name != "workers" else (5,):
        trained(tmp_path / f"{stop}", make, stop)
        resumed, seen, got = trained(tmp_path / f"{stop}", make, None)
        assert resumed.global_step == steps
        assert seen == [batch for batch in wanted if batch[0] >= stop], stop
        assert own_state.same(got[1], end[1]), stop
        assert got[0] == end[0]


def test_a_state_dict_has_them_too() -> None:
    _, wanted, end = trained(None, both, None)
    first, _, _ = trained(None, both, 5)
    loader, callbacks = both()
    seen: list[Any] = []
    second = looped(None, callbacks, seen)
    second.load_state_dict(first.state_dict())
    assert callbacks[1].calls == 5
    second.fit(loader, epochs=3)
    assert seen == [batch for batch in wanted if batch[0] >= 5]
    assert bits(second.model.weight) == end[0]


def test_an_error_inside_a_window_repeats_it_with_the_states_that_it_had(tmp_path: Any) -> None:
    loader, _ = counting()
    seen: list[Any] = []
    loop = looped(tmp_path / "run", (), seen)
    plain = loop.loss_fn

    def failing(model: nn.Module, batch: Any) -> Any:
        loss = plain(model, batch)
        if loop.global_step == 9:
            raise RuntimeError("no")
        return loss

    loop.loss_fn = failing
    with pytest.raises(RuntimeError, match="no"):
        loop.fit(loader, epochs=2)
    _, again, _ = trained(tmp_path / "run", counting, None, epochs=2)
    assert again[0] == seen[-1]


def test_tensors_are_in_the_safetensors_files(tmp_path: Any) -> None:
    trained(tmp_path, both, 5)
    folder = tmp_path / "checkpoints" / "final-000000005"
    document = json.loads((folder / "loop.json").read_text())
    assert document["callbacks"]["Rescores"]["state"]["calls"] == 5
    names = []
    for file in ("rank-00000.safetensors", "ranks/rank-00000.safetensors"):
        with safe_open(folder / file, "pt") as opened:
            names += [name for name in opened.keys() if ".state." in name and "numpy" not in name]  # noqa: SIM118
    assert names == [
        "loop.callbacks.Rescores.state.sum", "data.own.sampler.state.scores", "data.own_start.sampler.state.scores"
    ]  # fmt: skip


def test_states_that_have_not_changed_are_written_once(tmp_path: Any) -> None:
    def make() -> Any:
        return DataLoader(Data(), BATCH, sampler=Ranked()), []

    trained(tmp_path, make, 2)
    position = json.loads((tmp_path / "checkpoints" / "final-000000002" / "ranks" / "rank-00000.json").read_text())[
        "data"
    ]
    assert position["own_start"]["sampler"]["state"]
    assert position["own"] == {"sampler": None}


def test_callbacks_are_found_by_class_and_order(tmp_path: Any) -> None:
    first, second = Rescores(Ranked()), Rescores(Ranked())
    second.calls = 100
    looped(tmp_path, [first, second]).fit(DataLoader(Data(), BATCH), max_steps=3)
    assert (first.calls, second.calls) == (3, 103)
    again = [Plain(), Rescores(Ranked()), Plain(), Rescores(Ranked()), Rescores(Ranked())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looped(tmp_path, (callback for callback in again))
    assert [c.calls for c in again if isinstance(c, Rescores)] == [3, 103, 0]


def test_a_state_that_nobody_has_any_more_warns(tmp_path: Any) -> None:
    trained(tmp_path, both, 2)
    with pytest.warns(UserWarning, match=r"a state of the callback Rescores, which the run does not have any more"):
        loop = looped(tmp_path)
    with (
        pytest.warns(UserWarning, match=r"training data's sampler \(Ranked\)"),
        pytest.warns(UserWarning, match=r"training data's dataset \(Counting\)"),
    ):
        loop.fit(DataLoader(Data(), BATCH), max_steps=3)


def test_checkpoints_of_before_load(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have neither the callbacks' states nor the loader's."""
    whole = fastloop.Loop._progress_state
    with monkeypatch.context() as patch:
        patch.setattr(
            fastloop.Loop, "_progress_state", lambda self: {k: v for k, v in whole(self).items() if k != "callbacks"}
        )
        given = saver._given
        patch.setattr(saver, "_given", lambda p: {k: v for k, v in given(p).items() if not k.startswith("own")})
        trained(tmp_path, both, 5)
    loop, _, _ = trained(tmp_path, both, 6)
    assert loop.global_step == 6


@pytest.mark.parametrize(
    ("state_dict", "text"),
    [
        (
            lambda: {"code": print},
            "Rescores.* what they cannot hold: TypeError: .* state.code is builtins.builtin",
        ),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda given: given, "TypeError: .* missing 1 required positional argument"),
    ],
    ids=["code", "fails", "arguments"],
)
def test_what_a_checkpoint_cannot_hold_is_left_out_with_a_warning(tmp_path: Any, state_dict: Any, text: str) -> None:
    """A callback or a data set may have the two methods for purposes of its own; its training goes on."""
    callback, data = Rescores(Ranked()), Counting()
    callback.state_dict = state_dict  # type: ignore[method-assign]
    loop = looped(tmp_path, [callback], save_every_steps=1)
    with pytest.warns(UserWarning, match=text) as caught:
        loop.fit(DataLoader(data, BATCH), max_steps=4)
    assert len(caught) == 1
    assert callback.calls == 4
    fresh, again = Counting(), Rescores(Ranked())
    resumed = looped(tmp_path, [again])
    resumed.fit(DataLoader(fresh, BATCH), max_steps=5)
    assert (fresh.reads, again.calls) == (5 * BATCH, 1)


def test_states_are_copies_and_need_no_gradient() -> None:
    """deepcopy refuses a tensor that is a result of a computation with gradients."""
    callback = Rescores(Ranked())
    callback.sum = torch.ones(2, requires_grad=True) * 3
    taken = own_state.capture({"Rescores": callback})
    with torch.no_grad():
        callback.sum += 1
    assert taken["Rescores"]["state"]["sum"].tolist() == [3.0, 3.0]
    assert not taken["Rescores"]["state"]["sum"].requires_grad
    own_state.give({"Rescores": callback}, taken)
    callback.sum += 1
    assert taken["Rescores"]["state"]["sum"].tolist() == [3.0, 3.0]


def test_tensors_come_back_on_the_device_of_the_new_object() -> None:
    class Placed:
        def __init__(self, device: str) -> None:
            self.state: dict[str, Any] = {"a": [torch.ones(2, device=device)], "more": ()}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    kept = {"x": {"class": Placed.__qualname__, "state": {"a": [torch.zeros(2)], "more": (torch.zeros(1),)}}}
    holder = Placed("cpu")
    holder.state["a"][0] = torch.ones(3, device="meta")  # the only other device that is everywhere
    own_state.give({"x": holder}, kept)
    assert holder.state["a"][0].device.type == "meta"
    assert holder.state["more"][0].device.type == "cpu"


def test_names_of_tensors_do_not_collide(tmp_path: Any) -> None:
    callback = Rescores(Ranked())
    state = {"a.b": torch.tensor([1.0]), "a": {"b": torch.tensor([2.0])}, "pair": (1, None)}
    callback.state_dict = lambda: state  # type: ignore[method-assign]
    looped(tmp_path, [callback]).fit(DataLoader(Data(), BATCH), max_steps=1)
    again, got = Rescores(Ranked()), {}
    again.load_state_dict = got.update  # type: ignore[method-assign]
    looped(tmp_path, [again])
    assert own_state.same(got, state)


# ---- states that are a place in the epoch


class Place(IterableDataset):
    """After torchdata's protocol: its state is where it is, and its next iteration begins where it was loaded."""

    def __init__(self) -> None:
        self.start = self.at = 0

    def __iter__(self) -> Any:
        self.at, self.start = self.start, 0
        return self._rest()

    def _rest(self) -> Any:
        while self.at < SAMPLES:
            self.at += 1
            yield self.at - 1, torch.tensor([math.sin(self.at), 1.0])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]


@pytest.mark.parametrize("torchdatas", [False, True])
@pytest.mark.parametrize("kind", [Place, Counting])
def test_a_state_that_is_a_place_is_not_mistaken_for_one(tmp_path: Any, torchdatas: bool, kind: Any) -> None:
    cls: Any = DataLoader
    if torchdatas:
        module = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
        cls = module.StatefulDataLoader

    def make() -> Any:
        return cls(kind(), BATCH), []

    _, wanted, end = trained(None, make, None)
    for stop in (4, 7, 9):
        trained(tmp_path / f"{stop}", make, stop)
        _, seen, got = trained(tmp_path / f"{stop}", make, None)
        assert seen == [batch for batch in wanted if batch[0] >= stop], stop
        assert got[0] == end[0]


def test_a_subclass_of_torchdatas_samplers_is_one() -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader.sampler", reason="needs torchdata")

    class Mine(module.StatefulDistributedSampler):
        pass

    assert not own_state.has_state(Mine(Data(), 1, 0))
    assert not own_state.has_state(Counting)  # a class


def test_the_data_set_inside_of_a_seeded_one_is_found(tmp_path: Any) -> None:
    def make() -> Any:
        return DataLoader(SeededDataset(Counting()), BATCH), []

    _, wanted, _ = trained(None, make, None)
    trained(tmp_path, make, 5)
    _, seen, _ = trained(tmp_path, make, None)
    assert seen == wanted[5:]


# ---- several calls


def test_a_resumed_program_of_two_fits_goes_on_in_the_second(tmp_path: Any) -> None:
    """The first loader's sampler has as many scores as it has, and does not get those of the second."""

    class Short(Ranked):
        def __init__(self) -> None:
            super().__init__()
            self.scores = torch.arange(8, dtype=torch.float64)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            assert len(state["scores"]) == 8
            super().load_state_dict(state)

    Short.__qualname__ = Ranked.__qualname__

    def program(max_steps: int | None, run_dir: Any) -> Any:
        first, second, seen = Short(), Ranked(), []
        second.scores = -second.scores
        loop = looped(run_dir, [Rescores(second)], seen)
        loop.fit(DataLoader(Data(8), BATCH, sampler=first), epochs=1)
        loop.fit(DataLoader(Data(), BATCH, sampler=second), epochs=3, max_steps=max_steps)
        return seen, second.scores.tolist(), bits(loop.model.weight)

    wanted, scores, weight = program(None, None)
    for stop in (4, 8, 10):
        program(stop, tmp_path / f"{stop}")
        seen, again, got = program(None, tmp_path / f"{stop}")
        assert seen == [batch for batch in wanted if batch[0] >= stop], stop
        assert (again, got) == (scores, weight)


@pytest.mark.parametrize("at", [0, 4, 6])
def test_an_error_inside_a_window_keeps_what_callbacks_have_made_of_the_sampler(tmp_path: Any, at: int) -> None:
    """In the first window of all, in the middle of the second epoch, and in the first window of the third."""

    def run(run_dir: Any, fails: bool) -> Any:
        loader, callbacks = ranked()
        seen: list[Any] = []
        loop = looped(run_dir, callbacks, seen)
        plain = loop.loss_fn

        def failing(model: nn.Module, batch: Any) -> Any:
            loss = plain(model, batch)
            if fails and loop.global_step == at:
                raise RuntimeError("no")
            return loss

        loop.loss_fn = failing
        if fails:
            with pytest.raises(RuntimeError, match="no"):
                loop.fit(loader, epochs=3)
            fails = False
            if run_dir is not None:
                return None
            seen.pop()
        loop.fit(loader, epochs=3)
        return seen, loader.sampler.scores.tolist()

    wanted = run(None, False)
    assert run(None, True) == wanted  # in the same process
    run(tmp_path, True)
    seen, scores = run(tmp_path, False)
    assert seen == [batch for batch in wanted[0] if batch[0] >= at]
    assert scores == wanted[1]


def test_a_data_set_begins_its_first_window_anew_after_an_error() -> None:
    data, seen, failed = Counting(), [], []
    loop = looped(None, (), seen)
    plain = loop.loss_fn

    def failing(model: nn.Module, batch: Any) -> Any:
        loss = plain(model, batch)
        if not failed:
            failed.append(True)
            raise RuntimeError("no")
        return loss

    loop.loss_fn = failing
    with pytest.raises(RuntimeError, match="no"):
        loop.fit(DataLoader(data, BATCH), epochs=1)
    loader = loop._feed._given
    loop.fit(loader, epochs=1)
    assert seen[1] == seen[0]


def test_what_the_user_changes_between_two_runs_stays() -> None:
    loader, _ = ranked()
    seen: list[Any] = []
    loop = looped(None, (), seen)
    loop.fit(loader, epochs=1)
    loader.sampler.scores = -loader.sampler.scores
    loop.fit(loader, epochs=2)
    assert seen[-1][1] == [7]  # the 13th of the highest
    loader.sampler.scores = -loader.sampler.scores
    loop.fit(loader, max_steps=loop.global_step + 1)
    assert seen[-1][1] == [0, 1, 2]
    loader.sampler.scores = -loader.sampler.scores
    loop.fit(loader, max_steps=loop.global_step + 1)
    assert seen[-1][1] == [3, 4, 5]  # the epoch goes on in its order
    loop.fit(loader, epochs=4)
    assert seen[-1][1] == [1, 0]
    assert loader.sampler.scores[3] == -3


def test_a_saved_loop_has_what_the_user_changed(tmp_path: Any) -> None:
    loader, _ = ranked()
    loop = looped(tmp_path)
    loop.fit(loader, epochs=1)
    loader.sampler.scores = -loader.sampler.scores
    loop.save(tmp_path / "mine")
    fresh, _ = ranked()
    other = looped(None, resume=False)
    other.load(tmp_path / "mine")
    other.fit(fresh, max_steps=other.global_step + 1)
    assert fresh.sampler.scores[3] == -3


@pytest.mark.parametrize("max_steps", [4, 5])
def test_callbacks_find_the_states_at_the_start(tmp_path: Any, max_steps: int) -> None:
    """Also of a run that is over."""
    trained(tmp_path, ranked, 4)
    loader, callbacks = ranked()
    found = []

    class Looks:
        def on_fit_start(self, loop: Any) -> None:
            found.append(loader.sampler.scores.clone())

    looped(tmp_path, [*callbacks, Looks()]).fit(loader, max_steps=max_steps)
    assert not torch.equal(found[0], Ranked().scores)


def test_states_compare_by_value() -> None:
    state = {"a": [1, (2.0, None)], "t": torch.tensor([1.0]), "n": torch.tensor([1]).numpy()}
    assert own_state.same(state, {"n": torch.tensor([1]).numpy(), "t": torch.tensor([1.0]), "a": [1, (2.0, None)]})
    for key, other in (
        ("a", [1, [2.0, None]]),
        ("t", torch.tensor([1.0]).double()),
        ("n", torch.tensor([1])),
        ("a", 1),
    ):
        assert not own_state.same(state, {**state, key: other})


# ---- how long a run is


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Data(), BATCH, sampler=Ranked()),
        lambda: DataLoader(Data(), BATCH, sampler=Ranked(), drop_last=True),
        lambda: DataLoader(Growing(), BATCH, shuffle=True),
        lambda: DataLoader(SeededDataset(Growing()), BATCH),
        lambda: DataLoader(Data(), BATCH, shuffle=True),
        lambda: [next(iter(DataLoader(Data(), BATCH)))] * 3,
    ],
    ids=["sampler", "drop_last", "data set", "seeded", "shuffle", "list"],
)  # fmt: skip
def test_the_schedule_ends_with_the_training(make: Any, accumulation: int) -> None:
    """Its last window has the rate of the last of all."""
    loop = looped(None, schedule="linear", accumulation_steps=accumulation)
    loop.fit(make(), epochs=4)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_the_count_of_windows_stops_where_there_are_enough() -> None:
    feed = Feed(DataLoader(Data(), BATCH, sampler=Ranked()), Ranks(torch.device("cpu")))
    assert feed.windows_of(10**12, 2, enough=10) >= 10


def test_the_count_of_windows_asks_for_so_many_epochs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MOST_EPOCHS", 5)
    feed = Feed(DataLoader(Data(), BATCH, sampler=Ranked()), Ranks(torch.device("cpu")))
    assert feed.windows_of(10**12, 1) == 3 + 5 + 6 + 7 + (10**12 - 4) * 7
    assert feed.windows_of(0, 1) == 0


def test_a_length_or_indices_of_another_meaning_is_none() -> None:
    class Meters(Data):
        def set_epoch(self, epoch: int) -> None:
            """Has nothing to do with its length."""

        def length(self) -> float:
            return 1.5

    class Lists(Ranked):
        def indices(self) -> Any:  # type: ignore[override]
            raise AssertionError

    assert not shares.tells_order(Lists())
    assert not shares.tells_length(Meters())
    looped(None).fit(DataLoader(SeededDataset(Meters()), BATCH), epochs=1)


def test_whose_length_is_not_known() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([1])

    feed = Feed(DataLoader(Stream()), Ranks(torch.device("cpu")))
    assert feed.windows_of(3, 1) is None


# ---- several ranks


def rank_of(rank: int, size: int) -> Ranks:
    one = Ranks(torch.device("cpu"))
    one.rank, one.size = rank, size
    return one


def read(feed: Feed) -> list[int]:
    found: list[int] = []
    while (batch := feed.next()) is not END:
        found += batch[0].tolist()
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_divide_what_a_sampler_says(size: int) -> None:
    """All have equally many, and what is there twice are the first ones of the epoch."""
    for epoch in (0, 1, 2):
        got = []
        for rank in range(size):
            feed = Feed(DataLoader(Data(), BATCH, sampler=Ranked()), rank_of(rank, size))
            feed.begin(Position(epoch))
            assert feed.length() == math.ceil(math.ceil(Ranked().length(epoch) / size) / BATCH)
            got.append(read(feed))
        assert len({len(part) for part in got}) == 1
        order = [part[i] for i in range(len(got[0])) for part in got]
        whole = list(range(Ranked().length(epoch)))
        assert order == (whole + whole)[: len(order)]
        assert len(order) - len(whole) < size


def test_a_sampler_that_says_another_length_is_named() -> None:
    class Wrong(Ranked):
        def indices(self, epoch: int) -> Any:
            return super().indices(epoch)[:4]

    feed = Feed(DataLoader(Data(), BATCH, sampler=Wrong()), rank_of(0, 2))
    feed.begin(Position())
    with pytest.raises(ValueError, match=r"Wrong.indices\(0\) must be as many as length\(0\) says, 8, got 4"):
        feed.next()


def test_a_sampler_that_divides_is_left_alone() -> None:
    class Divides(torch.utils.data.DistributedSampler):
        def indices(self, epoch: int) -> Any:
            raise AssertionError

    given = DataLoader(Data(), BATCH, sampler=Divides(Data(), 2, 1))
    assert Feed(given, rank_of(1, 2)).loader is given
    assert not shares.tells_order(torch.utils.data.SubsetRandomSampler([1, 2]))


def test_without_batches_of_indices_it_is_refused() -> None:
    with pytest.raises(ValueError, match="each of the 2 ranks all of the data"):
        Feed(DataLoader(Data(), batch_size=None, sampler=Ranked()), rank_of(0, 2))


def train_on_ranks(rank: int, run_dir: Any, max_steps: int | None, **more: Any) -> Any:
    """What this rank has seen, (epoch, samples), and the state of everything at the end."""
    fastloop.loop.fitting.plot_curves = lambda folder: None
    sampler = Ranked()
    callbacks = [Rescores(sampler)]
    loader = DataLoader(Data(), BATCH, sampler=sampler)
    seen: list[Any] = []
    loop = looped(run_dir, callbacks, strategy="ddp", **more)
    plain = loop.loss_fn

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        if loop._window is not None and not loop._window._padding:
            seen.append((loop.epoch, batch[0].tolist()))
        return plain(model, batch)

    loop.loss_fn = loss_fn
    loop.fit(loader, epochs=3, max_steps=max_steps)
    lr = loop.optimizer.param_groups[0]["lr"]
    return seen, loop.global_step, sampler.scores.tolist(), callbacks[0].calls, lr, bits(unwrapped(loop.model).weight)


def samples(results: Any, epoch: int) -> list[int]:
    return sorted(i for seen, *_ in results for e, batch in seen if e == epoch for i in batch)


def scheduled(rank: int, folder: Any, resume: Any) -> Any:
    more = {"schedule": "linear", "save_every_steps": 1, "keep_last": 100, "resume": resume}
    return train_on_ranks(rank, folder, None, **more)


def test_two_ranks_train_and_go_on(tmp_path: Any) -> None:
    """In the middle of the second epoch, whose order the scores of now would not give."""
    whole = ranks.run(scheduled, 2, tmp_path, tmp_path / "whole", "auto")
    assert whole[0][1:] == whole[1][1:]
    assert whole[0][1] == 2 + 3 + 3  # 8, 13 and 18 samples, of which a rank has 4, 7 and 9
    assert whole[0][4] == pytest.approx(0.0, abs=1e-12)
    third = tmp_path / "whole" / "checkpoints" / "step-000000003"
    again = ranks.run(scheduled, 2, tmp_path, tmp_path / "run", str(third))
    for got, wanted in zip(again, whole, strict=True):
        assert got[0] == wanted[0][3:]
        assert got[1:] == wanted[1:]


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path: Any) -> None:
    """One window into the second epoch: each of its samples once, by the scores that it was begun with."""
    first = ranks.run(train_on_ranks, 2, tmp_path, tmp_path / "run", 3)
    (second,) = ranks.run(train_on_ranks, 1, tmp_path, tmp_path / "run", None)
    straight = ranks.run(train_on_ranks, 2, tmp_path, None, None)
    got = samples(first, 1) + samples([second], 1)
    assert len(got) == 13
    assert set(got) == set(samples(straight, 1))
    assert second[3] == second[1]  # the callback counts on


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("which", ["sampler", "data set"])
def test_what_is_left_for_another_number_of_ranks(which: str, before: int, after: int) -> None:
    def made() -> Any:
        return DataLoader(Data(), BATCH, sampler=Ranked()) if which == "sampler" else DataLoader(Growing(), BATCH)

    got: list[int] = []
    position = None
    for rank in range(before):
        given = made()
        if which == "sampler":
            given.sampler.scores = -given.sampler.scores  # of the epoch's start
        feed = Feed(given, rank_of(rank, before), trains=True)
        feed.begin(Position(2))
        got += feed.next()[0].tolist()
        if which == "sampler":
            given.sampler.scores = torch.zeros(SAMPLES)  # since then
        position = position or feed.position()
    assert position is not None
    for rank in range(after):
        given = made()
        feed = Feed(given, rank_of(rank, after), trains=True)
        feed.resume(position)
        feed.begin(position.for_ranks(after))
        got += read(feed)
        assert which == "data set" or not given.sampler.scores.any()
    assert sorted(got) == (list(range(2, 20)) if which == "sampler" else list(range(18)))
