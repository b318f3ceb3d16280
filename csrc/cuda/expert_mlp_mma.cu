// The expert MLP on tensor cores with mma.sync, for every device from sm_80 on: two launches of tiles of
// tensor_tile.cuh.
//
// A tile is 128 packed weight rows x up to N rows of one expert; a block without a tile leaves at once. Weights
// come from the tiles of experts_layout.h, rows by their index, both as 16-byte pieces by cp.async. Gate and up of a
// value lie in one thread. Results go through shared memory, so that rows are written in stretches of 128 bytes or
// more.
#include "expert_tiles.h"
#include "floats.cuh"
#include "swiglu.cuh"
#include "tensor_tile.cuh"

namespace moe::mlp {

namespace {

constexpr int kWarpsM = 4, kBlockRows = 32 * kWarpsM;  // packed weight rows of a block
// Of a multiprocessor at least, where shared memory allows it: one multiplies while the other waits.
constexpr int kBlocks = 2;

// The operand of `kBlockRows` rows of a tiled matrix from row `first` on.
template <class T>
__device__ auto weights_operand(const T* matrix, int64_t first, int64_t rows, int64_t columns) {
  const int64_t tiles = weight_tiles(columns);
  const T* from = matrix + first / kWeightTile * tiles * kWeightTileElements;
  const auto piece = [=](int r) {
    return from + r / kWeightTile * tiles * kWeightTileElements + r % kWeightTile * kWeightTile +
           ((tensor_piece() ^ (r & 7)) << 3);
  };
  const int64_t left = weight_tiles(rows) * kWeightTile - first;
  return TensorOperand{piece, static_cast<int>(left < kBlockRows ? left : kBlockRows), int64_t{kWeightTileElements},
                       static_cast<int>(tiles)};
}

// Rows of a tile in a matrix [.., pitch], of which `columns` count; row(r) is the index of the tile's row r.
template <class T, class Row>
__device__ auto rows_operand(const T* matrix, int64_t pitch, int64_t columns, int rows, Row row) {
  const int64_t from = tensor_piece() * 8;
  const auto piece = [=](int r) { return matrix + row(r) * pitch + (from < columns ? from : 0); };
  const int64_t there = from < columns ? (columns - from + kTensorDepth - 1) / kTensorDepth : 0;
  return TensorOperand{piece, rows, kTensorDepth, static_cast<int>(there)};
}

// Copies `columns` values of each of `rows` rows from shared memory, `pitch` apart, to to(r): by vectors of 8.
template <class T, class To>
__device__ void store_rows(const T* staged, int pitch, int rows, int columns, To&& to) {
  const int vectors = columns / 8;
  for (int at = threadIdx.x; at < rows * vectors; at += kTensorThreads) {
    const int r = at / vectors, v = at % vectors;
    store<T, 8>(to(r) + v * 8, load<T, 8>(staged + r * pitch + v * 8));
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kTensorThreads, kBlocks) gate_up(GroupedCall p) {
  using Shape = TensorShape<kWarpsM, N>;
  constexpr int kValues = kBlockRows / 2, kPitch = kValues + 8;
  for (int t = static_cast<int>(blockIdx.y); t < *p.tile_count; t += static_cast<int>(gridDim.y)) {
    const RowTile tile = p.tiles[t];
    const int64_t first = int64_t{blockIdx.x} * kBlockRows, value = first / 2;
    const T* matrix = static_cast<const T*>(p.experts.w13) + tile.expert * p.experts.size13;
    float sum[2][N / 8][4] = {};
    multiply_tensor_tile<T, kWarpsM, N, false>(weights_operand(matrix, first, 2 * p.I, p.H),
                                               rows_operand(static_cast<const T*>(p.source.rows), p.H, p.H, tile.rows,
                                                            [&](int r) { return source_of(p.source, tile.first + r); }),
                                               static_cast<int>(weight_tiles(p.H)), sum);
    __syncthreads();
    extern __shared__ __align__(128) char shared[];
    T* staged = reinterpret_cast<T*>(shared);  // [columns][values], or with `projected` gates, then ups
    T* ups = staged + Shape::kColumns * kPitch;
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
      for (int l = 0; l < 2; l++) {
        const int r = Shape::column(n, l);
        if (r >= tile.rows) continue;
        const float weight = weight_of(p.weights, tile.first + r);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          const int at = Shape::row(m, l) / 16 * 8 + Shape::row(m, l) % 8;  // of the block's values
          const int64_t i = value + at;
          float g = sum[m][n][l] * weight, u = sum[m][n][2 + l] * weight;
          if (p.experts.b13 != nullptr && i < p.I) {
            g += p.experts.b13[tile.expert * 2 * p.I + i];
            u += p.experts.b13[tile.expert * 2 * p.I + p.I + i];
          }
          if (p.projected != nullptr) {
            staged[r * kPitch + at] = narrow<T>(g);
            ups[r * kPitch + at] = narrow<T>(u);
          } else {
            staged[r * kPitch + at] = narrow<T>(i < p.I ? swiglu(p.swiglu, g, u) : 0.0f);
          }
        }
      }
    }
    __syncthreads();
    const int64_t pitch = weight_tiles(p.I) * kWeightTile;
    if (p.projected == nullptr) {
      T* active = static_cast<T*>(p.active);
      store_rows(staged, kPitch, tile.rows, static_cast<int>(pitch - value < kValues ? pitch - value : kValues),
                 [&](int r) { return active + (tile.first + r) * pitch + value; });
    } else {
      T* projected = static_cast<T*>(p.projected) + value;
      const int there = static_cast<int>(p.I - value < kValues ? p.I - value : kValues);
      const auto row = [&](int r) { return projected + (int64_t{tile.first} + r) * 2 * p.I; };
      store_rows(staged, kPitch, tile.rows, there, row);
      store_rows(ups, kPitch, tile.rows, there, [&](int r) { return row(r) + p.I; });
    }
    __syncthreads();  // the next tile's rows go to the same shared memory
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kTensorThreads, kBlocks) down(GroupedCall p) {
  using Shape = TensorShape<kWarpsM, N>;
  constexpr int kPitch = kBlockRows + 8;
  for (int t = static_cast<int>(blockIdx.y); t < *p.tile_count; t += static_cast<int>(gridDim.y)) {
    const RowTile tile = p.tiles[t];
    const int64_t first = int64_t{blockIdx.x} * kBlockRows, pitch = weight_tiles(p.I) * kWeightTile;
    const T* matrix = static_cast<const T*>(p.experts.w2) + tile.expert * p.experts.size2;
    float sum[2][N / 8][4] = {};
    multiply_tensor_tile<T, kWarpsM, N, false>(weights_operand(matrix, first, p.H, p.I),
                                               rows_operand(static_cast<const T*>(p.active), pitch, pitch, tile.rows,
                                                            [&](int r) { return int64_t{tile.first} + r; }),
                                               static_cast<int>(weight_tiles(p.I)), sum);
    __syncthreads();
    extern __shared__ __align__(128) char shared[];
    T* staged = reinterpret_cast<T*>(shared);  // [columns][block rows]
    const T* routed = static_cast<const T*>(p.finish.routed);
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = Shape::column(n, i), at = Shape::row(m, i);
          const int64_t h = first + at, row = tile.first + r;
          if (r >= tile.rows || h >= p.H) continue;
          float value = sum[m][n][i];
          if (p.experts.b2 != nullptr) value += p.experts.b2[tile.expert * p.H + h];
          if (p.finish.gates != nullptr) value *= p.finish.gates[row];
          if (routed != nullptr) value += widen(routed[row * p.H + h]);
          staged[r * kPitch + at] = narrow<T>(value);
        }
      }
    }
    __syncthreads();
    T* out = static_cast<T*>(p.finish.out);
    store_rows(staged, kPitch, tile.rows, static_cast<int>(p.H - first < kBlockRows ? p.H - first : kBlockRows),
               [&](int r) { return out + (tile.first + r) * p.H + first; });
    __syncthreads();
  }
}

template <class T, int N>
cudaError_t launch(const GroupedCall& p) {
  using Shape = TensorShape<kWarpsM, N>;
  static_assert(Shape::kColumns * (kBlockRows + 16) * 2 <= Shape::kSharedBytes);
  const unsigned tiles = grid_of_tiles(p.most_tiles);
  const auto run = [&](auto kernel, int64_t rows) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, kBlockRows)), tiles);
    kernel<<<grid, kTensorThreads, Shape::kSharedBytes, p.stream>>>(p);
    return cudaPeekAtLastError();
  };
  if (!p.activated) {
    const cudaError_t error = run(gate_up<T, N>, weight_tiles(2 * p.I) * kWeightTile);
    if (error != cudaSuccess || p.projected != nullptr) return error;
  }
  return run(down<T, N>, p.H);
}

template <class T>
cudaError_t launch_rows(const GroupedCall& p) {
  if (p.tile_rows <= 32) return launch<T, 16>(p);
  return p.tile_rows <= 64 ? launch<T, 32>(p) : launch<T, 64>(p);
}

}  // namespace

cudaError_t launch_mma(const GroupedCall& p) {
  if (p.tile_rows > 128) return cudaErrorInvalidValue;
  return p.dtype == DType::kBF16 ? launch_rows<__nv_bfloat16>(p) : launch_rows<__half>(p);
}

}  // namespace moe::mlp
