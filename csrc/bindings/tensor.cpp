// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

namespace py = pybind11;

namespace fastloop {
namespace {

DType dtype_of(dlpack::DataType t) {
  constexpr std::uint8_t kFloat = 2, kBfloat = 4;
  if (t.lanes != 1) return DType::kUnsupported;
  if (t.code == kBfloat && t.bits == 16) return DType::kBF16;
  if (t.code != kFloat) return DType::kUnsupported;
  if (t.bits == 32) return DType::kF32;
  if (t.bits == 16) return DType::kF16;
  if (t.bits == 64) return DType::kF64;
  return DType::kUnsupported;
}

bool layout_matches(const dlpack::Tensor& t, const Layout& layout) {
  const std::size_t n = layout.shape.size();
  if (static_cast<std::size_t>(t.ndim) != n) return false;
  for (std::size_t d = 0; d < n; ++d) {
    if (t.shape[d] != layout.shape[d]) return false;
    if (t.shape[d] > 1 && t.strides[d] != layout.strides[d]) return false;
  }
  return true;
}

std::vector<std::int64_t> integers(py::handle tuple) {
  std::vector<std::int64_t> result;
  for (py::handle item : tuple) result.push_back(item.cast<std::int64_t>());
  return result;
}

// Never deleted: its Python references must not be dropped after the interpreter has ended.
TensorReader* reader = nullptr;

}  // namespace

bool Layout::matches(const Layout& other) const {
  if (shape != other.shape) return false;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] > 1 && strides[d] != other.strides[d]) return false;
  }
  return true;
}

std::int64_t Layout::count() const {
  std::int64_t n = 1;
  for (std::int64_t s : shape) n *= s;
  return n;
}

bool Layout::is_dense() const {
  std::vector<std::pair<std::int64_t, std::int64_t>> by_stride;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == 0) return true;
    if (shape[d] > 1) by_stride.emplace_back(strides[d], shape[d]);
  }
  std::sort(by_stride.begin(), by_stride.end());
  std::int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

TensorReader::TensorReader(py::handle tensor_type, bool use_exchange_api) {
  grad_name_ = PyUnicode_InternFromString("grad");
  is_neg_name_ = PyUnicode_InternFromString("is_neg");
  dlpack_device_name_ = PyUnicode_InternFromString("__dlpack_device__");
  // The getter in C, past the attribute lookup: 135 ns becomes 100.
  const py::object descriptor = py::getattr(tensor_type, "grad");
  if (Py_TYPE(descriptor.ptr()) == &PyGetSetDescr_Type) {
    const PyGetSetDef* def = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
    grad_getter_ = def->get;
    grad_closure_ = def->closure;
  }
  const py::module_ torch = py::module_::import("torch");
  increment_version_ = py::object(torch.attr("autograd").attr("graph").attr("increment_version")).release().ptr();
  const char* names[] = {"float32", "bfloat16", "float16", "float64"};
  for (int i = 0; i < 4; ++i) dtypes_[i] = py::object(torch.attr(names[i])).release().ptr();

  if (!use_exchange_api || !py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) {
    PyErr_Clear();
    return;
  }
  if (api->major == 1) api_ = api;
}

bool TensorReader::read(PyObject* tensor, TensorView* view, Layout* layout) const {
  if (api_ == nullptr) return read_slowly(tensor, view, layout);
  dlpack::Tensor t;
  if (api_->tensor_from_object(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  layout->shape.assign(t.shape, t.shape + t.ndim);
  layout->strides.assign(t.strides, t.strides + t.ndim);
  layout->single = layout->count() == 1;
  view->data = static_cast<unsigned char*>(t.data) + t.byte_offset;
  view->dtype = dtype_of(t.dtype);
  view->device = t.device;
  // Wrapped tensors (DTensor, FakeTensor) answer with a null pointer.
  return t.data != nullptr || layout->count() == 0;
}

bool TensorReader::read_matching(PyObject* tensor, dlpack::Device device, const Layout& layout, DType dtype,
                                 void** data, Whereabouts* seen) const {
  seen->object = tensor;
  if (api_ == nullptr) {
    TensorView view;
    Layout found;
    if (!read_slowly(tensor, &view, &found)) return false;
    *data = view.data;
    return view.is_on(device) && view.dtype == dtype && found.matches(layout) &&
           !(layout.single && is_negative_view(tensor));
  }
  dlpack::Tensor t;
  if (api_->tensor_from_object(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  seen->shape = t.shape;
  *data = static_cast<unsigned char*>(t.data) + t.byte_offset;
  return t.device == device && dtype_of(t.dtype) == dtype && layout_matches(t, layout) &&
         !(layout.single && is_negative_view(tensor));
}

bool TensorReader::read_count(PyObject* tensor, dlpack::Device device, void** data) const {
  const py::handle t(tensor);
  const auto place = t.attr("__dlpack_device__")().cast<py::tuple>();
  *data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<std::uintptr_t>());
  const dlpack::Device found = {place[0].cast<std::int32_t>(), place[1].cast<std::int32_t>()};
  return found == device && t.attr("numel")().cast<std::int64_t>() == 1 &&
         t.attr("element_size")().cast<std::int64_t>() == 8;
}

void TensorReader::increment_version(py::handle tensors) const {
  const py::handle function = increment_version_;
  function(tensors);
}

bool TensorReader::is_negative_view(PyObject* tensor) const {
  PyObject* flag = PyObject_CallMethodNoArgs(tensor, is_neg_name_);
  if (flag == nullptr) PyErr_Clear();
  const bool negative = flag == Py_True;
  Py_XDECREF(flag);
  return negative;
}

bool TensorReader::read_slowly(PyObject* tensor, TensorView* view, Layout* layout) const {
  try {
    const py::handle t(tensor);
    layout->shape = integers(t.attr("shape"));
    layout->strides = integers(t.attr("stride")());
    layout->single = layout->count() == 1;
    view->data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<std::uintptr_t>());
    const auto device = py::reinterpret_steal<py::tuple>(PyObject_CallMethodNoArgs(tensor, dlpack_device_name_));
    if (!device) return PyErr_Clear(), false;
    view->device = {device[0].cast<std::int32_t>(), device[1].cast<std::int32_t>()};
    const py::object dtype = t.attr("dtype");
    view->dtype = DType::kUnsupported;
    for (int i = 0; i < 4; ++i) {
      if (dtype.ptr() == dtypes_[i]) view->dtype = static_cast<DType>(i);
    }
    return view->data != nullptr || layout->count() == 0;
  } catch (const std::exception&) {  // a Python error, or a value of another type than expected
    return false;
  }
}

PyObject* TensorReader::grad(PyObject* tensor) const {
  return grad_getter_ != nullptr ? grad_getter_(tensor, grad_closure_) : PyObject_GetAttr(tensor, grad_name_);
}

const TensorReader& tensor_reader() {
  if (reader == nullptr) throw std::runtime_error("fastloop._native was not initialized; import fastloop instead");
  return *reader;
}

void initialize_tensor_reader(py::handle tensor_type, bool use_exchange_api) {
  reader = new TensorReader(tensor_type, use_exchange_api);  // NOLINT: lives as long as the process
}

}  // namespace fastloop
