# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import oracle

from . import Case

CASE = Case(
    optimizer="AdamW",
    rule=oracle.adam,
    defaults={
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": True,
    },
    settings={
        "defaults": {},
        "no_decay": {"weight_decay": 0.0},
        "strong_decay": {"lr": 0.1, "weight_decay": 0.5},
        "no_lr": {"lr": 0.0, "weight_decay": 0.1},
        "betas": {"betas": (0.8, 0.95), "eps": 1e-6},
        "no_memory": {"betas": (0.0, 0.0)},
        "large_eps": {"eps": 1.0},
        "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
        "maximize": {"maximize": True},
        "all": {"lr": 3e-3, "weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.85, 0.9)},
    },
    example="all",
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    torch_name="AdamW",
)
