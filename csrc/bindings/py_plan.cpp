// SPDX-License-Identifier: Apache-2.0
#include "bindings/py_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <unordered_map>

namespace py = pybind11;

namespace fastloop {
namespace {

struct Names {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
  PyObject* max_grad_norm = PyUnicode_InternFromString("max_grad_norm");
  PyObject* max_grad_value = PyUnicode_InternFromString("max_grad_value");
  PyObject* ema_decay = PyUnicode_InternFromString("ema_decay");
};

const Names& names() {
  static const Names* interned = new Names;  // NOLINT: as long as the process
  return *interned;
}

// A number, whatever holds it: float, int, bool, or a tensor or array of one element. False: it is none.
bool to_double(PyObject* value, double* out) {
  if (PyFloat_CheckExact(value)) {
    *out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  PyObject* number = PyNumber_Float(value);
  if (number == nullptr) {
    PyErr_Clear();
    return false;
  }
  *out = PyFloat_AS_DOUBLE(number);
  Py_DECREF(number);
  return true;
}

// What may be None for `absent`. Throws what Python raises for something that is no number.
double number_or(py::handle value, double absent) {
  if (value.is_none()) return absent;
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(value.ptr()));
  if (!number) throw py::error_already_set();
  return PyFloat_AS_DOUBLE(number.ptr());
}

PyObject* new_reference(PyObject* object) {
  Py_INCREF(object);
  return object;
}

// group[key] as a number; `absent` where the key is missing or None.
bool optional_number(PyObject* group, PyObject* key, double absent, double* out) {
  PyObject* value = PyDict_GetItemWithError(group, key);  // borrowed
  if (value == nullptr || value == Py_None) {
    PyErr_Clear();
    *out = absent;
    return true;
  }
  return to_double(value, out);
}

bool has_value(PyObject* group, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(group, key);
  if (value == nullptr) PyErr_Clear();
  return value != nullptr && value != Py_None;
}

bool is_true(PyObject* group, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(group, key);
  if (value == nullptr) {
    PyErr_Clear();
    return false;
  }
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) PyErr_Clear();
  return truth == 1;
}

// From this many elements on a step takes milliseconds, and other Python threads should run meanwhile. Below, holding
// the lock lets this thread do its Python work inside the parallel region.
constexpr std::int64_t kReleaseGilElements = 4 * 1024 * 1024;

template <class F>
auto without_gil(std::int64_t elements, F f) {
  if (elements < kReleaseGilElements) return f();
  py::gil_scoped_release release;
  return f();
}

Outcome outcome_of(const StepResult& result, const StepControls& controls) {
  if (!result.skipped) return Outcome::kDone;
  return !result.finite && controls.stop_nonfinite ? Outcome::kStopped : Outcome::kSkipped;
}

py::tuple answer(Outcome outcome, bool measured, double norm) {
  return py::make_tuple(static_cast<int>(outcome), measured ? py::object(py::float_(norm)) : py::object(py::none()));
}

}  // namespace

bool PyPlan::add(Entry entry) {
  const TensorReader& reader = tensor_reader();
  Bound bound;
  Parameter p;
  TensorView view;
  auto bind = [&](const py::object& tensor, int slot) -> DType {
    Layout layout;
    if (!reader.read(tensor.ptr(), &view, &layout) || !view.is_on(device_) || !layout.matches(bound.layout)) {
      throw py::value_error("fastloop plan: a state's shape, strides or device differ from its parameter's");
    }
    p.slot[static_cast<std::size_t>(slot)] = view.data;
    bound.held.push_back({tensor.ptr(), slot, view.dtype, {}});
    return view.dtype;
  };

  if (!reader.read(entry.tensor.ptr(), &view, &bound.layout) || !view.is_on(device_)) return false;
  if (!bound.layout.is_dense()) return false;
  p.slot[kParam] = view.data;
  p.count = bound.layout.count();
  p.storage.param = view.dtype;
  bound.held.push_back({entry.tensor.ptr(), kParam, view.dtype, {}});

  p.storage.state = view.dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  for (std::size_t k = 0; k < entry.states.size(); ++k) {
    const DType dtype = bind(entry.states[k], kState + static_cast<int>(k));
    if (k > 0 && dtype != p.storage.state) return false;
    p.storage.state = dtype;
  }
  p.storage.master = !entry.master.is_none();
  p.storage.ema = !entry.ema.is_none();
  const DType copies = p.storage.param == DType::kF64 ? DType::kF64 : DType::kF32;
  if (p.storage.master && bind(entry.master, kMaster) != copies) return false;
  if (p.storage.ema && bind(entry.ema, kEma) != copies) return false;

  if (!entry.step.is_none()) {
    Layout scalar;
    if (!reader.read(entry.step.ptr(), &view, &scalar) || !view.is_on(device_) || scalar.count() != 1 ||
        (view.dtype != DType::kF32 && view.dtype != DType::kF64)) {
      return false;
    }
    p.step_address = view.data;
    p.step_dtype = view.dtype;
  }
  if (as_table_ && !reader.read_count(entry.count.ptr(), device_, &p.steps_address)) {
    throw py::value_error("fastloop plan: a count of updates must be an int64 scalar on its parameter's device");
  }
  p.step = entry.steps_done;
  p.rule = entry.rule;
  p.row = entry.row;

  // The gradient's dtype chooses the kernel; its address is read at every step.
  const py::object grad = py::reinterpret_steal<py::object>(reader.grad(entry.owner.ptr()));
  if (!grad) throw py::error_already_set();
  Layout grad_layout;
  if (grad.is_none()) {
    bound.grad_dtype = p.storage.param;
  } else if (reader.read(grad.ptr(), &view, &grad_layout)) {
    bound.grad_dtype = view.dtype;
  } else {
    bound.grad_dtype = p.storage.param;  // wrapped: the local gradients that step() is given have the parameter's
  }
  p.storage.grad = bound.grad_dtype;
  bound.entry = std::move(entry);
  if (!plan_.add(p)) return false;
  bound_.push_back(std::move(bound));
  return true;
}

void PyPlan::finish(const py::list& groups, const py::dict& state, const py::list& elsewhere) {
  plan_.finish(static_cast<int>(groups.size()), static_cast<int>(hyper_.size()));
  hyper_addresses_.assign(groups.size(), std::vector<Word>(hyper_.size(), 0));
  std::unordered_map<PyObject*, int> entry_of;
  for (std::size_t i = 0; i < bound_.size(); ++i) entry_of[bound_[i].entry.owner.ptr()] = static_cast<int>(i);
  for (py::handle param : elsewhere) entry_of[param.ptr()] = kElsewhere;
  for (py::handle group : groups) {
    Group expected;
    for (const py::str& key : structure_) expected.structure.push_back(is_true(group.ptr(), key.ptr()));
    expected.has_ema = has_value(group.ptr(), names().ema_decay);
    for (py::handle param : py::reinterpret_borrow<py::dict>(group)[py::handle(names().params)]) {
      const auto found = entry_of.find(param.ptr());
      const int index = found == entry_of.end() ? kNoGrad : found->second;
      expected.params.emplace_back(param.ptr(), index);
    }
    groups_.push_back(std::move(expected));
  }
  py::list owners;
  for (const Bound& b : bound_) owners.append(b.entry.owner);
  owners_ = py::tuple(owners);
  PyObject *key, *values, *name, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state.ptr(), &position, &key, &values)) {
    StateOfParameter expected{key, values, {}};
    Py_ssize_t inner = 0;
    if (PyDict_Check(values)) {
      while (PyDict_Next(values, &inner, &name, &value)) expected.tensors.push_back(value);
    }
    state_.push_back(std::move(expected));
  }
}

bool PyPlan::state_holds(const py::dict& state) const {
  if (static_cast<std::size_t>(PyDict_Size(state.ptr())) != state_.size()) return false;
  PyObject *key, *values, *name, *value;
  Py_ssize_t position = 0;
  for (const StateOfParameter& expected : state_) {
    if (!PyDict_Next(state.ptr(), &position, &key, &values)) return false;
    if (key != expected.parameter || values != expected.values) return false;
    if (!PyDict_Check(values)) continue;
    if (static_cast<std::size_t>(PyDict_Size(values)) != expected.tensors.size()) return false;
    Py_ssize_t inner = 0;
    for (PyObject* tensor : expected.tensors) {
      if (!PyDict_Next(values, &inner, &name, &value) || value != tensor) return false;
    }
  }
  return true;
}

Word PyPlan::scalar_address(py::handle value) const {
  TensorView view;
  Layout layout;
  if (!tensor_reader().read(value.ptr(), &view, &layout) || !view.is_on(device_) || !layout.single) return 0;
  if (view.dtype != DType::kF32 && view.dtype != DType::kF64) return 0;
  return reinterpret_cast<Word>(view.data) | (view.dtype == DType::kF64 ? kIsDouble : 0);
}

// A number now, or where the device finds it: reading a scalar on a GPU would wait for the GPU.
bool PyPlan::read_hyper(PyObject* value, std::size_t row, std::size_t k) {
  const bool may_be_there = as_table_ && !PyFloat_Check(value) && !PyLong_Check(value);
  const Word address = may_be_there ? scalar_address(value) : 0;
  hyper_addresses_[row][k] = address;
  return address != 0 || to_double(value, &plan_.rows()[row].hyper[k]);
}

bool PyPlan::read_row(PyObject* group, std::size_t index) {
  Row* row = &plan_.rows()[index];
  for (std::size_t k = 0; k < hyper_.size(); ++k) {
    PyObject* value = PyDict_GetItemWithError(group, hyper_[k].key.ptr());
    if (value == nullptr) {
      PyErr_Clear();
      return false;
    }
    py::object item;
    if (hyper_[k].index >= 0) {
      item = py::reinterpret_steal<py::object>(PySequence_GetItem(value, hyper_[k].index));
      if (!item) return PyErr_Clear(), false;
      value = item.ptr();
    }
    if (!read_hyper(value, index, k)) return false;
  }
  row->maximize = is_true(group, names().maximize);
  double max_norm;
  if (!optional_number(group, names().max_grad_norm, -1.0, &max_norm)) return false;
  row->in_norm = has_value(group, names().max_grad_norm);
  if (row->in_norm) {
    if (!(max_norm > 0) || (clips_ && max_norm != max_norm_)) return false;  // Python raises with the reason
    max_norm_ = max_norm;
    clips_ = true;
  }
  constexpr double kNoLimit = std::numeric_limits<double>::infinity();
  if (!optional_number(group, names().max_grad_value, kNoLimit, &row->clip_value) || !(row->clip_value > 0)) {
    return false;
  }
  return optional_number(group, names().ema_decay, 0.0, &row->ema_decay) && row->ema_decay >= 0 && row->ema_decay < 1;
}

bool PyPlan::groups_hold(const py::list& groups) {
  if (groups.size() != groups_.size()) return false;
  clips_ = false;
  max_norm_ = std::numeric_limits<double>::infinity();
  const TensorReader& reader = tensor_reader();
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(g));
    if (!PyDict_Check(group)) return false;
    PyObject* given = PyDict_GetItemWithError(group, names().params);
    const Group& expected = groups_[g];
    if (given == nullptr) return PyErr_Clear(), false;
    const auto params = py::reinterpret_steal<py::object>(PySequence_Fast(given, "params must be a sequence"));
    if (!params) return PyErr_Clear(), false;
    if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(params.ptr())) != expected.params.size()) return false;
    if (has_value(group, names().ema_decay) != expected.has_ema) return false;
    for (std::size_t i = 0; i < expected.params.size(); ++i) {
      PyObject* param = PySequence_Fast_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
      if (param != expected.params[i].first) return false;
      if (expected.params[i].second == kNoGrad) {
        PyObject* grad = reader.grad(param);
        if (grad == nullptr) PyErr_Clear();
        const bool none = grad == Py_None;
        Py_XDECREF(grad);
        if (!none) return false;
      }
    }
    for (std::size_t k = 0; k < structure_.size(); ++k) {
      if (is_true(group, structure_[k].ptr()) != expected.structure[k]) return false;
    }
    if (!read_row(group, g)) return false;
  }
  return true;
}

// A thousand tensors are ten thousand cache lines, scattered, each found through the one before. What the last step saw
// tells the caches early: the second step after something else has used them falls from 1.6 to 1.1 ms (bench:
// 1000x1024).
void PyPlan::prefetch_grad(std::size_t i) const {
  if (i + 8 < bound_.size()) {
    bound_[i + 8].held[0].seen.prefetch_object();
    bound_[i + 8].grad_seen.prefetch_object();
  }
  if (i + 4 < bound_.size()) {
    bound_[i + 4].held[0].seen.prefetch_tensor();
    bound_[i + 4].grad_seen.prefetch_tensor();
  }
}

void PyPlan::prefetch_tensors(std::size_t i) const {
  if (i + 6 < bound_.size()) {
    for (const Bound::Held& held : bound_[i + 6].held) held.seen.prefetch_object();
    bound_[i + 6].step_seen.prefetch_object();
  }
  if (i + 3 < bound_.size()) {
    for (const Bound::Held& held : bound_[i + 3].held) held.seen.prefetch_tensor();
    bound_[i + 3].step_seen.prefetch_tensor();
  }
}

// keep: hold references until the step is over, because another thread may drop a gradient once the lock is released.
bool PyPlan::grads_hold(const py::object& grads, bool keep) {
  const TensorReader& reader = tensor_reader();
  const bool given = !grads.is_none();
  for (std::size_t i = 0; i < bound_.size(); ++i) {
    Bound& b = bound_[i];
    Parameter& p = plan_.parameters()[i];
    prefetch_grad(i);
    PyObject* grad = given ? new_reference(PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i)))
                           : reader.grad(b.entry.owner.ptr());
    if (grad == nullptr) return PyErr_Clear(), false;
    p.active = grad != Py_None;
    const bool holds =
        !p.active || (reader.read_matching(grad, device_, b.layout, b.grad_dtype, &p.slot[kGrad], &b.grad_seen) &&
                      (p.slot[kGrad] != nullptr || p.count == 0));
    if (keep && holds) {
      kept_.push_back(py::reinterpret_steal<py::object>(grad));
    } else {
      Py_DECREF(grad);
    }
    if (!holds) return false;
  }
  return true;
}

// Two parameters may have been given one gradient: zeroing it with the first would starve the second.
bool PyPlan::grads_are_shared() const {
  std::vector<const void*> addresses;
  for (const Parameter& p : plan_.parameters()) {
    if (p.active && p.count > 0) addresses.push_back(p.slot[kGrad]);
  }
  std::sort(addresses.begin(), addresses.end());
  return std::adjacent_find(addresses.begin(), addresses.end()) != addresses.end();
}

void PyPlan::check_not_running() const {
  if (running_) throw std::runtime_error("step() of this optimizer is running in another thread");
}

// The addresses of parameters and states: `tensor.data = other` moves them behind the same Python object.
bool PyPlan::tensors_hold() const {
  const TensorReader& reader = tensor_reader();
  for (std::size_t i = 0; i < bound_.size(); ++i) {
    const Bound& b = bound_[i];
    const Parameter& p = plan_.parameters()[i];
    if (!p.active) continue;
    prefetch_tensors(i);
    for (const Bound::Held& held : b.held) {
      void* data = nullptr;
      if (!reader.read_matching(held.tensor, device_, b.layout, held.dtype, &data, &held.seen)) return false;
      if (data != p.slot[static_cast<std::size_t>(held.slot)]) return false;
    }
    if (p.step_address != nullptr) {
      static const Layout scalar = [] {
        Layout layout;
        layout.single = false;  // a count of steps is never a negated view
        return layout;
      }();
      void* data = nullptr;
      if (!reader.read_matching(b.entry.step.ptr(), device_, scalar, p.step_dtype, &data, &b.step_seen)) return false;
      if (data != p.step_address) return false;
    }
  }
  return true;
}

// Raw writes are invisible to autograd: without this a graph that saved a parameter would not notice the step.
void PyPlan::count_versions() const {
  const bool all =
      std::all_of(plan_.parameters().begin(), plan_.parameters().end(), [](const Parameter& p) { return p.active; });
  if (all) {
    tensor_reader().increment_version(owners_);
    return;
  }
  py::list stepped;
  for (std::size_t i = 0; i < bound_.size(); ++i) {
    if (plan_.parameters()[i].active) stepped.append(bound_[i].entry.owner);
  }
  tensor_reader().increment_version(stepped);
}

bool PyPlan::gather(const py::list& groups, const py::dict& state, const py::object& grads) {
  check_not_running();
  kept_.clear();
  return groups_hold(groups) && state_holds(state) && grads_hold(grads, true) && tensors_hold();
}

py::tuple PyPlan::step(const py::list& groups, const py::dict& state, py::handle grad_scale, py::handle found_inf,
                       bool check_finite, bool stop_nonfinite, bool zero_grads) {
  check_not_running();
  kept_.clear();
  StepControls controls;
  controls.grad_scale = number_or(grad_scale, 1);
  controls.found_inf = number_or(found_inf, 0) > 0;
  const bool releases = plan_.elements() >= kReleaseGilElements;
  if (!groups_hold(groups) || !state_holds(state) || !grads_hold(py::none(), releases)) {
    return answer(Outcome::kStale, false, 0);
  }
  const bool zero_afterwards = zero_grads && grads_are_shared();
  controls.max_norm = max_norm_;
  controls.measure = clips_ || check_finite;
  controls.check_all = check_finite;
  controls.stop_nonfinite = stop_nonfinite;
  controls.zero_grads = zero_grads && !zero_afterwards;

  StepResult result;
  if (!releases) {
    // Pass 1 needs the gradients alone: this thread checks the rest while the others begin.
    struct Context {
      PyPlan* plan;
      std::exception_ptr error;  // kept: nothing may be thrown out of a parallel region
    } context = {this, nullptr};
    const Aside aside = {[](void* c) {
                           try {
                             return static_cast<Context*>(c)->plan->tensors_hold();
                           } catch (...) {
                             static_cast<Context*>(c)->error = std::current_exception();
                             return false;
                           }
                         },
                         [](void* c) {
                           try {
                             static_cast<Context*>(c)->plan->count_versions();
                           } catch (...) {
                             static_cast<Context*>(c)->error = std::current_exception();
                           }
                         },
                         &context};
    bool stale = false;
    result = plan_.step(controls, &aside, &stale);
    if (context.error) std::rethrow_exception(context.error);
    if (stale) return answer(Outcome::kStale, false, 0);
  } else {
    if (!tensors_hold()) return answer(Outcome::kStale, false, 0);
    running_ = true;
    {
      py::gil_scoped_release release;
      result = plan_.step(controls);
    }
    running_ = false;
    kept_.clear();
    if (!result.skipped) count_versions();
  }
  const Outcome outcome = outcome_of(result, controls);
  if (zero_afterwards && outcome != Outcome::kStopped) {
    for (const Parameter& p : plan_.parameters()) {
      if (p.active) std::memset(p.slot[kGrad], 0, static_cast<std::size_t>(p.count * size_of(p.storage.grad)));
    }
  }
  return answer(outcome, clips_, result.norm);
}

py::tuple PyPlan::update(double squares, bool finite, bool measured, double grad_scale, bool found_inf,
                         bool stop_nonfinite) {
  StepControls controls;
  controls.max_norm = max_norm_;
  controls.grad_scale = grad_scale;
  controls.measure = measured;
  controls.found_inf = found_inf;
  controls.stop_nonfinite = stop_nonfinite;
  NormSums total;
  total.squares = squares;
  total.finite = finite;
  running_ = true;
  const StepResult result = without_gil(plan_.elements(), [&] { return plan_.update(controls, total); });
  running_ = false;
  kept_.clear();
  if (!result.skipped) count_versions();
  return answer(outcome_of(result, controls), clips_ && measured, result.norm);
}

const DeviceTable& PyPlan::make_table(const std::vector<int>& kinds) {
  if (kinds.size() != plan_.parameters().size()) throw py::value_error("fastloop plan: one kind for each entry");
  if (static_cast<int>(hyper_.size()) >= kMaxHypers)
    throw py::value_error("fastloop plan: a rule has too many hyperparameters");
  table_ = std::make_unique<DeviceTable>(plan_.parameters(), kinds, static_cast<std::int64_t>(plan_.rows().size()));
  return *table_;
}

py::object PyPlan::refresh(const py::list& groups, const py::dict& state, const py::object& grads, double grad_scale,
                           std::uintptr_t scale_address, std::uintptr_t found_inf_address, bool check_finite,
                           bool zero_grads) {
  if (!groups_hold(groups) || !state_holds(state) || !grads_hold(grads, false) || !tensors_hold()) return py::none();
  StepControls controls;
  controls.max_norm = max_norm_;
  controls.grad_scale = grad_scale;
  controls.measure = clips_ || check_finite;
  controls.check_all = check_finite;
  zeroes_afterwards_ = zero_grads && grads_are_shared();
  controls.zero_grads = zero_grads && !zeroes_afterwards_;
  return py::bool_(
      table_->refresh(controls, scale_address, found_inf_address, plan_.rows(), hyper_addresses_, plan_.parameters()));
}

std::vector<std::int64_t> PyPlan::steps_done() const {
  std::vector<std::int64_t> result;
  for (const Parameter& p : plan_.parameters()) result.push_back(p.step);
  return result;
}

}  // namespace fastloop
