# SPDX-License-Identifier: Apache-2.0
"""Dropout rates by depth, and the search for one."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import torch
from torch import nn

from fastloop.recipes.model import dropout_search, progressive_dropout, search_dropout
from fastloop.recipes.model.dropout_search import RateScore

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rates_rise_in_even_steps_and_channels_get_a_fifth() -> None:
    model = nn.Sequential(nn.Dropout2d(), nn.Dropout(), nn.Sequential(nn.AlphaDropout()), nn.Dropout1d(), nn.Dropout())
    assert progressive_dropout(model, 0.1, 0.5) == pytest.approx({"0": 0.02, "1": 0.2, "2.0": 0.3, "3": 0.08, "4": 0.5})
    assert [each.p for each in model.modules() if hasattr(each, "p")] == pytest.approx([0.02, 0.2, 0.3, 0.08, 0.5])
    assert progressive_dropout(nn.Sequential(nn.Dropout())) == {"0": 0.5}


def test_dropout_rates_that_cannot_be() -> None:
    with pytest.raises(TypeError, match=r"\[progressive_dropout\] model must be an nn.Module, got int"):
        progressive_dropout(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must have dropout modules, got none"):
        progressive_dropout(nn.Linear(3, 3))
    for rates in ((-0.1, 0.5), (0.1, 1.0), (True, 0.5), ("0.1", 0.5)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
            progressive_dropout(nn.Sequential(nn.Dropout()), *rates)


# ---- the search


def data(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 20, generator=made)
    noise = torch.rand(samples, generator=made) < 0.3
    return x, torch.where(noise, torch.randint(2, (samples,), generator=made), (x[:, 0] > 0).long())


def build(rate: float) -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(rate), nn.Linear(64, 2))


def test_the_search_finds_a_rate_and_leaves_everything_global_alone() -> None:
    states = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state(), torch.get_num_threads()
    search = lambda: search_dropout(  # noqa: E731
        build,
        data(64, 0),
        data(256, 1),
        loss_fn=nn.CrossEntropyLoss(),
        rates=(0.0, 0.3, 0.97),
        epochs=4,
        lr=1e-2,
        repeats=3,
    )
    found = search()
    assert random.getstate() == states[0]
    assert (numpy.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.get_num_threads() == states[3]
    assert [each.rate for each in found.scores] == [0.0, 0.3, 0.97]
    assert len(found.scores[0].losses) == 3
    assert found.best == min(found.scores, key=lambda each: each.mean).rate
    assert found.scores[0].spread is not None
    assert search().to_json() == found.to_json()
    assert "best" in str(found)
    assert found.to_json()["scores"][0]["rate"] == 0.0


def test_rates_that_change_nothing_give_the_same_loss_and_are_named() -> None:
    """Weights, order and draws are those of the repeat: without a dropout all rates are the same training."""
    plain = lambda rate: nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))  # noqa: E731
    found = search_dropout(plain, data(48, 0), data(48, 1), loss_fn=nn.CrossEntropyLoss(), rates=(0.5, 0.1), epochs=2)
    assert found.scores[0].losses == found.scores[1].losses
    assert found.best == 0.1
    assert found.within_noise == [0.5]
    text = str(found)
    assert "the model has the same dropout modules for the rates 0.5, 0.1" in text
    assert "one training for each rate" in text


def test_a_build_that_ignores_the_rate_is_named_even_if_it_drops_something() -> None:
    fixed = lambda rate: nn.Sequential(nn.Linear(20, 8), nn.Dropout(0.2), nn.Linear(8, 2))  # noqa: E731
    run = lambda build: search_dropout(  # noqa: E731
        build, data(8, 0), data(8, 1), loss_fn=nn.CrossEntropyLoss(), rates=(0.1, 0.3), epochs=1
    )
    assert "the same dropout modules for the rates 0.1, 0.3" in str(run(fixed))
    assert "the same dropout modules" not in str(run(build))


def test_quantiles_of_student() -> None:
    for freedom, wanted in ((1, 12.71), (9, 2.262), (10, 2.228), (15, 2.131), (30, 2.042), (10**6, 1.960)):
        assert dropout_search._quantile(freedom) == pytest.approx(wanted, abs=0.004)


@pytest.mark.parametrize(
    ("losses", "noise"),
    [
        ([1.00, 1.10, 0.90], [0.5]),  # as often better as worse
        ([1.20, 1.21, 1.19], []),  # t = 0.2 / (0.01 / sqrt(3)) = 34.6 > 4.303
        ([1.02, 1.00, 1.00], [0.5]),  # t = 1 < 4.303
    ],
)
def test_what_is_within_the_noise(losses: list[float], noise: list[float]) -> None:
    best = RateScore(0.1, [1.0, 1.0, 1.0], [0.0] * 3)
    if sum(losses) / 3 <= 1.0:
        best = RateScore(0.1, [0.999, 1.0, 1.0], [0.0] * 3)
    found = dropout_search._judged([best, RateScore(0.5, losses, [0.0] * 3)], [])
    assert (found.best, found.within_noise) == (0.1, noise)


def test_trainings_that_diverge() -> None:
    bad = RateScore(0.5, [math.inf, 1.0], [math.nan, 1.0])
    found = dropout_search._judged([bad, RateScore(0.1, [2.0, 2.0], [1.0, 1.0])], [])
    assert found.best == 0.1
    assert found.findings[0].level == "warning"
    assert bad.spread is None
    with pytest.raises(ValueError, match=r"at least one rate must give a finite validation loss"):
        search_dropout(
            build, (torch.full((8, 20), math.nan), torch.zeros(8).long()), data(8, 0),
            loss_fn=lambda model, batch: model(batch[0]).mean() * math.nan, rates=(0.0, 0.5), epochs=1,
        )  # fmt: skip


def test_a_search_that_cannot_be() -> None:
    loss = nn.CrossEntropyLoss()
    for rates in ((0.1,), (0.1, 0.1), (0.1, 1.0)):
        with pytest.raises(ValueError, match=r"rates must be two or more different ones in \[0, 1\)"):
            search_dropout(build, data(8, 0), data(8, 0), loss_fn=loss, rates=rates)
    for rates in (0.1, "ab", ["a", "b"]):
        with pytest.raises(TypeError, match=r"rates must be a list of numbers, got"):
            search_dropout(build, data(8, 0), data(8, 0), loss_fn=loss, rates=rates)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"repeats must be an integer of at least 1, got 0"):
        search_dropout(build, data(8, 0), data(8, 0), loss_fn=loss, repeats=0)
    with pytest.raises(TypeError, match=r"must be datasets with an index or pairs of tensors, got int"):
        search_dropout(build, 3, data(8, 0), loss_fn=loss)
    with pytest.raises(ValueError, match=r"must hold samples, got none"):
        search_dropout(build, data(8, 0), data(0, 0), loss_fn=loss)
    with pytest.raises(TypeError, match=r"build\(rate\) must give an nn.Module, got float"):
        search_dropout(lambda rate: rate, data(8, 0), data(8, 0), loss_fn=loss)  # type: ignore[arg-type, return-value]
