# SPDX-License-Identifier: Apache-2.0
"""Schedules as pictures and as rows of text."""

from fastloop.recipes.schedule.plot import plot_schedule

__all__ = ["plot_schedule"]
