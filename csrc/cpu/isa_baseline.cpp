// SPDX-License-Identifier: Apache-2.0
// The loops for baseline; CMakeLists.txt gives this file's flags.
#define FASTLOOP_ISA baseline
#define FASTLOOP_ISA_NAME "baseline"
#include "cpu/loops.h"
