// W'[n] = gamma[n] * W + beta[n] for N sets of gamma and beta; the weight is read once.
#pragma once

#include "adafm/types.h"

namespace adafm {

// gamma and beta of all sets: [N, O, I] with any strides.
struct SampleParameter {
  const void* data;
  int64_t stride_n;
  int64_t stride_o;
  int64_t stride_i;
};

// `out` is [N] weights, each dense in `out_layout`, one behind the other.
struct ModulatePerSampleArgs {
  int64_t samples;
  Shape shape;
  const void* weight;
  DType weight_type;
  Layout weight_layout;
  SampleParameter gamma;
  SampleParameter beta;
  void* out;
  DType out_type;
  Layout out_layout;
};

// dW = sum_n gamma[n] * G[n] (in the order of n), dgamma[n] = sum_k G[n] * W, dbeta[n] = sum_k G[n]. dW lies as the
// weight does, dgamma and dbeta are dense [N, O, I]; null outputs are not computed.
struct ModulatePerSampleBackwardArgs {
  int64_t samples;
  Shape shape;
  const void* grad;
  DType grad_type;
  Layout grad_layout;
  const void* weight;
  DType weight_type;
  Layout weight_layout;
  SampleParameter gamma;
  void* grad_weight;
  void* grad_gamma;
  void* grad_beta;
};

// The CPU computes the (o, i) pairs [begin, end) of all samples on the calling thread; any split gives the same bits.
int modulate_per_sample_cpu(const ModulatePerSampleArgs& args, int64_t begin, int64_t end);
int modulate_per_sample_backward_cpu(const ModulatePerSampleBackwardArgs& args, int64_t begin, int64_t end);
int modulate_per_sample_cuda(const ModulatePerSampleArgs& args, void* stream);
int modulate_per_sample_backward_cuda(const ModulatePerSampleBackwardArgs& args, void* stream);

}  // namespace adafm
