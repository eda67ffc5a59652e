# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import oracle

from . import Case

CASE = Case(
    optimizer="Adam",
    rule=oracle.adam,
    defaults={
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    settings={
        "defaults": {},
        "decay": {"weight_decay": 0.1},
        "decay_maximize": {"weight_decay": 0.1, "maximize": True},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "no_lr": {"lr": 0.0, "weight_decay": 0.1},
        "all": {"lr": 3e-3, "weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.85, 0.9)},
    },
    example="all",
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    torch_name="Adam",
)
