// Vectors of AVX2, FMA and F16C in the words of kernels_impl.h.
#pragma once

namespace moe::MOE_ISA {

constexpr int64_t kWidth = 8;
constexpr int64_t kTileRows = 6;                                          // 12 sums, two weights and a row's value
constexpr int64_t vectors_per_half(int64_t m) { return m <= 3 ? 2 : 1; }  // of a panel, at once, for m rows
constexpr int64_t kDotRows = 4, kDotWeights = 2;

constexpr decltype(Kernels::choose_of_256) choose = nullptr;
constexpr decltype(Kernels::rank_choices) rank = nullptr;
constexpr decltype(Kernels::find_places) find = nullptr;

using V = __m256;
using U = __m256i;

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline V zero() { return _mm256_setzero_ps(); }
inline V splat(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V least(V a, V b) { return _mm256_min_ps(a, b); }
inline V most(V a, V b) { return _mm256_max_ps(a, b); }
inline V where_greater(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline uint64_t reaches(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
inline V nearest(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// In two steps, for 2^n alone may be beyond the floats.
inline V times_power(V a, V n) {
  const U whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const U one = _mm256_set1_epi32(127);
  const V first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
  const V second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
  return mul(mul(a, first), second);
}
inline float sum_of(V a) {
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float highest_of(V a) {
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

inline V load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline V load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// The low 16 bits of every lane.
inline __m128i low_halves(U a) {
  const U packed = _mm256_packus_epi32(a, a);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store(bf16* p, V a) {
  const U bits = _mm256_castps_si256(a);
  const U odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const U rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const U quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const V all =
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(_mm256_srli_epi32(_mm256_castps_si256(all), 16)));
}
inline void store(f16* p, V a) {
  const __m128i bits = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

inline void load_halves(const float* row, int64_t v, V& first, V& second) {
  first = load(row + v * kWidth);
  second = load(row + kHalf + v * kWidth);
}
inline U load_words(const void* p) { return _mm256_loadu_si256(static_cast<const U*>(p)); }
inline void store_words(void* p, U a) { _mm256_storeu_si256(static_cast<U*>(p), a); }
inline void load_halves(const bf16* row, int64_t v, V& first, V& second) {
  const U pairs = load_words(row + 2 * kWidth * v);
  first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load_halves(const f16* row, int64_t v, V& first, V& second) {
  const U pairs = load_words(row + 2 * kWidth * v);
  first = _mm256_cvtph_ps(low_halves(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff))));
  second = _mm256_cvtph_ps(low_halves(_mm256_srli_epi32(pairs, 16)));
}

inline U zip(const void* low, const void* high) {
  const U a = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(low)));
  const U b = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(high)));
  return _mm256_or_si256(a, _mm256_slli_epi32(b, 16));
}
inline void transpose(U* a) {
  U t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) a[i] = t[i];
}

}  // namespace moe::MOE_ISA
