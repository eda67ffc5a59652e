// SPDX-License-Identifier: Apache-2.0
// For functions that both the CPU and a GPU run.
#pragma once

#ifdef __CUDACC__
#define FASTLOOP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTLOOP_HOST_DEVICE inline __attribute__((always_inline))
#endif
