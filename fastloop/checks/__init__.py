# SPDX-License-Identifier: Apache-2.0
"""Checks of a training before it begins: the usual mistakes, each a finding with a remedy."""

from fastloop.checks.before_training import CheckFailed, preflight
from fastloop.checks.layers import check_layer_order, check_normalization
from fastloop.checks.leakage import check_leakage
from fastloop.checks.loaders import check_loader
from fastloop.checks.on_batch import check_output_activation
from fastloop.findings import Finding

__all__ = [
    "CheckFailed",
    "Finding",
    "check_layer_order",
    "check_leakage",
    "check_loader",
    "check_normalization",
    "check_output_activation",
    "preflight",
]
