// SPDX-License-Identifier: Apache-2.0
// The loops for neon; CMakeLists.txt gives this file's flags.
#define FASTLOOP_ISA neon
#define FASTLOOP_ISA_NAME "neon"
#include "cpu/loops.h"
