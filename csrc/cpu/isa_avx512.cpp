// SPDX-License-Identifier: Apache-2.0
// The loops for avx512; CMakeLists.txt gives this file's flags.
#define FASTLOOP_ISA avx512
#define FASTLOOP_ISA_NAME "avx512"
#include "cpu/loops.h"
