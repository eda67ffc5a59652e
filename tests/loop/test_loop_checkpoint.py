# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one process: what is saved comes back bit for bit, in the background; the command line shows it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import warnings
from itertools import pairwise

import psutil
import pytest
import torch

from fastloop.loop import safetensors_writer
from fastloop.loop.__main__ import main
from fastloop.loop.checkpoint import Checkpoint, CheckpointError, Store

OPTIONAL = ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
DTYPES = [
    *safetensors_writer.EXPORT_NAMES,
    torch.complex128,
    *(getattr(torch, name) for name in OPTIONAL if hasattr(torch, name)),
]
SHAPES = [(), (1,), (7,), (3, 5), (0,), (2, 0, 3), (2, 3, 4, 5)]


def same_bits(a, b):
    """Same dtype, shape and bit patterns, whatever the strides."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def random_tensor(dtype, shape):
    """Every bit pattern, NaN and subnormals included; bool has two."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)


def state(seed, size=1000):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(size, generator=generator),
        "model.bias": torch.randn(3, generator=generator).bfloat16(),
        "optimizer.weight.exp_avg": torch.randn(size, generator=generator),
        "optimizer.weight.step": torch.tensor(float(seed)),
    }


def save(store, step, wait=True, **more):
    return store.save(f"step-{step:09d}", step=step, tensors=state(step), wait=wait, **more)


def in_background(store, save, step):
    """A background save, from its begin to its end."""
    save(store, step, wait=False)
    store._thread.join()


def loaded(checkpoint, like=None):
    """The checkpoint's tensors, in memory that held something else."""
    targets = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors().items()}
    for target in targets.values():
        target.view(torch.uint8).fill_(0xA5) if target.dim() and target.numel() else None
    checkpoint.load(targets)
    return targets


def equal_states(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- what is saved comes back ------------------------------------------------------------------------------------


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    tensors = {f"model.{dtype}.{shape}": random_tensor(dtype, shape) for dtype in DTYPES for shape in SHAPES}
    Store(tmp_path).save("step-1", step=1, tensors=tensors, rank_tensors=tensors, wait=True)
    checkpoint = Store(tmp_path).newest()
    assert checkpoint.tensors() == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    assert equal_states(loaded(checkpoint), tensors)
    assert equal_states(checkpoint.rank_tensors(0), tensors)


def test_layout_conjugation_and_aliases_are_values(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": base[0].expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugated": torch.randn(5, dtype=torch.complex64).conj(),
        "negated": torch.randn(5, dtype=torch.complex64).conj().imag,
        "alias": base,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        'a "name"\nin Ünicode.': torch.ones(2),
    }
    Store(tmp_path).save("step-1", step=1, tensors=tensors, wait=True)
    checkpoint = Store(tmp_path).newest()
    assert equal_states(loaded(checkpoint), {name: t.detach().resolve_neg() for name, t in tensors.items()})
    strided, parameter = torch.zeros(4, 6).t(), torch.nn.Parameter(torch.zeros(3))
    checkpoint.load({"alias": strided, "parameter": parameter})
    assert strided.stride() == (1, 6)
    assert torch.equal(strided, base)
    assert torch.equal(parameter, tensors["parameter"])


def test_documents_and_facts_come_back(tmp_path):
    documents = {"loop": {"step": 3, "big": 2**80, "worst": [math.inf, None, "ü"]}, "data": []}
    store = Store(tmp_path, monitors={"loss": "min"})
    path = save(
        store, 3, documents=documents, rank_documents={"random": [1, 2]}, metrics={"loss": math.nan, "best": 1},
        info={"model": "Net"}, reason="SIGTERM",
    )  # fmt: skip
    checkpoint = Checkpoint(path)
    assert checkpoint.documents == ["loop", "data"] or sorted(checkpoint.documents) == ["data", "loop"]
    assert checkpoint.document("loop") == documents["loop"]
    assert checkpoint.document("data") == []
    assert checkpoint.rank_document("random", 0) == [1, 2]
    assert checkpoint.rank_document("random", 1) is None
    assert checkpoint.rank_document("absent", 0) is None
    assert checkpoint.rank_tensors(0) == {}
    assert math.isnan(checkpoint.metrics["loss"])
    assert (checkpoint.step, checkpoint.info, checkpoint.manifest["reason"]) == (3, {"model": "Net"}, "SIGTERM")
    assert checkpoint.manifest["versions"]["torch"] == torch.__version__
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert checkpoint.manifest["size"] == on_disk - (path / "manifest.json").stat().st_size
    with pytest.raises(CheckpointError, match="no document 'optimizer'"):
        checkpoint.document("optimizer")


def test_nothing_to_save_is_a_checkpoint_too(tmp_path):
    Store(tmp_path).save("step-0", step=0, tensors={}, wait=True)
    checkpoint = Store(tmp_path).newest()
    assert checkpoint.tensors() == {}
    checkpoint.load({})


def test_blocks_are_many_and_small_here(tmp_path, monkeypatch):
    monkeypatch.setattr("fastloop.loop.staging.BLOCK", 1000)
    monkeypatch.setattr(safetensors_writer, "CHUNK", 7)
    tensors = {f"t{n}": torch.randn(n, 11) for n in range(30)}
    Store(tmp_path).save("step-1", step=1, tensors=tensors, wait=True)
    assert equal_states(loaded(Store(tmp_path).newest()), tensors)


def test_load_checks_names_shapes_and_dtypes_before_it_changes_anything(tmp_path):
    checkpoint = Checkpoint(save(Store(tmp_path), 1))
    for name, wrong, text in (
        ("model.other", torch.zeros(3), "model.other is not in it"),
        ("model.bias", torch.zeros(4).bfloat16(), r"\(3,\) torch.bfloat16 there and \(4,\) torch.bfloat16 here"),
        ("model.bias", torch.zeros(3), r"torch.bfloat16 there and \(3,\) torch.float32 here"),
    ):
        weight = torch.zeros(1000)
        with pytest.raises(CheckpointError, match=text):
            checkpoint.load({"model.weight": weight, name: wrong})
        assert not weight.any()


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.zeros(3, device="meta"), "meta"),
    ],
)
def test_a_tensor_that_cannot_be_saved_is_named(tmp_path, tensor, text):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)cannot save 'model.x'.*{text}"):
        store.save("step-1", step=1, tensors={"model.x": tensor})
    assert store.newest() is None
    save(store, 2)
    assert store.newest().step == 2


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "with space", "-x", "manifest", "best"])
def test_a_name_that_is_no_folder_of_the_store_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="names must be made of"):
        Store(tmp_path / "c").save(name, step=1, tensors={})
    with pytest.raises(ValueError, match="names must be made of"):
        Store(tmp_path / "c").save("good", step=1, tensors={}, documents={name: 1})
    assert names(tmp_path / "c") == []


def test_what_is_no_json_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"\[Store\] loop must be JSON"):
        Store(tmp_path).save("step-1", step=1, tensors={}, documents={"loop": {"x": torch.ones(1)}})


# -- in the background ---------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """Holds every writing thread until it is set."""
    gate = threading.Event()
    write = safetensors_writer._write_all

    def gated(file, chunk):
        assert gate.wait(30)
        write(file, chunk)

    monkeypatch.setattr(safetensors_writer, "_write_all", gated)
    yield gate
    gate.set()


def test_a_save_holds_what_was_there_when_it_began(tmp_path, gate):
    store, tensors = Store(tmp_path), state(1)
    documents = {"loop": {"list": [1]}}
    store.save("step-1", step=1, tensors=tensors, documents=documents)
    assert store.busy
    assert store.newest() is None
    for tensor in tensors.values():
        tensor.fill_(7)
    documents["loop"]["list"].append(2)
    gate.set()
    store.wait()
    assert not store.busy
    checkpoint = store.newest()
    assert equal_states(loaded(checkpoint), state(1))
    assert checkpoint.document("loop") == {"list": [1]}


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    store = Store(tmp_path)
    save(store, 1, wait=False)
    threading.Timer(0.2, gate.set).start()
    save(store, 2, wait=False)
    assert gate.is_set()
    assert (tmp_path / "step-000000001").exists()
    store.wait()
    for n in (1, 2):
        assert equal_states(loaded(store.find(f"step-{n:09d}")), state(n))


def test_memory_is_taken_once_and_used_again(tmp_path):
    store = Store(tmp_path)
    store.prepare(state(0))
    places = {block.data_ptr() for block in store._staging._blocks}
    assert len(places) == 1
    for step in range(1, 4):
        save(store, step)
        store.save("weights", step=step, tensors={"model.bias": state(step)["model.bias"]}, wait=True)
        assert {block.data_ptr() for block in store._staging._blocks} == places
    assert equal_states(loaded(store.find("step-000000003")), state(3))
    assert loaded(store.find("weights")).keys() == {"model.bias"}
    store.close()
    assert store._staging.nbytes == 0


def test_fifty_saves_do_not_grow(tmp_path):
    store = Store(tmp_path, keep_last=1)
    tensors = {f"t{n}": torch.randn(1 << 16) for n in range(32)}  # 8 MiB
    process, size, threads = psutil.Process(), [], threading.active_count()
    for step in range(60):
        store.save(f"step-{step}", step=step, tensors=tensors, documents={"loop": list(range(1000))})
        if step % 10 == 9:
            store.wait()
            size.append(process.memory_info().rss)
    # Ten saves may meet an allocator that takes a few huge pages; copies left behind would show in each ten.
    assert min(after - before for before, after in pairwise(size)) < 8 << 20, "copies of the state are left behind"
    assert threading.active_count() <= threads
    assert names(tmp_path)[1:] == ["step-59"]  # beside the lock
    store.close()
    assert names(tmp_path) == ["step-59"]


def test_a_failure_is_warned_about_raised_once_and_harms_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.warns(UserWarning, match="step-000000002 was not saved.*Input/output error"):
            in_background(store, save, 2)
        with pytest.raises(OSError, match="Input/output error"):
            store.wait()
        store.wait()
        with pytest.warns(UserWarning, match="step-000000003"), pytest.raises(OSError, match="Input/output error"):
            save(store, 3, wait=True)
    store.close()
    assert names(tmp_path) == ["step-000000001"]
    save(store, 4)
    assert equal_states(loaded(store.newest()), state(4))


def test_the_same_name_again_replaces(tmp_path):
    store = Store(tmp_path, keep_last=None)
    for seed in (1, 2):
        store.save("mine", step=1, tensors=state(seed), wait=True)
    (tmp_path / "mine" / "manifest.json").write_text("damaged")
    store.save("mine", step=1, tensors=state(3), wait=True)
    assert equal_states(loaded(store.find("mine")), state(3))
    store.close()
    assert names(tmp_path) == ["mine"]


SCRIPT = """
import os, sys, threading, time, torch
from fastloop.loop import safetensors_writer
from fastloop.loop.checkpoint import Store
write = safetensors_writer._write_all
gate = threading.Event()
safetensors_writer._write_all = lambda file, chunk: (gate.wait(), time.sleep(0.1), write(file, chunk))
store = Store(sys.argv[1])
store.save("step-1", step=1, tensors={"x": torch.arange(5)})
child = os.fork()
if child == 0:
    assert not store.busy
    store.wait()
    store.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert store.busy
gate.set()
if sys.argv[2] == "raise":
    raise RuntimeError("of the training")
"""


@pytest.mark.parametrize("end", ["return", "raise"])
def test_the_end_of_the_program_waits_for_a_save_and_a_fork_does_not(tmp_path, end):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), end], timeout=180, capture_output=True, text=True
    )
    assert run.returncode == (1 if end == "raise" else 0), run.stderr
    assert ("of the training" in run.stderr) == (end == "raise")
    assert torch.equal(loaded(Store(tmp_path).newest())["x"], torch.arange(5))


# -- which one --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run with three steps, the second one best, and an end."""
    store = Store(tmp_path / "run" / "checkpoints", monitors={"val/loss": "min", "val/acc": "max"})
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.3)):
        save(store, step, metrics={"val/loss": loss, "val/acc": loss})
    store.save("final-000000030", step=30, tensors=state(30), metrics={"val/loss": 0.4, "val/acc": 0.4}, wait=True)
    return store


def test_find(run, tmp_path, monkeypatch):
    folder = run.folder
    for which, name in {
        "latest": "final-000000030",
        "final": "final-000000030",
        "best": "step-000000020",
        "best:val/loss": "step-000000020",
        "best:val/acc": "step-000000010",
        "step-000000030": "step-000000030",
        str(folder / "step-000000010"): "step-000000010",
        folder: "final-000000030",
        folder.parent: "final-000000030",
    }.items():
        assert run.find(which).name == name, which
    monkeypatch.chdir(tmp_path)
    assert run.find("run").name == "final-000000030"
    for nothing in ("step-000000040", "best:val/other:min", tmp_path):
        with pytest.raises(FileNotFoundError, match="step-000000030"):
            run.find(nothing)
    with pytest.raises(ValueError, match="no metric is monitored"):
        Store(folder).best()
    assert run.newest(lambda c: c.name.startswith("step-")).step == 30


def test_best_by_a_metric_that_is_not_monitored_needs_its_mode(run):
    reader = Store(run.folder, owner=False, monitors={"val/loss": "min", "f1:max": "max"})
    for ask in (reader.best, lambda metric: reader.find(f"best:{metric}")):
        with pytest.raises(ValueError, match=r"'val/acc' is not monitored, only 'val/loss', 'f1:max'; .*:val/acc:max"):
            ask("val/acc")
    with pytest.raises(ValueError, match="nothing is; say"):
        Store(run.folder, owner=False).best("val/acc")
    with pytest.raises(ValueError, match='"min" or "max"'):
        reader.best("val/acc", mode="most")
    assert reader.find("best:val/acc:max").step == reader.best("val/acc", mode="max").step == 10
    assert reader.find("best:val/acc:min").step == reader.best("val/acc", mode="min").step == 20
    assert reader.find("best:val/loss").step == 20
    assert reader.find("best:val/loss:max").step == 10
    assert reader.best("f1:max") is None  # a metric's name that ends so


def test_who_does_not_own_the_folder_makes_and_deletes_nothing(tmp_path):
    folder = tmp_path / "not" / "yet"
    store = Store(folder, owner=False, keep_last=1)
    assert store.newest() is None
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        store.find("latest")
    assert names(tmp_path) == []
    for step in (1, 2):
        save(store, step)
    store.close()
    assert names(folder) == ["step-000000001", "step-000000002"]
    assert Store(folder, owner=False).newest().step == 2


def test_the_newest_is_the_one_saved_last(tmp_path):
    """Who goes back to step 10 and trains on resumes from there, and keeps what comes of it."""
    store = Store(tmp_path, keep_last=2)
    for step in (10, 20, 30, 11, 12):
        save(store, step)
    assert store.newest().step == 12
    store.close()
    assert names(tmp_path) == ["step-000000011", "step-000000012"]


def test_old_ones_go_when_the_new_one_is_there(run):
    for step in (40, 50):
        save(run, step, metrics={"val/loss": step, "val/acc": 0.0})
    run.close()
    assert names(run.folder) == [
        "final-000000030",
        *(f"step-{step:09d}" for step in (10, 20, 30, 40, 50)),
    ]  # 10 has the best accuracy, 20 the best loss
    save(run, 60, metrics={"val/acc": 1.0})
    save(run, 70)
    assert [c for c in (10, 20, 30, 40) if (run.folder / f"step-{c:09d}").exists()] == [20]


# -- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["rich", "plain"])
def tables(request, monkeypatch):
    if request.param == "plain":
        for part in ("box", "console", "table"):
            monkeypatch.setitem(sys.modules, f"rich.{part}", None)


def test_inspect(run, capsys, tables):
    assert main(["inspect", str(run.folder.parent)]) == 0
    text = capsys.readouterr().out
    for word in ("step-000000010", "final-000000030", "val/acc", "0.1", "asked"):
        assert word in text
    assert main(["inspect", str(run.folder / "step-000000010")]) == 0
    text = capsys.readouterr().out
    for word in ("optimizer.weight.exp_avg", "(1000,)", "bfloat16", torch.__version__, "val/loss"):
        assert word in text
    (run.folder / "step-000000010" / "rank-00000.safetensors").unlink()
    assert main(["inspect", str(run.folder)]) == 1
    assert "step-000000010 is damaged: rank-00000.safetensors: No such file" in capsys.readouterr().out
    assert main(["inspect", str(run.folder / "step-000000010")]) == 1


def test_inspect_cuts_no_cell_in_a_pipe(run, capsys, tables, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["inspect", str(run.folder)]) == 0
    text = capsys.readouterr().out
    assert "final-000000030" in text
    assert "…" not in text


def test_verify(run, capsys):
    assert main(["verify", str(run.folder)]) == 0
    assert capsys.readouterr().out.count(": good\n") == 4
    file = run.folder / "step-000000020" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(run.folder)]) == 1
    out = capsys.readouterr().out
    assert "step-000000020: rank-00000.safetensors: content differs from its hash" in out
    assert out.count(": good\n") == 3
    assert main(["verify", str(run.folder / "step-000000020")]) == 1
    assert main(["verify", str(run.folder / "step-000000030")]) == 0


def test_export(tmp_path, capsys):
    from safetensors.torch import load_file

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    weights = model.state_dict()
    average = torch.randn(4, 3)
    tensors = {f"model.{name}": t for name, t in weights.items()} | {"optimizer.0.weight.ema": average}
    store = Store(tmp_path / "run" / "checkpoints")
    store.save("step-1", step=1, tensors=tensors, info={"tied": {"head.weight": "0.weight"}}, wait=True)
    out = tmp_path / "weights.safetensors"
    command = ["export", str(tmp_path / "run"), "--output", str(out)]
    assert main(command) == 0
    exported = load_file(out)
    tied = exported.pop("head.weight")
    model.load_state_dict(exported)
    assert equal_states(exported, dict(weights))
    assert same_bits(tied, weights["0.weight"])

    assert main(command) == 2  # it is there
    assert main([*command, "--force", "--ema", "--dtype", "fp32"]) == 0
    exported = load_file(out)
    assert same_bits(exported["0.weight"], average)
    assert same_bits(exported["head.weight"], average)
    assert same_bits(exported["0.bias"], weights["0.bias"].float())
    assert same_bits(exported["1.num_batches_tracked"], weights["1.num_batches_tracked"])
    assert main([*command, "--force", "--ema"]) == 0
    assert same_bits(load_file(out)["0.weight"], average.bfloat16())

    inside = tmp_path / "run" / "checkpoints" / "step-1"
    assert main(["export", str(inside), "-o", str(inside / "model.safetensors")]) == 2
    assert Checkpoint(inside).verify() == []
    store.save("step-2", step=2, tensors={"model.x": torch.ones(1), "model.c": torch.ones(2, dtype=torch.complex64)})
    store.wait()
    assert main([*command, "--force", "--ema"]) == 2
    assert "no averages" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert load_file(out)["c"].dtype == torch.complex64


def test_wrong_use_is_two(tmp_path, capsys):
    for command in ("inspect", "verify", "export", "curves"):
        assert main([command, str(tmp_path)]) == 2
        assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["explode"])
    assert end.value.code == 2


def test_nothing_warns_in_a_quiet_life(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = Store(tmp_path)
        save(store, 1)
        loaded(store.newest())
        store.close()
