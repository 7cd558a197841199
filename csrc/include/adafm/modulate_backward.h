// For a gradient G of W' = gamma * W + beta:
//   dW = gamma * G,  dgamma[o, i] = sum_k G * W,  dbeta[o, i] = sum_k G
#pragma once

#include "adafm/types.h"

namespace adafm {

// Sums run over the taps in order, in float32 (float64 for a float64 weight): same input, same bits.
// A null output is not computed. dW has the weight's type and layout; dgamma and dbeta are dense [O, I] in the type
// of gamma. `gamma.data` may be null where dW is not asked for, `weight` where dgamma is not.
struct ModulateBackwardArgs {
  Shape shape;
  const void* grad;
  DType grad_type;
  Layout grad_layout;
  const void* weight;
  DType weight_type;
  Layout weight_layout;
  Parameter gamma;
  void* grad_weight;
  void* grad_gamma;
  void* grad_beta;
};

// Computes the (o, i) pairs [begin, end), pair = o * I + i, on the calling thread. Any split gives the same bits.
int modulate_backward_cpu(const ModulateBackwardArgs& args, int64_t begin, int64_t end);

// Computes everything on `stream` (a cudaStream_t) of the current device. Does not wait.
int modulate_backward_cuda(const ModulateBackwardArgs& args, void* stream);

}  // namespace adafm
