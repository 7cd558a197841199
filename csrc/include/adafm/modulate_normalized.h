// W' = gamma * n + beta with n = (W - mean) / max(deviation, eps), over each filter's taps or each output channel.
#pragma once

#include "adafm/types.h"

namespace adafm {

// Which weights share a mean and a deviation.
enum class Group : int {
  kFilter = 0,   // the taps of one (o, i)
  kChannel = 1,  // all taps and input channels of one o
};

// mean and sample deviation (divisor M - 1 for M weights, M >= 2) in the computing type. A deviation below `eps` is
// replaced by `eps`.
struct ModulateNormalizedArgs {
  Shape shape;
  Group group;
  double eps;
  const void* weight;
  DType weight_type;
  Layout weight_layout;
  Parameter gamma;
  Parameter beta;
  void* out;
  DType out_type;
  Layout out_layout;
};

// With s the (guarded) deviation and dn = gamma * G:
//   dW = (dn - mean(dn) - n * sum(dn * n) / (M - 1)) / s, without the last term where the deviation was guarded;
//   dgamma = sum_k G * n,  dbeta = sum_k G.
// dW lies as the weight does; dgamma and dbeta are dense [O, I]; null outputs are not computed.
struct ModulateNormalizedBackwardArgs {
  Shape shape;
  Group group;
  double eps;
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

// The CPU computes the output channels [begin, end) on the calling thread; any split gives the same bits.
int modulate_normalized_cpu(const ModulateNormalizedArgs& args, int64_t begin, int64_t end);
int modulate_normalized_backward_cpu(const ModulateNormalizedBackwardArgs& args, int64_t begin, int64_t end);
int modulate_normalized_cuda(const ModulateNormalizedArgs& args, void* stream);
int modulate_normalized_backward_cuda(const ModulateNormalizedBackwardArgs& args, void* stream);

}  // namespace adafm
