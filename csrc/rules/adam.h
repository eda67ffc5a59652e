// SPDX-License-Identifier: Apache-2.0
// Adam and AdamW.
//
//   g = g + weight_decay*p                 Adam (L2)
//   p = p * (1 - lr*weight_decay)          AdamW (decoupled)
//   m = m + (1-b1)*(g - m)
//   v = b2*v + (1-b2)*g*g
//   vmax = max(vmax, v)                    amsgrad; vmax stands for v below
//   p = p - lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)
//
// Kingma and Ba 2015 (arXiv:1412.6980), Loshchilov and Hutter 2019 (arXiv:1711.05101), Reddi et al. 2018 (amsgrad).
#pragma once
#include "rules/rule.h"

namespace fastloop {
namespace FASTLOOP_RULE_NAMESPACE {

template <class T, bool kAmsgrad>
struct Adam {
  using Compute = T;
  static constexpr int kStates = kAmsgrad ? 3 : 2;  // m, v, vmax
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled, kHypers };

  T l2, decay_factor;
  T one_minus_beta1, beta2, one_minus_beta2;
  T inv_sqrt_correction2, eps, step_size;

  // Doubles rounded once: 1 - float(0.999) is off by 1e-5 of its value.
  static FASTLOOP_HOST_DEVICE Adam prepare(const double* h, std::int64_t step) {
    const double t = static_cast<double>(step);
    const bool decoupled = h[kDecoupled] != 0;
    Adam r;
    r.l2 = T(decoupled ? 0.0 : h[kWeightDecay]);
    r.decay_factor = T(decoupled ? 1.0 - h[kLr] * h[kWeightDecay] : 1.0);
    r.one_minus_beta1 = T(1.0 - h[kBeta1]);
    r.beta2 = T(h[kBeta2]);
    r.one_minus_beta2 = T(1.0 - h[kBeta2]);
    r.inv_sqrt_correction2 = T(1.0 / std::sqrt(1.0 - std::pow(h[kBeta2], t)));
    r.eps = T(h[kEps]);
    r.step_size = T(h[kLr] / (1.0 - std::pow(h[kBeta1], t)));
    return r;
  }

  template <class V>
  FASTLOOP_HOST_DEVICE void step(V& p, V g, V* s) const {
    if (l2 != 0) g = g + l2 * p;  // a branch, not 0*p: a parameter may be -inf
    p = p * decay_factor;
    V& m = s[0];
    V& v = s[1];
    m = m + one_minus_beta1 * (g - m);
    v = beta2 * v + product(one_minus_beta2 * g, g);
    V second = v;
    if constexpr (kAmsgrad) second = s[2] = max(s[2], v);
    p = p - step_size * m / (sqrt(second) * inv_sqrt_correction2 + eps);
  }
};

}  // namespace FASTLOOP_RULE_NAMESPACE
}  // namespace fastloop
