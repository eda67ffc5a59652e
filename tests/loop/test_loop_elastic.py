# SPDX-License-Identifier: Apache-2.0
"""torchrun's store, which outlives the processes of a run that is restarted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fastloop


def test_a_restart_does_not_meet_the_dead_in_torchruns_store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    torchrun = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    added = []
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        before = store.num_keys()
        model = torch.nn.Linear(2, 1)
        fastloop.Loop(model, fastloop.AdamW(model.parameters()), strategy="ddp", device="cpu")
        try:
            added.append(store.num_keys() - before)
        finally:
            dist.destroy_process_group()
    assert all(added)  # names that were not there already
