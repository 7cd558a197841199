// The kernels as torch operators, on LibTorch's stable ABI: one binary for torch 2.11 and later and every Python.
// Checks arguments, allocates results, picks threads, device and stream; knows nothing of autograd.
//
// The CUDA half loads on a torch without CUDA: the one symbol that only a CUDA torch has is weak and tested.
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

#include "adafm/modulate.h"
#include "adafm/modulate_backward.h"
#include "adafm/platform.h"

#if ADAFM_WITH_CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace adafm {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements for one thread: below this, handing work to a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

template <class... text_t>
void check(bool condition, const text_t&... text) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << text);
    throw std::runtime_error(message.str());
  }
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text << (d ? ", " : "") << tensor.size(d);
  }
  text << "]";
  return text.str();
}

DType element_type(ScalarType type, const char* op, const char* name) {
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
      check(false, op, ": ", name, " is ", torch::headeronly::toString(type),
            "; expected float32, float64, float16 or bfloat16");
  }
  return DType::kFloat32;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

Shape weight_shape(const Tensor& weight, const char* op) {
  check(weight.dim() >= 2 && weight.dim() <= 5, op, ": weight has shape ", shape_text(weight),
        "; expected [O, I] or [O, I, K...] with one to three kernel dimensions");
  Shape shape{weight.size(0), weight.size(1), 1};
  for (int64_t d = 2; d < weight.dim(); ++d) {
    shape.taps *= weight.size(d);
  }
  return shape;
}

bool is_channels_last(const Tensor& tensor) {
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

Layout dense_layout(const Tensor& tensor, const char* op, const char* name) {
  if (tensor.is_contiguous()) {
    return Layout::kContiguous;
  }
  check(is_channels_last(tensor), op, ": ", name, " of shape ", shape_text(tensor),
        " is neither contiguous nor channels-last; call .contiguous() on it first");
  return Layout::kChannelsLast;
}

// gamma or beta of a weight.
Parameter parameter_of(const Tensor& tensor, const Tensor& weight, const char* op, const char* name) {
  check(tensor.dim() == 2 && tensor.size(0) == weight.size(0) && tensor.size(1) == weight.size(1), op, ": ", name,
        " has shape ", shape_text(tensor), "; expected [", weight.size(0), ", ", weight.size(1),
        "], the weight's two leading dimensions");
  const bool wide = weight.scalar_type() == ScalarType::Double;
  const ScalarType expected = wide ? ScalarType::Double : ScalarType::Float;
  check(tensor.scalar_type() == expected, op, ": ", name, " is ", torch::headeronly::toString(tensor.scalar_type()),
        "; expected ", torch::headeronly::toString(expected), " for a ",
        torch::headeronly::toString(weight.scalar_type()), " weight");
  check(tensor.is_cuda() == weight.is_cuda() &&
            (!weight.is_cuda() || tensor.get_device_index() == weight.get_device_index()),
        op, ": ", name, " and weight are on different devices");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// Splits the pairs of a weight over torch's threads.
template <class args_t>
void run_on_cpu(const args_t& args, int (*kernel)(const args_t&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.shape.taps));
  torch::stable::parallel_for(0, args.shape.pairs(), grain,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

#if ADAFM_WITH_CUDA
template <class args_t>
void run_on_cuda(const args_t& args, int (*launch)(const args_t&, void*), const Tensor& weight, const char* op) {
  check(&aoti_torch_get_current_cuda_stream != nullptr, op,
        ": the weight is on a CUDA device, but this torch has no CUDA stream function");
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, op,
        ": torch gave no current stream for CUDA device ", device);
  const int error = launch(args, stream);
  check(error == kOk, op, ": launch failed on CUDA device ", device, ": ", error_text(error), " (", error, ")");
}
#endif

// Forward: arguments, result, run.
template <class run_t>
Tensor modulate(const Tensor& weight, const Tensor& gamma, const Tensor& beta, ScalarType dtype, bool channels_last,
                run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate";
  ModulateArgs args{};
  args.shape = weight_shape(weight, op);
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.weight_layout = dense_layout(weight, op, "weight");
  args.gamma = parameter_of(gamma, weight, op, "gamma");
  args.beta = parameter_of(beta, weight, op, "beta");
  args.out_type = element_type(dtype, op, "dtype");
  args.out_layout = channels_last ? Layout::kChannelsLast : Layout::kContiguous;
  check(!channels_last || weight.dim() >= 4, op, ": channels_last needs a weight of rank 4 or 5; got shape ",
        shape_text(weight));
  const auto format = !channels_last      ? MemoryFormat::Contiguous
                      : weight.dim() == 4 ? MemoryFormat::ChannelsLast
                                          : MemoryFormat::ChannelsLast3d;
  Tensor out = torch::stable::empty(sizes_of(weight), dtype, std::nullopt, weight.device(), std::nullopt, format);
  if (out.numel() != 0) {
    args.weight = weight.const_data_ptr();
    args.out = out.mutable_data_ptr();
    run(args);
  }
  return out;
}

// Backward: arguments, results, run. Results not asked for have shape [0].
template <class run_t>
std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& grad, const Tensor& weight, const Tensor& gamma,
                                                     bool need_weight, bool need_gamma, bool need_beta, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_backward";
  ModulateBackwardArgs args{};
  args.shape = weight_shape(weight, op);
  check(sizes_of(grad) == sizes_of(weight), op, ": grad has shape ", shape_text(grad), "; expected the weight's shape ",
        shape_text(weight));
  check(
      grad.is_cuda() == weight.is_cuda() && (!weight.is_cuda() || grad.get_device_index() == weight.get_device_index()),
      op, ": grad and weight are on different devices");
  args.grad_type = element_type(grad.scalar_type(), op, "grad");
  args.grad_layout = dense_layout(grad, op, "grad");
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.weight_layout = dense_layout(weight, op, "weight");
  args.gamma = parameter_of(gamma, weight, op, "gamma");

  const std::vector<int64_t> none{0}, pairs{weight.size(0), weight.size(1)};
  Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, none);
  Tensor grad_gamma = torch::stable::new_empty(weight, need_gamma ? pairs : none, gamma.scalar_type());
  Tensor grad_beta = torch::stable::new_empty(weight, need_beta ? pairs : none, gamma.scalar_type());
  if (args.shape.pairs() != 0 && (need_weight || need_gamma || need_beta)) {
    args.grad = grad.const_data_ptr();
    args.weight = weight.const_data_ptr();
    args.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
    args.grad_gamma = need_gamma ? grad_gamma.mutable_data_ptr() : nullptr;
    args.grad_beta = need_beta ? grad_beta.mutable_data_ptr() : nullptr;
    run(args);
  }
  return {grad_weight, grad_gamma, grad_beta};
}

Tensor modulate_on_cpu(Tensor weight, Tensor gamma, Tensor beta, ScalarType dtype, bool channels_last) {
  return modulate(weight, gamma, beta, dtype, channels_last,
                  [](const ModulateArgs& args) { run_on_cpu(args, &modulate_cpu); });
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward_on_cpu(Tensor grad, Tensor weight, Tensor gamma, bool need_weight,
                                                            bool need_gamma, bool need_beta) {
  return modulate_backward(grad, weight, gamma, need_weight, need_gamma, need_beta,
                           [](const ModulateBackwardArgs& args) { run_on_cpu(args, &modulate_backward_cpu); });
}

#if ADAFM_WITH_CUDA
Tensor modulate_on_cuda(Tensor weight, Tensor gamma, Tensor beta, ScalarType dtype, bool channels_last) {
  return modulate(weight, gamma, beta, dtype, channels_last, [&](const ModulateArgs& args) {
    run_on_cuda(args, &modulate_cuda, weight, "adafm_compiled::modulate");
  });
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward_on_cuda(Tensor grad, Tensor weight, Tensor gamma, bool need_weight,
                                                             bool need_gamma, bool need_beta) {
  return modulate_backward(grad, weight, gamma, need_weight, need_gamma, need_beta,
                           [&](const ModulateBackwardArgs& args) {
                             run_on_cuda(args, &modulate_backward_cuda, weight, "adafm_compiled::modulate_backward");
                           });
}
#endif

bool cuda_available_in_library() { return ADAFM_WITH_CUDA; }

bool cuda_stream_symbol() {
#if ADAFM_WITH_CUDA
  return &aoti_torch_get_current_cuda_stream != nullptr;
#else
  return false;
#endif
}

}  // namespace
}  // namespace adafm

STABLE_TORCH_LIBRARY(adafm_compiled, m) {
  m.def("modulate(Tensor weight, Tensor gamma, Tensor beta, ScalarType dtype, bool channels_last) -> Tensor");
  m.def(
      "modulate_backward(Tensor grad, Tensor weight, Tensor gamma, bool need_weight, bool need_gamma, bool need_beta)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("cuda_available_in_library() -> bool");
  m.def("cuda_stream_symbol() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CompositeExplicitAutograd, m) {
  m.impl("cuda_available_in_library", TORCH_BOX(&adafm::cuda_available_in_library));
  m.impl("cuda_stream_symbol", TORCH_BOX(&adafm::cuda_stream_symbol));
}

STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CPU, m) {
  m.impl("modulate", TORCH_BOX(&adafm::modulate_on_cpu));
  m.impl("modulate_backward", TORCH_BOX(&adafm::modulate_backward_on_cpu));
}

#if ADAFM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CUDA, m) {
  m.impl("modulate", TORCH_BOX(&adafm::modulate_on_cuda));
  m.impl("modulate_backward", TORCH_BOX(&adafm::modulate_backward_on_cuda));
}
#endif
