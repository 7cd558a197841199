// gamma and beta inside a kernel: [O, I] with any strides.
#pragma once

#include "element.cuh"

namespace adafm {
namespace cuda {

template <class acc_t>
struct ParameterView {
  const acc_t* data;
  int64_t stride_o;
  int64_t stride_i;
  bool dense;   // [O, I] contiguous: indexed by the pair number
  bool vector;  // eight values of a row that begin at a multiple of eight can be read as 16-byte words

  __device__ __forceinline__ acc_t at(int64_t o, int64_t i) const { return __ldg(data + o * stride_o + i * stride_i); }

  __device__ __forceinline__ acc_t at_pair(uint32_t pair, uint32_t in_channels) const {
    if (dense) {
      return __ldg(data + pair);
    }
    const uint32_t o = pair / in_channels;
    return at(o, pair - o * in_channels);
  }

  // Values of pairs (o, i) to (o, i + 7).
  __device__ __forceinline__ void load_row(int64_t o, int64_t i, acc_t (&x)[kVector]) const {
    if (vector) {
      load_vector(data + o * stride_o + i, x);
      return;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      x[j] = at(o, i + j);
    }
  }
};

template <class acc_t>
ParameterView<acc_t> view_of(const Parameter& parameter, const Shape& shape) {
  const bool unit = parameter.stride_i == 1 || shape.in_channels == 1;
  const bool dense = unit && (parameter.stride_o == shape.in_channels || shape.out_channels == 1);
  const bool vector = parameter.stride_i == 1 && parameter.stride_o % 4 == 0 && is_aligned(parameter.data);
  return {static_cast<const acc_t*>(parameter.data), parameter.stride_o, parameter.stride_i, dense, vector};
}

}  // namespace cuda
}  // namespace adafm
