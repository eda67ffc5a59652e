// SPDX-License-Identifier: Apache-2.0
// A plan as Python sees it: the tensors behind core/plan.h's addresses, and the check, at each step, that param_groups,
// state and addresses are still what the plan was built from.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/tensor.h"
#include "core/device_table.h"
#include "core/plan.h"

namespace fastloop {

// Outcome of a step. kStale: nothing was touched, build a new plan. kStopped: not finite, nothing was touched.
enum class Outcome : int { kDone, kSkipped, kStopped, kStale };

// What Python hands in for one parameter.
struct Entry {
  pybind11::object owner;   // whose .grad is read
  pybind11::object tensor;  // whose memory is updated: the owner itself, or the local tensor behind a DTensor
  std::vector<pybind11::object> states;
  pybind11::object master, ema, step;  // None where absent; step is torch's scalar
  pybind11::object count;              // on a device: our int64 scalar; else None
  std::int64_t steps_done = 0;
  int rule = 0;
  int row = 0;
};

// A hyperparameter: group[key], or group[key][index].
struct HyperKey {
  pybind11::str key;
  int index;  // -1: not a sequence
};

class PyPlan {
 public:
  PyPlan(const Kernels& kernels, std::vector<HyperKey> hyper, std::vector<pybind11::str> structure,
         dlpack::Device device, bool as_table)
      : plan_(kernels),
        hyper_(std::move(hyper)),
        structure_(std::move(structure)),
        device_(device),
        as_table_(as_table) {}

  // False if no kernel serves the entry; its tensors must be dense and of one layout (checked, ValueError).
  bool add(Entry entry);
  // Remembers groups and state as they are now. `elsewhere` are parameters of the groups that are stepped by other
  // means.
  void finish(const pybind11::list& groups, const pybind11::dict& state, const pybind11::list& elsewhere);

  // Reads each owner's .grad and does both passes. grad_scale, found_inf: a number, a tensor of one element, or None.
  // Returns (outcome, norm or None).
  pybind11::tuple step(const pybind11::list& groups, const pybind11::dict& state, pybind11::handle grad_scale,
                       pybind11::handle found_inf, bool check_finite, bool stop_nonfinite, bool zero_grads);

  // Pass 2 alone, for a norm that is completed elsewhere: gather() first, then update(). grads: one tensor or None per
  // entry.
  bool gather(const pybind11::list& groups, const pybind11::dict& state, const pybind11::object& grads);
  pybind11::tuple update(double squares, bool finite, bool measured, double grad_scale, bool found_inf,
                         bool stop_nonfinite);

  std::vector<std::int64_t> steps_done() const;

  // ---- for kernels on a device, which read a table (core/device_table.h) instead of running here

  // After finish(). kinds: for each entry, where its norm is summed.
  const DeviceTable& make_table(const std::vector<int>& kinds);

  // Checks as step() does and writes this step into the table's front. None: stale. Else whether a word changed.
  // grad_scale: a number, which scale_address then leads to in the device's copy of the table; or 1.
  pybind11::object refresh(const pybind11::list& groups, const pybind11::dict& state, const pybind11::object& grads,
                           double grad_scale, std::uintptr_t scale_address, std::uintptr_t found_inf_address,
                           bool check_finite, bool zero_grads);
  // Where kernels find a scalar (kIsDouble in its low bit); 0 if it is not on the device, or neither float32 nor
  // float64.
  Word scalar_address(pybind11::handle value) const;
  bool zeroes_afterwards() const { return zeroes_afterwards_; }  // what refresh() was asked to zero and left
  bool clips() const { return clips_; }                          // some group is in the norm, as of the last step
  // After the launches: autograd's version counters.
  void count_versions() const;

 private:
  struct Bound {
    Entry entry;
    Layout layout;
    struct Held {
      PyObject* tensor;
      int slot;
      DType dtype;
      mutable Whereabouts seen;
    };
    std::vector<Held> held;  // all but the gradient, in slots
    DType grad_dtype = DType::kUnsupported;
    Whereabouts grad_seen;
    mutable Whereabouts step_seen;
  };
  struct Group {
    std::vector<std::pair<PyObject*, int>> params;  // and the index of its entry, or one of:
    std::vector<bool> structure;
    bool has_ema = false;
  };
  static constexpr int kNoGrad = -1;     // it had no gradient when the plan was built
  static constexpr int kElsewhere = -2;  // stepped by other means
  struct StateOfParameter {
    PyObject *parameter, *values;
    std::vector<PyObject*> tensors;
  };

  bool groups_hold(const pybind11::list& groups);
  bool read_row(PyObject* group, std::size_t index);
  bool state_holds(const pybind11::dict& state) const;
  bool grads_hold(const pybind11::object& grads, bool keep);
  bool read_hyper(PyObject* value, std::size_t row, std::size_t k);
  bool grads_are_shared() const;
  void check_not_running() const;
  bool tensors_hold() const;
  void prefetch_grad(std::size_t i) const;
  void prefetch_tensors(std::size_t i) const;

  Plan plan_;
  std::vector<HyperKey> hyper_;
  std::vector<pybind11::str> structure_;
  dlpack::Device device_;
  bool as_table_;
  std::unique_ptr<DeviceTable> table_;
  std::vector<std::vector<Word>> hyper_addresses_;  // of hyperparameters that are scalars on the device
  std::vector<Bound> bound_;
  std::vector<Group> groups_;
  std::vector<StateOfParameter> state_;
  double max_norm_ = 0;
  bool zeroes_afterwards_ = false;
  bool clips_ = false;  // some group is in the norm
  pybind11::tuple owners_;
  std::vector<pybind11::object> kept_;  // gradients in use while the interpreter lock is released
  bool running_ = false;                // in that time
};

}  // namespace fastloop
