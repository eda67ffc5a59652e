# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show, for both backends that have kernels for one: `make gpu` runs this file.

Values are held against the oracle on the CPU; what the machine did is read from torch.profiler and from torch's sync
debug mode. Elsewhere the same kernels run emulated and interpreted, in the tests that take the `backend` fixture.
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from cases import CASES
from mirror import mirror
from support import (
    SHAPES,
    bits,
    bits_of,
    checked_step,
    example,
    expected_state_dtype,
    make,
    parameters,
    torch_class,
    values,
)
from tolerances import norm_bound

import fastloop

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

every_optimizer = pytest.mark.parametrize("name", CASES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_setting = pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(name, settings, id=f"{name}-{label}")
        for name, case in CASES.items()
        for label, settings in case.settings.items()
    ],
)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """Every backend with kernels for this GPU; skipped, with its reason, where it is missing."""
    status = fastloop.backends()[request.param]
    if not status["available"]:
        pytest.skip(f"backend {request.param!r} is not available: {status['reason']}")
    return request.param


# -- tensors ---------------------------------------------------------------------------------------------------


def on_gpu(shapes=SHAPES, dtype=torch.float32, grad_dtype=None, device=DEVICE):
    params = [torch.nn.Parameter(p.detach().to(device)) for p in parameters(shapes, dtype)]
    if grad_dtype is not None:
        for p in params:
            p.grad_dtype = grad_dtype
    return params


def grads_of(params, scale=1.0, seed=None):
    """New gradients, on the CPU."""
    if seed is not None:
        torch.manual_seed(seed)
    return [values(p.shape, getattr(p, "grad_dtype", None) or p.dtype, scale) for p in params]


def set_grads(params, scale=1.0, seed=None):
    """New gradients in new memory."""
    for p, grad in zip(params, grads_of(params, scale, seed), strict=True):
        p.grad = grad.to(p.device)


def set_grads_in_place(params, scale=1.0, seed=None):
    """The same gradients where those of the last step are, without waiting for the device."""
    for p, grad in zip(params, grads_of(params, scale, seed), strict=True):
        p.grad.copy_(grad.pin_memory(), non_blocking=True)
    torch.cuda.synchronize()  # before the pinned memory goes


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def brought(tensor):
    return tensor.detach().cpu()


def checked(opt):
    """One step, held against the oracle."""
    return checked_step(mirror(opt, brought))


def steps(opt, count=3):
    """Steps held against the oracle, with gradients of changing size."""
    for i in range(count):
        set_grads(params_of(opt), scale=(1.0, 10.0, 0.1)[i % 3])
        checked(opt)


def twin_of(opt):
    """The same optimizer over copies of the parameters."""
    groups = []
    for group in opt.param_groups:
        own = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "skipped_steps")}
        params = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        groups.append({**own, "params": params})
    kept = ("error_if_nonfinite", "state_dtype", "master_weights", "zero_grads", "backend")
    return type(opt)(groups, **{key: opt.defaults[key] for key in kept})


def everything(opt):
    """Bit patterns of all that a step leaves behind."""
    return bits_of(opt), bits(opt.grad_norm), int(opt.skipped_steps)


@contextmanager
def without_sync():
    """An operation that waits for the device raises. Native calls are not seen: see the profiler tests below."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def busy(cycles=50_000_000):
    """Some tens of milliseconds of work in front of what comes next."""
    torch.cuda._sleep(cycles)


# -- values ----------------------------------------------------------------------------------------------------

STORAGE = {  # as in test_contract: parameter dtype, gradient dtype (None: the parameter's), arguments
    "fp32 with bf16 states": (torch.float32, None, {"state_dtype": torch.bfloat16}),
    "fp32 with bf16 gradients": (torch.float32, torch.bfloat16, {}),
    "fp32 with fp16 gradients": (torch.float32, torch.float16, {}),
    "bf16 with fp32 states": (torch.bfloat16, None, {"state_dtype": torch.float32}),
    "bf16 with fp32 gradients": (torch.bfloat16, torch.float32, {}),
    "bf16 with master weights": (torch.bfloat16, None, {"master_weights": True}),
    "bf16 with master weights and fp32 gradients": (torch.bfloat16, torch.float32, {"master_weights": True}),
    "fp16 with bf16 states": (torch.float16, None, {"state_dtype": torch.bfloat16}),
    "fp16 with fp32 gradients": (torch.float16, torch.float32, {}),
    "fp16 with master weights": (torch.float16, None, {"master_weights": True}),
    "fp64 with fp32 gradients": (torch.float64, torch.float32, {}),
}
OPTIONS = {
    "norm": {"max_grad_norm": 0.1},
    "norm measured": {"max_grad_norm": math.inf},
    "value": {"max_grad_value": 0.01},
    "ema": {"ema_decay": 0.99},
    "zero_grads": {"zero_grads": True},
    "all": {"max_grad_norm": 0.5, "max_grad_value": 0.02, "ema_decay": 0.9, "zero_grads": True},
}


@every_dtype
@every_setting
def test_a_step_is_within_the_bound_of_the_oracle(name, settings, dtype, backend):
    steps(make(name, on_gpu(dtype=dtype), backend=backend, **settings))


@pytest.mark.parametrize("storage", STORAGE)
@every_optimizer
def test_storage(name, storage, backend):
    dtype, grad_dtype, arguments = STORAGE[storage]
    params = on_gpu(dtype=dtype, grad_dtype=grad_dtype)
    opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, **arguments, **example(name))
    steps(opt)
    for p in params:
        for key in CASES[name].states:
            assert opt.state[p][key].dtype == expected_state_dtype(p, opt.defaults, key)
        assert all(value.device == p.device for value in opt.state[p].values())


@every_dtype
@pytest.mark.parametrize("options", OPTIONS)
@every_optimizer
def test_options(name, options, dtype, backend):
    steps(make(name, on_gpu(dtype=dtype), backend=backend, **OPTIONS[options], **example(name)))


@every_optimizer
def test_groups_and_dtypes_in_one_norm(name, backend):
    """Every dtype twice, with settings of its own; one group is left out of the norm."""
    groups = [
        {"params": on_gpu(dtype=dtype), "lr": 0.01 / (1 + i), "max_grad_norm": None if i == 5 else 0.5}
        for i, dtype in enumerate(DTYPES * 2)
    ]
    steps(make(name, groups, backend=backend, **example(name)))


LARGE = ((300_001,), (500, 37), (5,), (20_000,), (), (0,), (1 << 20,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_tensors_of_many_chunks_are_within_the_bound(name, dtype, backend):
    steps(make(name, on_gpu(LARGE, dtype), backend=backend, **OPTIONS["all"], **example(name)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_addresses_that_are_not_aligned(name, dtype, backend):
    """Parameters and gradients that begin one element into their memory, and end one before its end."""

    def inside(tensor):
        memory = torch.full((tensor.numel() + 2,), 7.0, dtype=dtype, device=DEVICE)
        return memory, memory[1:-1].view(tensor.shape).copy_(tensor)

    placed = [inside(p.detach()) for p in on_gpu(((4097,), (33, 65), (3,), (1 << 15,)), dtype)]
    params = [torch.nn.Parameter(view) for _, view in placed]
    opt = make(name, params, backend=backend, **OPTIONS["all"], **example(name))
    for seed in range(3):
        around = [inside(grad.to(DEVICE)) for grad in grads_of(params, seed=seed)]
        for p, (_, grad) in zip(params, around, strict=True):
            p.grad = grad
        checked(opt)
        for memory, _ in (*placed, *around):
            assert memory[0] == memory[-1] == 7.0


@every_optimizer
def test_strides_of_parameter_and_gradient(name, backend):
    """channels_last and transposed parameters, with gradients laid out otherwise, and gradients with gaps."""
    data = [
        values((4, 3, 5, 6)).to(memory_format=torch.channels_last).to(DEVICE),
        values((65, 33)).to(DEVICE).t(),
        values((6, 10)).to(DEVICE),
    ]
    opt = make(name, [torch.nn.Parameter(d) for d in data], backend=backend, max_grad_norm=0.5, **example(name))
    for _ in range(2):
        set_grads(params_of(opt))
        params_of(opt)[2].grad = values((6, 20)).to(DEVICE)[:, ::2]
        checked(opt)


@pytest.mark.parametrize("which", ["none", "some", "all"])
@every_optimizer
def test_parameters_without_a_gradient(name, which, backend):
    params = on_gpu()
    opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
    for step in range(3):
        set_grads(params)
        for i, p in enumerate(params):
            if which == "all" or (which == "some" and (i + step) % 3 == 0):
                p.grad = None
        checked(opt)


def test_what_no_kernel_serves_goes_to_the_reference():
    params = [torch.nn.Parameter(values((7,), torch.complex64).to(DEVICE)), *on_gpu()]
    opt = fastloop.AdamW(params, max_grad_norm=0.5)
    steps(opt)


@every_optimizer
def test_the_norm_is_that_of_the_cpu(name, backend):
    shapes = ((3_000_000,), (1000, 1001), (17,))
    params = on_gpu(shapes)
    count = sum(p.numel() for p in params)
    set_grads(params, scale=1e-3)
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    norms = []
    for where, used in ((DEVICE, backend), (torch.device("cpu"), "auto")):
        moved = [torch.nn.Parameter(p.detach().to(where)) for p in params]
        for p, q in zip(moved, params, strict=True):
            p.grad = q.grad.to(where)
        opt = make(name, moved, backend=used, max_grad_norm=1.0, **example(name))
        opt.step()
        assert opt.grad_norm.device.type == where.type
        norms.append(float(opt.grad_norm))
    for norm in norms:
        assert abs(norm - exact) <= norm_bound(count, torch.float32) * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_bitwise_the_same_from_run_to_run(name, dtype, backend):
    def trajectory(padding):
        kept = torch.empty(padding, device=DEVICE)  # other addresses
        torch.manual_seed(1)
        opt = make(name, on_gpu(LARGE, dtype), backend=backend, **OPTIONS["all"], **example(name))
        out = []
        for _ in range(3):
            set_grads(params_of(opt))
            opt.step()
            out.append(bits(opt.grad_norm))
        del kept
        return out, bits_of(opt)

    assert trajectory(1) == trajectory(1 << 22) == trajectory(12345)


@every_optimizer
def test_tensors_above_2_31_elements(name, backend):
    """Offsets that need more than 32 bits: only what has a gradient moves."""
    gc.collect()
    torch.cuda.empty_cache()
    moments = [key for key in CASES[name].states if key != "max_exp_avg_sq"]
    n = 2**31 + 3 * 8192 + 5
    needed = 2 * n * (2 + len(moments)) + n  # bf16, and a byte each to count what changed
    free, _ = torch.cuda.mem_get_info()
    if free < needed + 2**30:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory, has {free / 2**30:.0f}")
    settings = {"momentum": 0.9} if name == "SGD" else {}
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device=DEVICE))
    opt = make(name, [p], lr=1.0, weight_decay=0.0, max_grad_norm=1e9, backend=backend, **settings)
    p.grad = torch.zeros_like(p)
    touched = [0, 1, 8191, 8192, 2**31 - 1, 2**31, 2**31 + 8191, 2**31 + 8192, n - 2, n - 1]
    p.grad[touched] = torch.tensor([float(i + 1) for i in range(len(touched))], dtype=torch.bfloat16, device=DEVICE)
    opt.step()
    assert float(opt.grad_norm) == pytest.approx(math.sqrt(sum((i + 1) ** 2 for i in range(len(touched)))), rel=1e-6)
    small = torch.nn.Parameter(torch.zeros(len(touched), dtype=torch.bfloat16, device=DEVICE))
    other = make(name, [small], lr=1.0, weight_decay=0.0, max_grad_norm=1e9, backend=backend, **settings)
    small.grad = p.grad[touched].clone()
    other.step()
    assert bits(p.detach()[touched]) == bits(small)
    assert sum(int(torch.count_nonzero(part)) for part in p.detach().split(2**28)) == len(touched)
    for key in moments:
        assert bits(opt.state[p][key][touched]) == bits(other.state[small][key])


# -- skipped steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_dtype
@every_optimizer
def test_a_nonfinite_norm_skips_on_the_device(name, dtype, bad, backend):
    params = on_gpu(dtype=dtype)
    opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, **example(name))
    steps(opt, 2)
    set_grads(params)
    params[3].grad[1000] = bad
    checked(opt)
    assert not math.isfinite(float(opt.grad_norm))
    assert opt.skipped_steps.device.type == "cuda"
    assert int(opt.skipped_steps) == 1
    steps(opt, 2)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@every_optimizer
def test_found_inf_skips_on_the_device(name, clip, with_scale, backend):
    params = on_gpu()
    opt = make(name, params, backend=backend, max_grad_norm=clip, ema_decay=0.9, **example(name))
    steps(opt, 1)
    set_grads(params)
    opt.grad_scale = torch.tensor(4.0, device=DEVICE) if with_scale else None
    opt.found_inf = torch.tensor(1.0, device=DEVICE)
    checked(opt)
    opt.found_inf = torch.tensor(0.0, device=DEVICE)
    checked(opt)
    assert int(opt.skipped_steps) == 1


@every_optimizer
def test_a_skipped_first_step_leaves_the_next_one_the_first(name, backend):
    def run(skip_first):
        torch.manual_seed(2)
        params = on_gpu()
        opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, **example(name))
        if skip_first:
            set_grads(params, seed=3)
            params[0].grad[0, 0] = math.nan
            checked(opt)
        for seed in (4, 5):
            set_grads(params, seed=seed)
            opt.step()
        return bits_of(opt)

    assert run(skip_first=True) == run(skip_first=False)


@every_optimizer
def test_error_if_nonfinite_raises_and_leaves_everything(name, backend):
    params = on_gpu()
    opt = make(name, params, backend=backend, max_grad_norm=1.0, error_if_nonfinite=True, zero_grads=True,
               **example(name))  # fmt: skip
    steps(opt, 1)
    set_grads(params)
    params[0].grad[0, 0] = math.inf
    before = bits_of(opt, skipped=True)
    with pytest.raises(RuntimeError, match=rf"\[{name}\].*(non-?|not )finite"):
        opt.step()
    assert bits_of(opt, skipped=True) == before
    set_grads(params)
    checked(opt)


# -- loss scaling ------------------------------------------------------------------------------------------------


def scaled_training(name, scaler_class, backend, clip):
    torch.manual_seed(0)
    params = on_gpu(((33, 65), (7,), (2049,)), torch.float32)
    opt = make(name, params, backend=backend, max_grad_norm=clip, **example(name))
    scaler = scaler_class("cuda", init_scale=2.0**10, growth_interval=3)
    scales, results = [], []
    for step in range(8):
        torch.manual_seed(100 + step)
        wanted = grads_of(params)
        opt.zero_grad()
        loss = sum((p * w.to(DEVICE)).sum() for p, w in zip(params, wanted, strict=True))
        if step in (2, 5):
            loss = loss + params[0][0, 1] * 3e38
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        results.append(bits_of(opt, grads=False, skipped=True))
    return scales, results


@pytest.mark.parametrize("clip", [None, 1.0])
@every_optimizer
def test_both_scalers_agree_bitwise(name, clip, backend):
    ours = scaled_training(name, fastloop.GradScaler, backend, clip)
    torchs = scaled_training(name, torch.amp.GradScaler, backend, clip)
    assert ours[0] == torchs[0]
    assert ours[0][2] == 2.0**9
    assert ours[1] == torchs[1]


# -- nothing waits -----------------------------------------------------------------------------------------------


def fresh_grads(params):
    for p in params:
        p.grad = torch.randn_like(p)


def no_sync_plain(opt, params):
    return opt.step


def no_sync_moving(opt, params):
    kept = []

    def step():
        fresh_grads(params)
        kept.extend(p.grad for p in params)  # so that none gets its old address back
        opt.step()

    return step


def no_sync_scaler(opt, params):
    scaler = fastloop.GradScaler("cuda")
    scaler.scale(torch.zeros((), device=DEVICE))

    def step():
        scaler.step(opt)
        scaler.update()

    return step


def no_sync_scheduler(opt, params):
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch))

    def step():
        opt.step()
        scheduler.step()

    return step


def no_sync_device_lr(opt, params):
    lr = torch.tensor(0.01, device=DEVICE)
    for group in opt.param_groups:
        group["lr"] = lr

    def step():
        lr.mul_(0.9)
        opt.step()

    return step


def no_sync_amp(opt, params):
    scale, found = torch.tensor(8.0, device=DEVICE), torch.tensor(1.0, device=DEVICE)

    def step():
        opt.grad_scale, opt.found_inf = scale, found
        opt.step()
        found.sub_(1)
        del opt.grad_scale, opt.found_inf

    return step


def no_sync_results(opt, params):
    seen = []

    def step():
        opt.step()
        seen.append((opt.grad_norm, opt.skipped_steps))  # tensors; None without a norm

    return step


WAYS = (
    no_sync_plain,
    no_sync_moving,
    no_sync_scaler,
    no_sync_scheduler,
    no_sync_device_lr,
    no_sync_amp,
    no_sync_results,
)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.removeprefix("no_sync_"))
@every_optimizer
def test_a_step_waits_for_nothing(name, way, clip, backend):
    groups = [{"params": on_gpu()}, {"params": on_gpu(dtype=torch.bfloat16)}]
    opt = make(name, groups, max_grad_norm=clip, ema_decay=0.9, master_weights=True, backend=backend, **example(name))
    params = params_of(opt)
    fresh_grads(params)
    step = way(opt, params)
    for _ in range(2):
        step()  # makes states and plan, compiles
    with without_sync():
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    assert all(bool(p.isfinite().all()) for p in params)


@every_optimizer
def test_steps_queue_up_behind_a_busy_device(name, backend):
    """Gradients elsewhere at each step and the device far behind: no delivery of addresses overtakes a launch."""

    def run(far_behind):
        torch.manual_seed(3)
        params = on_gpu([(1 + i % 7, 9) for i in range(2000)] + [(50_000,)])
        opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
        torch.manual_seed(4)
        supply = [[torch.randn(p.shape).to(DEVICE) for p in params] for _ in range(8)]
        torch.cuda.synchronize()
        if far_behind:
            busy()
        for grads in supply:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            opt.step()
            if not far_behind:
                torch.cuda.synchronize()
        return everything(opt)

    assert run(far_behind=True) == run(far_behind=False)


@every_optimizer
def test_gradients_that_go_while_the_step_still_runs(name, backend):
    """Their memory may be used again, on the same stream, as soon as the step has been launched."""

    def run(reuse):
        torch.manual_seed(5)
        params = on_gpu(LARGE)
        opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
        for seed in range(4):
            set_grads(params, seed=seed)
            if reuse:
                busy(10_000_000)
            opt.step()
            for p in params:
                p.grad = None
            if reuse:
                garbage = [torch.full_like(p, math.nan) for p in params]
                del garbage
            else:
                torch.cuda.synchronize()
        return bits_of(opt)

    assert run(reuse=True) == run(reuse=False)


@every_optimizer
def test_a_stream_of_its_own(name, backend):
    """The gradient is written late on another stream than the default one; nothing else orders the step behind it."""

    def run(stream):
        torch.manual_seed(6)
        params = on_gpu(LARGE)
        opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
        supply = [[g.to(DEVICE) for g in grads_of(params, seed=seed)] for seed in range(3)]
        for p in params:
            p.grad = torch.full_like(p, 1e3)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for grads in supply:
                busy(20_000_000)
                for p, grad in zip(params, grads, strict=True):
                    p.grad.copy_(grad)
                opt.step()
        stream.synchronize()
        return everything(opt)

    assert run(torch.cuda.Stream()) == run(torch.cuda.default_stream())


# -- CUDA graphs -------------------------------------------------------------------------------------------------


def capturable(name):
    """torch's SGD needs no such argument, and has none."""
    return {"capturable": True} if "capturable" in inspect.signature(getattr(fastloop, name)).parameters else {}


def warmed_up(step, count=2):
    """As torch's documentation asks before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(count):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@every_optimizer
def test_a_captured_step_is_the_eager_one(name, clip, zero_grads, backend):
    settings = example(name) | capturable(name)
    settings["lr"] = torch.tensor(0.01, device=DEVICE)
    params = on_gpu() + on_gpu(dtype=torch.bfloat16)
    opt = make(name, params, backend=backend, max_grad_norm=clip, ema_decay=0.9, master_weights=True,
               zero_grads=zero_grads, **settings)  # fmt: skip
    eager = twin_of(opt)
    rates = [o.param_groups[0]["lr"] for o in (opt, eager)]
    assert rates[0] is not rates[1]
    for o in (opt, eager):
        set_grads(params_of(o), seed=0)
        warmed_up(o.step)
    torch.cuda.synchronize()
    assert bits_of(opt) == bits_of(eager)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    torch.cuda.synchronize()
    assert bits_of(opt) == bits_of(eager), "capturing is not stepping"
    for step in range(1, 7):
        for o in (opt, eager):
            set_grads_in_place(params_of(o), seed=step)
            if step == 3 and clip is not None:
                params_of(o)[0].grad[0, 0] = math.nan
        for lr in rates:
            lr.fill_(0.01 / step)
        graph.replay()
        eager.step()
        torch.cuda.synchronize()
        assert everything(opt) == everything(eager), f"replay {step}"
    assert int(opt.skipped_steps) == (clip is not None)
    if "step" in opt.state[params[0]]:
        assert float(opt.state[params[0]]["step"]) == (7 if clip is not None else 8)

    # Outside of the graph again, from where the replays left off.
    for o in (opt, eager):
        set_grads(params_of(o), seed=99)
        o.step()
    assert everything(opt) == everything(eager)


@every_optimizer
def test_a_captured_training_step(name, backend):
    """Forward, backward and step in one graph; the gradients are made in the graph's own memory."""

    def prepared():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(DEVICE)
        opt = make(name, model.parameters(), backend=backend, max_grad_norm=0.1, **(example(name) | capturable(name)))
        x = torch.zeros(64, 16, device=DEVICE)

        def step():
            opt.zero_grad(set_to_none=True)
            loss = model(x).square().mean()
            loss.backward()
            opt.step()

        return model, opt, x, step

    model, opt, x, step = prepared()
    eager_model, eager, eager_x, eager_step = prepared()
    batches = [values((64, 16)).to(DEVICE) for _ in range(6)]
    for source, move in ((x, step), (eager_x, eager_step)):
        source.copy_(batches[0])
        warmed_up(move, 3)
    opt.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch in batches[1:]:
        x.copy_(batch)
        graph.replay()
        eager_x.copy_(batch)
        eager_step()
    torch.cuda.synchronize()
    for p, q in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(opt.grad_norm, eager.grad_norm, rtol=1e-3, atol=0)


def test_a_capture_without_capturable_raises(backend):
    params = on_gpu()
    opt = fastloop.AdamW(params, backend=backend)
    set_grads(params)
    opt.step()
    torch.cuda.synchronize()
    before = bits_of(opt)
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    torch.cuda.synchronize()
    assert bits_of(opt) == before


# -- tensors that come and go --------------------------------------------------------------------------------------


@every_optimizer
def test_gradients_whose_address_changes_at_each_step(name, backend):
    params = on_gpu()
    opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
    kept = []
    for _ in range(4):
        set_grads(params)
        kept.append([p.grad for p in params])
        checked(opt)
    addresses = [grads[0].data_ptr() for grads in kept]
    assert len(set(addresses)) == len(addresses)


@every_optimizer
def test_parameters_and_states_that_are_swapped(name, backend):
    params = on_gpu()
    opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
    steps(opt, 1)
    kept = [p.data for p in params]
    for p in params:
        p.data = values(p.shape).to(DEVICE)
    steps(opt, 2)
    assert all(a.data_ptr() != p.data_ptr() for a, p in zip(kept, params, strict=True) if p.numel())
    for p in params:
        for key in CASES[name].states:
            if key in opt.state[p]:
                opt.state[p][key] = opt.state[p][key].clone()
    steps(opt, 1)
    opt.add_param_group({"params": on_gpu(((5, 3),))})
    steps(opt, 2)


@every_optimizer
def test_a_model_that_moves_to_the_gpu_after_construction(name):
    model = torch.nn.Linear(33, 65)
    opt = make(name, model.parameters(), max_grad_norm=0.5, **example(name))
    model.to(DEVICE)
    steps(opt, 2)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "state_dict"])
@every_optimizer
def test_copies_continue_bitwise(name, copier, backend):
    params = on_gpu()
    settings = example(name) | {"max_grad_norm": 0.5, "ema_decay": 0.9, "backend": backend}
    opt = make(name, params, **settings)
    set_grads(params, seed=0)
    params[0].grad[0, 0] = math.nan
    opt.step()
    for seed in (1, 2):
        set_grads(params, seed=seed)
        opt.step()
    if copier == "state_dict":
        other = make(name, [torch.nn.Parameter(p.detach().clone()) for p in params], **settings)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))  # as in torch, loading does not copy
    else:
        copied = copy.deepcopy if copier == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        other = copied(opt)
    for seed in (3, 4):
        for o in (opt, other):
            set_grads(params_of(o), seed=seed)
            o.step()
    assert everything(opt) == everything(other)
    assert int(other.skipped_steps) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.torch_name])
def test_checkpoints_go_to_torchs_fused_optimizer_and_back(name, dtype, backend):
    settings = example(name) | {"lr": 0.01}
    params = on_gpu(dtype=dtype)
    ours = make(name, params, backend=backend, **settings)
    theirs = torch_class(name)([torch.nn.Parameter(p.detach().clone()) for p in params], fused=True, **settings)

    def train(*optimizers, seeds):
        for seed in seeds:
            for o in optimizers:
                set_grads(params_of(o), seed=seed)
                o.step()

    train(ours, theirs, seeds=range(3))
    back = make(name, [torch.nn.Parameter(p.detach().clone()) for p in params_of(theirs)], backend=backend, **settings)
    back.load_state_dict(copy.deepcopy(theirs.state_dict()))
    there = torch_class(name)([torch.nn.Parameter(p.detach().clone()) for p in params], fused=True, **settings)
    there.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(ours, theirs, back, there, seeds=range(3, 6))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for other in (theirs, back, there):
        for p, q in zip(params, params_of(other), strict=True):
            torch.testing.assert_close(p, q, **tolerance)
            if "step" in ours.state[p]:
                assert float(ours.state[p]["step"]) == float(other.state[q]["step"]) == 6


@pytest.mark.parametrize("clip", [None, 1.0])
def test_cpu_and_gpu_parameters_in_one_optimizer(clip):
    """Without a norm each steps where it is; with one, the host would have to wait for the device."""
    params = [*on_gpu(), *parameters()]
    opt = fastloop.AdamW(params, max_grad_norm=clip)
    set_grads(params)
    if clip is None:
        checked(opt)
        steps(opt, 2)
        return
    before = bits_of(opt)
    with pytest.raises(RuntimeError, match=r"(?i)cpu.*cuda|cuda.*cpu|device"):
        opt.step()
    after = bits_of(opt)
    assert [(p, grad) for p, grad, _ in after] == [(p, grad) for p, grad, _ in before]


def test_a_backend_refuses_the_cpus_tensors(backend):
    params = parameters(((3,),))
    opt = fastloop.AdamW(params, backend=backend)
    params[0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=rf"{backend}.*cpu"):
        opt.step()


# -- kernels and copies, as the profiler sees them -------------------------------------------------------------------

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize",
         "cuCtxSynchronize", "cuEventSynchronize")  # fmt: skip
ALLOCATIONS = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost", "cudaFreeHost")


class Seen:
    """What the device ran and what the host called while `step` ran."""

    def __init__(self, step):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function("the step"):
                step()
            torch.cuda.synchronize()
        events = profile.events()
        (own,) = [e for e in events if e.name == "the step" and e.device_type == torch.autograd.DeviceType.CPU]
        inside = [e for e in events if own.time_range.start <= e.time_range.start <= own.time_range.end]
        self.calls = Counter(e.name for e in inside if e.device_type == torch.autograd.DeviceType.CPU)
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name != "the step"]
        on_device = [e for e in on_device if "Optimizer" not in e.name]  # ranges of the profiler's own
        self.copies = [e.name for e in on_device if e.name.startswith(("Memcpy", "Memset"))]
        self.kernels = [e.name for e in on_device if e.name not in self.copies]

    @property
    def waits(self):
        return {name: count for name, count in self.calls.items() if name.startswith(WAITS)}

    @property
    def allocations(self):
        return {name: count for name, count in self.calls.items() if name.startswith(ALLOCATIONS)}


@pytest.fixture(scope="module")
def profiler():
    """Skips where the profiler sees no kernels: it needs CUPTI, and the right to use it."""
    x = torch.zeros(8, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = Seen(lambda: x.add_(1))
    if len(seen.kernels) != 1:
        pytest.skip(f"torch.profiler sees {seen.kernels} where one kernel runs")


def many(count, group_count, dtypes=(torch.float32,)):
    """`count` small parameters in `group_count` groups with settings of their own, the dtypes in turn."""
    made = [torch.zeros(1 + i % 90, device=DEVICE, dtype=dtypes[i % len(dtypes)]) for i in range(count)]
    params = [torch.nn.Parameter(p) for p in made]
    groups = [{"params": params[i::group_count], "lr": 0.01 / (i + 1)} for i in range(group_count)]
    return [group for group in groups if group["params"]]


def counted(step):
    """The profiler's view and our own counts of one step."""
    counts = []

    def counting():
        with fastloop.count_launches() as n:
            step()
        counts.append(n)

    return Seen(counting), counts[0]


@pytest.mark.parametrize(
    ("dtypes", "clip"),
    [
        pytest.param((torch.float32,), 1.0, id="fp32 clipped"),
        pytest.param((torch.float32,), None, id="fp32"),
        pytest.param((torch.float32, torch.bfloat16), 1.0, id="fp32 and bf16 clipped"),
    ],
)
@pytest.mark.parametrize("group_count", [1, 10])
@pytest.mark.parametrize("count", [1, 100, 10_000])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_launches_whatever_the_number_of_tensors(name, count, group_count, dtypes, clip, backend, profiler):
    settings = {**example(name), "max_grad_norm": clip, "backend": backend}
    opt = make(name, many(count, group_count, dtypes), **settings)
    params = params_of(opt)
    combinations = len({p.dtype for p in params})
    launches = combinations * (2 if clip is not None else 1)
    kept = []

    def move():
        kept.append([torch.ones_like(p) for p in params])  # what was, stays: every address is new
        for p, grad in zip(params, kept[-1], strict=True):
            p.grad = grad

    move()
    for _ in range(2):
        opt.step()

    stays, n = counted(opt.step)
    assert stays.copies == []
    assert len(stays.kernels) == launches, stays.kernels
    assert (n.launches, n.copies) == (launches, 0)

    move()
    moved, n = counted(opt.step)
    assert len(moved.copies) <= 1
    assert len(moved.kernels) <= launches + 1, moved.kernels  # without a norm one launch may bring the addresses
    assert len(moved.kernels) == launches or clip is None
    assert (n.launches, n.copies) == (len(moved.kernels), len(moved.copies))

    opt.param_groups[-1]["lr"] *= 0.5
    other_rate, n = counted(opt.step)
    assert len(other_rate.copies) <= 1
    assert len(other_rate.kernels) == launches or clip is None
    assert (n.launches, n.copies) == (len(other_rate.kernels), len(other_rate.copies))

    for seen in (stays, moved, other_rate):
        assert seen.waits == {}
    assert stays.allocations == {}


@every_optimizer
def test_launches_under_a_scaler(name, backend, profiler):
    """The pass that torch's scaler makes of its own is not there."""
    opt = make(name, many(100, 3), **{**example(name), "backend": backend, "max_grad_norm": 1.0})
    for p in params_of(opt):
        p.grad = torch.ones_like(p)
    scaler = fastloop.GradScaler("cuda")
    scaler.scale(torch.zeros((), device=DEVICE))
    for _ in range(2):
        scaler.step(opt)
        scaler.update()
    seen, n = counted(lambda: scaler.step(opt))
    scaler.update()
    assert n.launches == 2
    assert n.copies <= 1
    assert len(seen.kernels) <= 2 + 3, seen.kernels  # a few of torch's for scalars, whatever the number of tensors
    assert seen.waits == {}


def test_counts_stay_zero_on_the_cpu():
    params = parameters()
    opt = fastloop.AdamW(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    with fastloop.count_launches() as n:
        opt.step()
    assert (n.launches, n.copies) == (0, 0)


# -- several devices -------------------------------------------------------------------------------------------------


@two_gpus
@pytest.mark.parametrize("clip", [None, 0.5])
@every_optimizer
def test_parameters_on_two_gpus(name, clip, backend):
    """One norm over both, and the current device is neither's business."""
    params = [*on_gpu(device=torch.device("cuda:1")), *on_gpu(device=torch.device("cuda:0"))]
    opt = make(name, params, backend=backend, max_grad_norm=clip, **example(name))
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            steps(opt, 1)
    if clip is not None:
        set_grads(params)
        params[0].grad[0, 0] = math.nan
        checked(opt)
        steps(opt, 1)


@two_gpus
@every_optimizer
def test_steps_on_two_gpus_wait_for_nothing(name, backend):
    params = [*on_gpu(device=torch.device("cuda:1")), *on_gpu(device=torch.device("cuda:0"))]
    opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
    set_grads(params)
    for _ in range(2):
        opt.step()
    with without_sync():
        for _ in range(3):
            fresh_grads(params)
            opt.step()


@two_gpus
@every_optimizer
def test_another_device_than_the_current_one(name, backend):
    params = on_gpu(device=torch.device("cuda:1"))
    opt = make(name, params, backend=backend, max_grad_norm=0.5, **example(name))
    assert torch.cuda.current_device() == 0
    steps(opt)
    assert torch.cuda.current_device() == 0


@pytest.fixture
def one_process_group():
    """This process alone, with NCCL: the mesh and the collectives are there, on one GPU."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        pytest.skip("this build of torch has no NCCL")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    torch.distributed.destroy_process_group()


@every_optimizer
def test_fsdp2_waits_for_nothing_and_steps_as_without_it(name, one_process_group, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def new_model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1)).to(DEVICE)

    alone = new_model()
    model = fully_shard(new_model(), mesh=init_device_mesh("cuda", (1,)))
    settings = {**example(name), "lr": 0.01, "max_grad_norm": 0.1, "backend": backend}
    expected = make(name, alone.parameters(), **settings)
    opt = make(name, model.parameters(), **settings)
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(8, 16).to(DEVICE)
        for m, o in ((model, opt), (alone, expected)):
            o.zero_grad()
            m(x).square().mean().backward()
            if seed >= 2:
                with without_sync():
                    o.step()
            else:
                o.step()
        torch.testing.assert_close(opt.grad_norm, expected.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
