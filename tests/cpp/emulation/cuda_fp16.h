#pragma once

#include "../reference.h"

struct __half {
  unsigned short bits;
};

inline float __half2float(__half x) { return static_cast<float>(reference::widen(x.bits, reference::kHalf)); }
inline __half __float2half_rn(float x) { return {reference::narrow(x, reference::kHalf)}; }
inline __half __double2half(double x) { return {reference::narrow(x, reference::kHalf)}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
