// SPDX-License-Identifier: Apache-2.0
#include "cuda/select.h"

namespace fastloop {
namespace device {

const void* find_update_f64(int rule, const Storage& storage) { return Select<double, double>::find(rule, storage); }

}  // namespace device
}  // namespace fastloop
