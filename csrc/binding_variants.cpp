// The operators of a single weight beside the plain one: a set of gamma and beta for each sample, a normalised weight,
// a low-rank gamma.
#include "adafm/modulate_lowrank.h"
#include "adafm/modulate_normalized.h"
#include "adafm/modulate_per_sample.h"
#include "binding.h"

namespace adafm {
namespace {

using namespace binding;

// ---- per sample ----

// gamma or beta of all samples, [N, O, I].
SampleParameter sample_parameter(const Tensor& tensor, int64_t samples, const Tensor& weight, const char* op,
                                 const char* name) {
  ADAFM_CHECK(tensor.dim() == 3 && tensor.size(0) == samples && tensor.size(1) == weight.size(0) &&
                  tensor.size(2) == weight.size(1),
              op, ": ", name, " has shape ", shape_text(tensor), "; expected [", samples, ", ", weight.size(0), ", ",
              weight.size(1), "]");
  check_type(tensor, wide_type(weight), op, name);
  check_same_device(tensor, weight, op, name, "weight");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::vector<int64_t> stacked(const Tensor& weight, int64_t samples) {
  std::vector<int64_t> sizes = sizes_of(weight);
  sizes[0] *= samples;
  return sizes;
}

// The result is [N * O, I, ...]: N weights, one behind the other.
template <class run_t>
Tensor modulate_per_sample(const Tensor& weight, const Tensor& gamma, const Tensor& beta, ScalarType dtype,
                           bool channels_last, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_per_sample";
  ModulatePerSampleArgs args{};
  args.shape = weight_shape(weight, op);
  args.samples = gamma.dim() == 3 ? gamma.size(0) : 0;
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.weight_layout = dense_layout(weight, op, "weight");
  args.gamma = sample_parameter(gamma, args.samples, weight, op, "gamma");
  args.beta = sample_parameter(beta, args.samples, weight, op, "beta");
  args.out_type = element_type(dtype, op, "dtype");
  args.out_layout = channels_last ? Layout::kChannelsLast : Layout::kContiguous;
  Tensor out = empty_weight(stacked(weight, args.samples), dtype, channels_last, weight, op);
  if (out.numel() != 0) {
    args.weight = weight.const_data_ptr();
    args.out = out.mutable_data_ptr();
    run(args);
  }
  return out;
}

// `grad` is [N * O, I, ...]; results not asked for have shape [0].
template <class run_t>
std::tuple<Tensor, Tensor, Tensor> modulate_per_sample_backward(const Tensor& grad, const Tensor& weight,
                                                                const Tensor& gamma, bool need_weight, bool need_gamma,
                                                                bool need_beta, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_per_sample_backward";
  ModulatePerSampleBackwardArgs args{};
  args.shape = weight_shape(weight, op);
  args.samples = gamma.dim() == 3 ? gamma.size(0) : 0;
  ADAFM_CHECK(sizes_of(grad) == stacked(weight, args.samples), op, ": grad has shape ", shape_text(grad), "; expected ",
              args.samples, " weights of shape ", shape_text(weight), ", one behind the other");
  check_same_device(grad, weight, op, "grad", "weight");
  args.grad_type = element_type(grad.scalar_type(), op, "grad");
  args.grad_layout = dense_layout(grad, op, "grad");
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.weight_layout = dense_layout(weight, op, "weight");
  args.gamma = sample_parameter(gamma, args.samples, weight, op, "gamma");
  const std::vector<int64_t> none{0}, pairs{args.samples, weight.size(0), weight.size(1)};
  Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, none);
  Tensor grad_gamma = torch::stable::new_empty(weight, need_gamma ? pairs : none, wide_type(weight));
  Tensor grad_beta = torch::stable::new_empty(weight, need_beta ? pairs : none, wide_type(weight));
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

// ---- normalised ----

void check_group(const Shape& shape, bool by_channel, double eps, const char* op) {
  const int64_t members = by_channel ? shape.in_channels * shape.taps : shape.taps;
  ADAFM_CHECK(shape.pairs() == 0 || members >= 2, op, ": a group of ", members,
              " weights has no sample deviation; expected at least 2 in each ",
              by_channel ? "output channel" : "filter");
  ADAFM_CHECK(eps >= 0, op, ": eps is ", eps, "; expected 0 or more");
}

template <class run_t>
Tensor modulate_normalized(const Tensor& weight, const Tensor& gamma, const Tensor& beta, bool by_channel, double eps,
                           ScalarType dtype, bool channels_last, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_normalized";
  ModulateNormalizedArgs args{};
  args.shape = weight_shape(weight, op);
  check_group(args.shape, by_channel, eps, op);
  args.group = by_channel ? Group::kChannel : Group::kFilter;
  args.eps = eps;
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

template <class run_t>
std::tuple<Tensor, Tensor, Tensor> modulate_normalized_backward(const Tensor& grad, const Tensor& weight,
                                                                const Tensor& gamma, bool by_channel, double eps,
                                                                bool need_weight, bool need_gamma, bool need_beta,
                                                                run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_normalized_backward";
  ModulateNormalizedBackwardArgs args{};
  args.shape = weight_shape(weight, op);
  check_group(args.shape, by_channel, eps, op);
  ADAFM_CHECK(sizes_of(grad) == sizes_of(weight), op, ": grad has shape ", shape_text(grad),
              "; expected the weight's shape ", shape_text(weight));
  check_same_device(grad, weight, op, "grad", "weight");
  args.group = by_channel ? Group::kChannel : Group::kFilter;
  args.eps = eps;
  args.grad_type = element_type(grad.scalar_type(), op, "grad");
  args.grad_layout = dense_layout(grad, op, "grad");
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.weight_layout = dense_layout(weight, op, "weight");
  args.gamma = parameter_of(gamma, weight, op, "gamma");
  const std::vector<int64_t> none{0}, pairs{weight.size(0), weight.size(1)};
  Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, none);
  Tensor grad_gamma = torch::stable::new_empty(weight, need_gamma ? pairs : none, wide_type(weight));
  Tensor grad_beta = torch::stable::new_empty(weight, need_beta ? pairs : none, wide_type(weight));
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

// ---- low rank ----

template <class run_t>
Tensor modulate_lowrank(const Tensor& weight, const Tensor& gamma, const Tensor& left, const Tensor& right,
                        const Tensor& beta, ScalarType dtype, bool channels_last, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_lowrank";
  ModulateLowrankArgs args{};
  args.shape = weight_shape(weight, op);
  ADAFM_CHECK(left.dim() == 2 && left.size(0) == weight.size(0) && left.is_contiguous(), op, ": left has shape ",
              shape_text(left), "; expected a contiguous [", weight.size(0), ", rank]");
  args.rank = left.size(1);
  ADAFM_CHECK(
      right.dim() == 2 && right.size(0) == args.rank && right.size(1) == weight.size(1) && right.is_contiguous(), op,
      ": right has shape ", shape_text(right), "; expected a contiguous [", args.rank, ", ", weight.size(1), "]");
  check_type(left, wide_type(weight), op, "left");
  check_type(right, wide_type(weight), op, "right");
  check_same_device(left, weight, op, "left", "weight");
  check_same_device(right, weight, op, "right", "weight");
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.weight_layout = dense_layout(weight, op, "weight");
  args.gamma = parameter_of(gamma, weight, op, "gamma");
  args.beta = parameter_of(beta, weight, op, "beta");
  args.out_type = element_type(dtype, op, "dtype");
  args.out_layout = channels_last ? Layout::kChannelsLast : Layout::kContiguous;
  Tensor out = empty_weight(sizes_of(weight), dtype, channels_last, weight, op);
  if (out.numel() != 0) {
    args.weight = weight.const_data_ptr();
    args.left = left.const_data_ptr();
    args.right = right.const_data_ptr();
    args.out = out.mutable_data_ptr();
    run(args);
  }
  return out;
}

// ---- one device or the other ----

// Hands `args` to the CPU kernel over `work` pieces of `cost` weights, or to the CUDA launch.
template <class args_t>
void dispatch(const args_t& args, const Tensor& weight, const char* op, int64_t work, int64_t cost,
              int (*cpu)(const args_t&, int64_t, int64_t), LaunchOf<args_t> cuda) {
  if (!weight.is_cuda()) {
    run_on_cpu(work, cost, [&](int64_t begin, int64_t end) { cpu(args, begin, end); });
    return;
  }
#if ADAFM_WITH_CUDA
  run_on_cuda(weight, op, [&](void* stream) { return cuda(args, stream); });
#else
  (void)cuda;
  fail(op, ": the weight is on a CUDA device, but the library was built without CUDA");
#endif
}

Tensor modulate_per_sample_op(Tensor weight, Tensor gamma, Tensor beta, ScalarType dtype, bool channels_last) {
  return modulate_per_sample(weight, gamma, beta, dtype, channels_last, [&](const ModulatePerSampleArgs& args) {
    dispatch(args, weight, "adafm_compiled::modulate_per_sample", args.shape.pairs(), args.shape.taps * args.samples,
             &modulate_per_sample_cpu, ADAFM_CUDA_OR_NULL(modulate_per_sample_cuda));
  });
}

std::tuple<Tensor, Tensor, Tensor> modulate_per_sample_backward_op(Tensor grad, Tensor weight, Tensor gamma,
                                                                   bool need_weight, bool need_gamma, bool need_beta) {
  return modulate_per_sample_backward(
      grad, weight, gamma, need_weight, need_gamma, need_beta, [&](const ModulatePerSampleBackwardArgs& args) {
        dispatch(args, weight, "adafm_compiled::modulate_per_sample_backward", args.shape.pairs(),
                 args.shape.taps * args.samples, &modulate_per_sample_backward_cpu,
                 ADAFM_CUDA_OR_NULL(modulate_per_sample_backward_cuda));
      });
}

Tensor modulate_normalized_op(Tensor weight, Tensor gamma, Tensor beta, bool by_channel, double eps, ScalarType dtype,
                              bool channels_last) {
  return modulate_normalized(weight, gamma, beta, by_channel, eps, dtype, channels_last,
                             [&](const ModulateNormalizedArgs& args) {
                               dispatch(args, weight, "adafm_compiled::modulate_normalized", args.shape.out_channels,
                                        args.shape.in_channels * args.shape.taps, &modulate_normalized_cpu,
                                        ADAFM_CUDA_OR_NULL(modulate_normalized_cuda));
                             });
}

std::tuple<Tensor, Tensor, Tensor> modulate_normalized_backward_op(Tensor grad, Tensor weight, Tensor gamma,
                                                                   bool by_channel, double eps, bool need_weight,
                                                                   bool need_gamma, bool need_beta) {
  return modulate_normalized_backward(grad, weight, gamma, by_channel, eps, need_weight, need_gamma, need_beta,
                                      [&](const ModulateNormalizedBackwardArgs& args) {
                                        dispatch(args, weight, "adafm_compiled::modulate_normalized_backward",
                                                 args.shape.out_channels, args.shape.in_channels * args.shape.taps,
                                                 &modulate_normalized_backward_cpu,
                                                 ADAFM_CUDA_OR_NULL(modulate_normalized_backward_cuda));
                                      });
}

Tensor modulate_lowrank_op(Tensor weight, Tensor gamma, Tensor left, Tensor right, Tensor beta, ScalarType dtype,
                           bool channels_last) {
  return modulate_lowrank(weight, gamma, left, right, beta, dtype, channels_last, [&](const ModulateLowrankArgs& args) {
    dispatch(args, weight, "adafm_compiled::modulate_lowrank", args.shape.pairs(), args.shape.taps,
             &modulate_lowrank_cpu, ADAFM_CUDA_OR_NULL(modulate_lowrank_cuda));
  });
}

}  // namespace
}  // namespace adafm

STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CPU, m) {
  m.impl("modulate_per_sample", TORCH_BOX(&adafm::modulate_per_sample_op));
  m.impl("modulate_per_sample_backward", TORCH_BOX(&adafm::modulate_per_sample_backward_op));
  m.impl("modulate_normalized", TORCH_BOX(&adafm::modulate_normalized_op));
  m.impl("modulate_normalized_backward", TORCH_BOX(&adafm::modulate_normalized_backward_op));
  m.impl("modulate_lowrank", TORCH_BOX(&adafm::modulate_lowrank_op));
}

#if ADAFM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CUDA, m) {
  m.impl("modulate_per_sample", TORCH_BOX(&adafm::modulate_per_sample_op));
  m.impl("modulate_per_sample_backward", TORCH_BOX(&adafm::modulate_per_sample_backward_op));
  m.impl("modulate_normalized", TORCH_BOX(&adafm::modulate_normalized_op));
  m.impl("modulate_normalized_backward", TORCH_BOX(&adafm::modulate_normalized_backward_op));
  m.impl("modulate_lowrank", TORCH_BOX(&adafm::modulate_lowrank_op));
}
#endif
