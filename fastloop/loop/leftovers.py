# SPDX-License-Identifier: Apache-2.0
"""What killed writers leave behind: finished where it is whole, removed where it is not, untouched while they live.

The process that begins and finishes checkpoints (rank 0) holds a file lock for as long as it lives; the kernel gives it
up at any death, SIGKILL included. Names:

    .tmp-<checkpoint>-<word>-<save>   being written by the run of this word; with `-replaced`: making room
    .del-<checkpoint>-<word>-<save>   being deleted
    .failed-<word>-<save>             tells the other processes
    .lock-<word>                      the lock

A word is 16 hex digits. A folder of such a name is ours if its lock is there or if a checkpoint's files are all that it
holds; nothing else is touched, whatever it is called.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import time
import weakref
from pathlib import Path

from fastloop.loop.manifest import NAME, Checkpoint, CheckpointError, holds_checkpoint_files
from fastloop.loop.safetensors_writer import sync_folder

try:
    import fcntl
except ModuleNotFoundError:  # no file locks on this system: leftovers go by their age
    fcntl = None  # type: ignore[assignment]

WORD = r"[0-9a-f]{16}"
LEFTOVER = re.compile(rf"\.(?:tmp|del(?!.*-replaced$))-{NAME.pattern}-(?P<word>{WORD})-[0-9]+(?:-replaced)?")
SIGN = re.compile(rf"\.(?:lock-(?P<lock>{WORD})|failed-(?P<failed>{WORD})-[0-9]+)")
OLD_SECONDS = 24 * 3600.0  # where there are no locks
_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """The sign that the run of this word is alive: a lock on `.lock-<word>`."""

    def __init__(self, folder: Path, word: str) -> None:
        self.word = word
        self._path = folder / f".lock-{word}"
        self._handle: int | None = None

    def open(self) -> None:
        """Take the lock; nothing if it is held."""
        if self._handle is not None or fcntl is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_SH)
            try:
                if os.stat(self._path).st_ino == os.fstat(handle).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(handle)  # cleaned away between the two lines: again
        self._handle = handle
        _open_sessions.add(self)

    def close(self) -> None:
        """Give the lock up and remove its file."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
            _open_sessions.discard(self)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # else the next run's clean() takes the file away
            self.close()


def _close_in_child() -> None:
    """A forked worker that outlives its parent must not keep up the sign; closing its copy leaves the lock alone."""
    for session in list(_open_sessions):
        if session._handle is not None:
            os.close(session._handle)
            session._handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def clean(folder: Path) -> None:
    """Finish or remove what dead writers left in `folder`.

    A checkpoint that has its manifest lacks only the rename, and one that had to make room lost its name only: they get
    it if it is free, the last saved one first.
    """
    by_word: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        match = LEFTOVER.fullmatch(path.name) or SIGN.fullmatch(path.name)
        if match is not None and _is_kind(path, is_folder=match.re is LEFTOVER):
            by_word.setdefault(next(filter(None, match.groupdict().values())), []).append(path)
    leftovers = []
    for word, paths in by_word.items():
        lock = folder / f".lock-{word}"
        locked = lock in paths  # before it is taken away
        if not _is_alive(folder, word, paths):
            leftovers += [p for p in paths if p != lock and (locked or not p.is_dir() or holds_checkpoint_files(p))]
    for number, path in sorted(((_number(path), path) for path in leftovers), reverse=True):
        if number >= 0 and _take_name(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_kind(path: Path, is_folder: bool) -> bool:
    """Leftovers are folders, signs are empty files, and none is a link."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:  # its run has just removed it
        return False
    return stat.S_ISDIR(status.st_mode) if is_folder else stat.S_ISREG(status.st_mode) and status.st_size == 0


def _number(path: Path) -> int:
    """Which save a whole leftover was; -1 if it is to be removed."""
    with contextlib.suppress(CheckpointError):
        checkpoint = Checkpoint(path)
        if path.name.startswith(".tmp-") and not checkpoint.verify():
            return checkpoint.number
    return -1


def _take_name(path: Path) -> bool:
    name = Checkpoint(path).manifest["name"]
    final = path.parent / name
    if NAME.fullmatch(name) is None or final.exists():
        return False
    path.rename(final)
    sync_folder(path.parent)
    return True


def _is_alive(folder: Path, word: str, paths: list[Path]) -> bool:
    """Whether a process of this word may still write. Takes its lock file away if not."""
    lock = folder / f".lock-{word}"
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no file locks")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here: a day without a change is taken for a death
        newest = max((path.stat().st_mtime for path in paths if path != lock), default=0.0)
        return time.time() - newest < OLD_SECONDS
    else:
        lock.unlink(missing_ok=True)
        return False
    finally:
        os.close(handle)
