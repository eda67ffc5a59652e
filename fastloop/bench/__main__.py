# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.bench`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; say which extra is missing instead of showing an import error."""
    try:
        from fastloop.bench.cli import main as command_line
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print(
            "[bench] tables need rich, which is not installed; run `pip install 'fastloop[bench]'`",
            file=sys.stderr,
        )
        return 2
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
