# SPDX-License-Identifier: Apache-2.0
"""What the memory tuner says: the table by part, and a sentence for each remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastloop.tune.report import Trial

PARTS = ("parameters", "buffers", "gradients", "states", "inputs", "activations")
REST, NOT_AT_ONCE = "the rest", "not there at once"
KIB, MIB, GIB = 2**10, 2**20, 2**30


def rows(parts: Mapping[str, int | None], peak: int) -> dict[str, int]:
    """Bytes by part, with what makes them add up to the peak.

    Above the sum of the parts: the rest, such as workspaces and gradients of activations. Below it: parts that are not
    there at the same time, such as activations, which go while gradients come.
    """
    known = {name: parts[name] or 0 for name in PARTS}
    over = peak - sum(known.values())
    return known | {REST: max(over, 0), NOT_AT_ONCE: min(over, 0)}


def table(extra: Mapping[str, Any]) -> str:
    """Two columns: the estimate before the first step, and what was measured after it."""
    columns: list[dict[str, int]] = []
    for parts, peak in (("estimate", "estimated_peak"), ("parts", "allocated")):
        if extra.get(parts) is None or extra.get(peak) is None:
            columns.append({})
        else:
            columns.append(rows(extra[parts], extra[peak]))
    if not any(columns):
        return ""
    lines = [("part", "estimated", "measured")]
    for name in (*PARTS, REST, NOT_AT_ONCE):
        guess, found = (column.get(name) for column in columns)
        if guess or found:
            lines.append((name, size(guess), size(found)))
    lines.append(("peak, allocated", size(extra.get("estimated_peak")), size(extra.get("allocated"))))
    whole = extra.get("peak", {})
    lines.append(("reserved by torch's allocator", "", size(extra.get("reserved"))))
    lines.append(("the process, as NVML sees it", "", size(extra.get("nvml"))))
    lines.append((f"peak: {whole.get('what', 'of the process')}", "", size(whole.get("bytes"))))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in lines)


def size(count: int | None) -> str:
    """ "1.5 MiB"; "n/a" for None."""
    if count is None:
        return "n/a"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"


def present(made: Trial, facts: Mapping[str, Any]) -> list[str]:
    """About the settings as they are."""
    extra = made.extra
    said = [f"The batch that is measured: {facts['looked']}."]
    if "allocated" not in extra:
        guess = extra.get("estimated_peak")
        said.append(f"The present settings run out of memory; their tensors were estimated to take {size(guess)}.")
        return said
    found = {name: bytes_ for name, bytes_ in rows(extra["parts"], extra["allocated"]).items() if bytes_ > 0}
    largest = sorted(found, key=found.__getitem__, reverse=True)[:3]
    shares = ", ".join(f"{name} {size(found[name])}" for name in largest)
    said.append(
        f"Tensors take {size(extra['allocated'])} at their peak, in the {extra['phases']['peak_phase']} "
        f"({size(extra['estimated_peak'])} were estimated): {shares}."
    )
    if extra["nvml"] is None:
        said.append(f"NVML's view: n/a ({extra['nvml_reason']}).")
    return said


def remedy(name: str, made: Trial, before: Trial) -> str:
    """One remedy: what it would give, what it gave, what it costs."""
    kept = "gradients_kept" in made.settings
    a, b = (made, before) if kept else (before, made)  # the trial of what is done already is without it
    would = _saved(a.extra.get("estimated_peak"), b.extra.get("estimated_peak"))
    name = f"{name[0].upper()}{name[1:]}"
    if made.status != "ok":
        return f"{name}: {made.status}{': ' if made.reason else ''}{made.reason}; would take {would}, as estimated."
    gave = _saved(a.extra.get("allocated"), b.extra.get("allocated"))
    cost = ""
    if before.rate is not None and made.rate is not None and not kept:
        cost = f"; {before.rate.median / made.rate.median:.2f} times the time (single trials)"
    error = "" if made.error is None or kept else f"; losses differ by up to {made.error:.1e}"
    done = ", which the loop does already" if kept else ""
    return f"{name}{done}: takes {gave} (estimated: {would}){cost}{error}."


def _saved(before: int | None, after: int | None) -> str:
    """ "12.0 MiB less (-30 %)"."""
    if before is None or after is None:
        return "n/a" if after is None else f"{size(after)} in all"
    if before == after:
        return "as much"
    word = "less" if after < before else "more"
    return f"{size(abs(before - after))} {word} ({(after - before) / max(before, 1):+.0%})"
