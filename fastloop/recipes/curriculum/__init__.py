# SPDX-License-Identifier: Apache-2.0
"""Easy examples first, or hard ones more often: samplers, data sets and a callback that decide what an epoch shows."""

from fastloop.recipes.curriculum.losses import UpdateLosses, example_losses
from fastloop.recipes.curriculum.samplers import HardExamples, LengthCurriculum, LossCurriculum
from fastloop.recipes.curriculum.stages import TaskStages

__all__ = ["HardExamples", "LengthCurriculum", "LossCurriculum", "TaskStages", "UpdateLosses", "example_losses"]
