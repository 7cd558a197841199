// Sixteen float32 lanes in an AVX-512 register. Included by simd.h between the marks of its level.

using vec = __m512;
constexpr int64_t kWidth = 16;

ADAFM_INLINE vec broadcast(float x) { return _mm512_set1_ps(x); }
ADAFM_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
ADAFM_INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
ADAFM_INLINE vec multiply(vec a, vec b) { return _mm512_mul_ps(a, b); }

// The lanes of `x` that `index` names.
using lane_index = __m512i;
ADAFM_INLINE lane_index read_index(const int32_t* p) { return _mm512_loadu_si512(p); }
ADAFM_INLINE vec permute(vec x, lane_index index) { return _mm512_permutexvar_ps(index, x); }

ADAFM_INLINE vec widen(__m256i x, bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
ADAFM_INLINE vec widen(__m256i x, float16) { return _mm512_cvtph_ps(x); }

ADAFM_INLINE __m256i narrow(vec x, bfloat16) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i sign = _mm512_and_si512(u, _mm512_set1_epi32(int32_t(0x80000000u)));
  const __m512i nan = _mm512_or_si512(sign, _mm512_set1_epi32(0x7fc00000));
  const __m512i bits = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
ADAFM_INLINE __m256i narrow(vec x, float16) {
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int32_t(0x80000000u)));
  const __m512i nan = _mm512_or_si512(sign, _mm512_set1_epi32(0x7fc00000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtps_ph(_mm512_mask_mov_ps(x, is_nan, _mm512_castsi512_ps(nan)), _MM_FROUND_TO_NEAREST_INT);
}

ADAFM_INLINE vec read(const float* p) { return _mm512_loadu_ps(p); }
template <class half_t>
ADAFM_INLINE vec read(const half_t* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), half_t{});
}

ADAFM_INLINE void write(float* p, vec x) { _mm512_storeu_ps(p, x); }
template <class half_t>
ADAFM_INLINE void write(half_t* p, vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, half_t{}));
}

// The first `count` lanes, 1 to kWidth; the others are zero or are not written.
ADAFM_INLINE vec read_part(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16(0xffffu >> (16 - count)), p);
}
template <class half_t>
ADAFM_INLINE vec read_part(const half_t* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(__mmask16(0xffffu >> (16 - count)), p), half_t{});
}
ADAFM_INLINE void write_part(float* p, vec x, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16(0xffffu >> (16 - count)), x);
}
template <class half_t>
ADAFM_INLINE void write_part(half_t* p, vec x, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16(0xffffu >> (16 - count)), narrow(x, half_t{}));
}

// Two vectors of neighbours. bfloat16 takes one shuffle each way on a whole register.
template <class value_t>
ADAFM_INLINE void read_two(const value_t* p, vec& a, vec& b) {
  a = read(p);
  b = read(p + kWidth);
}
ADAFM_INLINE void read_two(const bfloat16* p, vec& a, vec& b) {
  const __m512i first = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i x = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, first, x));
  b = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, second, x));
}

template <class value_t>
ADAFM_INLINE void write_two(value_t* p, vec a, vec b) {
  write(p, a);
  write(p + kWidth, b);
}
// Rounds both by one instruction, in assembly: it needs no level of its own. Only where kRoundsToBfloat16.
ADAFM_INLINE __m512i round_two(vec a, vec b) {
  __m512i bits = _mm512_setzero_si512();
#if defined(__GNUC__)
  __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(bits) : "v"(b), "v"(a));
#endif
  return bits;
}
// The long way, on the two halves of the words: up where low > 0x8000, or low == 0x8000 and high is odd.
ADAFM_INLINE void write_two(bfloat16* p, vec a, vec b) {
  if (kRoundsToBfloat16) {
    // The instruction flushes subnormal numbers and keeps the payload of not-a-number: those go the long way.
    constexpr int kSubnormalOrNan = 0x20 | 0x80 | 0x01;
    const __mmask16 apart =
        _kor_mask16(_mm512_fpclass_ps_mask(a, kSubnormalOrNan), _mm512_fpclass_ps_mask(b, kSubnormalOrNan));
    if (__builtin_expect(apart == 0, 1)) {
      _mm512_storeu_si512(p, round_two(a, b));
      return;
    }
  }
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  const __m512i low = _mm512_permutex2var_epi16(_mm512_castps_si512(a), even, _mm512_castps_si512(b));
  const __m512i high = _mm512_permutex2var_epi16(_mm512_castps_si512(a), odd, _mm512_castps_si512(b));
  const __m512i ties_up = _mm512_adds_epu16(low, _mm512_and_si512(high, _mm512_set1_epi16(1)));
  const __mmask32 up = _mm512_cmpgt_epu16_mask(ties_up, _mm512_set1_epi16(int16_t(0x8000)));
  __m512i bits = _mm512_mask_add_epi16(high, up, high, _mm512_set1_epi16(1));
  const __mmask32 nan = _mm512_kunpackw(_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
  if (__builtin_expect(nan != 0, 0)) {
    const __m512i sign = _mm512_and_si512(high, _mm512_set1_epi16(int16_t(0x8000)));
    bits = _mm512_mask_mov_epi16(bits, nan, _mm512_or_si512(sign, _mm512_set1_epi16(0x7fc0)));
  }
  _mm512_storeu_si512(p, bits);
}

// Four neighbours from each of four places, `step` elements apart.
ADAFM_INLINE vec read_fours(const float* p, int64_t step) {
  vec x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + step), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 2 * step), 2);
  return _mm512_insertf32x4(x, _mm_loadu_ps(p + 3 * step), 3);
}
template <class half_t>
ADAFM_INLINE vec read_fours(const half_t* p, int64_t step) {
  const __m128i a = _mm_unpacklo_epi64(read_quad(p), read_quad(p + step));
  const __m128i b = _mm_unpacklo_epi64(read_quad(p + 2 * step), read_quad(p + 3 * step));
  return widen(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1), half_t{});
}

// The opposite of read_fours.
ADAFM_INLINE void write_fours(float* p, int64_t step, vec x) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(x));
  _mm_storeu_ps(p + step, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(p + 2 * step, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(p + 3 * step, _mm512_extractf32x4_ps(x, 3));
}
template <class half_t>
ADAFM_INLINE void write_fours(half_t* p, int64_t step, vec x) {
  const __m256i bits = narrow(x, half_t{});
  write_quads(p, step, _mm256_castsi256_si128(bits));
  write_quads(p + 2 * step, step, _mm256_extracti128_si256(bits, 1));
}

// Transposes the 4 x 4 blocks that lie in the four 128-bit lanes of four vectors.
ADAFM_INLINE void transpose_fours(vec (&x)[4]) {
  const vec a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
  const vec c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
  x[0] = _mm512_shuffle_ps(a, c, 0x44);
  x[1] = _mm512_shuffle_ps(a, c, 0xee);
  x[2] = _mm512_shuffle_ps(b, d, 0x44);
  x[3] = _mm512_shuffle_ps(b, d, 0xee);
}
