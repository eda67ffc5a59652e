# SPDX-License-Identifier: Apache-2.0
"""As fastloop.extras, under the name that the loop's modules use."""

from fastloop.extras import MissingExtra as MissingExtra
from fastloop.extras import need as need
