// SPDX-License-Identifier: Apache-2.0
// Stochastic gradient descent with momentum.
//
//   g = g + weight_decay*p
//   b = momentum*b + (1-dampening)*g       b = g at the first step
//   d = g + momentum*b  (nesterov)  or  b  or, without momentum, g
//   p = p - lr*d
//
// Sutskever et al. 2013, in torch.optim.SGD's form: lr multiplies the momentum buffer's output.
#pragma once
#include "rules/rule.h"

namespace fastloop {
namespace FASTLOOP_RULE_NAMESPACE {

template <class T, bool kMomentum>
struct Sgd {
  using Compute = T;
  static constexpr int kStates = kMomentum ? 1 : 0;
  enum Hyper { kLr, kMomentumFactor, kDampening, kWeightDecay, kNesterov, kHypers };

  T lr, momentum, grad_weight, l2;
  bool nesterov;

  static FASTLOOP_HOST_DEVICE Sgd prepare(const double* h, std::int64_t step) {
    const bool first = step == 1;
    Sgd r;
    r.lr = T(h[kLr]);
    r.momentum = T(h[kMomentumFactor]);
    r.grad_weight = T(first ? 1.0 : 1.0 - h[kDampening]);
    r.l2 = T(h[kWeightDecay]);
    r.nesterov = h[kNesterov] != 0;
    return r;
  }

  template <class V>
  FASTLOOP_HOST_DEVICE void step(V& p, V g, V* s) const {
    if (l2 != 0) g = g + l2 * p;  // a branch, not 0*p: a parameter may be -inf
    if constexpr (kMomentum) {
      V& b = s[0];
      b = momentum * b + product(V{} + grad_weight, g);
      g = nesterov ? g + momentum * b : b;
    }
    p = p - lr * g;
  }
};

}  // namespace FASTLOOP_RULE_NAMESPACE
}  // namespace fastloop
