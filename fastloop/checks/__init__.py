# SPDX-License-Identifier: Apache-2.0
"""Checks of a training before it begins: the usual mistakes, each a finding with a remedy."""
