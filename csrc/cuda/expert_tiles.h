// The rows of every expert, cut into tiles on the device, and what else the grouped paths of the expert MLP need.
#pragma once
#include "backend.h"
#include "expert_mlp.h"
#include "expert_paths.h"

namespace moe {

// Tiles in device memory, and how many there may be.
struct RowTiles {
  mlp::RowTile* tiles = nullptr;
  int32_t* count = nullptr;
  int32_t* counters = nullptr;  // `counted` of them that cutting sets to 0, for the kernels that follow
  float* parts = nullptr;       // of sums, for `wgmma`
  int64_t most = 0, counted = 0;
  int tile_rows = 0;
};

// Worst-case number of tiles of at most `tile_rows` rows when `rows` rows belong to `experts` experts.
inline int64_t most_tiles(int64_t rows, int64_t experts, int tile_rows) {
  return (rows < experts ? rows : experts) + rows / tile_rows;
}

// Kernels go through the tiles in steps of the grid's second dimension, which is limited.
inline unsigned grid_of_tiles(int64_t most) { return static_cast<unsigned>(most < 65535 ? most : 65535); }

mlp::StreamKernel stream_kernel(const mlp::StreamCall& call);

// The path of a call, see mlp::choose.
Status choose_path(const mlp::Shape& shape, mlp::Path* out);

// Scratch for the tiles of `rows` rows, of the size that suits the path.
Status scratch_tiles(CudaBackend& device, mlp::Path path, int64_t rows, int64_t experts, RowTiles* out);

// An expert's rows are cut evenly, into tiles of a multiple of 16 (but the last) and at most `tile_rows`. Tiles of
// experts that have several, and those of experts that have one, follow one another as evenly as they can, experts
// ascending in both: the first keep the tensor cores busy, the others the memory. Bad counts and offsets are dropped
// and noted. `early`: directly behind another kernel of the op, which it may overlap.
Status cut_tiles(CudaBackend& device, const int32_t* counts, const int32_t* offsets, int64_t experts, int64_t rows,
                 const RowTiles& tiles, bool early);

// One expert that has rows 0 .. rows - 1.
Status whole_tiles(CudaBackend& device, int64_t rows, const RowTiles& tiles);

// Scratch for the activations of `rows` rows between the products of `wgmma` and `mma`.
Status scratch_active(CudaBackend& device, const ExpertsLayout& layout, int64_t rows, void** out);

// Completes a call (dtype, source, weights, active, projected, activated and finish are the op's) and launches it.
Status launch_grouped(CudaBackend& device, mlp::Path path, const Experts& experts, const RowTiles& tiles, int64_t rows,
                      mlp::GroupedCall call);

}  // namespace moe
