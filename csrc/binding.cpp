// The kernels as torch operators, on LibTorch's stable ABI: one binary for torch 2.11 and later and every Python.
// Checks arguments, allocates results, picks threads, device and stream; knows nothing of autograd. This file defines
// every operator and implements those of a single weight; binding_many.cpp and binding_variants.cpp the others.
#include "binding.h"

#include "adafm/modulate.h"
#include "adafm/modulate_backward.h"

namespace adafm {
namespace {

using namespace binding;

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
  Tensor out = empty_weight(sizes_of(weight), dtype, channels_last, weight, op);
  if (out.numel() != 0) {
    args.weight = weight.const_data_ptr();
    args.out = out.mutable_data_ptr();
    run(args);
  }
  return out;
}

// Backward: arguments, results, run. Results not asked for have shape [0].
template <class run_t>
std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& grad, const Tensor& weight,
                                                     const std::optional<Tensor>& gamma, bool need_weight,
                                                     bool need_gamma, bool need_beta, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_backward";
  ModulateBackwardArgs args{};
  args.shape = weight_shape(weight, op);
  ADAFM_CHECK(sizes_of(grad) == sizes_of(weight), op, ": grad has shape ", shape_text(grad),
              "; expected the weight's shape ", shape_text(weight));
  check_same_device(grad, weight, op, "grad", "weight");
  args.grad_type = element_type(grad.scalar_type(), op, "grad");
  args.grad_layout = dense_layout(grad, op, "grad");
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.weight_layout = dense_layout(weight, op, "weight");
  ADAFM_CHECK(gamma.has_value() || !need_weight, op, ": gamma is missing, and grad_weight = gamma * grad needs it");
  if (gamma.has_value()) {
    args.gamma = parameter_of(*gamma, weight, op, "gamma");
  }

  const std::vector<int64_t> none{0}, pairs{weight.size(0), weight.size(1)};
  const ScalarType wide = weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, none);
  Tensor grad_gamma = torch::stable::new_empty(weight, need_gamma ? pairs : none, wide);
  Tensor grad_beta = torch::stable::new_empty(weight, need_beta ? pairs : none, wide);
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
  return modulate(weight, gamma, beta, dtype, channels_last, [](const ModulateArgs& args) {
    run_on_cpu(args.shape.pairs(), args.shape.taps,
               [&](int64_t begin, int64_t end) { modulate_cpu(args, begin, end); });
  });
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward_on_cpu(Tensor grad, Tensor weight, std::optional<Tensor> gamma,
                                                            bool need_weight, bool need_gamma, bool need_beta) {
  return modulate_backward(grad, weight, gamma, need_weight, need_gamma, need_beta,
                           [](const ModulateBackwardArgs& args) {
                             run_on_cpu(args.shape.pairs(), args.shape.taps,
                                        [&](int64_t begin, int64_t end) { modulate_backward_cpu(args, begin, end); });
                           });
}

#if ADAFM_WITH_CUDA
Tensor modulate_on_cuda(Tensor weight, Tensor gamma, Tensor beta, ScalarType dtype, bool channels_last) {
  return modulate(weight, gamma, beta, dtype, channels_last, [&](const ModulateArgs& args) {
    run_on_cuda(weight, "adafm_compiled::modulate", [&](void* stream) { return modulate_cuda(args, stream); });
  });
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward_on_cuda(Tensor grad, Tensor weight, std::optional<Tensor> gamma,
                                                             bool need_weight, bool need_gamma, bool need_beta) {
  return modulate_backward(grad, weight, gamma, need_weight, need_gamma, need_beta,
                           [&](const ModulateBackwardArgs& args) {
                             run_on_cuda(weight, "adafm_compiled::modulate_backward",
                                         [&](void* stream) { return modulate_backward_cuda(args, stream); });
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
      "modulate_backward(Tensor grad, Tensor weight, Tensor? gamma, bool need_weight, bool need_gamma, bool need_beta)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "modulate_many(Tensor[] weights, Tensor[] gammas, Tensor[] betas, ScalarType dtype, int[] channels_last)"
      " -> Tensor[]");
  m.def(
      "modulate_many_backward(Tensor[] grads, Tensor[] weights, Tensor[] gammas, bool need_weight, bool need_gamma,"
      " bool need_beta) -> Tensor[]");
  m.def(
      "modulate_many_out(Tensor weight, Tensor gamma, Tensor beta, Tensor layers, Tensor? tiles, Tensor(a!) out) -> "
      "()");
  m.def(
      "modulate_many_backward_out(Tensor grad, Tensor weight, Tensor? gamma, Tensor layers, Tensor? tiles,"
      " Tensor(a!)? grad_weight, Tensor(b!)? grad_gamma, Tensor(c!)? grad_beta) -> ()");
  m.def(
      "step_many(Tensor grad, Tensor weight, Tensor layers, Tensor? tiles, Tensor hyper, Tensor(a!) parameters,"
      " Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? average, Tensor(e!)? out) -> ()");
  m.def(
      "modulate_per_sample(Tensor weight, Tensor gamma, Tensor beta, ScalarType dtype, bool channels_last) -> Tensor");
  m.def(
      "modulate_per_sample_backward(Tensor grad, Tensor weight, Tensor gamma, bool need_weight, bool need_gamma,"
      " bool need_beta) -> (Tensor, Tensor, Tensor)");
  m.def(
      "modulate_normalized(Tensor weight, Tensor gamma, Tensor beta, bool by_channel, float eps, ScalarType dtype,"
      " bool channels_last) -> Tensor");
  m.def(
      "modulate_normalized_backward(Tensor grad, Tensor weight, Tensor gamma, bool by_channel, float eps,"
      " bool need_weight, bool need_gamma, bool need_beta) -> (Tensor, Tensor, Tensor)");
  m.def(
      "modulate_lowrank(Tensor weight, Tensor gamma, Tensor left, Tensor right, Tensor beta, ScalarType dtype,"
      " bool channels_last) -> Tensor");
  m.def(
      "adam_many(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] steps, Tensor[] rates, float beta1, float beta2, float eps, Tensor? skip) -> ()");
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
