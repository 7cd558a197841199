// Element types of the CPU kernels and their conversions. Integer arithmetic only where rounding matters: the results
// do not depend on the machine, on flush-to-zero settings or on the vector width, and every loop vectorises.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "adafm/types.h"
#include "clones.h"

namespace adafm {

// Bit patterns. Enumerations and not structures, since gcc vectorises loads and stores of scalars only.
enum class float16 : uint16_t {};
enum class bfloat16 : uint16_t {};

// The type in which a weight of type weight_t is computed on.
template <class weight_t>
using acc_type = std::conditional_t<std::is_same_v<weight_t, double>, double, float>;

ADAFM_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}

ADAFM_INLINE float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

// condition ? yes : no without a branch, which the vectoriser would otherwise meet in large functions.
ADAFM_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - uint32_t(condition);
  return (yes & mask) | (no & ~mask);
}

ADAFM_INLINE float to_float(bfloat16 x) { return bits_float(uint32_t(x) << 16); }

ADAFM_INLINE float to_float(float16 x) {
  const uint32_t sign = (uint32_t(x) & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t(x) & 0x7fffu) << 13;  // exponent and fraction at float32's places
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude | 0x7f800000u;
  // A subnormal is fraction * 2^-24: put the fraction behind 2^-14 and take 2^-14 away, which is exact.
  const uint32_t subnormal = float_bits(bits_float(magnitude | 0x38800000u) - 0x1p-14f);
  const uint32_t finite = select(magnitude < 0x00800000u, subnormal, normal);
  return bits_float(sign | select(magnitude >= 0x0f800000u, special, finite));
}

ADAFM_INLINE bfloat16 to_bfloat16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = ((u >> 16) & 0x8000u) | 0x7fc0u;
  return bfloat16(uint16_t(select((u & 0x7fffffffu) > 0x7f800000u, nan, rounded)));
}

ADAFM_INLINE float16 to_float16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t normal = select(magnitude >= 0x47800000u, 0x7c00u, rounded);
  // Below 2^-14, adding 0.5 leaves the float16 fraction, rounded to nearest even, in the low bits.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = select(magnitude < 0x38800000u, subnormal, normal);
  return float16(uint16_t(sign | select(magnitude > 0x7f800000u, 0x7e00u, finite)));
}

// Rounds to odd: a second rounding, to a type at least two bits narrower, then gives what one rounding would give.
ADAFM_INLINE float to_float_odd(double x) {
  const double magnitude = std::fabs(x);
  const float nearest = static_cast<float>(magnitude);
  const double back = static_cast<double>(nearest);
  uint32_t u = float_bits(nearest);
  const bool even = (u & 1u) == 0u;
  u += even && back < magnitude ? 1u : 0u;
  u -= even && back > magnitude ? 1u : 0u;
  return bits_float(u | (std::signbit(x) ? 0x80000000u : 0u));
}

template <class acc_t, class src_t>
ADAFM_INLINE acc_t load(src_t x) {
  if constexpr (std::is_arithmetic_v<src_t>) {
    return static_cast<acc_t>(x);
  } else {
    return static_cast<acc_t>(to_float(x));
  }
}

template <class dst_t, class acc_t>
ADAFM_INLINE dst_t store(acc_t x) {
  if constexpr (std::is_arithmetic_v<dst_t>) {
    return static_cast<dst_t>(x);
  } else {
    float narrow;
    if constexpr (std::is_same_v<acc_t, double>) {
      narrow = to_float_odd(x);
    } else {
      narrow = x;
    }
    if constexpr (std::is_same_v<dst_t, float16>) {
      return to_float16(narrow);
    } else {
      return to_bfloat16(narrow);
    }
  }
}

// Calls fn with a value of the element type that `type` names.
template <class fn_t>
int with_type(DType type, fn_t&& fn) {
  switch (type) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kFloat64:
      return fn(double{});
    case DType::kFloat16:
      return fn(float16{});
    case DType::kBFloat16:
      return fn(bfloat16{});
  }
  return kUnsupportedDType;
}

}  // namespace adafm
