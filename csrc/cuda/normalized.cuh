// Means and deviations on CUDA, in the order that the CPU has too. Threads work on units: eight neighbouring
// pairs where element types have instances ([O, taps, I], I a multiple of 8), else one pair in any memory order.
#pragma once

#include "access.cuh"
#include "adafm/modulate_normalized.h"
#include "parameter.cuh"

namespace adafm {
namespace cuda {

// Pairs in a unit.
template <class element_t>
constexpr int kWidth = is_typed<element_t> ? kVector : 1;

// Numbers of units: weights of types with instances have fewer than 2^32 elements.
template <class element_t>
using UnitNumber = std::conditional_t<is_typed<element_t>, uint32_t, int64_t>;

template <class element_t, class acc_t, int width>
__device__ __forceinline__ void load_unit(const Source<element_t>& source, int64_t e, acc_t (&x)[width]) {
  if constexpr (is_typed<element_t>) {
    load_vector(source.data + e, x);
  } else {
    x[0] = source.template at<acc_t>(e);
  }
}

template <class element_t, class acc_t, int width>
__device__ __forceinline__ void store_unit(const Target<element_t>& target, int64_t e, const acc_t (&x)[width]) {
  if constexpr (is_typed<element_t>) {
    store_vector(target.data + e, x);
  } else {
    target.put(e, x[0]);
  }
}

template <class acc_t, int width>
__device__ __forceinline__ void load_parameter(const ParameterView<acc_t>& view, int64_t o, int64_t i,
                                               acc_t (&x)[width]) {
  if constexpr (width == 1) {
    x[0] = view.at(o, i);
  } else {
    view.load_row(o, i, x);
  }
}

// dgamma and dbeta are dense in the computing type.
template <class acc_t, int width>
__device__ __forceinline__ void store_sums(acc_t* target, const acc_t (&x)[width]) {
  if constexpr (width == 1) {
    *target = x[0];
  } else {
    store_vector(target, x);
  }
}

// A guarded sample deviation.
template <class acc_t>
struct Deviation {
  acc_t value;
  bool guarded;

  __device__ __forceinline__ Deviation() : value(0), guarded(false) {}
  __device__ __forceinline__ Deviation(acc_t squares, acc_t count, acc_t eps) {
    const acc_t deviation = sqrt(squares / (count - 1));
    guarded = deviation < eps;
    value = guarded ? eps : deviation;
  }
};

// Adds numbers that belong to the pairs of one output channel, in one order whatever the layout: every 64th pair goes
// into one of 64 sums, and the upper half of these is added to the lower until one is left. All threads of a block call
// each function; threads from 64 on only bring numbers.
template <class acc_t, int width>
struct LaneSum {
  static constexpr unsigned kLanes = 64;
  static constexpr int kPairs = kThreads * width;  // that a block brings at a time: a multiple of kLanes

  acc_t (&shared)[kPairs];
  acc_t lane = 0;

  // x are the numbers of the pairs from threadIdx.x * width on, of which the channel has `count`.
  __device__ __forceinline__ void add(const acc_t (&x)[width], int64_t count) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      shared[threadIdx.x * width + j] = x[j];
    }
    __syncthreads();
    if (threadIdx.x < kLanes) {
      for (unsigned i = threadIdx.x; i < kPairs && i < count; i += kLanes) {
        lane += shared[i];
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ acc_t total() {
    if (threadIdx.x < kLanes) {
      shared[threadIdx.x] = lane;
    }
    __syncthreads();
    for (unsigned half = kLanes / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) {
        shared[threadIdx.x] += shared[threadIdx.x + half];
      }
      __syncthreads();
    }
    const acc_t sum = shared[0];
    __syncthreads();
    return sum;
  }
};

template <class acc_t>
struct Statistics {
  acc_t mean;
  Deviation<acc_t> deviation;
};

// Of output channel o, by a whole block.
template <class src_t, class acc_t>
__device__ __forceinline__ Statistics<acc_t> channel_statistics(const Source<src_t>& weight, const Strides& strides,
                                                                int64_t o, int64_t in_channels, int64_t taps, acc_t eps,
                                                                acc_t (&shared)[kThreads * kWidth<src_t>]) {
  constexpr int width = kWidth<src_t>;
  using sum_t = LaneSum<acc_t, width>;
  const acc_t count = static_cast<acc_t>(in_channels * taps);
  const int64_t base = o * strides.filter + int64_t{threadIdx.x} * width * strides.pair;
  sum_t sums{shared};
  for (int64_t first = 0; first < in_channels; first += sum_t::kPairs) {
    acc_t sum[width] = {};
    if (first + threadIdx.x * width < in_channels) {
#pragma unroll width> 1 ? 3 : 1
      for (int64_t t = 0; t < taps; ++t) {
        acc_t x[width];
        load_unit(weight, base + first * strides.pair + t * strides.tap, x);
#pragma unroll
        for (int j = 0; j < width; ++j) {
          sum[j] += x[j];
        }
      }
    }
    sums.add(sum, in_channels - first);
  }
  const acc_t mean = sums.total() / count;
  sum_t squares{shared};
  for (int64_t first = 0; first < in_channels; first += sum_t::kPairs) {
    acc_t sum[width] = {};
    if (first + threadIdx.x * width < in_channels) {
#pragma unroll width> 1 ? 3 : 1
      for (int64_t t = 0; t < taps; ++t) {
        acc_t x[width];
        load_unit(weight, base + first * strides.pair + t * strides.tap, x);
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const acc_t d = x[j] - mean;
          sum[j] = fma(d, d, sum[j]);
        }
      }
    }
    squares.add(sum, in_channels - first);
  }
  return {mean, Deviation<acc_t>(squares.total(), count, eps)};
}

// ---- host side ----

// Strides of a dense weight. Units of eight pairs stand for [O, taps, I], also where there is one tap.
template <class element_t>
Strides rows_or_strides(Layout layout, const Shape& shape) {
  return strides_of(is_typed<element_t> ? Layout::kChannelsLast : effective_layout(layout, shape), shape);
}

}  // namespace cuda
}  // namespace adafm
