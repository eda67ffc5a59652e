# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: saved in the background from a copy, whole or not at all.

A save copies the tensors on the caller's thread and writes them on another: into a hidden folder, every file hashed and
synced, the manifest last, then one rename. Old checkpoints are deleted after that. Processes meet in the file system
alone: a thread beside the training must not enter its collectives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastloop._version import __version__
from fastloop.loop.leftovers import Session, clean
from fastloop.loop.manifest import (
    FORMAT,
    MANIFEST,
    NAME,
    VERSION,
    Checkpoint,
    CheckpointError,
    rank_stem,
    read_manifest,
    render_manifest,
    scan,
)
from fastloop.loop.retention import Policy, ranked
from fastloop.loop.safetensors_writer import Pace, sync_folder, write_file
from fastloop.loop.staging import Staged, Staging, parts_of

__all__ = ["Checkpoint", "CheckpointError", "Store"]

EXIT_SECONDS = 10.0  # for other processes once this one is about to end: they may be dead
RESERVED = ("latest", "final", "best", "manifest")  # which mean something else to `find`, or are taken
POLL_SECONDS = 0.02
SHARE = 0.25  # of the time that a save in the background works, until it is waited for
NICENESS = 10  # of the writing thread, so that it takes cores that training leaves


class _FirstFailed(Exception):
    """Process 0 has given the checkpoint up."""


@dataclass(frozen=True)
class _Order:
    """Everything that the writing thread needs, none of which the caller can still change."""

    name: str
    temporary: Path
    fields: dict[str, Any]  # of the manifest
    tensors: Staged
    rank_tensors: Staged | None
    documents: dict[str, bytes]
    rank_documents: bytes | None
    forms: dict[str, str]
    pace: Pace


class Store:
    """Checkpoints of one run in one folder.

    Every process makes one with the same arguments and calls `save` in the same order. Readers (`newest`, `best`,
    `find`) look at the folder alone; let rank 0 decide and tell the others the name.

    Args:
        folder: of the checkpoints.
        rank, world_size: this process among those that save.
        keep_last, keep_best, keep_log_spaced, monitors: see `retention.Policy`.
        session: a word that all processes share and no other run has. None: one process makes it up; of several, rank 0
            does and broadcasts it over torch.distributed's group.
        timeout: seconds that a process waits for the others' parts.
        owner: the folder is this run's own: it is made, and what killed runs left there finished or removed. False: to
            read, or to save beside what is not ours; a save makes the folder if it is missing and deletes no other
            checkpoint.

    Raises:
        ValueError: a setting out of range; several processes, no session and no process group.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        keep_last: int | None = 3,
        keep_best: int = 1,
        keep_log_spaced: bool = False,
        monitors: Mapping[str, str] | None = None,
        session: str | None = None,
        timeout: float = 600.0,
        owner: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"[Store] rank must lie in [0, world_size), got {rank} of {world_size}")
        self.folder = Path(folder)
        self.policy = Policy(keep_last if owner else None, keep_best, keep_log_spaced, dict(monitors or {}))
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._session = Session(self.folder, _shared_word(session, world_size))
        self._saves = 0
        self._staging, self._rank_staging = Staging(), Staging()
        self._thread: threading.Thread | None = None
        self._pace = Pace(1.0)
        self._process = os.getpid()
        self._error: BaseException | None = None
        self._others_may_be_dead = False
        self._damaged: dict[str, list[str]] = {}  # by name: what a full check has found
        if rank == 0 and owner:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)

    # ---- saving

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the memory for a copy of these tensors now, so that the first save need not."""
        self._join()
        self._staging.copy(parts_of(tensors, self._rank, self._world_size)[0]).ready()

    def save(
        self,
        name: str,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        documents: Mapping[str, Any] | None = None,
        rank_tensors: Mapping[str, Tensor] | None = None,
        rank_documents: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        reason: str = "asked",
        wait: bool = False,
    ) -> Path:
        """Copy the state and write it in the background; every process calls it.

        Returns once the copy is made (on CUDA: is ordered before whatever the current stream does next). A save under
        way is waited for first. A failed one is warned about and raised by `wait`.

        Args:
            name: the folder's name; one of the same name is replaced.
            step: global_step.
            tensors: on any device; DTensors are written by shards. Plain tensors and `documents` are taken from rank 0.
            documents: JSON, a file each.
            rank_tensors, rank_documents: of this process alone, such as random states.
            info, metrics, reason: for the manifest; metrics are what `best` goes by. From rank 0.
            wait: return when it is written, raise what failed.

        Returns:
            Where it is, or will be.

        Raises:
            ValueError: a name or a tensor that cannot be written.
            TypeError: a document that is no JSON.
            OSError, CheckpointError: with `wait`, why it failed.
        """
        for given in (name, *(documents or ())):
            if NAME.fullmatch(given) is None or given in RESERVED:
                raise ValueError(
                    f"[Store] names must be made of letters, digits and _.=+- and be none of {RESERVED}, got {given!r}"
                )
        self._join()
        self._saves += 1
        if self._rank == 0:
            self._session.open()
        parts, forms = parts_of(tensors, self._rank, self._world_size)
        own_parts, own_forms = parts_of(rank_tensors or {}, 0, 1)
        own_file = f"ranks/{rank_stem(self._rank)}.safetensors"
        fields = {
            "format": FORMAT, "version": VERSION, "name": name, "step": int(step), "reason": reason,
            "time": time.time(),
            "metrics": {key: float(value) for key, value in (metrics or {}).items()}, "info": dict(info or {}),
            "world_size": self._world_size, "session": f"{self._session.word}-{self._saves}",
            "versions": {"fastloop": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip
        order = _Order(
            name=name,
            temporary=self.folder / f".tmp-{name}-{self._session.word}-{self._saves}",
            fields=json.loads(_json("info", fields)),  # a copy, and TypeError here and now
            documents={key: _json(key, value) for key, value in (documents or {}).items()},
            rank_documents=_json("rank_documents", rank_documents) if rank_documents else None,
            forms={**forms, **{f"{own_file}:{key}": dtype for key, dtype in own_forms.items()}},
            tensors=self._staging.copy(parts),
            rank_tensors=self._rank_staging.copy(own_parts) if own_parts else None,
            pace=Pace(1.0 if wait else SHARE),
        )
        self._pace = order.pace
        self._error, self._process = None, os.getpid()
        # Not a daemon: the interpreter waits for it before it ends. Signals go to the main thread, not to it.
        self._thread = threading.Thread(
            target=self._run, args=(order, wait), name=f"fastloop-save-{name}", daemon=False
        )
        self._thread.start()
        if wait:
            self.wait()
        return self.folder / name

    @property
    def busy(self) -> bool:
        """A save is under way."""
        return self._thread is not None and self._process == os.getpid() and self._thread.is_alive()

    def wait(self) -> None:
        """Return when the save under way is written; raise, once, what the last one failed with."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, failed: bool = False) -> None:
        """Wait for the save under way and give the memory back. A failed save has been warned about.

        Args:
            failed: the run failed, perhaps because another process died: its part is waited for a few seconds only.
        """
        self._others_may_be_dead = failed
        self._join()
        self._others_may_be_dead = False
        self._session.close()
        self._staging, self._rank_staging = Staging(), Staging()

    def _join(self) -> None:
        if self._thread is not None and self._process == os.getpid():  # a forked child has no such thread
            self._pace.hurry()
            self._thread.join()
        self._thread = None

    # ---- reading

    def newest(self, usable: Callable[[Checkpoint], bool] = lambda checkpoint: True) -> Checkpoint | None:
        """The whole checkpoint saved last of those that are `usable`, every file verified; None if there is none.

        Damaged ones are warned about, by name, and passed over.
        """
        good, damaged = scan(self.folder)
        for name, damages in damaged.items():
            _warn_damaged(name, damages)
        return self._first_whole(filter(usable, good))

    def best(self, metric: str | None = None, *, mode: str | None = None) -> Checkpoint | None:
        """The whole checkpoint with the best `metric` (the first one monitored), verified; None if there is none.

        Args:
            metric: None for the first one monitored.
            mode: "min" or "max", which is the better; needed for a metric that is not monitored.

        Raises:
            ValueError: which metric, or which way it is better, is not known.
        """
        monitors = self.policy.monitors
        if metric is None and not monitors:
            raise ValueError("[Store] no metric is monitored; say which one, e.g. best('val/loss', mode='min')")
        metric = next(iter(monitors)) if metric is None else metric
        mode = monitors.get(metric) if mode is None else mode
        if mode is None:
            known = f"only {', '.join(map(repr, monitors))}" if monitors else "nothing is"
            raise ValueError(
                f"[Store] {metric!r} is not monitored, {known}; say which way it is better: "
                f"'best:{metric}:max' or 'best:{metric}:min', in best() mode='max' or 'min'"
            )
        if mode not in ("min", "max"):
            raise ValueError(f'[Store] mode must be "min" or "max", got {mode!r}')
        order = ranked(scan(self.folder)[0], metric, mode)
        return self._first_whole(c for c in order if isinstance(c, Checkpoint))

    def find(self, which: str | os.PathLike[str], *, verified: bool = False) -> Checkpoint:
        """The checkpoint that is meant: "latest", "final", "best", "best:<metric>", a folder's name or a path.

        A metric that is not monitored needs its mode: "best:<metric>:min" or "best:<metric>:max".
        A path may also be a run's folder or one of checkpoints: the newest there. With `verified` another process has
        verified it, and the files of a name or path are not hashed again.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it is damaged.
            ValueError: the best by a metric that is not monitored, without its mode.
        """
        text = os.fspath(which)
        found: Checkpoint | None = None
        if text == "latest":
            found = self.newest()
        elif text == "final":
            found = self.newest(lambda checkpoint: checkpoint.name.startswith("final-"))
        elif text == "best" or text.startswith("best:"):
            metric, mode = text.partition(":")[2], None
            if metric not in self.policy.monitors and metric.endswith((":min", ":max")):
                metric, _, mode = metric.rpartition(":")
            found = self.best(metric or None, mode=mode)
        else:
            for path in (self.folder / text, Path(text)):
                if (path / MANIFEST).exists():
                    return Checkpoint(path, verified=verified).require_whole()
            for path in (Path(text) / "checkpoints", Path(text)):
                if path.is_dir() and found is None:
                    found = self._first_whole(scan(path)[0])
        if found is None:
            raise FileNotFoundError(
                f"[Store] no whole checkpoint {text!r}; {self.folder} has {[c.name for c in scan(self.folder)[0]]}"
            )
        return found

    def _first_whole(self, checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
        for checkpoint in checkpoints:
            damages = checkpoint.verify()
            if not damages:
                return checkpoint
            self._damaged[checkpoint.name] = damages
            _warn_damaged(checkpoint.name, damages)
        return None

    # ---- the writing thread

    def _run(self, order: _Order, waited_for: bool) -> None:
        if not waited_for and hasattr(os, "setpriority") and platform.system() == "Linux":
            with contextlib.suppress(OSError):  # a thread has a niceness of its own on Linux only
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            if self._rank == 0:
                self._write_as_first(order)
            else:
                self._write_as_other(order)
        except BaseException as error:
            self._error = error
            _warn(f"[Store] checkpoint {order.name} was not saved: {error}")

    def _write_as_first(self, order: _Order) -> None:
        temporary = order.temporary
        try:
            (temporary / "ranks").mkdir(parents=True)
            files = self._write_own(order)
            for name, content in order.documents.items():
                files[f"{name}.json"] = write_file(temporary / f"{name}.json", [content])
            forms = dict(order.forms)
            for rank in range(1, self._world_size):
                part = self._part_of(rank, order)
                files |= part["files"]
                forms |= part["forms"]
            self._finish(order, files, forms)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if self._world_size > 1:
                with contextlib.suppress(OSError):  # the others need not wait for their time limit
                    self._failure_mark(order).touch()
            raise
        try:
            self._retire(order.name)
        except OSError as error:
            _warn(f"[Store] old checkpoints in {self.folder} could not be deleted: {error}")

    def _write_own(self, order: _Order) -> dict[str, Any]:
        """Write this process's files; {name: {"size", "sha256"}}."""
        temporary, stem, files = order.temporary, rank_stem(self._rank), {}
        order.tensors.ready()
        files[f"{stem}.safetensors"] = write_file(
            temporary / f"{stem}.safetensors", order.tensors.buffers(), order.pace
        )
        if order.rank_tensors is not None:
            order.rank_tensors.ready()
            name = f"ranks/{stem}.safetensors"
            files[name] = write_file(temporary / name, order.rank_tensors.buffers())
        if order.rank_documents is not None:
            name = f"ranks/{stem}.json"
            files[name] = write_file(temporary / name, [order.rank_documents])
        return files

    def _finish(self, order: _Order, files: dict[str, Any], forms: dict[str, str]) -> None:
        """Manifest, sync, rename: the checkpoint is there."""
        temporary, final = order.temporary, self.folder / order.name
        size = sum(file["size"] for file in files.values())
        good, _ = scan(self.folder)
        fields = order.fields | {"files": files, "forms": forms, "size": size}
        fields["number"] = 1 + max((checkpoint.number for checkpoint in good), default=0)
        write_file(temporary / MANIFEST, [render_manifest(fields)])
        sync_folder(temporary / "ranks")
        sync_folder(temporary)
        if final.exists():  # it goes back if we are killed before the next line: see clean()
            final.rename(self.folder / f".tmp-{order.name}-{self._session.word}-{self._saves}-replaced")
        temporary.rename(final)
        sync_folder(self.folder)

    def _retire(self, just_written: str) -> None:
        """Delete what need not be kept, and what was replaced."""
        self._damaged.pop(just_written, None)
        good, _ = scan(self.folder)
        whole = [checkpoint for checkpoint in good if checkpoint.name not in self._damaged]
        for name in self.policy.to_delete(whole, just_written):
            # Renamed first: a deletion that is cut short must not leave a damaged checkpoint.
            (self.folder / name).rename(self.folder / f".del-{name}-{self._session.word}-{self._saves}")
        for pattern in (f".del-*-{self._session.word}-*", f".tmp-*-{self._session.word}-*-replaced"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        for mark in self.folder.glob(f".failed-{self._session.word}-*"):  # everyone is past those saves
            mark.unlink(missing_ok=True)

    # ---- several processes

    def _write_as_other(self, order: _Order) -> None:
        try:
            self._write_part(order)
        except (FileNotFoundError, _FirstFailed):  # process 0 removes the folder, perhaps while we write into it
            shutil.rmtree(order.temporary, ignore_errors=True)
            raise CheckpointError(f"process 0 could not save {order.name}") from None

    def _write_part(self, order: _Order) -> None:
        temporary = order.temporary
        self._await(lambda: (temporary / "ranks").is_dir(), order, "process 0 to begin")
        stem = temporary / "ranks" / rank_stem(self._rank)
        try:
            part = {"files": self._write_own(order), "forms": order.forms}
            write_file(stem.with_suffix(".part"), [json.dumps(part).encode()])
            stem.with_suffix(".part").rename(stem.with_suffix(".done"))  # never seen half-written
        except BaseException:
            (temporary / f"{rank_stem(self._rank)}.safetensors").unlink(missing_ok=True)  # room for the mark
            with contextlib.suppress(OSError):
                stem.with_suffix(".failed").touch()
            raise
        self._await(lambda: not temporary.exists(), order, "process 0 to finish")
        saved = self.folder / order.name
        if not saved.exists():
            raise _FirstFailed
        if read_manifest(saved)["session"] != order.fields["session"]:
            raise CheckpointError(f"process 0 did not save {order.name}")

    def _part_of(self, rank: int, order: _Order) -> dict[str, Any]:
        stem = order.temporary / "ranks" / rank_stem(rank)
        failed = stem.with_suffix(".failed")
        self._await(lambda: stem.with_suffix(".done").exists() or failed.exists(), order, f"process {rank}")
        if failed.exists():
            raise CheckpointError(f"process {rank} could not write its part")
        part = json.loads(stem.with_suffix(".done").read_bytes())
        stem.with_suffix(".done").unlink()
        return part

    def _failure_mark(self, order: _Order) -> Path:
        return self.folder / f".failed-{order.fields['session']}"

    def _await(self, done: Callable[[], bool], order: _Order, what: str) -> None:
        deadline, ending = time.monotonic() + self._timeout, None
        while not done():
            now = time.monotonic()
            if self._rank != 0 and self._failure_mark(order).exists():
                raise _FirstFailed
            if ending is None and (self._others_may_be_dead or not threading.main_thread().is_alive()):
                ending = now + EXIT_SECONDS
            if now > deadline or (ending is not None and now > ending):
                raise CheckpointError(
                    f"waited for {what} in vain; is it alive, and does it save to the same {self.folder}?"
                )
            time.sleep(POLL_SECONDS)


def _json(what: str, value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"[Store] {what} must be JSON (numbers, strings, lists, dicts): {error}") from None


def _warn(text: str) -> None:
    """Warn on the writing thread, where a warning turned into an error could reach nobody."""
    with contextlib.suppress(Warning):
        warnings.warn(text, stacklevel=2)


def _warn_damaged(name: str, damages: list[str]) -> None:
    warnings.warn(f"[Store] checkpoint {name} is damaged and passed over: {'; '.join(damages)}", stacklevel=3)


def _shared_word(session: str | None, world_size: int) -> str:
    """16 hex digits that all processes of this run have and no other run."""
    if session is not None:
        if not session.isalnum():
            raise ValueError(f"[Store] session must be made of letters and digits, got {session!r}")
        return hashlib.sha256(session.encode()).hexdigest()[:16]  # the form that clean() knows
    word = os.urandom(8).hex()
    if world_size == 1:
        return word
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            f"[Store] {world_size} processes need a session in common; initialize torch.distributed first or pass one"
        )
    words = [word]
    torch.distributed.broadcast_object_list(words, src=0)
    return words[0]
