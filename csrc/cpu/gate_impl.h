// The steps of moe_fused_gate's general path, in the terms of kernels_impl.h and under its rules. Rows are padded to
// multiples of kGatePad with NaN, which is never a maximum, adds nothing and is no candidate.
#pragma once

namespace moe::MOE_ISA {

constexpr float kLeast = __builtin_bit_cast(float, 0xff7fffffu);  // that is finite
constexpr float kInfinite = __builtin_bit_cast(float, 0x7f800000u);

inline bool softmax(const float* x, int64_t n, float* out) {
  V maxima = splat(-kInfinite);
  for (int64_t i = 0; i < n; i += kWidth) maxima = most(load(x + i), maxima);  // of NaN and another: the second
  const float highest = highest_of(maxima);
  if (!(highest > -kInfinite && highest < kInfinite)) return false;
  V sums = zero();
  for (int64_t i = 0; i < n; i += kWidth) {
    const V power = exponential(sub(load(x + i), splat(highest)));
    sums = add(sums, most(power, zero()));
    store(out + i, power);
  }
  const V factor = div(splat(1.0f), splat(sum_of(sums)));
  for (int64_t i = 0; i < n; i += kWidth) store(out + i, mul(load(out + i), factor));
  return true;
}

// above[v] = how many of n values are greater, lane by lane.
template <int kVectors>
inline void count_above(const float* values, int n, const V* lanes, V* above) {
  for (int v = 0; v < kVectors; v++) above[v] = zero();
  for (int i = 0; i < n; i++) {
    const V value = splat(values[i]);
    for (int v = 0; v < kVectors; v++) above[v] = add(above[v], where_greater(value, lanes[v], splat(1.0f), zero()));
  }
}

// The least that fewer than k of kBuckets values are above.
template <int kBuckets>
inline float kth_highest(const V* values, int k) {
  constexpr int kVectors = kBuckets / kWidth;
  float each[kBuckets];
  V above[kVectors];
  for (int v = 0; v < kVectors; v++) store(each + v * kWidth, values[v]);
  count_above<kVectors>(each, kBuckets, values, above);
  V negative = splat(-kInfinite);
  for (int v = 0; v < kVectors; v++) {
    const V turned = sub(zero(), values[v]);
    negative = most(where_greater(splat(static_cast<float>(k)), above[v], turned, splat(-kInfinite)), negative);
  }
  return -highest_of(negative);
}

inline int lowest_bit(uint64_t bits) {
#if defined(MOE_MSVC)
  unsigned long at;
  _BitScanForward64(&at, bits);
  return static_cast<int>(at);
#else
  return __builtin_ctzll(bits);
#endif
}

// Candidates are what reaches the k-th highest of the maxima of kBuckets >= 2 k interleaved parts: at least k, and less
// than half as many more where values are in no order. Their places are the numbers of those above them; equal ones
// follow each other by id.
template <int kBuckets>
inline bool top_of(const float* values, int64_t n, int k, int32_t* chosen) {
  constexpr int kVectors = kBuckets / kWidth, kStep = 16, kMostCandidates = 2 * kBuckets;
  V maxima[kVectors];
  for (int v = 0; v < kVectors; v++) maxima[v] = splat(-kInfinite);
  for (int64_t i = 0; i < n; i += kBuckets) {
    for (int v = 0; v < kVectors; v++) maxima[v] = most(load(values + i + v * kWidth), maxima[v]);
  }
  const float bound = kth_highest<kBuckets>(maxima, k);
  if (!(bound > -kInfinite)) return false;

  float found[kMostCandidates];
  int32_t ids[kMostCandidates], order[kMostCandidates];
  int count = 0;
  for (int64_t first = 0; first < n; first += kGatePad) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < kGatePad; i += kWidth) bits |= reaches(load(values + first + i), splat(bound)) << i;
    for (; bits != 0; bits &= bits - 1) {
      if (count == kMostCandidates) return false;
      const int64_t id = first + lowest_bit(bits);
      found[count] = values[id];
      order[count] = -1;
      ids[count++] = static_cast<int32_t>(id);
    }
  }
  for (int i = count; i % kStep != 0; i++) found[i] = -kInfinite;
  for (int block = 0; block < count; block += kStep) {
    V lanes[kStep / kWidth], above[kStep / kWidth];
    float places[kStep];
    for (int v = 0; v < kStep / kWidth; v++) lanes[v] = load(found + block + v * kWidth);
    count_above<kStep / kWidth>(found, count, lanes, above);
    for (int v = 0; v < kStep / kWidth; v++) store(places + v * kWidth, above[v]);
    for (int i = block; i < count && i < block + kStep; i++) {
      int place = static_cast<int>(places[i - block]);
      while (order[place] >= 0) place++;
      order[place] = ids[i];
    }
  }
  for (int i = 0; i < k; i++) chosen[i] = order[i];
  return true;
}

inline bool top(const float* values, int64_t n, int k, int32_t* chosen) {
  if (k <= 8) return top_of<16>(values, n, k, chosen);
  if (k <= 16) return top_of<32>(values, n, k, chosen);
  return top_of<64>(values, n, k, chosen);
}

struct Two {
  V first, second;
};
inline Two with(Two best, V value) { return {most(best.first, value), most(best.second, least(best.first, value))}; }

// kWidth groups at a time: the two best of every lane of a group, which are turned over and merged.
inline bool best_two(const float* values, int64_t groups, int64_t size, float* firsts, float* seconds) {
  if (size < 2) return false;
  const int64_t whole = size / kWidth * kWidth;
  V finite = zero();
  for (int64_t g = 0; g < groups; g += kWidth) {
    U of_first[kWidth], of_second[kWidth];
    for (int64_t i = 0; i < kWidth; i++) {
      const float* group = values + (g + i < groups ? g + i : g) * size;
      Two best = {splat(-kInfinite), splat(-kInfinite)};
      for (int64_t e = 0; e < whole; e += kWidth) {
        const V value = load(group + e);
        finite = fma(value, zero(), finite);  // NaN from here on where it is not
        best = with(best, value);
      }
      float lanes[kWidth];
      if (whole < size) {
        store(lanes, splat(kLeast));
        for (int64_t e = whole; e < size; e++) lanes[e - whole] = group[e];
        finite = fma(load(lanes), zero(), finite);
        best = with(best, load(lanes));
      }
      store(lanes, best.first);
      of_first[i] = load_words(lanes);
      store(lanes, best.second);
      of_second[i] = load_words(lanes);
    }
    transpose(of_first);
    transpose(of_second);
    Two best = {splat(-kInfinite), splat(-kInfinite)};
    for (int64_t i = 0; i < kWidth; i++) {
      float lanes[kWidth];
      store_words(lanes, of_first[i]);
      best = with(best, load(lanes));
      store_words(lanes, of_second[i]);
      best.second = most(best.second, load(lanes));
    }
    store(firsts + g, best.first);
    store(seconds + g, best.second);
  }
  return sum_of(finite) == 0;
}

}  // namespace moe::MOE_ISA
