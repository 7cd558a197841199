// Vectors of float32 for the inner loops, at the instruction levels that clones.h knows. A loop is written once, in a
// header without a guard that is included once for each level:
//
//   #if ADAFM_HAS_V4
//   ADAFM_BEGIN_V4
//   #include "loops.h"
//   ADAFM_END_V4
//   #endif
//
// and finds vec, kWidth, read, write, ... of its level there. Functions between the marks are compiled for the level
// (lambdas are not: avoid them) and may be called where vector_level() allows it. Not-a-number becomes the canonical
// one when it is narrowed, as in element.h: the bits are those of the plain loops.
#pragma once

#include "clones.h"
#include "element.h"

#if ADAFM_HAS_CLONES
#define ADAFM_HAS_V4 1
#define ADAFM_HAS_V3 1
#define ADAFM_BEGIN_V4        \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2\")") namespace v4 {
#define ADAFM_BEGIN_V3 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,bmi,bmi2\")") namespace v3 {
#define ADAFM_END_V4 \
  }                  \
  _Pragma("GCC pop_options")
#define ADAFM_END_V3 ADAFM_END_V4
#else
// One level at most: the one that the compiler was told to build for.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ADAFM_HAS_V4 1
#else
#define ADAFM_HAS_V4 0
#endif
#if !ADAFM_HAS_V4 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ADAFM_HAS_V3 1
#else
#define ADAFM_HAS_V3 0
#endif
#define ADAFM_BEGIN_V4 namespace v4 {
#define ADAFM_BEGIN_V3 namespace v3 {
#define ADAFM_END_V4 }
#define ADAFM_END_V3 }
#endif

#if ADAFM_HAS_V4 || ADAFM_HAS_V3
// gcc warns of the registers that its own header leaves undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace adafm {
namespace cpu {

enum class Level { kPlain, kV3, kV4 };

// The best level that was compiled and that this machine has.
inline Level vector_level() {
#if ADAFM_HAS_CLONES
  static const Level level = (__builtin_cpu_init(), __builtin_cpu_supports("x86-64-v4")) ? Level::kV4
                             : __builtin_cpu_supports("x86-64-v3")                       ? Level::kV3
                                                                                         : Level::kPlain;
  return level;
#else
  return ADAFM_HAS_V4 ? Level::kV4 : ADAFM_HAS_V3 ? Level::kV3 : Level::kPlain;
#endif
}

// Whether the processor has AVX512-BF16, which rounds two vectors to bfloat16 in one instruction.
#if ADAFM_HAS_V4 && defined(__GNUC__)
static const bool kRoundsToBfloat16 = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16") != 0);
#elif ADAFM_HAS_V4
constexpr bool kRoundsToBfloat16 = false;
#endif

#if ADAFM_HAS_V4 || ADAFM_HAS_V3
// Four elements of a 16-bit type, in the low half.
template <class half_t>
ADAFM_INLINE __m128i read_quad(const half_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
// The low four at p, the high four at p + step.
template <class half_t>
ADAFM_INLINE void write_quads(half_t* p, int64_t step, __m128i x) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), x);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + step), _mm_unpackhi_epi64(x, x));
}
#endif

#if ADAFM_HAS_V4
ADAFM_BEGIN_V4
#include "simd_v4.h"
ADAFM_END_V4
#endif
#if ADAFM_HAS_V3
ADAFM_BEGIN_V3
#include "simd_v3.h"
ADAFM_END_V3
#endif

}  // namespace cpu
}  // namespace adafm
