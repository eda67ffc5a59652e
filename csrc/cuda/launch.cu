// SPDX-License-Identifier: Apache-2.0
#include "cuda/launch.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/select.h"

namespace fastloop {
namespace device {
namespace {

// ---- the runtime

#ifdef FASTLOOP_CUDA_EMULATED

template <class Params>
std::string launch(const void* kernel, int blocks, void*, const Params& params) {
  struct Call {
    void (*kernel)(const Params&);
    const Params* params;
  } call = {reinterpret_cast<void (*)(const Params&)>(const_cast<void*>(kernel)), &params};
  emulation::run(
      blocks, kThreads,
      [](const void* context) {
        const Call* c = static_cast<const Call*>(context);
        c->kernel(*c->params);
      },
      &call);
  return "";
}

std::string resident_blocks(const void*, int, int* blocks) {
  *blocks = 3;  // fewer than most tests have chunks, so that blocks take several
  return "";
}

#else

std::string text_of(cudaError_t error) {
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

template <class Params>
std::string launch(const void* kernel, int blocks, void* stream, const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  const auto grid = dim3(static_cast<unsigned>(blocks)), block = dim3(kThreads);
  return text_of(cudaLaunchKernel(kernel, grid, block, arguments, 0, static_cast<cudaStream_t>(stream)));
}

// Blocks of a kernel that the device holds at once.
std::string resident_blocks(const void* kernel, int index, int* blocks) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{kernel, index}];
  if (found == 0) {
    int processors = 0, each = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    if (error != cudaSuccess) return text_of(error);
    found = processors * std::max(each, 1);
  }
  *blocks = found;
  return "";
}

#endif

// ---- norm kernels, by the words that they deliver: few words are a short launch

constexpr int kFewWords = 480;  // a launch of 4 KB of parameters
constexpr int kNoWords = 1;

template <class G, int kInline>
const void* norm_kernel() {
  return reinterpret_cast<const void*>(&norm<G, kInline>);
}

template <int kInline>
const void* norm_kernel_for(DType grad) {
  switch (grad) {
    case DType::kF32:
      return norm_kernel<float, kInline>();
    case DType::kBF16:
      return norm_kernel<BF16, kInline>();
    case DType::kF16:
      return norm_kernel<F16, kInline>();
    case DType::kF64:
      return norm_kernel<double, kInline>();
    case DType::kUnsupported:
      break;
  }
  return nullptr;
}

template <int kInline>
std::string launch_norm_with(DType grad, int blocks, void* stream, const NormArgs& args, const Word* words,
                             int n_words) {
  NormParams<kInline> params;
  params.args = args;
  params.n_words = n_words;
  if (n_words > 0) std::memcpy(params.words, words, static_cast<std::size_t>(n_words) * sizeof(Word));
  return launch(norm_kernel_for<kInline>(grad), blocks, stream, params);
}

const void* find_update(int rule, const Storage& storage) {
  switch (storage.param) {
    case DType::kF32:
      return find_update_f32(rule, storage);
    case DType::kBF16:
      return find_update_bf16(rule, storage);
    case DType::kF16:
      return find_update_f16(rule, storage);
    case DType::kF64:
      return find_update_f64(rule, storage);
    case DType::kUnsupported:
      break;
  }
  return nullptr;
}

}  // namespace

std::string launch_norm(DType grad, int blocks, void* stream, const NormArgs& args, const Word* words, int n_words) {
  static_assert(sizeof(NormParams<kInlineWords>) <= 32764, "a kernel's parameters");
  static_assert(sizeof(NormParams<kFewWords>) <= 4096, "a short launch");
  if (grad == DType::kUnsupported) return "gradients of an unknown dtype";
  if (n_words == 0) return launch_norm_with<kNoWords>(grad, blocks, stream, args, words, n_words);
  if (n_words <= kFewWords) return launch_norm_with<kFewWords>(grad, blocks, stream, args, words, n_words);
  if (n_words <= kInlineWords) return launch_norm_with<kInlineWords>(grad, blocks, stream, args, words, n_words);
  return "more words than a launch delivers";
}

std::string launch_update(int rule, const Storage& storage, int blocks, void* stream, const StepArgs& args) {
  const void* kernel = find_update(rule, storage);
  if (kernel == nullptr) return "no kernel serves this rule and these dtypes";
  return launch(kernel, blocks, stream, args);
}

bool serves(int rule, const Storage& storage) { return find_update(rule, storage) != nullptr; }

std::string update_blocks(int rule, const Storage& storage, int index, int* blocks) {
  return resident_blocks(find_update(rule, storage), index, blocks);
}

std::string norm_blocks(int index, int* blocks) {
  return resident_blocks(norm_kernel_for<kNoWords>(DType::kF32), index, blocks);
}

#ifdef FASTLOOP_CUDA_EMULATED

std::string check_runtime() { return ""; }
std::string check_device() { return ""; }

#else

std::string check_runtime() {
  int runtime = 0, driver = 0;
  cudaError_t error = cudaRuntimeGetVersion(&runtime);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return text_of(error);
  auto name = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
  if (driver == 0) return "no NVIDIA driver (built with CUDA " + name(runtime) + ")";
  if (driver / 1000 < runtime / 1000) {
    return "the driver is for CUDA " + name(driver) + ", these kernels need one for CUDA " + name(runtime);
  }
  return "";
}

std::string check_device() {
  cudaFuncAttributes attributes;
  const std::string error = text_of(cudaFuncGetAttributes(&attributes, norm_kernel_for<kNoWords>(DType::kF32)));
  cudaGetLastError();  // a missing image is reported once, and not to whoever asks next
  return error.empty() ? "" : "no kernels for this GPU's architecture in this build (" + error + ")";
}

#endif

}  // namespace device
}  // namespace fastloop
