// moe_experts: the expert MLP of every dispatched row.
//
// Algorithm: one block cuts every expert's rows into tiles of 64; then two launches of the tiles of expert_mlp.cuh with
// the activation f32 [P, I] in scratch between them. The weight of a row multiplies the products before the bias.
// Places without a row are zeroed first. Plain and exact: f32 on ordinary cores. Limits: 4 million places. An expert
// whose rows would leave the capacity is dropped and noted (ERR_MOE_RANGE); a row that two experts claim (its value is
// then that of either) and an order outside the choices, which counts as weight 0, are noted. NaN and infinities take their course.
#include "expert_mlp.cuh"

namespace moe {

namespace {

constexpr int kCutThreads = 1024;

__global__ void __launch_bounds__(kCutThreads) cut(const int32_t* counts, const int32_t* offsets, int S, int P,
                                                   RowTile* tiles, int32_t* tile_count, FaultNote* notes) {
  __shared__ int of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;  // tiles of experts before this round
  for (int first = 0; first < S; first += kCutThreads) {
    const int e = first + threadIdx.x;
    int rows = e < S ? counts[e] : 0;
    const int place = e < S ? offsets[e] : 0;
    if (rows < 0) {
      raise_fault(notes, FaultSite::kExpertsCounts, rows, 0, e);
      rows = 0;
    } else if (rows > 0 && (place < 0 || int64_t{place} + rows > P)) {
      raise_fault(notes, FaultSite::kExpertsOffsets, place, P, e, static_cast<int>(int64_t{place} + rows - 1));
      rows = 0;
    }
    const int mine = (rows + kMlpRows - 1) / kMlpRows;
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
      // Counts that overlap could make more tiles than there is room for.
      if (at + r >= min(P, S) + P / kMlpRows) break;
      const int left = rows - r * kMlpRows;
      tiles[at + r] = {e, place + r * kMlpRows, left < kMlpRows ? left : kMlpRows};
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *tile_count = min(before, min(P, S) + P / kMlpRows);
}

__global__ void cut_whole(int T, RowTile* tiles, int32_t* tile_count) {
  const int count = (T + kMlpRows - 1) / kMlpRows;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int left = T - i * kMlpRows;
    tiles[i] = {0, i * kMlpRows, left < kMlpRows ? left : kMlpRows};
  }
  if (threadIdx.x == 0) *tile_count = count;
}

// Notes rows that belong to two experts, and choices that are not there for the rows that count.
__global__ void check_rows(const RowTile* tiles, const int32_t* tile_count, int32_t* taken, RowWeights weights,
                           FaultNote* notes) {
  if (static_cast<int32_t>(blockIdx.x) >= *tile_count) return;
  const RowTile tile = tiles[blockIdx.x];
  if (static_cast<int32_t>(threadIdx.x) >= tile.rows) return;
  const int32_t row = tile.first + static_cast<int32_t>(threadIdx.x);
  if (atomicExch(taken + row, 1) != 0) raise_fault(notes, FaultSite::kExpertsOverlap, row, 0, tile.expert);
  if (weights.order == nullptr) return;
  const int32_t choice = weights.order[row];
  if (choice < 0 || choice >= weights.choices) {
    raise_fault(notes, FaultSite::kExpertsOrder, choice, static_cast<int32_t>(weights.choices), row);
  }
}

template <class T>
struct StoreRow {
  T* out;
  int64_t H;
  __device__ void operator()(int64_t row, int64_t h, float value) const { out[row * H + h] = narrow<T>(value); }
};

}  // namespace

Status cut_tiles(CudaBackend& device, const int32_t* counts, const int32_t* offsets, int64_t S, int64_t P,
                 RowTile* tiles, int32_t* tile_count) {
  cut<<<1, kCutThreads, 0, device.stream()>>>(counts, offsets, static_cast<int>(S), static_cast<int>(P), tiles,
                                             tile_count, device.fault_notes());
  MOE_CUDA_LAUNCHED("cut_tiles");
  return Status::Ok();
}

Status whole_tiles(CudaBackend& device, int64_t T, RowTile* tiles, int32_t* tile_count) {
  cut_whole<<<1, 256, 0, device.stream()>>>(static_cast<int>(T), tiles, tile_count);
  MOE_CUDA_LAUNCHED("whole_tiles");
  return Status::Ok();
}

Status moe_experts(Backend& backend, const MoeExperts& p) {
  if (p.P == 0 || p.H == 0) return Status::Ok();
  if (p.P > INT32_MAX) return Status::Error(Code::kUnsupported, "expected a capacity below 2^31");
  CudaBackend& device = cuda(backend);
  backend.note_path("moe_experts", "f32 tiles");
  const int64_t most = most_tiles(p.P, p.S);
  RowTile* tiles = nullptr;
  int32_t* tile_count = nullptr;
  float* active = nullptr;
  MOE_RETURN_IF_ERROR(check_tiles(most));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(most), &tiles));
  MOE_RETURN_IF_ERROR(device.scratch(1, &tile_count));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.P * p.I), &active));
  MOE_RETURN_IF_ERROR(device.fill_zero(p.output.data, static_cast<size_t>(p.P * p.H) * size_of(p.output.dtype)));
  const int32_t* counts = p.counts.as<const int32_t>();
  MOE_RETURN_IF_ERROR(cut_tiles(device, counts, p.offsets.as<const int32_t>(), p.S, p.P, tiles, tile_count));
  RowWeights weights;
  if (p.order) weights = {p.order.as<const int32_t>(), p.weights.as<const float>(), p.T * p.C};
  int32_t* taken = nullptr;
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.P), &taken));
  MOE_RETURN_IF_ERROR(device.fill_zero(taken, static_cast<size_t>(p.P) * sizeof(int32_t)));
  check_rows<<<static_cast<unsigned>(most), kMlpRows, 0, device.stream()>>>(tiles, tile_count, taken, weights,
                                                                           device.fault_notes());
  MOE_CUDA_LAUNCHED("moe_experts");
  return with_float(p.rows.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    const RowSource source = {p.rows.data, nullptr, 1};
    MOE_RETURN_IF_ERROR(
        launch_gate_up<T>(device, source, p.experts, tiles, tile_count, most, weights, active, nullptr));
    return launch_down(device, active, p.experts, tiles, tile_count, most, StoreRow<T>{p.output.as<T>(), p.H});
  });
}

MOE_REGISTER(moe_experts, MoeExperts);

}  // namespace moe
