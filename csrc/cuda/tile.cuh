// One tile of a product with f32 arithmetic on ordinary cores: C = A B^T, both with the inner dimension last.
//
// 256 threads, each with TM x TN results, a tile of 16 TM rows x 16 TN columns; 16 of the inner dimension at a time
// through shared memory, the next 16 loaded while the current ones are multiplied. Every result is one chain of fused
// multiply-adds in ascending order of the inner index, whatever the tile: bitwise the same from run to run.
#pragma once
#include "experts_layout.h"
#include "floats.cuh"

namespace moe {

constexpr int kTileThreads = 256;
constexpr int kTileDepth = 16;

// Four consecutive elements from `k` on of a row, widened; zero at and beyond `end` or without a row. Rows of K
// elements start on vectors of 4 where `vectors`.
template <class T>
__device__ __forceinline__ float4 load_four(const T* row, int64_t k, int64_t end, bool vectors) {
  if (row == nullptr) return make_float4(0, 0, 0, 0);
  if (vectors && k + 4 <= end) {
    const Vec<T, 4> v = *reinterpret_cast<const Vec<T, 4>*>(row + k);
    return make_float4(widen(v.v[0]), widen(v.v[1]), widen(v.v[2]), widen(v.v[3]));
  }
  return make_float4(k < end ? widen(row[k]) : 0, k + 1 < end ? widen(row[k + 1]) : 0,
                     k + 2 < end ? widen(row[k + 2]) : 0, k + 3 < end ? widen(row[k + 3]) : 0);
}

// A row of a tiled matrix (experts_layout.h); zeros beyond its end are in the matrix.
template <class T>
struct TiledRow {
  const T* first = nullptr;  // of the row in its first tile; null without a row
  int swizzle = 0;

  TiledRow() = default;
  __device__ TiledRow(const T* matrix, int64_t row, int64_t tiles)
      : first(matrix + row / kWeightTile * tiles * kWeightTileElements + row % kWeightTile * kWeightTile),
        swizzle(static_cast<int>(row % 8)) {}
};

// Four consecutive elements, k a multiple of 4.
template <class T>
__device__ __forceinline__ float4 load_four(const TiledRow<T>& row, int64_t k, int64_t end, bool) {
  if (row.first == nullptr || k >= end) return make_float4(0, 0, 0, 0);
  const int piece = (static_cast<int>(k) % kWeightTile / 8) ^ row.swizzle;
  const Vec<T, 4> v =
      *reinterpret_cast<const Vec<T, 4>*>(row.first + k / kWeightTile * kWeightTileElements + piece * 8 + k % 8);
  return make_float4(widen(v.v[0]), widen(v.v[1]), widen(v.v[2]), widen(v.v[3]));
}

// Where a thread's results lie: row(i) and column(j) of its TM x TN.
template <int TM, int TN>
struct TileShape {
  static constexpr int kRows = 16 * TM, kColumns = 16 * TN;
  static_assert(TM % 4 == 0 && TN % 4 == 0);
  __device__ static int row(int i) { return i / 4 * 64 + threadIdx.x / 16 * 4 + i % 4; }
  __device__ static int column(int j) { return j / 4 * 64 + threadIdx.x % 16 * 4 + j % 4; }
};

// row_a(r) and row_b(c) give the rows of the operands, or null. Adds the product over [begin, end) to `sum`.
template <int TM, int TN, class RowA, class RowB>
__device__ void multiply_tile(RowA&& row_a, RowB&& row_b, int64_t begin, int64_t end, bool vectors_a, bool vectors_b,
                              float (&sum)[TM][TN]) {
  using Shape = TileShape<TM, TN>;
  constexpr int kLoadsA = TM / 4, kLoadsB = TN / 4;
  __shared__ __align__(16) float a[2][kTileDepth][Shape::kRows + 4], b[2][kTileDepth][Shape::kColumns + 4];
  const int from = threadIdx.x / 4, depth = threadIdx.x % 4 * 4;
  decltype(row_a(0)) rows_a[kLoadsA];
  decltype(row_b(0)) rows_b[kLoadsB];
#pragma unroll
  for (int i = 0; i < kLoadsA; i++) rows_a[i] = row_a(from + 64 * i);
#pragma unroll
  for (int i = 0; i < kLoadsB; i++) rows_b[i] = row_b(from + 64 * i);

  float4 next_a[kLoadsA], next_b[kLoadsB];
  const auto load = [&](int64_t k) {
#pragma unroll
    for (int i = 0; i < kLoadsA; i++) next_a[i] = load_four(rows_a[i], k + depth, end, vectors_a);
#pragma unroll
    for (int i = 0; i < kLoadsB; i++) next_b[i] = load_four(rows_b[i], k + depth, end, vectors_b);
  };
  const auto store = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kLoadsA; i++) {
      a[stage][depth][from + 64 * i] = next_a[i].x, a[stage][depth + 1][from + 64 * i] = next_a[i].y;
      a[stage][depth + 2][from + 64 * i] = next_a[i].z, a[stage][depth + 3][from + 64 * i] = next_a[i].w;
    }
#pragma unroll
    for (int i = 0; i < kLoadsB; i++) {
      b[stage][depth][from + 64 * i] = next_b[i].x, b[stage][depth + 1][from + 64 * i] = next_b[i].y;
      b[stage][depth + 2][from + 64 * i] = next_b[i].z, b[stage][depth + 3][from + 64 * i] = next_b[i].w;
    }
  };

  load(begin);
  int stage = 0;
  for (int64_t k = begin; k < end; k += kTileDepth) {
    store(stage);
    __syncthreads();
    if (k + kTileDepth < end) load(k + kTileDepth);
#pragma unroll
    for (int d = 0; d < kTileDepth; d++) {
      float x[TM], y[TN];
#pragma unroll
      for (int i = 0; i < TM; i += 4) {
        *reinterpret_cast<float4*>(x + i) = *reinterpret_cast<const float4*>(&a[stage][d][Shape::row(i)]);
      }
#pragma unroll
      for (int j = 0; j < TN; j += 4) {
        *reinterpret_cast<float4*>(y + j) = *reinterpret_cast<const float4*>(&b[stage][d][Shape::column(j)]);
      }
#pragma unroll
      for (int i = 0; i < TM; i++) {
#pragma unroll
        for (int j = 0; j < TN; j++) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
      }
    }
    stage ^= 1;
  }
  __syncthreads();
}

}  // namespace moe
