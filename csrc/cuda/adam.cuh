// One step of Adam on neighbouring elements, in registers.
#pragma once

#include "element.cuh"

namespace adafm {
namespace cuda {

// `rest1` is 1 - beta1; the corrections are 1 / (1 - beta^t).
template <class acc_t>
struct AdamNumbers {
  acc_t rate, beta1, rest1, beta2, rest2, eps, correction1, correction2;
};

template <class acc_t>
__device__ __forceinline__ void adam(const AdamNumbers<acc_t>& n, acc_t g, acc_t& p, acc_t& m, acc_t& v) {
  m = fma(n.beta1, m, n.rest1 * g);
  v = fma(n.beta2, v, n.rest2 * g * g);
  p -= n.rate * (m * n.correction1) / (sqrt(v * n.correction2) + n.eps);
}

// Buffers that the kernel writes: never through __ldg.
__device__ __forceinline__ void read_vector(const float* source, float (&x)[kVector]) {
  const float4 low = reinterpret_cast<const float4*>(source)[0];
  const float4 high = reinterpret_cast<const float4*>(source)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void read_vector(const double* source, double (&x)[1]) { x[0] = source[0]; }
__device__ __forceinline__ void read_vector(const float* source, float (&x)[1]) { x[0] = source[0]; }
__device__ __forceinline__ void write_vector(float* target, const float (&x)[kVector]) { store_vector(target, x); }
__device__ __forceinline__ void write_vector(double* target, const double (&x)[1]) { target[0] = x[0]; }
__device__ __forceinline__ void write_vector(float* target, const float (&x)[1]) { target[0] = x[0]; }

}  // namespace cuda
}  // namespace adafm
