# SPDX-License-Identifier: Apache-2.0
"""A Loop trains as a hand-written loop does: bit for bit with the same arithmetic, else within the derived bound."""

from __future__ import annotations

import math
from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from by_hand import OPTIMIZERS, Mean, batches, cross_entropy, network
from support import bits
from tolerances import unit_roundoff
from torch import Tensor, nn

import fastloop
from fastloop import Loop, schedules

SIZES = {
    "equal": [4] * 7,  # accumulation 2 and 3 leave a shorter last window
    "uneven": [4, 2, 7, 4, 1, 4, 3],
    "first small": [1, 8, 8, 8, 8],  # the nominal weight is that of the smallest
}
CLIPS: dict[str, dict[str, float]] = {
    "no clipping": {},
    "norm": {"max_grad_norm": 0.05},
    "value": {"max_grad_value": 0.01},
    "both": {"max_grad_norm": 0.05, "max_grad_value": 0.01},
}
EPOCHS = 2


def weights(model: nn.Module) -> list[Any]:
    return [bits(p) for p in model.parameters()]


def by_windows(loop: Loop, data: Any, **length: int) -> list[float]:
    losses = []
    for window in loop.windows(data, **length):
        for batch in window:
            with loop.autocast():
                loss = cross_entropy(loop.model, batch)
            loop.backward(loss)
        losses.append(loop.step().loss.item())
    return losses


# ---- bit for bit: the same optimizer and the same normalization


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_hand_written_loop_bit_for_bit(optimizer: str, clip: str, accumulation: int, sizes: str) -> None:
    data, make = batches(SIZES[sizes]), OPTIMIZERS[optimizer]
    ours, theirs, fitted = network(), network(), network()
    loop = Loop(ours, make(ours.parameters()), accumulation_steps=accumulation, **CLIPS[clip])
    losses = by_windows(loop, data, epochs=EPOCHS)
    expected = by_hand.train(
        theirs, make(theirs.parameters()), data, epochs=EPOCHS, accumulation=accumulation, **CLIPS[clip]
    )
    assert losses == expected
    assert weights(ours) == weights(theirs) != weights(network())
    assert loop.global_step == EPOCHS * math.ceil(len(data) / accumulation)
    Loop(fitted, make(fitted.parameters()), cross_entropy, accumulation_steps=accumulation, **CLIPS[clip]).fit(
        data, epochs=EPOCHS
    )
    assert weights(fitted) == weights(ours)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_torchs_own_loop_bit_for_bit(accumulation: int) -> None:
    """loss / accumulation, torch.optim, nothing of ours: where all windows are full and factors are powers of 2."""
    data = batches([4] * 8)
    ours, theirs = network(), network()
    by_windows(
        Loop(ours, OPTIMIZERS["torch.AdamW"](ours.parameters()), accumulation_steps=accumulation), data, epochs=1
    )
    optimizer = OPTIMIZERS["torch.AdamW"](theirs.parameters())
    for window in by_hand.windows_of(data, accumulation):
        for batch in window:
            (cross_entropy(theirs, batch) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weights(ours) == weights(theirs)


# ---- schedules: counted by windows, and the rate of window k is that of k


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["ours", "name", "mapping", "function"])
def test_schedules_bit_for_bit(kind: str, optimizer: str, accumulation: int) -> None:
    data, make = batches([4] * 7), OPTIMIZERS[optimizer]
    total = EPOCHS * math.ceil(7 / accumulation)
    schedule: Any = {
        "ours": schedules.warmup_cosine(warmup_steps=2),
        "name": "cosine",
        "mapping": {"name": "warmup_linear", "warmup_steps": 1},
        "function": lambda step: 1.0 / (1 + step),
    }[kind]
    factor = schedule if kind == "function" else schedules.from_name(schedule, total)
    ours, theirs = network(), network()
    loop = Loop(ours, make(ours.parameters()), cross_entropy, schedule=schedule, accumulation_steps=accumulation,
                log_every=1)  # fmt: skip
    history = loop.fit(data, epochs=EPOCHS)
    by_hand.train(
        theirs, make(theirs.parameters()), data, epochs=EPOCHS, accumulation=accumulation,
        lr=lambda step: 0.05 * factor(step),
    )  # fmt: skip
    assert weights(ours) == weights(theirs)
    assert history["lr"] == [(step + 1, 0.05 * factor(step)) for step in range(total)]


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)],
        [3],
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "torch.SGD"])
def test_a_scheduler_of_torch_is_stepped_once_a_window(name: str, optimizer: str) -> None:
    """accelerate#963 stepped it for every micro-batch."""
    data, make = batches([4] * 7), OPTIMIZERS[optimizer]
    ours, theirs = network(), network()
    mine, other = make(ours.parameters()), make(theirs.parameters())
    Loop(ours, mine, cross_entropy, schedule=SCHEDULERS[name](mine), accumulation_steps=3).fit(data, epochs=EPOCHS)
    by_hand.train(theirs, other, data, epochs=EPOCHS, accumulation=3, scheduler=SCHEDULERS[name](other))
    assert weights(ours) == weights(theirs)
    assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_torch_goes_on_after_a_resume(name: str, tmp_path: Any) -> None:
    data = batches([4] * 7)

    def loop(folder: Any) -> Loop:
        model = network()
        optimizer = OPTIMIZERS["fastloop.AdamW"](model.parameters())
        return Loop(model, optimizer, cross_entropy, schedule=SCHEDULERS[name](optimizer), run_dir=folder, log_every=1,
                    loggers=())  # fmt: skip

    whole, first = loop(tmp_path / "a"), loop(tmp_path / "b")
    whole.fit(data, max_steps=7)
    first.fit(data, max_steps=4)
    second = loop(tmp_path / "b")
    assert second.global_step == 4
    assert second.fit(data, max_steps=7)["lr"] == whole.history["lr"]
    assert weights(second.model) == weights(whole.model)


# ---- the gradient is that of one large batch, whatever the sizes and weights


def mean_bound(rows: Tensor, windows: int = 1) -> Tensor:
    """Of the mean of n rows summed in any order, in fp32: n - 1 additions, and a few products by weights and factors.

    Each row passes the seed of the backward (weight / N: 2 roundings, / rows of the batch: 1), its product with x (1),
    the sum within the batch and over batches (n), the divisor of the step (2), the update's own product and difference
    (2). So |error| <= (n + 8) u sum|x| / n, Higham (3.5) with n*u far below 1.
    """
    n = len(rows)
    return (n + 8) * windows * unit_roundoff(torch.float32) * rows.abs().sum(0) / n


@pytest.mark.parametrize("optimizer", [fastloop.SGD, torch.optim.SGD])
@pytest.mark.parametrize("sizes", [[8, 8, 8], [1, 8, 3], [8, 1, 1], [5, 7, 2, 3, 9, 1], [3]])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 8])
def test_one_big_batch(accumulation: int, sizes: list[int], optimizer: Any) -> None:
    """Also of the last window, which is shorter: Lightning#19987 divided it by the full length."""
    made = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, Mean.FEATURES, generator=made),) for n in sizes]
    model = Mean()
    loop = Loop(model, optimizer(model.parameters(), lr=1.0), accumulation_steps=accumulation)
    rows = by_hand.windows_of(data, accumulation)
    for window in loop.windows(data, epochs=1):
        before = model.w.detach().clone()
        with torch.no_grad():
            model.w.zero_()
        for batch in window:
            loop.backward(loop.model(batch[0]).mean())
        loop.step()
        together = torch.cat([batch[0] for batch in next(rows)])
        off = (-model.w.detach().double() - together.double().mean(0)).abs()
        assert (off <= mean_bound(together)).all(), (off, mean_bound(together), before)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_token_weights_make_one_big_batch(reduction: str, as_tensor: bool) -> None:
    """The weight is the count of the tokens that are no padding, and some batches have none."""
    made = torch.Generator().manual_seed(0)
    rows = [torch.randn(6, Mean.FEATURES, generator=made) for _ in range(4)]
    counts = [6, 1, 0, 4]
    model = Mean()
    loop = Loop(model, fastloop.SGD(model.parameters(), lr=1.0), accumulation_steps=4)
    for window in loop.windows(rows, epochs=1):
        for batch, count in zip(window, counts, strict=True):
            values = loop.model(batch)[:count]
            loss = values.sum() if reduction == "sum" else values.mean()  # the mean over nothing is NaN
            loop.backward(loss, torch.tensor(count) if as_tensor else count, reduction=reduction)
        result = loop.step()
    together = torch.cat([r[:n] for r, n in zip(rows, counts, strict=True)])
    off = (-model.w.detach().double() - together.double().mean(0)).abs()
    assert (off <= mean_bound(together)).all()
    assert result.loss.item() == 0.0
    assert result.skipped.item() == 0.0


@pytest.mark.parametrize("weighted", [False, True])
def test_a_criterion_weighs_targets_that_are_not_ignored(weighted: bool) -> None:
    """CrossEntropyLoss divides by what it does not ignore, and so must what adds up several of them."""
    torch.manual_seed(0)
    class_weights = torch.tensor([1.0, 4.0, 0.25]) if weighted else None
    criterion = nn.CrossEntropyLoss(weight=class_weights)
    data = batches([6, 6, 6])
    for (_, target), ignored in zip(data, [0, 5, 2], strict=True):
        target[:ignored] = -100
    model, whole = network().double(), network().double()
    data = [(x.double(), y) for x, y in data]
    if weighted:
        criterion = criterion.double()
    Loop(model, torch.optim.SGD(model.parameters(), lr=1.0), criterion, accumulation_steps=3).fit(data, epochs=1)
    big = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    criterion(whole(big[0]), big[1]).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert q.grad is not None
        # float64, 18 rows and some dozen operations each: 1e-13 of the gradient's size is a hundred times their
        # roundings, and far below what a wrong weight changes
        size = float(q.grad.norm())
        assert float((q.detach() - q.grad - p.detach()).norm()) < 1e-13 * (size + float(q.detach().norm()))


def test_tokens_of_two_dimensions_are_weighed_by_a_criterion() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x).transpose(1, 2)

    made = torch.Generator().manual_seed(0)
    data = [(torch.randint(0, 5, (2, n), generator=made), torch.randint(0, 4, (2, n), generator=made)) for n in (3, 9)]
    torch.manual_seed(0)
    model = Tagger()
    start = model.table.weight.detach().clone().requires_grad_()
    Loop(model, torch.optim.SGD(model.parameters(), lr=1.0), nn.CrossEntropyLoss(), accumulation_steps=2).fit(
        data, epochs=1
    )
    x, y = (torch.cat([pair[i].flatten() for pair in data]) for i in (0, 1))
    F.cross_entropy(F.embedding(x, start), y).backward()
    assert start.grad is not None
    assert torch.allclose(model.table.weight, start - start.grad, rtol=0, atol=1e-14)  # 24 tokens in float64


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_criterion_that_is_no_mean_is_refused(reduction: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"must have reduction=\"mean\", got '{reduction}'"):
        Loop(model, fastloop.AdamW(model.parameters()), nn.CrossEntropyLoss(reduction=reduction))


def test_windows_do_not_reach_over_epochs_and_all_batches_count() -> None:
    """accelerate#1847 forced a step at an epoch's end, by a flag that the next epoch still saw."""
    data, sizes = batches([4] * 5), []
    model = network()
    loop = Loop(model, fastloop.AdamW(model.parameters()), accumulation_steps=2)
    for window in loop.windows(data, epochs=3):
        count = 0
        for batch in window:
            loop.backward(cross_entropy(loop.model, batch))
            count += 1
        loop.step()
        sizes.append((loop.epoch, count, window.samples))
    assert sizes == [(epoch, n, 4 * n) for epoch in range(3) for n in (2, 2, 1)]
    assert loop.global_step == 9
    assert loop.epoch == 3


def test_sparse_gradients_of_torchs_optimizer() -> None:
    """Norm and bounds of what they add up to: an index may come twice."""
    made = torch.Generator().manual_seed(0)
    data = [(torch.randint(0, 9, (8,), generator=made), torch.randint(0, 3, (8,), generator=made)) for _ in range(4)]
    for options in ({}, {"max_grad_norm": 0.01}, {"max_grad_value": 0.01}):
        tables = []
        for sparse in (True, False):
            torch.manual_seed(0)
            model = nn.Embedding(9, 3, sparse=sparse)
            Loop(
                model, torch.optim.SGD(model.parameters(), lr=1.0), cross_entropy, accumulation_steps=2, **options
            ).fit(data, epochs=1)
            tables.append(model.weight.detach())
        # two steps, each of a sum of up to 16 terms below 1 in another order, on weights of size 4
        assert (tables[0] - tables[1]).abs().max() <= 2 * 18 * 4 * unit_roundoff(torch.float32)
        torch.manual_seed(0)
        assert (tables[0] != nn.Embedding(9, 3).weight).any()
