# SPDX-License-Identifier: Apache-2.0
"""What the batch tuner says beside its numbers."""

from __future__ import annotations

import math

from fastloop.tune.report import Trial
from fastloop.tune.sizes import SAME_RATE, Search, divisors

FAR = 4  # times: the next divisor above one that fits is so far away that another effective batch would go better
BEYOND = 16  # times the largest size tried: no peak is foretold there


def caps(size: int, samples: int | None, largest: int | None, effective: int | None) -> list[str]:
    """About bounds that the data or the caller set."""
    said = []
    if samples is not None and size > samples:
        said.append(f"The present batch_size {size} is more than the {samples} samples there are: batches have these.")
    if largest is not None and size > largest:
        said.append(f"The present batch_size {size} is above largest={largest}, and so is not recommended.")
    if effective is not None and samples is not None and effective > samples:
        said.append(
            f"effective_batch={effective} is more than the {samples} samples there are: the windows of the loop end "
            "with the epoch, and have no more than these."
        )
    return said


def divisors_apart(among: Search, effective: int) -> list[str]:
    """Where the next divisor above those that fit is far away and too large."""
    top = among.fitting[-1].size
    above = next((d for d in divisors(effective) if d > top), None)
    if above is None or above < FAR * top:
        return []
    beyond = among.largest is not None and above > among.largest
    if not (above in among.tried or above in among.hopeless or beyond):
        return []
    middle = 2 ** round(math.log2(math.sqrt(top * above)))
    steps = max(1, round(effective / middle))
    return [
        f"Micro-batches of one size must divide {effective}, which leaves none between {top} and {above}; an effective "
        f"batch of {middle * steps} = {middle} x {steps} would."
    ]


def nothing_faster(size: int) -> str:
    return f"No other batch size has more samples/s than the present {size} by more than {SAME_RATE:.0%}."


def fastest(made: Trial, present: Trial) -> str:
    """About a size that is faster and learns differently."""
    size, effective, now = made.settings["batch_size"], made.extra["effective_batch"], present.extra["effective_batch"]
    assert made.rate is not None
    faster = ""
    if present.rate is not None:
        ratio = made.rate.median / present.rate.median
        faster = f", {ratio:.2f} times those of the present {present.settings['batch_size']}"
    return (
        f"The highest samples/s are at batch_size {size}: {made.rate.median:,.0f}{faster}. That is an effective batch "
        f"of {effective} in place of {now}: it learns differently and asks for another learning rate (tune lr); "
        f"effective_batch={effective} recommends it."
    )


def memory_line(search: Search, margin: float, capacity: int | None) -> list[str]:
    """Where memory would end."""
    line = search.line
    if line is None or capacity is None or line.per_sample <= 0:
        return []
    size = line.largest((1 - margin) * capacity) or 0
    if size > BEYOND * max(search.tried):
        return ["Memory is far from being the bound at the sizes that were tried."]
    return [
        f"Peak memory is about {line.fixed / 2**20:,.0f} MiB and {line.per_sample / 2**10:,.1f} KiB a sample: "
        f"{two_digits(size)} samples would take {1 - margin:.0%} of the {capacity / 2**20:,.0f} MiB there are."
    ]


def two_digits(size: int) -> str:
    """An extrapolation knows no more."""
    scale = 10 ** max(0, len(str(size)) - 2)
    return f"{size // scale * scale:,}"
