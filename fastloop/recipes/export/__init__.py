# SPDX-License-Identifier: Apache-2.0
"""A trained model for use: exported, fused, in fewer bits, and compared with the model that it was."""

from fastloop.recipes.export.exporting import ExportReport, export_model
from fastloop.recipes.export.fusion import fuse_conv_bn
from fastloop.recipes.export.halving import half_precision
from fastloop.recipes.export.quantization import quantize_int8
from fastloop.recipes.export.verification import Verification, verify_copy

__all__ = [
    "ExportReport",
    "Verification",
    "export_model",
    "fuse_conv_bn",
    "half_precision",
    "quantize_int8",
    "verify_copy",
]
