// Matrix products of f32 rows with weight rows of any float dtype.
//
// Order of accumulation, the same for every shape and tile: k is cut into chunks of kChunk; within a chunk lane l of
// kLanes sums the products of k = l mod kLanes in ascending order, the lanes are added pairwise (l and l + 8, then
// + 4, + 2, + 1), and chunks are added in order. A row's result therefore never depends on its neighbours.
#pragma once
#include <cstdint>

#include "float_rows.h"

namespace moe {

// out[i * stride + j] = sum over k of rows[i][k] * weights[j, k] for i < m, j < n. `weights` are n rows of k values
// each, one after the other; every row must be readable and zero from k to padded(k).
void multiply_rows(const float* const* rows, int64_t m, const void* weights, DType dtype, int64_t n, int64_t k,
                   float* out, int64_t stride);

// How many rows share one pass over the weights: more would leave the cache.
inline constexpr int64_t kTileRows = 128;

// sums[i] += weight * row[i], the step of every weighted sum over a token's experts.
inline void add_scaled(float* sums, const float* row, float weight, int64_t n) {
  for (int64_t i = 0; i < n; i++) sums[i] += weight * row[i];
}

}  // namespace moe
