# SPDX-License-Identifier: Apache-2.0
"""torch.compile over code that steps: the graph breaks at `step`, cleanly, and nothing is compiled again and again."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import CASES
from support import bits, example, make, training_step
from torch._dynamo.testing import CompileCounter

every_optimizer = pytest.mark.parametrize("name", CASES)
STEPS = 8


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def new_model_and_optimizer(name, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, make(name, model.parameters(), **(example(name) | {"lr": 0.01, "max_grad_norm": 0.5} | settings))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(STEPS)]


def run(step, scheduler=None, counter=None):
    """The losses, and how many graphs had been compiled after each step."""
    losses, counts = [], []
    for x in batches():
        losses.append(step(x).item())
        if scheduler is not None:
            scheduler.step()
        counts.append(counter.frame_count if counter is not None else 0)
    return losses, counts


@every_optimizer
def test_the_whole_training_step(name, backend):
    model, opt = new_model_and_optimizer(name, backend=backend)
    counter = CompileCounter()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")  # cannot trace: it looked into the step
        losses, counts = run(torch.compile(training_step(model, opt), backend=counter), counter=counter)
    expected_model, expected = new_model_and_optimizer(name, backend=backend)
    wanted, _ = run(training_step(expected_model, expected))
    assert counts[0] > 0, "nothing was compiled; the test does not see what it should"
    assert counts[-1] == counts[1], f"graphs compiled after each step: {counts}"
    assert losses == pytest.approx(wanted, rel=1e-5)


@every_optimizer
def test_nothing_is_compiled_again_while_a_schedule_changes_lr(name, backend):
    """Nor by the counts of steps, the norm, or the state that appears at the first step."""
    model, opt = new_model_and_optimizer(name, backend=backend)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    step = torch.compile(training_step(model, opt), backend="eager")
    xs = batches()
    for x in xs[:2]:
        step(x)
        scheduler.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in xs[2:]:
            step(x)
            scheduler.step()


@every_optimizer
def test_a_compiled_step(name, backend):
    """`torch.compile(opt.step)` is the step as it is: there is nothing left to fuse."""
    model, opt = new_model_and_optimizer(name, backend=backend)
    expected_model, expected = new_model_and_optimizer(name, backend=backend)
    counter = CompileCounter()
    compiled = torch.compile(opt.step, backend=counter)
    counts = []
    for x in batches():
        for m, o, step in ((model, opt, compiled), (expected_model, expected, expected.step)):
            o.zero_grad()
            m(x).square().mean().backward()
            step()
        counts.append(counter.frame_count)
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in expected_model.parameters()]
    assert counts[-1] == counts[1], f"graphs compiled after each step: {counts}"


@every_optimizer
def test_hooks_fire_once_in_a_compiled_step(name, backend):
    model, opt = new_model_and_optimizer(name, backend=backend)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    run(torch.compile(training_step(model, opt), backend="eager"))
    assert calls == ["before", "after"] * STEPS


@every_optimizer
def test_one_graph_cannot_hold_a_step(name, backend):
    """fullgraph=True says so, and names us."""
    model, opt = new_model_and_optimizer(name, backend=backend)
    model(batches()[0]).square().mean().backward()
    before = [bits(p) for p in model.parameters()]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fastloop"):
        torch.compile(lambda x: (opt.step(), x + 1), backend="eager", fullgraph=True)(torch.zeros(1))
    assert [bits(p) for p in model.parameters()] == before


@pytest.mark.slow
@every_optimizer
def test_with_inductor(name, backend):
    model, opt = new_model_and_optimizer(name, backend=backend)
    losses, _ = run(torch.compile(training_step(model, opt)))
    expected_model, expected = new_model_and_optimizer(name, backend=backend)
    wanted, _ = run(training_step(expected_model, expected))
    assert losses == pytest.approx(wanted, rel=1e-4)
