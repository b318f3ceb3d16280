// shared_experts: out = routed + sigmoid(hidden . expert_gate) * down(swiglu(gate_up(hidden))), a dense MLP.
//
// Algorithm: the tiles of expert_mlp.cuh with one expert that has every token. Part kGateUp ends after the projection,
// biases included, rounded to the dtype of hidden; part kDown begins with it. The gate is a warp's dot product per
// token; the product is scaled, `routed` is added, and the result is rounded once. Plain and exact: f32 on ordinary
// cores. Limits: 4 million tokens. NaN and infinities take their course.
#include "expert_mlp.cuh"

namespace moe {

namespace {

// A warp per token; partial sums meet in a fixed tree.
template <class X, class G>
__global__ void compute_gates(const X* hidden, const G* weight, float* gates, int64_t T, int64_t H) {
  const int64_t token = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (token >= T) return;
  float sum = 0;
  for (int64_t h = threadIdx.x % 32; h < H; h += 32) sum = fmaf(widen(hidden[token * H + h]), widen(weight[h]), sum);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) gates[token] = sigmoid(sum);
}

template <class X>
__global__ void activate(const X* projected, float* active, int64_t T, int64_t I, SwiGLU swiglu_of) {
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < T * I; at += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = at / I, i = at % I;
    active[at] = swiglu(swiglu_of, widen(projected[row * 2 * I + i]), widen(projected[row * 2 * I + I + i]));
  }
}

template <class T>
struct FinishToken {
  T* out;
  const T* routed;
  const float* gates;
  int64_t H;
  __device__ void operator()(int64_t token, int64_t h, float value) const {
    if (gates != nullptr) value *= gates[token];
    if (routed != nullptr) value += widen(routed[token * H + h]);
    out[token * H + h] = narrow<T>(value);
  }
};

}  // namespace

Status shared_experts(Backend& backend, const SharedExperts& p) {
  if (p.T == 0) return Status::Ok();
  CudaBackend& device = cuda(backend);
  backend.note_path("shared_experts", "f32 tiles");
  const int64_t most = ceil_div(p.T, kMlpRows);
  const bool finishes = p.part != SharedPart::kGateUp;
  RowTile* tiles = nullptr;
  int32_t* tile_count = nullptr;
  float *active = nullptr, *gates = nullptr;
  MOE_RETURN_IF_ERROR(check_tiles(most));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(most), &tiles));
  MOE_RETURN_IF_ERROR(device.scratch(1, &tile_count));
  if (finishes) MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.T * p.I), &active));
  MOE_RETURN_IF_ERROR(whole_tiles(device, p.T, tiles, tile_count));
  return with_float(p.hidden.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    if (p.expert_gate) {
      MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.T), &gates));
      MOE_RETURN_IF_ERROR(with_float(p.expert_gate.dtype, [&](auto* gate_type) {
        using G = pointee<decltype(gate_type)>;
        compute_gates<T, G><<<static_cast<unsigned>(ceil_div(p.T, 8)), 256, 0, device.stream()>>>(
            p.hidden.as<const T>(), p.expert_gate.as<const G>(), gates, p.T, p.H);
        MOE_CUDA_LAUNCHED("compute_gates");
        return Status::Ok();
      }));
    }
    if (p.part == SharedPart::kDown) {
      const int64_t blocks = ceil_div(p.T * p.I, 256), enough = 16 * device.sm_count();
      activate<T><<<static_cast<unsigned>(blocks < enough ? blocks : enough), 256, 0, device.stream()>>>(
          p.projected_in.as<const T>(), active, p.T, p.I, p.experts.layout.swiglu);
      MOE_CUDA_LAUNCHED("activate");
    } else {
      const RowSource source = {p.hidden.data, nullptr, 1};
      MOE_RETURN_IF_ERROR(launch_gate_up<T>(device, source, p.experts, tiles, tile_count, most, RowWeights{}, active,
                                            p.projected.as<T>()));
    }
    if (!finishes) return Status::Ok();
    return launch_down(device, active, p.experts, tiles, tile_count, most,
                       FinishToken<T>{p.output.as<T>(), p.routed.as<const T>(), gates, p.H});
  });
}

MOE_REGISTER(shared_experts, SharedExperts);

}  // namespace moe
