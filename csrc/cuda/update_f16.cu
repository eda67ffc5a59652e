// SPDX-License-Identifier: Apache-2.0
#include "cuda/select.h"

namespace fastloop {
namespace device {

const void* find_update_f16(int rule, const Storage& storage) { return Select<F16, F16, float>::find(rule, storage); }

}  // namespace device
}  // namespace fastloop
