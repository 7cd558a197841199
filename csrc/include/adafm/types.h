// Types shared by every kernel: no torch and no CUDA header, so that a plain C++ program can use the kernels.
#pragma once

#include <cstdint>

namespace adafm {

// Element types of weights, gradients and results.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// Memory order of a weight [O, I, *K], taps = product of K.
enum class Layout : int {
  kContiguous = 0,    // [O, I, taps], torch's contiguous order
  kChannelsLast = 1,  // [O, taps, I], torch's channels-last order
};

// Launch results: 0 is success; positive values are cudaError_t; these negatives are ours.
enum Error : int { kOk = 0, kUnsupportedDType = -1 };

// Logical size of a weight.
struct Shape {
  int64_t out_channels;  // O
  int64_t in_channels;   // I
  int64_t taps;          // product of the kernel dimensions, 1 for a Linear weight

  int64_t pairs() const { return out_channels * in_channels; }
};

// A parameter (gamma or beta) seen as [O, I] with any strides, counted in elements; 0 repeats a row or a column.
// Its type is float for every weight but float64, where it is double.
struct Parameter {
  const void* data;
  int64_t stride_o;
  int64_t stride_i;
};

// The type in which a weight of type `weight` is computed on, and the type of its gamma and beta.
constexpr DType compute_type(DType weight) { return weight == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace adafm
