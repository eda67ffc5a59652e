# SPDX-License-Identifier: Apache-2.0
"""What the GPU and the host are doing while something trains: sampled in the background, never in its way.

    with Monitor(interval=1.0) as monitor:
        train()
    print(monitor.summary(), likely_cause(monitor.summary(), wait_share=0.3))

A field is None where the device does not say, and `Sample.reasons` says why; it is never 0 for that. NVIDIA GPUs are
asked through NVML (`pip install 'fastloop[monitor]'`), the host through /proc and its control groups. Nothing here
starts CUDA.
"""

from fastloop.monitor.cause import likely_cause
from fastloop.monitor.record import Sample
from fastloop.monitor.sampler import Monitor, sample

__all__ = ["Monitor", "Sample", "likely_cause", "sample"]
