// The expert MLP in tiles of 64 rows of one expert, on the f32 tiles of tile.cuh: two products with the activation
// between them in f32. Which rows belong to which expert is known on the device only, so the grid is the worst case (or
// as much of it as a grid may be) and blocks beyond the last tile leave at once.
#pragma once
#include "backend.h"
#include "expert_tiles.h"
#include "experts_layout.h"
#include "floats.cuh"
#include "swiglu.cuh"
#include "tile.cuh"

namespace moe {

// A row of a packed matrix, as experts_layout.h has it for the dtype.
template <class W>
using WeightRow = std::conditional_t<std::is_same_v<W, float>, const W*, TiledRow<W>>;

// active f32 [P, I] = swiglu of the gate and up products of every tile; or, with `projected`, the products themselves
// in the dtype of the input [P, 2I]. A column tile is 32 gate and the 32 up columns that belong to them.
template <class X, class W>
__global__ void __launch_bounds__(kTileThreads)
    project_gate_up(mlp::RowSource source, ExpertsView experts, ExpertsLayout layout, const mlp::RowTile* tiles,
                    const int32_t* tile_count, mlp::RowWeights row_weights, float* active, X* projected, bool vectors) {
  for (int t = static_cast<int>(blockIdx.y); t < *tile_count; t += static_cast<int>(gridDim.y)) {
    const mlp::RowTile tile = tiles[t];
    const int64_t H = layout.H, I = layout.I, column = int64_t{blockIdx.x} * 32;
    const W* weight = static_cast<const W*>(experts.w13) + tile.expert * experts.size13;
    float sum[4][4] = {};
    // Thread columns 4x .. 4x+3 are gate, up, gate, up of columns 2x and 2x+1.
    multiply_tile<4, 4>(
        [&](int r) -> const X* {
          if (r >= tile.rows) return nullptr;
          const int64_t row = tile.first + r;
          return static_cast<const X*>(source.rows) + source_of(source, row) * H;
        },
        [&](int c) -> WeightRow<W> {
          const int64_t i = column + c / 2;
          if (i >= I) return {};
          if constexpr (std::is_same_v<W, float>) {
            return weight + (c % 2 * I + i) * H;
          } else {
            return {weight, gate_up_row(i, c % 2), weight_tiles(H)};
          }
        },
        0, H, vectors, vectors, sum);
    using Shape = TileShape<4, 4>;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      if (Shape::row(r) >= tile.rows) continue;
      const int64_t row = tile.first + Shape::row(r);
      const float weight_of_row = weight_of(row_weights, row);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int64_t i = column + Shape::column(j) / 2;
        if (i >= I) continue;
        float g = sum[r][j] * weight_of_row, u = sum[r][j + 1] * weight_of_row;
        if (experts.b13 != nullptr) {
          g += experts.b13[tile.expert * 2 * I + i];
          u += experts.b13[tile.expert * 2 * I + I + i];
        }
        if (projected != nullptr) {
          projected[row * 2 * I + i] = narrow<X>(g);
          projected[row * 2 * I + I + i] = narrow<X>(u);
        } else {
          active[row * I + i] = swiglu(layout.swiglu, g, u);
        }
      }
    }
  }
}

// Writes a row of outputs.
template <class T>
struct StoreRow {
  T* out;
  int64_t H;
  __device__ void operator()(int64_t row, int64_t h, float value) const { out[row * H + h] = narrow<T>(value); }
};

// done(row, h, value) for every row of every tile: the down product with its bias.
template <class W, class Done>
__global__ void __launch_bounds__(kTileThreads)
    project_down(const float* active, ExpertsView experts, ExpertsLayout layout, const mlp::RowTile* tiles,
                 const int32_t* tile_count, bool vectors, Done done) {
  for (int t = static_cast<int>(blockIdx.y); t < *tile_count; t += static_cast<int>(gridDim.y)) {
    const mlp::RowTile tile = tiles[t];
    const int64_t H = layout.H, I = layout.I, column = int64_t{blockIdx.x} * 64;
    const W* weight = static_cast<const W*>(experts.w2) + tile.expert * experts.size2;
    float sum[4][4] = {};
    multiply_tile<4, 4>([&](int r) { return r < tile.rows ? active + (tile.first + r) * I : nullptr; },
                        [&](int c) -> WeightRow<W> {
                          if (column + c >= H) return {};
                          if constexpr (std::is_same_v<W, float>) {
                            return weight + (column + c) * I;
                          } else {
                            return {weight, column + c, weight_tiles(I)};
                          }
                        },
                        0, I, vectors, vectors, sum);
    using Shape = TileShape<4, 4>;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      if (Shape::row(r) >= tile.rows) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t h = column + Shape::column(j);
        if (h >= H) continue;
        done(tile.first + Shape::row(r), h,
             experts.b2 == nullptr ? sum[r][j] : sum[r][j] + experts.b2[tile.expert * H + h]);
      }
    }
  }
}

template <class X>
Status launch_gate_up(CudaBackend& device, const mlp::RowSource& source, const Experts& experts, const RowTiles& tiles,
                      const mlp::RowWeights& weights, float* active, X* projected) {
  const ExpertsLayout& layout = experts.layout;
  return with_float(layout.dtype, [&](auto* type) {
    using W = pointee<decltype(type)>;
    const dim3 grid(static_cast<unsigned>(ceil_div(layout.I, 32)), grid_of_tiles(tiles.most));
    project_gate_up<X, W><<<grid, kTileThreads, 0, device.stream()>>>(
        source, view_of(experts), layout, tiles.tiles, tiles.count, weights, active, projected, layout.H % 4 == 0);
    MOE_CUDA_LAUNCHED("project_gate_up");
    return Status::Ok();
  });
}

template <class Done>
Status launch_down(CudaBackend& device, const float* active, const Experts& experts, const RowTiles& tiles, Done done) {
  const ExpertsLayout& layout = experts.layout;
  return with_float(layout.dtype, [&](auto* type) {
    using W = pointee<decltype(type)>;
    const dim3 grid(static_cast<unsigned>(ceil_div(layout.H, 64)), grid_of_tiles(tiles.most));
    project_down<W><<<grid, kTileThreads, 0, device.stream()>>>(active, view_of(experts), layout, tiles.tiles,
                                                                tiles.count, layout.I % 4 == 0, done);
    MOE_CUDA_LAUNCHED("project_down");
    return Status::Ok();
  });
}

}  // namespace moe
