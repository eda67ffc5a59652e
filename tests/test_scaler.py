# SPDX-License-Identifier: Apache-2.0
"""Loss scaling: torch.amp.GradScaler with our optimizers, and fastloop.GradScaler against torch's."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from cases import CASES
from support import bits, bits_of, checked_step, example, make, values

import fastloop

every_optimizer = pytest.mark.parametrize("name", CASES)
every_scaler = pytest.mark.parametrize(
    "scaler_class", [torch.amp.GradScaler, fastloop.GradScaler], ids=["torch", "ours"]
)
SCALER = {"init_scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.25, "growth_interval": 3}


class Problem:
    """A loss whose gradients are the numbers that the test wants: loss = sum(p * wanted)."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.params = [torch.nn.Parameter(values(shape, dtype)) for shape in ((5, 3), (4,), ())]

    def backward(self, scaler, step: int, overflow: bool = False) -> None:
        for p in self.params:
            p.grad = None
        torch.manual_seed(100 + step)
        loss = sum((p * values(p.shape, p.dtype)).sum() for p in self.params)
        if overflow:
            loss = loss + (self.params[0][0, 0] * 1e38).square() * 0 + self.params[0][0, 1] * 3e38
        scaler.scale(loss).backward()


def assert_overflows(problem) -> None:
    assert not problem.params[0].grad.isfinite().all(), "the test must overflow here"


OVERFLOWS = (2, 3, 6)


def train(scaler, problem, opt, steps=10, unscale=False, clip=None, check=False):
    trace = []
    for step in range(steps):
        problem.backward(scaler, step, overflow=step in OVERFLOWS)
        if step in OVERFLOWS:
            assert_overflows(problem)
        if unscale:
            scaler.unscale_(opt)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(problem.params, clip)
        if check:
            step_of = opt.step
            opt.step = lambda step_of=step_of: checked_step(opt, step_of)
            scaler.step(opt)
            del opt.step
        else:
            scaler.step(opt)
        scaler.update()
        trace.append(scaler.get_scale())
    return trace


@pytest.mark.parametrize("clip", [None, 0.1])
@every_scaler
@every_optimizer
def test_a_step_under_a_scaler_is_within_the_bound(name, scaler_class, clip, backend):
    problem = Problem()
    opt = make(name, problem.params, backend=backend, max_grad_norm=clip, ema_decay=0.9, **example(name))
    if scaler_class is fastloop.GradScaler and clip is None:
        train(scaler_class("cpu", **SCALER), problem, opt)
    else:
        train(scaler_class("cpu", **SCALER), problem, opt, check=True)
    assert opt.skipped_steps.item() == len(OVERFLOWS)
    for state in opt.state.values():
        if "step" in state:
            assert state["step"].item() == 10 - len(OVERFLOWS)
    assert all(p.isfinite().all() for p in problem.params)
    assert not hasattr(opt, "found_inf") or opt.found_inf is None


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
@every_scaler
@every_optimizer
def test_the_trajectory_is_that_of_torchs_scaler_clipping_and_optimizer(name, scaler_class, clip, unscale, backend):
    settings = example(name)
    theirs = Problem()
    opt = getattr(torch.optim, name)(theirs.params, **settings)
    their_scales = train(torch.amp.GradScaler("cpu", **SCALER), theirs, opt, unscale=True, clip=clip)

    ours = Problem()
    opt = make(name, ours.params, backend=backend, max_grad_norm=clip, **settings)
    our_scales = train(scaler_class("cpu", **SCALER), ours, opt, unscale=unscale)
    assert our_scales == their_scales
    assert len(set(our_scales)) > 3, "grew and backed off"
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@every_scaler
@every_optimizer
def test_gradients_stay_scaled_after_the_step(name, scaler_class, backend):
    """Unscaling happens in registers; unscale_ asked for by the user writes, as torch's."""
    problem = Problem()
    opt = make(name, problem.params, backend=backend, max_grad_norm=0.1, **example(name))
    scaler = scaler_class("cpu", **SCALER)
    problem.backward(scaler, 0)
    before = [bits(p.grad) for p in problem.params]
    scaler.step(opt)
    assert [bits(p.grad) for p in problem.params] == before
    scaler.update()
    problem.backward(scaler, 1)
    unscaled = [p.grad / scaler.get_scale() for p in problem.params]
    scaler.unscale_(opt)
    assert [bits(p.grad) for p in problem.params] == [bits(g) for g in unscaled]
    after = [bits(p.grad) for p in problem.params]
    scaler.step(opt)
    assert [bits(p.grad) for p in problem.params] == after


@pytest.mark.parametrize("clip", [None, 1.0])
@every_optimizer
def test_both_scalers_agree_bitwise(name, clip, backend):
    outcomes = []
    for scaler_class in (torch.amp.GradScaler, fastloop.GradScaler):
        problem = Problem()
        opt = make(name, problem.params, backend=backend, max_grad_norm=clip, ema_decay=0.9, **example(name))
        scales = train(scaler_class("cpu", **SCALER), problem, opt)
        outcomes.append((scales, bits_of(opt, skipped=True)))
    assert outcomes[0] == outcomes[1]


@every_optimizer
def test_state_dicts_exchange_with_torchs(name, backend):
    problem, twin = Problem(), Problem()
    opt = make(name, problem.params, backend=backend, max_grad_norm=1.0, **example(name))
    other = make(name, twin.params, backend=backend, max_grad_norm=1.0, **example(name))
    ours, theirs = fastloop.GradScaler("cpu", **SCALER), torch.amp.GradScaler("cpu", **SCALER)
    train(ours, problem, opt, steps=4)
    train(theirs, twin, other, steps=4)
    assert ours.state_dict() == theirs.state_dict()
    swapped_ours, swapped_theirs = fastloop.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    swapped_ours.load_state_dict(theirs.state_dict())
    swapped_theirs.load_state_dict(ours.state_dict())
    assert train(swapped_ours, problem, opt) == train(swapped_theirs, twin, other)
    assert bits_of(opt) == bits_of(other)


@every_scaler
def test_several_optimizers_under_one_scaler(scaler_class, backend):
    """Each skips by its own gradients; the scale backs off if any of them overflowed."""
    first, second = Problem(1), Problem(2)
    one = fastloop.AdamW(first.params, backend=backend, max_grad_norm=1.0)
    two = fastloop.SGD(second.params, lr=0.1, momentum=0.9, backend=backend)
    scaler = scaler_class("cpu", **SCALER)
    for step in range(3):
        first.backward(scaler, step)
        second.backward(scaler, step, overflow=step == 1)
        scaler.step(one)
        scaler.step(two)
        scaler.update()
        assert scaler.get_scale() == (1024.0, 256.0, 256.0)[step]
    assert one.skipped_steps.item() == 0
    assert two.skipped_steps.item() == 1


@every_scaler
def test_one_scaler_serves_ours_and_torchs_optimizers(scaler_class, backend):
    first, second = Problem(1), Problem(2)
    one = fastloop.AdamW(first.params, backend=backend, max_grad_norm=1.0)
    two = torch.optim.SGD(second.params, lr=0.1)
    before = [bits(p) for p in second.params]
    scaler = scaler_class("cpu", **SCALER)
    first.backward(scaler, 0)
    second.backward(scaler, 0, overflow=True)
    scaler.step(one)
    scaler.step(two)
    scaler.update()
    assert [bits(p) for p in second.params] == before, "torch's optimizer must not step on an overflow"
    assert one.skipped_steps.item() == 0
    assert scaler.get_scale() == 256.0


@every_scaler
def test_the_protocol_is_enforced(scaler_class, backend):
    problem = Problem()
    opt = fastloop.AdamW(problem.params, backend=backend, max_grad_norm=1.0)
    scaler = scaler_class("cpu", **SCALER)
    problem.backward(scaler, 0)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(opt)
    scaler.step(opt)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(opt)
    scaler.update()
    with pytest.raises(RuntimeError, match=r"(?i)closure"):
        scaler.step(opt, closure=lambda: 0.0)


@every_scaler
def test_a_disabled_scaler_is_transparent(scaler_class, backend):
    problem = Problem()
    opt = fastloop.AdamW(problem.params, backend=backend, max_grad_norm=1.0)
    scaler = scaler_class("cpu", enabled=False)
    assert scaler.get_scale() == 1.0
    problem.backward(scaler, 0)
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert opt.state[problem.params[0]]["step"].item() == 1
    assert scaler.state_dict() == {}


def test_the_interface_is_torchs():
    assert issubclass(fastloop.GradScaler, torch.amp.GradScaler) or not {
        name for name in dir(torch.amp.GradScaler) if not name.startswith("_")
    } - set(dir(fastloop.GradScaler))
    theirs = inspect.signature(torch.amp.GradScaler.__init__).parameters
    ours = inspect.signature(fastloop.GradScaler.__init__).parameters
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


@every_scaler
def test_scalers_pickle_and_copy(scaler_class):
    scaler = scaler_class("cpu", **SCALER)
    scaler.scale(torch.ones(()))
    scaler.update(512.0)
    for other in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        assert other.get_scale() == 512.0


@every_scaler
def test_setting_the_scale_by_hand(scaler_class, backend):
    problem = Problem()
    opt = fastloop.AdamW(problem.params, backend=backend, max_grad_norm=1.0)
    scaler = scaler_class("cpu", **SCALER)
    problem.backward(scaler, 0)
    scaler.step(opt)
    scaler.update(new_scale=64.0)
    assert scaler.get_scale() == 64.0


def test_ours_takes_found_inf_from_the_first_pass(monkeypatch, backend):
    """The point of our scaler: torch's own check, a pass over all gradients, never runs where we clip."""
    problem = Problem()
    opt = fastloop.AdamW(problem.params, backend=backend, max_grad_norm=1.0)

    def forbidden(*args, **kwargs):
        raise AssertionError("an extra pass over the gradients")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", forbidden)
    scales = train(fastloop.GradScaler("cpu", **SCALER), problem, opt)
    assert scales[2] == 256.0
    assert opt.skipped_steps.item() == len(OVERFLOWS)


def test_error_if_nonfinite_under_a_scaler_raises_and_leaves_everything(backend):
    """Asked to raise, it raises: there is no silent third way."""
    problem = Problem()
    opt = fastloop.AdamW(problem.params, backend=backend, max_grad_norm=1.0, error_if_nonfinite=True)
    scaler = fastloop.GradScaler("cpu", **SCALER)
    problem.backward(scaler, 2, overflow=True)
    before = [bits(p) for p in problem.params]
    with pytest.raises(RuntimeError, match=r"(non-?|not )finite"):
        scaler.step(opt)
    assert [bits(p) for p in problem.params] == before


@pytest.mark.parametrize("clip", [None, math.inf, 0.1])
@every_optimizer
def test_a_scaled_step_goes_the_way_of_a_plain_one(name, clip, backend, monkeypatch):
    """No second look at the settings, no new plan: a loop divides accumulated gradients at almost every step."""
    if backend == "reference":
        pytest.skip("the reference looks at everything at every step; this needs kernels")
    problem = Problem()
    opt = make(name, problem.params, backend=backend, max_grad_norm=clip, **example(name))
    for p in problem.params:
        p.grad = values(p.shape)
    opt.step()
    plan = opt._plan
    monkeypatch.setattr(type(opt), "_step_slowly", lambda self: pytest.fail("the slow way"))
    for scale in (3.0, 3, 0.1, 1.0, torch.tensor(7.0), torch.tensor(0.7, dtype=torch.float64), torch.tensor([5.0])):
        opt.grad_scale = scale
        checked_step(opt)
        with opt.scaled_by(2.0):
            checked_step(opt)
        assert not hasattr(opt, "grad_scale"), "as torch's scaler leaves it"
    for found in (0.0, torch.tensor(0.0)):
        opt.grad_scale, opt.found_inf = 2.0, found
        checked_step(opt)
    before = bits_of(opt)
    for skipped, found in enumerate((True, 1.0, torch.tensor(1.0)), 1):
        opt.found_inf = found
        opt.step()
        assert bits_of(opt) == before
        assert opt.skipped_steps.item() == skipped
    del opt.grad_scale, opt.found_inf
    checked_step(opt)
    assert opt._plan is plan


@every_optimizer
def test_a_changed_setting_is_checked_in_a_scaled_step_too(name, backend):
    problem = Problem()
    opt = make(name, problem.params, backend=backend, max_grad_norm=1.0, **example(name))
    for p in problem.params:
        p.grad = values(p.shape)
    opt.grad_scale = 2.0
    checked_step(opt)
    before = bits_of(opt)
    opt.param_groups[0]["max_grad_norm"] = -1.0
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        opt.step()
    assert bits_of(opt) == before
    opt.param_groups[0]["max_grad_norm"] = 0.3
    checked_step(opt)


@every_optimizer
def test_a_scale_of_several_numbers_is_refused(name, backend):
    problem = Problem()
    opt = make(name, problem.params, backend=backend, max_grad_norm=1.0, **example(name))
    for p in problem.params:
        p.grad = values(p.shape)
    before = bits_of(opt)
    opt.grad_scale = torch.ones(2)
    with pytest.raises((RuntimeError, ValueError), match=r"one element|2 elements"):
        opt.step()
    assert [b[0] for b in bits_of(opt)] == [b[0] for b in before]


@every_scaler
def test_fp16_gradients(scaler_class, backend):
    """torch's scaler refuses to unscale_ fp16 gradients; in registers nothing is lost, so ours steps."""
    params = [torch.nn.Parameter(values((50,), torch.float16))]
    opt = fastloop.AdamW(params, backend=backend, max_grad_norm=1.0, master_weights=True)
    scaler = scaler_class("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    params[0].grad = values((50,), torch.float16) * 16
    if scaler_class is torch.amp.GradScaler:
        opt.grad_scale, opt.found_inf = torch.tensor(256.0), torch.tensor(0.0)
        checked_step(opt)
    else:
        scaler.step(opt)
        scaler.update()
        assert opt.skipped_steps.item() == 0
        assert opt.state[params[0]]["step"].item() == 1
