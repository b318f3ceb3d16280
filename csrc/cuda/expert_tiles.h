// Cuts the rows of every expert into tiles, on the device.
#pragma once
#include "backend.h"
#include "expert_mlp.h"

namespace moe {

// Tiles in device memory, and how many there may be.
struct RowTiles {
  mlp::RowTile* tiles = nullptr;
  int32_t* count = nullptr;
  int64_t most = 0;
};

// Worst-case number of tiles of at most `tile_rows` rows when `rows` rows belong to `experts` experts.
inline int64_t most_tiles(int64_t rows, int64_t experts, int tile_rows) {
  return (rows < experts ? rows : experts) + rows / tile_rows;
}

// Scratch for the tiles of `rows` rows.
Status scratch_tiles(CudaBackend& device, int64_t rows, int64_t experts, int tile_rows, RowTiles* out);

// An expert's rows are cut evenly, into tiles of a multiple of 16 (but the last) and at most `tile_rows`. Bad counts and
// offsets are dropped and noted. `zeros` of `zeroed` counters are set to 0 on the way.
Status cut_tiles(CudaBackend& device, const int32_t* counts, const int32_t* offsets, int64_t experts, int64_t rows,
                 int tile_rows, const RowTiles& tiles, int32_t* zeros = nullptr, int64_t zeroed = 0);

// One expert that has rows 0 .. rows - 1.
Status whole_tiles(CudaBackend& device, int64_t rows, int tile_rows, const RowTiles& tiles, int32_t* zeros = nullptr,
                   int64_t zeroed = 0);

}  // namespace moe
