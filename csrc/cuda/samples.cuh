// gamma and beta of many samples inside a kernel, and how samples are divided over blocks.
#pragma once

#include <algorithm>

#include "adafm/modulate_per_sample.h"
#include "parameter.cuh"

namespace adafm {
namespace cuda {

template <class acc_t>
struct SampleView {
  const acc_t* data;
  int64_t stride_n;
  int64_t stride_o;
  int64_t stride_i;
  bool vector;  // as in ParameterView, for every sample

  __device__ __forceinline__ acc_t at(int64_t n, int64_t o, int64_t i) const {
    return __ldg(data + n * stride_n + o * stride_o + i * stride_i);
  }

  // Values of sample n, pairs (o, i) to (o, i + 7).
  __device__ __forceinline__ void load_row(int64_t n, int64_t o, int64_t i, acc_t (&x)[kVector]) const {
    const acc_t* row = data + n * stride_n + o * stride_o;
    if (vector) {
      load_vector(row + i, x);
      return;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      x[j] = __ldg(row + (i + j) * stride_i);
    }
  }
};

template <class acc_t>
SampleView<acc_t> view_of(const SampleParameter& parameter) {
  const bool vector = parameter.stride_i == 1 && parameter.stride_o % 4 == 0 && parameter.stride_n % 4 == 0 &&
                      is_aligned(parameter.data);
  return {static_cast<const acc_t*>(parameter.data), parameter.stride_n, parameter.stride_o, parameter.stride_i,
          vector};
}

// Blocks for one weight, and the number of groups that its samples are divided into, a block for each of both: a small
// weight alone would not fill a GPU. Few groups, as each reads the weight again.
struct SampleBlocks {
  unsigned weight;
  unsigned groups;

  SampleBlocks(int64_t threads, int64_t samples) : weight(blocks_for(threads)) {
    constexpr int64_t kWanted = 1024;
    groups = static_cast<unsigned>(std::clamp<int64_t>(kWanted / weight, 1, std::max<int64_t>(samples, 1)));
  }
};

}  // namespace cuda
}  // namespace adafm
