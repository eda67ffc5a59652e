# SPDX-License-Identifier: Apache-2.0
"""Do the inputs of today come from where those of the training came from? By feature, and of predictions too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastloop.findings import Finding, listed, ordered
from fastloop.recipes.after import drift_tests as tests
from fastloop.recipes.after.columns import Column, columns_of
from fastloop.recipes.after.intervals import holm, wilson
from fastloop.recipes.results import Result
from fastloop.texts import columns

SOME, MUCH = 0.1, 0.25  # the usual reading of PSI: a moderate and a large shift
OUTSIDE = 0.01  # share of values outside of the reference's range
SHOWN = 40  # features in the table


@dataclass
class FeatureDrift:
    """One feature, in the reference and now.

    Attributes:
        kind: "numbers" or "categories".
        psi: population stability index, sum (q - p) ln(q/p) over the reference's quantile bins, or over categories.
        statistic: Kolmogorov-Smirnov's D, or chi-square.
        p_value: of the test; adjusted: by Holm over all features.
        missing_before, missing: share of None and NaN.
        outside: share of values below the reference's smallest or above its largest.
        new: categories that the reference has not.
        drifted: adjusted < alpha.
    """

    name: str
    kind: str
    psi: float | None = None
    statistic: float | None = None
    p_value: float | None = None
    adjusted: float | None = None
    missing_before: float = 0.0
    missing: float = 0.0
    outside: float | None = None
    new: list[str] = field(default_factory=list)
    drifted: bool = False


@dataclass
class DriftReport(Result):
    """How far the current data are from the reference, by feature.

    Attributes:
        reference, current: samples.
        drifted: names of the features whose distribution has changed, at level `alpha` over all of them together.
    """

    practice: ClassVar[str] = "drift_report"
    reference: int
    current: int
    alpha: float
    features: list[FeatureDrift]
    findings: list[Finding] = field(default_factory=list)

    @property
    def drifted(self) -> list[str]:
        """Names of the features that have drifted."""
        return [feature.name for feature in self.features if feature.drifted]

    def table(self) -> str:
        """A line for each feature, the largest shift first."""
        order = sorted(self.features, key=lambda feature: -(feature.psi or 0.0))
        rows = [
            (f.name, f.psi, f.statistic, f.adjusted, f.missing, f.outside, "drifted" if f.drifted else "")
            for f in order
        ]
        head = ("feature", "PSI", "KS / chi2", "p (Holm)", "missing", "outside", "")
        more = f"\n... {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        counts = f"{self.current} samples against {self.reference}; {len(self.drifted)} of {len(rows)} features drifted"
        return f"{counts}\n{columns(head, rows[:SHOWN])}{more}\n{listed(self.findings)}"

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON, with the names of the drifted features."""
        return {**super().to_json(), "drifted": self.drifted}


def drift_report(reference: Any, current: Any, *, bins: int = 10, alpha: float = 0.01) -> DriftReport:
    """Compare the current data with a reference, feature by feature.

    Numbers by the two-sample Kolmogorov-Smirnov test, categories by chi-square; p-values are Holm's over all features.
    PSI says how much, over bins of equal counts in the reference.

    Args:
        reference: of the training or of a good time: an array or tensor [n] or [n, features], a Dataset whose inputs
            are numbers or vectors, or a dict of columns by name or a DataFrame. Columns of text or bool are categories;
            None and NaN are missing.
        current: of today, in the same form. Outputs of `predict` on both show prediction drift.
        bins: of PSI, for numbers.
        alpha: the probability of finding any drift where there is none.

    Raises:
        ValueError: no samples, other columns than the reference's, a column of another kind or length, bins or alpha
            out of range.
        TypeError: data of another form.

    Source: Yurdakul, "Statistical Properties of Population Stability Index", 2018; Rabanser et al., "Failing Loudly: An
    Empirical Study of Methods for Detecting Dataset Shift", 2019 (univariate tests with a correction).
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise ValueError(f"[drift_report] bins must be an integer of at least 2, got {bins!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        raise ValueError(f"[drift_report] alpha must lie in (0, 1), got {alpha!r}; pass e.g. 0.01")
    before, now = columns_of(reference, "reference"), columns_of(current, "current")
    if before.keys() != now.keys():
        raise ValueError(
            f"[drift_report] both must have the same features: current lacks {_some(before, now)} and has "
            f"{_some(now, before)} besides"
        )
    features = [_feature(name, before[name], now[name], bins) for name in before]
    tested = [feature for feature in features if feature.p_value is not None]
    for feature, adjusted in zip(tested, holm([f.p_value for f in tested if f.p_value is not None]), strict=True):
        feature.adjusted, feature.drifted = adjusted, adjusted < alpha
    counts = [len(next(iter(each.values())).values) for each in (before, now)]
    made = DriftReport(counts[0], counts[1], alpha, features)
    made.findings = ordered(
        finding
        for name, f in zip(before, features, strict=True)
        for finding in _findings(f, before[name], now[name], bins)
    )
    return made


def _some(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    names = [name for name in here if name not in there]
    return (", ".join(names[:5]) + (" ..." if len(names) > 5 else "")) or "none"


def _feature(name: str, before: Column, now: Column, bins: int) -> FeatureDrift:
    if before.numbers != now.numbers and len(before.present) and len(now.present):
        kinds = ["numbers" if column.numbers else "categories" for column in (before, now)]
        raise ValueError(f"[drift_report] feature {name!r} has {kinds[0]} in the reference and {kinds[1]} in current")
    made = FeatureDrift(
        name, "numbers" if before.numbers else "categories", missing_before=before.missing, missing=now.missing
    )
    if not len(before.present) or not len(now.present):
        return made
    if before.numbers:
        made.psi = tests.psi(*tests.binned(before.present, now.present, bins))
        made.statistic, made.p_value = tests.kolmogorov_smirnov(before.present, now.present)
        low, high = before.present.min(), before.present.max()
        made.outside = float(((now.present < low) | (now.present > high)).mean())
    else:
        names, a, b = tests.counted(before.present, now.present)
        made.psi = tests.psi(a, b)
        made.statistic, made.p_value = tests.chi_square_test(a, b)
        made.new = [value for value, count in zip(names, a, strict=True) if count == 0]
    return made


def _findings(feature: FeatureDrift, before: Column, now: Column, bins: int) -> list[Finding]:
    name, found = feature.name, []
    if not len(now.present) or not len(before.present):
        which = "current data" if len(before.present) else "reference"
        found.append(Finding("error", name, f"all values are missing in the {which}", "look at where they come from"))
        return found
    shares = [wilson(round(column.missing * len(column.values)), len(column.values)) for column in (before, now)]
    if shares[1].low > shares[0].high:
        found.append(
            Finding(
                "warning",
                name,
                f"{feature.missing:.1%} are missing, {feature.missing_before:.1%} were",
                "look at where they come from",
            )
        )
    assert feature.psi is not None
    size = f"PSI {feature.psi:.3g}"
    if feature.drifted:
        test = "Kolmogorov-Smirnov D" if feature.kind == "numbers" else "chi-square"
        what = (
            f"the distribution has changed: {size}, {test} {feature.statistic:.3g}, adjusted p {feature.adjusted:.2g}"
        )
        if feature.psi >= SOME:
            advice = (
                "look for its cause; measure the model on labelled data of today, and train anew if it has become worse"
            )
            found.append(Finding("warning", name, what, advice))
        else:
            found.append(Finding("note", name, f"{what}; the change is small"))
    elif feature.psi >= MUCH:
        cells = bins if feature.kind == "numbers" else 2
        chance = (cells - 1) * (1 / len(before.present) + 1 / len(now.present))
        found.append(
            Finding("note", name, f"{size}, and about {chance:.2g} by chance alone: not shown", "gather more samples")
        )
    if feature.outside is not None and feature.outside > OUTSIDE + 4 / len(before.present):
        found.append(
            Finding(
                "warning",
                name,
                f"{feature.outside:.1%} lie outside of the reference's range",
                "the model extrapolates there: check the units",
            )
        )
    if feature.new:
        listed_new = ", ".join(feature.new[:5]) + (" ..." if len(feature.new) > 5 else "")
        found.append(
            Finding(
                "warning", name, f"categories that the reference has not: {listed_new}", "check how they are encoded"
            )
        )
    return found
