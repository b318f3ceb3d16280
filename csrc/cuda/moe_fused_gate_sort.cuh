// Sorting networks in registers: best first, for floats, pairs of halves (each half a list of its own) and integer
// keys. Among floats a NaN stays where it is compared, so that what it would spoil is seen in the end.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moe::gate {

#ifdef __CUDACC__

__device__ inline float larger(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ inline float smaller(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ inline __half2 larger(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ inline __half2 smaller(__half2 a, __half2 b) { return __hmin2_nan(a, b); }
__device__ inline __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }
__device__ inline __nv_bfloat162 smaller(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmin2_nan(a, b); }
__device__ inline uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
__device__ inline uint32_t smaller(uint32_t a, uint32_t b) { return min(a, b); }
__device__ inline uint64_t larger(uint64_t a, uint64_t b) { return a < b ? b : a; }

template <class V>
__device__ inline void order(V& a, V& b) {
  const V high = larger(a, b);
  b = smaller(a, b);
  a = high;
}
__device__ inline void order(uint64_t& a, uint64_t& b) {
  const bool swap = a < b;
  const uint64_t high = swap ? b : a;
  b = swap ? a : b;
  a = high;
}

template <class V>
__device__ inline void sort_four(V* v) {
  order(v[0], v[1]);
  order(v[2], v[3]);
  order(v[0], v[2]);
  order(v[1], v[3]);
  order(v[1], v[2]);
}

template <class V>
__device__ inline void sort_eight(V* v) {
  sort_four(v);
  sort_four(v + 4);
#pragma unroll
  for (int i = 0; i < 4; i++) order(v[i], v[i + 4]);
  order(v[2], v[4]);
  order(v[3], v[5]);
  order(v[1], v[2]);
  order(v[3], v[4]);
  order(v[5], v[6]);
}

// Sorts eight that rise and fall, or the other way round.
template <class V>
__device__ inline void sort_bitonic_eight(V* v) {
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if ((i & distance) == 0) order(v[i], v[i + distance]);
    }
  }
}

// The eight best of two sorted lists, sorted, in `v`; `other` may be the first N only.
template <int N, class V>
__device__ inline void merge_eight(V* v, const V* other) {
#pragma unroll
  for (int i = 0; i < N; i++) v[8 - N + i] = larger(v[8 - N + i], other[N - 1 - i]);
  sort_bitonic_eight(v);
}

// The fourth and fifth largest of eight.
__device__ inline void middle_of_eight(float* v, float& fourth, float& fifth) {
  sort_four(v);
  sort_four(v + 4);
  float high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    high[i] = fmaxf(v[i], v[7 - i]);
    low[i] = fminf(v[i], v[7 - i]);
  }
  fourth = fminf(fminf(high[0], high[1]), fminf(high[2], high[3]));
  fifth = fmaxf(fmaxf(low[0], low[1]), fmaxf(low[2], low[3]));
}

// Merges the two best of others into the two best.
__device__ inline void merge_best(float& best, float& next, float other_best, float other_next) {
  next = larger(smaller(best, other_best), larger(next, other_next));
  best = larger(best, other_best);
}

__device__ inline void best_of_octet(const float* c, float& best, float& next) {
  float high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    high[i] = larger(c[2 * i], c[2 * i + 1]);
    low[i] = smaller(c[2 * i], c[2 * i + 1]);
  }
  merge_best(high[0], low[0], high[1], low[1]);
  merge_best(high[2], low[2], high[3], low[3]);
  merge_best(high[0], low[0], high[2], low[2]);
  best = high[0];
  next = low[0];
}

#endif  // __CUDACC__

}  // namespace moe::gate
