# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several processes: written by shards, read by any number of processes, and nobody waits for ever."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from test_loop_checkpoint import equal_states, loaded, names, same_bits

from fastloop.loop import safetensors_writer
from fastloop.loop.__main__ import main
from fastloop.loop.checkpoint import Checkpoint, CheckpointError, Store
from fastloop.loop.manifest import render_manifest

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

SECONDS = 180
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch", "numpy", "pytest", "psutil", "safetensors.torch", "torch.distributed.tensor",
        "torch.distributed.checkpoint", "torch.distributed.device_mesh", "fastloop.loop.__main__",
    ]
)  # fmt: skip


def serve(function, rank, world, rendezvous, answers, args):
    from gloo import join  # not above: a build of torch without gloo has nothing to put in its place

    join(rank, world, rendezvous, SECONDS)
    try:
        answers.put((rank, None, function(rank, world, *args)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))


@pytest.fixture
def run(tmp_path):
    """Run `function(rank, world, *args)` in `world` processes of one group; what they returned, by rank."""
    workers = []

    def run(world, function, *args):
        answers = CONTEXT.Queue()
        rendezvous = tmp_path / f"rendezvous-{len(workers)}"
        started = [
            CONTEXT.Process(target=serve, args=(function, rank, world, rendezvous, answers, args), daemon=True)
            for rank in range(world)
        ]
        workers.extend(started)
        for worker in started:
            worker.start()
        results = {}
        for _ in range(world):
            rank, error, result = answers.get(timeout=SECONDS)
            assert error is None, f"rank {rank}: {error}"
            results[rank] = result
        for worker in started:
            worker.join(SECONDS)
            assert worker.exitcode == 0
        return [results[rank] for rank in range(world)]

    yield run
    for worker in workers:
        worker.kill()


def whole():
    """What all processes together hold; rows that they cannot share evenly, or of which some get nothing."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "even": torch.randn(12, 4, generator=generator),
        "uneven": torch.randn(7, 3, generator=generator),
        "short": torch.randn(1, 3, generator=generator),
        "empty": torch.randn(0, 3, generator=generator),
        "columns": torch.randn(3, 5, generator=generator).double(),
        "bf16": torch.randn(5, generator=generator).bfloat16(),
        "mask": torch.rand(9, generator=generator) < 0.5,
        "complex": torch.randn(5, 2, generator=generator, dtype=torch.complex128),
        "copied": torch.randn(3, generator=generator),
        "scalar": torch.tensor(3.0),
    }
    if hasattr(torch, "float8_e8m0fnu"):
        tensors["bytes"] = torch.arange(11, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return tensors


def shared(tensors, shape):
    """`tensors` as DTensors on a mesh of this shape; on two dimensions the outer one has copies."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", shape)
    out = {"plain": torch.arange(4)}
    for name, tensor in tensors.items():
        dim = 1 if name == "columns" else 0
        placement = Replicate() if name in ("copied", "scalar") else Shard(dim)
        local = tensor
        if not placement.is_replicate():
            parts = tensor.chunk(shape[-1], dim)
            place = mesh.get_coordinate()[-1]
            local = parts[place] if place < len(parts) else tensor.narrow(dim, 0, 0)
        placements = [Replicate()] * (len(shape) - 1) + [placement]
        stride = torch.empty(tensor.shape, device="meta").stride()
        out[name] = DTensor.from_local(
            local.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=stride
        )
    return out


def write(rank, world, folder, shape):
    store = Store(folder, rank=rank, world_size=world)
    for step in (1, 2):
        path = store.save(
            f"step-{step}", step=step, tensors=shared(whole(), shape), documents={"loop": {"step": step}},
            rank_tensors={"random": torch.full((3,), rank)}, rank_documents={"data": [rank, world]},
            metrics={"loss": rank}, wait=step == 2,
        )  # fmt: skip
    assert store.newest().step == 2
    store.close()
    return str(path)


def read(rank, world, path, shape):
    """The bits of this process's shards after a load, and of what they should be."""
    wanted = shared(whole(), shape)
    targets = shared({name: torch.zeros_like(tensor) for name, tensor in whole().items()}, shape)
    targets["plain"].zero_()
    checkpoint = Store(os.path.dirname(path)).find("step-2", verified=rank != 0)
    checkpoint.load(targets)
    for name, target in targets.items():
        local, expected = (getattr(t, "_local_tensor", t) for t in (target, wanted[name]))
        assert same_bits(local, expected), name
    assert [checkpoint.rank_document("data", k) for k in range(3)] == [[0, 2], [1, 2], None]
    return {k: checkpoint.rank_tensors(k).get("random", torch.empty(0)).tolist() for k in range(3)}


@pytest.mark.parametrize("shape", [(3,), pytest.param((2, 3), marks=pytest.mark.slow)], ids=["three", "six"])
def test_two_write_and_one_and_more_read(run, tmp_path, shape):
    folder = tmp_path / "checkpoints"
    paths = run(2, write, folder, (2,))
    assert paths == [str(folder / "step-2")] * 2
    assert names(folder) == ["step-1", "step-2"]
    store = Store(folder)
    checkpoint = store.newest()
    plain = {**whole(), "plain": torch.arange(4)}
    assert checkpoint.tensors() == {name: (t.shape, t.dtype) for name, t in plain.items()}
    assert equal_states(loaded(checkpoint), plain)
    assert checkpoint.metrics == {"loss": 0.0}
    assert checkpoint.manifest["world_size"] == 2
    sizes = [(checkpoint.path / f"rank-0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 0.8 * sum(sizes), "each writes its own part"
    for random in run(math.prod(shape), read, paths[0], shape):
        assert random == {0: [0, 0, 0], 1: [1, 1, 1], 2: []}
    assert main(["verify", str(folder)]) == 0


def test_copies_of_a_shard_are_written_once(run, tmp_path):
    run(4, write, tmp_path / "c", (2, 2))
    checkpoint = Store(tmp_path / "c").newest()
    assert equal_states(loaded(checkpoint), {**whole(), "plain": torch.arange(4)})
    from safetensors import safe_open

    held = []
    for rank in range(4):
        with safe_open(checkpoint.path / f"rank-{rank:05d}.safetensors", framework="pt") as file:
            held.append(set(file.keys()))
    assert held[2] == held[3] == set()
    assert {"copied", "scalar", "plain", "empty", "short"} <= held[0] - held[1]


def test_a_part_that_is_missing_is_noticed(run, tmp_path):
    """Also where a forged manifest does not name it."""
    path = Path(run(2, write, tmp_path / "c", (2,))[0])
    manifest = Checkpoint(path).manifest
    for rank in (0, 1):
        name = f"rank-{rank:05d}.safetensors"
        (path / name).rename(tmp_path / name)
        fewer = {file: entry for file, entry in manifest["files"].items() if file != name}
        (path / "manifest.json").write_bytes(render_manifest(manifest | {"files": fewer}))
        with pytest.raises(CheckpointError):
            Store(tmp_path / "c").find("step-2").load({"even": torch.zeros(12, 4)})
        (tmp_path / name).rename(path / name)


def strided(rank, world, folder):
    """FSDP2 over tensor parallelism on one dimension: shards are boxes or are refused, never written wrongly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor = torch.arange(32.0).reshape(8, 4)
    # tp first, then dp: this process has the box with the number tp * 2 + dp.
    dp, tp = mesh.get_coordinate()
    box = tensor.chunk(2)[tp].chunk(2)[dp]
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    fsdp = DTensor.from_local(box.clone(), mesh, placements, run_check=False, shape=(8, 4), stride=(4, 1))
    both = distribute_tensor(tensor, mesh, [Shard(0), Shard(1)])
    store = Store(folder, rank=rank, world_size=world)
    store.save("step-1", step=1, tensors={"fsdp": fsdp, "both": both}, wait=True)
    assert equal_states(loaded(store.newest()), {"fsdp": tensor, "both": tensor})
    fsdp.to_local().zero_()
    store.newest().load({"fsdp": fsdp})
    assert torch.equal(fsdp.to_local(), box)
    alone = init_device_mesh("cpu", (4,))
    gaps = DTensor.from_local(
        torch.zeros(2, 4), alone, [_StridedShard(0, split_factor=2)], run_check=False, shape=(8, 4), stride=(4, 1)
    )
    partial = DTensor.from_local(tensor, alone, [Partial()], run_check=False)
    for name, bad, text in (("gaps", gaps, "is no box"), ("sum", partial, "yet to be summed")):
        with pytest.raises(ValueError, match=f"cannot save '{name}'.*{text}"):
            store.save("step-2", step=2, tensors={name: bad})
    torch.distributed.barrier()


def test_strided_shards(run, tmp_path):
    run(4, strided, tmp_path / "c")


def one_fails(rank, world, folder, who):
    """The save of one process fails at its data: all hear of it soon, and the next save works."""
    warnings.simplefilter("ignore")
    store = Store(folder, rank=rank, world_size=world, timeout=30.0)
    tensors = shared(whole(), (world,))
    store.save("step-1", step=1, tensors=tensors, wait=True)
    write_all = safetensors_writer._write_all
    if rank == who:

        def full(file, chunk):
            raise OSError(28, "No space left on device")

        safetensors_writer._write_all = full
    began = time.monotonic()
    store.save("step-2", step=2, tensors=tensors)
    text = ""
    try:
        store.wait()
    except (OSError, CheckpointError) as error:
        text = str(error)
    seconds = time.monotonic() - began
    safetensors_writer._write_all = write_all
    torch.distributed.barrier()
    store.save("step-3", step=3, tensors=tensors, wait=True)
    torch.distributed.barrier()
    store.close()
    return text, seconds


@pytest.mark.parametrize("who", [0, 1])
def test_a_failure_of_one_is_the_failure_of_all(run, tmp_path, who):
    answers = run(2, one_fails, tmp_path / "c", who)
    assert "No space left" in answers[who][0]
    assert f"process {who} could not" in answers[1 - who][0]
    assert max(seconds for _, seconds in answers) < 15, "half of the time limit"
    assert names(tmp_path / "c") == ["step-1", "step-3"]


def test_process_0_may_give_up_while_another_writes(tmp_path, monkeypatch):
    """It removes what is there, and what the other adds meanwhile is left to the other."""
    store = Store(tmp_path, rank=1, world_size=2, session="a")
    ranks = tmp_path / f".tmp-step-1-{store._session.word}-1" / "ranks"
    ranks.mkdir(parents=True)
    monkeypatch.setattr(safetensors_writer, "_write_all", lambda *_: shutil.rmtree(ranks, ignore_errors=True))
    text = "process 0 could not save step-1"
    with pytest.warns(UserWarning, match=text), pytest.raises(CheckpointError, match=text):
        store.save("step-1", step=1, tensors={}, wait=True)
    assert names(tmp_path) == []


def one_is_gone(rank, world, folder):
    warnings.simplefilter("ignore")
    store = Store(folder, rank=rank, world_size=world, timeout=0.5)
    if rank == 1:
        return ""
    with pytest.raises(CheckpointError, match=r"waited for process 1 in vain") as error:
        store.save("step-1", step=1, tensors=shared(whole(), (world,)), wait=True)
    store.close()
    return str(error.value)


def test_a_process_that_is_gone_is_not_waited_for_for_ever(run, tmp_path):
    assert str(tmp_path / "c") in run(2, one_is_gone, tmp_path / "c")[0]
    assert not [name for name in names(tmp_path / "c") if not name.startswith(".failed")]


def test_several_processes_need_a_word_in_common(tmp_path):
    with pytest.raises(ValueError, match="need a session in common"):
        Store(tmp_path, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank must lie"):
        Store(tmp_path, rank=2, world_size=2, session="a")
    with pytest.raises(ValueError, match="letters and digits"):
        Store(tmp_path, rank=0, world_size=2, session="a-b")
