# SPDX-License-Identifier: Apache-2.0
"""What a drop-in for torch.optim has to honour: the places where a replacement goes wrong silently."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import signal
import threading
import warnings

import pytest
import torch
from cases import CASES
from support import (
    bits,
    bits_of,
    checked_step,
    digest,
    example,
    make,
    number,
    parameters,
    set_grads,
    threads,
    torch_class,
    torch_twin,
    training_step,
    values,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

every_optimizer = pytest.mark.parametrize("name", CASES)
ADAMS = [name for name, case in CASES.items() if "betas" in case.defaults]
OURS = {"max_grad_norm", "max_grad_value", "error_if_nonfinite", "norm_group", "ema_decay", "state_dtype",
        "master_weights", "zero_grads", "backend"}  # fmt: skip


def model_and_optimizer(name, backend, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)
    return model, make(name, model.parameters(), backend=backend, **(example(name) | {"lr": 0.01} | settings))


def backward(model, seed=0):
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    loss = model(torch.randn(16, 6).to(dtype)).square().mean()
    loss.backward()
    return loss


def train(model, opt, count, first=0):
    for seed in range(first, first + count):
        backward(model, seed)
        opt.step()


# -- 1. hooks and profiler records ---------------------------------------------------------------------------


@every_optimizer
def test_hooks_fire_once_per_step(name, backend):
    model, opt = model_and_optimizer(name, backend)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    everywhere = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        backward(model)
        opt.step()
    finally:
        for handle in everywhere:
            handle.remove()
    assert sorted(calls) == ["global post", "global pre", "post", "pre"]


@every_optimizer
def test_a_hook_may_change_gradients(name, backend):
    """What the step uses is what the gradients are after the hooks, not before."""

    def zero_gradients(opt, args, kwargs):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad.zero_()

    outcomes = []
    for hooked in (True, False):
        model, opt = model_and_optimizer(name, backend, max_grad_norm=1.0)
        train(model, opt, 1)
        backward(model)
        if hooked:
            opt.register_step_pre_hook(zero_gradients)
        else:
            zero_gradients(opt, (), {})
        opt.step()
        outcomes.append(bits_of(opt))
    assert outcomes[0] == outcomes[1]


@every_optimizer
def test_state_dict_hooks(name, backend):
    model, opt = model_and_optimizer(name, backend)
    train(model, opt, 1)
    seen = []
    opt.register_state_dict_pre_hook(lambda opt: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda opt, state: seen.append("save post"))
    opt.register_load_state_dict_pre_hook(lambda opt, state: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda opt: seen.append("load post"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save pre", "save post", "load pre", "load post"]


@every_optimizer
def test_the_profiler_sees_one_record_per_step(name, backend):
    model, opt = model_and_optimizer(name, backend)
    train(model, opt, 1)
    backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.step()
    records = [event for event in profile.events() if event.name == f"Optimizer.step#{name}.step"]
    assert len(records) == 2


def test_subclasses_are_profiled_under_their_own_name(backend):
    import fastloop

    class Mine(fastloop.AdamW):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    p = torch.nn.Parameter(values((3,)))
    opt = Mine([p], backend=backend)
    p.grad = values((3,))
    opt.step()
    assert opt.calls == 1
    assert repr(opt).startswith("Mine (")
    assert opt.state[p]["step"].item() == 1


# -- 2. strides: test_numerics -------------------------------------------------------------------------------
# -- 3. pickle and deepcopy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first step", "between steps"])
@every_optimizer
def test_pickled_optimizer_and_model_continue_bitwise(name, when, backend):
    model, opt = model_and_optimizer(name, backend, max_grad_norm=0.1, ema_decay=0.9)
    if when == "between steps":
        train(model, opt, 2)
    for duplicate in (lambda pair: pickle.loads(pickle.dumps(pair)), copy.deepcopy):
        other_model, other = duplicate((model, opt))
        assert type(other) is type(opt)
        assert other.param_groups[0]["params"][0] is next(other_model.parameters())
        base_model, base = copy.deepcopy((model, opt))
        train(other_model, other, 2, first=7)
        train(base_model, base, 2, first=7)
        assert bits_of(other) == bits_of(base)
    train(model, opt, 2, first=7)
    assert bits_of(opt) == bits_of(other)


@every_optimizer
def test_a_copy_is_independent_of_its_original(name, backend):
    model, opt = model_and_optimizer(name, backend)
    train(model, opt, 2)
    _, other = copy.deepcopy((model, opt))
    before = bits_of(other)
    train(model, opt, 2)
    assert bits_of(other) == before


@every_optimizer
def test_an_object_without_our_private_attributes_steps(name, backend):
    """What unpickling an optimizer of an earlier version makes: defaults, state and param_groups, no more."""
    model, opt = model_and_optimizer(name, backend)
    train(model, opt, 1)
    bare = type(opt).__new__(type(opt))
    bare.__setstate__({"defaults": opt.defaults, "state": opt.state, "param_groups": opt.param_groups})
    backward(model)
    checked_step(bare)


# -- 4. GradScaler: test_scaler ------------------------------------------------------------------------------


@every_optimizer
def test_amp_attributes(name, backend):
    _, opt = model_and_optimizer(name, backend)
    assert opt._step_supports_amp_scaling is True
    assert "grad_scaler" not in inspect.signature(opt.step).parameters


# -- 5. schedulers -------------------------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda i: 1 / (1 + i)),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], milestones=[2]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every_optimizer
def test_schedulers(name, scheduler, backend):
    """Every hyperparameter is read anew; OneCycleLR and CyclicLR rewrite betas or momentum too."""
    params = parameters(((5, 3), (4,)))
    opt = make(name, params, backend=backend, **(example(name) | {"lr": 0.02}))
    theirs = torch_class(name)(parameters(((5, 3), (4,))), **(example(name) | {"lr": 0.02}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" and its like
        schedule, their_schedule = SCHEDULERS[scheduler](opt), SCHEDULERS[scheduler](theirs)
        seen = set()
        for _ in range(5):
            set_grads(params)
            set_grads(theirs.param_groups[0]["params"])
            checked_step(opt)
            theirs.step()
            schedule.step()
            their_schedule.step()
            group, their_group = opt.param_groups[0], theirs.param_groups[0]
            assert {k: group[k] for k in CASES[name].defaults} == {k: their_group[k] for k in CASES[name].defaults}
            seen.add((number(group["lr"]), group.get("betas"), group.get("momentum")))
    assert len(seen) > 2


@every_optimizer
def test_reduce_on_plateau_and_a_scheduler_checkpoint(name, backend):
    params = parameters(((5, 3),))
    opt = make(name, params, backend=backend, lr=0.5)
    plateau = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for loss in (1.0, 2.0, 3.0):
        set_grads(params)
        checked_step(opt)
        plateau.step(loss)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.005)


@every_optimizer
def test_step_is_a_plain_python_method(name, backend):
    _, opt = model_and_optimizer(name, backend)
    assert inspect.isfunction(opt.step.__func__)
    assert list(inspect.signature(opt.step).parameters) == ["closure"]


# -- 6. state appears at the first step ----------------------------------------------------------------------


@every_optimizer
def test_state_appears_at_the_first_step(name, backend):
    model, opt = model_and_optimizer(name, backend, ema_decay=0.9)
    assert len(opt.state) == 0
    assert opt.state_dict()["state"] == {}
    backward(model)
    opt.step()
    assert set(opt.state) == set(model.parameters())


@every_optimizer
def test_a_step_with_lr_0_and_zero_gradients_makes_the_state_and_changes_nothing(name, backend):
    """How torch.distributed.checkpoint's set_state_dict initializes an optimizer."""
    model, opt = model_and_optimizer(name, backend, max_grad_norm=1.0, lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [bits(p) for p in model.parameters()]
    opt.step(closure=None)
    assert [bits(p) for p in model.parameters()] == before
    assert set(opt.state) == set(model.parameters())


@every_optimizer
def test_distributed_checkpoint_state_dict_helpers(name, backend):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, opt = model_and_optimizer(name, backend, max_grad_norm=1.0)
    train(model, opt, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    weights = copy.deepcopy(model.state_dict())
    other_model, other = model_and_optimizer(name, backend, max_grad_norm=1.0)
    other_model.load_state_dict(weights)
    set_optimizer_state_dict(other_model, other, saved)
    for pair in ((model, opt), (other_model, other)):
        train(*pair, 2, first=9)
    assert bits_of(other) == bits_of(opt)


# -- 7. the step counter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAMS)
def test_step_follows_the_default_dtype(name, backend):
    torch.set_default_dtype(torch.float64)
    p = torch.nn.Parameter(values((3,)))
    opt = make(name, [p], backend=backend)
    p.grad = values((3,))
    opt.step()
    assert opt.state[p]["step"].dtype == torch.float64
    assert opt.state[p]["step"].dim() == 0


@pytest.mark.parametrize("as_number", [float, int], ids=["float", "int"])
@pytest.mark.parametrize("name", ADAMS)
def test_loading_a_step_that_is_a_plain_number(name, as_number, backend):
    model, opt = model_and_optimizer(name, backend)
    train(model, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = as_number(state["step"].item())
    other_model = copy.deepcopy(model)
    other = make(name, other_model.parameters(), backend=backend, **(example(name) | {"lr": 0.01}))
    other.load_state_dict(saved)
    for state in other.state.values():
        assert bits(state["step"]) == bits(torch.tensor(3.0))
    train(model, opt, 1, first=5)
    train(other_model, other, 1, first=5)
    assert bits_of(other) == bits_of(opt)


# -- 8. defaults, groups, representation ---------------------------------------------------------------------


@every_optimizer
def test_defaults_are_torchs_and_ours(name, backend):
    _, opt = model_and_optimizer(name, backend)
    plain = make(name, parameters(((3,),)), backend=backend)
    theirs = torch_class(name)(parameters(((3,),)))
    for own, their in ((plain.defaults, theirs.defaults), (plain.param_groups[0], theirs.param_groups[0])):
        assert {k: own[k] for k in their if k != "params"} == {k: their[k] for k in their if k != "params"}
        extra = own.keys() - their.keys()
        assert extra <= OURS | {"skipped_steps"}, extra
    assert {"max_grad_norm"} <= opt.param_groups[0].keys()


@every_optimizer
def test_positional_arguments_are_torchs(name, backend):
    theirs = inspect.signature(torch_class(name).__init__).parameters
    positional = [p for p in theirs.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][2:]
    given = [{"lr": 0.25, "betas": (0.5, 0.75)}.get(p.name, p.default) for p in positional]
    opt = make(name, parameters(((3,),)), backend=backend)
    opt = type(opt)(parameters(((3,),)), *given)
    assert [opt.param_groups[0][p.name] for p in positional] == given


@every_optimizer
def test_repr_names_the_class_and_its_settings(name, backend):
    _, opt = model_and_optimizer(name, backend, lr=0.125)
    assert repr(opt).startswith(f"{name} (\nParameter Group 0\n")
    assert "    lr: 0.125\n" in repr(opt)


def test_adamw_forces_decoupled_weight_decay_and_adam_respects_it(backend):
    params = parameters(((3,),))
    for name, loaded, wanted in (("AdamW", False, True), ("Adam", True, True), ("Adam", False, False)):
        opt = make(name, params, backend=backend)
        saved = opt.state_dict()
        saved["param_groups"][0]["decoupled_weight_decay"] = loaded
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["decoupled_weight_decay"] is wanted
        del saved["param_groups"][0]["decoupled_weight_decay"]  # a checkpoint of an earlier torch
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["decoupled_weight_decay"] is (name == "AdamW")


@every_optimizer
def test_setstate_fills_in_what_an_old_checkpoint_lacks(name, backend):
    model, opt = model_and_optimizer(name, backend, max_grad_norm=0.5)
    train(model, opt, 2)
    saved = opt.state_dict()
    keep = {"lr", "betas", "eps", "weight_decay", "momentum", "dampening", "params"}
    saved["param_groups"] = [{k: v for k, v in saved["param_groups"][0].items() if k in keep}]
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert group["maximize"] is False
    assert group["max_grad_norm"] == 0.5, "our settings come from the constructor"
    backward(model)
    checked_step(opt)


@every_optimizer
def test_named_parameters_keep_their_names(name, backend):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    opt = make(name, model.named_parameters(), backend=backend)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    for p in model.parameters():
        p.grad = values(p.shape)
    checked_step(opt)
    saved = opt.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]


@every_optimizer
def test_closures(name, backend):
    model, opt = model_and_optimizer(name, backend)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        return backward(model)

    with torch.no_grad():
        loss = opt.step(closure)
    assert isinstance(loss, torch.Tensor)
    assert len(calls) == 1
    assert opt.step() is None


@every_optimizer
def test_the_gradient_of_the_closure_is_the_one_that_is_used(name, backend):
    p = torch.nn.Parameter(values((4,)))
    opt = make(name, [p], backend=backend, **example(name))
    p.grad = torch.full((4,), 1e6)

    def closure():
        p.grad = torch.zeros(4)
        return 0.0

    opt.step(closure)
    for key in CASES[name].states:
        assert opt.state[p][key].abs().max() < 10


@every_optimizer
def test_zero_grad(name, backend):
    model, opt = model_and_optimizer(name, backend)
    backward(model)
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# -- 9. differentiable ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "reference"])
@every_optimizer
def test_differentiable_through_the_step(name, choice):
    """d loss(p after the step) / d p, lr, weight_decay as through torch's own."""
    torch.set_default_dtype(torch.float64)  # torch computes bias corrections in the dtype of its step counter

    def outer_gradients(build):
        torch.manual_seed(0)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        decay = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        leaf = values((5,), torch.float64).requires_grad_()
        p = leaf.clone()
        opt = build([p], lr, decay)
        p.grad = (leaf**3).clone()
        opt.step()
        return torch.autograd.grad((p**2).sum(), [leaf, lr, decay], allow_unused=True)

    settings = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    ours = outer_gradients(
        lambda p, lr, wd: make(name, p, lr=lr, weight_decay=wd, differentiable=True, backend=choice, **settings)
    )
    theirs = outer_gradients(
        lambda p, lr, wd: torch_class(name)(p, lr=lr, weight_decay=wd, differentiable=True, **settings)
    )
    assert [their is not None for their in theirs] == [True, True, name != "SGD"], "torch's SGD drops one"
    for own, their in zip(ours, theirs, strict=True):
        if their is not None:
            assert their.abs().max() > 0
            torch.testing.assert_close(own, their, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("name", ADAMS)
def test_differentiable_betas(name, choice):
    def outer_gradients(build):
        torch.manual_seed(0)
        betas = tuple(torch.tensor(b, dtype=torch.float64, requires_grad=True) for b in (0.6, 0.7))
        leaf = values((5,), torch.float64).requires_grad_()
        p = leaf.clone()
        opt = build([p], betas)
        for scale in (1.0, 2.0):
            p.grad = (leaf**3).clone() * scale
            opt.step()
        return torch.autograd.grad((p**2).sum(), [leaf, *betas])

    ours = outer_gradients(lambda p, betas: make(name, p, lr=0.1, betas=betas, differentiable=True, backend=choice))
    theirs = outer_gradients(lambda p, betas: torch_class(name)(p, lr=0.1, betas=betas, differentiable=True))
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-9, atol=1e-12)


def test_differentiable_needs_the_reference_backend():
    p = torch.nn.Parameter(values((3,)))
    p.grad = values((3,))
    with pytest.raises((RuntimeError, ValueError), match="differentiable"):
        make("AdamW", [p], differentiable=True, backend="cpu").step()


@every_optimizer
def test_a_step_outside_no_grad_leaves_leaves_alone(name, backend):
    model, opt = model_and_optimizer(name, backend)
    train(model, opt, 2)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in model.parameters())
    assert all(not v.requires_grad for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor))


# -- 10. clipping: test_clip ---------------------------------------------------------------------------------
# -- 11. names -----------------------------------------------------------------------------------------------


@every_optimizer
def test_real_subclasses_with_torchs_names(name):
    import fastloop

    cls = getattr(fastloop, name)
    assert cls.__name__ == name
    assert cls.__qualname__ == name
    assert issubclass(cls, torch.optim.Optimizer)


# -- 12. others touch the same parameters --------------------------------------------------------------------


@every_optimizer
def test_another_optimizer_between_our_steps(name, backend):
    params = parameters(((5, 3), (4,)))
    ours = make(name, params, backend=backend, **example(name))
    other = make(name, params, backend=backend, **example(name))
    theirs = torch.optim.SGD(params, lr=0.1)
    for _ in range(2):
        for opt in (ours, other):
            set_grads(params)
            checked_step(opt)
        theirs.step()
        with torch.no_grad():
            params[0].mul_(0.5)
            ours.state[params[0]][CASES[name].states[0]].mul_(0.5)


@every_optimizer
def test_states_replaced_from_outside_are_used(name, backend):
    params = parameters(((5, 3), (4,)))
    opt = make(name, params, backend=backend, **example(name))
    set_grads(params)
    checked_step(opt)
    key = CASES[name].states[0]
    opt.state[params[0]][key] = values((5, 3))
    opt.state[params[1]] = {k: v.clone() for k, v in opt.state[params[1]].items()}
    set_grads(params)
    checked_step(opt)


@every_optimizer
def test_a_state_that_was_cleared_begins_anew(name, backend):
    params = parameters(((5, 3), (4,)))
    opt = make(name, params, backend=backend, **example(name))
    set_grads(params)
    checked_step(opt)
    opt.state.clear()
    set_grads(params)
    checked_step(opt)


@every_optimizer
def test_a_step_counter_set_from_outside_counts(name, backend):
    params = parameters(((5, 3), (4,)))
    opt = make(name, params, backend=backend, **example(name))
    set_grads(params)
    checked_step(opt)
    for state in opt.state.values():
        if "step" in state:
            state["step"].fill_(41)
    set_grads(params)
    checked_step(opt)


# -- exchange of state_dicts with torch ----------------------------------------------------------------------


EXCHANGES = [
    pytest.param(name, dict(settings), id=f"{name}-{label}")
    for name, case in CASES.items()
    for label, settings in case.settings.items()
    if case.torch_name and label != "no_lr"
]


@pytest.mark.parametrize(("name", "settings"), EXCHANGES)
def test_a_checkpoint_of_torchs_continues_with_ours(name, settings, backend):
    theirs = torch_class(name)(parameters(), **settings)
    params = theirs.param_groups[0]["params"]
    for _ in range(3):
        set_grads(params)
        theirs.step()
    ours = make(name, params, backend=backend, **settings)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        set_grads(params)
        checked_step(ours)
    for p in params:
        if "step" in ours.state[p]:
            assert ours.state[p]["step"].item() == 6


@pytest.mark.parametrize(("name", "settings"), EXCHANGES)
def test_a_checkpoint_of_ours_continues_with_torchs(name, settings, backend):
    ours = make(name, parameters(), backend=backend, **settings)
    params = ours.param_groups[0]["params"]
    for _ in range(3):
        set_grads(params)
        checked_step(ours)
    theirs = torch_class(name)(params, foreach=False, **settings)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        set_grads(params)
        checked_step(theirs)


@every_optimizer
def test_state_dicts_have_torchs_keys(name, backend):
    model, opt = model_and_optimizer(name, backend)
    train(model, opt, 2)
    theirs = torch_twin(opt, example(name))
    set_grads(theirs.param_groups[0]["params"])
    theirs.step()
    own, their = opt.state_dict(), theirs.state_dict()
    assert own.keys() == their.keys()
    assert own["state"].keys() == their["state"].keys()
    for i in their["state"]:
        assert own["state"][i].keys() == their["state"][i].keys()
        for key, value in their["state"][i].items():
            assert own["state"][i][key].dtype == value.dtype
            assert own["state"][i][key].shape == value.shape
    assert own["param_groups"][0].keys() >= their["param_groups"][0].keys()


@every_optimizer
def test_states_have_the_strides_of_their_parameters(name, backend):
    """As torch's zeros_like(preserve_format): a checkpoint moves between the two without surprises."""
    p = torch.nn.Parameter(values((4, 3, 5, 6)).to(memory_format=torch.channels_last))
    opt = make(name, [p], backend=backend, **example(name))
    p.grad = values((4, 3, 5, 6)).to(memory_format=torch.channels_last)
    checked_step(opt)
    for key in CASES[name].states:
        assert opt.state[p][key].stride() == p.stride()


@every_optimizer
def test_a_checkpoint_that_went_through_a_file_with_weights_only(name, backend, tmp_path):
    model, opt = model_and_optimizer(name, backend, max_grad_norm=0.5, ema_decay=0.9, state_dtype=torch.float32)
    train(model, opt, 2)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other_model, other = model_and_optimizer(name, backend, max_grad_norm=0.5, ema_decay=0.9, state_dtype=torch.float32)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(model, opt, 2, first=4)
    train(other_model, other, 2, first=4)
    assert bits_of(other) == bits_of(opt)
    assert bits(other.skipped_steps) == bits(opt.skipped_steps)


@every_optimizer
def test_skipped_steps_are_saved_in_the_first_group(name, backend):
    model, opt = model_and_optimizer(name, backend, max_grad_norm=0.5)
    backward(model)
    next(model.parameters()).grad.view(-1)[0] = float("nan")
    opt.step()
    saved = opt.state_dict()
    assert bits(saved["param_groups"][0]["skipped_steps"]) == bits(torch.tensor(1, dtype=torch.int64))
    _, other = model_and_optimizer(name, backend, max_grad_norm=0.5)
    other.load_state_dict(saved)
    assert other.skipped_steps.item() == 1
    assert other.skipped_steps.dtype == torch.int64


@every_optimizer
def test_load_state_dict_refuses_what_torch_refuses(name, backend):
    _, opt = model_and_optimizer(name, backend)
    other = make(name, parameters(((3,),)), backend=backend)
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(other.state_dict())


@every_optimizer
def test_steps_after_loading_leave_the_loaded_checkpoint_as_it_was(name, backend):
    """Where torch's load copies, so must ours: an optimizer may not train on inside somebody's checkpoint."""
    model, opt = model_and_optimizer(name, backend, max_grad_norm=0.5)
    train(model, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    skipped = saved["param_groups"][0]["skipped_steps"]
    other_model = copy.deepcopy(model)
    other = make(name, other_model.parameters(), backend=backend, max_grad_norm=0.5, **example(name))
    other.load_state_dict(saved)
    backward(other_model)
    next(other_model.parameters()).grad.view(-1)[0] = float("nan")
    other.step()
    assert other.skipped_steps.item() == 1
    assert skipped.item() == 0


# -- torch.compile, fork, threads ----------------------------------------------------------------------------


@pytest.mark.slow
@every_optimizer
def test_a_compiled_training_step_does_not_crash_or_recompile_per_step(name, backend):
    model, opt = model_and_optimizer(name, backend, max_grad_norm=1.0)
    eager_model, eager = model_and_optimizer(name, backend, max_grad_norm=1.0)
    compilations = []

    def compiler(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(training_step(model, opt), backend=compiler)
    counts = []
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(16, 6)
        compiled(x)
        counts.append(len(compilations))
        backward(eager_model, seed)
        eager.step()
    assert counts[-1] == counts[2], f"graphs compiled after each step: {counts}"
    assert opt.state[next(model.parameters())].get("step", torch.tensor(6.0)).item() == 6
    for p, q in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("child_threads", [1, 2])
@every_optimizer
def test_a_forked_child_steps(name, child_threads, backend):
    """The parent's OpenMP threads do not exist in the child; one that hangs is killed after a minute."""
    if backend == "reference" and child_threads > 1:
        pytest.skip("torch's own operators hang in a forked child with more than one thread")
    with threads(2):
        params = parameters(((300_000,), (5,)))
        opt = make(name, params, backend=backend, max_grad_norm=1.0, **example(name))
        set_grads(params)
        opt.step()  # the parent's threads are running now
        set_grads(params)
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking a process with threads is the point
            child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(child_threads)
                opt.step()
                torch.set_num_threads(1)  # what follows are torch's own operators
                os.write(write, digest(opt).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        killer = threading.Timer(60, os.kill, (child, signal.SIGKILL))
        killer.start()
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        killer.cancel()
        assert os.waitstatus_to_exitcode(status) == 0
        opt.step()  # what the parent computes from the same start
        assert answer == digest(opt)


@every_optimizer
def test_two_optimizers_step_in_two_threads(name, backend):
    def run(seed, results):
        generator = torch.Generator().manual_seed(seed)
        p = torch.nn.Parameter(torch.randn(100_000, generator=generator))
        opt = make(name, [p], backend=backend, max_grad_norm=1.0, ema_decay=0.9, **example(name))
        for _ in range(10):
            p.grad = torch.randn(100_000, generator=generator)
            opt.step()
        results[seed] = bits_of(opt)

    alone: dict = {}
    for seed in (1, 2):
        run(seed, alone)
    together: dict = {}
    workers = [threading.Thread(target=run, args=(seed, together)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert together == alone


@every_optimizer
def test_optimizer_in_backward_hooks(name, backend):
    """One optimizer per parameter, stepped from post-accumulate hooks while backward runs."""
    model, _ = model_and_optimizer(name, backend)
    settings = example(name) | {"lr": 0.01}
    optimizers = {p: make(name, [p], backend=backend, **settings) for p in model.parameters()}

    def step_now(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    plain_model, plain = model_and_optimizer(name, backend)
    for seed in range(3):
        backward(model, seed)
        backward(plain_model, seed)
        plain.step()
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in plain_model.parameters()]


@every_optimizer
def test_swa_and_averaged_models(name, backend):
    model, opt = model_and_optimizer(name, backend)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    swa = torch.optim.swa_utils.SWALR(opt, swa_lr=0.05)
    for seed in range(3):
        backward(model, seed)
        checked_step(opt)
        averaged.update_parameters(model)
        swa.step()
    assert averaged.n_averaged.item() == 3


@every_optimizer
def test_a_training_run_gives_torchs_losses(name, backend):
    """The loss curve of a whole run, in float64, where what roundings compound to is below 1e-10."""
    model, opt = model_and_optimizer(name, backend, dtype=torch.float64, maximize=False)
    twin_model = copy.deepcopy(model)
    twin = torch_class(name)(twin_model.parameters(), **(example(name) | {"lr": 0.01, "maximize": False}))
    for seed in range(30):
        loss, twin_loss = backward(model, seed), backward(twin_model, seed)
        assert loss.item() == pytest.approx(twin_loss.item(), rel=1e-10)
        opt.step()
        twin.step()
