// Vectors of AVX-512 (F, BW, DQ, VL) in the words of kernels_impl.h.
#pragma once

namespace moe::MOE_ISA {

constexpr int64_t kWidth = 16;
constexpr int64_t kTileRows = 12;                          // 24 sums, two weights and a row's value: 27 registers
constexpr int64_t vectors_per_half(int64_t) { return 1; }  // of a panel, at once, for m rows
constexpr int64_t kDotRows = 4, kDotWeights = 4;

uint32_t choose_of_256(const float* logits, int rows, const float* bias, int top_groups, bool sum, int32_t* chosen);
constexpr auto choose = &choose_of_256;  // gate_avx512.cc
bool rank_choices(const int32_t* ids, int64_t n, uint32_t first, uint32_t experts, uint16_t* counts,
                  const uint16_t* seen, uint16_t* ranks);
void find_places(const int32_t* ids, int64_t n, uint32_t first, const FirstPlaces& places, const uint16_t* ranks,
                 int32_t* inverse);
constexpr auto rank = &rank_choices;  // dispatch_avx512.cc
constexpr auto find = &find_places;

using V = __m512;
using U = __m512i;

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline V zero() { return _mm512_setzero_ps(); }
inline V splat(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V least(V a, V b) { return _mm512_min_ps(a, b); }
inline V most(V a, V b) { return _mm512_max_ps(a, b); }
inline V where_greater(V a, V b, V yes, V no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
}
inline uint64_t reaches(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline V nearest(V a) { return _mm512_roundscale_ps(a, 0); }
inline V times_power(V a, V n) { return _mm512_scalef_ps(a, n); }
inline float sum_of(V a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float highest_of(V a) { return _mm512_reduce_max_ps(a); }

inline V load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline V load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline void store(bf16* p, V a) {
  const U bits = _mm512_castps_si512(a);
  const U odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const U rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const U quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const U all = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
}
inline void store(f16* p, V a) {
  const __m256i bits = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

inline void load_halves(const float* row, int64_t v, V& first, V& second) {
  first = load(row + v * kWidth);
  second = load(row + kHalf + v * kWidth);
}
inline void load_halves(const bf16* row, int64_t v, V& first, V& second) {
  const U pairs = _mm512_loadu_si512(row + 2 * kWidth * v);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load_halves(const f16* row, int64_t v, V& first, V& second) {
  const U pairs = _mm512_loadu_si512(row + 2 * kWidth * v);
  first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}

inline U load_words(const void* p) { return _mm512_loadu_si512(p); }
inline void store_words(void* p, U a) { _mm512_storeu_si512(p, a); }
inline U zip(const void* low, const void* high) {
  const U a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(low)));
  const U b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(high)));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
inline void transpose(U* a) {
  U t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    a[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace moe::MOE_ISA
