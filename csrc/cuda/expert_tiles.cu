// Cuts the rows of every expert into tiles: one block, a round for every 1,024 experts with a scan of their numbers of tiles.
#include "expert_tiles.h"

#include <algorithm>

namespace moe {

namespace {

constexpr int kThreads = 1024;

__device__ void clear(int32_t* zeros, int64_t zeroed) {
  for (int64_t i = threadIdx.x; i < zeroed; i += blockDim.x) zeros[i] = 0;
}

// Rows of each tile when `rows` are cut evenly.
__host__ __device__ int even_rows(int rows, int tile_rows) {
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  return tiles == 0 ? 16 : ((rows + tiles - 1) / tiles + 15) / 16 * 16;
}

__global__ void __launch_bounds__(kThreads) cut(const int32_t* counts, const int32_t* offsets, int experts, int P,
                                                int tile_rows, RowTiles out, FaultNote* notes, int32_t* zeros,
                                                int64_t zeroed) {
  __shared__ int of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  clear(zeros, zeroed);
  int before = 0;  // tiles of experts before this round
  for (int first = 0; first < experts; first += kThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    int rows = e < experts ? counts[e] : 0;
    const int place = e < experts ? offsets[e] : 0;
    if (rows < 0) {
      raise_fault(notes, FaultSite::kExpertsCounts, rows, 0, e);
      rows = 0;
    } else if (rows > 0 && (place < 0 || int64_t{place} + rows > P)) {
      raise_fault(notes, FaultSite::kExpertsOffsets, place, P, e, static_cast<int>(int64_t{place} + rows - 1));
      rows = 0;
    }
    const int even = even_rows(rows, tile_rows), mine = (rows + even - 1) / even;
    int sum = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int at = before + sum - mine;
    for (int w = 0; w < 32; w++) {
      if (w < warp) at += of_warp[w];
      before += of_warp[w];
    }
    for (int r = 0; r < mine; r++) {
      if (at + r >= out.most) break;  // counts that overlap could make more tiles than there is room for
      const int left = rows - r * even;
      out.tiles[at + r] = {e, place + r * even, left < even ? left : even};
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *out.count = static_cast<int32_t>(before < out.most ? before : out.most);
}

__global__ void __launch_bounds__(kThreads) cut_whole(int rows, int tile_rows, RowTiles out, int32_t* zeros, int64_t zeroed) {
  clear(zeros, zeroed);
  const int even = even_rows(rows, tile_rows), count = (rows + even - 1) / even;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int left = rows - i * even;
    out.tiles[i] = {0, i * even, left < even ? left : even};
  }
  if (threadIdx.x == 0) *out.count = count;
}

}  // namespace

Status scratch_tiles(CudaBackend& device, int64_t rows, int64_t experts, int tile_rows, RowTiles* out) {
  out->most = most_tiles(rows, experts, tile_rows);
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(std::max<int64_t>(out->most, 1)), &out->tiles));
  return device.scratch(1, &out->count);
}

Status cut_tiles(CudaBackend& device, const int32_t* counts, const int32_t* offsets, int64_t experts, int64_t rows,
                 int tile_rows, const RowTiles& tiles, int32_t* zeros, int64_t zeroed) {
  cut<<<1, kThreads, 0, device.stream()>>>(counts, offsets, static_cast<int>(experts), static_cast<int>(rows), tile_rows, tiles,
                                           device.fault_notes(), zeros, zeroed);
  MOE_CUDA_LAUNCHED("cut_tiles");
  return Status::Ok();
}

Status whole_tiles(CudaBackend& device, int64_t rows, int tile_rows, const RowTiles& tiles, int32_t* zeros, int64_t zeroed) {
  cut_whole<<<1, kThreads, 0, device.stream()>>>(static_cast<int>(rows), tile_rows, tiles, zeros, zeroed);
  MOE_CUDA_LAUNCHED("whole_tiles");
  return Status::Ok();
}

}  // namespace moe
