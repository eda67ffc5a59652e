# SPDX-License-Identifier: Apache-2.0
"""Training over several processes: DDP, FSDP2, ZeroRedundancyOptimizer and distributed checkpoints, over gloo.

Two processes serve all tests of this file; a test is a function that both call. Each compares with the same training
in one process, which every rank repeats for itself.
"""

from __future__ import annotations

import copy
import datetime
import functools
import io
import os
import queue
import traceback
import warnings

import pytest
import torch
from cases import CASES
from support import bits, example, make

import fastloop

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

WORLD = 2
SECONDS = 60  # for one test; a collective that one rank never enters would wait for ever
every_optimizer = pytest.mark.parametrize("name", CASES)


class Processes:
    """Processes of one gloo group that call functions of this module by name."""

    def __init__(self, folder):
        context = torch.multiprocessing.get_context("spawn")
        self.answers = context.Queue()
        self.requests = [context.Queue() for _ in range(WORLD)]
        # A file, not a port: nobody else can take it in between.
        arguments = [(rank, folder / "rendezvous", self.requests[rank], self.answers) for rank in range(WORLD)]
        self.workers = [context.Process(target=serve, args=a, daemon=True) for a in arguments]
        for worker in self.workers:
            worker.start()

    def call(self, function, *args, **kwargs):
        """Run `function(rank, ...)` in every process and return what they returned, or raise what one raised."""
        for requests in self.requests:
            requests.put((function.__name__, args, kwargs))
        results, errors = {}, []
        try:
            while len(results) < WORLD and not errors:
                rank, error, result = self.answers.get(timeout=SECONDS)
                results[rank] = result
                errors += [f"rank {rank}: {error}"] if error else []
        except queue.Empty:
            errors.append(f"no answer from ranks {sorted(set(range(WORLD)) - set(results))} in {SECONDS} s")
        if errors:
            self.stop()  # the other rank may be in a collective for ever
            pytest.fail("\n".join(errors), pytrace=False)
        return [results[rank] for rank in range(WORLD)]

    @property
    def alive(self):
        return all(worker.is_alive() for worker in self.workers)

    def stop(self):
        for worker in self.workers:
            worker.kill()
            worker.join()


def serve(rank, rendezvous, requests, answers):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=SECONDS)
    )
    while True:
        name, args, kwargs = requests.get()
        try:
            torch.manual_seed(0)
            answers.put((rank, None, globals()[name](rank, *args, **kwargs)))
        except BaseException:
            answers.put((rank, traceback.format_exc(), None))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    started = []

    def get():
        if not started or not started[-1].alive:
            started.append(Processes(tmp_path_factory.mktemp("gloo")))
        return started[-1]

    yield get
    for processes in started:
        processes.stop()


@pytest.fixture
def processes(pool):
    """Two processes of one group; new ones if the last test ended them."""
    return pool()


# -- the training ----------------------------------------------------------------------------------------------


def new_model(dtype=torch.float32):
    """Rows that two processes cannot share evenly, and a bias of one element, of which one process gets nothing."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    return torch.nn.Sequential(*layers).to(dtype)


def settings_of(name, **more):
    return example(name) | {"lr": 0.05} | more


def batch(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator).to(dtype)


def train(model, opt, seeds, scale=1.0, after_backward=None):
    """The same batch on every rank, so that an average over ranks is what one process has, bit by bit."""
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


def sharded(model, mesh=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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
            x = x[rank::WORLD] if m is parallel else x  # each rank has its half of the batch
            m(x).square().mean().backward()
            o.step()
    close(model, alone)
    return [bits(p) for p in model.parameters()]


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@every_optimizer
def test_ddp(name, max_grad_norm, processes):
    first, second = processes.call(ddp, name, max_grad_norm)
    assert first == second


# -- FSDP2 -----------------------------------------------------------------------------------------------------


def fsdp(rank, name, more):
    model, alone = sharded(new_model()), new_model()
    settings = settings_of(name, **more)
    opt, expected = (make(name, m.parameters(), **settings) for m in (model, alone))
    norms, alone_norms = (train(m, o, range(4)) for m, o in ((model, opt), (alone, expected)))
    for ours, single in zip(norms, alone_norms, strict=True):
        if more.get("max_grad_norm") is None:
            assert ours is None
        else:
            assert ours.dtype == single.dtype == torch.float32
            torch.testing.assert_close(ours, single, rtol=1e-6, atol=0)
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
    return [float(norm) for norm in norms if norm is not None]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param({"max_grad_norm": 0.1}, id="clipped"),
        pytest.param({"max_grad_norm": float("inf"), "max_grad_value": 0.01, "ema_decay": 0.9}, id="value and ema"),
        pytest.param({"max_grad_norm": 0.1, "backend": "reference"}, id="reference"),
    ],
)
@every_optimizer
def test_fsdp2_steps_as_one_process(name, more, processes):
    """The norm spans the whole mesh: each rank clips by the same number, that of a single process."""
    first, second = processes.call(fsdp, name, more)
    assert first == second


def fsdp_bfloat16(rank, name):
    settings = settings_of(name, max_grad_norm=0.1, master_weights=True)
    model, alone = sharded(new_model(torch.bfloat16)), new_model(torch.bfloat16)
    for m in (model, alone):
        train(m, make(name, m.parameters(), **settings), range(4))
    close(model, alone, rtol=1e-2, atol=1e-2)


@every_optimizer
def test_fsdp2_with_master_weights(name, processes):
    processes.call(fsdp_bfloat16, name)


def hybrid(rank, name):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    model, alone = sharded(new_model(), mesh), new_model()
    settings = settings_of(name, max_grad_norm=0.1)
    opt, expected = (make(name, m.parameters(), **settings) for m in (model, alone))
    for ours, single in zip(train(model, opt, range(3)), train(alone, expected, range(3)), strict=True):
        torch.testing.assert_close(ours, single, rtol=1e-6, atol=0)
    close(model, alone)


@every_optimizer
def test_replicas_of_a_hybrid_mesh_count_once(name, processes):
    processes.call(hybrid, name)


def fsdp_nonfinite(rank, name):
    """A NaN in the shard of one rank alone."""
    model = sharded(new_model())
    opt = make(name, model.parameters(), **settings_of(name, max_grad_norm=0.1))
    train(model, opt, range(1))
    before = bits_of_shards(opt)

    def poison(model, seed):
        if rank == 1:
            next(model.parameters()).grad.to_local().view(-1)[0] = float("nan")

    train(model, opt, range(1, 2), after_backward=poison)
    assert bits_of_shards(opt) == before
    assert opt.skipped_steps.item() == 1
    train(model, opt, range(2, 3))
    assert bits_of_shards(opt) != before
    return opt.skipped_steps.item()


def bits_of_shards(opt):
    local = [[p, *opt.state[p].values()] for group in opt.param_groups for p in group["params"]]
    return [bits(getattr(t, "_local_tensor", t)) for tensors in local for t in tensors if isinstance(t, torch.Tensor)]


@every_optimizer
def test_every_rank_skips_the_step_if_one_has_a_nan(name, processes):
    assert processes.call(fsdp_nonfinite, name) == [1, 1]


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


def partial_gradients(rank, name, max_grad_norm):
    """Tensor parallelism: a replicated weight, whose gradient is yet to be summed over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    weight, x = torch.linspace(1, 2, 6), batch(0)
    shared = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [Replicate()]))
    alone = torch.nn.Parameter(weight.clone())
    (distribute_tensor(x, mesh, [Shard(0)]) * shared).square().sum().backward()
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


# -- ZeroRedundancyOptimizer -----------------------------------------------------------------------------------


def zero(rank, name, clipped, as_views):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = new_model(), new_model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    settings = settings_of(name, **({"max_grad_norm": 0.1} if clipped else {}))
    optimizer_class = getattr(fastloop, name)
    if clipped:  # not as an argument of ZeroRedundancyOptimizer's, which would put it into its state_dict
        optimizer_class = functools.partial(optimizer_class, norm_group=torch.distributed.group.WORLD)
    opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class, parameters_as_bucket_view=as_views, **settings)
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
    first, second = processes.call(zero, name, clipped, as_views)
    assert first == second


def zero_without_group(rank, name):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with pytest.raises(ValueError, match=rf"\[{name}\] max_grad_norm .*norm_group"):
        ZeroRedundancyOptimizer(new_model().parameters(), getattr(fastloop, name), max_grad_norm=0.1)


@every_optimizer
def test_zero_redundancy_optimizer_clips_only_with_a_group(name, processes):
    """Each rank would clip by the norm of its own part."""
    processes.call(zero_without_group, name)


def zero_nonfinite(rank, name):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = new_model()
    opt = ZeroRedundancyOptimizer(
        model.parameters(),
        getattr(fastloop, name),
        **settings_of(name, max_grad_norm=0.1, norm_group=torch.distributed.group.WORLD),
    )
    before = [bits(p) for p in model.parameters()]

    def poison(model, seed):
        next(model.parameters()).grad.view(-1)[0] = float("inf")  # this parameter belongs to one rank

    train(model, opt, range(1), after_backward=poison)
    assert [bits(p) for p in model.parameters()] == before
    return opt.optim.skipped_steps.item()


@every_optimizer
def test_zero_redundancy_optimizer_skips_on_every_rank(name, processes):
    assert processes.call(zero_nonfinite, name) == [1, 1]


# -- the norm of parts that each process holds for itself --------------------------------------------------------


def parts(rank, name):
    """Plain parameters, other ones on each rank; the second holds none with a gradient."""
    torch.manual_seed(rank)
    mine = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    opt = make(name, mine, **settings_of(name, max_grad_norm=0.1, norm_group=torch.distributed.group.WORLD))
    if rank == 0:
        for p in mine:
            p.grad = torch.full_like(p, 3.0)
    opt.step()
    return opt.grad_norm.item()


@every_optimizer
def test_norm_group_sums_over_processes(name, processes):
    assert processes.call(parts, name) == pytest.approx([90**0.5] * WORLD, rel=1e-6)
