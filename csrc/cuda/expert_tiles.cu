// Cuts the rows of every expert into tiles: one block, a round for every 1,024 experts with a scan of their numbers of
// tiles. The order of tiles is that of a round. A block of no more threads than it takes: it and the block of `wgmma`
// behind it wait for room on a multiprocessor while the kernels before them still run.
#include "expert_tiles.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "expert_items.h"
#include "expert_mlp_stream_few.h"
#include "launch_early.cuh"

namespace moe {

namespace {

constexpr int kThreads = 1024, kFewestThreads = 128;

__device__ void clear_counters(const RowTiles& out) {
  for (int64_t i = threadIdx.x; i < out.counted; i += blockDim.x) out.counters[i] = 0;
}

// Rows of each tile when `rows` are cut evenly.
__host__ __device__ int even_rows(int rows, int tile_rows) {
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  return tiles == 0 ? 16 : ((rows + tiles - 1) / tiles + 15) / 16 * 16;
}

__global__ void __launch_bounds__(kThreads)
    cut(const int32_t* counts, const int32_t* offsets, int experts, int P, RowTiles out, FaultNote* notes) {
  __shared__ long long of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  let_next_kernel_start();
  wait_for_previous_kernel();
  clear_counters(out);
  int before = 0;  // tiles of experts before this round
  for (int first = 0; first < experts; first += static_cast<int>(blockDim.x)) {
    const int e = first + static_cast<int>(threadIdx.x);
    int rows = e < experts ? counts[e] : 0;
    const int place = e < experts ? offsets[e] : 0;
    if (rows < 0) {
      raise_fault(notes, FaultSite::kExpertsCounts, rows, 0, e);
      rows = 0;
    } else if (rows > 0 && (place < 0 || int64_t{place} + rows > P)) {
      const int64_t end = int64_t{place} + rows - 1;
      raise_fault(notes, FaultSite::kExpertsOffsets, place, P, e, static_cast<int>(end < INT32_MAX ? end : INT32_MAX));
      rows = 0;
    }
    const int even = even_rows(rows, out.tile_rows), mine = (rows + even - 1) / even;
    // Tiles of experts with several in the lower half, of experts with one in the upper half.
    const long long own = mine == 1 ? 1ll << 32 : mine;
    long long sum = own, all = 0;
    for (int step = 1; step < 32; step *= 2) {
      const long long other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    sum -= own;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; w++) {
      if (w < warp) sum += of_warp[w];
      all += of_warp[w];
    }
    const int several = static_cast<int>(all), single = static_cast<int>(all >> 32);
    for (int r = 0; r < mine; r++) {
      const int at = before + (mine == 1 ? mlp::place_of_second(static_cast<int>(sum >> 32), several, single)
                                         : mlp::place_of_first(static_cast<int>(sum) + r, several, single));
      if (at >= out.most) break;  // counts that overlap could make more tiles than there is room for
      const int left = rows - r * even;
      out.tiles[at] = {e, place + r * even, left < even ? left : even, mine == 1};
    }
    before += several + single;
    __syncthreads();
  }
  if (threadIdx.x == 0) *out.count = static_cast<int32_t>(before < out.most ? before : out.most);
}

__global__ void __launch_bounds__(kThreads) cut_whole(int rows, RowTiles out) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  clear_counters(out);
  const int even = even_rows(rows, out.tile_rows), count = (rows + even - 1) / even;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int left = rows - i * even;
    out.tiles[i] = {0, i * even, left < even ? left : even, count == 1};
  }
  if (threadIdx.x == 0) *out.count = count;
}

}  // namespace

mlp::StreamKernel stream_kernel(const mlp::StreamCall& call) {
  if (!mlp::stream_takes(call)) return mlp::StreamKernel::kNone;
  return mlp::few_takes(call) ? mlp::StreamKernel::kFew : mlp::StreamKernel::kMany;
}

Status choose_path(const mlp::Shape& shape, mlp::Path* out) {
  const char* wanted = std::getenv("MOE_KERNELS_CUDA_EXPERTS");
  if (mlp::choose(shape, wanted, out)) return Status::Ok();
  return Status::Error(
      Code::kInvalidArg,
      std::string("expected MOE_KERNELS_CUDA_EXPERTS: one of ") + mlp::kPathNames + " but received '" + wanted + "'",
      "MOE_KERNELS_CUDA_EXPERTS");
}

Status scratch_tiles(CudaBackend& device, mlp::Path path, int64_t rows, int64_t experts, RowTiles* out) {
  out->tile_rows = mlp::tile_rows(path, rows, experts);
  out->most = most_tiles(rows, experts, out->tile_rows);
  out->counted = path == mlp::Path::kWgmma ? mlp::wgmma_counters(out->most, device.sm_count()) : 0;
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(std::max<int64_t>(out->most, 1)), &out->tiles));
  if (path == mlp::Path::kWgmma) {
    MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(out->counted), &out->counters));
    const int64_t floats = mlp::wgmma_part_floats(rows, device.sm_count());
    MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(floats), &out->parts));
  }
  return device.scratch(1, &out->count);
}

Status cut_tiles(CudaBackend& device, const int32_t* counts, const int32_t* offsets, int64_t experts, int64_t rows,
                 const RowTiles& tiles, bool early) {
  const auto threads = static_cast<unsigned>(std::clamp<int64_t>((experts + 31) / 32 * 32, kFewestThreads, kThreads));
  MOE_CUDA_CHECK(launch_early(early && device.compute_capability() >= 90, cut, 1, threads, 0, device.stream(), counts,
                              offsets, static_cast<int>(experts), static_cast<int>(rows), tiles, device.fault_notes()));
  return Status::Ok();
}

Status whole_tiles(CudaBackend& device, int64_t rows, const RowTiles& tiles) {
  cut_whole<<<1, kThreads, 0, device.stream()>>>(static_cast<int>(rows), tiles);
  MOE_CUDA_LAUNCHED("whole_tiles");
  return Status::Ok();
}

Status scratch_active(CudaBackend& device, const ExpertsLayout& layout, int64_t rows, void** out) {
  return device.scratch(static_cast<size_t>(rows * weight_tiles(layout.I) * kWeightTile) * size_of(layout.dtype), out);
}

Status launch_grouped(CudaBackend& device, mlp::Path path, const Experts& experts, const RowTiles& tiles, int64_t rows,
                      mlp::GroupedCall call) {
  call.dtype = experts.layout.dtype;
  call.H = experts.layout.H, call.I = experts.layout.I;
  call.experts = view_of(experts);
  call.swiglu = experts.layout.swiglu;
  call.tiles = tiles.tiles, call.tile_count = tiles.count, call.most_tiles = tiles.most;
  call.tile_rows = tiles.tile_rows;
  call.rows = rows;
  call.counters = tiles.counters, call.parts = tiles.parts;
  call.sm_count = device.sm_count();
  call.stream = device.stream();
  if (path == mlp::Path::kWgmma) {
    MOE_CUDA_CHECK(mlp::launch_wgmma(call));
  } else {
    MOE_CUDA_CHECK(mlp::launch_mma(call));
  }
  return Status::Ok();
}

}  // namespace moe
