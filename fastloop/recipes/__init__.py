# SPDX-License-Identifier: Apache-2.0
"""The practices of training, each as a tested function on top of the loop."""
