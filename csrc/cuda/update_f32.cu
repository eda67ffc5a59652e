// SPDX-License-Identifier: Apache-2.0
#include "cuda/select.h"

namespace fastloop {
namespace device {

const void* find_update_f32(int rule, const Storage& storage) {
  return Select<float, float, BF16, F16>::find(rule, storage);
}

}  // namespace device
}  // namespace fastloop
