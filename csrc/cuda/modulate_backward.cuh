// dW = gamma * G, dgamma = sum_k G * W, dbeta = sum_k G: what one thread or block does, for each memory order. Every
// pair is summed by one thread, tap after tap: no atomics, one order, the same bits each time and the same as on the
// CPU.
#pragma once

#include "access.cuh"
#include "adafm/modulate_backward.h"
#include "parameter.cuh"

namespace adafm {
namespace cuda {

// Null outputs are not computed.
template <class grad_t, class weight_t>
struct BackwardProblem {
  using acc_t = computing_type<weight_t>;
  Source<grad_t> grad;
  Source<weight_t> weight;
  ParameterView<acc_t> gamma;
  Target<weight_t> grad_weight;
  acc_t* grad_gamma;
  acc_t* grad_beta;
  int64_t pairs;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
};

// One pair that begins at element `from` of the gradient and `to` of the weight, its taps so many elements apart.
template <class acc_t, class grad_t, class weight_t>
__device__ __forceinline__ void backward_pair(const Source<grad_t>& grads, const Source<weight_t>& weights,
                                              const Target<weight_t>& grad_weight, acc_t* grad_gamma, acc_t* grad_beta,
                                              acc_t gamma, int64_t from, int64_t from_step, int64_t to, int64_t to_step,
                                              int64_t taps) {
  acc_t sum_gamma = 0, sum_beta = 0;
#pragma unroll is_typed < weight_t> ? 4 : 1
  for (int64_t t = 0; t < taps; ++t) {
    const acc_t grad = grads.template at<acc_t>(from + t * from_step);
    if (grad_gamma != nullptr) {
      sum_gamma = fma(grad, weights.template at<acc_t>(to + t * to_step), sum_gamma);
    }
    sum_beta += grad;
    if (grad_weight.data != nullptr) {
      grad_weight.put(to + t * to_step, gamma * grad);
    }
  }
  if (grad_gamma != nullptr) {
    *grad_gamma = sum_gamma;
  }
  if (grad_beta != nullptr) {
    *grad_beta = sum_beta;
  }
}

// A null pointer stays one.
template <class acc_t>
__device__ __forceinline__ acc_t* at_or_null(acc_t* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}

// Any memory orders, any alignment: one pair.
template <class grad_t, class weight_t>
__device__ __forceinline__ void modulate_backward_pair(const BackwardProblem<grad_t, weight_t>& p, int64_t pair) {
  using acc_t = computing_type<weight_t>;
  const int64_t o = pair / p.in_channels;
  const int64_t i = pair - o * p.in_channels;
  const acc_t gamma = p.grad_weight.data != nullptr ? p.gamma.at(o, i) : acc_t(0);
  backward_pair(p.grad, p.weight, p.grad_weight, at_or_null(p.grad_gamma, pair), at_or_null(p.grad_beta, pair), gamma,
                o * p.from.filter + i * p.from.pair, p.from.tap, o * p.to.filter + i * p.to.pair, p.to.tap, p.taps);
}

// kTaps taps of eight neighbouring pairs go into the sums; all are read before the first is used.
template <int kTaps, class grad_t, class weight_t>
__device__ __forceinline__ void sum_batch(const grad_t* g, const weight_t* w, int64_t step, float (&sum_gamma)[kVector],
                                          float (&sum_beta)[kVector]) {
  float grad[kTaps][kVector], weight[kTaps][kVector];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    load_vector(g + t * step, grad[t]);
    load_vector(w + t * step, weight[t]);
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      sum_gamma[j] = fmaf(grad[t][j], weight[t][j], sum_gamma[j]);
      sum_beta[j] += grad[t][j];
    }
  }
}

// Both sums over all taps of eight neighbouring pairs, `step` elements apart.
template <class grad_t, class weight_t>
__device__ __forceinline__ void sum_vector(const grad_t* g, const weight_t* w, uint32_t taps, int64_t step,
                                           float (&sum_gamma)[kVector], float (&sum_beta)[kVector]) {
  constexpr uint32_t kBatch = sizeof(grad_t) + sizeof(weight_t) == 8 ? 2 : 3;  // as many as 80 registers hold
  uint32_t t = 0;
#pragma unroll 1
  for (; t + kBatch <= taps; t += kBatch, g += kBatch * step, w += kBatch * step) {
    sum_batch<kBatch>(g, w, step, sum_gamma, sum_beta);
  }
#pragma unroll 1
  for (; t < taps; ++t, g += step, w += step) {
    sum_batch<1>(g, w, step, sum_gamma, sum_beta);
  }
}

// The same where dW is asked for, or only some of the rest: kTaps taps.
template <int kTaps, class grad_t, class weight_t>
__device__ __forceinline__ void backward_batch(const grad_t* g, const weight_t* w, weight_t* grad_weight,
                                               bool need_gamma, int64_t step, const float (&gamma)[kVector],
                                               float (&sum_gamma)[kVector], float (&sum_beta)[kVector]) {
  float grad[kTaps][kVector];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    load_vector(g + t * step, grad[t]);
  }
  if (need_gamma) {
    float weight[kTaps][kVector];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      load_vector(w + t * step, weight[t]);
    }
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        sum_gamma[j] = fmaf(grad[t][j], weight[t][j], sum_gamma[j]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      sum_beta[j] += grad[t][j];
      grad[t][j] *= gamma[j];
    }
    if (grad_weight != nullptr) {
      store_vector(grad_weight + t * step, grad[t]);
    }
  }
}

// Whatever is asked for of eight neighbouring pairs: gradient, weight and dW begin at the given addresses, dgamma and
// dbeta are null or the addresses of eight results. `load_gamma` is called where dW is asked for.
template <class grad_t, class weight_t, class load_t>
__device__ __forceinline__ void backward_vector(const grad_t* g, const weight_t* w, weight_t* grad_weight,
                                                float* grad_gamma, float* grad_beta, uint32_t taps, int64_t step,
                                                load_t&& load_gamma) {
  float sum_gamma[kVector] = {}, sum_beta[kVector] = {};
  if (grad_weight == nullptr && grad_gamma != nullptr) {
    sum_vector(g, w, taps, step, sum_gamma, sum_beta);
  } else {
    float gamma[kVector] = {};
    if (grad_weight != nullptr) {
      load_gamma(gamma);
    }
    constexpr uint32_t kBatch = 2;
    uint32_t t = 0;
#pragma unroll 1
    for (; t + kBatch <= taps; t += kBatch, g += kBatch * step, w += kBatch * step) {
      backward_batch<kBatch>(g, w, grad_weight, grad_gamma != nullptr, step, gamma, sum_gamma, sum_beta);
      grad_weight = at_or_null(grad_weight, kBatch * step);
    }
    if (t < taps) {
      backward_batch<1>(g, w, grad_weight, grad_gamma != nullptr, step, gamma, sum_gamma, sum_beta);
    }
  }
  if (grad_gamma != nullptr) {
    store_vector(grad_gamma, sum_gamma);
  }
  if (grad_beta != nullptr) {
    store_vector(grad_beta, sum_beta);
  }
}

// [O, taps, I], I a multiple of 8: the eight neighbouring pairs of one vector.
template <class grad_t, class weight_t>
__device__ __forceinline__ void modulate_backward_rows(const BackwardProblem<grad_t, weight_t>& p, uint32_t vector) {
  const uint32_t row = static_cast<uint32_t>(p.in_channels / kVector);
  if (vector >= static_cast<uint32_t>(p.pairs / kVector)) {
    return;
  }
  const uint32_t o = vector / row;
  const uint32_t i = (vector - o * row) * kVector;
  const int64_t base = int64_t{o} * p.from.filter + i;
  const int64_t pair = int64_t{vector} * kVector;
  backward_vector(p.grad.data + base, p.weight.data + base, at_or_null(p.grad_weight.data, base),
                  at_or_null(p.grad_gamma, pair), at_or_null(p.grad_beta, pair), static_cast<uint32_t>(p.taps),
                  p.in_channels, [&](float (&gamma)[kVector]) { p.gamma.load_row(o, i, gamma); });
}

// [O, I, kTaps]: kThreads pairs by one block. Their elements are read side by side, eight at a time, and put into
// shared memory, from which one thread sums one pair. Rows of shared memory have odd length, so that the threads of a
// warp read from different banks.
template <int kTaps, class grad_t, class weight_t>
__device__ __forceinline__ void modulate_backward_flat(const BackwardProblem<grad_t, weight_t>& p, uint32_t block) {
  constexpr uint32_t kRow = kTaps | 1;
  constexpr uint32_t kElements = kThreads * kTaps;
  __shared__ float grads[kThreads * kRow], weights[kThreads * kRow];
  const uint32_t in_channels = static_cast<uint32_t>(p.in_channels);
  const uint32_t first_pair = block * kThreads;
  const uint32_t count = min(static_cast<uint32_t>(p.pairs) - first_pair, static_cast<uint32_t>(kThreads));
  const int64_t base = int64_t{first_pair} * kTaps;
  const auto slot = [](uint32_t element) { return element / kTaps * kRow + element % kTaps; };

#pragma unroll
  for (uint32_t begin = 0; begin < kElements; begin += kThreads * kVector) {
    const uint32_t first = begin + threadIdx.x * kVector;
    if (first + kVector <= count * kTaps) {
      float grad[kVector], weight[kVector];
      load_vector(p.grad.data + base + first, grad);
      if (p.grad_gamma != nullptr) {
        load_vector(p.weight.data + base + first, weight);
      }
#pragma unroll
      for (uint32_t j = 0; j < kVector; ++j) {
        grads[slot(first + j)] = grad[j];
      }
      if (p.grad_gamma != nullptr) {
#pragma unroll
        for (uint32_t j = 0; j < kVector; ++j) {
          weights[slot(first + j)] = weight[j];
        }
      }
      if (p.grad_weight.data != nullptr) {
        const uint32_t pair = first / kTaps;
        const uint32_t left = kTaps - first % kTaps;  // elements that belong to `pair`
        const float gamma = p.gamma.at_pair(first_pair + pair, in_channels);
        const float next = p.gamma.at_pair(first_pair + min(pair + 1, count - 1), in_channels);
#pragma unroll
        for (uint32_t j = 0; j < kVector; ++j) {
          grad[j] *= j < left ? gamma : next;
        }
        store_vector(p.grad_weight.data + base + first, grad);
      }
    } else {
      for (uint32_t element = first; element < count * kTaps; ++element) {
        const float grad = load<float>(__ldg(p.grad.data + base + element));
        grads[slot(element)] = grad;
        if (p.grad_gamma != nullptr) {
          weights[slot(element)] = load<float>(__ldg(p.weight.data + base + element));
        }
        if (p.grad_weight.data != nullptr) {
          p.grad_weight.data[base + element] =
              store<weight_t>(p.gamma.at_pair(first_pair + element / kTaps, in_channels) * grad);
        }
      }
    }
  }
  __syncthreads();

  if (threadIdx.x >= count || (p.grad_gamma == nullptr && p.grad_beta == nullptr)) {
    return;
  }
  float sum_gamma = 0, sum_beta = 0;
#pragma unroll
  for (uint32_t t = 0; t < kTaps; ++t) {
    const float grad = grads[threadIdx.x * kRow + t];
    sum_beta += grad;
    if (p.grad_gamma != nullptr) {
      sum_gamma = fmaf(grad, weights[threadIdx.x * kRow + t], sum_gamma);
    }
  }
  if (p.grad_gamma != nullptr) {
    p.grad_gamma[first_pair + threadIdx.x] = sum_gamma;
  }
  if (p.grad_beta != nullptr) {
    p.grad_beta[first_pair + threadIdx.x] = sum_beta;
  }
}

// ---- host side ----

// The flat way exists for kTaps of 9 and 16, and its threads take a pair each.
inline Path path_of(const ModulateBackwardArgs& args) {
  const Path path = path_of(args.shape, args.grad_layout, args.weight_layout,
                            {args.grad, args.weight, args.grad_weight, args.grad_gamma, args.grad_beta});
  return path == Path::kFlat && args.shape.taps != 9 && args.shape.taps != 16 ? Path::kPairs : path;
}

inline int64_t backward_threads(Path path, const Shape& shape) {
  return path == Path::kRows ? shape.pairs() / kVector : shape.pairs();
}

}  // namespace cuda
}  // namespace adafm
