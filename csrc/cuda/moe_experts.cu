// moe_experts: the expert MLP of every dispatched row.
//
// One block cuts every expert's rows into tiles; then the two products of the path that expert_paths.h chooses (never
// `stream`: the rows are sorted already), with the activations [P, I] in scratch between them: f32 on `plain`, else in the
// dtype of the rows. The weight of a row multiplies the products before the bias. Places without a row become 0. An expert
// whose rows would leave the capacity is dropped and noted (ERR_MOE_RANGE); a row that two experts claim (its value is then
// that of either) and an order outside the choices, which counts as weight 0, are noted. NaN and infinities take their
// course. Limits: below 2^31 places, on `plain` 4 million.
#include "expert_mlp.cuh"
#include "expert_paths.h"

namespace moe {

namespace {

constexpr int kThreads = 256;

// Marks the rows of every tile; notes those that belong to two experts, and choices that are not there.
__global__ void __launch_bounds__(kThreads) mark_rows(const mlp::RowTile* tiles, const int32_t* tile_count, int32_t* taken,
                                                      mlp::RowWeights weights, FaultNote* notes) {
  for (int t = static_cast<int>(blockIdx.x); t < *tile_count; t += static_cast<int>(gridDim.x)) {
    const mlp::RowTile tile = tiles[t];
    for (int r = static_cast<int>(threadIdx.x); r < tile.rows; r += kThreads) {
      const int32_t row = tile.first + r;
      if (atomicExch(taken + row, 1) != 0) raise_fault(notes, FaultSite::kExpertsOverlap, row, 0, tile.expert);
      if (weights.order == nullptr) continue;
      const int32_t choice = weights.order[row];
      if (choice < 0 || choice >= weights.choices) {
        raise_fault(notes, FaultSite::kExpertsOrder, choice, static_cast<int32_t>(weights.choices), row);
      }
    }
  }
}

// Rows that no expert has: H * width bytes of zeros each. A warp per row.
__global__ void __launch_bounds__(kThreads) clear_rows(const int32_t* taken, int64_t P, uint16_t* output, int64_t halves) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; row < P; row += warps) {
    if (taken[row] != 0) continue;
    for (int64_t i = threadIdx.x % 32; i < halves; i += 32) output[row * halves + i] = 0;
  }
}

template <class T>
struct StoreRow {
  T* out;
  int64_t H;
  __device__ void operator()(int64_t row, int64_t h, float value) const { out[row * H + h] = narrow<T>(value); }
};

}  // namespace

Status moe_experts(Backend& backend, const MoeExperts& p) {
  if (p.P == 0 || p.H == 0) return Status::Ok();
  if (p.P > INT32_MAX) return Status::Error(Code::kUnsupported, "expected a capacity below 2^31");
  CudaBackend& device = cuda(backend);
  const mlp::Path path = mlp::choose({p.rows.dtype, p.experts.layout.dtype, p.P, 1, p.S, p.H, p.I,
                                      device.compute_capability(), false});
  backend.note_path("moe_experts", mlp::name_of(path));
  const int tile_rows = mlp::tile_rows(path, p.P, p.S);
  const auto width = static_cast<int64_t>(size_of(p.rows.dtype));
  RowTiles tiles;
  int32_t *counters = nullptr, *taken = nullptr;
  MOE_RETURN_IF_ERROR(scratch_tiles(device, p.P, p.S, tile_rows, &tiles));
  const int64_t counted = path == mlp::Path::kWgmma ? mlp::wgmma_counters(tiles.most) : 0;
  if (counted > 0) MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(counted), &counters));
  MOE_RETURN_IF_ERROR(cut_tiles(device, p.counts.as<const int32_t>(), p.offsets.as<const int32_t>(), p.S, p.P, tile_rows,
                                tiles, counters, counted));
  mlp::RowWeights weights{};
  if (p.order) weights = {p.order.as<const int32_t>(), p.weights.as<const float>(), p.T * p.C};
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.P), &taken));
  MOE_RETURN_IF_ERROR(device.fill_zero(taken, static_cast<size_t>(p.P) * sizeof(int32_t)));
  const auto blocks = [&](int64_t most) { return static_cast<unsigned>(most < 8 * device.sm_count() ? most : 8 * device.sm_count()); };
  mark_rows<<<blocks(tiles.most), kThreads, 0, device.stream()>>>(tiles.tiles, tiles.count, taken, weights,
                                                                 device.fault_notes());
  MOE_CUDA_LAUNCHED("moe_experts");
  clear_rows<<<blocks(ceil_div(p.P, kThreads / 32)), kThreads, 0, device.stream()>>>(taken, p.P, p.output.as<uint16_t>(),
                                                                                   p.H * width / 2);
  MOE_CUDA_LAUNCHED("moe_experts");
  const mlp::RowSource source = {p.rows.data, nullptr, 1};
  if (path == mlp::Path::kPlain) {
    float* active = nullptr;
    MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.P * p.I), &active));
    return with_float(p.rows.dtype, [&](auto* type) {
      using T = pointee<decltype(type)>;
      MOE_RETURN_IF_ERROR(launch_gate_up<T>(device, source, p.experts, tiles, weights, active, nullptr));
      return launch_down(device, active, p.experts, tiles, StoreRow<T>{p.output.as<T>(), p.H});
    });
  }
  char* active = nullptr;
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.P * weight_tiles(p.I) * kWeightTile * width), &active));
  mlp::GroupedCall call{};
  call.dtype = p.rows.dtype;
  call.H = p.H, call.I = p.I;
  call.experts = view_of(p.experts);
  call.swiglu = p.experts.layout.swiglu;
  call.source = source;
  call.weights = weights;
  call.tiles = tiles.tiles, call.tile_count = tiles.count, call.most_tiles = tiles.most;
  call.tile_rows = tile_rows;
  call.rows = p.P;
  call.active = active;
  call.finish.out = p.output.data;
  call.counters = counters;
  call.sm_count = device.sm_count();
  call.stream = device.stream();
  MOE_CUDA_CHECK(path == mlp::Path::kWgmma ? mlp::launch_wgmma(call) : mlp::launch_mma(call));
  return Status::Ok();
}

MOE_REGISTER(moe_experts, MoeExperts);

}  // namespace moe
