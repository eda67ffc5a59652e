# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules: pure functions of the window's number, that a name and a few numbers describe."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, ParamSpec

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "exponential",
    "from_name",
    "inverse_sqrt",
    "linear",
    "multi_step",
    "names",
    "one_cycle",
    "plateau",
    "polynomial",
    "step",
    "warmup_constant",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]

P = ParamSpec("P")
Factor = Callable[[int], float]  # number of the window, from 0 -> factor of the base learning rate

# Schedules without a length are checked against one that nothing exceeds, so that a wrong argument raises where it is
# written and not where the training begins.
_ANY_LENGTH = 1 << 62


@dataclass(frozen=True)
class Schedule:
    """lr(step) = base lr * schedule(step), step being the number of the window (optimizer step), from 0.

    Made by the functions of this module. Equal and hashed by name and arguments; pickled and copied as these.

    Args:
        name: the name of the function that made it.
        items: its arguments by name, sequences as tuples; `arguments` gives them as JSON.
    """

    name: str
    items: tuple[tuple[str, Any], ...]
    _factor: Factor = field(compare=False, repr=False)

    def __call__(self, step: int) -> float:
        """Factor of the base learning rate that window `step` >= 0 is trained with; past the end that of the end.

        Raises:
            ValueError: the schedule needs a total_steps and has none, see `resolved`; or it follows a metric.
        """
        return self._factor(step)

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument, defaults too, as JSON: `from_name({"name": s.name, **s.arguments}) == s`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.items}

    @property
    def follows_metric(self) -> bool:
        """Whether the monitored metric decides, as for `plateau`: then there is no factor of a step alone."""
        return self.name == "plateau"

    @property
    def needs_total_steps(self) -> bool:
        """Whether the length of the training has to be filled in before the first call."""
        return ("total_steps", None) in self.items

    def resolved(self, total_steps: int | None) -> Schedule:
        """This schedule with `total_steps` filled in; itself where it has its own or needs none.

        Args:
            total_steps: windows of the whole training; None where nobody knows.

        Raises:
            ValueError: it is needed and None, or too short for the warm-up and decay asked for.
        """
        if not self.needs_total_steps:
            return self
        if total_steps is None:
            raise _no_length(self.name)
        return _SCHEDULES[self.name](**{**dict(self.items), "total_steps": total_steps})

    def __reduce__(self) -> tuple[Any, ...]:
        return from_name, ({"name": self.name, **self.arguments},)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


_SCHEDULES: dict[str, Callable[..., Schedule]] = {}


def names() -> list[str]:
    """Names that `from_name` takes, sorted."""
    return sorted(_SCHEDULES)


def from_name(given: str | Mapping[str, Any] | Schedule, total_steps: int | None = None) -> Schedule:
    """The schedule that a name or a mapping describes, as from a TOML or JSON file.

    Args:
        given: a name, for a schedule that has defaults for the rest; or a mapping of "name" and the function's
            arguments; or a Schedule.
        total_steps: filled in where the schedule needs a length and `given` has none.

    Raises:
        ValueError: no such schedule; an argument is missing, unknown or out of range.
        TypeError: an argument is of another type.
    """
    if not isinstance(given, Schedule):
        arguments = {"name": given} if isinstance(given, str) else dict(given)
        given = _made(arguments.pop("name", None), arguments)
    return given if total_steps is None else given.resolved(total_steps)


def _made(name: Any, arguments: dict[str, Any]) -> Schedule:
    if name not in _SCHEDULES:
        close = difflib.get_close_matches(str(name), _SCHEDULES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"pass one of {', '.join(names())}"
        raise ValueError(f"[schedules] name must be that of a schedule, got {name!r}; {hint}")
    try:
        inspect.signature(_SCHEDULES[name]).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(inspect.signature(_SCHEDULES[name]).parameters)
        raise ValueError(f"[{name}] {error}, got {arguments}; it takes {takes}") from None
    return _SCHEDULES[name](**arguments)


# ---- how a schedule is declared --------------------------------------------------------------------


def _schedule(build: Callable[P, Factor]) -> Callable[P, Schedule]:
    """Registers a function from arguments to a factor as one from arguments to a Schedule."""
    signature = inspect.signature(build)
    name = build.__name__

    @wraps(build)
    def make(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {
            key: _checked(name, key, str(signature.parameters[key].annotation), value)
            for key, value in bound.arguments.items()
        }
        items = tuple(given.items())
        if "total_steps" in given and given["total_steps"] is None:
            build(**{**given, "total_steps": _ANY_LENGTH})  # type: ignore[call-arg]

            def unknown(step: int) -> float:
                raise _no_length(name)

            return Schedule(name, items, unknown)
        return Schedule(name, items, build(**given))  # type: ignore[call-arg]

    make.__signature__ = signature.replace(return_annotation="Schedule")  # type: ignore[attr-defined]
    _SCHEDULES[name] = make
    return make


def _checked(where: str, key: str, annotation: str, value: Any) -> Any:
    """The value as int, float or tuple as annotated; raises TypeError or ValueError."""
    if value is None and "None" in annotation:
        return None
    if annotation.startswith("Sequence"):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"[{where}] {key} must be a list of int, got {value!r}; pass e.g. [30, 60]")
        return tuple(_checked(where, key, "int", each) for each in value)
    if annotation.startswith("Literal"):
        return value  # the choices are checked where they are used
    wanted = annotation.removesuffix(" | None")
    if not isinstance(value, bool):
        if wanted == "bool":
            raise TypeError(f"[{where}] {key} must be True or False, got {value!r}; pass one of them")
        if "int" in wanted and hasattr(value, "__index__"):
            number: int | float = operator.index(value)
            _require(number >= 0, where, f"{key} must not be negative", number, "pass 0 or more")
            return number
        if "float" in wanted and isinstance(value, (int, float)):
            _require(math.isfinite(value), where, f"{key} must be finite", value, "pass a number")
            return float(value)
    elif wanted == "bool":
        return value
    raise TypeError(f"[{where}] {key} must be {wanted}, got {value!r} ({type(value).__name__}); pass {wanted}")


def _require(holds: bool, where: str, wanted: str, got: Any, remedy: str) -> None:
    if not holds:
        raise ValueError(f"[{where}] {wanted}, got {got!r}; {remedy}")


def _no_length(name: str) -> ValueError:
    return ValueError(
        f"[{name}] total_steps must be known, got None: the training has no length that could be taken (a loader "
        "without len, and no max_steps); pass total_steps= to the schedule or max_steps= to the loop"
    )


def _length(where: str, total_steps: int | None) -> int:
    assert total_steps is not None  # `_schedule` fills one in
    _require(total_steps >= 1, where, "total_steps must be at least 1", total_steps, "pass the windows of the training")
    return total_steps


def _part(where: str, key: str, steps: int | float, total_steps: int) -> int:
    """A number of windows, or from a float in [0, 1) that part of all of them, rounded."""
    if isinstance(steps, float):
        _require(
            0.0 <= steps < 1.0,
            where,
            f"{key} as a float is a part of total_steps and must lie in [0, 1)",
            steps,
            "pass an int for windows",
        )
        steps = round(steps * total_steps)
    _require(steps <= total_steps, where, f"{key} must be at most total_steps = {total_steps}", steps, "lower it")
    return steps


def _unit(where: str, **factors: float) -> None:
    for key, value in factors.items():
        _require(0.0 <= value <= 1.0, where, f"{key} must lie in [0, 1]", value, "pass a part of the base lr")


def _choice(where: str, key: str, value: str, choices: Sequence[str]) -> None:
    _require(value in choices, where, f"{key} must be one of {', '.join(map(repr, choices))}", value, "pass one")


# ---- decay from the start ----------------------------------------------------------------------------


@_schedule
def constant(factor: float = 1.0) -> Factor:
    """factor, always."""
    _require(factor >= 0.0, "constant", "factor must not be negative", factor, "pass 1.0 for the base lr")
    return lambda step: factor


@_schedule
def linear(total_steps: int | None = None, start_factor: float = 1.0, end_factor: float = 0.0) -> Factor:
    """start + (end - start) * min(step, T) / T, with T = total_steps.

    Window T - 1 is the last of the training, and so above `end_factor` still: a factor of 0 would waste it.

    Source: torch.optim.lr_scheduler.LinearLR.
    """
    total = _length("linear", total_steps)
    for key, value in {"start_factor": start_factor, "end_factor": end_factor}.items():
        _require(value >= 0.0, "linear", f"{key} must not be negative", value, "pass a factor of the base lr")
    slope = (end_factor - start_factor) / total
    return lambda step: start_factor + slope * step if step < total else end_factor


@_schedule
def polynomial(total_steps: int | None = None, power: float = 2.0, min_factor: float = 0.0) -> Factor:
    """min + (1 - min) * (1 - min(step, T) / T)^power, with T = total_steps.

    Source: torch.optim.lr_scheduler.PolynomialLR.
    """
    total = _length("polynomial", total_steps)
    _unit("polynomial", min_factor=min_factor)
    _require(power > 0.0, "polynomial", "power must be above 0", power, "pass e.g. 2.0")
    height = 1.0 - min_factor
    return lambda step: min_factor + height * (1.0 - step / total) ** power if step < total else min_factor


@_schedule
def cosine(total_steps: int | None = None, min_factor: float = 0.0) -> Factor:
    """min + (1 - min) * (1 + cos(pi * min(step, T) / T)) / 2, with T = total_steps.

    Source: Loshchilov and Hutter, "SGDR", 2017; torch.optim.lr_scheduler.CosineAnnealingLR up to T_max = T.
    """
    _unit("cosine", min_factor=min_factor)
    return _half_cosine(0, _length("cosine", total_steps), min_factor)


@_schedule
def cosine_restarts(first_steps: int, multiplier: int = 1, min_factor: float = 0.0) -> Factor:
    """min + (1 - min) * (1 + cos(pi * t / T_i)) / 2, with t the windows since the last restart.

    The cycles are T_i = first_steps * multiplier^i windows long, i = 0, 1, ...

    Source: Loshchilov and Hutter, "SGDR", 2017; torch.optim.lr_scheduler.CosineAnnealingWarmRestarts.
    """
    where = "cosine_restarts"
    _require(first_steps >= 1, where, "first_steps must be at least 1", first_steps, "pass the first cycle's windows")
    _require(multiplier >= 1, where, "multiplier must be at least 1", multiplier, "pass 1 for equal cycles")
    _unit(where, min_factor=min_factor)
    cos, pi, half = math.cos, math.pi, (1.0 - min_factor) / 2

    def equal(step: int) -> float:
        return min_factor + half * (1.0 + cos(pi * (step % first_steps) / first_steps))

    def growing(step: int) -> float:
        length = first_steps
        while step >= length:  # as often as cycles have passed: the logarithm of the step
            step -= length
            length *= multiplier
        return min_factor + half * (1.0 + cos(pi * step / length))

    return equal if multiplier == 1 else growing


@_schedule
def step(step_size: int, gamma: float = 0.1) -> Factor:
    """gamma^floor(step / step_size).

    Source: torch.optim.lr_scheduler.StepLR.
    """
    _require(step_size >= 1, "step", "step_size must be at least 1", step_size, "pass windows from drop to drop")
    _require(gamma > 0.0, "step", "gamma must be above 0", gamma, "pass e.g. 0.1")
    return lambda step: _power(gamma, step // step_size)


@_schedule
def multi_step(milestones: Sequence[int], gamma: float = 0.1) -> Factor:
    """gamma^(number of milestones that are <= step).

    Args:
        milestones: numbers of windows, in any order; the window of that number is the first one with the lower lr.
        gamma: factor of each drop, above 0.

    Source: torch.optim.lr_scheduler.MultiStepLR.
    """
    _require(gamma > 0.0, "multi_step", "gamma must be above 0", gamma, "pass e.g. 0.1")
    ordered = sorted(milestones)
    factors = [_power(gamma, passed) for passed in range(len(ordered) + 1)]
    return lambda step: factors[bisect_right(ordered, step)]


@_schedule
def exponential(gamma: float) -> Factor:
    """gamma^step.

    Source: torch.optim.lr_scheduler.ExponentialLR.
    """
    _require(gamma > 0.0, "exponential", "gamma must be above 0", gamma, "pass e.g. 0.9999")
    return lambda step: _power(gamma, step)


# ---- warm-up first -----------------------------------------------------------------------------------


@_schedule
def warmup_constant(warmup_steps: int) -> Factor:
    """(step + 1) / (W + 1) for step < W = warmup_steps, then 1. No window is wasted on a factor of 0."""
    return _after_warmup(warmup_steps, lambda step: 1.0)


@_schedule
def warmup_linear(warmup_steps: int | float, total_steps: int | None = None, min_factor: float = 0.0) -> Factor:
    """(step + 1) / (W + 1) for step < W, then linear to min at T.

    From W on: 1 - (1 - min) * (min(step, T) - W) / (T - W), with W = warmup_steps and T = total_steps.

    Args:
        warmup_steps: windows; a float in [0, 1) is that part of total_steps.
        total_steps: windows of the training, taken from its length if None.
        min_factor: the factor at T, in [0, 1].
    """
    total = _length("warmup_linear", total_steps)
    warmup = _part("warmup_linear", "warmup_steps", warmup_steps, total)
    _unit("warmup_linear", min_factor=min_factor)
    slope = (1.0 - min_factor) / max(total - warmup, 1)
    return _after_warmup(warmup, lambda step: 1.0 - slope * (step - warmup) if step < total else min_factor)


@_schedule
def warmup_cosine(warmup_steps: int | float, total_steps: int | None = None, min_factor: float = 0.0) -> Factor:
    """(step + 1) / (W + 1) for step < W, then half a cosine to min at T.

    From W = warmup_steps on: min + (1 - min) * (1 + cos(pi * (min(step, T) - W) / (T - W))) / 2, with T = total_steps.

    Args:
        warmup_steps: windows; a float in [0, 1) is that part of total_steps.
        total_steps: windows of the training, taken from its length if None.
        min_factor: the factor at T, in [0, 1]; 0.1 is usual for language models.

    Source: Loshchilov and Hutter, "SGDR", 2017; Goyal et al., "Accurate, Large Minibatch SGD", 2017.
    """
    total = _length("warmup_cosine", total_steps)
    warmup = _part("warmup_cosine", "warmup_steps", warmup_steps, total)
    _unit("warmup_cosine", min_factor=min_factor)
    return _after_warmup(warmup, _half_cosine(warmup, total, min_factor))


@_schedule
def warmup_stable_decay(
    warmup_steps: int | float,
    decay_steps: int | float,
    total_steps: int | None = None,
    min_factor: float = 0.0,
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear",
) -> Factor:
    """(step + 1) / (W + 1) for step < W, 1 until T - D, then down to min at T.

    With x = (min(step, T) - (T - D)) / D, the decay is min + (1 - min) * d(x), where d is 1 - x for "linear",
    (1 + cos(pi * x)) / 2 for "cosine", 1 - sqrt(x) for "1-sqrt".

    Args:
        warmup_steps, decay_steps: W and D, windows; a float in [0, 1) is that part of total_steps. W + D <= T.
        total_steps: T, windows of the training, taken from its length if None.
        min_factor: the factor at T, in [0, 1].
        decay: shape of the decay.

    Source: Hu et al., "MiniCPM", 2024; Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations", 2024 ("1-sqrt").
    """
    where = "warmup_stable_decay"
    total = _length(where, total_steps)
    warmup = _part(where, "warmup_steps", warmup_steps, total)
    length = _part(where, "decay_steps", decay_steps, total)
    _unit(where, min_factor=min_factor)
    _choice(where, "decay", decay, ("linear", "cosine", "1-sqrt"))
    _require(
        warmup + length <= total,
        where,
        f"warmup_steps + decay_steps must be at most total_steps = {total}",
        warmup + length,
        "lower one of them",
    )
    start, height = total - length, 1.0 - min_factor
    if decay == "cosine":
        down = _half_cosine(start, total, min_factor)
    elif decay == "linear":
        down = lambda step: min_factor + height * ((total - step) / length) if step < total else min_factor  # noqa: E731
    else:
        down = lambda step: min_factor + height * (1.0 - math.sqrt((step - start) / length))  # noqa: E731
    return _after_warmup(warmup, lambda step: 1.0 if step < start else down(step) if step < total else min_factor)


@_schedule
def inverse_sqrt(warmup_steps: int) -> Factor:
    """(step + 1) / (W + 1) for step < W = warmup_steps, then sqrt((W + 1) / (step + 1)).

    Source: Vaswani et al., "Attention Is All You Need", 2017, as a factor of the peak.
    """
    peak = warmup_steps + 1
    return _after_warmup(warmup_steps, lambda step: math.sqrt(peak / (step + 1)))


# ---- up and down -------------------------------------------------------------------------------------


@_schedule
def one_cycle(
    total_steps: int | None = None,
    warmup_fraction: float = 0.3,
    start_factor: float = 1 / 25,
    end_factor: float = 1 / 25e4,
    anneal: Literal["cosine", "linear"] = "cosine",
    three_phase: bool = False,
) -> Factor:
    """From start up to 1 within a part of T = total_steps, then down to end at window T - 1.

    Up over windows 0 ... f * T - 1, with f = warmup_fraction. With three_phase down to start again over as many
    windows, and from there to end. From a to b, x being the part of the phase that has passed:
    b + (a - b) * (1 + cos(pi * x)) / 2, or a + (b - a) * x for "linear". The base lr is the peak (torch's max_lr).

    Args:
        total_steps: windows of the training, taken from its length if None; at least 2.
        warmup_fraction: f, in [0, 1], at most 0.5 with three_phase.
        start_factor, end_factor: in [0, 1]; torch's 1 / div_factor and 1 / (div_factor * final_div_factor).
        anneal: shape of the phases.
        three_phase: as in torch.

    Source: Smith and Topin, "Super-Convergence", 2018; torch.optim.lr_scheduler.OneCycleLR.
    """
    where = "one_cycle"
    total = _length(where, total_steps)
    _require(total >= 2, where, "total_steps must be at least 2", total, "train longer")
    _unit(where, start_factor=start_factor, end_factor=end_factor)
    most = 0.5 if three_phase else 1.0
    _require(
        0.0 <= warmup_fraction <= most, where, f"warmup_fraction must lie in [0, {most}]", warmup_fraction, "lower it"
    )
    _choice(where, "anneal", anneal, ("cosine", "linear"))
    up = warmup_fraction * total - 1
    middle = [(up, 2 * warmup_fraction * total - 2, 1.0, start_factor)] if three_phase else []
    begin, low = (middle[0][1], start_factor) if middle else (up, 1.0)
    phases = [(0.0, up, start_factor, 1.0), *middle, (begin, total - 1.0, low, end_factor)]
    between = _cosine_between if anneal == "cosine" else _linear_between

    def factor(step: int) -> float:
        for begin, end, a, b in phases:
            if step <= end:
                return between(a, b, (step - begin) / (end - begin)) if step < end else b
        return end_factor

    return factor


@_schedule
def cyclic(
    up_steps: int,
    down_steps: int | None = None,
    min_factor: float = 0.1,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: float = 1.0,
) -> Factor:
    """Triangles from min up to 1 in `up_steps` windows and down again in `down_steps`, over and over.

    min + (1 - min) * height * scale, height rising from 0 to 1 and falling to 0 within a cycle; scale is 1 for
    "triangular", 2^-(cycles passed) for "triangular2", gamma^step for "exp_range". The base lr is the peak (torch's
    max_lr), min_factor torch's base_lr / max_lr.

    Args:
        up_steps: windows of the rise, at least 1.
        down_steps: windows of the fall, at least 1; as many as up_steps if None.
        min_factor: in [0, 1].
        mode: what becomes of the peaks.
        gamma: of "exp_range", above 0; with another mode it must be 1.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017; torch.optim.lr_scheduler.CyclicLR.
    """
    down = up_steps if down_steps is None else down_steps
    _require(up_steps >= 1, "cyclic", "up_steps must be at least 1", up_steps, "pass windows from low to high")
    _require(down >= 1, "cyclic", "down_steps must be at least 1", down, "pass windows from high to low")
    _unit("cyclic", min_factor=min_factor)
    _choice("cyclic", "mode", mode, ("triangular", "triangular2", "exp_range"))
    _require(gamma > 0.0, "cyclic", "gamma must be above 0", gamma, "pass e.g. 0.9999")
    _require(mode == "exp_range" or gamma == 1.0, "cyclic", "gamma is of 'exp_range' alone", gamma, "leave it out")
    period, top = up_steps + down, 1.0 - min_factor

    def factor(step: int) -> float:
        cycle, at = divmod(step, period)
        height = at / up_steps if at <= up_steps else (period - at) / down
        if mode != "triangular":
            height *= _power(0.5, cycle) if mode == "triangular2" else _power(gamma, step)
        return min_factor + top * height

    return factor


# ---- by the monitored metric -------------------------------------------------------------------------


@_schedule
def plateau(
    factor: float = 0.1, patience: int = 10, threshold: float = 1e-4, cooldown: int = 0, min_factor: float = 0.0
) -> Factor:
    """From f = 1 on f = max(f * factor, min), each time that the monitored metric gets no better for long enough.

    That is after patience + 1 evaluations in a row, each counted unless a cooldown is on, in which no value m was
    better than the best so far, b: m < b - threshold * |b| for mode "min", m > b + threshold * |b| for "max". `Loop`
    steps it after each evaluation, on its first monitored metric and that metric's mode; a value that is not finite is
    not better.

    Args:
        factor: of each drop, in (0, 1).
        patience: evaluations without a better value that are borne.
        threshold: part of the best value by which one has to be better, at least 0.
        cooldown: evaluations after a drop that are not counted.
        min_factor: in [0, 1]; no drop goes below.

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau with threshold_mode="rel", which for a best value below 0 takes
    a worse one for better: its bound is b * (1 - threshold).
    """
    where = "plateau"
    _require(0.0 < factor < 1.0, where, "factor must lie in (0, 1)", factor, "pass e.g. 0.1")
    _require(threshold >= 0.0, where, "threshold must not be negative", threshold, "pass e.g. 1e-4")
    _unit(where, min_factor=min_factor)

    def unknown(step: int) -> float:
        raise ValueError(
            f"[plateau] the factor follows the monitored metric, and there is none for window {step} alone; pass the "
            "schedule to Loop(schedule=...)"
        )

    return unknown


# ---- what they share ---------------------------------------------------------------------------------


def _after_warmup(warmup: int, then: Factor) -> Factor:
    """(step + 1) / (warmup + 1), so that window `warmup` is the first at 1; from there `then`."""
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else then(step)


def _half_cosine(start: int, end: int, low: float) -> Factor:
    """From 1 at `start` to `low` at `end`, and `low` from there."""
    cos, scale, half = math.cos, math.pi / max(end - start, 1), (1.0 - low) / 2
    return lambda step: low + half * (1.0 + cos(scale * (step - start))) if step < end else low


def _cosine_between(a: float, b: float, x: float) -> float:
    return b + (a - b) / 2.0 * (1.0 + math.cos(math.pi * x))


def _linear_between(a: float, b: float, x: float) -> float:
    return a + (b - a) * x


def _power(base: float, exponent: int) -> float:
    """base^exponent, infinite where float's own power raises."""
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf
