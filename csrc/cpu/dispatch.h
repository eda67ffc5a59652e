// SPDX-License-Identifier: Apache-2.0
// The instruction sets of this build and this machine.
#pragma once
#include <string>
#include <vector>

#include "core/kernels.h"

namespace fastloop {

// Those that can run here, the best one last.
const std::vector<const Kernels*>& supported_kernels();

// The set that FASTLOOP_ISA names, else the best. Null, with the reason in *error, if that set cannot run.
const Kernels* select_kernels(const std::string& wanted, std::string* error);

}  // namespace fastloop
