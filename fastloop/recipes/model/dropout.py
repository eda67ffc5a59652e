# SPDX-License-Identifier: Apache-2.0
"""Dropout rates that rise with the depth."""

from __future__ import annotations

from torch import nn

from fastloop.recipes.model.summary import check_module

WHERE = "[progressive_dropout]"
SPATIAL_SHARE = 0.2  # a whole channel is more than a unit: 0.1 where units of the same depth have 0.5

_SPATIAL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
DROPOUTS = (nn.Dropout, nn.AlphaDropout, *_SPATIAL)


def progressive_dropout(model: nn.Module, first: float = 0.3, last: float = 0.5) -> dict[str, float]:
    """Set the rates of the dropout modules in place, in even steps from `first` to `last`; by name what was set.

    rate_i = first + (last - first) * i / (n - 1) for module i of n, in the order of registration; a single one gets
    `last`, being next to the output. Modules that drop whole channels (Dropout1d, 2d, 3d) get a fifth of theirs.
    Rates that are no module, as those of nn.LSTM, nn.MultiheadAttention and F.dropout, stay.

    Args:
        first, last: rates in [0, 1).

    Raises:
        ValueError: no dropout module, or a rate out of range.

    Source: Srivastava et al., "Dropout", 2014; Tompson et al., 2015 (channels).
    """
    check_module(model, WHERE)
    for name, rate in {"first": first, "last": last}.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
            raise ValueError(f"{WHERE} {name} must lie in [0, 1), got {rate!r}; pass e.g. 0.3")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, DROPOUTS)]
    if not found:
        raise ValueError(f"{WHERE} the model must have dropout modules, got none; add nn.Dropout where it may overfit")
    set_to = {}
    for i, (name, module) in enumerate(found):
        depth = i / (len(found) - 1) if len(found) > 1 else 1.0
        rate = first + (last - first) * depth
        module.p = set_to[name] = rate * (SPATIAL_SHARE if isinstance(module, _SPATIAL) else 1.0)
    return set_to


__all__ = ["DROPOUTS", "progressive_dropout"]
