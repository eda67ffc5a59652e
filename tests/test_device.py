# SPDX-License-Identifier: Apache-2.0
"""What a step asks of a device: launches, copies, tables. On emulated and interpreted kernels, without a GPU."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from cases import CASES
from support import bits_of, checked_step, example, make, parameters, set_grads, values

import fastloop
from fastloop.ops import cuda
from fastloop.ops.backends import device_kernels
from fastloop.ops.native import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU = torch.device("cpu")


@pytest.fixture(params=("cuda", "triton"))
def device_backend(request):
    status = fastloop.backends()[request.param]
    if torch.cuda.is_available() or not status["available"]:
        pytest.skip(f"no emulated {request.param} kernels: {status['reason']}")
    return request.param


def many(count, groups=1, dtype=torch.float32):
    params = [torch.nn.Parameter(torch.randn(3, dtype=dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return [{"params": params[i::groups], "lr": 1e-3 * (i + 1)} for i in range(groups)]


def counted(opt):
    with fastloop.count_launches() as n:
        opt.step()
    return n.launches, n.copies


# -- launches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize("count", [10, 100, 10_000])
def test_two_launches_whatever_the_number_of_tensors_and_groups(count, groups, device_backend):
    if device_backend == "triton" and count > 1000:
        pytest.skip("interpreting ten thousand tensors takes a minute; the plan is the one that cuda's test counts")
    opt = fastloop.AdamW(many(count, groups), max_grad_norm=1.0, backend=device_backend)
    opt.step()
    opt.step()
    assert counted(opt) == (2, 0)
    for p in itertools.chain.from_iterable(group["params"] for group in opt.param_groups):
        p.grad = torch.randn_like(p)
    launches, copies = counted(opt)
    assert launches == 2
    fits = device_backend == "cuda" and count <= 3000  # in the norm launch's own parameters
    assert copies == (0 if fits else 1)
    assert counted(opt) == (2, 0)


def test_a_single_tensor(device_backend):
    opt = fastloop.AdamW(many(1), max_grad_norm=1.0, backend=device_backend)
    opt.step()
    assert counted(opt) == (2, 0)


def test_two_launches_for_each_combination_of_dtypes(device_backend):
    params = [torch.nn.Parameter(torch.randn(5, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 3]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = fastloop.AdamW(params, max_grad_norm=1.0, backend=device_backend)
    opt.step()
    assert counted(opt) == (4, 0)


def test_without_a_norm_one_launch_and_two_when_something_changed(device_backend):
    opt = fastloop.AdamW(many(7), backend=device_backend)
    opt.step()
    assert counted(opt) == (1, 0)
    opt.param_groups[0]["lr"] = 1e-4
    assert counted(opt) == ((2, 0) if device_backend == "cuda" else (1, 1))
    assert counted(opt) == (1, 0)


def test_counting_nests_and_the_cpu_counts_nothing():
    opt = fastloop.AdamW(many(3), max_grad_norm=1.0, backend="cpu")
    with fastloop.count_launches() as outer:
        assert counted(opt) == (0, 0)
    assert (outer.launches, outer.copies) == (0, 0)


def test_a_tensor_lr_is_read_by_the_device_and_changes_without_a_copy(device_backend):
    params = parameters([(9,), (4, 5)])
    lr = torch.tensor(1e-2)
    opt = fastloop.AdamW(params, lr=lr, max_grad_norm=1.0, backend=device_backend)
    set_grads(params)
    checked_step(opt)
    lr.fill_(3e-3)
    assert counted(opt) == (2, 0)
    lr.fill_(7e-3)
    checked_step(opt)


# -- tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_device_kernels_serve_what_the_cpu_kernels_serve(backend):
    """Every rule and combination of storage types: the plan asks the CPU's table for both."""
    if torch.cuda.is_available() or not fastloop.backends()[backend]["available"]:
        pytest.skip("needs the emulated or interpreted kernels")
    kernels = device_kernels(backend, CPU)
    for rule, info in native().rules().items():
        for param, grad, state in itertools.product(DTYPES, repeat=3):
            for master, ema in itertools.product((False, True), repeat=2):
                if info["states"] == 0 and state != (torch.float64 if param == torch.float64 else torch.float32):
                    continue  # no state, no dtype of it
                if master and param not in (torch.bfloat16, torch.float16):
                    continue
                wide = torch.float64 if param == torch.float64 else torch.float32
                tensor = torch.nn.Parameter(torch.zeros(3, dtype=param))
                tensor.grad_dtype = grad
                tensor.grad = torch.zeros(3, dtype=grad)
                states = [torch.zeros(3, dtype=state) for _ in range(info["states"])]
                plan = native().Plan([("lr", -1)] * info["hypers"], [])
                copies = [torch.zeros(3, dtype=wide) if wanted else None for wanted in (master, ema)]
                served = plan.add(tensor, tensor, rule, states, *copies, None, 0, 0)
                assert kernels.serves(rule, param, grad, state, master, ema) == served, (rule, param, grad, state)


def test_addresses_of_moved_gradients_reach_the_kernels_inline_and_by_copy(device_backend):
    for count in (5, 4200) if device_backend == "cuda" else (5,):
        opt = fastloop.SGD(many(count), lr=1.0, max_grad_norm=math.inf, backend=device_backend)
        opt.step()
        params = opt.param_groups[0]["params"]
        for _ in range(2):
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
            for p, old in zip(params, before, strict=True):
                assert torch.equal(p.detach(), old - 1.0 * p.grad * 1e-3)


def test_parameters_without_a_gradient_are_passed_over_without_a_new_plan(device_backend):
    params = parameters([(6,), (7,), (8,)])
    opt = make("AdamW", params, backend=device_backend, **example("AdamW"))
    set_grads(params)
    checked_step(opt)
    plan = opt._plan
    params[1].grad = None
    checked_step(opt)
    assert opt._plan is plan
    assert [int(opt.state[p]["step"]) for p in params] == [2, 1, 2]
    set_grads(params)
    checked_step(opt)
    assert opt._plan is plan


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_that_are_not_aligned(dtype, offset, device_backend):
    """Gradients that are views into one buffer, as DDP's buckets give them."""
    params = parameters([(2500,), (33,)], dtype)
    opt = make("AdamW", params, backend=device_backend, max_grad_norm=0.5, ema_decay=0.9)
    for _ in range(2):
        buffer = values((3000,), dtype)
        at = offset
        for p in params:
            p.grad = buffer[at : at + p.numel()].view_as(p)
            at += p.numel()
        checked_step(opt)


@pytest.mark.parametrize("name", CASES)
def test_tensors_of_every_length_around_a_round_of_a_block(name, device_backend):
    sizes = (1, 63, 64, 255, 256, 257, 511, 512, 513, 8191, 8192, 8193, 16400)
    params = parameters([(n,) for n in (sizes if device_backend == "cuda" else sizes[5:])])
    opt = make(name, params, backend=device_backend, max_grad_norm=0.1)
    for seed in range(2):
        set_grads(params, seed=seed)
        checked_step(opt)


def test_a_published_step_that_somebody_changed_wins(device_backend):
    params = parameters([(5,), (6,)])
    opt = fastloop.AdamW(params, backend=device_backend)
    set_grads(params)
    opt.step()
    opt.state[params[0]]["step"].fill_(41.0)
    checked_step(opt)
    assert [int(opt.state[p]["step"]) for p in params] == [42, 2]


def test_counts_beyond_what_a_float_counts(device_backend):
    """2^24 + 1 is no float32: the integer on the device goes on."""
    params = parameters([(5,)])
    opt = fastloop.AdamW(params, backend=device_backend)
    set_grads(params)
    opt.step()
    opt.state[params[0]]["step"].fill_(2.0**24)
    opt.step()
    opt.step()
    (count,) = opt._device_counts.values()
    assert int(count) == 2**24 + 2


def test_a_number_that_divides_the_gradients_travels_with_the_table(device_backend):
    """No tensor is made for it on the device; the bits are those of a tensor's."""
    outcomes = []
    for as_tensor in (False, True):
        torch.manual_seed(0)
        opt = make("AdamW", many(7, groups=2), backend=device_backend, **example("AdamW"))
        opt.step()
        told = (2, 0) if device_backend == "cuda" else (1, 1)
        for scale, first in ((3.0, told), (0.1, told), (1.0, told)):
            opt.grad_scale = torch.tensor(scale, dtype=torch.float64) if as_tensor else scale
            launches = counted(opt)
            if not as_tensor:
                assert launches == first, scale
            assert counted(opt) == (1, 0), "the second time nothing is new"
        outcomes.append(bits_of(opt))
    assert outcomes[0] == outcomes[1]


def test_a_rule_with_as_many_hyperparameters_as_a_row_has_words_is_refused():
    """The last word of the first row is where that number travels."""
    for hypers, refused in ((7, False), (8, True)):
        plan = native().Plan([("lr", -1)] * hypers, [], (1, 0))
        group = {"params": [], "lr": 0.1}
        plan.finish([group], {}, [])
        with pytest.raises(ValueError, match="too many hyperparameters") if refused else contextlib.nullcontext():
            plan.make_table([])


def test_a_norm_that_is_asked_for_later_under_error_if_nonfinite(device_backend):
    params = parameters([(5,), (2,)])
    opt = fastloop.AdamW(params, error_if_nonfinite=True, backend=device_backend)
    set_grads(params)
    checked_step(opt)
    assert opt.grad_norm is None
    opt.param_groups[0]["max_grad_norm"] = 0.1
    checked_step(opt)
    assert float(opt.grad_norm) > 0


# -- what stays on the device --------------------------------------------------------------------------------


def test_norm_and_skips_are_tensors_of_the_device(device_backend):
    params = parameters([(50,), (3,)])
    opt = fastloop.AdamW(params, max_grad_norm=1.0, backend=device_backend)
    set_grads(params)
    opt.step()
    norm = opt.grad_norm
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    params[0].grad[3] = math.nan
    before = bits_of(opt)
    opt.step()
    assert bits_of(opt) == before
    assert int(opt.skipped_steps) == 1
    assert float(opt.found_inf_of_last_step(CPU)) == 1.0
    assert float(norm) == pytest.approx(expected, rel=1e-6), "an earlier norm must not change"
    params[0].grad[3] = 0.0
    opt.step()
    assert float(opt.found_inf_of_last_step(CPU)) == 0.0
    assert int(opt.skipped_steps) == 1


def test_a_momentum_buffer_of_a_skipped_first_step_is_not_saved(device_backend):
    params = parameters([(5,)])
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "max_grad_norm": 1.0, "backend": device_backend}
    opt = fastloop.SGD(params, **settings)
    set_grads(params)
    params[0].grad[0] = math.inf
    opt.step()
    assert "momentum_buffer" not in opt.state_dict()["state"].get(0, {})
    set_grads(params)
    others = [p.detach().clone().requires_grad_() for p in params]
    others[0].grad = params[0].grad.clone()
    loaded = fastloop.SGD(others, **settings)
    loaded.load_state_dict(opt.state_dict())
    checked_step(loaded)  # the first one
    opt.step()  # and here, where the buffer is there and holds nothing
    assert torch.equal(params[0], others[0])
    assert "momentum_buffer" in opt.state_dict()["state"][0]


def test_an_error_that_was_asked_for_leaves_everything(device_backend):
    params = parameters([(5,), (2,)])
    opt = fastloop.AdamW(params, max_grad_norm=1.0, error_if_nonfinite=True, backend=device_backend)
    set_grads(params)
    checked_step(opt)
    params[1].grad[0] = math.nan
    before = bits_of(opt, skipped=True)
    with pytest.raises(RuntimeError, match="not finite"):
        opt.step()
    assert bits_of(opt, skipped=True) == before


def test_a_plan_made_anew_goes_on_counting(device_backend):
    params = parameters([(5,), (6,)])
    opt = fastloop.SGD(params[:1], lr=0.1, momentum=0.9, dampening=0.5, backend=device_backend)
    set_grads(params)
    checked_step(opt)
    opt.add_param_group({"params": params[1:]})
    checked_step(opt)
    assert [int(opt._device_counts[id(p)]) for p in params] == [2, 1]


# -- mixtures ------------------------------------------------------------------------------------------------


def test_parameters_that_no_kernel_serves_step_beside_those_on_the_device(device_backend):
    if device_backend != "cuda":
        pytest.skip("the same code, which cuda tests faster")
    params = [torch.nn.Parameter(values((6,))), torch.nn.Parameter(values((4, 6))[:, ::2])]  # one with gaps
    opt = fastloop.AdamW(params, max_grad_norm=0.5, backend="cuda")
    for seed in range(3):
        set_grads(params, seed=seed)
        checked_step(opt)
    params[1].grad[0, 0] = math.nan
    before = bits_of(opt)
    opt.step()
    assert bits_of(opt) == before
    assert int(opt.skipped_steps) == 1


def test_an_emulated_build_serves_the_cpu_alone_and_only_when_asked():
    if not cuda.is_emulated():
        pytest.skip("needs the emulated kernels")
    assert device_kernels("auto", CPU) is None
    assert device_kernels("cuda", torch.device("cuda", 0)) is None
    opt = fastloop.AdamW(many(2))
    opt.step()
    assert not opt._plan.on_device


# -- graphs, on the CPU: a capture is a step whose launches are kept instead of made ------------------------------


class Capture:
    """Keeps the launches and copies of a part, as a graph does, and makes them when it is replayed."""

    def __init__(self, part, monkeypatch):
        self.part, self.kept, self.active = part, [], False
        part._launches = [self._of(launches) for launches in part._launches]
        monkeypatch.setattr(part, "_capturing", lambda: self.active)

    def _of(self, launches):
        import ctypes

        capture = self

        class Recorded:
            def norm(self, words, n_words):
                # A kernel's parameters are part of the graph by value.
                kept = (ctypes.c_int64 * max(n_words, 1))()
                if n_words:
                    ctypes.memmove(kept, words, 8 * n_words)
                capture.do(lambda: launches.norm(ctypes.addressof(kept), n_words))

            def update(self, sums):
                capture.do(lambda: launches.update(sums))

        return Recorded()

    def do(self, action):
        self.kept.append(action) if self.active else action()

    def step(self, opt):
        """Captures one step."""
        self.kept, self.active = [], True
        opt.step()
        self.active = False
        return list(self.kept)


def sgd_over_a_part(monkeypatch, **settings):
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fastloop.SGD([p], lr=1.0, backend="cuda", **settings)
    p.grad = torch.ones(3)
    opt.step()
    return p, opt, Capture(opt._plan._devices[0], monkeypatch)


def needs_emulation():
    if not cuda.is_emulated():
        pytest.skip("needs the emulated kernels")


def test_an_eager_step_between_capture_and_replay_sees_its_own_gradients(monkeypatch):
    needs_emulation()
    p, opt, capture = sgd_over_a_part(monkeypatch)
    captured = p.grad = torch.full((3,), 10.0)
    graph = capture.step(opt)
    opt.step()
    assert p.tolist() == [-11.0] * 3
    p.grad = torch.full((3,), 100.0)
    opt.step()
    assert p.tolist() == [-111.0] * 3
    for launch in graph:
        launch()
    assert p.tolist() == [-121.0] * 3, "a replay uses what it captured"
    del captured
    opt.step()
    assert p.tolist() == [-221.0] * 3


def test_two_graphs_and_settings_of_their_own(monkeypatch):
    needs_emulation()
    p, opt, capture = sgd_over_a_part(monkeypatch, max_grad_norm=math.inf)
    graphs = []
    for value in (2.0, 3.0):
        p.grad = torch.full((3,), value)
        opt.param_groups[0]["lr"] = value
        graphs.append((p.grad, capture.step(opt)))
    wanted = -1.0
    for _, launches in (graphs[0], graphs[1], graphs[0]):
        for launch in launches:
            launch()
    wanted -= 4.0 + 9.0 + 4.0
    assert p.tolist() == [wanted] * 3
    opt.step()
    assert p.tolist() == [wanted - 9.0] * 3


def test_a_captured_plan_lives_as_long_as_its_optimizer(monkeypatch):
    needs_emulation()
    _, opt, capture = sgd_over_a_part(monkeypatch)
    capture.step(opt)
    plan = opt._plan
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert opt._captured_plans == (plan,)


def test_a_delivery_that_failed_is_made_by_the_next_step(monkeypatch):
    needs_emulation()
    p, opt, _ = sgd_over_a_part(monkeypatch, max_grad_norm=math.inf)
    part = opt._plan._devices[0]
    launches = part._launches

    class Broken:
        def norm(self, words, n_words):
            raise RuntimeError("out of memory")

    p.grad = torch.full((3,), 10.0)
    part._launches = [Broken()]
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step()
    part._launches = launches
    opt.step()
    assert p.tolist() == [-11.0] * 3


# -- zero_grads ----------------------------------------------------------------------------------------------


def test_gradients_in_another_layout_are_zeroed(device_backend):
    p = torch.nn.Parameter(torch.zeros(4, 6))
    opt = fastloop.SGD([p], lr=1.0, zero_grads=True, backend=device_backend)
    p.grad = torch.ones(6, 4).t()
    opt.step()
    assert torch.equal(p.detach(), -torch.ones(4, 6))
    assert float(p.grad.abs().sum()) == 0


def test_a_gradient_that_two_parameters_share_steps_both_and_is_zeroed(device_backend):
    params = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    opt = fastloop.SGD(params, lr=1.0, zero_grads=True, backend=device_backend)
    params[0].grad = params[1].grad = torch.ones(5)
    opt.step()
    assert all(torch.equal(p.detach(), -torch.ones(5)) for p in params)
    assert float(params[0].grad.sum()) == 0


def test_copies_of_gradients_are_dropped_with_the_step(device_backend):
    import weakref

    p = torch.nn.Parameter(torch.zeros(4, 6))
    opt = fastloop.SGD([p], lr=1.0, backend=device_backend)
    p.grad = torch.ones(6, 4).t()
    opt.step()
    gradient = weakref.ref(p.grad)
    p.grad = None
    assert gradient() is None
