// shared_experts: out = routed + sigmoid(hidden . expert_gate) * down(swiglu(gate_up(hidden))), a dense MLP.
//
// The path that expert_paths.h chooses, with one expert that has every token; `stream` for part kWhole alone. Part
// kGateUp ends after the projection, biases included, rounded to the dtype of hidden; part kDown begins with it. The
// gate is a warp's dot product per token; the product is scaled, `routed` is added, and the result is rounded once. NaN
// and infinities take their course.
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

// active [T, pitch], zero beyond I.
template <class X, class A>
__global__ void activate(const X* projected, A* active, int64_t T, int64_t I, int64_t pitch, SwiGLU swiglu_of) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < T * pitch; at += step) {
    const int64_t row = at / pitch, i = at % pitch;
    const X* from = projected + row * 2 * I;
    active[at] = narrow<A>(i < I ? swiglu(swiglu_of, widen(from[i]), widen(from[I + i])) : 0.0f);
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

// gates[t] = sigmoid(hidden[t] . expert_gate)
Status launch_gates(CudaBackend& device, const SharedExperts& p, float** gates) {
  if (!p.expert_gate) return Status::Ok();
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.T), gates));
  return with_float(p.hidden.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    return with_float(p.expert_gate.dtype, [&](auto* gate_type) {
      using G = pointee<decltype(gate_type)>;
      compute_gates<T, G><<<static_cast<unsigned>(ceil_div(p.T, 8)), 256, 0, device.stream()>>>(
          p.hidden.as<const T>(), p.expert_gate.as<const G>(), *gates, p.T, p.H);
      MOE_CUDA_LAUNCHED("compute_gates");
      return Status::Ok();
    });
  });
}

// The activations of part kDown, A [T, pitch].
template <class T, class A>
Status launch_activate(CudaBackend& device, const SharedExperts& p, A* active, int64_t pitch) {
  const int64_t blocks = ceil_div(p.T * pitch, 256), enough = 16 * device.sm_count();
  activate<<<static_cast<unsigned>(blocks < enough ? blocks : enough), 256, 0, device.stream()>>>(
      p.projected_in.as<const T>(), active, p.T, p.I, pitch, p.experts.layout.swiglu);
  MOE_CUDA_LAUNCHED("activate");
  return Status::Ok();
}

Status shared_experts_plain(CudaBackend& device, const SharedExperts& p, const float* gates) {
  RowTiles tiles;
  float* active = nullptr;
  MOE_RETURN_IF_ERROR(scratch_tiles(device, mlp::Path::kPlain, p.T, 1, &tiles));
  if (p.part != SharedPart::kGateUp) MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(p.T * p.I), &active));
  MOE_RETURN_IF_ERROR(whole_tiles(device, p.T, tiles));
  return with_float(p.hidden.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    if (p.part == SharedPart::kDown) {
      MOE_RETURN_IF_ERROR(launch_activate<T>(device, p, active, p.I));
    } else {
      const mlp::RowSource source = {p.hidden.data, nullptr, 1};
      MOE_RETURN_IF_ERROR(
          launch_gate_up<T>(device, source, p.experts, tiles, mlp::RowWeights{}, active, p.projected.as<T>()));
    }
    if (p.part == SharedPart::kGateUp) return Status::Ok();
    return launch_down(device, active, p.experts, tiles,
                       FinishToken<T>{p.output.as<T>(), p.routed.as<const T>(), gates, p.H});
  });
}

Status shared_experts_grouped(CudaBackend& device, const SharedExperts& p, const float* gates, mlp::Path path) {
  RowTiles tiles;
  mlp::GroupedCall call{};
  MOE_RETURN_IF_ERROR(scratch_tiles(device, path, p.T, 1, &tiles));
  MOE_RETURN_IF_ERROR(scratch_active(device, p.experts.layout, p.T, &call.active));
  MOE_RETURN_IF_ERROR(whole_tiles(device, p.T, tiles));
  call.source = {p.hidden.data, nullptr, 1};
  call.projected = p.projected.data;
  call.finish = {p.output.data, p.routed.data, gates};
  if (p.part == SharedPart::kDown) {
    call.activated = true;
    MOE_RETURN_IF_ERROR(with_float(p.hidden.dtype, [&](auto* type) {
      using T = pointee<decltype(type)>;
      return launch_activate<T>(device, p, static_cast<T*>(call.active), weight_tiles(p.I) * kWeightTile);
    }));
  }
  return launch_grouped(device, path, p.experts, tiles, p.T, call);
}

mlp::StreamCall stream_call(CudaBackend& device, const SharedExperts& p, const float* gates) {
  mlp::StreamCall call{};
  call.dtype = p.hidden.dtype;
  call.T = p.T, call.C = 1, call.H = p.H, call.I = p.I, call.S = 1;
  call.hidden = p.hidden.data;
  call.experts = view_of(p.experts);
  call.swiglu = p.experts.layout.swiglu;
  call.output_scale = 1.0f;
  call.gates = gates;
  call.routed = p.routed.data;
  call.output = p.output.data;
  call.sm_count = device.sm_count();
  call.counters = device.counters();
  call.stream = device.stream();
  return call;
}

}  // namespace

Status shared_experts(Backend& backend, const SharedExperts& p) {
  if (p.T == 0) return Status::Ok();
  CudaBackend& device = cuda(backend);
  mlp::StreamCall stream = stream_call(device, p, nullptr);
  const bool streamable = p.part == SharedPart::kWhole && !device.two_lanes();
  mlp::Path path{};
  MOE_RETURN_IF_ERROR(
      choose_path({p.hidden.dtype, p.experts.layout.dtype, p.T, 1, 1, p.H, p.I, device.compute_capability(),
                   streamable ? stream_kernel(stream) : mlp::StreamKernel::kNone, device.sm_count()},
                  &path));
  backend.note_path("shared_experts", mlp::name_of(path));
  float* gates = nullptr;
  MOE_RETURN_IF_ERROR(launch_gates(device, p, &gates));
  if (path == mlp::Path::kPlain) return shared_experts_plain(device, p, gates);
  if (path != mlp::Path::kStream) return shared_experts_grouped(device, p, gates, path);
  stream.gates = gates;
  MOE_RETURN_IF_ERROR(device.scratch(mlp::stream_scratch(stream), &stream.scratch));
  MOE_CUDA_CHECK(mlp::launch_stream(stream));
  return Status::Ok();
}

MOE_REGISTER(shared_experts, SharedExperts);

}  // namespace moe
