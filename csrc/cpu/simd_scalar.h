// Portable vectors in the words of kernels_impl.h: four floats, which compilers turn into what the platform has.
#pragma once

namespace moe::MOE_ISA {

constexpr int64_t kWidth = 4;
constexpr int64_t kTileRows = 4;                           // 8 sums
constexpr int64_t vectors_per_half(int64_t) { return 1; }  // of a panel, at once, for m rows
constexpr int64_t kDotRows = 2, kDotWeights = 2;

constexpr decltype(Kernels::choose_of_256) choose = nullptr;
constexpr decltype(Kernels::rank_choices) rank = nullptr;
constexpr decltype(Kernels::find_places) find = nullptr;

// Compilers that know vectors keep them in registers; an array they would not.
#if defined(MOE_MSVC)
using Lanes = float[4];
#else
typedef float Lanes __attribute__((vector_size(16)));
#endif

struct V {
  Lanes lane;
};
struct U {
  uint32_t lane[4];
};

inline V load(const float* p) {
  V a;
  std::memcpy(&a.lane, p, sizeof a.lane);
  return a;
}
template <class F>
inline V each(F f) {
  const float lanes[4] = {f(0), f(1), f(2), f(3)};
  return load(lanes);
}

inline void prefetch(const void*) {}
inline V splat(float x) {
  return each([&](int) { return x; });
}
inline V zero() { return splat(0); }
inline void store(float* p, V a) { std::memcpy(p, &a.lane, sizeof a.lane); }
#if !defined(MOE_MSVC)
inline V add(V a, V b) { return {a.lane + b.lane}; }
inline V sub(V a, V b) { return {a.lane - b.lane}; }
inline V mul(V a, V b) { return {a.lane * b.lane}; }
inline V div(V a, V b) { return {a.lane / b.lane}; }
inline V fma(V a, V b, V c) { return {a.lane * b.lane + c.lane}; }
#else
inline V add(V a, V b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline V sub(V a, V b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline V mul(V a, V b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline V div(V a, V b) {
  return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline V fma(V a, V b, V c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
#endif
inline V least(V a, V b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline V most(V a, V b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline V where_greater(V a, V b, V yes, V no) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? yes.lane[i] : no.lane[i]; });
}
// A bit for every lane of a that is at least that of b.
inline uint64_t reaches(V a, V b) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; i++) bits |= static_cast<uint64_t>(a.lane[i] >= b.lane[i]) << i;
  return bits;
}
// For numbers far below 2^22 in size.
inline V nearest(V a) {
  return each([&](int i) { return (a.lane[i] + 0x1.8p23f) - 0x1.8p23f; });
}
// In two steps, for 2^n alone may be beyond the floats.
inline V times_power(V a, V n) {
  return each([&](int i) {
    const int whole = n.lane[i] == n.lane[i] ? static_cast<int>(n.lane[i]) : 0, half = whole / 2;
    const auto power = [](int e) { return std::bit_cast<float>(static_cast<uint32_t>(e + 127) << 23); };
    return a.lane[i] * power(half) * power(whole - half);
  });
}
inline float sum_of(V a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }
inline float highest_of(V a) {
  const float b = a.lane[0] > a.lane[1] ? a.lane[0] : a.lane[1], c = a.lane[2] > a.lane[3] ? a.lane[2] : a.lane[3];
  return b > c ? b : c;
}

inline V load(const bf16* p) {
  return each([&](int i) { return to_float(p[i]); });
}
inline V load(const f16* p) {
  return each([&](int i) { return to_float(p[i]); });
}
inline void store(bf16* p, V a) {
  for (int i = 0; i < 4; i++) p[i] = from_float<bf16>(a.lane[i]);
}
inline void store(f16* p, V a) {
  for (int i = 0; i < 4; i++) p[i] = from_float<f16>(a.lane[i]);
}

inline void load_halves(const float* row, int64_t v, V& first, V& second) {
  first = load(row + v * kWidth);
  second = load(row + kHalf + v * kWidth);
}
template <class T>
inline void load_halves(const T* row, int64_t v, V& first, V& second) {
  first = each([&](int i) { return to_float(row[2 * kWidth * v + 2 * i]); });
  second = each([&](int i) { return to_float(row[2 * kWidth * v + 2 * i + 1]); });
}

inline U load_words(const void* p) {
  U a;
  std::memcpy(a.lane, p, sizeof a.lane);
  return a;
}
inline void store_words(void* p, U a) { std::memcpy(p, a.lane, sizeof a.lane); }
inline U zip(const void* low, const void* high) {
  uint16_t a[4], b[4];
  std::memcpy(a, low, sizeof a);
  std::memcpy(b, high, sizeof b);
  U result;
  for (int i = 0; i < 4; i++) result.lane[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
  return result;
}
inline void transpose(U* a) {
  U t[4];
  for (int i = 0; i < 4; i++) t[i] = {{a[0].lane[i], a[1].lane[i], a[2].lane[i], a[3].lane[i]}};
  for (int i = 0; i < 4; i++) a[i] = t[i];
}

}  // namespace moe::MOE_ISA
