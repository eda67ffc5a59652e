# SPDX-License-Identifier: Apache-2.0
"""Schedules: torch's own where torch has one, else their formula's fixed points; names, JSON and errors."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fastloop import schedules
from fastloop.schedules import Schedule

EPS = torch.finfo(torch.float64).eps
Torch = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def lrs_of_torch(make: Torch, windows: int) -> list[float]:
    """The learning rate that each window is trained with, for a base lr of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(windows):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def warmed(warmup: int, then: Torch) -> Torch:
    """torch's SequentialLR of the warm-up from 1 / (warmup + 1) to 1, and `then`."""

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        first = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
        return lr_scheduler.SequentialLR(optimizer, [first, then(optimizer)], [warmup])

    return make


# Each of torch's steps makes the next learning rate from the last with at most 8 roundings, of values in [0, 1] here:
# after n of them the two differ by no more than 8 * (n + 1) eps. The ratio of two cosines, whose numerator cancels,
# multiplies a learning rate that is as small, so that absolutely it is such a rounding too.
RECURSIVE = {
    "constant": (schedules.constant(0.3), lambda o: lr_scheduler.ConstantLR(o, 0.3, 10_000), 50),
    "linear": (schedules.linear(90, 1.0, 0.1), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 90), 120),
    "linear, up": (schedules.linear(7, 0.25, 1.0), lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 7), 20),
    "polynomial": (schedules.polynomial(80, 2.0), lambda o: lr_scheduler.PolynomialLR(o, 80, 2.0), 100),
    "cosine": (schedules.cosine(100, 0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, 100, 0.1), 100),
    "step": (schedules.step(7, 0.5), lambda o: lr_scheduler.StepLR(o, 7, 0.5), 50),
    "multi_step": (
        schedules.multi_step([30, 5, 12, 12], 0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [5, 12, 12, 30], 0.3),
        40,
    ),
    "exponential": (schedules.exponential(0.97), lambda o: lr_scheduler.ExponentialLR(o, 0.97), 200),
    "warmup_cosine": (
        schedules.warmup_cosine(10, 100, 0.1),
        warmed(10, lambda o: lr_scheduler.CosineAnnealingLR(o, 90, 0.1)),
        100,
    ),
    "warmup_linear": (
        schedules.warmup_linear(10, 100, 0.2),
        warmed(10, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 90)),
        120,
    ),
    "warmup_constant": (
        schedules.warmup_constant(10),
        warmed(10, lambda o: lr_scheduler.ConstantLR(o, 1.0, 1)),
        30,
    ),
}


@pytest.mark.parametrize("case", RECURSIVE)
def test_equals_torch_within_its_roundings(case: str) -> None:
    ours, theirs, windows = RECURSIVE[case]
    for n, lr in enumerate(lrs_of_torch(theirs, windows)):
        assert abs(ours(n) - lr) <= 8 * (n + 1) * EPS, (n, ours(n), lr)


# torch computes these from the step's number alone: 8 roundings of values in [0, 1], whatever the step.
@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("fraction", [0.3, 0.25, 0.5])
def test_one_cycle_equals_torch(anneal: str, three_phase: bool, fraction: float) -> None:
    ours = schedules.one_cycle(100, fraction, 1 / 10, 1 / 1e4, anneal, three_phase)
    theirs = lrs_of_torch(
        lambda o: lr_scheduler.OneCycleLR(
            o,
            1.0,
            100,
            pct_start=fraction,
            div_factor=10,
            final_div_factor=1e3,
            anneal_strategy=anneal[:3] if anneal == "cosine" else anneal,
            three_phase=three_phase,
            cycle_momentum=False,
        ),
        100,
    )
    assert [ours(n) for n in range(100)] == pytest.approx(theirs, rel=0, abs=8 * EPS)
    assert ours(1000) == ours(99) == 1 / 1e4


def test_one_cycle_has_torchs_defaults() -> None:
    theirs = lrs_of_torch(lambda o: lr_scheduler.OneCycleLR(o, 1.0, 50, cycle_momentum=False), 50)
    ours = schedules.one_cycle(50)
    assert [ours(n) for n in range(50)] == pytest.approx(theirs, rel=0, abs=8 * EPS)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_cosine_restarts_equals_torch(multiplier: int) -> None:
    ours = schedules.cosine_restarts(10, multiplier, 0.1)
    theirs = lrs_of_torch(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, multiplier, 0.1), 200)
    assert [ours(n) for n in range(200)] == pytest.approx(theirs, rel=0, abs=8 * EPS)


@pytest.mark.parametrize(("up", "down"), [(10, None), (4, 12), (9, 3)])
@pytest.mark.parametrize(("mode", "gamma"), [("triangular", 1.0), ("triangular2", 1.0), ("exp_range", 0.99)])
def test_cyclic_equals_torch(up: int, down: int | None, mode: str, gamma: float) -> None:
    ours = schedules.cyclic(up, down, 0.2, mode, gamma)
    theirs = lrs_of_torch(
        lambda o: lr_scheduler.CyclicLR(o, 0.2, 1.0, up, down, mode, gamma, cycle_momentum=False), 120
    )
    period = up + (down or up)
    # torch's place in the cycle is 1 + n / period - cycle: a rounding of up to 1 + n / period, divided by the part of
    # the cycle that goes up or down.
    steepest = period / min(up, period - up)
    for n, lr in enumerate(theirs):
        assert abs(ours(n) - lr) <= (4 * (2 + n / period) * steepest + 8) * EPS, n


# ---- fixed points of those that torch does not have -------------------------------------------------


def test_warmup_never_wastes_a_window() -> None:
    for made in (schedules.warmup_cosine(4, 20), schedules.warmup_constant(4), schedules.inverse_sqrt(4)):
        assert [made(n) for n in range(5)] == [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0]
        assert schedules.from_name({**_described(made), "warmup_steps": 0})(0) == 1.0


def test_inverse_sqrt_halves_in_four_times_the_windows() -> None:
    made = schedules.inverse_sqrt(9)
    assert [made(9), made(39), made(159)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay(decay: str, middle: float) -> None:
    made = schedules.warmup_stable_decay(10, 20, 100, 0.1, decay)
    assert [made(n) for n in range(10)] == [(n + 1) / 11 for n in range(10)]
    assert {made(n) for n in range(10, 81)} == {1.0}
    assert made(90) == pytest.approx(0.1 + 0.9 * middle, rel=0, abs=8 * EPS)
    falling = [made(n) for n in range(80, 101)]
    assert falling == sorted(falling, reverse=True)
    assert made(99) > made(100) == made(10_000) == 0.1


def test_a_part_of_the_training() -> None:
    assert [schedules.warmup_cosine(0.1, 200)(n) for n in range(200)] == [
        schedules.warmup_cosine(20, 200)(n) for n in range(200)
    ]
    by_parts, by_windows = schedules.warmup_stable_decay(0.05, 0.2, 200), schedules.warmup_stable_decay(10, 40, 200)
    assert [by_parts(n) for n in range(200)] == [by_windows(n) for n in range(200)]


def test_the_end_stays() -> None:
    for made in (
        schedules.warmup_cosine(3, 10, 0.1),
        schedules.warmup_linear(3, 10, 0.1),
        schedules.cosine(10, 0.1),
        schedules.polynomial(10, 3.0, 0.1),
        schedules.linear(10, 1.0, 0.1),
    ):
        assert made(9) > made(10) == made(11) == made(10**9) == 0.1, made


def test_all_of_it_is_warmup() -> None:
    made = schedules.warmup_cosine(10, 10)
    assert [made(n) for n in range(10)] == [(n + 1) / 11 for n in range(10)]
    assert made(10) == 0.0


# ---- properties --------------------------------------------------------------------------------------

EXAMPLES: dict[str, Schedule] = {
    "constant": schedules.constant(0.5),
    "linear": schedules.linear(100),
    "polynomial": schedules.polynomial(100, 1.5),
    "cosine": schedules.cosine(100),
    "cosine_restarts": schedules.cosine_restarts(10, 2),
    "step": schedules.step(10),
    "multi_step": schedules.multi_step([30, 10]),
    "exponential": schedules.exponential(0.99),
    "warmup_constant": schedules.warmup_constant(10),
    "warmup_linear": schedules.warmup_linear(10, 100),
    "warmup_cosine": schedules.warmup_cosine(0.1, 100),
    "warmup_stable_decay": schedules.warmup_stable_decay(10, 0.2, 100),
    "inverse_sqrt": schedules.inverse_sqrt(10),
    "one_cycle": schedules.one_cycle(100),
    "cyclic": schedules.cyclic(10, 5, mode="exp_range", gamma=0.99),
}


def _described(made: Schedule) -> dict[str, object]:
    return {"name": made.name, **made.arguments}


def test_every_schedule_has_an_example() -> None:
    exported = {name for name in schedules.__all__ if name not in ("Schedule", "from_name", "names")}
    assert exported == {*EXAMPLES, "plateau"} == set(schedules.names())


def test_plateau_is_described_as_the_others_and_has_no_factor_of_a_step() -> None:
    made = schedules.plateau(0.5, patience=3, min_factor=0.01)
    again = schedules.from_name(json.loads(json.dumps(_described(made))))
    assert again == made == pickle.loads(pickle.dumps(made)) == made.resolved(100)
    assert made.follows_metric
    assert not made.needs_total_steps
    assert not any(each.follows_metric for each in EXAMPLES.values())
    assert schedules.from_name("plateau") == schedules.plateau(0.1, 10, 1e-4, 0, 0.0)
    with pytest.raises(ValueError, match=r"\[plateau\] the factor follows the monitored metric.*Loop"):
        made(0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_json_pickle_and_copy_give_the_same(name: str) -> None:
    made = EXAMPLES[name]
    described = json.loads(json.dumps(_described(made), allow_nan=False))
    for again in (schedules.from_name(described), pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert again == made
        assert hash(again) == hash(made)
        assert [again(n) for n in range(200)] == [made(n) for n in range(200)]
    assert str(made).startswith(f"{name}(")
    assert inspect.signature(getattr(schedules, name)).return_annotation == "Schedule"
    assert getattr(schedules, name).__doc__


@pytest.mark.parametrize("name", EXAMPLES)
@given(window=st.integers(0, 10**12))
def test_a_factor_lies_in_0_to_1(name: str, window: int) -> None:
    assert 0.0 <= EXAMPLES[name](window) <= 1.0


@pytest.mark.parametrize("name", [name for name, made in EXAMPLES.items() if "total_steps" in made.arguments])
def test_the_length_is_that_of_the_training(name: str) -> None:
    whole = EXAMPLES[name]
    described = _described(whole) | {"total_steps": None}
    open_ended = schedules.from_name(described)
    assert open_ended.needs_total_steps
    assert not whole.needs_total_steps
    assert open_ended != whole
    assert open_ended.resolved(100) == whole == schedules.from_name(described, total_steps=100)
    assert whole.resolved(7) is whole  # its own length counts
    for unknown in (lambda: open_ended(0), lambda: open_ended.resolved(None)):
        with pytest.raises(ValueError, match=rf"\[{name}\] total_steps must be known.*max_steps"):
            unknown()
    assert pickle.loads(pickle.dumps(open_ended)) == open_ended


def test_a_name_alone() -> None:
    assert schedules.from_name("cosine", 50) == schedules.cosine(50)
    assert schedules.from_name("constant") == schedules.constant()
    assert schedules.from_name(schedules.cosine(), 50) == schedules.cosine(50)
    assert schedules.from_name({"name": "multi_step", "milestones": [1, 2]}) == schedules.multi_step((1, 2))


def test_growth_beyond_floats_is_infinite() -> None:
    assert schedules.exponential(2.0)(10_000) == math.inf


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: schedules.from_name("cosin"), r"\[schedules\] name .* 'cosin'; did you mean 'cosine'"),
        (lambda: schedules.from_name("zzz"), r"pass one of constant, cosine"),
        (lambda: schedules.from_name({"warmup_steps": 3}), r"got None"),
        (lambda: schedules.from_name({"name": "warmup_cosine"}), r"\[warmup_cosine\] missing .*'warmup_steps'"),
        (lambda: schedules.from_name({"name": "cosine", "min": 1}), r"unexpected .*'min'.* it takes total_steps"),
        (lambda: schedules.warmup_cosine(10, 5), r"warmup_steps must be at most total_steps = 5, got 10"),
        (lambda: schedules.warmup_cosine(10).resolved(5), r"warmup_steps must be at most total_steps = 5, got 10"),
        (lambda: schedules.warmup_cosine(-1), r"warmup_steps must not be negative, got -1"),
        (lambda: schedules.warmup_cosine(1.0), r"must lie in \[0, 1\), got 1.0"),
        (lambda: schedules.warmup_cosine(1, min_factor=1.5), r"min_factor must lie in \[0, 1\], got 1.5"),
        (lambda: schedules.cosine(0), r"total_steps must be at least 1, got 0"),
        (lambda: schedules.warmup_stable_decay(60, 50, 100), r"at most total_steps = 100, got 110"),
        (lambda: schedules.warmup_stable_decay(1, 1, decay="log"), r"decay must be one of .*'1-sqrt', got 'log'"),
        (lambda: schedules.one_cycle(1), r"total_steps must be at least 2, got 1"),
        (lambda: schedules.one_cycle(10, 0.6, three_phase=True), r"\[0, 0.5\], got 0.6"),
        (lambda: schedules.one_cycle(10, anneal="cos"), r"anneal must be one of 'cosine', 'linear', got 'cos'"),
        (lambda: schedules.cyclic(0), r"up_steps must be at least 1"),
        (lambda: schedules.cyclic(5, 0), r"down_steps must be at least 1"),
        (lambda: schedules.cyclic(5, gamma=0.9), r"gamma is of 'exp_range' alone"),
        (lambda: schedules.cyclic(5, mode="square"), r"mode must be one of"),
        (lambda: schedules.step(0), r"step_size must be at least 1"),
        (lambda: schedules.step(5, 0.0), r"gamma must be above 0"),
        (lambda: schedules.exponential(math.nan), r"gamma must be finite"),
        (lambda: schedules.constant(-1.0), r"factor must not be negative"),
        (lambda: schedules.linear(5, -1.0), r"start_factor must not be negative"),
        (lambda: schedules.cosine_restarts(0), r"first_steps must be at least 1"),
        (lambda: schedules.cosine_restarts(5, 0), r"multiplier must be at least 1"),
        (lambda: schedules.polynomial(5, 0.0), r"power must be above 0"),
        (lambda: schedules.multi_step([3, -1]), r"milestones must not be negative"),
        (lambda: schedules.plateau(1.0), r"\[plateau\] factor must lie in \(0, 1\), got 1.0"),
        (lambda: schedules.plateau(threshold=-0.1), r"threshold must not be negative"),
        (lambda: schedules.plateau(patience=-1), r"patience must not be negative"),
        (lambda: schedules.plateau(min_factor=2.0), r"min_factor must lie in \[0, 1\]"),
    ],
)
def test_wrong_values(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wrong()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: schedules.warmup_cosine("10"),
        lambda: schedules.warmup_cosine(True),
        lambda: schedules.cosine(10.5),
        lambda: schedules.step(2.0),
        lambda: schedules.constant(None),
        lambda: schedules.one_cycle(10, three_phase=1),
        lambda: schedules.multi_step([1.5]),
        lambda: schedules.multi_step(30),
        lambda: schedules.multi_step("30"),
        lambda: schedules.plateau(patience=1.5),
    ],
)
def test_wrong_types(wrong: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"^\[\w+\] \w+ must be .*; pass "):
        wrong()


def test_needs_no_torch() -> None:
    """Loaded by itself, as from a tool that only draws schedules: torch takes a second to import."""
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('schedules', {schedules.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['schedules'] = module; "
        "spec.loader.exec_module(module); assert module.cosine(4)(0) == 1.0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
