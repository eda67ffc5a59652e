# SPDX-License-Identifier: Apache-2.0
"""PNG plots of a run. matplotlib is imported here only, when a plot is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from fastloop.bench.results import Run


class MissingExtra(Exception):
    """A package that an extra of this project brings is not installed."""


def _pyplot() -> Any:
    try:
        import_module("matplotlib").use("Agg")
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingExtra(
            "[bench] plots need matplotlib, which is not installed; run `pip install 'fastloop[plots]'`"
        ) from error


def _ratios(run: Run, path: Path) -> bool:
    rows = [row for row in run.rows if row.ratio is not None and row.group != "control"]
    if not rows:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.35 * len(rows)), layout="constrained")
    for index, row in enumerate(reversed(rows)):
        assert row.ratio is not None
        error = [[row.ratio.median - row.ratio.low], [row.ratio.high - row.ratio.median]]
        axes.barh(
            index,
            row.ratio.median,
            xerr=error,
            color="tab:green" if row.ratio.low > 1 else "tab:gray",
            capsize=3,
        )
        if row.goal is not None:
            axes.plot([row.goal, row.goal], [index - 0.4, index + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(rows)), [row.key for row in reversed(rows)])
    axes.axvline(1.0, color="tab:red", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time of the peer / time of fastloop, median and 98 % interval (black: goal)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _bandwidth(run: Run, path: Path) -> bool:
    rows = [row for row in run.rows if row.ceiling_gbps is not None]
    if not rows:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    positions = range(len(rows))
    axes.bar(
        positions,
        [row.ceiling_gbps for row in rows],
        color="lightgray",
        label="ceiling, same streams and threads",
    )
    axes.bar(positions, [row.gbps for row in rows], width=0.5, color="tab:green", label="fastloop")
    axes.set_xticks(positions, [row.case for row in rows])
    axes.set_ylabel("GB/s of bytes that must move")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _losses(run: Run, path: Path) -> bool:
    if run.training is None or "losses" not in run.training:
        return False
    losses = run.training["losses"]
    plt = _pyplot()
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    above.plot(losses["torch"], label="torch", linewidth=3, color="lightgray")
    above.plot(losses["fastloop"], label="fastloop", linewidth=1, color="tab:green")
    above.set_ylabel("loss, nats per character")
    above.legend(loc="upper right")
    differences = [abs(a - b) for a, b in zip(losses["torch"], losses["fastloop"], strict=True)]
    below.semilogy([max(each, 1e-9) for each in differences], label="difference", color="tab:green")
    below.semilogy(losses["bound"], label="bound", color="tab:red")
    below.set_xlabel("step")
    below.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write(run: Run, folder: Path) -> list[str]:
    """Write the plots that the run has data for; returns their file names. Raises MissingExtra without matplotlib."""
    _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"ratios.png": _ratios, "bandwidth.png": _bandwidth, "loss.png": _losses}
    return [name for name, draw in drawings.items() if draw(run, folder / name)]
