# SPDX-License-Identifier: Apache-2.0
"""Plans, backends and checks: what lies between the public classes and the kernels. Knows tensors, not optimizers."""
