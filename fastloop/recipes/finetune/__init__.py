# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of pre-trained models: what is trained, from when on, at which rate."""

from fastloop.recipes.finetune.depth import depth_of
from fastloop.recipes.finetune.freezing import freeze, unfreeze
from fastloop.recipes.finetune.gradual import GradualUnfreezing
from fastloop.recipes.finetune.groups import parameter_groups
from fastloop.recipes.finetune.head import replace_head
from fastloop.recipes.finetune.plan import FinetuningPlan, suggest_finetuning
from fastloop.recipes.finetune.recipe import FinetuningRecipe, finetuning_recipe

__all__ = [
    "FinetuningPlan",
    "FinetuningRecipe",
    "GradualUnfreezing",
    "depth_of",
    "finetuning_recipe",
    "freeze",
    "parameter_groups",
    "replace_head",
    "suggest_finetuning",
    "unfreeze",
]
