// W'[o, i, k] = gamma[o, i] * W[o, i, k] + beta[o, i]
#pragma once

#include "adafm/types.h"

namespace adafm {

// Computed with one fused multiply-add in float32 (float64 for a float64 weight) and rounded once, to nearest even,
// when it is stored. `weight` and `out` are dense in the named layouts and must not overlap.
struct ModulateArgs {
  Shape shape;
  const void* weight;
  DType weight_type;
  Layout weight_layout;
  Parameter gamma;
  Parameter beta;
  void* out;
  DType out_type;
  Layout out_layout;
};

// Computes the (o, i) pairs [begin, end), pair = o * I + i, on the calling thread. Any split gives the same bits.
int modulate_cpu(const ModulateArgs& args, int64_t begin, int64_t end);

// Computes everything on `stream` (a cudaStream_t) of the current device. Does not wait.
int modulate_cuda(const ModulateArgs& args, void* stream);

}  // namespace adafm
