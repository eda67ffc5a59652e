# SPDX-License-Identifier: Apache-2.0
"""Drop-in optimizers: the classes of torch.optim with the same names, faster."""

from fastloop.optim.adam import Adam
from fastloop.optim.adamw import AdamW
from fastloop.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
