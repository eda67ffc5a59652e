# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import oracle

from . import Case

CASE = Case(
    optimizer="SGD",
    rule=oracle.sgd,
    defaults={
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    },
    settings={
        "defaults": {},
        "decay": {"lr": 0.1, "weight_decay": 0.1},
        "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        "momentum": {"lr": 0.1, "momentum": 0.9},
        "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        "no_lr": {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1},
        "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        "all": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    },
    example="all",
    states=("momentum_buffer",),
    torch_name="SGD",
    sparse=True,
)
