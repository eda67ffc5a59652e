# SPDX-License-Identifier: Apache-2.0
"""Ranges of a search: what they allow, and how they are written."""

from __future__ import annotations

from typing import Any

import pytest

from fastloop.recipes.search import DEFAULT_SPACE, PRIORITIES, Choice, Float, Int
from fastloop.recipes.search.space import decoded, distributions, encoded, grid, parsed, to_json


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Float(1.0, 1.0), "low < high"),
        (lambda: Float(0.0, 1.0, log=True), "low above 0"),
        (lambda: Float(float("nan"), 1.0), "needs numbers"),
        (lambda: Float("1", 2.0), "needs numbers"),  # type: ignore[arg-type]
        (lambda: Float(0.1, 1.0, log=1), "log must be"),  # type: ignore[arg-type]
        (lambda: Int(1, 2.5), "needs numbers"),  # type: ignore[arg-type]
        (lambda: Int(0, 8, log=True), "low above 0"),
        (lambda: Choice([]), "at least one"),
        (lambda: Choice([1, 1]), "that differ"),
        (lambda: Choice("adam"), "a list of values"),
        (lambda: Choice({"sgd", "adam"}), "a list of values"),  # in another order in each process
        (lambda: Choice([float("nan")]), "as JSON"),
        (lambda: Choice([object()]), "as JSON"),
    ],
)
def test_a_range_that_cannot_be_is_refused(make: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make()


def test_the_default_ranges_and_their_order() -> None:
    assert list(DEFAULT_SPACE)[:2] == list(PRIORITIES[0]) == ["arguments.lr", "loader.batch_size"]
    order = [key for keys in PRIORITIES for key in keys]
    assert [key for key in order if key in DEFAULT_SPACE] == list(DEFAULT_SPACE)
    assert DEFAULT_SPACE["arguments.lr"] == Float(1e-5, 1e-1, log=True)
    assert DEFAULT_SPACE["loader.batch_size"] == Choice([16, 32, 64, 128, 256, 512])
    assert DEFAULT_SPACE["arguments.dropout"] == Float(0.0, 0.5)
    assert DEFAULT_SPACE["arguments.layers"] == Int(2, 10)


def test_a_space_is_read_from_tables() -> None:
    space = parsed(
        {
            "arguments": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "layers": {"low": 1, "high": 4}},
            "loop": {"precision": ["fp32", "bf16"]},
        }
    )
    assert space == {
        "arguments.lr": Float(1e-4, 1e-1, log=True),
        "arguments.layers": Int(1, 4),
        "loop.precision": Choice(["fp32", "bf16"]),
    }


@pytest.mark.parametrize(
    "tables",
    [{}, {"argument": {"lr": [1]}}, {"arguments": 1}, {"arguments": {"lr": 0.1}}, {"arguments": {"lr": {"low": 1}}}],
)
def test_other_tables_are_refused(tables: Any) -> None:
    with pytest.raises(ValueError, match=r"\[search\]"):
        parsed(tables)


def test_each_value_comes_back_from_optuna_as_it_was() -> None:
    pytest.importorskip("optuna")
    values = [1, 1.0, True, None, "1", {"name": "cosine"}, [1, 2]]
    space = {"loop.schedule": Choice(values), "arguments.lr": Float(0.0, 1.0)}
    for value in values:
        back = decoded(space, encoded({"arguments.lr": 0.5, "loop.schedule": value}))
        assert list(back) == ["loop.schedule", "arguments.lr"]
        assert back["loop.schedule"] == value
        assert type(back["loop.schedule"]) is type(value)
    kinds = distributions({**space, "arguments.layers": Int(1, 8, log=True)})
    assert (kinds["arguments.layers"].low, kinds["arguments.layers"].log) == (1, True)


def test_a_grid_is_every_combination() -> None:
    every = grid({"arguments.a": Choice(["x", "y"]), "arguments.b": Int(1, 3)})
    assert [tuple(each.values()) for each in every] == [(a, b) for a in "xy" for b in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"got Float.* for arguments.lr; write e.g. Choice\(\[0.001, 0.01, 0.1\]\)"):
        grid({"arguments.lr": Float(1e-3, 1e-1, log=True)})


def test_a_space_as_json() -> None:
    assert to_json({"arguments.lr": Float(0.1, 1.0), "loop.seed": Choice([1, 2])}) == {
        "arguments.lr": {"low": 0.1, "high": 1.0, "log": False, "type": "Float"},
        "loop.seed": [1, 2],
    }
