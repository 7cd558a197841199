// Eight float32 lanes in an AVX2 register. Included by simd.h between the marks of its level; what the functions do is
// said in simd_v4.h.

using vec = __m256;
constexpr int64_t kWidth = 8;

ADAFM_INLINE vec broadcast(float x) { return _mm256_set1_ps(x); }
ADAFM_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
ADAFM_INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
ADAFM_INLINE vec multiply(vec a, vec b) { return _mm256_mul_ps(a, b); }

using lane_index = __m256i;
ADAFM_INLINE lane_index read_index(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ADAFM_INLINE vec permute(vec x, lane_index index) { return _mm256_permutevar8x32_ps(x, index); }

ADAFM_INLINE vec widen(__m128i x, bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
ADAFM_INLINE vec widen(__m128i x, float16) { return _mm256_cvtph_ps(x); }

// The canonical not-a-number of each lane's sign.
ADAFM_INLINE __m256i quiet_nan(vec x) {
  const __m256i sign = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(int32_t(0x80000000u)));
  return _mm256_or_si256(sign, _mm256_set1_epi32(0x7fc00000));
}
// The sixteen bits of a bfloat16 in the low half of each lane.
ADAFM_INLINE __m256i bfloat16_bits(vec x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet_nan(x), is_nan), 16);
}
ADAFM_INLINE __m128i narrow(vec x, bfloat16) {
  const __m256i bits = bfloat16_bits(x);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
ADAFM_INLINE __m128i narrow(vec x, float16) {
  const vec is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_cvtps_ph(_mm256_blendv_ps(x, _mm256_castsi256_ps(quiet_nan(x)), is_nan), _MM_FROUND_TO_NEAREST_INT);
}

ADAFM_INLINE vec read(const float* p) { return _mm256_loadu_ps(p); }
template <class half_t>
ADAFM_INLINE vec read(const half_t* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), half_t{});
}

ADAFM_INLINE void write(float* p, vec x) { _mm256_storeu_ps(p, x); }
template <class half_t>
ADAFM_INLINE void write(half_t* p, vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, half_t{}));
}

template <class value_t>
ADAFM_INLINE vec read_part(const value_t* p, int64_t count) {
  value_t lanes[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = p[i];
  }
  return read(lanes);
}
template <class value_t>
ADAFM_INLINE void write_part(value_t* p, vec x, int64_t count) {
  value_t lanes[kWidth];
  write(lanes, x);
  for (int64_t i = 0; i < count; ++i) {
    p[i] = lanes[i];
  }
}

template <class value_t>
ADAFM_INLINE void read_two(const value_t* p, vec& a, vec& b) {
  a = read(p);
  b = read(p + kWidth);
}
template <class value_t>
ADAFM_INLINE void write_two(value_t* p, vec a, vec b) {
  write(p, a);
  write(p + kWidth, b);
}
ADAFM_INLINE void write_two(bfloat16* p, vec a, vec b) {
  const __m256i packed = _mm256_packus_epi32(bfloat16_bits(a), bfloat16_bits(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

ADAFM_INLINE vec read_fours(const float* p, int64_t step) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
}
template <class half_t>
ADAFM_INLINE vec read_fours(const half_t* p, int64_t step) {
  return widen(_mm_unpacklo_epi64(read_quad(p), read_quad(p + step)), half_t{});
}

ADAFM_INLINE void write_fours(float* p, int64_t step, vec x) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(x));
  _mm_storeu_ps(p + step, _mm256_extractf128_ps(x, 1));
}
template <class half_t>
ADAFM_INLINE void write_fours(half_t* p, int64_t step, vec x) {
  write_quads(p, step, narrow(x, half_t{}));
}

ADAFM_INLINE void transpose_fours(vec (&x)[4]) {
  const vec a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
  const vec c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
  x[0] = _mm256_shuffle_ps(a, c, 0x44);
  x[1] = _mm256_shuffle_ps(a, c, 0xee);
  x[2] = _mm256_shuffle_ps(b, d, 0x44);
  x[3] = _mm256_shuffle_ps(b, d, 0xee);
}
