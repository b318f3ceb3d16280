// The choice of DeepSeek-V3's gate, 256 experts in 8 groups of 32, a row at a time in AVX-512 registers.
//
// Algorithm: sigmoid scores without a division (a reciprocal and one Newton step). The two best of every group come out
// of a tree of merges that folds the 8 groups into one register. Groups and candidates are ranked by counting who beats
// them: one comparison for every rotation of a register. Candidates are those that reach a bound which at least K do:
// the K-th best of the 16 lane maxima of the kept groups, one expert each. Rows with a NaN or an infinity among the
// choices, and rows with more than 16 candidates, are left to the general path, which gives the same ids.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstdint>

#include "../common/float_formats.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside the compiler's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace moe::avx512 {

namespace {

constexpr int kVectors = 16, kGroups = 8;

// e^-|x| / (1 + e^-|x|) for x < 0, else 1 / (1 + e^-|x|): no intermediate overflows.
inline __m512 sigmoid(__m512 x) {
  const __m512 y = _mm512_max_ps(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(-105.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), y);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  const __m512 one = _mm512_set1_ps(1.0f);
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), one);
  const __m512 power = _mm512_scalef_ps(p, n), sum = _mm512_add_ps(power, one);
  __m512 inverse = _mm512_rcp14_ps(sum);
  inverse = _mm512_fmadd_ps(_mm512_fnmadd_ps(sum, inverse, one), inverse, inverse);
  return _mm512_mask_mul_ps(inverse, _mm512_movepi32_mask(_mm512_castps_si512(x)), inverse, power);
}

// The best and the second of what lanes hold, lane by lane.
struct TopTwo {
  __m512 first, second;
};
inline TopTwo merge(__m512 a, __m512 b, __m512 a2, __m512 b2) {
  return {_mm512_max_ps(a, b), _mm512_max_ps(_mm512_min_ps(a, b), _mm512_max_ps(a2, b2))};
}
template <int kLow, int kHigh>
inline TopTwo fold(const TopTwo& a, const TopTwo& b) {
  return merge(_mm512_shuffle_f32x4(a.first, b.first, kLow), _mm512_shuffle_f32x4(a.first, b.first, kHigh),
               _mm512_shuffle_f32x4(a.second, b.second, kLow), _mm512_shuffle_f32x4(a.second, b.second, kHigh));
}

// Groups' scores in lanes 0..7.
inline __m256 group_scores(const __m512* choices, bool sum) {
  TopTwo g[kGroups];
  for (int i = 0; i < kGroups; i++) {
    const __m512 a = choices[2 * i], b = choices[2 * i + 1];
    g[i] = {_mm512_max_ps(a, b), _mm512_min_ps(a, b)};
  }
  TopTwo half[4], quarter[2];
  for (int i = 0; i < 4; i++) half[i] = fold<0x44, 0xee>(g[2 * i], g[2 * i + 1]);        // 8 lanes each
  for (int i = 0; i < 2; i++) quarter[i] = fold<0x88, 0xdd>(half[2 * i], half[2 * i + 1]);  // 4 lanes each
  const auto& [a, a2] = quarter[0];
  const auto& [b, b2] = quarter[1];
  const TopTwo pair = merge(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee), _mm512_shuffle_ps(a2, b2, 0x44),
                            _mm512_shuffle_ps(a2, b2, 0xee));
  const TopTwo all = merge(pair.first, _mm512_permute_ps(pair.first, 0xb1), pair.second,
                           _mm512_permute_ps(pair.second, 0xb1));
  const __m512 scores = sum ? _mm512_add_ps(all.first, all.second) : all.first;
  // Group i < 4 is in lane 4i, group i >= 4 in lane 4(i - 4) + 2
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castps512_ps256(_mm512_permutexvar_ps(order, scores));
}

// Bit i: fewer than `most` groups beat group i; of equals the lower wins.
inline uint32_t best_groups(__m256 scores, int most) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), one = _mm256_set1_epi32(1);
  __m256i rank = _mm256_setzero_si256();
  for (int r = 1; r < kGroups; r++) {
    const __m256 other = _mm256_permutevar8x32_ps(scores, _mm256_add_epi32(lanes, _mm256_set1_epi32(r)));
    const auto wraps = static_cast<__mmask8>(0xff00u >> r);  // lanes whose other is a lower group
    const __mmask8 beats = _mm256_cmp_ps_mask(other, scores, _CMP_GT_OQ) |
                           _mm256_mask_cmp_ps_mask(wraps, other, scores, _CMP_EQ_OQ);
    rank = _mm256_mask_add_epi32(rank, beats, rank, one);
  }
  return _mm256_cmplt_epi32_mask(rank, _mm256_set1_epi32(most));
}

template <int r>
inline __m512 rotated(__m512 a) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(a), _mm512_castps_si512(a), r));
}

// How many lanes beat each lane; with kOrdered, an equal lane before it does too.
template <bool kOrdered, int r = 1>
inline __m512i ranks(__m512 a, __m512i rank = _mm512_setzero_si512()) {
  const __m512 other = rotated<r>(a);
  __mmask16 beats = _mm512_cmp_ps_mask(other, a, _CMP_GT_OQ);
  if constexpr (kOrdered) {
    beats |= _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(0xffff0000u >> r), other, a, _CMP_EQ_OQ);
  }
  rank = _mm512_mask_add_epi32(rank, beats, rank, _mm512_set1_epi32(1));
  if constexpr (r < 15) {
    return ranks<kOrdered, r + 1>(a, rank);
  } else {
    return rank;
  }
}

}  // namespace

bool choose_of_256(const float* logits, const float* bias, int top_groups, bool sum, int K, float* scores,
                   int32_t* chosen) {
  __m512 choices[kVectors];
  __mmask16 odd = 0;
  for (int v = 0; v < kVectors; v++) {
    const __m512 score = sigmoid(_mm512_loadu_ps(logits + 16 * v));
    _mm512_storeu_ps(scores + 16 * v, score);
    choices[v] = bias == nullptr ? score : _mm512_add_ps(score, _mm512_loadu_ps(bias + 16 * v));
    odd |= _mm512_fpclass_ps_mask(choices[v], 0x99);  // NaN, infinities
  }
  if (odd != 0) return false;

  uint32_t kept = 0xff;
  if (top_groups < kGroups) kept = best_groups(group_scores(choices, sum), top_groups);

  const __m512 lowest = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xff800000u)));  // -infinity
  __m512 most = lowest;
  for (uint32_t rest = kept; rest != 0; rest &= rest - 1) {
    const auto g = static_cast<int>(_tzcnt_u32(rest));
    most = _mm512_max_ps(most, _mm512_max_ps(choices[2 * g], choices[2 * g + 1]));
  }
  const __mmask16 reached = _mm512_cmplt_epi32_mask(ranks<false>(most), _mm512_set1_epi32(K));
  const __m512 bound = _mm512_set1_ps(_mm512_mask_reduce_min_ps(reached, most));

  alignas(64) float values[16 * (kVectors + 1)];
  alignas(64) int32_t ids[16 * (kVectors + 1)];
  int count = 0;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (uint32_t rest = kept; rest != 0; rest &= rest - 1) {
    const auto g = static_cast<int>(_tzcnt_u32(rest));
    for (int v = 2 * g; v < 2 * g + 2; v++) {
      const __mmask16 reaches = _mm512_cmp_ps_mask(choices[v], bound, _CMP_GE_OQ);
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(reaches, choices[v]));
      const __m512i id = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * v));
      _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(reaches, id));
      count += _mm_popcnt_u32(reaches);
    }
  }
  if (count > 16) return false;

  const auto filled = static_cast<__mmask16>((1u << count) - 1);
  const __m512 candidates = _mm512_mask_loadu_ps(lowest, filled, values);
  alignas(64) int32_t places[16];
  _mm512_store_si512(places, ranks<true>(candidates));
  for (int i = 0; i < 16; i++) chosen[places[i]] = ids[i];
  return true;
}

}  // namespace moe::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
