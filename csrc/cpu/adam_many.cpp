// Adam on all tensors of a network: one numbering of the elements over all tensors, so that threads get equal parts.
#include "adafm/adam_many.h"

#include <algorithm>

#include "adam.h"

namespace adafm {
namespace cpu {

template <class acc_t>
AdamNumbers<acc_t> numbers_of(const AdamManyArgs& args, const AdamTensor& tensor) {
  const int64_t t = static_cast<int64_t>(*tensor.steps) + 1;
  const double rate = tensor.rate_at == nullptr ? tensor.rate : *tensor.rate_at;
  return {static_cast<acc_t>(rate),
          static_cast<acc_t>(args.beta1),
          static_cast<acc_t>(1 - args.beta1),
          static_cast<acc_t>(args.beta2),
          static_cast<acc_t>(1 - args.beta2),
          static_cast<acc_t>(args.eps),
          static_cast<acc_t>(correction(args.beta1, t)),
          static_cast<acc_t>(correction(args.beta2, t))};
}

template <class acc_t>
void adam_many(const AdamManyArgs& args, int64_t begin, int64_t end) {
  int64_t base = 0;
  for (const AdamTensor* tensor = args.tensors; tensor != args.tensors + args.tensor_count; ++tensor) {
    const int64_t first = std::clamp(begin - base, int64_t{0}, tensor->count);
    const int64_t last = std::clamp(end - base, int64_t{0}, tensor->count);
    if (first < last) {
      adam(numbers_of<acc_t>(args, *tensor), static_cast<const acc_t*>(tensor->grad) + first, last - first,
           static_cast<acc_t*>(tensor->parameter) + first, static_cast<acc_t*>(tensor->exp_avg) + first,
           static_cast<acc_t*>(tensor->exp_avg_sq) + first);
    }
    base += tensor->count;
  }
}

bool skipped(const AdamManyArgs& args) { return args.skip != nullptr && *args.skip != 0; }

}  // namespace cpu

int adam_many_cpu(const AdamManyArgs& args, int64_t begin, int64_t end) {
  if (args.type != DType::kFloat32 && args.type != DType::kFloat64) {
    return kUnsupportedDType;
  }
  if (!cpu::skipped(args)) {
    args.type == DType::kFloat64 ? cpu::adam_many<double>(args, begin, end) : cpu::adam_many<float>(args, begin, end);
  }
  return kOk;
}

void count_steps_cpu(const AdamManyArgs& args) {
  for (int64_t l = 0; l < args.tensor_count && !cpu::skipped(args); ++l) {
    *args.tensors[l].steps += 1;
  }
}

}  // namespace adafm
