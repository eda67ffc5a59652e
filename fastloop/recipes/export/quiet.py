# SPDX-License-Identifier: Apache-2.0
"""Without what torch and torchao say while they export and quantize: a library never prints."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_ONE_AT_A_TIME = threading.RLock()  # two threads that left in another order would put back each other's silence


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing below an error is logged, warned or printed inside; the process's settings are put back.

    torch.export prints the graph of what it cannot follow, and torchao logs each kernel of another GPU that it cannot
    load. Exceptions pass, and so do errors that are logged. The settings are the process's: threads that come here
    wait for each other, and what a thread elsewhere prints or warns in the meantime is lost.
    """
    with _ONE_AT_A_TIME:
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
