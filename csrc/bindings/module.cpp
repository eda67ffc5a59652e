// SPDX-License-Identifier: Apache-2.0
// fastloop._native: arguments in, status out. Nothing here computes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>

#include "bindings/py_plan.h"
#include "bindings/tensor.h"
#include "core/parallel.h"
#include "core/plan.h"
#include "cpu/dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace fastloop {
namespace {

// Chosen at the first use, by FASTLOOP_ISA or the best there is.
const Kernels& kernels() {
  static const Kernels* chosen = nullptr;
  if (chosen == nullptr) {
    const char* wanted = std::getenv("FASTLOOP_ISA");
    std::string error;
    const Kernels* found = select_kernels(wanted == nullptr ? "" : wanted, &error);
    if (found == nullptr) throw py::value_error(error);
    chosen = found;
  }
  return *chosen;
}

int rule_index(const std::string& name) {
  for (int r = 0; r < rule_count(); ++r) {
    if (name == rule_info(r).name) return r;
  }
  throw py::value_error("fastloop._native has no rule '" + name + "'");
}

// Null pointer: one of the tensors is not a dense CPU array of a served dtype.
std::optional<std::vector<Array>> arrays_of(const py::list& tensors) {
  const TensorReader& reader = tensor_reader();
  std::vector<Array> arrays;
  arrays.reserve(tensors.size());
  TensorView view;
  Layout layout;
  for (py::handle tensor : tensors) {
    if (!reader.read(tensor.ptr(), &view, &layout)) return std::nullopt;
    if (!view.on_cpu() || view.dtype == DType::kUnsupported || !layout.is_dense()) return std::nullopt;
    arrays.push_back({view.data, layout.count(), view.dtype});
  }
  return arrays;
}

std::optional<double> norm(const py::list& tensors, double p) {
  const auto arrays = arrays_of(tensors);
  if (!arrays) return std::nullopt;
  const NormKind kind = p == 1 ? NormKind::kL1 : p == 2 ? NormKind::kL2 : NormKind::kInf;
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  return multi_norm(k, kind, *arrays);
}

// A tensor that is listed twice is scaled twice, one after the other: not something for threads.
bool overlap(std::vector<Array> arrays) {
  std::sort(arrays.begin(), arrays.end(), [](const Array& a, const Array& b) { return a.data < b.data; });
  for (std::size_t i = 1; i < arrays.size(); ++i) {
    const Array& before = arrays[i - 1];
    const auto* end = static_cast<const unsigned char*>(before.data) + before.count * size_of(before.dtype);
    if (static_cast<const unsigned char*>(arrays[i].data) < end) return true;
  }
  return false;
}

bool scale(const py::list& tensors, double factor, double clip_value) {
  const auto arrays = arrays_of(tensors);
  if (!arrays || overlap(*arrays)) return false;
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  multi_scale(k, *arrays, factor, clip_value);
  return true;
}

double stream_pointers(const std::vector<std::uintptr_t>& reads, const std::vector<std::uintptr_t>& writes,
                       std::int64_t count) {
  if (reads.size() > 4 || writes.size() > 4) throw py::value_error("stream takes at most 4 streams of each kind");
  std::vector<const float*> r;
  std::vector<float*> w;
  for (std::uintptr_t p : reads) r.push_back(reinterpret_cast<const float*>(p));
  for (std::uintptr_t p : writes) w.push_back(reinterpret_cast<float*>(p));
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  return stream(k, r, w, count);
}

// Asks for huge pages behind a large array that nobody has touched yet: fewer page faults and address translations.
void advise_huge_pages(std::uintptr_t address, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#else
  (void)address;
  (void)bytes;
#endif
}

bool add_entry(PyPlan& plan, py::object owner, py::object tensor, const std::string& rule, const py::list& states,
               py::object master, py::object ema, py::object step, std::int64_t steps_done, int row, py::object count) {
  Entry entry;
  entry.owner = std::move(owner);
  entry.tensor = std::move(tensor);
  for (py::handle s : states) entry.states.push_back(py::reinterpret_borrow<py::object>(s));
  entry.master = std::move(master);
  entry.ema = std::move(ema);
  entry.step = std::move(step);
  entry.steps_done = steps_done;
  entry.count = std::move(count);
  entry.rule = rule_index(rule);
  entry.row = row;
  if (static_cast<int>(entry.states.size()) != rule_info(entry.rule).states) {
    throw py::value_error("rule '" + rule + "' keeps " + std::to_string(rule_info(entry.rule).states) +
                          " states, got " + std::to_string(entry.states.size()));
  }
  return plan.add(std::move(entry));
}

std::unique_ptr<PyPlan> make_plan(const py::list& hyper, const py::list& structure,
                                  std::optional<std::pair<int, int>> device) {
  std::vector<HyperKey> keys;
  for (py::handle item : hyper) {
    const py::tuple pair = item.cast<py::tuple>();
    keys.push_back({pair[0].cast<py::str>(), pair[1].cast<int>()});
  }
  std::vector<py::str> flags;
  for (py::handle item : structure) flags.push_back(item.cast<py::str>());
  const dlpack::Device place = device ? dlpack::Device{device->first, device->second} : kCpuDevice;
  return std::make_unique<PyPlan>(kernels(), std::move(keys), std::move(flags), place, device.has_value());
}

}  // namespace
}  // namespace fastloop

PYBIND11_MODULE(_native, m) {
  using namespace fastloop;  // NOLINT
  m.doc() = "Native CPU kernels of fastloop. Internal: the Python packages above are the interface.";
  watch_forks();

  m.def("initialize", &initialize_tensor_reader, py::arg("tensor_type"), py::arg("use_exchange_api") = true);
  m.def("uses_exchange_api", [] { return tensor_reader().uses_exchange_api(); });
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("supported_isas", [] {
    std::vector<std::string> result;
    for (const Kernels* set : supported_kernels()) result.emplace_back(set->isa);
    return result;
  });
  m.def("rules", [] {
    py::dict result;
    for (int r = 0; r < rule_count(); ++r) {
      result[rule_info(r).name] =
          py::dict(py::arg("states") = rule_info(r).states, py::arg("hypers") = rule_info(r).hypers);
    }
    return result;
  });
  m.def("chunk_map", [](const std::vector<std::int64_t>& sizes) {
    std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>> result;
    for (const Chunk& c : chunk_map(sizes)) result.emplace_back(c.tensor, c.offset, c.count);
    return result;
  });
  m.def("norm", &norm, py::arg("tensors"), py::arg("p"),
        "p = 2: the sum of squares; p = 1, inf: the norm. None if a tensor is not a dense CPU array.");
  m.def("scale", &scale, py::arg("tensors"), py::arg("factor"),
        py::arg("clip_value") = std::numeric_limits<double>::infinity(),
        "tensor = clamp(tensor * factor) in place. False, nothing done, if a tensor is not a dense CPU array or two "
        "overlap.");
  m.def("stream", &stream_pointers, py::arg("read_ptrs"), py::arg("write_ptrs"), py::arg("count"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));

  py::enum_<Outcome>(m, "Outcome", py::arithmetic())
      .value("DONE", Outcome::kDone)
      .value("SKIPPED", Outcome::kSkipped)
      .value("STOPPED", Outcome::kStopped)
      .value("STALE", Outcome::kStale);

  py::class_<PyPlan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("hyper"), py::arg("structure"), py::arg("device") = std::nullopt,
           "device: DLPack's (type, index) of a device whose kernels read a table; none to step on the CPU.")
      .def("add", &add_entry, py::arg("owner"), py::arg("tensor"), py::arg("rule"), py::arg("states"),
           py::arg("master"), py::arg("ema"), py::arg("step"), py::arg("steps_done"), py::arg("row"),
           py::arg("count") = py::none())
      .def("finish", &PyPlan::finish, py::arg("groups"), py::arg("state"), py::arg("elsewhere"))
      .def("step", &PyPlan::step)
      .def("gather", &PyPlan::gather)
      .def("update", &PyPlan::update)
      .def("steps_done", &PyPlan::steps_done)
      .def("make_table", &PyPlan::make_table, py::arg("kinds"), py::return_value_policy::reference_internal)
      .def("refresh", &PyPlan::refresh)
      .def("scalar_address", &PyPlan::scalar_address)
      .def_property_readonly("clips", &PyPlan::clips)
      .def_property_readonly("zeroes_afterwards", &PyPlan::zeroes_afterwards)
      .def("count_versions", &PyPlan::count_versions);

  py::class_<DeviceTable>(m, "DeviceTable")
      .def_property_readonly("address",
                             [](const DeviceTable& t) { return reinterpret_cast<std::uintptr_t>(t.words().data()); })
      .def_property_readonly("words", [](const DeviceTable& t) { return t.layout().all_words(); })
      .def_property_readonly("front_words", [](const DeviceTable& t) { return t.layout().tensor_words(); })
      .def_property_readonly("scale_word", [](const DeviceTable& t) { return t.layout().scale_word(); })
      .def_property_readonly(
          "layout",
          [](const DeviceTable& t) { return py::make_tuple(t.layout().rows, t.layout().tensors, t.layout().chunks); })
      .def_property_readonly("buckets", [](const DeviceTable& t) {
        py::list result;
        for (const Bucket& b : t.buckets()) {
          const Storage& s = b.storage;
          result.append(
              py::dict(py::arg("rule") = rule_info(b.rule).name, py::arg("kind") = b.kind,
                       py::arg("param") = static_cast<int>(s.param), py::arg("grad") = static_cast<int>(s.grad),
                       py::arg("state") = static_cast<int>(s.state), py::arg("master") = s.master,
                       py::arg("ema") = s.ema, py::arg("first_tensor") = b.first_tensor, py::arg("tensors") = b.tensors,
                       py::arg("first_chunk") = b.first_chunk, py::arg("chunks") = b.chunks));
        }
        return result;
      });
}
