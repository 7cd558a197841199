// Adam on separate tensors in one pass, each with a step size and a count of steps of its own.
#pragma once

#include <cstdint>

#include "adafm/types.h"

#if defined(__CUDACC__)
#define ADAFM_HOST_DEVICE __host__ __device__
#else
#define ADAFM_HOST_DEVICE
#endif

namespace adafm {

// Dense tensors of `count` elements in the same order.
struct AdamTensor {
  void* parameter;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* steps;          // taken so far
  const float* rate_at;  // the step size; null: it is `rate`
  double rate;
  int64_t count;
};

// With g a gradient and t = steps + 1 (Kingma and Ba, ICLR 2015, algorithm 1):
//   m = beta1 * m + (1 - beta1) * g,   v = beta2 * v + (1 - beta2) * g * g
//   p = p - rate * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
// Nothing changes where `skip` points to a number other than 0. On CUDA everything but `tensors` is device memory, so
// that a replayed graph reads new numbers.
struct AdamManyArgs {
  const AdamTensor* tensors;
  int64_t tensor_count;
  DType type;  // float32 or float64
  double beta1;
  double beta2;
  double eps;
  const float* skip;
};

// 1 / (1 - beta^t), from multiplications in a fixed order, so that every device finds the same bits.
ADAFM_HOST_DEVICE inline double correction(double beta, int64_t t) {
  double power = 1;
  for (; t > 0; t /= 2, beta *= beta) {
    power *= t % 2 ? beta : 1;
  }
  return 1 / (1 - power);
}

// Elements are numbered tensor after tensor: [0, sum of counts). A thread takes those in [begin, end); any split gives
// the same bits. Once they all are done, count_steps_cpu counts the step.
int adam_many_cpu(const AdamManyArgs& args, int64_t begin, int64_t end);
void count_steps_cpu(const AdamManyArgs& args);

// Tensors that fit into the parameters of one CUDA kernel (4 KB).
constexpr int64_t kMostTensors = 56;

// One launch for up to kMostTensors tensors, and one of a single block that counts the step. `stream` is a cudaStream_t
// of the current device; nothing waits.
int adam_many_cuda(const AdamManyArgs& args, void* stream);

}  // namespace adafm
