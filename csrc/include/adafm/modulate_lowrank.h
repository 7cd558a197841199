// W' = gamma * W + beta with gamma = gamma0 + U diag(s) V^T formed in registers, never in memory.
#pragma once

#include "adafm/types.h"

namespace adafm {

// `left` is U diag(s), [O, rank], `right` is V^T, [rank, I], both dense in the computing type. gamma of a pair is
// gamma0[o, i] with left[o, r] * right[r, i] added by one fused multiply-add each, in the order of r.
struct ModulateLowrankArgs {
  Shape shape;
  int64_t rank;
  const void* weight;
  DType weight_type;
  Layout weight_layout;
  Parameter gamma;  // gamma0
  const void* left;
  const void* right;
  Parameter beta;
  void* out;
  DType out_type;
  Layout out_layout;
};

// The CPU computes the (o, i) pairs [begin, end) on the calling thread; any split gives the same bits.
int modulate_lowrank_cpu(const ModulateLowrankArgs& args, int64_t begin, int64_t end);
int modulate_lowrank_cuda(const ModulateLowrankArgs& args, void* stream);

}  // namespace adafm
