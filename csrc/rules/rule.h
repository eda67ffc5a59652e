// SPDX-License-Identifier: Apache-2.0
// What every update rule is written with.
//
// A rule is a struct of hyperparameters, rounded once to the compute type T, with
//   kStates                        arrays of state that it keeps per parameter
//   enum Hyper {..., kHypers}      the order of the doubles that prepare reads
//   prepare(hyper, t)              hyperparameters of step t (the first step is t = 1)
//   step(p, g, s)                  one element, or one vector of elements V, of parameter, gradient and states
// step uses + - * /, sqrt(V), max(V, V) and product(V, V), which is never fused with an addition, and knows no threads,
// blocks or storage types. A setting is a template parameter only where it changes the memory traffic; a branch on a
// hyperparameter is the same for all elements.
//
// The including file names the namespace, so that the same rule compiled for several instruction sets stays several
// functions.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/host_device.h"

#ifndef FASTLOOP_RULE_NAMESPACE
#error "define FASTLOOP_RULE_NAMESPACE before including a rule"
#endif
