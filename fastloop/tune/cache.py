# SPDX-License-Identifier: Apache-2.0
"""Answers of earlier runs, in .fastloop/tune of the folder one is in; each holds for what it was measured with only."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastloop import machine
from fastloop.loop.files import replace_file
from fastloop.tune.report import Report
from fastloop.tune.target import Target

VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
FOLDER = Path(".fastloop") / "tune"


def key(kind: str, target: Target, question: Mapping[str, Any]) -> str:
    """What an answer holds for: machine, versions, target and its sources, devices, threads, what was asked. A hash."""
    sources = hashlib.sha256()
    for path in target.sources():
        with suppress(OSError):
            sources.update(str(path).encode() + b"\0" + path.read_bytes())
    parts = {
        "kind": kind,
        "fingerprint": machine.fingerprint(),
        "target": [target.function, target.arguments, target.options, target.loader],
        "sources": sources.hexdigest(),
        "question": dict(question),
        "process": {name: os.environ.get(name) for name in VARIABLES} | {"threads": torch.get_num_threads()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def path(kind: str, target: Target) -> Path:
    """Of the answer to this kind of question about this target."""
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', target.function)}-{kind}.json"


def load(kind: str, target: Target, wanted: str) -> Report | None:
    """The answer, if there is one for this key."""
    try:
        document = json.loads(path(kind, target).read_text(encoding="utf-8"))
        if document["key"] != wanted:
            return None
        report = Report.from_json(json.dumps(document["report"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another version: it is measured anew
        return None
    report.cached = True
    return report


def save(target: Target, report: Report, wanted: str) -> None:
    """Keep the answer; a folder that cannot be written to keeps none."""
    file = path(report.kind, target)
    text = f'{{"key": {json.dumps(wanted)},\n"report": {report.to_json()}}}\n'
    with suppress(OSError):
        replace_file(file, text)
