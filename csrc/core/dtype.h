// SPDX-License-Identifier: Apache-2.0
// Storage types that a slot may have.
#pragma once
#include <cstdint>

namespace fastloop {

enum class DType : std::uint8_t { kF32, kBF16, kF16, kF64, kUnsupported };

constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kF64:
      return 8;
    case DType::kUnsupported:
      break;
  }
  return 0;
}

}  // namespace fastloop
