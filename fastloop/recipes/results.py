# SPDX-License-Identifier: Apache-2.0
"""What the results of all recipes share: as text, as JSON, and written down for the run."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from fastloop.recipes.evidence import fields_of, record


class Result:
    """Base of the dataclasses that recipes return.

    A subclass is a dataclass, names its function in `practice` and writes `table`. A field with `repr=False`, such as
    the pictures of a plot, is not in the JSON.
    """

    practice: ClassVar[str]

    def table(self) -> str:
        """As text for a reader."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON; numbers that are not finite are null, tensors lists."""
        return fields_of(self)

    def record(self, run_dir: str | os.PathLike[str]) -> None:
        """Write down in the run's folder that this was done, for the checklist and the model card.

        Raises:
            OSError: the file cannot be written.
        """
        record(run_dir, self.practice, self.to_json())
