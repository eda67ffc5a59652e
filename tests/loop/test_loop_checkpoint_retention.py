# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay: properties of the decision, and of deciding again after every save."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.loop.retention import Policy, log_spaced, ranked


@dataclass(frozen=True)
class Saved:
    name: str
    number: int
    metrics: dict[str, float] = field(default_factory=dict, hash=False)


def steps(values, final=()):
    """Checkpoints 1, 2, ... with these values of "loss", None for no value."""
    kinds = {n: "final" if n in final else "step" for n in range(1, len(values) + 1)}
    return [
        Saved(f"{kinds[n]}-{n:09d}", n, {} if value is None else {"loss": value}) for n, value in enumerate(values, 1)
    ]


def kept(policy, present, just_written=None):
    gone = policy.to_delete(present, just_written)
    assert len(set(gone)) == len(gone)
    assert set(gone) <= {s.name for s in present}
    return {s.number for s in present if s.name not in gone}


losses = st.lists(st.none() | st.floats(width=16), min_size=1, max_size=40)
policies = st.builds(
    Policy,
    keep_last=st.integers(1, 5),
    keep_best=st.integers(0, 3),
    keep_log_spaced=st.booleans(),
    monitors=st.sampled_from([{}, {"loss": "min"}, {"loss": "max"}]),
)


@given(losses, policies, st.sets(st.integers(1, 40)), st.data())
def test_what_must_stay_stays_whatever_the_order(values, policy, final, data):
    present = steps(values, final)
    shuffled = data.draw(st.permutations(present))
    written = data.draw(st.sampled_from(present))
    stay = kept(policy, shuffled, written.name)
    assert stay == kept(policy, present, written.name)
    running = [s.number for s in present if s.name.startswith("step-")]
    assert set(running[-policy.keep_last :]) <= stay
    assert {s.number for s in present if s.name.startswith("final-")} - stay <= set(final) - {max(final, default=0)}
    assert written.number in stay
    sign = {"min": 1, "max": -1}.get(policy.monitors.get("loss", ""), 0)
    measured = sorted((sign * v, n) for n, v in enumerate(values, 1) if v is not None and not math.isnan(v))
    if sign:
        assert {n for _, n in measured[: policy.keep_best]} <= stay
    if not policy.keep_log_spaced:  # and nothing else
        best = policy.keep_best if sign else 0
        assert len(stay) <= policy.keep_last + best + 2


@given(losses, policies)
def test_deciding_twice_deletes_nothing_more(values, policy):
    present = steps(values)
    stay = kept(policy, present)
    assert kept(policy, [s for s in present if s.number in stay]) == stay


@given(st.integers(1, 300), st.integers(1, 4))
def test_ages_stay_spaced_over_saves(saves, keep_last):
    policy = Policy(keep_last=keep_last, keep_best=0, keep_log_spaced=True)
    present = []
    for number in range(1, saves + 1):
        present.append(Saved(f"step-{number:09d}", number))
        gone = policy.to_delete(present, present[-1].name)
        present = [s for s in present if s.name not in gone]
    ages = [saves - s.number for s in present]
    for power in range(saves.bit_length()):
        if 2 ** (power + 1) <= saves:  # this age is over: one of it must be there
            assert any(2**power <= age < 2 ** (power + 1) for age in ages), (power, ages)
    assert len(present) <= keep_last + 2 * saves.bit_length() + 1


@given(st.integers(1, 10_000))
def test_the_next_log_spaced_set_is_the_last_one_and_the_new_number(newest):
    assert log_spaced(newest + 1) <= log_spaced(newest) | {newest + 1}


def test_a_gap_is_filled_by_the_nearest():
    policy = Policy(keep_last=1, keep_best=0, keep_log_spaced=True)
    present = [s for s in steps([None] * 16) if s.number not in (8, 12)]
    assert {7, 9} & kept(policy, present)
    assert {11, 13} & kept(policy, present)


def test_nan_is_never_best_and_of_equals_the_earlier_is():
    present = steps([math.nan, 2.0, 1.0, 1.0, None, math.inf])
    assert [s.number for s in ranked(present, "loss", "min")] == [3, 4, 2, 6]
    assert [s.number for s in ranked(present, "loss", "max")] == [6, 2, 3, 4]


def test_each_metric_has_its_best():
    present = [Saved(f"step-{n:09d}", n, {"loss": n, "accuracy": n}) for n in range(1, 9)]
    policy = Policy(keep_last=1, keep_best=2, monitors={"loss": "min", "accuracy": "min"})
    assert kept(policy, present) == {1, 2, 8}
    policy = Policy(keep_last=1, keep_best=1, monitors={"loss": "min", "accuracy": "max", "absent": "min"})
    assert kept(policy, present) == {1, 8}


def test_only_the_newest_final_stays():
    present = steps([None] * 8, final=(2, 4, 6))
    assert kept(Policy(keep_last=2), present) == {6, 7, 8}


def test_other_names_and_keep_last_none_delete_nothing():
    present = [*steps([None] * 5), Saved("before-the-change", 0), Saved("weights-000000003", 9)]
    assert kept(Policy(keep_last=1), present) == {0, 5, 9}
    assert kept(Policy(keep_last=None), present) == {0, 1, 2, 3, 4, 5, 9}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep_last": 0}, "keep_last must be at least 1"),
        ({"keep_best": -1}, "keep_best must be at least 0"),
        ({"monitors": {"loss": "low"}}, "mode of 'loss'"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, text):
    with pytest.raises(ValueError, match=text):
        Policy(**settings)
