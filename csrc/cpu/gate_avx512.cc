// The choice of DeepSeek-V3's gate, 256 experts in 8 groups of 32, in AVX-512 registers.
//
// Algorithm: sigmoid scores without a division (a reciprocal and one Newton step). The two best of every group come out
// of a tree of merges that folds the 8 groups into one register. Groups and candidates are ranked by counting who beats
// them: one comparison for every rotation of a register. Candidates are those that reach a bound which at least K do:
// the K-th best of the 16 lane maxima of the kept groups, one expert each. Rows with a NaN or an infinity among the
// choices, and rows with more than 16 candidates, are left to the general path, which gives the same ids. Every step is
// done for all rows of a call before the next one: it is a chain of waits, and rows fill each other's.
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

// e^-|x| / (1 + e^-|x|) for x < 0, else 1 / (1 + e^-|x|): no intermediate overflows. NaN for NaN.
inline __m512 sigmoid(__m512 x) {
  // A NaN stays: it is the second operand
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-105.0f), _mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
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

uint32_t choose_of_256(const float* logits, int rows, const float* bias, int top_groups, bool sum, int K, float* scores,
                       int32_t* chosen) {
  alignas(64) float choices[kGateRows][256];
  __m256 groups[kGateRows];
  uint32_t done = (1u << rows) - 1, kept[kGateRows];
  for (int row = 0; row < rows; row++) {
    __m512 of_row[kVectors];
    __mmask16 odd = 0;
    for (int v = 0; v < kVectors; v++) {
      const float* at = logits + 256 * row + 16 * v;
      _mm_prefetch(reinterpret_cast<const char*>(at + 256 * kGateRows), _MM_HINT_T0);  // of the next call
      const __m512 score = sigmoid(_mm512_loadu_ps(at));
      _mm512_storeu_ps(scores + 256 * row + 16 * v, score);
      of_row[v] = bias == nullptr ? score : _mm512_add_ps(score, _mm512_loadu_ps(bias + 16 * v));
      _mm512_store_ps(choices[row] + 16 * v, of_row[v]);
      odd |= _mm512_fpclass_ps_mask(of_row[v], 0x99);  // NaN, infinities
    }
    groups[row] = group_scores(of_row, sum);
    if (odd != 0) done &= ~(1u << row);
  }
  for (int row = 0; row < rows; row++) kept[row] = best_groups(groups[row], top_groups);

  // What K of the lanes' best reach
  const __m512 lowest = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xff800000u)));  // -infinity
  __m512 bounds[kGateRows];
  for (int row = 0; row < rows; row++) {
    __m512 most = lowest;
    for (uint32_t rest = kept[row]; rest != 0; rest &= rest - 1) {
      const float* group = choices[row] + 32 * _tzcnt_u32(rest);
      most = _mm512_max_ps(most, _mm512_max_ps(_mm512_load_ps(group), _mm512_load_ps(group + 16)));
    }
    const __mmask16 best = _mm512_cmplt_epi32_mask(ranks<false>(most), _mm512_set1_epi32(K));
    bounds[row] = _mm512_set1_ps(_mm512_mask_reduce_min_ps(best, most));
  }

  // Those who reach it, by id
  alignas(64) float values[kGateRows][16 * (kVectors + 1)];
  alignas(64) int32_t ids[kGateRows][16 * (kVectors + 1)];
  int counts[kGateRows];
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int row = 0; row < rows; row++) {
    int count = 0;
    for (uint32_t rest = kept[row]; rest != 0; rest &= rest - 1) {
      const int first = 32 * static_cast<int>(_tzcnt_u32(rest));
      for (int e = first; e < first + 32; e += 16) {
        const __m512 choice = _mm512_load_ps(choices[row] + e);
        const __mmask16 reaches = _mm512_cmp_ps_mask(choice, bounds[row], _CMP_GE_OQ);
        _mm512_storeu_ps(values[row] + count, _mm512_maskz_compress_ps(reaches, choice));
        const __m512i id = _mm512_add_epi32(lanes, _mm512_set1_epi32(e));
        _mm512_storeu_si512(ids[row] + count, _mm512_maskz_compress_epi32(reaches, id));
        count += static_cast<int>(_mm_popcnt_u32(reaches));
      }
    }
    counts[row] = count;
    if (count > 16) done &= ~(1u << row);
  }

  alignas(64) int32_t places[kGateRows][16];
  for (int row = 0; row < rows; row++) {
    const auto filled = static_cast<__mmask16>(counts[row] > 16 ? 0xffff : (1u << counts[row]) - 1);
    _mm512_store_si512(places[row], ranks<true>(_mm512_mask_loadu_ps(lowest, filled, values[row])));
  }
  for (int row = 0; row < rows; row++) {
    for (int i = 0; i < 16; i++) chosen[16 * row + places[row][i]] = ids[row][i];
  }
  return done;
}

}  // namespace moe::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
