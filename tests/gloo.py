# SPDX-License-Identifier: Apache-2.0
"""Groups over gloo whose collectives one thread runs.

torch 2.13 gives a group two, and at the end of a collective both assign the same std::string with no lock held
(ProcessGroupGloo::runLoop, pgStatus_->lastCompletedWorkName; helgrind shows it). Seldom, both free its old characters,
and later the process crashes in malloc. Collectives of a group run in order, so one thread does for tests.
"""

from __future__ import annotations

import os

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


def use_one_thread() -> None:
    """For all groups over gloo that this process makes from here on; they meet over the loopback device."""
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE  # of what gloo makes by itself
    distributed_c10d.ProcessGroupGloo = OneThreadGroup
