# SPDX-License-Identifier: Apache-2.0
"""compare_models: paired, with exact tests and an interval that holds what it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastloop.recipes.after import compare_models
from fastloop.recipes.after.intervals import mcnemar


class Says(nn.Module):
    """Gives its table's rows: data are indices."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, i: Tensor) -> Tensor:
        return self.table[i]


def right_where(right: Tensor) -> Says:
    """Two classes, the target being 0."""
    return Says(torch.stack([right.float(), 1 - right.float()], 1) * 4 - 2)


def data(samples: int) -> tuple[Tensor, Tensor]:
    return torch.arange(samples), torch.zeros(samples, dtype=torch.long)


def test_a_better_model_is_called_so_from_either_side() -> None:
    i = torch.arange(400)
    old, new = right_where(i % 4 != 0), right_where(i % 10 != 0)
    made = compare_models(old, new, data(400))
    assert made.verdict == "b better"
    assert (made.a, made.b) == (0.75, 0.9)
    assert made.low < made.difference < made.high
    assert made.difference == pytest.approx(0.15)
    only_a, only_b = int(((i % 4 != 0) & (i % 10 == 0)).sum()), int(((i % 4 == 0) & (i % 10 != 0)).sum())
    assert (made.only_a, made.only_b) == (only_a, only_b)
    back = compare_models(new, old, data(400))
    assert back.verdict == "a better"
    assert back.p_value == made.p_value
    assert compare_models(old, new, data(400), metric="loss").verdict == "b better"  # a smaller loss
    assert "b better" in str(made)


def test_pairing_shows_what_unpaired_intervals_could_not() -> None:
    """Of 300 samples b has 8 more right, all that a has among them: 8 discordant pairs, p = 2^-7."""
    i = torch.arange(300)
    made = compare_models(right_where(i >= 100), right_where(i >= 92), data(300))
    assert made.p_value == pytest.approx(2.0**-7)
    assert made.verdict == "b better"


def test_few_discordant_pairs_show_nothing() -> None:
    """5 of 5: the bootstrap's interval is above 0, and the exact test has p = 1/16."""
    i = torch.arange(300)
    made = compare_models(right_where(i >= 5), right_where(i >= 0), data(300))
    assert made.low > 0
    assert made.p_value == pytest.approx(1 / 16)
    assert made.verdict == "no difference shown"
    assert any("5 samples only" in f.what for f in made.findings)


def test_the_same_model_and_the_same_seed() -> None:
    model = right_where(torch.arange(200) % 3 == 0)
    made = compare_models(model, model, data(200))
    assert (made.difference, made.low, made.high, made.p_value) == (0, 0, 0, 1)
    assert made.verdict == "no difference shown"
    other = Says(model.table.detach() + torch.randn(200, 2, generator=torch.Generator().manual_seed(0)))
    runs = [compare_models(model, other, data(200), metric="loss", seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].low != runs[2].low
    assert runs[0].difference == runs[2].difference


@pytest.mark.slow  # 50 comparisons
def test_equal_models_are_called_different_in_2_of_100_at_most() -> None:
    wrong = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        a, b = (right_where(torch.rand(150, generator=generator) < 0.8) for _ in range(2))
        wrong += compare_models(a, b, data(150)).verdict != "no difference shown"
    assert wrong <= 4  # binomial(50, 0.02): more than 4 has probability 0.003; the exact test errs less often


def test_mcnemar_is_the_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for a, b in ((0, 0), (1, 0), (3, 9), (10, 10), (200, 260), (5000, 5300)):
        wanted = stats.binomtest(a, a + b).pvalue if a + b else 1.0
        assert mcnemar(a, b) == pytest.approx(wanted, rel=1e-8)


def test_a_function_as_metric() -> None:
    def right(output: Tensor, target: Tensor) -> Tensor:
        return output.argmax(1) == target

    i = torch.arange(400)
    made = compare_models(right_where(i % 4 != 0), right_where(i % 10 != 0), data(400), metric=right)
    assert (made.metric, made.a, made.b, made.p_value, made.verdict) == ("right", 0.75, 0.9, None, "b better")
    with pytest.raises(ValueError, match="number for each of 256 samples"):
        compare_models(right_where(i > 0), right_where(i > 1), data(400), metric=lambda o, t: o.sum())


class Noisy(Dataset):
    """Another input each time that it is asked: what a pair of passes would not see the same."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Any:
        return torch.randn(3), torch.randint(3, ())


def test_both_see_the_same_batches() -> None:
    made = compare_models(nn.Identity(), nn.Identity(), Noisy(), metric="loss", batch_size=10)
    assert (made.difference, made.low, made.high) == (0, 0, 0)


def test_numbers_and_too_few_samples() -> None:
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    made = compare_models(Says(x + 1), Says(x + 0.1), (torch.arange(40), x), metric="loss")
    assert made.verdict == "b better"
    assert made.a == pytest.approx(1, abs=1e-6)
    assert any("40 samples" in f.what for f in made.findings)
    with pytest.raises(ValueError, match='metric="loss"'):
        compare_models(Says(x), Says(x), (torch.arange(40), x))


def test_bad_input() -> None:
    model = right_where(torch.arange(10) > 3)
    with pytest.raises(ValueError, match="metric must be"):
        compare_models(model, model, data(10), metric="f1")
    with pytest.raises(ValueError, match="at least one sample"):
        compare_models(model, model, data(0))
    with pytest.raises(ValueError, match="finite"):
        compare_models(model, Says(torch.full((10, 2), math.nan)), data(10))
    with pytest.raises(ValueError, match="finite for each sample"):
        compare_models(model, model, data(10), metric=lambda o, t: o[:, 0] * math.nan)
    with pytest.raises(TypeError, match="targets"):
        compare_models(model, model, torch.arange(10))
