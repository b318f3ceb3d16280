// What gate_tokens rules experts and groups out with: choices within a known error, as pairs of halves, of which one
// instruction orders two; and the exact scores of a token for where that error matters.
#pragma once
#include <type_traits>

#include "moe_fused_gate_lanes.cuh"

namespace moe::gate {

#ifdef __CUDACC__

template <class T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

// x / 2 of 8 logits. (What rounding does to the smallest of them is far below kChoiceError.)
template <class T>
__device__ inline void unpack_halved(Octet<T> o, float* x) {
  PairOf<T>* pairs = reinterpret_cast<PairOf<T>*>(&o);
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = __hmul2(pairs[i], PairOf<T>(T(0.5f), T(0.5f)));
  unpack(o, x);
}

// 0.5 tanh(x) + near is sigmoid(2 x) + bias less a constant within 2^-12, for one special-function instruction instead
// of two; kChoiceError has room for the rounding of f32 while nothing is above kFarBias.
inline constexpr float kChoiceError = 0x1p-12f + 0x1p-16f, kFarBias = 64.0f;
__device__ inline float near_choice(float x, float near) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return fmaf(result, 0.5f, near);
}

// The two best of 32 halves, alike in both halves of the results. A loser of a pair is second at best, and then only if
// the best won over it: so the second is the largest of all losers.
__device__ inline void best_of_pairs(const __half2* v, __half2& best, __half2& next) {
  __half2 high[8], rest;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    high[i] = larger(v[2 * i], v[2 * i + 1]);
    const __half2 low = smaller(v[2 * i], v[2 * i + 1]);
    rest = i == 0 ? low : larger(rest, low);
  }
#pragma unroll
  for (int n = 4; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; i++) {
      rest = larger(rest, smaller(high[i], high[i + n]));
      high[i] = larger(high[i], high[i + n]);
    }
  }
  const __half2 other = __lowhigh2highlow(high[0]);
  best = larger(high[0], other);
  rest = larger(rest, smaller(high[0], other));
  next = larger(rest, __lowhigh2highlow(rest));
}

// The groups that exact scores keep, a bit each, for one token by a whole warp; 0 where that is not clear.
template <class T>
__device__ inline uint32_t exact_groups(const Args& a, int64_t t) {
  const int lane = threadIdx.x % 32;
  float c[8], bias[8] = {}, best, next, all[8], fourth, fifth;
  unpack(load_octet(static_cast<const T*>(a.logits) + t * 256 + lane * 8), c);
  if (a.bias != nullptr) unpack(load_octet(a.bias + lane * 8), bias);
#pragma unroll
  for (int i = 0; i < 8; i++) c[i] = fast_sigmoid(c[i]) + bias[i];
  best_of_octet(c, best, next);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const float other_best = __shfl_xor_sync(kAll, best, lanes), other_next = __shfl_xor_sync(kAll, next, lanes);
    merge_best(best, next, other_best, other_next);
  }
  const float sum = a.two_best ? best + next : best;
#pragma unroll
  for (int i = 0; i < 8; i++) all[i] = __shfl_sync(kAll, sum, 4 * i);
  middle_of_eight(all, fourth, fifth);
  uint32_t kept = __ballot_sync(kAll, sum >= fourth) & 0x11111111u;
  kept = (kept | kept >> 3) & 0x03030303u;
  kept = (kept | kept >> 6) & 0x000f000fu;
  kept = (kept | kept >> 12) & 0xffu;
  return fourth > fifth ? kept : 0;
}

template <class V>
__device__ inline V pair_of(uint32_t word) {
  return *reinterpret_cast<const V*>(&word);
}

// The eighth largest of N pairs of each of L lanes, every half a value of its own, and the largest.
template <int L, int N, class V>
__device__ inline float eighth_of_pairs(V* v, float& most) {
  static_assert(N == 16 || N == 8);
  sort_eight(v);
  if constexpr (N == 16) {
    sort_eight(v + 8);
    merge_eight<8>(v, v + 8);
  }
#pragma unroll
  for (int lanes = 1; lanes < L; lanes *= 2) {
    V other[8];
#pragma unroll
    for (int i = 0; i < 8; i++) other[i] = __shfl_xor_sync(kAll, v[i], lanes);
    merge_eight<8>(v, other);
  }
  V least = larger(v[0], __lowhigh2highlow(v[7]));
#pragma unroll
  for (int i = 1; i < 4; i++) least = smaller(least, larger(v[i], __lowhigh2highlow(v[7 - i])));
  most = larger(widen(v[0].x), widen(v[0].y));
  return smaller(widen(least.x), widen(least.y));
}

#endif  // __CUDACC__

}  // namespace moe::gate
