# SPDX-License-Identifier: Apache-2.0
"""Commands of `python -m fastloop.bench`, a module each.

A module has `add(commands)`: it adds its parser to the subparsers and names the function that runs it with
`set_defaults(run=...)`; that takes the console and the arguments and returns the exit code.
"""
