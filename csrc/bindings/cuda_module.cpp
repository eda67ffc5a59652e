// SPDX-License-Identifier: Apache-2.0
// fastloop._cuda: launches of the CUDA kernels. Addresses and sizes in, nothing out. Loads without a driver.
// Everything is for the current device: Python makes it the right one, by torch's guard, which knows when to leave the
// first GPU alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace py = pybind11;

namespace fastloop {
namespace {

void check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("[fastloop] CUDA: " + error);
}

Storage storage_of(int param, int grad, int state, bool master, bool ema) {
  return {static_cast<DType>(param), static_cast<DType>(grad), static_cast<DType>(state), master, ema};
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// One bucket's two launches.
class Launches {
 public:
  Launches(int index, int rule, const Storage& storage, const TableLayout& layout, std::int64_t first_tensor,
           std::int64_t tensors, std::int64_t first_chunk, std::int64_t chunks, std::uintptr_t table,
           std::uintptr_t sums, int norm_blocks, std::uintptr_t ticket, std::uintptr_t result, std::uintptr_t skipped)
      : rule_(rule), storage_(storage), norm_blocks_(norm_blocks) {
    norm_ = {pointer<Word>(table), layout, first_chunk, chunks, pointer<double>(sums)};
    step_ = {pointer<const Word>(table),
             layout,
             first_tensor,
             tensors,
             first_chunk,
             chunks,
             nullptr,
             0,
             pointer<unsigned>(ticket),
             pointer<double>(result),
             pointer<std::int64_t>(skipped)};
    int resident = 0;
    check(device::update_blocks(rule, storage, index, &resident));
    update_blocks_ = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(chunks, resident)));
  }

  void norm(std::uintptr_t stream, std::uintptr_t words, int n_words) const {
    check(device::launch_norm(storage_.grad, norm_blocks_, pointer<void>(stream), norm_, pointer<const Word>(words),
                              n_words));
  }

  void update(std::uintptr_t stream, std::uintptr_t sums, std::int64_t n_sums) {
    step_.sums = pointer<const double>(sums);
    step_.n_sums = n_sums;
    check(device::launch_update(rule_, storage_, update_blocks_, pointer<void>(stream), step_));
  }

 private:
  int rule_;
  Storage storage_;
  int norm_blocks_, update_blocks_ = 1;
  device::NormArgs norm_;
  device::StepArgs step_;
};

}  // namespace
}  // namespace fastloop

PYBIND11_MODULE(_cuda, m) {
  using namespace fastloop;  // NOLINT
  m.doc() = "CUDA kernels of fastloop. Internal: the Python packages above are the interface.";
#ifdef FASTLOOP_CUDA_EMULATED
  m.attr("EMULATED") = true;
#else
  m.attr("EMULATED") = false;
#endif
  m.attr("INLINE_WORDS") = device::kInlineWords;
  m.def("check_runtime", &device::check_runtime, "Why the kernels cannot run here; empty if they can.");
  m.def("check_device", &device::check_device, "Why not on the current device; empty if they can.");
  m.def("serves", [](int rule, int param, int grad, int state, bool master, bool ema) {
    return device::serves(rule, storage_of(param, grad, state, master, ema));
  });
  m.def("norm_blocks", [](int index) {
    int blocks = 0;
    check(device::norm_blocks(index, &blocks));
    return blocks;
  });
  py::class_<Launches>(m, "Launches")
      .def(py::init([](int index, int rule, int param, int grad, int state, bool master, bool ema, std::int64_t rows,
                       std::int64_t all_tensors, std::int64_t all_chunks, std::int64_t first_tensor,
                       std::int64_t tensors, std::int64_t first_chunk, std::int64_t chunks, std::uintptr_t table,
                       std::uintptr_t sums, int norm_blocks, std::uintptr_t ticket, std::uintptr_t result,
                       std::uintptr_t skipped) {
        return std::make_unique<Launches>(index, rule, storage_of(param, grad, state, master, ema),
                                          TableLayout{rows, all_tensors, all_chunks}, first_tensor, tensors,
                                          first_chunk, chunks, table, sums, norm_blocks, ticket, result, skipped);
      }))
      .def("norm", &Launches::norm)
      .def("update", &Launches::update);
}
