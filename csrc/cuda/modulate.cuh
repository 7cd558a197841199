// W' = gamma * W + beta: what one thread does, for each memory order. Shared by modulate.cu and modulate_many.cu.
#pragma once

#include "access.cuh"
#include "adafm/modulate.h"
#include "parameter.cuh"

namespace adafm {
namespace cuda {

template <class src_t, class dst_t>
struct Problem {
  using acc_t = computing_type<src_t>;
  Source<src_t> weight;
  Target<dst_t> out;
  ParameterView<acc_t> gamma;
  ParameterView<acc_t> beta;
  int64_t pairs;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
};

// All taps of one pair that begins at element `from` of the weight and `to` of the result, so many elements apart.
template <class src_t, class dst_t, class acc_t>
__device__ __forceinline__ void modulate_taps(const Source<src_t>& weight, const Target<dst_t>& out, acc_t gamma,
                                              acc_t beta, int64_t from, int64_t from_step, int64_t to, int64_t to_step,
                                              int64_t taps) {
#pragma unroll is_typed < src_t> ? 4 : 1
  for (int64_t t = 0; t < taps; ++t) {
    out.put(to + t * to_step, fma(gamma, weight.template at<acc_t>(from + t * from_step), beta));
  }
}

// Any memory orders, any alignment: one pair.
template <class src_t, class dst_t>
__device__ __forceinline__ void modulate_pair(const Problem<src_t, dst_t>& p, int64_t pair) {
  const int64_t o = pair / p.in_channels;
  const int64_t i = pair - o * p.in_channels;
  modulate_taps(p.weight, p.out, p.gamma.at(o, i), p.beta.at(o, i), o * p.from.filter + i * p.from.pair, p.from.tap,
                o * p.to.filter + i * p.to.pair, p.to.tap, p.taps);
}

// kTaps taps of eight neighbouring pairs; all are read before the first is written, to have more reads under way.
template <int kTaps, class src_t, class dst_t>
__device__ __forceinline__ void modulate_batch(const src_t* x, dst_t* y, int64_t step, const float (&gamma)[kVector],
                                               const float (&beta)[kVector]) {
  float values[kTaps][kVector];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    load_vector(x + t * step, values[t]);
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      values[t][j] = fmaf(gamma[j], values[t][j], beta[j]);
    }
    store_vector(y + t * step, values[t]);
  }
}

// All taps of eight neighbouring pairs, `step` elements apart.
template <class src_t, class dst_t>
__device__ __forceinline__ void modulate_vector(const src_t* x, dst_t* y, uint32_t taps, int64_t step,
                                                const float (&gamma)[kVector], const float (&beta)[kVector]) {
  constexpr uint32_t kBatch = 4;
  if (taps == 9) {
    modulate_batch<9>(x, y, step, gamma, beta);
    return;
  }
  uint32_t t = 0;
  for (; t + kBatch <= taps; t += kBatch, x += kBatch * step, y += kBatch * step) {
    modulate_batch<kBatch>(x, y, step, gamma, beta);
  }
  for (; t < taps; ++t, x += step, y += step) {
    modulate_batch<1>(x, y, step, gamma, beta);
  }
}

// [O, taps, I] -> [O, taps, I], I a multiple of 8: the eight neighbouring pairs of one vector.
template <class src_t, class dst_t>
__device__ __forceinline__ void modulate_rows(const Problem<src_t, dst_t>& p, uint32_t vector) {
  const uint32_t row = static_cast<uint32_t>(p.in_channels / kVector);
  if (vector >= static_cast<uint32_t>(p.pairs / kVector)) {
    return;
  }
  const uint32_t o = vector / row;
  const uint32_t i = (vector - o * row) * kVector;
  float gamma[kVector], beta[kVector];
  p.gamma.load_row(o, i, gamma);
  p.beta.load_row(o, i, beta);
  const int64_t base = int64_t{o} * p.from.filter + i;
  modulate_vector(p.weight.data + base, p.out.data + base, static_cast<uint32_t>(p.taps), p.in_channels, gamma, beta);
}

// [O, I, taps] -> [O, I, taps], taps >= 8: the eight elements from `first` on, which belong to at most two pairs; the
// last ones may be fewer. kTaps is taps, or 0 for any number.
template <int kTaps, class src_t, class dst_t>
__device__ __forceinline__ void modulate_flat(const Problem<src_t, dst_t>& p, uint32_t first) {
  const uint32_t taps = kTaps ? kTaps : static_cast<uint32_t>(p.taps);
  const uint32_t in_channels = static_cast<uint32_t>(p.in_channels);
  const uint32_t pairs = static_cast<uint32_t>(p.pairs);
  if (first >= pairs * taps) {
    return;
  }
  const uint32_t pair = first / taps;
  const uint32_t next_pair = pair + 1 < pairs ? pair + 1 : pair;
  const uint32_t left = taps - (first - pair * taps);  // elements that belong to `pair`
  const float gamma = p.gamma.at_pair(pair, in_channels), next_gamma = p.gamma.at_pair(next_pair, in_channels);
  const float beta = p.beta.at_pair(pair, in_channels), next_beta = p.beta.at_pair(next_pair, in_channels);
  const src_t* x = p.weight.data + first;
  dst_t* y = p.out.data + first;
  const uint32_t count = pairs * taps - first;
  if (count < kVector) {
    for (uint32_t j = 0; j < count; ++j) {
      y[j] = store<dst_t>(fmaf(j < left ? gamma : next_gamma, load<float>(__ldg(x + j)), j < left ? beta : next_beta));
    }
    return;
  }
  float values[kVector];
  load_vector(x, values);
#pragma unroll
  for (uint32_t j = 0; j < kVector; ++j) {
    values[j] = fmaf(j < left ? gamma : next_gamma, values[j], j < left ? beta : next_beta);
  }
  store_vector(y, values);
}

}  // namespace cuda
}  // namespace adafm
