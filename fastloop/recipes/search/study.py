# SPDX-License-Identifier: Apache-2.0
"""The study behind a search: Optuna's, in a journal file, resumed where it was left."""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy

from fastloop.extras import need
from fastloop.recipes.search.space import Range, decoded, distributions, encoded, grid, to_json

FILE = "study.journal"
METHODS = ("grid", "random", "bayesian")
INTERRUPTED = "interrupted"
PRUNING_AFTER = 5  # trials, before which there is no median worth the name


class Study:
    """Trials of one question, asked one after the other.

    Args:
        folder: of the journal.
        space: by key.
        method: of METHODS; the next trials may be of another one than those before.
        mode: "min" or "max".
        question: what the values depend on, of JSON; a study of another question is not gone on with.
        seed: trial n draws from (seed, n), so that a search that was interrupted goes on as if it had not been.

    Raises:
        MissingExtra: Optuna is not installed.
        ValueError: the folder has a study of another question.
    """

    def __init__(
        self, folder: Path, space: Mapping[str, Range], method: str, mode: str, question: Mapping[str, Any], seed: int
    ) -> None:
        self.optuna = need("optuna", "search", "a search")
        self.space, self.method, self.seed = space, method, seed
        self._distributions = distributions(space)
        self._states = self.optuna.trial.TrialState
        journal = need("optuna.storages.journal", "search", "a search")
        _repair(folder / FILE)
        self.study = self.optuna.create_study(
            storage=self.optuna.storages.JournalStorage(journal.JournalFileBackend(str(folder / FILE))),
            study_name="search",
            direction={"min": "minimize", "max": "maximize"}[mode],
            pruner=self.optuna.pruners.MedianPruner(n_startup_trials=PRUNING_AFTER, n_warmup_steps=1),
            load_if_exists=True,
        )
        self._check_question(folder, json.loads(json.dumps({**question, "space": to_json(space), "mode": mode})))
        self._free_interrupted()
        self._first = self._first_that_counts()

    def ended(self) -> list[Any]:
        """Optuna's trials that count: those with an end of their own, not of a beginning in which all failed."""
        return [t for t in self.all() if t.number >= self._first and not _interrupted(t)]

    def all(self) -> list[Any]:
        """Those that do not count too."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]

    def next(self) -> tuple[Any, dict[str, Any]] | None:
        """(Optuna's trial, its settings); None where the grid is done."""
        self.study.sampler = self._sampler(len(self.ended()))
        if self.method == "grid" and not self._waiting():
            left = self._left_of_grid()
            if not left:
                return None
            self.study.enqueue_trial(encoded(left[0]))
        trial = self.study.ask(self._distributions)
        return trial, decoded(self.space, trial.params)

    def tell(self, trial: Any, status: str, reason: str, seconds: float, value: float | None = None) -> None:
        """The end of a trial: with a value, pruned, or failed for a reason."""
        for name, what in (("status", status), ("reason", reason), ("seconds", seconds)):
            trial.set_user_attr(name, what)
        if value is not None:
            self.study.tell(trial, value)
        else:
            self.study.tell(trial, state=self._states.PRUNED if status == "pruned" else self._states.FAIL)

    def settings(self, trial: Any) -> dict[str, Any]:
        """Of one of Optuna's trials."""
        return decoded(self.space, trial.params)

    def _sampler(self, number: int) -> Any:
        seed = int(numpy.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        kind = self.optuna.samplers.TPESampler if self.method == "bayesian" else self.optuna.samplers.RandomSampler
        return kind(seed=seed)

    def _waiting(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(self._states.WAITING,)))

    def _left_of_grid(self) -> list[dict[str, Any]]:
        """In an order that has seen all of the space before it is half way through."""
        every = grid(self.space)
        random.Random(self.seed).shuffle(every)
        done = {json.dumps(self.settings(t), sort_keys=True) for t in self.ended()}
        return [each for each in every if json.dumps(each, sort_keys=True) not in done]

    def _free_interrupted(self) -> None:
        """A trial that runs although nobody is here was killed: it is repeated."""
        for frozen in self.study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            self.interrupt(self.optuna.trial.Trial(self.study, frozen._trial_id))

    def interrupt(self, trial: Any) -> None:
        """Count the trial for nothing, and put its settings first in the queue."""
        parameters = dict(trial.params)
        trial.set_user_attr("status", INTERRUPTED)
        trial.set_user_attr("reason", "the search was ended while it ran")
        self.study.tell(trial, state=self._states.FAIL)
        if parameters.keys() == self._distributions.keys():
            self.study.enqueue_trial(parameters)

    def _first_that_counts(self) -> int:
        """The number of the first trial, beyond those before this call where none of them came anywhere.

        What failed always is a mistake outside of the settings, which has been mended, or else fails again.
        """
        there = self.all()
        came = any(t.state in (self._states.COMPLETE, self._states.PRUNED) for t in there)
        if not came and any(not _interrupted(t) for t in there):
            self.study.set_user_attr("first", there[-1].number + 1)
        return int(self.study.user_attrs.get("first", 0))

    def _check_question(self, folder: Path, question: dict[str, Any]) -> None:
        there = self.study.user_attrs.get("question")
        if there is None:
            self.study.set_user_attr("question", question)
            return
        other = [name for name in question if question[name] != there.get(name)]
        if other:
            was, now = there.get(other[0]), question[other[0]]
            raise ValueError(
                f"[search] {folder} has a search with another {' and '.join(other)}: {other[0]} was {json.dumps(was)}, "
                f"and is {json.dumps(now)}; go on as it was, or name another folder"
            )


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this search alone; Optuna says nothing meanwhile.

    Raises:
        RuntimeError: another search is running in it.
    """
    optuna = need("optuna", "search", "a search")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"[search] another search is running in {folder}; wait for it, or name another"
            ) from None
        Path(f"{folder / FILE}.lock").unlink(missing_ok=True)  # of a search that was killed; ours excludes any other
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)


def _repair(journal: Path) -> None:
    """Without the line that a killed process has not finished, which would spoil the next one."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)


def _interrupted(trial: Any) -> bool:
    return bool(trial.user_attrs.get("status") == INTERRUPTED)
