// The operator of the optimizer.
#include "adafm/adam_many.h"
#include "binding.h"

namespace adafm {
namespace {

using namespace binding;

constexpr const char* kOp = "adafm_compiled::adam_many";

// Elements fill one piece of memory, in whatever order.
bool is_dense(const Tensor& tensor) {
  int64_t extent = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) {
      return true;
    }
    extent += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return extent == tensor.numel();
}

std::string numbered(const char* name, size_t l) { return std::string(name) + "[" + std::to_string(l) + "]"; }

void check_number(const Tensor& tensor, const char* name) {
  ADAFM_CHECK(tensor.numel() == 1, kOp, ": ", name, " has shape ", shape_text(tensor), "; expected one number");
  check_type(tensor, ScalarType::Float, kOp, name);
}

// A step size on the CPU is float64 and read now; one with the parameters is float32 and read when the kernel runs.
void set_rate(AdamTensor& tensor, const Tensor& rate, const Tensor& parameter, const char* name) {
  if (rate.is_cuda()) {
    check_number(rate, name);
    check_same_device(rate, parameter, kOp, name, "parameters[0]");
    tensor.rate_at = static_cast<const float*>(rate.const_data_ptr());
    return;
  }
  ADAFM_CHECK(rate.numel() == 1, kOp, ": ", name, " has shape ", shape_text(rate), "; expected one number");
  check_type(rate, ScalarType::Double, kOp, name);
  tensor.rate = *static_cast<const double*>(rate.const_data_ptr());
}

// The tensors `name` that go with the parameters: of their type, device, shape and memory order.
void check_like(const std::vector<Tensor>& tensors, const std::vector<Tensor>& parameters, const char* name) {
  ADAFM_CHECK(tensors.size() == parameters.size(), kOp, ": ", name, " holds ", tensors.size(), " tensors; expected ",
              parameters.size(), ", one for each parameter");
  for (size_t l = 0; l < tensors.size(); ++l) {
    const Tensor &tensor = tensors[l], &parameter = parameters[l];
    const std::string place = numbered(name, l);
    check_type(tensor, parameters[0].scalar_type(), kOp, place.c_str());
    check_same_device(tensor, parameters[0], kOp, place.c_str(), "parameters[0]");
    ADAFM_CHECK(sizes_of(tensor) == sizes_of(parameter), kOp, ": ", place, " has shape ", shape_text(tensor),
                "; expected its parameter's shape ", shape_text(parameter));
    bool same = is_dense(tensor);
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      same = same && (tensor.size(d) == 1 || tensor.stride(d) == parameter.stride(d));
    }
    ADAFM_CHECK(same || tensor.numel() == 0, kOp, ": ", place, " of shape ", shape_text(tensor),
                " has other strides than its parameter, or gaps in memory; expected both in one dense order");
  }
}

// Every parameter, its moments and its count of steps in place.
void adam_many(std::vector<Tensor> parameters, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> rates, double beta1,
               double beta2, double eps, std::optional<Tensor> skip) {
  ADAFM_CHECK(!parameters.empty(), kOp, ": parameters holds no tensor; expected at least one");
  check_like(parameters, parameters, "parameters");
  check_like(grads, parameters, "grads");
  check_like(exp_avgs, parameters, "exp_avgs");
  check_like(exp_avg_sqs, parameters, "exp_avg_sqs");
  ADAFM_CHECK(steps.size() == parameters.size() && rates.size() == parameters.size(), kOp, ": steps holds ",
              steps.size(), " and rates ", rates.size(), " tensors; expected ", parameters.size(),
              ", one for each parameter");
  const Tensor& like = parameters[0];
  std::vector<AdamTensor> tensors;
  int64_t work = 0;
  for (size_t l = 0; l < parameters.size(); ++l) {
    check_number(steps[l], numbered("steps", l).c_str());
    check_same_device(steps[l], like, kOp, numbered("steps", l).c_str(), "parameters[0]");
    AdamTensor tensor{};
    tensor.parameter = parameters[l].mutable_data_ptr();
    tensor.grad = grads[l].const_data_ptr();
    tensor.exp_avg = exp_avgs[l].mutable_data_ptr();
    tensor.exp_avg_sq = exp_avg_sqs[l].mutable_data_ptr();
    tensor.steps = static_cast<float*>(steps[l].mutable_data_ptr());
    tensor.count = parameters[l].numel();
    set_rate(tensor, rates[l], like, numbered("rates", l).c_str());
    tensors.push_back(tensor);
    work += tensor.count;
  }
  AdamManyArgs args{tensors.data(),
                    static_cast<int64_t>(tensors.size()),
                    element_type(like.scalar_type(), kOp, "parameters[0]"),
                    beta1,
                    beta2,
                    eps,
                    nullptr};
  ADAFM_CHECK(args.type == DType::kFloat32 || args.type == DType::kFloat64, kOp, ": parameters[0] is ",
              torch::headeronly::toString(like.scalar_type()), "; expected float32 or float64");
  if (skip.has_value()) {
    check_number(*skip, "skip");
    check_same_device(*skip, like, kOp, "skip", "parameters[0]");
    args.skip = static_cast<const float*>(skip->const_data_ptr());
  }
  if (!like.is_cuda()) {
    // An element's step passes over as much memory as four fused multiply-adds of weights.
    run_on_cpu(work, 4, [&](int64_t begin, int64_t end) { adam_many_cpu(args, begin, end); });
    count_steps_cpu(args);
    return;
  }
#if ADAFM_WITH_CUDA
  run_on_cuda(like, kOp, [&](void* stream) { return adam_many_cuda(args, stream); });
#else
  fail(kOp, ": the parameters are on a CUDA device, but the library was built without CUDA");
#endif
}

}  // namespace
}  // namespace adafm

STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CPU, m) { m.impl("adam_many", TORCH_BOX(&adafm::adam_many)); }

#if ADAFM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CUDA, m) { m.impl("adam_many", TORCH_BOX(&adafm::adam_many)); }
#endif
