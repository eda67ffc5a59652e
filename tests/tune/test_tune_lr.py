# SPDX-License-Identifier: Apache-2.0
"""The learning-rate range test: what it suggests for curves that are known, and that it leaves no trace."""

from __future__ import annotations

import math
import random
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastloop
from fastloop.loop.restore import restored
from fastloop.tune.lr import curve, lr
from fastloop.tune.lr_range import Average, LRRange, lr_range_test, summary

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is compared


def bits(value: Any) -> Any:
    """Something that is equal only for what is the same bit for bit."""
    if isinstance(value, Tensor):
        data = value.detach()
        raw = data.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (str(data.dtype), tuple(data.shape), data.stride(), str(data.device), value.requires_grad, raw)
    if isinstance(value, dict):
        return {str(key): bits(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(each) for each in value]
    return repr(value)


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    return {
        "parameters": bits(dict(model.named_parameters())),
        "buffers": bits(dict(model.named_buffers())),
        "modes": [m.training for m in model.modules()],
        "grads": bits([p.grad for p in params]),
        "identity": [id(p) for p in params],
        "groups": bits([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]),
        "state": bits([optimizer.state.get(p, {}) for p in params]),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "random": (bits(torch.get_rng_state()), random.getstate(), repr(state["state"])),
    }


class Net(nn.Module):
    """BatchNorm, dropout, a buffer out of the state_dict, a count of its own, and a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.count, self.seen = 0, {"batches": [1]}

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen["batches"].append(self.count)
        self.calls += 1
        return self.last(self.drop(self.frozen(torch.relu(self.norm(self.first(x))))))


def loader(generator: torch.Generator | None = None) -> torch.utils.data.DataLoader[Any]:
    data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.randint(0, 3, (64,)))
    return torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)


def groups(model: Net) -> list[dict[str, Any]]:
    return [
        {"params": model.first.parameters(), "lr": 1e-3},
        {"params": [*model.norm.parameters(), *model.last.parameters()], "lr": 1e-4, "weight_decay": 0.0},
    ]


OPTIMIZERS = {
    "fastloop.AdamW": lambda m: fastloop.AdamW(groups(m)),
    "fastloop.AdamW, EMA": lambda m: fastloop.AdamW(groups(m), ema_decay=0.9),
    "fastloop.SGD": lambda m: fastloop.SGD(groups(m), momentum=0.9),
    "fastloop.Adam, tensor lr": lambda m: fastloop.Adam(m.last.parameters(), lr=torch.tensor(1e-3)),
    "torch.AdamW": lambda m: torch.optim.AdamW(groups(m), amsgrad=True),
    "torch.SGD": lambda m: torch.optim.SGD(groups(m), momentum=0.9, nesterov=True),
    "torch.RMSprop": lambda m: torch.optim.RMSprop(groups(m), centered=True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and clipping": {"accumulation_steps": 2, "max_grad_norm": 0.5},
    "bf16": {"precision": "bf16", "max_grad_value": 0.1},
    "layers called twice": {"activation_checkpointing": ["first", "last"]},
}


def train(model: nn.Module, optimizer: Any, steps: int, data: Any) -> list[bytes]:
    found = []
    for _, (x, y) in zip(range(steps), data, strict=False):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.detach().numpy().tobytes())
    return found


CASES = [
    (make, options)
    for i, make in enumerate(OPTIMIZERS)
    for options in (list(OPTIONS)[i % 4], list(OPTIONS)[(i + 1) % 4])
]


@pytest.mark.parametrize(("make", "options"), CASES)
def test_nothing_is_left_of_it(make: str, options: str) -> None:
    """Everything is as before, and a training goes on as one that had no test in it."""
    before = 0 if options == "plain" else 3
    torch.manual_seed(before)
    model, data = Net(), loader()
    optimizer = OPTIMIZERS[make](model)
    train(model, optimizer, before, data)
    model.norm.eval()
    kept = model.seen["batches"]
    then = everything(model, optimizer)
    found = lr_range_test(model, optimizer, nn.CrossEntropyLoss(), data, steps=12, options=OPTIONS[options])
    assert len(found.losses) > 2
    assert len(set(found.losses)) > 2
    assert everything(model, optimizer) == then
    assert model.seen["batches"] is kept
    assert len(kept) == before + 1

    torch.manual_seed(before)
    twin, data_of_twin = Net(), loader()
    its = OPTIMIZERS[make](twin)
    train(twin, its, before, data_of_twin)
    twin.norm.eval()
    torch.manual_seed(9)
    goes_on = train(model, optimizer, 4, data)
    torch.manual_seed(9)
    assert train(twin, its, 4, data_of_twin) == goes_on
    assert bits(dict(model.named_parameters())) == bits(dict(twin.named_parameters()))


def test_bf16_weights_come_back_as_fp32_with_their_masters() -> None:
    model, data = Net(), loader()
    optimizer = fastloop.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    then = everything(model, optimizer)
    lr_range_test(model, optimizer, nn.CrossEntropyLoss(), data, steps=12, options={"precision": "bf16-pure"})
    assert everything(model, optimizer) == then
    assert not optimizer.defaults["master_weights"]


def test_a_layout_comes_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))] * 3
    then = everything(model, optimizer)
    lr_range_test(model, optimizer, nn.CrossEntropyLoss(), data, steps=10, options={"channels_last": True})
    assert everything(model, optimizer) == then


def test_gradients_that_are_there_stay_and_none_stays_none() -> None:
    model, data = Net(), loader()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    grad = model.first.weight.grad = torch.full_like(model.first.weight, 3.0)
    then = everything(model, optimizer)
    lr_range_test(model, optimizer, nn.CrossEntropyLoss(), data, steps=10)
    assert model.first.weight.grad is grad
    assert model.last.weight.grad is None
    assert everything(model, optimizer) == then


@pytest.mark.parametrize("error", [ValueError("in the model"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("at", [1, 5])
def test_nothing_is_left_after_an_error(error: BaseException, at: int) -> None:
    generator = torch.Generator().manual_seed(5)
    model, data = Net(), loader(generator)
    optimizer = OPTIMIZERS["fastloop.AdamW, EMA"](model)
    then, drawn = everything(model, optimizer), generator.get_state()
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > at:
            raise error
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(type(error)):
        lr_range_test(model, optimizer, loss_fn, data, steps=12)
    assert calls == at + 1
    assert everything(model, optimizer) == then
    assert torch.equal(generator.get_state(), drawn)


def test_nothing_is_left_after_ctrl_c() -> None:
    """The first is taken at the end of its window; those that come while things are put back wait."""
    model, data = Net(), loader()
    optimizer = OPTIMIZERS["torch.AdamW"](model)
    then, handler = everything(model, optimizer), signal.getsignal(signal.SIGINT)
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            signal.raise_signal(signal.SIGINT)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(KeyboardInterrupt):
        lr_range_test(model, optimizer, loss_fn, data, steps=50)
    assert calls == 4
    assert everything(model, optimizer) == then
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_things_are_put_back_waits_until_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = OPTIMIZERS["torch.AdamW"](model)
    then = everything(model, optimizer)
    storage_copy = torch.UntypedStorage.copy_

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return storage_copy(self, *args, **kwargs)

    def changed() -> None:
        with restored([model], optimizer):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1.0)
            monkeypatch.setattr(torch.UntypedStorage, "copy_", interrupted)

    with pytest.raises(KeyboardInterrupt):
        changed()
    monkeypatch.undo()
    assert everything(model, optimizer) == then


def test_tied_weights_and_expanded_buffers_come_back() -> None:
    model = nn.Linear(4, 4)
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.weight
    model.register_buffer("mask", torch.full((1, 4), -math.inf).expand(3, 4))
    model.kept = torch.zeros(2)  # a tensor that nobody registered
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    then, mask, kept = everything(model, optimizer), model.mask, model.kept
    with restored([model], optimizer):
        with torch.no_grad():
            model.weight.mul_(2.0)
        model.kept.fill_(7.0)
        model.mask = torch.ones(1)
        model.tied.weight = nn.Parameter(torch.ones(4, 4))
    assert everything(model, optimizer) == then
    assert model.mask is mask
    assert model.kept is kept
    assert kept.tolist() == [0.0, 0.0]
    assert model.tied.weight is model.weight


def test_parameters_without_values_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parameters without values; call it once"):
        lr_range_test(model, optimizer, nn.CrossEntropyLoss(), loader())


# ---- curves that are known


@pytest.mark.parametrize("curvature", [1.0, 30.0, 1e4])
def test_a_quadratic_bowl(curvature: float) -> None:
    """a/2 * x^2 under gradient descent diverges above 2/a, and is at its minimum after one step of 1/a."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return 0.5 * curvature * model.weight.square().sum() + 0.01 * curvature

    found = lr_range_test(model, optimizer, loss_fn, [torch.ones(1)], high=1e3)
    assert found.diverged_at is not None
    assert 1 < found.diverged_at * curvature / 2 < 30
    assert found.suggestion is not None
    assert 0.03 < found.suggestion * curvature / 2 < 1
    assert found.learning_rates[0] == 1e-7
    assert len(found.learning_rates) == len(found.losses) == len(found.smoothed)


def test_groups_keep_the_ratio_of_their_rates() -> None:
    model = Net()
    optimizer = torch.optim.SGD(groups(model), lr=1.0)
    seen: list[tuple[float, float]] = []
    found = lr_range_test(
        model, optimizer, nn.CrossEntropyLoss(), loader(), low=1e-4, high=1e-2, steps=11,
        on_step=lambda *_: seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"])),
    )  # fmt: skip
    assert [a for a, _ in seen] == pytest.approx(found.learning_rates, rel=1e-12)
    assert [b / a for a, b in seen] == pytest.approx([0.1] * 11)
    assert found.learning_rates == pytest.approx([1e-4 * 10 ** (i / 5) for i in range(11)])
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-4]


def test_a_first_group_whose_rate_is_0_is_not_divided_by() -> None:
    model = Net()
    optimizer = torch.optim.SGD([{"params": model.first.parameters(), "lr": 0.0}, *groups(model)[1:]], lr=1.0)
    seen: list[list[float]] = []
    lr_range_test(
        model, optimizer, nn.CrossEntropyLoss(), loader(), low=1e-4, high=1e-2, steps=10,
        on_step=lambda *_: seen.append([g["lr"] for g in optimizer.param_groups]),
    )  # fmt: skip
    assert seen[0] == [0.0, 1e-4]


def rates(count: int = 100) -> list[float]:
    return [1e-7 * 10 ** (8 * i / (count - 1)) for i in range(count)]


def test_the_smaller_of_steepest_descent_and_a_tenth_of_the_minimum() -> None:
    """A curve that falls around 1e-3 and is lowest at 1e-1; one that falls sharply right before its lowest."""
    where = [math.log10(rate) for rate in rates()]
    gentle = [2.0 - math.tanh(2 * (x + 3)) + (0 if x < -1 else 2 * (x + 1)) for x in where]
    found = summary(rates(), gentle, None)
    assert found.suggestion == found.steepest
    assert 5e-4 < (found.suggestion or 0) < 2e-3
    late = [2.0 - math.tanh(6 * (x + 1)) + (0 if x < -0.5 else 3 * (x + 0.5)) for x in where]
    found = summary(rates(), late, None)
    assert found.suggestion == found.tenth_of_minimum
    assert 0.01 < (found.suggestion or 0) < 0.06
    assert found.steepest is not None
    assert 0.05 < found.steepest < 0.2


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_suggestion_where_the_loss_never_falls(noise: float, seed: int) -> None:
    draws = np.random.default_rng(seed).normal(size=100)
    found = summary(rates(), [3.0 + noise * float(draw) for draw in draws], None)
    assert found.suggestion is None
    assert found.steepest is None
    assert found.tenth_of_minimum is None
    assert found.note.startswith("no suggestion: the loss never fell")


def ended_at(losses: list[float]) -> int | None:
    average = Average(len(losses))
    return next((i for i, loss in enumerate(losses) if average.diverged(loss)), None)


def test_what_varies_from_batch_to_batch_does_not_end_it() -> None:
    """Mean squares of 16 draws: the first may well be a fourth of the next, or one of them a wild one."""
    draws = (np.random.default_rng(3).normal(size=(100, 16)) ** 2).mean(1).tolist()
    assert ended_at([0.8, 6.1, *(4.3 * draw for draw in draws[2:])]) is None
    assert ended_at([*draws[:50], 40.0, *draws[51:]]) is None
    assert ended_at([*draws[:50], 40.0, 80.0, *draws[52:]]) == 51
    assert ended_at([1.5**i for i in range(100)]) == 9


def test_a_low_first_batch_is_not_the_lowest_of_the_curve() -> None:
    draws = (np.random.default_rng(3).normal(size=(100, 16)) ** 2).mean(1)
    falling = [2.0 - math.tanh(2 * (math.log10(rate) + 3)) + (rate > 0.1) * 3 for rate in rates()]
    losses = [0.3, *(float(draw) * loss for draw, loss in zip(draws[1:], falling[1:], strict=True))]
    found = summary(rates(), losses, None)
    assert found.suggestion is not None
    assert 1e-4 < found.suggestion < 1e-1


def test_no_suggestion_for_a_rising_or_a_short_curve() -> None:
    rising = summary(rates(), [1.0 + 0.01 * i for i in range(100)], None)
    assert rising.suggestion is None
    assert "begin with a lower one" in rising.note
    short = summary(rates(4), [2.0, 1.5, 1.2, 9.0], 1e-2)
    assert short.suggestion is None
    assert "begin with a lower rate" in short.note


def test_a_loss_still_falling_at_the_end_is_said() -> None:
    found = summary(rates(), [4.0 - 0.02 * i for i in range(100)], None)
    assert found.suggestion is not None
    assert "a higher one (high)" in found.note


def test_a_loss_that_is_not_finite_ends_it() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return model(batch).sum() * (math.nan if calls > 20 else 0.0) + 1.0

    found = lr_range_test(model, optimizer, loss_fn, [torch.ones(3, 2)], steps=100)
    assert calls == 21
    assert len(found.losses) == 20
    assert found.diverged_at == pytest.approx(rates()[20])


def test_a_first_loss_that_is_not_finite_is_no_matter_of_the_rate() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = lr_range_test(model, optimizer, lambda m, b: m(b).sum(), [torch.full((3, 2), math.nan)])
    assert found.suggestion is None
    assert "look at the data" in found.note


def test_a_loss_below_0_does_not_count_as_diverged_at_once() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = lr_range_test(
        model, optimizer, lambda m, b: (m.weight - 1).square().sum() - 5.0, [torch.ones(1)], high=100.0, steps=60
    )
    assert len(found.losses) > 30
    assert found.suggestion is not None
    assert found.suggestion < 1.0
    assert found.diverged_at is not None
    assert found.diverged_at > 1.0


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"low": 1.0, "high": 0.1}, "low must be below high"),
        ({"low": 1.0, "high": 1.0}, "low must be below high"),
        ({"low": 0.0}, "low must be a finite learning rate above 0"),
        ({"high": math.inf}, "high must be a finite learning rate"),
        ({"low": "1e-3"}, "low must be a finite learning rate"),
        ({"steps": 9}, "steps must be an integer of at least 10, got 9"),
        ({"steps": 50.0}, "steps must be an integer"),
        ({"options": {"schedule": "cosine"}}, "must not have schedule"),
        ({"options": {"run_dir": "runs", "strategy": "ddp"}}, "must not have run_dir, strategy"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], problem: str) -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"\[tune\]") as caught:
        lr_range_test(model, optimizer, nn.CrossEntropyLoss(), loader(), **arguments)
    assert problem in str(caught.value)


def test_torchs_settings_for_the_process_come_back() -> None:
    model = nn.Linear(6, 3)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    options = {"threads": before[0] + 1, "matmul_precision": "medium", "deterministic": True}
    seen: list[tuple[int, str, bool]] = []

    def on_step(*_: Any) -> None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        seen.append((torch.get_num_threads(), torch.get_float32_matmul_precision(), deterministic))

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    lr_range_test(model, optimizer, nn.CrossEntropyLoss(), loader(), steps=10, options=options, on_step=on_step)
    assert seen[0] == (before[0] + 1, "medium", True)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_curve_that_ends_early_is_smoothed_as_it_was_measured() -> None:
    losses = [1.0 - 0.01 * i for i in range(40)]
    whole = summary(rates()[:40], losses, None, 100)
    assert whole.smoothed == summary(rates(), losses + [0.5] * 60, None).smoothed[:40]


def test_an_empty_loader() -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    then = everything(model, optimizer)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        lr_range_test(model, optimizer, nn.CrossEntropyLoss(), [])
    assert everything(model, optimizer) == then


# ---- the plot


def test_the_plot(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    falling = summary(rates(), [2 - math.tanh(2 * (math.log10(r) + 3)) for r in rates()], 5.0)
    flat = summary(rates(), [1.0] * 100, None)
    for name, found in (("a.png", falling), ("b.svg", flat)):
        found.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 3000
    text = (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert text.lstrip().startswith("<?xml")
    with pytest.raises(ValueError, match=r"must be an image, got .*c\.txt"):
        falling.plot(tmp_path / "c.txt")
    with pytest.raises(ValueError, match="has no losses to draw"):
        LRRange([], [], [], None, None, None, 1e-7, "nothing").plot(tmp_path / "d.png")


# ---- a target


TARGET = """
import torch
import fastloop

def task(lr=1e-3, scale=1.0):
    x = torch.randn(256, 4)
    model = torch.nn.Linear(4, 1)
    return {
        "model": model,
        "optimizer": fastloop.AdamW(model.parameters(), lr=lr),
        "loss_fn": lambda model, batch: scale * (model(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean(),
        "train_loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 16),
    }

def broken():
    raise LookupError("no data")
"""


@pytest.fixture
def project(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "range_target.py").write_text(TARGET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_of_a_target(project: Any) -> None:
    asked = {"options": {"schedule": "cosine", "max_grad_norm": 1.0}, "steps": 60, "timeout": 120.0}
    report = lr("range_target:task", **asked)
    found = curve(report)
    assert found is not None
    assert found.suggestion is not None
    assert 1e-4 < found.suggestion < 1
    assert report.keep
    assert not report.loop
    assert not report.loader
    assert any(f"Learning rate {found.suggestion:.2g}" in each for each in report.findings)
    assert any("schedule was left out" in each for each in report.findings)
    again = lr("range_target:task", **asked)
    assert again.cached
    assert curve(again) == found


def test_of_a_target_that_is_broken(project: Any) -> None:
    with pytest.raises(fastloop.tune.target.TargetError, match="no data") as caught:
        lr("range_target:broken", timeout=120.0)
    assert "LookupError" in caught.value.traceback


def test_a_plot_that_cannot_be_drawn_is_said_before_the_test(project: Any) -> None:
    pytest.importorskip("matplotlib")
    for plot in ("lr.txt", "nowhere/lr.png"):
        with pytest.raises(ValueError, match=r"\[tune\] the plot"):
            lr("range_target:broken", plot=plot)
