// Element types of the CUDA kernels: conversions, and 16-byte accesses of eight elements at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "adafm/types.h"
#include "launch.cuh"

namespace adafm {
namespace cuda {

// The type in which a weight of type weight_t is computed on.
template <class weight_t>
using acc_type = std::conditional_t<std::is_same_v<weight_t, double>, double, float>;

template <class acc_t, class src_t>
__device__ __forceinline__ acc_t load(src_t x) {
  if constexpr (std::is_same_v<src_t, __half>) {
    return static_cast<acc_t>(__half2float(x));
  } else if constexpr (std::is_same_v<src_t, __nv_bfloat16>) {
    return static_cast<acc_t>(__bfloat162float(x));
  } else {
    return static_cast<acc_t>(x);
  }
}

// One rounding, to nearest even.
template <class dst_t, class acc_t>
__device__ __forceinline__ dst_t store(acc_t x) {
  constexpr bool wide = std::is_same_v<acc_t, double>;
  if constexpr (std::is_same_v<dst_t, __half>) {
    if constexpr (wide) {
      return __double2half(x);
    } else {
      return __float2half_rn(x);
    }
  } else if constexpr (std::is_same_v<dst_t, __nv_bfloat16>) {
    if constexpr (wide) {
      return __double2bfloat16(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  } else {
    return static_cast<dst_t>(x);
  }
}

// Elements moved by one thread at a time: 16 bytes of a half type, twice 16 bytes of float32.
constexpr int kVector = 8;

__device__ __forceinline__ void load_vector(const float* source, float (&x)[kVector]) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(source));
  const float4 high = __ldg(reinterpret_cast<const float4*>(source) + 1);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void load_vector(const __half* source, float (&x)[kVector]) {
  const uint4 packed = __ldg(reinterpret_cast<const uint4*>(source));
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[2 * j] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[j] & 0xffffu)));
    x[2 * j + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[j] >> 16)));
  }
}

__device__ __forceinline__ void load_vector(const __nv_bfloat16* source, float (&x)[kVector]) {
  const uint4 packed = __ldg(reinterpret_cast<const uint4*>(source));
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[2 * j] = __uint_as_float(words[j] << 16);
    x[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
  }
}

// Two elements in one word, `low` at the lower address.
template <class dst_t>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<dst_t, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  if constexpr (std::is_same_v<dst_t, __half>) {
    return uint32_t{__half_as_ushort(__float2half_rn(low))} | uint32_t{__half_as_ushort(__float2half_rn(high))} << 16;
  } else {
    return uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(low))} |
           uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(high))} << 16;
  }
#endif
}

// Written in C++ alone, the compiler splits some of these stores into four of 4 bytes. No memory clobber: no kernel
// reads what it has written, and later reads may move up past the store.
__device__ __forceinline__ void store_words(void* target, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(a), "r"(b), "r"(c), "r"(d));
#else
  *static_cast<uint4*>(target) = make_uint4(a, b, c, d);
#endif
}

__device__ __forceinline__ void store_vector(float* target, const float (&x)[kVector]) {
  store_words(target, __float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
  store_words(target + 4, __float_as_uint(x[4]), __float_as_uint(x[5]), __float_as_uint(x[6]), __float_as_uint(x[7]));
}

template <class dst_t>
__device__ __forceinline__ void store_vector(dst_t* target, const float (&x)[kVector]) {
  store_words(target, pack_pair<dst_t>(x[0], x[1]), pack_pair<dst_t>(x[2], x[3]), pack_pair<dst_t>(x[4], x[5]),
              pack_pair<dst_t>(x[6], x[7]));
}

// ---- host side ----

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// With one tap or one input channel both layouts are the same memory order.
inline Layout effective_layout(Layout layout, const Shape& shape) {
  return shape.taps == 1 || shape.in_channels == 1 ? Layout::kContiguous : layout;
}

// Distances between neighbouring filters, pairs and taps of a dense weight, in elements.
struct Strides {
  int64_t filter;
  int64_t pair;
  int64_t tap;
};

inline Strides strides_of(Layout layout, const Shape& shape) {
  const int64_t filter = shape.in_channels * shape.taps;
  return layout == Layout::kContiguous ? Strides{filter, shape.taps, 1} : Strides{filter, 1, shape.in_channels};
}

// Kernels with 32-bit pair and element numbers take weights up to this many elements; larger ones go pair by pair.
constexpr int64_t kIndexLimit = (int64_t{1} << 32) - kThreads * kVector;

// How a weight is divided over threads. Pairs: one each, any layouts. Rows: [O, taps, I], eight neighbouring pairs
// each. Flat: [O, I, taps], eight neighbouring elements each, which belong to at most two pairs.
enum class Path : uint32_t { kPairs = 0, kRows = 1, kFlat = 2 };

// What layouts, size and the alignment of `memory` allow. Types that have no instance go pair by pair all the same.
inline Path path_of(const Shape& shape, Layout from, Layout to, std::initializer_list<const void*> memory) {
  from = effective_layout(from, shape), to = effective_layout(to, shape);
  if (from != to || shape.pairs() * shape.taps >= kIndexLimit ||
      !std::all_of(memory.begin(), memory.end(), is_aligned)) {
    return Path::kPairs;
  }
  if ((from == Layout::kChannelsLast || shape.taps == 1) && shape.in_channels % kVector == 0) {
    return Path::kRows;
  }
  return from == Layout::kContiguous && shape.taps >= kVector ? Path::kFlat : Path::kPairs;
}

// Threads that a path needs.
inline int64_t threads_of(Path path, const Shape& shape) {
  switch (path) {
    case Path::kRows:
      return shape.pairs() / kVector;
    case Path::kFlat:
      return (shape.pairs() * shape.taps + kVector - 1) / kVector;
    default:
      return shape.pairs();
  }
}

}  // namespace cuda
}  // namespace adafm
