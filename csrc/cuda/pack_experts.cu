// pack_experts: copies weights into slots of the layout in experts_layout.h, converting the dtype.
//
// Algorithm: a block has a square of 32 packed rows x 32 columns. It is read along the side that lies together in the
// source (columns, or rows if transposed) through shared memory and written along columns, so that both are coalesced.
// Interleaved gate and up rows are taken apart by the row's index. Values are widened to f32 and rounded once, which
// keeps the bits where the dtypes are equal (a NaN stays a NaN, its payload may change); biases become f32, and 0 where
// the slot has biases and none are given. Limits: none.
#include "backend.h"
#include "experts_layout.h"
#include "floats.cuh"

namespace moe {

namespace {

constexpr int kSquare = 32, kStripes = 8;

// One matrix of a slot: `rows` x `columns` in the source, packed to `packed_rows` x `packed_columns`.
struct Matrix {
  int64_t rows, columns, packed_rows, packed_columns;
  int64_t half;  // I for w13, which has gate and up rows; else 0
  bool interleaved, transposed;
};

// Row of the source of packed row r, or -1 where it is padding.
template <bool TILED>
__device__ __forceinline__ int64_t source_row(int64_t r, const Matrix& m) {
  if (m.half == 0) return r < m.rows ? r : -1;
  const int64_t i = TILED ? r / 16 * 8 + r % 8 : r % m.half, up = TILED ? r / 8 % 2 : r / m.half;
  if (i >= m.half) return -1;
  return m.interleaved ? 2 * i + up : up * m.half + i;
}

template <class From, class To>
__global__ void pack_matrix(const From* from, To* to, Matrix m) {
  constexpr bool kTiled = !std::is_same_v<To, float>;
  __shared__ float square[kSquare][kSquare + 1];
  const int64_t first_row = int64_t{blockIdx.y} * kSquare, first_column = int64_t{blockIdx.x} * kSquare;
  from += int64_t{blockIdx.z} * m.rows * m.columns;
  to += int64_t{blockIdx.z} * m.packed_rows * m.packed_columns;
  for (int i = threadIdx.y; i < kSquare; i += kStripes) {
    const int64_t r = first_row + (m.transposed ? threadIdx.x : i), c = first_column + (m.transposed ? i : threadIdx.x);
    const int64_t source = r < m.packed_rows && c < m.columns ? source_row<kTiled>(r, m) : -1;
    square[r - first_row][c - first_column] =
        source < 0 ? 0.0f : widen(from[m.transposed ? c * m.rows + source : source * m.columns + c]);
  }
  __syncthreads();
  const int64_t tiles = weight_tiles(m.columns);
  for (int i = threadIdx.y; i < kSquare; i += kStripes) {
    const int64_t r = first_row + i, c = first_column + threadIdx.x;
    if (r >= m.packed_rows || c >= m.packed_columns) continue;
    to[kTiled ? tiled_at(r, c, tiles) : r * m.columns + c] = narrow<To>(square[i][threadIdx.x]);
  }
}

// Biases lie as in the source but for gate before up: half = I for b13, else 0.
template <class From>
__global__ void pack_bias(const From* from, float* to, int64_t rows, int64_t half, bool interleaved) {
  const int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, expert = blockIdx.y;
  if (r >= rows) return;
  const int64_t source = half > 0 && interleaved ? r % half * 2 + r / half : r;
  to[expert * rows + r] = from == nullptr ? 0.0f : widen(from[expert * rows + source]);
}

Status pack_one(CudaBackend& device, const Tensor& from, void* to, DType dtype, int64_t count, const Matrix& m) {
  return with_float(from.dtype, [&](auto* from_type) {
    using From = pointee<decltype(from_type)>;
    return with_float(dtype, [&](auto* to_type) {
      using To = pointee<decltype(to_type)>;
      const int64_t across = ceil_div(m.packed_columns, kSquare), down = ceil_div(m.packed_rows, kSquare);
      if (down > 65535) return Status::Error(Code::kUnsupported, "expected at most 2097120 rows in an expert's matrix");
      for (int64_t first = 0; first < count; first += 65535) {
        const int64_t here = count - first < 65535 ? count - first : 65535;
        const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(here));
        pack_matrix<From, To><<<grid, dim3(kSquare, kStripes), 0, device.stream()>>>(
            from.as<const From>() + first * m.rows * m.columns,
            static_cast<To*>(to) + first * m.packed_rows * m.packed_columns, m);
        MOE_CUDA_LAUNCHED("pack_experts");
      }
      return Status::Ok();
    });
  });
}

Status pack_biases(CudaBackend& device, const Tensor& from, float* to, int64_t count, int64_t rows, int64_t half,
                   bool interleaved) {
  constexpr int kThreads = 256;
  return with_float(from ? from.dtype : DType::kF32, [&](auto* type) {
    using From = pointee<decltype(type)>;
    for (int64_t first = 0; first < count; first += 65535) {
      const int64_t here = count - first < 65535 ? count - first : 65535;
      const dim3 grid(static_cast<unsigned>(ceil_div(rows, kThreads)), static_cast<unsigned>(here));
      const From* source = from ? from.as<const From>() + first * rows : nullptr;
      pack_bias<From><<<grid, kThreads, 0, device.stream()>>>(source, to + first * rows, rows, half, interleaved);
      MOE_CUDA_LAUNCHED("pack_experts");
    }
    return Status::Ok();
  });
}

}  // namespace

Status pack_experts(Backend& backend, const PackExperts& p) {
  CudaBackend& device = cuda(backend);
  const int64_t H = p.H, I = p.I, slot = p.first_slot;
  const DType dtype = p.experts.layout.dtype;
  const bool interleaved = p.gate_up == GateUp::kInterleaved;
  const ExpertsView to = view_of(p.experts);
  if (p.count == 0) return Status::Ok();
  backend.note_path("pack_experts", dtype == DType::kF32 ? "rows" : "tiles");
  const size_t width = size_of(dtype);
  const ExpertExtents extents = extents_of(p.experts.layout);
  void* w13 = static_cast<char*>(to.w13) + static_cast<size_t>(slot * to.size13) * width;
  void* w2 = static_cast<char*>(to.w2) + static_cast<size_t>(slot * to.size2) * width;
  const Matrix gate_up = {2 * I, H, extents.rows13, extents.columns13, I, interleaved, p.transposed};
  const Matrix down = {H, I, extents.rows2, extents.columns2, 0, false, p.transposed};
  MOE_RETURN_IF_ERROR(pack_one(device, p.w13, w13, dtype, p.count, gate_up));
  MOE_RETURN_IF_ERROR(pack_one(device, p.w2, w2, dtype, p.count, down));
  if (!p.experts.layout.biases) return Status::Ok();
  MOE_RETURN_IF_ERROR(pack_biases(device, p.b13, to.b13 + slot * 2 * I, p.count, 2 * I, I, interleaved));
  return pack_biases(device, p.b2, to.b2 + slot * H, p.count, H, 0, false);
}

MOE_REGISTER(pack_experts, PackExperts);

}  // namespace moe
