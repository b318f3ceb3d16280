// How packed experts lie in device memory.
//
// f32 weights: rows one after the other, gate rows before up rows: w13 [S, 2I, H], w2 [S, H, I].
//
// bf16 and f16 weights: tiles of 64 rows x 64 columns, 8 KiB each, that a kernel copies to shared memory as they are
// and multiplies from there (ldmatrix, wgmma). Within a tile rows are 128 bytes apart and the 16-byte piece p of row r
// lies at place p ^ (r % 8), which is the 128-byte swizzle of the tensor cores. Tiles of a row of tiles lie one after
// the other, so what a product streams is one long stretch. In w13 gate and up rows alternate by 8 (packed row 16a + b
// is gate row 8a + b, packed row 16a + 8 + b up row 8a + b): one thread of an m16 or m64 product holds a gate value and
// its up value. Rows and columns beyond the matrix are zero.
//
// Biases f32 [S, 2I] (gate, then up) and [S, H], only where there are any. Sections are aligned to 256 bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../expert_sections.h"

#ifdef __CUDACC__
#define MOE_BOTH __host__ __device__ __forceinline__
#else
#define MOE_BOTH inline
#endif

namespace moe {

constexpr int kWeightTile = 64;                                 // rows and columns
constexpr int kWeightTileElements = kWeightTile * kWeightTile;  // 8 KiB

MOE_BOTH constexpr int64_t weight_tiles(int64_t n) { return (n + kWeightTile - 1) / kWeightTile; }

// Packed row of w13 of gate (half 0) or up (half 1) row i.
MOE_BOTH constexpr int64_t gate_up_row(int64_t i, int64_t half) { return i / 8 * 16 + half * 8 + i % 8; }

// Where element (row, column) of a tiled matrix lies, in elements. `tiles` = weight_tiles(columns of the matrix).
MOE_BOTH constexpr int64_t tiled_at(int64_t row, int64_t column, int64_t tiles) {
  const int64_t tile = row / kWeightTile * tiles + column / kWeightTile;
  const int64_t r = row % kWeightTile, c = column % kWeightTile;
  return tile * kWeightTileElements + r * kWeightTile + ((c / 8) ^ (r % 8)) * 8 + c % 8;
}

inline bool is_tiled(const ExpertsLayout& layout) { return layout.dtype != DType::kF32; }

// Elements of one slot's matrices.
inline ExpertExtents extents_of(const ExpertsLayout& layout) {
  if (!is_tiled(layout)) return ExpertExtents::of(layout);
  const auto padded = [](int64_t n) { return weight_tiles(n) * kWeightTile; };
  return {padded(2 * layout.I), padded(layout.H), padded(layout.H), padded(layout.I)};
}

inline ExpertSections expert_sections(const ExpertsLayout& layout) {
  return expert_sections<256>(layout, extents_of(layout));
}

// Where the parts of packed experts are, for kernels: slots are one after the other in each.
struct ExpertsView {
  void *w13, *w2;
  float *b13, *b2;        // null without biases
  int64_t size13, size2;  // elements of one slot's matrices
};

inline ExpertsView view_of(const Experts& experts) {
  const ExpertSections at = expert_sections(experts.layout);
  const ExpertExtents extents = extents_of(experts.layout);
  char* data = static_cast<char*>(experts.data);
  const bool biases = experts.layout.biases;
  return {data,
          data + at.w2,
          biases ? reinterpret_cast<float*>(data + at.b13) : nullptr,
          biases ? reinterpret_cast<float*>(data + at.b2) : nullptr,
          extents.rows13 * extents.columns13,
          extents.rows2 * extents.columns2};
}

}  // namespace moe
