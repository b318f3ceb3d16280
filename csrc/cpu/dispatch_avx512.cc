// The counting sort of moe_dispatch with ranks, in AVX-512 registers.
//
// Algorithm: counting a choice also tells its rank, how many of its expert came before it. Its place is then the first
// place of its expert, looked up in registers for 32 choices at a time, and its rank; what a second pass over counters
// would load, add and store for each choice is spared. Limits: kRankedExperts experts, 2^16 - 1 choices.
#include "compiler.h"

#if defined(MOE_X86)
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "kernels.h"

MOE_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2")

namespace moe::avx512 {

namespace {

constexpr int64_t kStep = 32;
constexpr int kWords = 32, kTables = kRankedExperts / kWords;
static_assert(kTables == 10);  // look_up

// 32 local experts, as words.
inline __m512i experts_of(const int32_t* ids, __m512i first) {
  const __m512i low = _mm512_sub_epi32(_mm512_loadu_si512(ids), first);
  const __m512i high = _mm512_sub_epi32(_mm512_loadu_si512(ids + 16), first);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
}

inline bool all_below(const int32_t* ids, __m512i first, __m512i count) {
  const __m512i low = _mm512_sub_epi32(_mm512_loadu_si512(ids), first);
  const __m512i high = _mm512_sub_epi32(_mm512_loadu_si512(ids + 16), first);
  return (_mm512_cmplt_epu32_mask(low, count) & _mm512_cmplt_epu32_mask(high, count)) == 0xffff;
}

// What 10 registers of words hold at the indices.
inline __m512i look_up(const __m512i* words, __m512i index, __mmask32 odd, __mmask32 upper, __mmask32 last) {
  const __m512i a = _mm512_permutex2var_epi16(words[0], index, words[1]);
  const __m512i b = _mm512_permutex2var_epi16(words[2], index, words[3]);
  const __m512i c = _mm512_permutex2var_epi16(words[4], index, words[5]);
  const __m512i d = _mm512_permutex2var_epi16(words[6], index, words[7]);
  const __m512i e = _mm512_permutex2var_epi16(words[8], index, words[9]);
  const __m512i low = _mm512_mask_mov_epi16(a, odd, b), high = _mm512_mask_mov_epi16(c, odd, d);
  return _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(low, upper, high), last, e);
}

inline __m512i widened(__m512i words, int half) {
  return _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1));
}

// Eight choices. `seen` are the counts, by a name that hides it: a compiler that knew would load, add and store a
// count, where the processor is faster with a load and an addition in memory.
template <int... j>
inline __m128i count(const int32_t* ids, uint32_t first, uint16_t* counts, const uint16_t* seen,
                     std::integer_sequence<int, j...>) {
  __m128i ranks = _mm_setzero_si128();
  ((ranks = _mm_insert_epi16(ranks, seen[static_cast<uint32_t>(ids[j]) - first], j),
    counts[static_cast<uint32_t>(ids[j]) - first]++),
   ...);
  return ranks;
}

}  // namespace

bool rank_choices(const int32_t* ids, int64_t n, uint32_t first, uint32_t experts, uint16_t* counts,
                  const uint16_t* seen, uint16_t* ranks) {
  const __m512i base = _mm512_set1_epi32(static_cast<int>(first)), limit = _mm512_set1_epi32(static_cast<int>(experts));
  int64_t at = 0;
  for (; at + kStep <= n; at += kStep) {
    if (!all_below(ids + at, base, limit)) return false;
    for (int64_t i = at; i < at + kStep; i += 8) {
      const __m128i eight = count(ids + i, first, counts, seen, std::make_integer_sequence<int, 8>());
      _mm_storeu_si128(reinterpret_cast<__m128i*>(ranks + i), eight);
    }
  }
  for (; at < n; at++) {
    const uint32_t e = static_cast<uint32_t>(ids[at]) - first;
    if (e >= experts) return false;
    ranks[at] = counts[e]++;
  }
  return true;
}

void find_places(const int32_t* ids, int64_t n, uint32_t first, const FirstPlaces& places, const uint16_t* ranks,
                 int32_t* inverse) {
  __m512i lows[kTables], highs[kTables];
#pragma GCC unroll 10
  for (int i = 0; i < kTables; i++) {
    lows[i] = _mm512_load_si512(places.low + kWords * i);
    highs[i] = _mm512_load_si512(places.high + kWords * i);
  }
  const __m512i base = _mm512_set1_epi32(static_cast<int>(first));
  int64_t at = 0;
  for (; at + kStep <= n; at += kStep) {
    const __m512i index = experts_of(ids + at, base);
    const __mmask32 odd = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __mmask32 last = _mm512_test_epi16_mask(index, _mm512_set1_epi16(256));
    const __m512i l = look_up(lows, index, odd, upper, last), h = look_up(highs, index, odd, upper, last);
    for (int half = 0; half < 2; half++) {
      const __m256i* rank = reinterpret_cast<const __m256i*>(ranks + at) + half;
      const __m512i start = _mm512_or_si512(widened(l, half), _mm512_slli_epi32(widened(h, half), 16));
      const __m512i place = _mm512_add_epi32(start, _mm512_cvtepu16_epi32(_mm256_loadu_si256(rank)));
      _mm512_storeu_si512(inverse + at + 16 * half, place);
    }
  }
  for (; at < n; at++) {
    const uint32_t e = static_cast<uint32_t>(ids[at]) - first;
    inverse[at] = (places.high[e] << 16 | places.low[e]) + ranks[at];
  }
}

}  // namespace moe::avx512

MOE_END_TARGET
#endif
