# SPDX-License-Identifier: Apache-2.0
"""Processes of tests over gloo, in groups whose collectives one thread runs.

torch 2.13 gives a group two, and at the end of a collective both assign the same std::string with no lock held
(ProcessGroupGloo::runLoop, pgStatus_->lastCompletedWorkName; helgrind shows it). Seldom, both free its old characters,
and later the process crashes in malloc. Collectives of a group run in order, so one thread does for tests.
"""

from __future__ import annotations

import datetime
import os

import torch
from torch.distributed import distributed_c10d

INTERFACE = "lo"
_Group = distributed_c10d.ProcessGroupGloo


class _OneThread(type):
    def __call__(cls, store, rank, size, timeout):
        options = _Group._Options()
        options._devices = [_Group.create_device(interface=INTERFACE)]
        options._threads = 1
        options._timeout = timeout
        return _Group(store, rank, size, options)

    def __instancecheck__(cls, instance):
        return isinstance(instance, _Group)


class OneThreadGroup(metaclass=_OneThread):
    """Stands where torch.distributed looks for ProcessGroupGloo."""


def join(rank, world, rendezvous, seconds) -> None:
    """Be this rank of `world` processes that meet at the file `rendezvous`; alone, no group is begun.

    Each computes with one thread. All groups that this process makes have one, and meet over the loopback device.
    """
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE  # of what gloo makes by itself
    distributed_c10d.ProcessGroupGloo = OneThreadGroup
    if world > 1:
        timeout = datetime.timedelta(seconds=seconds)
        torch.distributed.init_process_group(
            "gloo", f"file://{rendezvous}", rank=rank, world_size=world, timeout=timeout
        )
