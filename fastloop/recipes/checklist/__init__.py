# SPDX-License-Identifier: Apache-2.0
"""The checklists of the documents, each line answered from a run's folder."""

from fastloop.recipes.checklist.report import Checklist, checklist

__all__ = ["Checklist", "checklist"]
