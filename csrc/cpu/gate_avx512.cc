// DeepSeek-V3's gate, 256 experts in 8 groups of 32, in AVX-512 registers.
//
// Algorithm: the scores that choose are sigmoids to within 2e-7: a table of 2^(j/32), a polynomial and a division. The
// two best of every group come out of a tree of merges that folds the 8 groups into one register; groups are ranked by
// counting who beats them. Candidates are those that reach the eighth best of what the kept groups' halves have as
// first and second: distinct experts, so at least 8 reach it, and about one more. A network sorts them by keys of
// choice above id. Rows with a NaN, and rows with more than 16 candidates, are left to the general path. Every step is
// done for all rows of a call before the next one: it is a chain of waits, and rows fill each other's.
#include "compiler.h"

#if defined(MOE_X86)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "../common/float_formats.h"
#include "kernels.h"

MOE_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt")

namespace moe::avx512 {

namespace {

constexpr int kGroups = 8, kMostCandidates = 16;

// What lanes of constants hold.
struct alignas(64) Lanes {
  int32_t at[16];
  operator __m512i() const { return _mm512_load_si512(at); }
};

// With the groups of one row in lanes 0..7 and of another in 8..15: where the group that is r further has its lane, and
// -1 where it has the lower id and so beats its equal.
struct Rivals {
  Lanes lane[kGroups - 1], lower[kGroups - 1];
};
constexpr Rivals kRivals = [] {
  Rivals all{};
  for (int r = 1; r < kGroups; r++) {
    for (int lane = 0; lane < 16; lane++) {
      const int group = lane % kGroups, other = (group + r) % kGroups;
      all.lane[r - 1].at[lane] = lane - group + other;
      all.lower[r - 1].at[lane] = other < group ? -1 : 0;
    }
  }
  return all;
}();

// 255 - id, so that the lower id has the higher key.
struct Complements {
  Lanes of[16];
};
constexpr Complements kComplements = [] {
  Complements all{};
  for (int id = 0; id < 256; id++) all.of[id / 16].at[id % 16] = 255 - id;
  return all;
}();

// What is added to a multiple n = 32 i + j of ln 2 / 32 rounds it and leaves n + kMiddle in the last bits, with kBits
// above them: one comparison of those tells whether n is within kMiddle of 0.
constexpr int32_t kMiddle = 2048, kBits = 0x4b400000;
constexpr float kShifter = 12582912.0f + kMiddle;  // 1.5 * 2^23

// The bits of 2^(j/32), less what j and kMiddle add to the exponent once all of n + kMiddle is shifted there.
constexpr float kRoots[32] = {1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
                              1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
                              1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
                              1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
                              1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
struct Powers {
  Lanes low, high;
};
constexpr Powers kPowers = [] {
  Powers all{};
  for (int j = 0; j < 32; j++) {
    (j < 16 ? all.low : all.high).at[j % 16] = __builtin_bit_cast(int32_t, kRoots[j]) - ((j + kMiddle) << 18);
  }
  return all;
}();

// The best and the second of what lanes hold, lane by lane.
struct TopTwo {
  __m512 first, second;
};
inline TopTwo merge(__m512 a, __m512 b, __m512 a2, __m512 b2) {
  return {_mm512_max_ps(a, b), _mm512_max_ps(_mm512_min_ps(a, b), _mm512_max_ps(a2, b2))};
}
template <int kLow, int kHigh>
inline TopTwo fold_blocks(const TopTwo& a, const TopTwo& b) {
  return merge(_mm512_shuffle_f32x4(a.first, b.first, kLow), _mm512_shuffle_f32x4(a.first, b.first, kHigh),
               _mm512_shuffle_f32x4(a.second, b.second, kLow), _mm512_shuffle_f32x4(a.second, b.second, kHigh));
}
template <int kLow, int kHigh>
inline TopTwo fold_lanes(const TopTwo& a, const TopTwo& b) {
  return merge(_mm512_shuffle_ps(a.first, b.first, kLow), _mm512_shuffle_ps(a.first, b.first, kHigh),
               _mm512_shuffle_ps(a.second, b.second, kLow), _mm512_shuffle_ps(a.second, b.second, kHigh));
}

// Integers in the order of the floats, none of which is NaN or -0.
inline __m512i ordered(__m512 a) {
  const __m512i bits = _mm512_castps_si512(a);
  return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
}

// Of two rows: the groups that fewer than `most` others beat.
inline uint32_t best_groups(__m512 scores, int most) {
  const __m512i keys = ordered(scores), one = _mm512_set1_epi32(1);
  __m512i rank = _mm512_setzero_si512();
  for (int r = 0; r < kGroups - 1; r++) {
    const __m512i other = _mm512_permutexvar_epi32(kRivals.lane[r], keys);
    const __mmask16 beats = _mm512_cmpgt_epi32_mask(other, _mm512_add_epi32(keys, kRivals.lower[r]));
    rank = _mm512_mask_add_epi32(rank, beats, rank, one);
  }
  return _mm512_cmplt_epi32_mask(rank, _mm512_set1_epi32(most));
}

// One layer of a sorting network: lanes take the more of themselves and their partner where `high` says so, the less
// elsewhere.
inline __m512 exchange(__m512 a, __m512 partner, __mmask16 high) {
  return _mm512_mask_max_ps(_mm512_min_ps(a, partner), high, a, partner);
}
inline __m512i exchange(__m512i a, __m512i partner, __mmask8 high) {
  return _mm512_mask_max_epi64(_mm512_min_epi64(a, partner), high, a, partner);
}

inline __m512i reversed_halves() { return _mm512_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8); }

// The eighth best of 16 lanes, in all lanes.
inline __m512 eighth_best(__m512 a) {
  a = exchange(a, _mm512_permute_ps(a, 0xb1), 0x5555);
  a = exchange(a, _mm512_permute_ps(a, 0x1b), 0x3333);
  a = exchange(a, _mm512_permute_ps(a, 0xb1), 0x5555);
  a = exchange(a, _mm512_permutexvar_ps(reversed_halves(), a), 0x0f0f);
  a = exchange(a, _mm512_permute_ps(a, 0x4e), 0x3333);
  a = exchange(a, _mm512_permute_ps(a, 0xb1), 0x5555);
  // Both halves fall; the best eight are the greater of one and the other backwards
  const __m512i reversed = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  a = _mm512_max_ps(a, _mm512_permutexvar_ps(reversed, a));
  a = _mm512_min_ps(a, _mm512_permute_ps(a, 0xb1));
  a = _mm512_min_ps(a, _mm512_permute_ps(a, 0x4e));
  a = _mm512_min_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
  return a;
}

// Eight lanes, sorted to fall, or to rise.
template <bool kFalls>
inline __m512i sorted(__m512i a) {
  constexpr auto high = [](int mask) { return static_cast<__mmask8>(kFalls ? mask : ~mask); };
  const __m512i backwards = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  a = exchange(a, _mm512_shuffle_epi32(a, _MM_PERM_BADC), high(0x55));
  a = exchange(a, _mm512_permutex_epi64(a, 0x1b), high(0x33));
  a = exchange(a, _mm512_shuffle_epi32(a, _MM_PERM_BADC), high(0x55));
  a = exchange(a, _mm512_permutexvar_epi64(backwards, a), high(0x0f));
  a = exchange(a, _mm512_permutex_epi64(a, 0x4e), high(0x33));
  return exchange(a, _mm512_shuffle_epi32(a, _MM_PERM_BADC), high(0x55));
}

// The best eight of 16 values, best first, as the complements that go with them.
inline __m256i best_eight(__m512 values, __m512i complements) {
  const __m512i keys = ordered(values);
  const __m512i a = sorted<true>(_mm512_unpacklo_epi32(complements, keys));
  const __m512i b = sorted<false>(_mm512_unpackhi_epi32(complements, keys));
  __m512i best = _mm512_max_epi64(a, b);  // falls and rises, or the other way round
  best = exchange(best, _mm512_shuffle_i64x2(best, best, 0x4e), 0x0f);
  best = exchange(best, _mm512_permutex_epi64(best, 0x4e), 0x33);
  best = exchange(best, _mm512_shuffle_epi32(best, _MM_PERM_BADC), 0x55);
  return _mm512_cvtepi64_epi32(best);
}

// The choices of two groups, and the two best of each in half the lanes. A choice is the bias and 1 / (1 + e^-x), which
// is within 2e-7, and within 2e-6 of itself. `far` gets bits from 2 * kMiddle up where an |x| is beyond 44; kAny takes
// those as well, makes 87 of what is beyond that, and leaves such bits to NaN alone. Step by step for four registers:
// the processor has little to wait for, and the compiler little to keep.
template <bool kAny>
inline TopTwo choose_in_two(const float* logits, const float* bias, float* choices, __m512i& far) {
  constexpr int kSteps = 4;
  const __m512 factor = _mm512_set1_ps(-46.1662413f);  // -32 / ln 2
  const __m512 shifter = _mm512_set1_ps(kShifter), one = _mm512_set1_ps(1.0f);
  const __m512 linear = _mm512_set1_ps(2.16611672e-2f), square = _mm512_set1_ps(2.34596e-4f);
  __m512 x[kSteps], n[kSteps], r[kSteps], power[kSteps], choice[kSteps];
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) {
    x[v] = _mm512_loadu_ps(logits + 16 * v);
    _mm_prefetch(reinterpret_cast<const char*>(logits + 16 * v + 256 * kGateRows), _MM_HINT_T0);  // of the next call
    if constexpr (kAny) {
      far = _mm512_or_si512(far, _mm512_movm_epi32(_mm512_cmp_ps_mask(x[v], x[v], _CMP_UNORD_Q)));
      x[v] = _mm512_range_ps(x[v], _mm512_set1_ps(87.0f), 2);  // the lesser magnitude with the sign of x
    }
    n[v] = _mm512_fmadd_ps(x[v], factor, shifter);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) r[v] = _mm512_sub_ps(n[v], shifter);
#pragma GCC unroll 4
  for (int v = 0; v < kSteps && !kAny; v++) {
    far = _mm512_ternarylogic_epi32(far, _mm512_castps_si512(n[v]), _mm512_set1_epi32(kBits), 0xf6);  // far | n ^ kBits
  }
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) r[v] = _mm512_fmsub_ps(x[v], factor, r[v]);
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) {
    const __m512i bits = _mm512_castps_si512(n[v]);
    const __m512i root = _mm512_permutex2var_epi32(kPowers.low, bits, kPowers.high);
    power[v] = _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(bits, 18)));
  }
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) n[v] = _mm512_fmadd_ps(square, r[v], linear);
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) n[v] = _mm512_fmadd_ps(n[v], r[v], one);
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) n[v] = _mm512_fmadd_ps(power[v], n[v], one);
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) n[v] = _mm512_div_ps(one, n[v]);
#pragma GCC unroll 4
  for (int v = 0; v < kSteps; v++) {
    choice[v] = _mm512_add_ps(n[v], _mm512_loadu_ps(bias + 16 * v));
    _mm512_store_ps(choices + 16 * v, choice[v]);
  }
  const TopTwo a = {_mm512_max_ps(choice[0], choice[1]), _mm512_min_ps(choice[0], choice[1])};
  const TopTwo b = {_mm512_max_ps(choice[2], choice[3]), _mm512_min_ps(choice[2], choice[3])};
  return fold_lanes<0x44, 0xee>(a, b);
}

// The choices of a row, and the two best of half the lanes of groups 0..3, 0..3, 4..7, 4..7. False where kAny or a
// general path is needed.
template <bool kAny>
inline bool choose_in_row(const float* logits, const float* bias, float* choices, TopTwo& best) {
  __m512i far = _mm512_setzero_si512();
  TopTwo pairs[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) pairs[i] = choose_in_two<kAny>(logits + 64 * i, bias + 64 * i, choices + 64 * i, far);
  best =
      fold_blocks<0x44, 0xee>(fold_lanes<0x88, 0xdd>(pairs[0], pairs[1]), fold_lanes<0x88, 0xdd>(pairs[2], pairs[3]));
  return _mm512_test_epi32_mask(far, _mm512_set1_epi32(-2 * kMiddle)) == 0;
}

// Apart, or the compiler keeps what both ways have in common.
[[gnu::noinline]] bool choose_in_any_row(const float* logits, const float* bias, float* choices, TopTwo& best) {
  return choose_in_row<true>(logits, bias, choices, best);
}

}  // namespace

uint32_t choose_of_256(const float* logits, int rows, const float* bias, int top_groups, bool sum, int32_t* chosen) {
  alignas(64) float choices[kGateRows][256];
  TopTwo best[kGateRows];
  uint32_t done = (1u << rows) - 1, kept[kGateRows];
  alignas(64) static constexpr float none[256] = {};
  if (bias == nullptr) bias = none;
  for (int row = 0; row < rows; row++) {
    const float* of_row = logits + 256 * row;
    if (choose_in_row<false>(of_row, bias, choices[row], best[row])) continue;
    if (!choose_in_any_row(of_row, bias, choices[row], best[row])) done &= ~(1u << row);
  }

  for (int row = 0; row < rows; row += 2) {
    const TopTwo two = fold_blocks<0x88, 0xdd>(best[row], best[row + 1 < rows ? row + 1 : row]);
    const uint32_t lanes = best_groups(sum ? _mm512_add_ps(two.first, two.second) : two.first, top_groups);
    kept[row] = lanes & 0xff;
    if (row + 1 < rows) kept[row + 1] = lanes >> 8;
  }

  // What eight reach
  const __m512 lowest = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xff800000u)));  // -infinity
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i join = _mm512_mask_add_epi32(lanes, static_cast<__mmask16>(0xffffu << 2 * top_groups), lanes,
                                             _mm512_set1_epi32(16 - 2 * top_groups));
  __m512 bounds[kGateRows];
  for (int row = 0; row < rows; row++) {
    const auto halves = static_cast<__mmask16>(0x11 * (kept[row] & 0xf) | 0x110 * (kept[row] & 0xf0));
    const __m512 first = _mm512_mask_compress_ps(lowest, halves, best[row].first);
    const __m512 second = _mm512_mask_compress_ps(lowest, halves, best[row].second);
    bounds[row] = eighth_best(_mm512_permutex2var_ps(first, join, second));
  }

  // Those who reach it, by id. Put together in registers: stores that overlap, each with its place known late, keep the
  // loads behind them waiting in some runs of a process and not in others
  alignas(64) float values[kGateRows][kMostCandidates];
  alignas(64) int32_t complements[kGateRows][kMostCandidates];
  for (int row = 0; row < rows; row++) {
    __m512 value = lowest;
    __m512i complement = _mm512_setzero_si512();
    int count = 0;
    uint32_t rest = kept[row];
    for (int i = 0; i < top_groups; i++, rest &= rest - 1) {
      const int first = 2 * static_cast<int>(_tzcnt_u32(rest));
#pragma GCC unroll 2
      for (int v = first; v < first + 2; v++) {
        const __m512 choice = _mm512_load_ps(choices[row] + 16 * v);
        const __mmask16 reaches = _mm512_cmp_ps_mask(choice, bounds[row], _CMP_GE_OQ);
        const auto after = static_cast<__mmask16>(uint64_t{0xffff} << std::min(count, kMostCandidates));
        const __m512i own = kComplements.of[v];
        // Into their own registers: zeroed ones would have to wait for what they last held
        value = _mm512_mask_expand_ps(value, after, _mm512_mask_compress_ps(choice, reaches, choice));
        complement = _mm512_mask_expand_epi32(complement, after, _mm512_mask_compress_epi32(own, reaches, own));
        count += static_cast<int>(_mm_popcnt_u32(reaches));
      }
    }
    const auto filled = static_cast<__mmask16>((1u << std::min(count, kMostCandidates)) - 1);
    _mm512_store_ps(values[row], _mm512_mask_mov_ps(lowest, filled, value));
    _mm512_store_si512(complements[row], complement);
    if (count > kMostCandidates) done &= ~(1u << row);
  }

  for (int row = 0; row < rows; row++) {
    const __m256i of_row = best_eight(_mm512_load_ps(values[row]), _mm512_load_si512(complements[row]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(chosen + 8 * row), _mm256_sub_epi32(_mm256_set1_epi32(255), of_row));
  }
  return done;
}

}  // namespace moe::avx512

MOE_END_TARGET
#endif
