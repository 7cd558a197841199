// One training step of a whole network's gamma and beta in one pass: reduce, Adam, average, next modulate.
#pragma once

#include "adafm/arena.h"
#include "adafm/types.h"

namespace adafm {

// For every pair of every layer, with G the gradient of W':
//   d = (sum_k G * W, sum_k G)                                   for (gamma, beta)
//   m = beta1 * m + (1 - beta1) * d,   v = beta2 * v + (1 - beta2) * d * d
//   p = p - lr * (m * correction1) / (sqrt(v * correction2) + eps)
//   a = a + (1 - decay) * (p - a)                                where `average` is not null
//   W' = gamma * W + beta with the new gamma, beta               where `out` is not null
// `parameters`, `exp_avg`, `exp_avg_sq`, `average` are [2, stride] in the computing type: gamma's pairs, then beta's.
// Parameters that a layer's flags fix are left as they are, together with their moments; the average follows all.
// `hyper` are eight numbers of the computing type: lr, beta1, beta2, eps, correction1 = 1 / (1 - beta1^t),
// correction2 = 1 / (1 - beta2^t), decay, unused. On CUDA they are device memory, so that a replayed graph reads new
// ones.
struct StepManyArgs {
  const ArenaLayer* layers;
  int64_t layer_count;
  const Tile* tiles;
  int64_t tile_count;
  const void* grad;
  DType grad_type;
  const void* weight;
  DType weight_type;
  const void* hyper;
  void* parameters;
  void* exp_avg;
  void* exp_avg_sq;
  void* average;
  int64_t stride;
  void* out;
  DType out_type;
};

// [begin, end) numbers weights as in modulate_many.h.
int step_many_cpu(const StepManyArgs& args, int64_t begin, int64_t end);
int step_many_cuda(const StepManyArgs& args, void* stream);

}  // namespace adafm
