// SPDX-License-Identifier: Apache-2.0
// The loops for avx2; CMakeLists.txt gives this file's flags.
#define FASTLOOP_ISA avx2
#define FASTLOOP_ISA_NAME "avx2"
#include "cpu/loops.h"
