# SPDX-License-Identifier: Apache-2.0
"""The other end of a worker: starts it in a build's environment, asks, and gives up on one that does not answer."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastloop.bench import usercases
from fastloop.bench.regression import worker

SECONDS = 120.0  # to answer in: importing and setting up a large model on a busy machine
TAIL = 2000  # characters of stderr that an error shows


class WorkerError(Exception):
    """A worker that ended, hung, or said that it could not do what it was asked."""


class Process:
    """A worker that runs in the environment of a build.

    Args:
        path: folders that come first on its sys.path.
        seconds: after which an answer is given up on.
    """

    def __init__(self, path: Sequence[str], seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        found = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": found, "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(worker.__file__).resolve()), str(Path(usercases.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
        )
        self._rest = b""

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def send(self, do: str, **arguments: Any) -> None:
        """Ask for something; `receive` waits for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._ended()) from None

    def receive(self) -> dict[str, Any]:
        """The answer, whatever it says.

        Raises:
            WorkerError: the process ended or did not answer in time.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(self._seconds):
                    self.close()
                    raise WorkerError(f"no answer within {self._seconds:.0f} s; it was ended")
                received = os.read(self._process.stdout.fileno(), 2**16)
                if not received:
                    raise WorkerError(self._ended())
                self._rest += received
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)  # type: ignore[no-any-return]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WorkerError: also where the answer is an error.
        """
        self.send(do, **arguments)
        answer = self.receive()
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def _ended(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read()[-TAIL:].decode(errors="replace").strip()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the process ended with {how}" + (f":\n{said}" if said else "")

    def close(self) -> None:
        """End the process and everything that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
