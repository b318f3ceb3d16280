// moe_experts: the expert MLP of every dispatched row.
//
// One block cuts every expert's rows into tiles; then the two products of the path that expert_paths.h chooses (never
// `stream`: the rows are sorted already), with the activations [P, I] in scratch between them: f32 on `plain`, else in
// the dtype of the rows. The weight of a row multiplies the products before the bias. Places without a row become 0. An
// expert whose rows would leave the capacity is dropped and noted (ERR_MOE_RANGE); a row that two experts claim (its
// value then has no meaning) and an order outside the choices, which counts as weight 0, are noted. NaN and infinities
// take their course. Limits: below 2^31 places.
#include "expert_mlp.cuh"

namespace moe {

namespace {

constexpr int kThreads = 256;

// Marks the rows of every tile; notes those that belong to two experts, and choices that are not there.
__global__ void __launch_bounds__(kThreads) mark_rows(const mlp::RowTile* tiles, const int32_t* tile_count,
                                                      int32_t* taken, mlp::RowWeights weights, FaultNote* notes) {
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
__global__ void __launch_bounds__(kThreads)
    clear_rows(const int32_t* taken, int64_t P, uint16_t* output, int64_t halves) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; row < P; row += warps) {
    if (taken[row] != 0) continue;
    for (int64_t i = threadIdx.x % 32; i < halves; i += 32) output[row * halves + i] = 0;
  }
}

}  // namespace

Status moe_experts(Backend& backend, const MoeExperts& p) {
  if (p.P == 0 || p.H == 0) return Status::Ok();
  if (p.P > INT32_MAX) return Status::Error(Code::kUnsupported, "expected a capacity below 2^31");
  CudaBackend& device = cuda(backend);
  mlp::Path path{};
  MOE_RETURN_IF_ERROR(choose_path({p.rows.dtype, p.experts.layout.dtype, p.P, 1, p.S, p.H, p.I,
                                   device.compute_capability(), mlp::StreamKernel::kNone, device.sm_count()},
                                  &path));
  backend.note_path("moe_experts", mlp::name_of(path));
  RowTiles tiles;
  int32_t* taken = nullptr;
  MOE_RETURN_IF_ERROR(scratch_tiles(device, path, p.P, p.S, &tiles));
  MOE_RETURN_IF_ERROR(
      cut_tiles(device, p.counts.as<const int32_t>(), p.offsets.as<const int32_t>(), p.S, p.P, tiles, false));
  mlp::RowWeights weights{};
  if (p.order) weights = {p.order.as<const int32_t>(), p.weights.as<const float>(), p.T * p.C};
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.P), &taken));
  MOE_RETURN_IF_ERROR(device.fill_zero(taken, static_cast<size_t>(p.P) * sizeof(int32_t)));
  const auto blocks = [enough = int64_t{8} * device.sm_count()](int64_t most) {
    return static_cast<unsigned>(most < enough ? most : enough);
  };
  mark_rows<<<blocks(tiles.most), kThreads, 0, device.stream()>>>(tiles.tiles, tiles.count, taken, weights,
                                                                  device.fault_notes());
  MOE_CUDA_LAUNCHED("moe_experts");
  clear_rows<<<blocks(ceil_div(p.P, kThreads / 32)), kThreads, 0, device.stream()>>>(
      taken, p.P, p.output.as<uint16_t>(), p.H * static_cast<int64_t>(size_of(p.rows.dtype)) / 2);
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
  mlp::GroupedCall call{};
  call.source = source;
  call.weights = weights;
  call.finish.out = p.output.data;
  MOE_RETURN_IF_ERROR(scratch_active(device, p.experts.layout, p.P, &call.active));
  return launch_grouped(device, path, p.experts, tiles, p.P, call);
}

MOE_REGISTER(moe_experts, MoeExperts);

}  // namespace moe
