// The expert MLP in tiles: up to kTileRows rows of one expert by a block of columns. Ops make the list of tiles, share
// tiles x blocks among threads, and decide what becomes of the results.
#pragma once
#include <cstdint>

#include "experts_layout.h"
#include "gemm.h"
#include "swiglu.h"

namespace moe {

struct Tile {
  int64_t expert;
  int64_t rows;   // at most kTileRows
  int64_t first;  // its first row among the op's rows
  int64_t place;  // its first row among the rows held in scratch
};

// Columns per task: wide enough to be worth a task, narrow enough that small layers occupy all threads.
inline constexpr int64_t kMostColumns = 32;
constexpr int64_t columns_per_task(int64_t n) { return n >= 8 * kMostColumns ? kMostColumns : 8; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// gate[r * n + c] and up[r * n + c] for columns i .. i+n-1 of m rows: w * (x W^T) + b, with w = 1 without row_weights.
void project_gate_up(const ExpertsView& experts, int64_t expert, const float* const* rows, int64_t m, int64_t i,
                     int64_t n, const float* row_weights, float* gate, float* up);

// out[r * stride + c] for columns h .. h+n-1 of m rows.
void project_down(const ExpertsView& experts, int64_t expert, const float* const* rows, int64_t m, int64_t h, int64_t n,
                  float* out, int64_t stride);

// Activated columns i .. i+n-1 of m rows, the rows `stride` = padded(I) apart: what project_down reads.
inline void activate(const ExpertsView& experts, int64_t m, int64_t i, int64_t n, const float* gate, const float* up,
                     float* active) {
  const int64_t I = experts.layout.I, stride = padded(I);
  for (int64_t r = 0; r < m; r++) {
    float* row = active + r * stride;
    swiglu(experts.layout.swiglu, gate + r * n, up + r * n, n, row + i);
    if (i + n == I) {
      for (int64_t pad = I; pad < stride; pad++) row[pad] = 0;
    }
  }
}

}  // namespace moe
