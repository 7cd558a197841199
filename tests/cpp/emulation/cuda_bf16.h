#pragma once

#include "../reference.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return static_cast<float>(reference::widen(x.bits, reference::kBFloat));
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {reference::narrow(x, reference::kBFloat)}; }
inline __nv_bfloat16 __double2bfloat16(double x) { return {reference::narrow(x, reference::kBFloat)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
