# SPDX-License-Identifier: Apache-2.0
"""Training over several processes: DDP, FSDP2, tensor parallelism, ZeroRedundancyOptimizer and distributed checkpoints.

Over gloo. Two, three and four processes serve all tests of this file; a test is a function that all of them call. Each
compares with the same training in one process, which every rank repeats for itself.
"""

from __future__ import annotations

import copy
import faulthandler
import functools
import importlib.util
import io
import os
import queue
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from cases import CASES
from conftest import EMULATED, HAS_GPU
from interpreter import replace_the_language_once_a_launch
from mirror import mirror
from support import bits, checked_step, example, make, values

import fastloop
from fastloop.ops import cuda

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

SECONDS = 180  # for one test; a collective that one rank never enters would wait for ever
# Imported once, for all processes.
PRELOADED = [
    "torch", "numpy", "pytest", "hypothesis", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "torch.distributed.optim", "torch.distributed.tensor.parallel", "torch.testing",
]  # fmt: skip
# One for each rule: what Adam and AdamW do not share is no business of processes.
every_optimizer = pytest.mark.parametrize("name", list({case.rule: name for name, case in CASES.items()}.values()))

# A device's kernels add their partial sums up on the device, and what goes over the processes is there too.
emulated = pytest.mark.skipif(HAS_GPU or not EMULATED.exists(), reason="the CUDA kernels are not emulated here")
interpreted = pytest.mark.skipif(HAS_GPU or importlib.util.find_spec("triton") is None, reason="no interpreted Triton")
BACKENDS = [
    pytest.param({}, id="auto"),
    pytest.param({"backend": "reference"}, id="reference"),
    pytest.param({"backend": "cuda"}, id="cuda", marks=emulated),
    pytest.param({"backend": "triton"}, id="triton", marks=[interpreted, pytest.mark.slow]),
]
every_backend = pytest.mark.parametrize("more", BACKENDS)


class Processes:
    """Processes of one gloo group that call functions of this module by name."""

    def __init__(self, world, folder):
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.world = world
        self.folder = folder
        self.answers = context.Queue()
        self.requests = [context.Queue() for _ in range(world)]
        # A file, not a port: nobody else can take it in between.
        arguments = [(rank, world, folder, self.requests[rank], self.answers) for rank in range(world)]
        self.workers = [context.Process(target=serve, args=a, daemon=True) for a in arguments]
        for worker in self.workers:
            worker.start()

    def call(self, function, *args, **kwargs):
        """Run `function(rank, ...)` in every process and return what they returned, or raise what one raised."""
        for requests in self.requests:
            requests.put((function.__name__, args, kwargs))
        results, errors = {}, []
        deadline = time.monotonic() + SECONDS
        while len(results) < self.world and not errors:
            try:
                rank, error, result = self.answers.get(timeout=1)
            except queue.Empty:
                errors += self.dead()
                if not errors and time.monotonic() > deadline:
                    silent = sorted(set(range(self.world)) - set(results))
                    errors.append(f"no answer from ranks {silent} in {SECONDS} s")
                continue
            results[rank] = result
            # That a peer is gone says little: what ended it is said too.
            errors += [f"rank {rank}: {error}", *self.dead(wait=2.0)] if error else []
        if errors:
            self.stop()  # the other ranks may be in a collective for ever
            pytest.fail("\n".join(errors), pytrace=False)
        return [results[rank] for rank in range(self.world)]

    def dead(self, wait=0.0):
        """What ended the processes that are no more: exit code (less than 0: a signal) and the stacks at a crash."""
        deadline = time.monotonic() + wait
        found = []
        for rank, worker in enumerate(self.workers):
            worker.join(max(deadline - time.monotonic(), 0.0))
            if not worker.is_alive():
                fault = self.folder / f"fault-{rank}"
                stacks = fault.read_text() if fault.exists() else ""
                found.append(f"rank {rank}: its process ended with {worker.exitcode}\n{stacks}")
        return found

    @property
    def alive(self):
        return all(worker.is_alive() for worker in self.workers)

    def stop(self):
        for worker in self.workers:
            worker.kill()
            worker.join()


def emulate_cuda():
    """As conftest does in the process of the tests: backend="cuda" on CPU tensors, where the emulation is built."""
    if not HAS_GPU and EMULATED.exists():
        spec = importlib.util.spec_from_file_location("_cuda", EMULATED)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cuda.emulate(module)


def serve(rank, world, folder, requests, answers):
    from gloo import join  # not above: a build of torch without gloo has nothing to put in its place

    fault = open(folder / f"fault-{rank}", "w")  # noqa: SIM115 (written to when the process crashes)
    faulthandler.enable(fault)
    emulate_cuda()
    if not HAS_GPU and fastloop.backends()["triton"]["available"]:
        replace_the_language_once_a_launch()
    join(rank, world, folder / "rendezvous", SECONDS)
    while True:
        name, args, kwargs = requests.get()
        try:
            torch.manual_seed(0)
            answers.put((rank, None, globals()[name](rank, *args, **kwargs)))
        except BaseException:
            answers.put((rank, traceback.format_exc(), None))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    started = {}

    def get(world):
        """Processes of one group; new ones if the last test ended them."""
        if world not in started or not started[world].alive:
            started[world] = Processes(world, tmp_path_factory.mktemp("gloo"))
        return started[world]

    yield get
    for processes in started.values():
        processes.stop()


@pytest.fixture(params=[2, 3], ids=["2 processes", "3 processes"])
def processes(request, pool):
    return pool(request.param)


@pytest.fixture
def four(pool):
    """As few as a mesh of two dimensions needs that are both more than one."""
    return pool(4)


def agreed(results):
    """What every rank returned, if it is the same."""
    assert all(result == results[0] for result in results), results
    return results[0]


# -- the training ----------------------------------------------------------------------------------------------


def world():
    return torch.distributed.get_world_size()


@functools.cache
def mesh(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def new_model(dtype=torch.float32):
    """Rows that the processes cannot share evenly, and a bias of one element, of which only one gets something."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    return torch.nn.Sequential(*layers).to(dtype)


def settings_of(name, **more):
    return example(name) | {"lr": 0.05} | more


def batch(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 6, generator=generator).to(dtype)


def train(model, opt, seeds, scale=1.0, after_backward=None):
    """The same batch on every rank, so that an average over two ranks is what one process has, bit by bit."""
    norms = []
    for seed in seeds:
        opt.zero_grad()
        dtype = next(model.parameters()).dtype
        (model(batch(seed, dtype)).square().mean() * scale).backward()
        if after_backward is not None:
            after_backward(model, seed)
        opt.step()
        norms.append(getattr(opt, "grad_norm", None))
    return norms


def full(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach()


def close(model, expected, rtol=1e-5, atol=1e-6):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(p), full(q), rtol=rtol, atol=atol)


def same_norms(norms, expected):
    for ours, single in zip(norms, expected, strict=True):
        assert ours.dtype == single.dtype == torch.float32
        torch.testing.assert_close(ours, single, rtol=1e-6, atol=0)


def sharded(model, on=None, **more):
    from torch.distributed.fsdp import fully_shard

    on = on or mesh(world())
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=on, **more)
    return fully_shard(model, mesh=on, **more)


def whole_bits(opt):
    """The bit patterns of all parameters and states, gathered."""
    out = []
    for group in opt.param_groups:
        for p in group["params"]:
            state = {k: bits(full(v)) for k, v in sorted(opt.state.get(p, {}).items()) if isinstance(v, torch.Tensor)}
            out.append((bits(full(p)), state))
    return out


def bits_of_shards(opt):
    local = [[p, *opt.state[p].values()] for group in opt.param_groups for p in group["params"]]
    return [bits(getattr(t, "_local_tensor", t)) for tensors in local for t in tensors if isinstance(t, torch.Tensor)]


# -- the processes of these tests ------------------------------------------------------------------------------


def loops_of_gloo(rank):
    sums = [torch.ones(1000) for _ in range(20)]
    for work in [torch.distributed.all_reduce(each, async_op=True) for each in sums]:
        work.wait()  # until then a thread may not have begun, and have no name
    tasks = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    return tasks.count("pt_gloo_runloop")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's list of threads")
def test_one_thread_runs_the_collectives_of_a_group(tmp_path):
    own = Processes(2, tmp_path)  # those of the pool have meshes, groups of their own
    try:
        assert own.call(loops_of_gloo) == [1, 1]
    finally:
        own.stop()


# -- every placement, bit by bit -------------------------------------------------------------------------------
#
# Gradients of small multiples of 1/64: their squares add up exactly in any order, so that the norm, the clip factor and
# with them every element are those of one process, whatever the processes hold.


def placed_parameters(grid, dtype):
    """Pairs of a parameter on a mesh and the whole of it, with what puts a tensor where the first is."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line, both = mesh(world()), mesh(*grid)
    rows, columns, copies = Shard(0), Shard(1), Replicate()
    layouts = [
        ((7, 5), line, [rows]),
        ((1, 3), line, [rows]),  # fewer rows than ranks: the others hold nothing
        ((2,), line, [rows]),
        ((0, 3), line, [rows]),
        ((4, 7), line, [columns]),
        ((3, 1, 2), line, [columns]),
        ((5,), line, [copies]),
        ((), line, [copies]),
        ((3, 2), None, None),
        ((7, 5), both, [rows, columns]),
        ((5, 6), both, [columns, rows]),
        ((9, 3), both, [rows, rows]),
        ((1, 2), both, [rows, rows]),
        ((6, 4), both, [copies, rows]),  # the replicas of a hybrid mesh
        ((3, 3), both, [rows, copies]),
        ((4,), both, [copies, copies]),
        ((5, 2), both["inner"], [rows]),  # as many copies as the other dimension is long
        ((5, 2), both["outer"], [columns]),
    ]

    def place(tensor, on, placements):
        tensor = tensor.clone()  # what every rank holds all of would be the tensor itself
        return tensor if on is None else distribute_tensor(tensor, on, placements, src_data_rank=None)

    def parameter(tensor, requires_grad=True):
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)

    triples = []
    for shape, on, placements in layouts:
        whole = values(shape, dtype)
        put = functools.partial(place, on=on, placements=placements)
        triples.append((parameter(put(whole)), parameter(whole.clone()), put))
    return triples


def give_exact_gradients(triples, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    for p, alone, put in triples:
        alone.grad = torch.randint(-4, 5, alone.shape, generator=generator).to(dtype) / 64
        p.grad = put(alone.grad)


def exact_steps(rank, name, grid, dtype, more):
    triples = placed_parameters(grid, dtype)
    settings = settings_of(name, max_grad_norm=0.1, ema_decay=0.9, **more)

    def optimizer(params):
        """A group with its own rate, and one left out of the norm."""
        slow, free = {"lr": 0.01}, {"max_grad_norm": None}
        groups = [{"params": params[0::3]}, {"params": params[1::3], **slow}, {"params": params[2::3], **free}]
        return make(name, groups, **settings)

    opt, expected = (optimizer([t[i] for t in triples]) for i in range(2))
    norms = []

    def step():
        for o in (opt, expected):
            o.step()
        assert bits(opt.grad_norm) == bits(expected.grad_norm)
        assert bits(opt.skipped_steps) == bits(expected.skipped_steps)
        norms.append(opt.grad_norm.item())

    for seed in range(3):
        give_exact_gradients(triples, seed, dtype)
        step()
    assert whole_bits(opt) == whole_bits(expected)
    assert all(norm > 0.1 for norm in norms), "the test must clip"

    before = bits_of_shards(opt)
    give_exact_gradients(triples, 3, dtype)
    triples[0][1].grad[-1, 0] = float("nan")  # a row of the last rank
    if rank == world() - 1:
        triples[0][0].grad.to_local()[-1, 0] = float("nan")
    step()
    assert bits_of_shards(opt) == before
    assert opt.skipped_steps.item() == 1

    give_exact_gradients(triples, 4, dtype)
    step()
    assert whole_bits(opt) == whole_bits(expected)
    for p, alone, _ in triples:
        if more.get("zero_grads"):
            assert not full(p.grad).any()
        else:
            assert bits(full(p.grad)) == bits(alone.grad)
    return [repr(norm) for norm in norms]


every_exact = pytest.mark.parametrize(
    ("dtype", "more"),
    [
        pytest.param(torch.float32, {}, id="fp32"),
        pytest.param(torch.float32, {"backend": "reference"}, id="fp32 reference"),
        pytest.param(torch.float32, {"backend": "cuda"}, id="fp32 cuda", marks=emulated),
        pytest.param(torch.bfloat16, {"backend": "cuda", "master_weights": True}, id="bf16 cuda", marks=emulated),
        pytest.param(torch.float32, {"backend": "triton"}, id="triton", marks=[interpreted, pytest.mark.slow]),
        pytest.param(torch.float32, {"zero_grads": True, "state_dtype": torch.bfloat16}, id="bf16 states"),
        pytest.param(torch.bfloat16, {"master_weights": True}, id="bf16 with masters"),
    ],
)


@every_exact
@every_optimizer
def test_every_placement_steps_as_one_process_bit_by_bit(name, dtype, more, processes):
    world = processes.world
    agreed(processes.call(exact_steps, name, (1, world) if world == 2 else (world, 1), dtype, more))


@every_exact
@every_optimizer
def test_every_placement_on_a_grid_steps_as_one_process_bit_by_bit(name, dtype, more, four):
    agreed(four.call(exact_steps, name, (2, 2), dtype, more))


def oracle_steps(rank, name, grid):
    triples = placed_parameters(grid, torch.float32)
    opt = make(name, [t[0] for t in triples], **settings_of(name, max_grad_norm=1.0, ema_decay=0.9))
    for scale in (10.0, 0.1):
        for p, alone, put in triples:
            p.grad = put(values(alone.shape, scale=scale))
        checked_step(mirror(opt, full))


@every_optimizer
def test_every_placement_steps_within_the_bound_of_the_oracle(name, pool):
    """Gradients as they come; the norm's bound is that of one process."""
    pool(3).call(oracle_steps, name, (1, 3))


def steps_without_gradients(rank, name, more):
    """Gradients of other parameters at each step, of none at the first, and then on rank 0 alone."""
    triples = placed_parameters((1, world()), torch.float32)
    settings = settings_of(name, max_grad_norm=0.1, **more)
    opt, expected = (make(name, [t[i] for t in triples], **settings) for i in range(2))
    for step in range(4):
        give_exact_gradients(triples, step, torch.float32)
        for index, (p, alone, _) in enumerate(triples):
            if step == 0 or (index + step) % 3 == 0:
                p.grad = alone.grad = None
        for o in (opt, expected):
            o.step()
        assert bits(opt.grad_norm) == bits(expected.grad_norm)
    assert whole_bits(opt) == whole_bits(expected)

    triples = [t for t in placed_parameters((1, world()), torch.float32) if hasattr(t[0], "placements")]
    opt = make(name, [torch.nn.Parameter(torch.ones(2)), *(t[0] for t in triples)], **settings)
    norms = []
    for step in range(2):
        give_exact_gradients(triples, step, torch.float32)
        if rank != 0:
            for p, *_ in triples:
                p.grad = None
        opt.step()
        norms.append(opt.grad_norm.item())
    assert all(norm > 0 for norm in norms)
    return None if rank == 0 else norms


@every_backend
@every_optimizer
def test_a_process_without_gradients_keeps_no_other_waiting(name, more, processes):
    """Collectives follow from the parameters, which are alike everywhere, and not from the gradients."""
    agreed(processes.call(steps_without_gradients, name, more)[1:])


# -- DDP -------------------------------------------------------------------------------------------------------


def ddp(rank, name, max_grad_norm):
    model, alone = new_model(), new_model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    settings = settings_of(name, max_grad_norm=max_grad_norm)
    opt, expected = (make(name, m.parameters(), **settings) for m in (model, alone))
    for seed in range(4):
        for m, o in ((parallel, opt), (alone, expected)):
            o.zero_grad()
            x = batch(seed)
            x = x[rank :: world()] if m is parallel else x  # each rank has its part of the batch
            m(x).square().mean().backward()
            o.step()
    close(model, alone)
    return [bits(p) for p in model.parameters()]


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@every_optimizer
def test_ddp(name, max_grad_norm, processes):
    agreed(processes.call(ddp, name, max_grad_norm))


# -- FSDP2 -----------------------------------------------------------------------------------------------------


def fsdp(rank, name, more):
    model, alone = sharded(new_model()), new_model()
    settings = settings_of(name, **more)
    opt, expected = (make(name, m.parameters(), **settings) for m in (model, alone))
    norms, alone_norms = (train(m, o, range(4)) for m, o in ((model, opt), (alone, expected)))
    if more.get("max_grad_norm") is None:
        assert norms == alone_norms == [None] * 4
    else:
        same_norms(norms, alone_norms)
    close(model, alone)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        for key, value in opt.state[p].items():
            if key != "step":
                assert value.placements == p.placements, key
                torch.testing.assert_close(full(value), full(expected.state[q][key]), rtol=1e-5, atol=1e-6)
    if "ema_decay" in more:
        averages = expected.ema_state_dict(alone)
        for key, value in opt.ema_state_dict(model).items():
            torch.testing.assert_close(full(value), averages[key], rtol=1e-5, atol=1e-6)
        before = bits_of_shards(opt)
        with opt.ema_weights():
            close(model, expected_average(alone, averages))
        assert bits_of_shards(opt) == before
    return [repr(norm) for norm in norms]


def expected_average(model, averages):
    model = copy.deepcopy(model)
    model.load_state_dict(averages)
    return model


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param({"max_grad_norm": 0.1}, id="clipped"),
        pytest.param({"max_grad_norm": float("inf"), "max_grad_value": 0.01, "ema_decay": 0.9}, id="value and ema"),
        pytest.param({"max_grad_norm": 0.1, "backend": "reference"}, id="reference"),
        pytest.param({"max_grad_norm": 0.1, "backend": "cuda"}, id="cuda", marks=emulated),
    ],
)
@every_optimizer
def test_fsdp2_steps_as_one_process(name, more, processes):
    """The norm spans the whole mesh: each rank clips by the same number, that of a single process."""
    agreed(processes.call(fsdp, name, more))


def fsdp_bfloat16(rank, name):
    settings = settings_of(name, max_grad_norm=0.1, master_weights=True)
    model, alone = sharded(new_model(torch.bfloat16)), new_model(torch.bfloat16)
    for m in (model, alone):
        train(m, make(name, m.parameters(), **settings), range(4))
    close(model, alone, rtol=1e-2, atol=1e-2)


@every_optimizer
def test_fsdp2_with_master_weights(name, processes):
    processes.call(fsdp_bfloat16, name)


def hybrid(rank, name, shape):
    model, alone = sharded(new_model(), mesh(*shape)), new_model()
    settings = settings_of(name, max_grad_norm=0.1)
    opt, expected = (make(name, m.parameters(), **settings) for m in (model, alone))
    norms, alone_norms = (train(m, o, range(3)) for m, o in ((model, opt), (alone, expected)))
    same_norms(norms, alone_norms)
    close(model, alone)
    return [repr(norm) for norm in norms]


@every_optimizer
def test_replicas_of_a_hybrid_mesh_count_once(name, pool):
    agreed(pool(2).call(hybrid, name, (2, 1)))
    agreed(pool(4).call(hybrid, name, (2, 2)))


def columns_of_weights(rank, name):
    """The first layer by columns, and one layer that stays frozen."""
    from torch.distributed.tensor import Shard

    def columns(p):
        return Shard(int(p.shape == (9, 6)))  # FSDP2 divides only rows unevenly

    models = [new_model(), new_model()]
    for m in models:
        m[2].requires_grad_(False)
    model, alone = sharded(models[0], shard_placement_fn=columns), models[1]
    settings = settings_of(name, max_grad_norm=0.1)
    opt, expected = (make(name, m.parameters(), **settings) for m in (model, alone))
    same_norms(*(train(m, o, range(3)) for m, o in ((model, opt), (alone, expected))))
    close(model, alone)


@every_optimizer
def test_fsdp2_over_other_dimensions_and_with_frozen_parameters(name, processes):
    processes.call(columns_of_weights, name)


# -- gradients that are not finite -----------------------------------------------------------------------------


def poison_one_rank(model, rank, value):
    """In the shard of the last rank, and nowhere else."""
    if rank == world() - 1:
        model[0].weight.grad.to_local().view(-1)[0] = value


def fsdp_nonfinite(rank, name, more):
    model = sharded(new_model())
    opt = make(name, model.parameters(), **settings_of(name, max_grad_norm=0.1, **more))
    train(model, opt, range(1))
    before = bits_of_shards(opt)
    train(model, opt, range(1, 2), after_backward=lambda m, _: poison_one_rank(m, rank, float("nan")))
    assert bits_of_shards(opt) == before
    assert opt.skipped_steps.item() == 1
    train(model, opt, range(2, 3))
    assert bits_of_shards(opt) != before
    return opt.skipped_steps.item()


@every_backend
@every_optimizer
def test_every_rank_skips_the_step_if_one_has_a_nan(name, more, processes):
    assert agreed(processes.call(fsdp_nonfinite, name, more)) == 1


def fsdp_raises(rank, name, max_grad_norm, more):
    model = sharded(new_model())
    settings = settings_of(name, max_grad_norm=max_grad_norm, error_if_nonfinite=True, **more)
    opt = make(name, model.parameters(), **settings)
    train(model, opt, range(1))
    before = bits_of_shards(opt)
    with pytest.raises(RuntimeError, match="not finite"):
        train(model, opt, range(1, 2), after_backward=lambda m, _: poison_one_rank(m, rank, float("inf")))
    assert bits_of_shards(opt) == before
    train(model, opt, range(2, 3))
    return opt.skipped_steps.item()


@every_backend
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@every_optimizer
def test_error_if_nonfinite_raises_on_every_rank(name, max_grad_norm, more, processes):
    assert agreed(processes.call(fsdp_raises, name, max_grad_norm, more)) == 0


def fsdp_scaled(rank, name, scaler_class, max_grad_norm, more):
    model, alone = sharded(new_model()), new_model()
    settings = settings_of(name, max_grad_norm=max_grad_norm, **more)
    scales = []
    for m in (model, alone):
        opt = make(name, m.parameters(), **settings)
        scaler = scaler_class("cpu", init_scale=2.0**10, growth_interval=2)
        for seed in range(5):
            opt.zero_grad()
            scaler.scale(m(batch(seed)).square().mean()).backward()
            if seed == 2:
                if m is alone:
                    alone[0].weight.grad[0, 0] = float("inf")
                else:
                    poison_one_rank(m, rank, float("inf"))
            scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
    assert scales[:5] == scales[5:] == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
    close(model, alone)


@every_backend
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fastloop.GradScaler], ids=["torch", "ours"])
@every_optimizer
def test_scalers_find_what_one_rank_has(name, scaler_class, max_grad_norm, more, processes):
    processes.call(fsdp_scaled, name, scaler_class, max_grad_norm, more)


# -- tensor parallelism ----------------------------------------------------------------------------------------


def wide_model():
    """A hidden layer that two, three and four processes can share; the last layer stays as it is."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    return torch.nn.Sequential(*layers)


def tensor_parallel(rank, name, more, fsdp_ranks):
    """With `fsdp_ranks` FSDP2 on top: rows that are split twice (strided shards) beside parameters on one mesh."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, alone = wide_model(), wide_model()
    columns = mesh(fsdp_ranks, world() // fsdp_ranks)["inner"] if fsdp_ranks else mesh(world())
    parallelize_module(model, columns, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if fsdp_ranks:
        sharded(model, mesh(fsdp_ranks, world() // fsdp_ranks)["outer"])
    else:
        assert not hasattr(model[4].weight, "placements")
    settings = settings_of(name, max_grad_norm=0.1, **more)
    opt, expected = (make(name, m.parameters(), **settings) for m in (model, alone))
    norms, alone_norms = (train(m, o, range(4)) for m, o in ((model, opt), (alone, expected)))
    same_norms(norms, alone_norms)
    close(model, alone)
    return [repr(norm) for norm in norms]


@every_backend
@every_optimizer
def test_tensor_parallel(name, more, processes):
    """DTensors beside plain parameters, in one norm."""
    agreed(processes.call(tensor_parallel, name, more, None))


@every_optimizer
def test_fsdp2_over_tensor_parallel(name, pool):
    for world, fsdp_ranks in ((2, 2), (3, 1), (4, 2)):
        agreed(pool(world).call(tensor_parallel, name, {}, fsdp_ranks))


def partial_gradients(rank, name, max_grad_norm):
    """A replicated weight, whose gradient is yet to be summed over the ranks."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    weight, x = torch.linspace(1, 2, 6), batch(0)
    shared = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh(world()), [Replicate()]))
    alone = torch.nn.Parameter(weight.clone())
    (distribute_tensor(x, mesh(world()), [Shard(0)]) * shared).square().sum().backward()
    (x * alone).square().sum().backward()
    assert shared.grad.placements[0].is_partial()
    settings = settings_of(name, max_grad_norm=max_grad_norm)
    for p in (shared, alone):
        make(name, [p], **settings).step()
    torch.testing.assert_close(full(shared), full(alone))
    for norm_type in (2.0, float("inf")):
        norms = [fastloop.get_total_norm([p.grad], norm_type) for p in (shared, alone)]
        torch.testing.assert_close(full(norms[0]), norms[1])
    before = full(shared.grad).clone()
    with pytest.raises(RuntimeError, match="placement"):  # as torch's own; parts cannot be bounded one by one
        fastloop.clip_grad_value_([shared], 1e-3)
    assert bits(full(shared.grad)) == bits(before)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@every_optimizer
def test_gradients_that_are_yet_to_be_summed(name, max_grad_norm, processes):
    processes.call(partial_gradients, name, max_grad_norm)


# -- clipping functions ----------------------------------------------------------------------------------------


def clip_functions(rank, norm_type):
    model, alone = sharded(new_model()), new_model()
    for m in (model, alone):
        m(batch(0)).square().mean().backward()
    params = list(model.parameters())
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1, norm_type)
    norm = fastloop.clip_grad_norm_(params, 0.1, norm_type)
    assert type(norm) is type(params[0].grad)  # a DTensor, as from torch
    torch.testing.assert_close(full(norm), expected)
    torch.testing.assert_close([full(p.grad) for p in params], [p.grad for p in alone.parameters()])
    fastloop.clip_grad_value_(params, 1e-3)
    assert max(float(full(p.grad).abs().max()) for p in params) <= torch.tensor(1e-3).item()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf"), 3.0])
def test_clip_functions_take_dtensors(norm_type, processes):
    processes.call(clip_functions, norm_type)


def clip_strided(rank, norm_type):
    """FSDP2 over tensor parallelism, where torch's own clip_grad_norm_ finds two meshes and gives up."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, alone = wide_model(), wide_model()
    grid = mesh(2, world() // 2)
    sharded(parallelize_module(model, grid["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()}), grid["outer"])
    for m in (model, alone):
        m(batch(0)).square().mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1, norm_type)
    norm = fastloop.clip_grad_norm_(model.parameters(), 0.1, norm_type)
    torch.testing.assert_close(full(norm), expected)
    torch.testing.assert_close([full(p.grad) for p in model.parameters()], [p.grad for p in alone.parameters()])


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clip_functions_take_several_meshes(norm_type, pool):
    for world in (2, 4):
        pool(world).call(clip_strided, norm_type)


def clip_mixed(rank, norm_type):
    """Replicated plain gradients beside sharded ones: torch's raises."""
    triples = placed_parameters((1, world()), torch.float32)
    give_exact_gradients(triples, 0, torch.float32)
    params, alone = ([t[i] for t in triples] for i in range(2))
    expected = fastloop.clip_grad_norm_(alone, 0.1, norm_type)
    norm = fastloop.clip_grad_norm_(params, 0.1, norm_type)
    torch.testing.assert_close(full(norm), expected)
    torch.testing.assert_close([full(p.grad) for p in params], [p.grad for p in alone])


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clip_functions_take_dtensors_and_plain_tensors_together(norm_type, processes):
    processes.call(clip_mixed, norm_type)


# -- distributed checkpoints -----------------------------------------------------------------------------------


def checkpoint(rank, name, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    settings = settings_of(name, max_grad_norm=0.1, ema_decay=0.9)
    model = sharded(new_model())
    opt = make(name, model.parameters(), **settings)
    train(model, opt, range(2))
    weights, states = get_state_dict(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights, "optim": states}, checkpoint_id=folder)

        other = sharded(new_model())
        resumed = make(name, other.parameters(), **settings)
        train(other, resumed, range(7, 9))  # somewhere else, to be overwritten
        weights, states = get_state_dict(other, resumed)
        dcp.load({"model": weights, "optim": states}, checkpoint_id=folder)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states)
    for pair in ((model, opt), (other, resumed)):
        train(*pair, range(20, 23))
    assert bits_of_shards(resumed) == bits_of_shards(opt)

    # The whole on every rank, into one process, and on from there as the shards do.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    weights, states = get_state_dict(model, opt, options=options)
    alone = new_model()
    single = make(name, alone.parameters(), **settings)
    set_state_dict(alone, single, model_state_dict=copy.deepcopy(weights), optim_state_dict=copy.deepcopy(states))
    for pair in ((model, opt), (alone, single)):
        train(*pair, range(30, 32))
    close(model, alone)


@every_optimizer
def test_a_distributed_checkpoint_continues(name, processes, tmp_path):
    processes.call(checkpoint, name, str(tmp_path / "checkpoint"))


def exact_training(model, opt, seeds):
    """Steps with gradients that add up exactly, of which one is skipped."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator()
    for seed in seeds:
        generator.manual_seed(seed)
        for p in model.parameters():
            grad = torch.randint(-4, 5, p.shape, generator=generator).to(p.dtype) / 64
            if seed == 1:
                grad.view(-1)[0] = float("nan")
            placed = hasattr(p, "placements")
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None) if placed else grad
        opt.step()


def resharded_setup(name, dtype, place):
    """A model placed by `place`, and an optimizer with two groups and every kind of state."""
    model = place(new_model(dtype))
    groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2:].parameters()], "lr": 0.01}]
    return model, make(name, groups, **settings_of(name, max_grad_norm=0.1, ema_decay=0.9, master_weights=True))


def save_shards(rank, name, dtype, folder, flat):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    model, opt = resharded_setup(name, dtype, sharded)
    exact_training(model, opt, range(3))
    states = get_optimizer_state_dict(model, opt, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": get_model_state_dict(model), "optim": states}, checkpoint_id=folder)


def resume_shards(rank, name, dtype, folder, flat):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = resharded_setup(name, dtype, sharded)
    weights = get_model_state_dict(model)
    states = get_optimizer_state_dict(model, opt, options=options)  # makes the states, by a step that changes nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": weights, "optim": states}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    set_optimizer_state_dict(model, opt, states, options=options)

    alone, expected = resharded_setup(name, dtype, lambda model: model)
    exact_training(alone, expected, range(3))
    assert whole_bits(opt) == whole_bits(expected)
    assert opt.skipped_steps.item() == 1
    exact_training(alone, expected, range(3, 5))
    exact_training(model, opt, range(3, 5))
    assert whole_bits(opt) == whole_bits(expected)
    assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in expected.param_groups]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 3), (3, 2)])
@every_optimizer
def test_a_checkpoint_is_resumed_by_another_number_of_processes(
    name, saved_by, resumed_by, dtype, flat, pool, tmp_path
):
    """Master weights, averages, the count of skipped steps and all, bit by bit as one process goes on."""
    for world, function in ((saved_by, save_shards), (resumed_by, resume_shards)):
        pool(world).call(function, name, dtype, str(tmp_path / "checkpoint"), flat)


# -- ZeroRedundancyOptimizer -----------------------------------------------------------------------------------


def zero_optimizer(name, params, **more):
    """The group goes to the class: what ZeroRedundancyOptimizer is given itself ends in its state_dict."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    optimizer_class = getattr(fastloop, name)
    if more.get("max_grad_norm") is not None:
        optimizer_class = functools.partial(optimizer_class, norm_group=torch.distributed.group.WORLD)
    return ZeroRedundancyOptimizer(params, optimizer_class, **more)


def zero(rank, name, clipped, as_views):
    model, alone = new_model(), new_model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    settings = settings_of(name, **({"max_grad_norm": 0.1} if clipped else {}))
    opt = zero_optimizer(name, model.parameters(), parameters_as_bucket_view=as_views, **settings)
    expected = make(name, alone.parameters(), **settings)
    train(parallel, opt, range(4))
    norms = train(alone, expected, range(4))
    if clipped:
        torch.testing.assert_close(opt.optim.grad_norm, norms[-1], rtol=1e-6, atol=0)
    close(model, alone)
    opt.consolidate_state_dict(to=0)
    if rank == 0:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        saved = torch.load(file)
        for index, q in enumerate(alone.parameters()):
            for key, value in expected.state[q].items():
                torch.testing.assert_close(saved["state"][index][key], value, rtol=1e-5, atol=1e-6)
    return [bits(p) for p in model.parameters()]


@pytest.mark.parametrize("as_views", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@every_optimizer
def test_zero_redundancy_optimizer(name, clipped, as_views, processes):
    agreed(processes.call(zero, name, clipped, as_views))


def zero_without_parameters(rank, name):
    """Two parameters: of three processes one has nothing to do but to tell and hear the norm."""
    settings = settings_of(name, max_grad_norm=0.1)
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    alone = copy.deepcopy(model)
    opt, expected = zero_optimizer(name, model.parameters(), **settings), make(name, alone.parameters(), **settings)
    for seed in range(3):
        train(model, opt, [seed])
        same_norms([opt.optim.grad_norm], train(alone, expected, [seed]))
    close(model, alone)
    return opt.optim.grad_norm.item()


@every_optimizer
def test_zero_redundancy_optimizer_with_fewer_parameters_than_processes(name, processes):
    agreed(processes.call(zero_without_parameters, name))


def zero_exact(rank, name, folder, resume):
    """Saved by one number of processes and resumed by another: bit by bit what one process does."""
    settings = settings_of(name, max_grad_norm=0.1, ema_decay=0.9)
    model, alone = new_model(), new_model()
    opt, expected = zero_optimizer(name, model.parameters(), **settings), make(name, alone.parameters(), **settings)
    file = os.path.join(folder, "zero.pt")
    if not resume:
        exact_training(model, opt, range(3))
        opt.consolidate_state_dict(to=0)
        if rank == 0:
            torch.save({"model": model.state_dict(), "optim": opt.state_dict()}, file)
        return
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(copy.deepcopy(saved["optim"]))  # ZeroRedundancyOptimizer empties what it is given
    plain = new_model()
    whole = make(name, plain.parameters(), **settings)
    plain.load_state_dict(saved["model"])
    whole.load_state_dict(saved["optim"])
    exact_training(alone, expected, range(3))
    for m, o in ((model, opt), (plain, whole), (alone, expected)):
        exact_training(m, o, range(3, 5))
    wanted = [bits(p) for p in alone.parameters()]
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in plain.parameters()] == wanted
    assert whole_bits(whole) == whole_bits(expected)
    assert opt.optim.skipped_steps.item() == 1


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 3), (3, 2)])
@every_optimizer
def test_a_checkpoint_of_zero_redundancy_optimizer_continues(name, saved_by, resumed_by, pool, tmp_path):
    pool(saved_by).call(zero_exact, name, str(tmp_path), resume=False)
    pool(resumed_by).call(zero_exact, name, str(tmp_path), resume=True)


def zero_without_group(rank, name, more):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    (setting,) = more
    with pytest.raises(ValueError, match=rf"\[{name}\] {setting} .*norm_group"):
        ZeroRedundancyOptimizer(new_model().parameters(), getattr(fastloop, name), **more)


@pytest.mark.parametrize("more", [{"max_grad_norm": 0.1}, {"error_if_nonfinite": True}], ids=["clips", "raises"])
@every_optimizer
def test_zero_redundancy_optimizer_measures_only_with_a_group(name, more, processes):
    """Each rank would clip by the norm of its own part, and one that raises would leave the others waiting for it."""
    processes.call(zero_without_group, name, more)


def zero_nonfinite(rank, name, raises):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = new_model()
    opt = ZeroRedundancyOptimizer(
        model.parameters(),
        getattr(fastloop, name),
        **settings_of(name, max_grad_norm=0.1, norm_group=torch.distributed.group.WORLD, error_if_nonfinite=raises),
    )
    before = [bits(p) for p in model.parameters()]

    def poison(model, seed):
        next(model.parameters()).grad.view(-1)[0] = float("inf")  # this parameter belongs to one rank

    if raises:
        with pytest.raises(RuntimeError, match="not finite"):
            train(model, opt, range(1), after_backward=poison)
    else:
        train(model, opt, range(1), after_backward=poison)
    assert [bits(p) for p in model.parameters()] == before
    return opt.optim.skipped_steps.item()


@pytest.mark.parametrize("raises", [False, True])
@every_optimizer
def test_zero_redundancy_optimizer_skips_or_raises_on_every_rank(name, raises, processes):
    assert agreed(processes.call(zero_nonfinite, name, raises)) == (not raises)


# -- the norm of parts that each process holds for itself --------------------------------------------------------


def parts(rank, name, more):
    """Plain parameters, other ones on each rank; only the first has gradients, and the last has not even parameters."""
    torch.manual_seed(rank)
    mine = [torch.nn.Parameter(torch.randn(5)) for _ in range(2 if rank < 2 else 0)]
    settings = settings_of(name, max_grad_norm=0.1, norm_group=torch.distributed.group.WORLD, **more)
    opt = make(name, [{"params": mine}], **settings)
    norms = []
    for grad in (3.0, float("nan"), 1.0):
        if rank == 0:
            for p in mine:
                p.grad = torch.full_like(p, grad)
        before = bits_of_shards(opt)
        opt.step()
        assert (bits_of_shards(opt) != before) == (rank == 0 and grad == grad)
        norms.append(repr(opt.grad_norm.item()))
    assert opt.skipped_steps.item() == 1
    return norms


@every_backend
@every_optimizer
def test_norm_group_sums_over_processes(name, more, processes):
    first, bad, last = map(float, agreed(processes.call(parts, name, more)))
    assert first == pytest.approx(90**0.5, rel=1e-6)
    assert bad != bad
    assert last == pytest.approx(10**0.5, rel=1e-6)
