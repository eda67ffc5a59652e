# SPDX-License-Identifier: Apache-2.0
"""Every line of the documents' checklists, with the rule that answers it."""

from __future__ import annotations

from dataclasses import dataclass

from fastloop.recipes.checklist import rules_after as after
from fastloop.recipes.checklist import rules_checkpoints as checkpoints
from fastloop.recipes.checklist import rules_data as data
from fastloop.recipes.checklist import rules_loop as loop
from fastloop.recipes.checklist import rules_model as model
from fastloop.recipes.checklist.answers import Rule, parts

TIPS = "deep-learning-best-practices-and-tips.md"
STRATEGIES = "training-strategies.md"
TEMPLATES = "training-checklist-and-templates.md"


@dataclass(frozen=True)
class Item:
    """One line: where it stands, what it asks for in our words, and who answers it."""

    source: str
    section: str
    text: str
    rule: Rule


def _section(source: str, section: str, *lines: tuple[str, Rule]) -> tuple[Item, ...]:
    return tuple(Item(source, section, text, rule) for text, rule in lines)


def _heading(source: str, section: str, text: str, *lines: tuple[str, Rule]) -> tuple[Item, ...]:
    """A line that has lines of its own: done where they are."""
    whole = Item(source, section, text, parts(*(rule for _, rule in lines)))
    return (whole, *_section(source, section, *((f"{text}: {line}", rule) for line, rule in lines)))


SUMMARY = (
    *_section(
        TIPS,
        "Before training",
        ("labels and statistics of the data set are known", data.analyzed),
        ("samples were looked at", data.visualized),
        ("strong baselines exist", model.baselines_there),
        ("the model can overfit one batch", model.overfits_a_batch),
        ("the learning rate was searched for", model.rate_found),
        ("inputs are normalized", data.normalized),
        ("training data are augmented", data.augmented),
    ),
    *_section(
        TIPS,
        "During training",
        ("mixed precision", model.mixed_precision),
        ("training and validation are both watched", loop.both_losses),
        ("the learning rate follows a schedule", model.scheduled),
        ("gradients of recurrent networks are clipped", model.clipped_if_recurrent),
        ("checkpoints come regularly", checkpoints.regularly),
        ("experiments are tracked", loop.tracked),
    ),
    *_section(
        TIPS,
        "After training",
        ("the test set was evaluated, once", after.tested_once),
        ("errors were analyzed", after.errors_analyzed),
        ("bias between groups was checked", after.fairness),
        ("the model is exported", after.exported),
        ("hyperparameters and results are documented", after.documented),
    ),
    *_section(
        TIPS,
        "Production",
        ("the model is quantized or pruned", after.made_smaller),
        ("production is monitored", after.monitored),
        ("models are compared in an A/B test", after.compared),
        ("updates of the model are planned", after.updates_planned),
        ("the deployment is documented", after.deployment_documented),
    ),
)

ESSENTIAL = (
    *_section(
        STRATEGIES,
        "Essential: before training",
        ("random seeds are set", model.seeded),
        ("mixed precision, bf16 where there is hardware for it", model.mixed_precision),
        ("gradients are clipped", model.clipped),
        ("metrics are logged and experiments tracked", loop.tracked),
        ("the loading of data is validated", data.loading_validated),
    ),
    *_section(
        STRATEGIES,
        "Essential: during training",
        ("losses of training and validation are watched", loop.both_losses),
        ("NaN and infinities are watched for", loop.nonfinite_watched),
        ("norms of the gradients are watched", loop.gradients_watched),
        ("the GPU is used to 90 % or more", loop.gpu_used),
        ("checkpoints come regularly", checkpoints.regularly),
    ),
    *_section(
        STRATEGIES,
        "Essential: after training",
        ("the test set was evaluated, never used before", after.tested_once),
        ("the result is compared with baselines", model.compared_with_baselines),
        ("failures were analyzed", after.errors_analyzed),
        ("the best model is saved with its settings", checkpoints.best_with_config),
    ),
)

SETUP = (
    *_heading(
        TEMPLATES,
        "Pre-training setup",
        "data pipeline",
        ("a batch size, training data shuffled", data.shuffled),
        ("enough workers", data.workers),
        ("pinned memory on a GPU", data.pinned),
        ("validation data in order", data.validation_in_order),
        ("augmentation of the training data alone", data.augmented_in_training_only),
    ),
    *_heading(
        TEMPLATES,
        "Pre-training setup",
        "model",
        ("on the right device", model.on_device),
        ("weights initialized as they should be", model.initialized),
        ("summary or count of the parameters kept", model.counted),
    ),
    *_heading(
        TEMPLATES,
        "Pre-training setup",
        "loss",
        ("a criterion that fits the task", model.loss_fits),
        ("label smoothing considered", data.label_smoothing),
        ("weights for classes of unequal size", data.classes_weighed),
    ),
    *_section(
        TEMPLATES,
        "Optimizer configuration",
        ("optimizer and its parameters chosen", model.optimizer),
        ("groups of parameters, where needed", model.groups),
        ("a schedule chosen", model.scheduled),
        ("gradients clipped", model.clipped),
        ("gradients accumulated, where needed", model.accumulated),
    ),
)

IN_EACH_EPOCH = _section(
    TEMPLATES,
    "Every epoch",
    ("1. train mode", loop.by_construction("fit puts the model into train mode, evaluate puts it back into it", True)),
    ("2. gradients cleared before they accumulate", loop.by_construction("a window begins without gradients")),
    ("3. forward", loop.by_construction("forward in the precision of the run", True)),
    ("4. loss", loop.loss_computed),
    ("5. loss scaled where gradients accumulate", loop.loss_scaled),
    ("6. backward", loop.by_construction("a micro-batch without backward, or with two, raises")),
    ("7. gradients clipped, if asked for", loop.clipped_if_asked),
    ("8. parameters updated", loop.updated),
    ("9. gradients cleared for the next window", loop.by_construction("loop.step clears them, skipped windows' too")),
    ("10. eval mode for validation", loop.evaluated("evaluate puts the model into eval mode, and each part back")),
    ("11. no gradients in validation", loop.evaluated("evaluate computes without gradients")),
    ("12. schedule stepped", loop.schedule_stepped),
    ("13. metrics logged, checkpoints saved", loop.logged_and_saved),
)

KEPT = (
    *_heading(
        TEMPLATES,
        "Checkpoint strategy",
        "regular checkpoints",
        ("every so many epochs or steps", checkpoints.regularly),
        ("at the end of each epoch of a critical run", checkpoints.each_epoch),
        ("the last few kept", checkpoints.last_kept),
    ),
    *_heading(
        TEMPLATES,
        "Checkpoint strategy",
        "best checkpoints",
        ("by the loss of the validation", checkpoints.best_by_loss),
        ("by the accuracy of the validation", checkpoints.best_by_accuracy),
        ("apart for each metric", checkpoints.metrics_apart),
    ),
    *_heading(
        TEMPLATES,
        "Checkpoint strategy",
        "emergency checkpoints",
        ("before the system goes down", checkpoints.on_signal),
        ("when the training is interrupted", checkpoints.on_error("an interruption")),
        ("when the GPU's memory runs out", checkpoints.on_error("an out-of-memory error")),
    ),
)

FINAL = (
    *_section(
        TEMPLATES,
        "Before starting",
        ("the data pipeline is tested", data.loading_validated),
        ("the architecture is verified", model.verified),
        ("the loss fits the task", model.loss_fits),
        ("optimizer and schedule are configured", model.configured),
        ("bounds of the gradients are set", model.clipped),
        ("a folder for checkpoints exists", checkpoints.folder_made),
        ("the GPU's memory is estimated", loop.memory_estimated),
        ("baselines exist", model.baselines_there),
        ("logging is set up", loop.logging_set_up),
        ("early stopping is defined", model.early_stopping),
    ),
    *_section(
        TEMPLATES,
        "During training",
        ("losses of training and validation", loop.both_losses),
        ("learning rate", loop.rate_watched),
        ("norms of the gradients", loop.gradients_watched),
        ("memory of the GPU", loop.memory_watched),
        ("speed in samples per second", loop.speed_watched),
        ("sizes of the checkpoints", checkpoints.sizes_watched),
        ("signs of convergence", loop.convergence),
    ),
    *_section(
        TEMPLATES,
        "After training",
        ("the final model is evaluated", after.evaluated_at_end),
        ("the best checkpoint is known", checkpoints.best_known),
        ("the curves were analyzed", after.curves_analyzed),
        ("everything of the run is in its place", after.organized),
        ("results are documented", after.documented),
        ("the model is ready to be deployed", after.ready),
    ),
)

ITEMS: tuple[Item, ...] = (*SUMMARY, *ESSENTIAL, *SETUP, *IN_EACH_EPOCH, *KEPT, *FINAL)
