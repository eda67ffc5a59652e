# SPDX-License-Identifier: Apache-2.0
"""Regression CI: two revisions in turn, counts that must not grow, ratios against floors, and the report of it."""
