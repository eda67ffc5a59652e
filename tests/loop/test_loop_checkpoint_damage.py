# SPDX-License-Identifier: Apache-2.0
"""Checkpoints damaged, forged, or cut short by a kill or a full disk: the newest whole one is found and loads."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
import warnings

import pytest
import torch
from test_loop_checkpoint import equal_states, in_background, loaded, names, save, state

from fastloop.loop import leftovers, safetensors_writer
from fastloop.loop.checkpoint import Checkpoint, CheckpointError, Store
from fastloop.loop.manifest import render_manifest, scan


def full_save(store, step):
    """A save with every kind of file."""
    return save(
        store, step, documents={"loop": {"step": step}, "config": {}}, rank_documents={"data": [step]},
        rank_tensors={"random": torch.arange(10)},
    )  # fmt: skip


@pytest.fixture
def store(tmp_path):
    """Two checkpoints, of which the newer one is about to suffer."""
    store = Store(tmp_path)
    full_save(store, 1)
    full_save(store, 2)
    return store


FILES = [
    "manifest.json", "rank-00000.safetensors", "loop.json", "config.json", "ranks/rank-00000.json",
    "ranks/rank-00000.safetensors",
]  # fmt: skip
every_file = pytest.mark.parametrize("file", FILES)


def victim(store):
    path = store.folder / "step-000000002"
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == sorted(FILES)
    return path


def damages(path):
    try:
        return Checkpoint(path).verify()
    except CheckpointError as error:
        return [str(error)]


def passed_over(store, reason):
    """The damage is named, and the older checkpoint taken."""
    with pytest.warns(UserWarning, match=rf"step-000000002 is damaged and passed over: .*{reason}"):
        newest = store.newest()
    assert newest.step == 1
    assert equal_states(loaded(newest), state(1))


@every_file
def test_a_truncated_file(store, file):
    path = victim(store) / file
    whole = path.read_bytes()
    for length in {0, 1, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        passed_over(store, file)
    path.write_bytes(whole + b"\0")
    passed_over(store, file)


@every_file
def test_a_flipped_bit(store, file):
    path = victim(store) / file
    whole = path.read_bytes()
    places = range(len(whole)) if len(whole) < 3000 else random.Random(0).sample(range(len(whole)), 100)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        assert damages(victim(store)), place
    passed_over(store, file)


@every_file
def test_a_missing_file(store, file):
    (victim(store) / file).unlink()
    passed_over(store, file)


@every_file
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_file_that_is_none(store, file, kind, tmp_path):
    path = victim(store) / file
    path.rename(tmp_path / "moved")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "moved")
    passed_over(store, file)


def test_a_file_too_many(store):
    shutil.copy(victim(store) / "rank-00000.safetensors", victim(store) / "rank-00001.safetensors")
    passed_over(store, "rank-00001.safetensors: not in the manifest")


def test_what_nobody_reads_is_no_damage(store):
    (victim(store) / "notes.txt").write_text("best so far")
    assert store.newest().step == 2


def test_all_damaged_is_none_and_none_is_deleted(store):
    for step in (1, 2):
        (store.folder / f"step-{step:09d}" / "loop.json").write_text("")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.newest() is None
    for step in range(3, 9):
        full_save(store, step)
    store.close()
    assert names(store.folder) == [f"step-{step:09d}" for step in (1, 2, 6, 7, 8)]


def test_what_a_full_check_has_found_does_not_count_as_kept(store):
    """Of the same size and with another bit: seen by `newest`, remembered when old ones are deleted."""
    file = victim(store) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    passed_over(store, "hash")
    for step in (3, 4):
        full_save(store, step)
    store.close()
    assert names(store.folder) == [f"step-{step:09d}" for step in (1, 2, 3, 4)]


def test_reading_checks_again_what_it_reads(store):
    checkpoint = store.newest()
    checkpoint.verify()
    (checkpoint.path / "loop.json").write_text('{"step": 3}')  # same size
    (checkpoint.path / "ranks" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"loop.json differs from its hash"):
        checkpoint.document("loop")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors"):
        checkpoint.rank_tensors(0)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load({})


# -- forged ones ---------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file where it goes off."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def forge(path, contents=None, /, **fields):
    """Write files into a checkpoint and give it a manifest that fits: anybody can compute hashes."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    for name, content in (contents or {}).items():
        (path / name).write_bytes(content)
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest |= fields
    (path / "manifest.json").write_bytes(render_manifest(manifest))


def everything(path):
    """Read all that can be read; what was raised."""
    errors = []

    def attempt(read):
        try:
            read()
        except (CheckpointError, RecursionError) as error:
            errors.append(error)

    attempt(lambda: Checkpoint(path).verify())
    attempt(lambda: loaded(Checkpoint(path)))
    attempt(lambda: Checkpoint(path).load({"model.weight": torch.empty(1000)}))
    attempt(lambda: [Checkpoint(path).document(name) for name in Checkpoint(path).documents])
    attempt(lambda: Checkpoint(path).rank_document("data", 0))
    attempt(lambda: Checkpoint(path).rank_tensors(0))
    return errors


@pytest.mark.parametrize("protocol", [0, 2, 5])
@every_file
def test_a_pickle_under_any_name_is_not_executed(store, file, protocol, tmp_path):
    bomb, path = tmp_path / "went-off", victim(store)
    content = pickle.dumps(Bomb(bomb), protocol=protocol)
    pickle.loads(content).close()
    assert bomb.exists(), "this bomb works"
    bomb.unlink()
    if file == "manifest.json":
        (path / file).write_bytes(content)
    else:
        forge(path, {file: content})
    for extra in (".metadata", "model.pt", "__0_0.distcp", "pytorch_model.bin"):
        (path / extra).write_bytes(content)
    assert everything(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.newest()
    assert not bomb.exists()


def safetensors_file(head, body=b"", length=None):
    text = json.dumps(head).encode() if isinstance(head, dict) else head
    return struct.pack("<Q", len(text) if length is None else length) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        safetensors_file(b"", length=2**63),
        safetensors_file(b"", length=2**64 - 1),
        safetensors_file(b"{}", length=90_000_000),
        safetensors_file(b"[" * 100_000),
        safetensors_file(b'{"x":' * 50_000),
        safetensors_file(b"\xff\xfe\0"),
        safetensors_file({"x": F32}),
        safetensors_file({"x": F32 | {"data_offsets": [0, 2**60]}}, b"\0" * 8),
        safetensors_file({"x": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8),
        safetensors_file({"x": F32 | {"shape": [2**40, 2**40]}}, b"\0" * 8),
        safetensors_file({"x": F32 | {"shape": [-2]}}, b"\0" * 8),
        safetensors_file({"x": F32 | {"dtype": "O"}}, b"\0" * 8),
        *(
            safetensors_file({"x": F32, "__metadata__": {"DCP_SHARDING_INFO": info}}, b"\0" * 8)
            for info in (
                "[]", "{}", '{"x": 1}', '{"x": {"saved_offsets": [1e400]}}', '{"x": {"saved_offsets": ["a"]}}',
                '{"x": {"saved_offsets": [1152921504606846976]}}', '{"x": {"saved_offsets": [-5]}}',
                '{"x": {"saved_offsets": []}}', '{"x": {"saved_offsets": [4]}}',
            )
        ),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_an_error_of_ours(store, content):
    path = victim(store)
    forge(path, {"rank-00000.safetensors": content})
    target = {"x": torch.empty(2)}
    with pytest.raises(CheckpointError):
        Checkpoint(path).load(target)
    forge(path, {"ranks/rank-00000.safetensors": content})
    everything(path)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"files": {"../escape.json": {"size": 1, "sha256": ""}}}, "no file of a checkpoint"),
        ({"files": {"ranks/../../escape.json": {"size": 1, "sha256": ""}}}, "no file of a checkpoint"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "no file of a checkpoint"),
        ({"files": {"..": {"size": 1, "sha256": ""}}}, "no file of a checkpoint"),
        ({"files": {"a\n.json": {"size": 1, "sha256": ""}}}, "no file of a checkpoint"),
        ({"files": {"manifest.json": {"size": 1, "sha256": ""}}}, "no file of a checkpoint"),
        ({"files": {"loop.json": {"size": "1", "sha256": ""}}}, "size or hash"),
        ({"files": {"loop.json": []}}, "size or hash"),
        ({"files": []}, "lacks files"),
        ({"step": "1"}, "lacks step"),
        ({"step": True}, "lacks step"),
        ({"metrics": {"loss": "low"}}, "lacks numbers"),
        ({"forms": {"model.weight": "load"}}, "lacks dtypes"),
        ({"version": 2}, "version 1, got .* version 2"),
        ({"format": "other"}, "'fastloop-checkpoint'"),
    ],
)
def test_a_manifest_that_lies_is_refused(store, fields, text):
    forge(victim(store), **fields)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint(victim(store))
    passed_over(store, "")


@pytest.mark.parametrize("content", [b"[]", b"null", b"[" * 200_000, b"\xff", b"{}", b'{"a": 1, "a": 2}'])
def test_a_manifest_that_is_none_is_refused(store, content):
    (victim(store) / "manifest.json").write_bytes(content)
    passed_over(store, "manifest.json")


def test_a_document_too_deep_to_parse_is_an_error_of_ours(store):
    forge(victim(store), {"loop.json": b"[" * 200_000})
    with pytest.raises(CheckpointError, match="is no JSON"):
        Checkpoint(victim(store)).document("loop")


# -- killed ---------------------------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "pytest", "psutil", "safetensors.torch", "fastloop.loop.__main__"])
# What a save does to the disk. Killed before each of them in turn.
CALLS = [(os, name) for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "open")]
CALLS += [(safetensors_writer, "_write_all")]


def die_before(call):
    """SIGKILL at this call of the functions that touch the disk; nothing of ours runs after it."""
    left = [call]

    def counted(function):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for module, name in CALLS:
        setattr(module, name, counted(getattr(module, name)))


def saver(folder, acknowledged, first, wait, calls):
    """Save steps `first`, `first` + 1, ... and say which are certainly there."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = Store(folder, keep_last=2)
    if calls is not None:
        die_before(calls)
    for step in range(first, first + (1_000_000 if calls is None else 3)):
        # Two by turns; the second one replaces itself each time. In the background each has waited for the one before.
        save(store, step, wait=wait, documents={"loop": {"step": step}})
        if wait or step > first:
            acknowledged[0 if wait else 1] = step if wait else step - 1
        store.save("mine", step=step, tensors=state(-step), wait=wait)
        acknowledged[1 if wait else 0] = step


def survives(folder, acknowledged):
    """What must hold after any kill; the steps of both checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no damaged folder is left
        store = Store(folder, keep_last=2)
        newest = store.newest(lambda c: c.name.startswith("step-"))
    step = mine = 0
    if newest is not None:
        step = newest.step
        assert equal_states(loaded(newest), state(step))
        assert newest.document("loop") == {"step": step}
    if (folder / "mine").exists():
        mine = store.find("mine").step
        assert equal_states(loaded(store.find("mine")), state(-mine))
    assert step >= acknowledged[0], "a checkpoint that was there is gone"
    assert mine >= acknowledged[1], "a checkpoint that was there is gone"
    assert not [name for name in names(folder) if name.startswith(".")], "leftovers"
    assert scan(folder)[1] == {}
    return step, mine


def shared_steps(step=0, mine=0):
    """Without a lock: a process killed while it holds one would leave it locked for us."""
    return CONTEXT.Array("q", [step, mine], lock=False)


def spawn(folder, acknowledged, first, wait=True, calls=None):
    process = CONTEXT.Process(target=saver, args=(folder, acknowledged, first, wait, calls))
    process.start()
    return process


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_killed_before_every_call_that_touches_the_disk(tmp_path, stride):
    """Three saves, with a retention that deletes and a name that is replaced; or before every 7th call."""
    ended, calls = False, 0
    while not ended:
        folder = tmp_path / str(calls)
        acknowledged = shared_steps()
        process = spawn(folder, acknowledged, 1, calls=calls)
        process.join(120)
        ended = process.exitcode == 0
        assert ended or process.exitcode == -signal.SIGKILL
        survives(folder, acknowledged[:])
        shutil.rmtree(folder)
        calls += stride
    assert calls > 60, "the calls are counted"


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "background"])
def test_killed_at_random_moments(tmp_path, wait):
    """One run, killed and resumed a dozen times; each goes on from what the last one left."""
    moments, step, mine = random.Random(wait), 0, 0
    for _ in range(12):
        acknowledged = shared_steps(step, mine)
        process = spawn(tmp_path, acknowledged, step + 1, wait)
        while acknowledged[0] == step and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        step, mine = survives(tmp_path, acknowledged[:])
    assert step >= 12


def leftover(store, monkeypatch, kind):
    """A folder as a kill leaves it, made by another store."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        if kind == "whole":
            patch.setattr(type(store.folder), "rename", lambda *args: (_ for _ in ()).throw(OSError("killed")))
        else:
            patch.setattr("fastloop.loop.checkpoint.render_manifest", lambda *args: (_ for _ in ()).throw(OSError()))
        with pytest.warns(UserWarning, match="not saved"):
            in_background(store, save, 5)
    assert any(name.startswith(".tmp-step-000000005") for name in names(store.folder))


@pytest.mark.parametrize(("kind", "found"), [("whole", 5), ("half", 2)])
def test_leftovers_of_the_dead_are_finished_or_removed(store, monkeypatch, kind, found):
    leftover(store, monkeypatch, kind)
    del store._session  # as a death would: the lock is given up
    again = Store(store.folder)
    assert again.newest().step == found
    assert not [name for name in names(store.folder) if name.startswith(".")]


def test_leftovers_of_the_living_stay(store, monkeypatch):
    leftover(store, monkeypatch, "half")
    before = names(store.folder)
    Store(store.folder)
    assert names(store.folder) == before


def test_leftovers_are_left_to_the_owner(store, monkeypatch):
    leftover(store, monkeypatch, "whole")
    del store._session
    before = names(store.folder)
    assert Store(store.folder, owner=False).newest().step == 2
    assert names(store.folder) == before


WORD = "0123456789abcdef"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".tmp-photos-summer-2024", "rank-00000.safetensors"),  # a word that is none of ours
        (".del-photos-summer-2024", "photo.jpg"),
        (".tmp-a-0123456789ABCDEF-1", "rank-00000.safetensors"),
        (f".tmp-a-{WORD}0-1", "rank-00000.safetensors"),
        (f".tmp-.a-{WORD}-1", "rank-00000.safetensors"),
        (f".del-a-{WORD}-1-replaced", "rank-00000.safetensors"),
        (f".tmp-a-{WORD}-1", "photo.jpg"),  # our name, not our files
        (f".tmp-a-{WORD}-1", "ranks/photo.jpg"),
        (f".tmp-a-{WORD}-1", "photos/rank-00000.safetensors"),
        (f".tmp-a-{WORD}-1", None),  # no folder
        (f".lock-{WORD}", None),  # not empty
        (f".failed-{WORD}-1", None),
        (".lock-0123", None),
    ],
)
def test_what_others_put_into_the_folder_stays(tmp_path, name, content):
    path = tmp_path / name / (content or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    (tmp_path / ".tmp-photos-summer-2024").mkdir(exist_ok=True)
    (tmp_path / f".tmp-link-{WORD}-1").symlink_to(tmp_path / ".tmp-photos-summer-2024")
    save(Store(tmp_path), 1)
    assert path.read_text() == "mine"
    assert (tmp_path / f".tmp-link-{WORD}-1").is_symlink()


@pytest.mark.parametrize("content", [(), ("ranks/",), FILES, ("rank-00001.safetensors", "ranks/rank-00001.part")])
def test_a_checkpoint_by_half_is_ours_without_its_lock(tmp_path, content):
    for name in (f".tmp-a-b-{WORD}-12", f".tmp-a-{WORD}-3-replaced", f".del-a-{WORD}-3"):
        (tmp_path / name / "ranks").mkdir(parents=True)
        for file in content:
            if not file.endswith("/"):
                (tmp_path / name / file).touch()
        if not content:
            (tmp_path / name / "ranks").rmdir()
    (tmp_path / f".failed-{WORD}-1").touch()
    Store(tmp_path)
    assert names(tmp_path) == []


def test_whatever_its_lock_is_beside_is_ours(tmp_path):
    (tmp_path / f".tmp-a-{WORD}-1" / ".nfs0001").mkdir(parents=True)
    (tmp_path / f".lock-{WORD}").touch()
    Store(tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_a_session_given_by_name_are_known(tmp_path, monkeypatch):
    store = Store(tmp_path, session="job42")
    leftover(store, monkeypatch, "whole")
    del store._session
    assert Store(tmp_path).newest().step == 5
    assert names(tmp_path) == ["step-000000005"]


def test_without_file_locks_leftovers_go_by_their_age(store, monkeypatch):
    leftover(store, monkeypatch, "half")
    monkeypatch.setattr(leftovers, "fcntl", None)
    before = names(store.folder)
    Store(store.folder)
    assert names(store.folder) == before
    day = time.time() - 2 * leftovers.OLD_SECONDS
    for path in store.folder.glob(".tmp-*"):
        os.utime(path, (day, day))
    Store(store.folder)
    assert not list(store.folder.glob(".tmp-*"))


# -- no room --------------------------------------------------------------------------------------------------------


def big_save(store, step, wait=True):
    return store.save(f"step-{step:09d}", step=step, tensors={"x": torch.full((1 << 18,), float(step))}, wait=wait)


def outlives_no_room(store, text):
    """Earlier checkpoints stay whole, nothing is left behind, and room makes the next save work."""
    with pytest.warns(UserWarning, match=text), pytest.raises(OSError, match=text):
        big_save(store, 2)
    with pytest.warns(UserWarning, match=text):
        in_background(store, big_save, 3)
    assert names(store.folder)[1:] == ["step-000000001"]
    assert equal_states(loaded(store.newest()), state(1))


def test_a_file_size_limit(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        outlives_no_room(store, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    big_save(store, 4)
    assert store.newest().step == 4


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1.5 MB; making one needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1536k", "tmpfs", folder], capture_output=True)
    if not done or done.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk):
    store = Store(small_disk / "run")
    save(store, 1)
    (small_disk / "other").write_bytes(b"\0" * (1 << 20))
    outlives_no_room(store, "No space left on device")
    (small_disk / "other").unlink()
    big_save(store, 4)
    assert store.newest().step == 4
    store.close()
