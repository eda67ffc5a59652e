# SPDX-License-Identifier: Apache-2.0
"""Which options of the loop make a step faster: each by itself against the present ones, then those that won together.

A trial is a process with both sides in it, timed in turn; the interval of the ratio decides. Beside the gain stands
the error: the largest relative difference of the losses of 10 windows on the same batches from the same seed. Options
that compute in fewer bits are measured, and recommended only within an error that the user allows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastloop.bench.stats import Interval, median_interval
from fastloop.tune import trial
from fastloop.tune.loader import won
from fastloop.tune.report import Report, Trial, described
from fastloop.tune.session import OnTrial, Session

NAMES = (
    "cudnn_benchmark", "channels_last", "matmul_precision", "threads", "precision", "activation_checkpointing",
    "cuda_graph", "compile",
)  # fmt: skip
FEWER_BITS = ("precision", "matmul_precision")  # what they change is no rounding: the user's decision
ROUNDING = 1e-4  # of a loss after 10 windows: fp32 sums in another order stay below 1e-5, bf16 is above 1e-3
PAYS_WITHIN = 10_000  # windows in which compiling has to be worth its time
SHORTEST, LONGEST = 1.0, 10.0  # seconds of taking pairs
BUSY = 2.0  # programs that want to run, for each CPU; another tuner's last trials leave about 1 behind
NEEDS_A_GPU = "needs a GPU"
_TRIALS = "fastloop.tune.flag_trial"

Options = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Options to be tried on top of the present ones, or why there is nothing to try."""

    options: Options
    skip: str = ""


def flags(
    target: Any = None,
    *,
    budget: float = 120.0,
    timeout: float = 60.0,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    only: Sequence[str] | str | None = None,
    max_error: float | None = None,
    memory_limit: int | None = None,
    fresh: bool = False,
    on_trial: OnTrial | None = None,
) -> Report:
    """Find the options of `Loop` that make a step faster: cuDNN's search, layouts, precisions, compiling, threads, ...

    An option wins if the 98 % interval of its gain lies above 1 and the median is at least 1.02; torch.compile also has
    to pay for its time within 10,000 windows. Options that won are combined, and what does not help there is left out.

    Args:
        target: "package.module:function", a function that can be imported, None for the ready one.
        budget: seconds for all trials; none starts when it is spent. `timeout`: for one.
        arguments, options, settings: of the target, of Loop, and of the loader: the present ones.
        only: names among cudnn_benchmark, channels_last, matmul_precision, threads, precision,
            activation_checkpointing, cuda_graph and compile; None for all.
        max_error: largest relative difference of the losses that is allowed. Without one only options that do not
            change the precision are recommended, if they differ by no more than rounding (1e-4) or than the model's
            own random numbers make.
        memory_limit: bytes of host memory of a trial's processes together; None: 80 % of what is available.
        fresh: measure even where a valid answer of an earlier run is there.
        on_trial: called with each trial when it is done.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
        TargetError: the target does not work with the present options.
    """
    names = _names(only)
    if max_error is not None and (isinstance(max_error, bool) or not isinstance(max_error, (int, float))):
        raise TypeError(f"[tune] max_error must be a number or None, got {max_error!r}")
    if max_error is not None and not 0 <= max_error < float("inf"):
        raise ValueError(f"[tune] max_error must be a relative difference of at least 0, got {max_error!r}; e.g. 0.01")
    session = Session(
        "flags", target, budget=budget, timeout=timeout, arguments=arguments, options=options, settings=settings,
        memory_limit=memory_limit, fresh=fresh, on_trial=on_trial,
        question={"only": sorted(names), "max_error": max_error},
    )  # fmt: skip
    return session.cached or _Search(session, names, max_error).run()


def _names(only: Sequence[str] | str | None) -> tuple[str, ...]:
    if only is None:
        return NAMES
    given = [only] if isinstance(only, str) else list(only)
    unknown = [name for name in given if name not in NAMES]
    if unknown or not given:
        raise ValueError(
            f"[tune] only must name flags among {', '.join(NAMES)}, got {', '.join(map(repr, unknown)) or given}"
        )
    return tuple(name for name in NAMES if name in given)


# ---- which


def candidates(facts: Mapping[str, Any], present: Mapping[str, Any], names: Sequence[str] = NAMES) -> list[Candidate]:
    """What can be tried for a target of which `facts` are known, with these present options."""
    makers = {
        "cudnn_benchmark": _cudnn_benchmark, "channels_last": _channels_last, "matmul_precision": _matmul_precision,
        "threads": _threads, "precision": _precision, "activation_checkpointing": _checkpointing,
        "cuda_graph": _cuda_graph, "compile": _compile,
    }  # fmt: skip
    named = {
        "matmul_precision": "high",
        "precision": "bf16",
        "activation_checkpointing": 1,
        "threads": facts["threads"],
    }
    found: list[Candidate] = []
    for name in names:
        made = makers[name](facts, present)
        if isinstance(made, str):
            found.append(Candidate({name: named.get(name, True)}, made))
        else:
            found += [Candidate({name: value}) for value in made]
    return found


Choice = list[Any] | str  # values to be tried, or why none is


def _on_already(name: str, present: Mapping[str, Any]) -> str:
    return "is on already" if present.get(name) else ""


def _cudnn_benchmark(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    if facts["device"] != "cuda":
        return NEEDS_A_GPU
    if not facts["any_convolutions"]:
        return "the model has no convolutions"
    if present.get("deterministic"):
        return "may choose another algorithm in each run, which deterministic rules out"
    return "is on already" if facts["cudnn_benchmark"] else [True]


def _channels_last(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    if not facts["convolutions"]:
        return "the model has no convolutions over images (Conv2d)"
    if not facts["images"]:
        return "the batches have no images, tensors of 4 dimensions"
    return _on_already("channels_last", present) or [True]


def _matmul_precision(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    if facts["device"] != "cuda":
        return NEEDS_A_GPU
    if not facts["tf32"]:
        return "the GPU has no TF32"
    order = ("highest", "high", "medium")
    return list(order[order.index(facts["matmul_precision"]) + 1 :]) or "is medium already"


def _threads(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    if facts["device"] != "cpu":
        return "the steps run on a GPU"
    cpus = facts["cpus"]
    counts = sorted({*(2**i for i in range(cpus.bit_length()) if 2**i <= cpus), cpus} - {facts["threads"]})
    return counts or f"there is one CPU to use, and {facts['threads']} thread"


def _precision(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    if facts["precision"] != "fp32":
        return f"is {facts['precision']} already"
    if facts["device"] != "cuda":
        return ["bf16"]  # fp16 is computed in fp32 on most CPUs, and takes a loss scale
    return (["bf16"] if facts["bf16"] else []) + ["fp16"]


def _checkpointing(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    if present.get("cuda_graph"):
        return "does not go with cuda_graph"
    if facts["blocks"] < 2:
        return "the model has no ModuleList or Sequential of several blocks; name layers yourself"
    return _on_already("activation_checkpointing", present) or [1]


def _cuda_graph(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    if facts["device"] != "cuda":
        return NEEDS_A_GPU
    for name in ("auto_microbatch", "strategy", "activation_checkpointing"):
        if present.get(name):
            return f"does not go with {name}, which is on"
    return _on_already("cuda_graph", present) or [True]


def _compile(facts: Mapping[str, Any], present: Mapping[str, Any]) -> Choice:
    return _on_already("compile", present) or [True]


# ---- what a trial says


def objection(made: Trial, *, max_error: float | None, noise: float | None) -> str:
    """Why the options of a trial are not recommended; "" if they are."""
    if made.status != trial.OK:
        return f"{made.status}: {made.reason}"
    gain = gain_of(made)
    if gain is None:
        return "measured apart from the present options, for lack of memory: no gain can be told from chance"
    if not won(gain):
        return f"no gain ({gain.median:.3f} times, 98 % interval {gain.low:.3f} to {gain.high:.3f})"
    error = float("inf") if made.error is None else made.error
    bits = [name for name in FEWER_BITS if name in made.settings]
    if bits and max_error is None:
        return (
            f"{gain.median:.2f} times as fast, with losses that differ by up to {error:.1e}: "
            f"{' and '.join(bits)} change how exactly is computed, which is yours to decide; allow an error (max_error)"
        )
    allowed = max(ROUNDING if max_error is None else max_error, noise or 0.0)
    if error > allowed:
        return (
            f"{gain.median:.2f} times as fast, but the losses differ by up to {error:.1e}, and {allowed:.1e} is allowed"
        )
    pays = made.extra.get("pays_after")
    if made.settings.get("compile") and (pays is None or pays > PAYS_WITHIN):
        after = "never" if pays is None else f"after {pays:,} windows"
        return f"{gain.median:.2f} times as fast, but pays {after} for compiling, and not within {PAYS_WITHIN:,}"
    return ""


def gain_of(made: Trial) -> Interval | None:
    """Samples/s over the other side's, from pairs; None where nothing was paired."""
    return Interval(**made.extra["gain"]) if made.extra.get("gain") else None


def windows_to_pay(overhead_seconds: float, base: float, flagged: float) -> int | None:
    """After how many windows a start that takes longer is won back; None if never."""
    return None if flagged >= base else int(overhead_seconds / (base - flagged)) + 1


# ---- the search


class _Search:
    """One at a time, then together."""

    def __init__(self, session: Session, names: Sequence[str], max_error: float | None) -> None:
        self.session, self.names, self.max_error = session, names, max_error
        self.noise: float | None = None
        self.report = session.report
        self.load = os.getloadavg()[0]  # before the trials

    def run(self) -> Report:
        facts = self._present()
        cpus = os.cpu_count() or 1
        if self.load > BUSY * cpus:
            self.report.findings.append(
                f"The machine was busy before anything was measured (a load of {self.load:.1f} on {cpus} CPUs): what "
                "wins here, threads above all, may lose where it is quiet."
            )
        made: list[Trial] = []
        todo = candidates(facts, self.session.target.options, self.names)
        for i, each in enumerate(todo):
            if each.skip:
                self.session.skip(each.options, each.skip)
                continue
            left = sum(not other.skip for other in todo[i:])
            made.append(self._try(each.options, {}, self._share(left)))
        self._say(made)
        if self.session.target.options.get("schedule") is not None:
            self.report.findings.append("Errors are of trainings without the schedule, at the optimizer's own rate.")
        self._combine([each for each in made if not self._objection(each)])
        self.report.findings.append(
            "Gains are of steps on one cached batch: waiting for data is not in them (see tune loader), nor are "
            "batches of other shapes."
        )
        return self.session.finish()

    def _objection(self, made: Trial) -> str:
        return objection(made, max_error=self.max_error, noise=self.noise)

    def _present(self) -> dict[str, Any]:
        seconds = min(max(self.session.budget / 120, 0.3), 2.0)
        made, outcome = self.session.try_out({}, f"{_TRIALS}:present", {"seconds": seconds}, must_work=True, add=False)
        limits = outcome.result["limits"]
        made.rate = median_interval(limits["cached"]["rates"])
        made.wait_share = limits["both"]["wait_share"]
        self.report.present = self.report.best = made
        self.session.done(made)
        self.noise = outcome.result["noise"]
        if (made.wait_share or 0.0) > 0.1:
            self.report.findings.append(
                f"Training waits for data {100 * (made.wait_share or 0.0):.0f} % of the time, and a faster step waits "
                "more: begin with tune loader."
            )
        return outcome.result["facts"]  # type: ignore[no-any-return]

    def _share(self, trials: int) -> float:
        """Seconds of pairs: half of what is left for each trial, the other half being its start."""
        return min(max(self.session.left() / (2 * (trials + 1)), SHORTEST), LONGEST, 0.5 * self.session.timeout)

    def _try(self, options: Options, base: Options, seconds: float) -> Trial:
        """`base` and `options` against `base`, both on top of the present ones."""
        wanted = {**base, **options}
        if self.session.left() <= 0:
            return self.session.skip(wanted, f"the budget of {self.session.budget:.0f} s is spent")
        arguments = {"base": base, "flagged": wanted, "seconds": seconds, "own_process": "cudnn_benchmark" in options}
        made, outcome = self.session.try_out(wanted, f"{_TRIALS}:compare", arguments, add=False)
        made.peak_bytes = None  # of both sides
        if made.status == trial.OK:
            take(made, outcome.result)
            if base:
                made.reason += f", on top of {described(base)}"
        elif made.status == trial.OUT_OF_MEMORY and not base and self.session.left() > 0:
            self._apart(made, seconds)
        self.session.done(made)
        return made

    def _apart(self, made: Trial, seconds: float) -> None:
        """Two sides do not fit into one process: this one by itself, for its rate."""
        arguments = {"options": made.settings, "seconds": min(seconds, 2.0)}
        again, outcome = self.session.try_out(made.settings, f"{_TRIALS}:alone", arguments, add=False)
        if again.status != trial.OK:
            return
        made.status, made.reason, made.traceback = trial.OK, "measured apart: no memory for both in one process", ""
        made.rate = Interval(**outcome.result["rate"])
        made.peak_bytes = again.peak_bytes

    # ---- findings and the answer

    def _say(self, made: Sequence[Trial]) -> None:
        findings = self.report.findings
        if self.noise is not None:
            findings.append(
                f"The model draws random numbers: with others the losses of 10 windows differ by up to "
                f"{self.noise:.1e}, and an error below that says nothing."
            )
        for each in made:
            if each.settings.get("compile") and each.status == trial.OK and "overhead_seconds" in each.extra:
                pays = each.extra["pays_after"]
                findings.append(
                    f"compile took {each.extra['overhead_seconds']:.1f} s (less what torch has compiled before) and "
                    f"pays {'never' if pays is None else f'after {pays:,} windows'}; wanted is within {PAYS_WITHIN:,}."
                )
            against = self._objection(each)
            if against and each.status == trial.OK and not against.startswith("no gain"):
                findings.append(f"Not recommended: {described(each.settings)}: {against}.")

    def _combine(self, winners: Sequence[Trial]) -> None:
        """From the largest gain on: each of the others stays if it wins on top of those that are there."""
        order = sorted(winners, key=lambda each: -each.extra["gain"]["median"])
        if not order:
            return
        best = order[0]
        chosen: Options = dict(best.settings)
        final = best
        for each in order[1:]:
            name = next(iter(each.settings))
            if name in chosen:
                continue  # another value of it has won by more
            added = self._try(each.settings, chosen, self._share(len(order)))
            if added.status == trial.OK and (gain := gain_of(added)) is not None and won(gain):
                chosen = dict(added.settings)
            else:
                why = "it could not be tried" if added.status == trial.SKIPPED else "it adds nothing"
                self.report.findings.append(
                    f"{described(each.settings)} wins alone; on top of {described(chosen)} {why}: left out."
                )
        if chosen != best.settings:
            together = self._try(chosen, {}, self._share(1))
            if self._objection(together) or _median(together) < _median(best):
                self.report.findings.append(
                    f"{described(chosen)} together: {self._objection(together) or 'no faster than the best alone'}. "
                    f"Recommended is {described(best.settings)} alone."
                )
            else:
                final = together
        self.report.best, self.report.gain, self.report.keep = final, gain_of(final), False
        self.report.loop = dict(final.settings)


def take(made: Trial, found: Mapping[str, Any]) -> None:
    """What `flag_trial.compare` returned."""
    made.rate = median_interval(found["rates"])
    made.error = found["error"]
    gain = median_interval(found["ratios"])
    made.extra |= {
        "gain": {"median": gain.median, "low": gain.low, "high": gain.high},
        "pairs": len(found["ratios"]),
        "norm_error": found["norm_error"],
    }
    made.reason = f"{gain.median:.2f} times ({gain.low:.2f} to {gain.high:.2f}), error {made.error:.1e}"
    if made.settings.get("compile"):
        overhead = found["overhead_seconds"]
        made.extra["overhead_seconds"] = overhead
        base = found["seconds_base"]
        made.extra["pays_after"] = windows_to_pay(overhead, base, base / gain.median)


def _median(made: Trial) -> float:
    gain = gain_of(made)
    return 0.0 if gain is None else gain.median
