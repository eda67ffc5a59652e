// SPDX-License-Identifier: Apache-2.0
// Tensors seen from C++ without a torch header: through DLPack's C exchange API where torch has it (2.10 and later),
// else through their Python methods.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fastloop {

// The binary interface of dlpack.h 1.x (github.com/dmlc/dlpack): the few structs that are needed to read a tensor.
namespace dlpack {

struct Device {
  std::int32_t type, id;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct ExchangeApi {
  std::uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};
constexpr std::int32_t kCpu = 1;

constexpr bool operator==(Device a, Device b) { return a.type == b.type && a.id == b.id; }

}  // namespace dlpack

constexpr dlpack::Device kCpuDevice = {dlpack::kCpu, 0};

struct Layout {
  std::vector<std::int64_t> shape, strides;
  bool single = false;  // one element

  // Same shape, and the same stride wherever a dimension has more than one element.
  bool matches(const Layout& other) const;
  // Every element once in one gapless block, in whatever order of dimensions.
  bool is_dense() const;
  std::int64_t count() const;
};

// Where a tensor's object and its shape were when they were last read: a hint for the caches, and never more than that.
struct Whereabouts {
  const void* object = nullptr;
  const void* shape = nullptr;  // torch keeps it inside the tensor's own block, beside what else a read touches

  void prefetch_object() const { __builtin_prefetch(object); }
  void prefetch_tensor() const {
    const auto* middle = static_cast<const unsigned char*>(shape);
    for (int line = -1; line <= 2; ++line) __builtin_prefetch(middle + 64 * line);
  }
};

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kUnsupported;
  dlpack::Device device = {0, 0};

  bool is_on(dlpack::Device other) const { return device == other; }
  bool on_cpu() const { return device == kCpuDevice; }
};

// Reads tensors. One for the process, made when torch hands in its Tensor type.
class TensorReader {
 public:
  // use_exchange_api = false takes the way through Python methods, which is what older torch versions have.
  TensorReader(pybind11::handle tensor_type, bool use_exchange_api);

  // False, with no Python error set, for what cannot be read as an array: sparse, fake and other wrapped tensors.
  bool read(PyObject* tensor, TensorView* view, Layout* layout) const;

  // Address, and whether device, shape and strides are still as they were. False if anything is not as expected.
  // DLPack shows a lazily negated view with the raw data. Such views stride over the real or imaginary parts of complex
  // numbers and so have another layout, unless they have one element: only there is the flag asked for (100 ns).
  bool read_matching(PyObject* tensor, dlpack::Device device, const Layout& layout, DType dtype, void** data,
                     Whereabouts* seen) const;

  // The int64 scalar on `device` that counts updates. False for anything else.
  bool read_count(PyObject* tensor, dlpack::Device device, void** data) const;

  // A new reference to tensor.grad, or null with a Python error set.
  PyObject* grad(PyObject* tensor) const;

  // torch.autograd.graph.increment_version of a sequence of tensors. Throws what it raises.
  void increment_version(pybind11::handle tensors) const;

  bool uses_exchange_api() const { return api_ != nullptr; }

 private:
  bool read_slowly(PyObject* tensor, TensorView* view, Layout* layout) const;

  const dlpack::ExchangeApi* api_ = nullptr;
  bool is_negative_view(PyObject* tensor) const;

  getter grad_getter_ = nullptr;
  void* grad_closure_ = nullptr;
  PyObject* grad_name_ = nullptr;
  PyObject* is_neg_name_ = nullptr;
  PyObject* increment_version_ = nullptr;
  PyObject* dtypes_[4] = {};  // torch.float32, bfloat16, float16, float64
  PyObject* dlpack_device_name_ = nullptr;
};

// Throws RuntimeError before initialize().
const TensorReader& tensor_reader();
void initialize_tensor_reader(pybind11::handle tensor_type, bool use_exchange_api);

}  // namespace fastloop
