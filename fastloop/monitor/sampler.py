# SPDX-License-Identifier: Apache-2.0
"""Takes samples: one, or one after another on a thread of its own."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from fastloop.monitor.host import Host
from fastloop.monitor.nvidia import Device, Gpu, cuda_index
from fastloop.monitor.record import Readings, Sample, summarize

KEPT = 3600
LEAST_INTERVAL = 0.01  # seconds: CPU time is counted in hundredths of a second
ONCE = 0.1  # seconds between the two readings that one sample's rates need
END = 2.0  # seconds that stop() waits for a reading under way


class Sampler:
    """The device and the host, read together."""

    def __init__(self, index: int | None) -> None:
        self._gpu, self._host = Gpu(index), Host()

    def take(self) -> Sample:
        """Read everything now; rates are those since the sample before. Never raises."""
        readings = Readings()
        self._gpu.read(readings)
        self._host.read(readings)
        return readings.sample(time.time())

    def close(self) -> None:
        self._gpu.close()


def sample(device: Device = None) -> Sample:
    """One sample, now. It takes 0.1 s: the use of the CPUs is that between two readings.

    device: index, name or torch.device of a CUDA device; by default the current one. CUDA is not started for it.
    """
    sampler = Sampler(cuda_index(device))
    try:
        time.sleep(ONCE)
        return sampler.take()
    finally:
        sampler.close()


class Monitor:
    """Samples every `interval` seconds on a thread of its own, from `start` (or `with`) to `stop`.

    device: index, name or torch.device of a CUDA device; by default the one that is current at the start, or 0 while
        CUDA does not run. It is found in NVML by its UUID.
    on_sample: called with each Sample, on the monitor's thread; what it raises is kept in `error` and ends nothing.

    Nothing here raises into the training. The thread ends with the process and with `stop`; a fork has no monitor, and
    one that it inherits does nothing there. A sample of the host takes 0.8 ms of CPU time, 1.3 ms with four children (2
    CPUs of an AMD EPYC); what NVML's answers take on top has not been measured.
    """

    def __init__(
        self, interval: float = 1.0, *, device: Device = None, on_sample: Callable[[Sample], object] | None = None
    ) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int | float):
            raise TypeError(f"[monitor] interval must be a number of seconds, got {interval!r}; pass e.g. 1.0")
        if not LEAST_INTERVAL <= interval <= threading.TIMEOUT_MAX:
            raise ValueError(f"[monitor] interval must be at least {LEAST_INTERVAL} s, got {interval!r}; pass e.g. 1.0")
        cuda_index(device)  # a device that is none is an error here, not in the thread
        self._interval, self._device, self._on_sample = float(interval), device, on_sample
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._pid = 0
        self.error: BaseException | None = None

    @property
    def latest(self) -> Sample | None:
        """The last sample; None before the first, which is taken one interval after the start."""
        try:
            return self._samples[-1]
        except IndexError:
            return None

    @property
    def samples(self) -> list[Sample]:
        """The last 3600 samples, the newest last."""
        return list(self._samples.copy())

    def start(self) -> Monitor:
        """Begin to sample; does nothing if it does already."""
        if self.running:
            return self
        sampler = Sampler(cuda_index(self._device))
        self._pid, self._end = os.getpid(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(sampler, self._end), name="fastloop-monitor", daemon=True
        )
        self._thread.start()
        atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """End the sampling; the samples stay. Does nothing if none is under way, or in a fork."""
        if not self.running:
            return
        thread, self._thread = self._thread, None
        atexit.unregister(self.stop)
        self._end.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(END)

    @property
    def running(self) -> bool:
        """Whether this process samples: a fork does not."""
        return self._thread is not None and self._pid == os.getpid()

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def summary(self) -> dict[str, float | None]:
        """Means over the samples kept, by field, None where no sample has it; and

        `samples`: their number. `ranks`: processes of torch.distributed. `<field>_peak`: the largest value,
        `host_available_bytes_least`: the smallest. `gpu_throttle_power`, `gpu_throttle_thermal`: the share of samples
        in which power or temperature held the GPU's clocks down.
        """
        distributed: Any = torch.distributed
        started = distributed.is_available() and distributed.is_initialized()
        return summarize(self.samples, distributed.get_world_size() if started else 1)

    def _run(self, sampler: Sampler, end: threading.Event) -> None:
        try:
            while not end.wait(self._interval):
                taken = sampler.take()
                self._samples.append(taken)
                if self._on_sample is not None:
                    self._on_sample_of(taken)
        except Exception as error:  # a sampler that broke is not the training's concern
            self.error = error
        finally:
            sampler.close()

    def _on_sample_of(self, taken: Sample) -> None:
        try:
            assert self._on_sample is not None
            self._on_sample(taken)
        except Exception as error:
            self.error = error
