# SPDX-License-Identifier: Apache-2.0
"""Small files, each written in one rename: whoever reads one finds the old or the new, never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write the file anew, its folder too where there is none; returns its path. Not synced: no power failure is met.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
