# SPDX-License-Identifier: Apache-2.0
"""Classes of unequal size: weights, draws and the focal loss, alone and in the loop."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.loop import Loop
from fastloop.loop.data import END, Feed, Position
from fastloop.loop.strategy import Ranks
from fastloop.recipes import sampling
from fastloop.recipes.data import (
    FocalLoss,
    WeightedSampler,
    balance,
    class_weights,
    synthetic_data,
    weighted_sampler,
)
from fastloop.recipes.evidence import recorded

COUNTS = [800, 150, 40, 10]


pytestmark = pytest.mark.usefixtures("one_thread")


def labels() -> Tensor:
    made = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    return made[torch.randperm(len(made), generator=torch.Generator().manual_seed(0))]


# ---- weights


def test_inverse_weights_are_sklearns_but_for_their_sum() -> None:
    made = class_weights(labels()).double()
    oracle = torch.tensor(compute_class_weight("balanced", classes=numpy.arange(4), y=labels().numpy()))
    torch.testing.assert_close(made / made.sum(), oracle / oracle.sum(), rtol=1e-6, atol=0)
    assert float(made.sum()) == pytest.approx(4)


def test_the_other_schemes_by_their_formulas() -> None:
    made = class_weights(labels(), scheme="sqrt")
    torch.testing.assert_close(made[0] / made[3], torch.tensor(math.sqrt(10 / 800)))
    for beta in (0.0, 0.9, 0.999, 1 - 1e-12):
        made = class_weights(labels(), scheme="effective", beta=beta).double()
        effective = [sum(beta**i for i in range(n)) for n in COUNTS]  # (1 - beta**n)/(1 - beta), without cancellation
        oracle = torch.tensor([1 / n for n in effective], dtype=torch.float64)
        torch.testing.assert_close(made / made.sum(), oracle / oracle.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ([0, 2], {}, ValueError, "class 1 of 3 has none"),
        ([0, 1], {"classes": 3}, ValueError, "class 2 of 3 has none"),
        ([0, 3], {"classes": 3}, ValueError, "labels must lie in 0 to 2, got 3"),
        ([0, -1], {}, ValueError, "labels must lie in 0 to 0, got -1"),
        ([0.0, 1.0], {}, TypeError, "labels must be integers"),
        (["a"], {}, TypeError, "labels must be numbers, got str"),
        ([], {}, (TypeError, ValueError), "labels"),
        ([0, 1], {"scheme": "log"}, ValueError, "scheme must be one of inverse, sqrt, effective"),
        ([0, 1], {"beta": 0.9}, ValueError, 'of scheme="effective"'),
        ([0, 1], {"scheme": "effective", "beta": 1.0}, ValueError, r"beta must lie in \[0, 1\)"),
        ([0, 1], {"classes": 0}, ValueError, "classes must be an integer of at least 1"),
    ],
)
def test_wrong_labels(given: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        class_weights(given, **options)


# ---- the sampler


def test_each_class_is_drawn_equally_often() -> None:
    y = labels()
    drawn = y[torch.tensor(list(weighted_sampler(y, samples=40000)))].bincount()
    # 4 standard deviations of a binomial count with p = 1/4
    assert (drawn - 10000).abs().max() < 4 * math.sqrt(40000 / 4 * 3 / 4)


def test_draws_are_those_of_the_weights_and_never_of_weight_0() -> None:
    weights = [0.0, 1.0, 2.0, 0.0, 5.0, 0.0]
    drawn = torch.tensor(list(WeightedSampler(weights, 80000))).bincount(minlength=6)
    assert drawn[[0, 3, 5]].tolist() == [0, 0, 0]
    torch.testing.assert_close(drawn / 80000, torch.tensor(weights) / 8, atol=0.008, rtol=0)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = weighted_sampler(labels())
    first = list(sampler)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert list(sampler) == first
    assert torch.equal(torch.get_rng_state(), state)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(weighted_sampler(labels(), seed=1)) not in (first, second)


def test_more_than_two_to_the_24_weights() -> None:
    weights = torch.zeros(2**24 + 10)
    weights[-3] = 1e-30
    assert list(WeightedSampler(weights, 5)) == [2**24 + 7] * 5


@pytest.mark.parametrize("samples", [12, 13, 1])
def test_ranks_share_one_order(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = weighted_sampler(labels(), samples=samples)
    whole = list(sampler)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(sampling, "ranks", lambda rank=rank: (rank, 4))
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert len({len(share) for share in shares}) == 1
    together = [index for row in zip(*shares, strict=True) for index in row]
    assert together[:samples] == whole
    assert together[samples:] == (whole * 4)[: len(together) - samples]


def of_ranks(sampler: WeightedSampler, size: int, batches: int | None, start: Position) -> tuple[list[Any], Position]:
    """Samples that `size` ranks have in that many batches of 2 of one epoch, in order; where the run is then."""
    found = []
    for rank in range(size):
        ranks = Ranks(torch.device("cpu"))
        ranks.rank, ranks.size = rank, size
        feed = Feed(DataLoader(list(range(1000)), 2, sampler=sampler), ranks)
        feed.begin(start)
        own: list[int] = []
        while (batches is None or len(own) < 2 * batches) and (batch := feed.next()) is not END:
            own += batch.tolist()
        feed.batches_before = feed.batches
        found.append(own)
    rows = itertools.zip_longest(*found)
    return [index for row in rows for index in row if index is not None], feed.position()


@pytest.mark.parametrize("ranks_after", [1, 2, 3])
def test_what_is_left_of_an_epoch_is_divided_among_other_ranks(ranks_after: int) -> None:
    """Together they draw what one rank would; the epoch is the second one, of 40 draws."""
    sampler = weighted_sampler(labels(), samples=40)
    whole = sampler.indices(1).tolist()
    assert of_ranks(sampler, 2, None, Position(1))[0] == whole
    drawn, position = of_ranks(sampler, 2, 4, Position(1))
    assert drawn == whole[:16]
    left, _ = of_ranks(sampler, ranks_after, None, position if ranks_after == 2 else position.for_ranks(ranks_after))
    assert left == whole[16:]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [[1.0]]])
def test_wrong_weights(weights: Any) -> None:
    with pytest.raises(ValueError, match="weights must be one finite number of at least 0"):
        WeightedSampler(weights)


def test_wrong_samples_seeds_and_labels() -> None:
    with pytest.raises(ValueError, match="samples must be an integer of at least 1"):
        WeightedSampler([1.0], 0)
    with pytest.raises(ValueError, match="seed must be an integer"):
        WeightedSampler([1.0], seed=-1)
    with pytest.raises(TypeError, match="labels must be one integer for each sample"):
        weighted_sampler(torch.zeros(3))
    with pytest.raises(ValueError, match="labels must be one integer for each sample"):
        weighted_sampler(torch.zeros(3, 2).long())


# ---- the focal loss


def by_hand(logits: Tensor, target: Tensor, gamma: float, weight: Tensor | None, smoothing: float) -> Tensor:
    """The formula, in fp64, sample by sample."""
    total, divisor = 0.0, 0.0
    p = logits.double().softmax(-1)
    for row, y in zip(p.tolist(), target.tolist(), strict=True):
        if y == -100:
            continue
        w = [1.0] * len(row) if weight is None else weight.double().tolist()
        for k, each in enumerate(row):
            q = (1 - smoothing) * (k == y) + smoothing / len(row)
            total += q * w[k] * (1 - each) ** gamma * -math.log(each)
        divisor += w[y]
    return torch.tensor(total / divisor, dtype=torch.float64)


CASES = [(w, s) for w in (None, torch.tensor([0.5, 1.0, 3.0])) for s in (0.0, 0.1)]


@pytest.mark.parametrize(("weight", "smoothing"), CASES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_it_is_its_formula(gamma: float, weight: Tensor | None, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 3, generator=generator)
    target = torch.randint(3, (50,), generator=generator)
    target[::7] = -100
    made = FocalLoss(gamma, weight, label_smoothing=smoothing)(logits, target)
    oracle = by_hand(logits, target, gamma, weight, smoothing)
    # a sum of 43 products of some 10 roundings each
    torch.testing.assert_close(made.double(), oracle, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("weight", "smoothing"), CASES)
def test_gamma_0_is_cross_entropy_bit_for_bit(weight: Tensor | None, smoothing: float) -> None:
    logits = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randint(3, (20, 4), generator=torch.Generator().manual_seed(1))
    target[0, 0] = 1
    options = {"label_smoothing": smoothing, "ignore_index": 1}
    made = FocalLoss(0.0, weight, **options)(logits, target)
    assert torch.equal(made, nn.CrossEntropyLoss(weight, **options)(logits, target))


@pytest.mark.parametrize(("weight", "smoothing"), CASES)
def test_a_small_gamma_goes_to_cross_entropy(weight: Tensor | None, smoothing: float) -> None:
    """Of all shapes that cross entropy takes."""
    for shape in ((3,), (5, 3), (5, 3, 2, 2)):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        target = torch.randint(3, shape[:1] + shape[2:] if len(shape) > 1 else ())
        made = FocalLoss(1e-6, weight, label_smoothing=smoothing)(logits, target)
        torch.testing.assert_close(
            made, F.cross_entropy(logits, target, weight, label_smoothing=smoothing), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4, 3e38])
def test_values_and_gradients_stay_finite(gamma: float, size: float) -> None:
    logits = torch.tensor([[size, -size], [-size, size]], requires_grad=True)
    with torch.no_grad():
        logits.clamp_(-1e30, 1e30)
    loss = FocalLoss(gamma)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradients_by_differences(gamma: float) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = FocalLoss(gamma, torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.tensor([0, 2, 1, 1])), (logits,))


@pytest.mark.parametrize(("weight", "smoothing"), CASES)
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_without_reduction_the_terms_are_those_of_the_sum(
    gamma: float, weight: Tensor | None, smoothing: float
) -> None:
    logits = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randint(3, (20, 4), generator=torch.Generator().manual_seed(1))
    target[0, 0] = -100
    terms = FocalLoss(gamma, weight, label_smoothing=smoothing, reduction="none")(logits, target)
    assert terms.shape == target.shape
    assert terms[0, 0] == 0
    counted = target[target >= 0]
    divisor = len(counted) if weight is None else weight[counted].sum()
    mean = FocalLoss(gamma, weight, label_smoothing=smoothing)(logits, target)
    torch.testing.assert_close(terms.sum() / divisor, mean, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match='reduction must be "mean" or "none", got \'sum\''):
        FocalLoss(reduction="sum")


def test_a_confident_sample_keeps_its_digits() -> None:
    """1 - exp(log p) has none left in fp32 for p = 1 - 1e-9."""
    logits = torch.tensor([[math.log(1e9), 0.0]])
    made = FocalLoss(2.0)(logits, torch.tensor([0]))
    assert float(made) == pytest.approx(1e-27, rel=1e-5)


def test_half_precision_is_computed_in_fp32() -> None:
    logits, target = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4
    rounded = logits.bfloat16()
    assert torch.equal(FocalLoss()(rounded, target), FocalLoss()(rounded.float(), target))


def test_accumulated_windows_are_the_one_large_batch_in_the_loop() -> None:
    """Weighted classes: micro-batches count by the sum of their weights, as those of CrossEntropyLoss."""
    data = synthetic_data("classification", 48, classes=3, imbalance=4, shape=(6,))
    weight = class_weights(data.tensors[1])
    models = []
    for size, accumulation in ((12, 4), (48, 1)):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        loop = Loop(model, torch.optim.SGD(model.parameters(), 0.5), FocalLoss(2.0, weight),
                    accumulation_steps=accumulation, progress=False)  # fmt: skip
        loop.fit(DataLoader(data, size), epochs=3)
        models.append(model)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-5, atol=1e-6)
    metrics = loop.evaluate(DataLoader(data, 10))
    assert set(metrics) >= {"loss", "accuracy"} or any("accuracy" in name for name in metrics)


@pytest.mark.parametrize(
    ("weight", "shape", "target"),
    [
        (None, (4, 5), [0, 1, 2]),
        (None, (4, 5), [[0], [1], [2], [3]]),
        (None, (4, 5), [0, 1, 2, 7]),
        (torch.ones(3), (4, 5), [0, 1, 2, 0]),
        (torch.ones(6), (4, 5), [0, 1, 2, 0]),
    ],
)
def test_what_cross_entropy_refuses_is_refused(weight: Any, shape: Any, target: Any) -> None:
    """Indexing and broadcasting would give a number for most of these."""
    for loss in (nn.CrossEntropyLoss(weight), FocalLoss(2.0, weight), FocalLoss(2.0, weight, label_smoothing=0.1)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            loss(torch.zeros(shape), torch.tensor(target))


def test_wrong_use_of_the_focal_loss() -> None:
    with pytest.raises(ValueError, match="gamma must be at least 0, got -1"):
        FocalLoss(-1)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\]"):
        FocalLoss(label_smoothing=2.0)
    with pytest.raises(TypeError, match="targets must be classes as integers"):
        FocalLoss()(torch.zeros(2, 3), torch.zeros(2, 3))


# ---- balance


def rows() -> TensorDataset:
    return TensorDataset(torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)), labels())


def test_each_strategy(tmp_path: Path) -> None:
    weighted, drawn, focal = (balance(rows(), each) for each in ("weighted_loss", "oversampling", "focal_loss"))
    assert torch.equal(weighted.loss_fn.weight, class_weights(labels()))
    assert weighted.sampler is None
    assert type(drawn.loss_fn) is nn.CrossEntropyLoss
    assert drawn.loss_fn.weight is None
    assert list(drawn.sampler) == list(weighted_sampler(labels()))
    assert isinstance(focal.loss_fn, FocalLoss)
    assert focal.sampler is None
    assert weighted.counts == COUNTS
    assert weighted.imbalance == 80
    weighted.record(tmp_path)
    assert recorded(tmp_path)["balance"]["strategy"] == "weighted_loss"
    assert "800" in str(weighted)
    assert "with a sampler" in str(drawn)
    with pytest.raises(ValueError, match="strategy must be one of weighted_loss, oversampling, focal_loss"):
        balance(rows(), "undersampling")
    with pytest.raises(ValueError, match="class 4 of 5 has none"):
        balance(rows(), classes=5)


class Recorder(nn.Module):
    """A model that keeps the batches that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(5, 4), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.linear(x)


def run(folder: Path, steps: int, resume: Any = "auto") -> Recorder:
    torch.manual_seed(0)
    model = Recorder()
    loader = DataLoader(rows(), 50, sampler=weighted_sampler(labels(), samples=200))
    loop = Loop(model, fastloop.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss(), run_dir=folder,
                save_every_steps=3, resume=resume, progress=False, loggers=(), curves=False)  # fmt: skip
    loop.fit(loader, max_steps=steps)
    return model


def test_a_run_resumes_exactly_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 10)
    first, second = run(tmp_path / "parts", 6), run(tmp_path / "parts", 10)
    for a, b in zip(whole.seen, [*first.seen, *second.seen], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole.seen[0], whole.seen[4])  # another epoch, other draws
    torch.testing.assert_close(whole.state_dict(), second.state_dict(), rtol=0, atol=0)
