// What the binding files share: checks of arguments, results, threads, device and stream.
//
// The CUDA half loads on a torch without CUDA: the one symbol that only a CUDA torch has is weak and tested.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "adafm/platform.h"
#include "adafm/types.h"

#if ADAFM_WITH_CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

// The CUDA half of an operator, where there is one.
#if ADAFM_WITH_CUDA
#define ADAFM_CUDA_OR_NULL(function) (&function)
#else
#define ADAFM_CUDA_OR_NULL(function) nullptr
#endif

namespace adafm {
namespace binding {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Weights for one thread, about 50 us of work: waking a thread that sleeps costs as much.
constexpr int64_t kGrain = 524288;

template <class... text_t>
[[noreturn]] void fail(const text_t&... text) {
  std::ostringstream message;
  (message << ... << text);
  throw std::runtime_error(message.str());
}

// Raises a RuntimeError in Python; the text is only made where the condition does not hold.
#define ADAFM_CHECK(condition, ...)        \
  do {                                     \
    if (!(condition)) {                    \
      ::adafm::binding::fail(__VA_ARGS__); \
    }                                      \
  } while (0)

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text << (d ? ", " : "") << tensor.size(d);
  }
  text << "]";
  return text.str();
}

inline DType element_type(ScalarType type, const char* op, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, ": ", name, " is ", torch::headeronly::toString(type),
           "; expected float32, float64, float16 or bfloat16");
  }
  return DType::kFloat32;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline Shape weight_shape(const Tensor& weight, const char* op) {
  ADAFM_CHECK(weight.dim() >= 2 && weight.dim() <= 5, op, ": weight has shape ", shape_text(weight),
              "; expected [O, I] or [O, I, K...] with one to three kernel dimensions");
  Shape shape{weight.size(0), weight.size(1), 1};
  for (int64_t d = 2; d < weight.dim(); ++d) {
    shape.taps *= weight.size(d);
  }
  return shape;
}

inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() < 4) {
    return false;
  }
  // Innermost to outermost: I, the kernel dimensions from the last to the first, O. Size-1 dimensions may have any.
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool right = tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
    return right;
  };
  bool right = matches(1);
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    right = matches(d) && right;
  }
  return matches(0) && right;
}

inline Layout dense_layout(const Tensor& tensor, const char* op, const char* name) {
  if (tensor.is_contiguous()) {
    return Layout::kContiguous;
  }
  ADAFM_CHECK(is_channels_last(tensor), op, ": ", name, " of shape ", shape_text(tensor),
              " is neither contiguous nor channels-last; call .contiguous() on it first");
  return Layout::kChannelsLast;
}

// gamma or beta of a weight: [O, I], [O, 1] or [1, I] with any number of trailing ones.
inline Parameter parameter_of(const Tensor& tensor, const Tensor& weight, const char* op, const char* name) {
  bool fits = tensor.dim() >= 2;
  for (int64_t d = 0; fits && d < tensor.dim(); ++d) {
    fits = tensor.size(d) == 1 || (d < 2 && tensor.size(d) == weight.size(d));
  }
  ADAFM_CHECK(fits, op, ": ", name, " has shape ", shape_text(tensor), "; expected [", weight.size(0), ", ",
              weight.size(1),
              "], the weight's two leading dimensions, or 1 in place of either, then any number of ones");
  const bool wide = weight.scalar_type() == ScalarType::Double;
  const ScalarType expected = wide ? ScalarType::Double : ScalarType::Float;
  ADAFM_CHECK(tensor.scalar_type() == expected, op, ": ", name, " is ",
              torch::headeronly::toString(tensor.scalar_type()), "; expected ", torch::headeronly::toString(expected),
              " for a ", torch::headeronly::toString(weight.scalar_type()), " weight");
  ADAFM_CHECK(tensor.is_cuda() == weight.is_cuda() &&
                  (!weight.is_cuda() || tensor.get_device_index() == weight.get_device_index()),
              op, ": ", name, " and weight are on different devices");
  const auto stride = [&](int64_t d) { return tensor.size(d) == weight.size(d) ? tensor.stride(d) : 0; };
  return {tensor.const_data_ptr(), stride(0), stride(1)};
}

inline void check_same_device(const Tensor& tensor, const Tensor& like, const char* op, const char* name,
                              const char* like_name) {
  ADAFM_CHECK(
      tensor.is_cuda() == like.is_cuda() && (!like.is_cuda() || tensor.get_device_index() == like.get_device_index()),
      op, ": ", name, " and ", like_name, " are on different devices");
}

// The type of gamma, beta and their gradients.
inline ScalarType wide_type(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_type(const Tensor& tensor, ScalarType expected, const char* op, const char* name) {
  ADAFM_CHECK(tensor.scalar_type() == expected, op, ": ", name, " is ",
              torch::headeronly::toString(tensor.scalar_type()), "; expected ", torch::headeronly::toString(expected));
}

// A fresh result in the shape of `sizes`, a weight's rank.
inline Tensor empty_weight(const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last, const Tensor& like,
                           const char* op) {
  ADAFM_CHECK(!channels_last || sizes.size() >= 4, op, ": channels_last needs a weight of rank 4 or 5; got shape ",
              shape_text(like));
  const auto format = !channels_last      ? MemoryFormat::Contiguous
                      : sizes.size() == 4 ? MemoryFormat::ChannelsLast
                                          : MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// Splits `work` numbered pieces over torch's threads; a piece stands for `cost` weights.
template <class kernel_t>
void run_on_cpu(int64_t work, int64_t cost, kernel_t&& kernel) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  torch::stable::parallel_for(0, work, grain, [&](int64_t begin, int64_t end) { kernel(begin, end); });
}

// A CUDA launch function, or null in a library without CUDA; a name that takes no part in the deduction of args_t.
template <class args_t>
struct Launch {
  using type = int (*)(const args_t&, void*);
};
template <class args_t>
using LaunchOf = typename Launch<args_t>::type;

#if ADAFM_WITH_CUDA
// Calls launch(stream) with the current stream of the weight's device, on that device.
template <class launch_t>
void run_on_cuda(const Tensor& weight, const char* op, launch_t&& launch) {
  ADAFM_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, op,
              ": the weight is on a CUDA device, but this torch has no CUDA stream function");
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  ADAFM_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, op,
              ": torch gave no current stream for CUDA device ", device);
  const int error = launch(stream);
  ADAFM_CHECK(error == kOk, op, ": launch failed on CUDA device ", device, ": ", error_text(error), " (", error, ")");
}
#endif

}  // namespace binding
}  // namespace adafm
