# SPDX-License-Identifier: Apache-2.0
"""Processes for the loop's tests: started quickly, in one gloo group or alone, to be ended at will."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback

SECONDS = 120  # for one call; a collective that one rank never enters would wait for ever
PRELOADED = ["torch", "numpy", "fastloop.loop", "torch.distributed.fsdp", "torch.distributed.checkpoint"]


def context():
    made = multiprocessing.get_context("forkserver")  # torch is imported once, for all processes
    made.set_forkserver_preload(PRELOADED)
    return made


def _enter(function, rank, world, rendezvous, results, args):
    from gloo import join

    try:
        join(rank, world, rendezvous, SECONDS)
        results.send((None, function(rank, *args)))
    except Exception:
        results.send((traceback.format_exc(), None))
        sys.stdout.flush()
        os._exit(1)  # as a script that raised, but without waiting for the others


class Started:
    """`function(rank, *args)` under way in `world` processes."""

    def __init__(self, function, world, folder, *args):
        start = context()
        rendezvous = folder / f"rendezvous-{time.monotonic_ns()}"
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = start.Pipe(duplex=False)
            arguments = (function, rank, world, rendezvous, theirs, args)
            process = start.Process(target=_enter, args=arguments)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def kill(self, *ranks, number=signal.SIGKILL):
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds=SECONDS):
        """Exit codes; kills what does not end."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.01))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if late:
            self.kill(*late)
            raise AssertionError(f"ranks {late} had not ended after {seconds} s")
        return [process.exitcode for process in self.processes]

    def results(self):
        """What each rank returned; raises what one raised."""
        found = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS):
                self.kill()
                raise AssertionError(f"no answer from rank {rank}")
            try:
                error, result = pipe.recv()
            except EOFError:
                error, result = "it died", None
            if error is not None:
                self.kill()
                raise AssertionError(f"rank {rank}: {error}")
            found.append(result)
        self.wait()
        return found


def run(function, world, folder, *args):
    """`function(rank, *args)` in `world` processes of one group: what each returned."""
    return Started(function, world, folder, *args).results()
