// SPDX-License-Identifier: Apache-2.0
// Every rule, by the name that Python asks for: FASTLOOP_RULE(name, Rule<T>). T is the compute type. One line a rule.
#pragma once

#define FASTLOOP_RULES(FASTLOOP_RULE)          \
  FASTLOOP_RULE("adam", Adam<T, false>)        \
  FASTLOOP_RULE("adam_amsgrad", Adam<T, true>) \
  FASTLOOP_RULE("sgd", Sgd<T, false>)          \
  FASTLOOP_RULE("sgd_momentum", Sgd<T, true>)
