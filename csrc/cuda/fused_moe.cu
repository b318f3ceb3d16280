// fused_moe: dispatch, experts and combine without gathered rows.
//
// Paths (context.paths() names the one taken; expert_paths.h has the choice):
//   stream         one kernel from ids to output, for few tokens
//   wgmma, mma     moe_dispatch sorts the choices, their rows are cut into tiles, tensor cores read the tokens' rows
//   where
//                  they are and write the experts' outputs in the dtype of `hidden`, moe_combine adds them up
//   plain          the same on ordinary cores, exact f32 products, with the outputs in f32 added up by add_columns
// The grouped paths take tokens in pieces whose activations and outputs fit the scratch. A token's columns are summed
// in f32 in a fixed order; zero experts and weights_on_input as in moe_combine; ids neither local nor zero add nothing.
// Activations between the products are rounded to the dtype of `hidden` on tensor cores. NaN and infinities take their
// course.
#include <algorithm>

#include "expert_mlp.cuh"

namespace moe {

namespace {

// Of activations and outputs: 16,384 tokens of DeepSeek-V3 take 2.2 GiB, and a second piece reads all weights again.
constexpr int64_t kScratchBytes = int64_t{4} << 30;
constexpr int kThreads = 256;

// A block per token, or per slice of one.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) add_columns(FusedMoe p, const float* rows, const int32_t* inverse) {
  const int64_t token = blockIdx.x, C = p.C;
  for (int64_t at = int64_t{blockIdx.y} * kThreads + threadIdx.x; at < p.H / N; at += int64_t{gridDim.y} * kThreads) {
    float sum[N] = {};
    for (int64_t choice = token * C; choice < (token + 1) * C; choice++) {
      const int64_t zero = p.zero > 0 ? int64_t{p.ids.as<const int32_t>()[choice]} - p.first_zero : -1;
      const float w = p.weights.as<const float>()[choice];
      if (zero >= 0 && zero < p.zero) {
        const Vec<T, N> x = load<T, N>(p.hidden.as<const T>() + token * p.H + at * N);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = fmaf(w, widen(x.v[i]), sum[i]);
      } else if (inverse[choice] >= 0) {
        const Vec<float, N> x = load<float, N>(rows + inverse[choice] * p.H + at * N);
        const float factor = p.weights_on_input ? 1.0f : w;
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = fmaf(factor, x.v[i], sum[i]);
      }
    }
    Vec<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) out.v[i] = narrow<T>(sum[i] * p.output_scale);
    store<T, N>(p.output.as<T>() + token * p.H + at * N, out);
  }
}

// The tensors of `p` from token `first` on.
FusedMoe piece_of(const FusedMoe& p, int64_t first, int64_t tokens) {
  FusedMoe piece = p;
  const auto from = [&](Tensor& tensor, int64_t width) {
    tensor.data = static_cast<char*>(tensor.data) + static_cast<size_t>(first * width) * size_of(tensor.dtype);
    tensor.elements = tokens * width;
  };
  piece.T = tokens;
  from(piece.hidden, p.H);
  from(piece.ids, p.C);
  from(piece.weights, p.C);
  from(piece.output, p.H);
  return piece;
}

mlp::StreamCall stream_call(CudaBackend& device, const FusedMoe& p) {
  mlp::StreamCall call{};
  call.dtype = p.hidden.dtype;
  call.T = p.T, call.C = p.C, call.H = p.H, call.I = p.I, call.S = p.S;
  call.hidden = p.hidden.data;
  call.ids = p.ids.as<const int32_t>();
  call.weights = p.weights.as<const float>();
  call.experts = view_of(p.experts);
  call.swiglu = p.experts.layout.swiglu;
  call.first_expert = p.first_expert, call.zero = p.zero, call.first_zero = p.first_zero;
  call.weights_on_input = p.weights_on_input;
  call.output_scale = p.output_scale;
  call.output = p.output.data;
  call.counters = device.counters();
  call.sm_count = device.sm_count();
  call.stream = device.stream();
  return call;
}

// How the choices of a piece are sorted by expert.
struct Sorted {
  int32_t *order = nullptr, *inverse = nullptr, *counts = nullptr, *offsets = nullptr;
};

Status scratch_sorted(CudaBackend& device, int64_t choices, int64_t experts, Sorted* out) {
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(choices), &out->order));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(choices), &out->inverse));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(experts), &out->counts));
  return device.scratch(static_cast<size_t>(experts + 1), &out->offsets);
}

Status sort_choices(Backend& backend, const FusedMoe& p, const Sorted& to) {
  const int64_t places = p.T * p.C;
  MoeDispatch sort{};
  sort.T = p.T, sort.C = p.C, sort.P = places;
  sort.ids = p.ids;
  sort.order = {to.order, DType::kI32, places};
  sort.inverse = {to.inverse, DType::kI32, places};
  sort.counts = {to.counts, DType::kI32, p.S};
  sort.offsets = {to.offsets, DType::kI32, p.S + 1};
  sort.experts = static_cast<int32_t>(p.S), sort.first_expert = p.first_expert;
  return registered_kernel<MoeDispatch>(backend, sort);
}

// How many tokens of `bytes` of scratch each are taken at once.
int64_t tokens_at_once(const FusedMoe& p, int64_t bytes) {
  return std::clamp<int64_t>(kScratchBytes / bytes, 1, std::min<int64_t>(p.T, 1 << 20));
}

Status fused_moe_grouped(Backend& backend, const FusedMoe& p, mlp::Path path) {
  CudaBackend& device = cuda(backend);
  const int64_t C = p.C, S = p.S, wide_i = weight_tiles(p.I) * kWeightTile;
  const auto width = static_cast<int64_t>(size_of(p.hidden.dtype));
  const int64_t tokens = tokens_at_once(p, C * ((p.H + wide_i) * width + 16)), P = tokens * C;
  RowTiles tiles;
  Sorted sorted;
  void *active = nullptr, *rows = nullptr;
  MOE_RETURN_IF_ERROR(scratch_tiles(device, path, P, S, &tiles));
  MOE_RETURN_IF_ERROR(scratch_sorted(device, P, S, &sorted));
  MOE_RETURN_IF_ERROR(scratch_active(device, p.experts.layout, P, &active));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(P * p.H * width), &rows));

  for (int64_t first = 0; first < p.T; first += tokens) {
    const FusedMoe piece = piece_of(p, first, std::min(tokens, p.T - first));
    const int64_t places = piece.T * C;
    MOE_RETURN_IF_ERROR(sort_choices(backend, piece, sorted));
    MOE_RETURN_IF_ERROR(cut_tiles(device, sorted.counts, sorted.offsets, S, places, tiles, true));
    mlp::GroupedCall call{};
    call.source = {piece.hidden.data, sorted.order, static_cast<int32_t>(C)};
    if (p.weights_on_input) call.weights = {sorted.order, piece.weights.as<const float>(), places};
    call.active = active;
    call.finish.out = rows;
    MOE_RETURN_IF_ERROR(launch_grouped(device, path, p.experts, tiles, places, call));
    MoeCombine combine{};
    combine.P = places, combine.H = p.H, combine.T = piece.T, combine.C = C;
    combine.rows = {rows, p.hidden.dtype, places * p.H};
    combine.inverse = {sorted.inverse, DType::kI32, places};
    combine.weights = piece.weights, combine.ids = piece.ids, combine.hidden = piece.hidden;
    combine.output = piece.output;
    combine.output_scale = p.output_scale;
    combine.zero = p.zero, combine.first_zero = p.first_zero;
    combine.weights_on_input = p.weights_on_input;
    MOE_RETURN_IF_ERROR(registered_kernel<MoeCombine>(backend, combine));
  }
  return Status::Ok();
}

Status fused_moe_plain(Backend& backend, const FusedMoe& p) {
  CudaBackend& device = cuda(backend);
  const int64_t C = p.C, S = p.S;
  const int64_t tokens = tokens_at_once(p, C * ((p.H + p.I) * int64_t{sizeof(float)} + 16)), P = tokens * C;
  RowTiles tiles;
  Sorted sorted;
  float *active = nullptr, *rows = nullptr;
  MOE_RETURN_IF_ERROR(scratch_tiles(device, mlp::Path::kPlain, P, S, &tiles));
  MOE_RETURN_IF_ERROR(scratch_sorted(device, P, S, &sorted));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(P * p.I), &active));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(P * p.H), &rows));

  return with_float(p.hidden.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    for (int64_t first = 0; first < p.T; first += tokens) {
      const FusedMoe piece = piece_of(p, first, std::min(tokens, p.T - first));
      const int64_t places = piece.T * C;
      MOE_RETURN_IF_ERROR(sort_choices(backend, piece, sorted));
      MOE_RETURN_IF_ERROR(cut_tiles(device, sorted.counts, sorted.offsets, S, places, tiles, true));
      mlp::RowWeights weights{};
      if (p.weights_on_input) weights = {sorted.order, piece.weights.as<const float>(), places};
      const mlp::RowSource source = {piece.hidden.data, sorted.order, static_cast<int32_t>(C)};
      MOE_RETURN_IF_ERROR(launch_gate_up<T>(device, source, p.experts, tiles, weights, active, nullptr));
      MOE_RETURN_IF_ERROR(launch_down(device, active, p.experts, tiles, StoreRow<float>{rows, p.H}));
      const bool wide = p.H % 4 == 0;
      const dim3 grid(static_cast<unsigned>(piece.T),
                      static_cast<unsigned>(std::min<int64_t>(ceil_div(p.H / (wide ? 4 : 1), kThreads), 65535)));
      if (wide) {
        add_columns<T, 4><<<grid, kThreads, 0, device.stream()>>>(piece, rows, sorted.inverse);
      } else {
        add_columns<T, 1><<<grid, kThreads, 0, device.stream()>>>(piece, rows, sorted.inverse);
      }
      MOE_CUDA_LAUNCHED("fused_moe");
    }
    return Status::Ok();
  });
}

}  // namespace

Status fused_moe(Backend& backend, const FusedMoe& p) {
  if (p.T == 0 || p.H == 0) return Status::Ok();
  CudaBackend& device = cuda(backend);
  if (registered_kernel<MoeDispatch> == nullptr || registered_kernel<MoeCombine> == nullptr) {
    return Status::Error(Code::kUnsupported, "this addon was built without moe_dispatch or moe_combine");
  }
  if (p.C == 0) return device.fill_zero(p.output.data, static_cast<size_t>(p.T * p.H) * size_of(p.output.dtype));
  mlp::StreamCall stream = stream_call(device, p);
  mlp::Path path{};
  MOE_RETURN_IF_ERROR(
      choose_path({p.hidden.dtype, p.experts.layout.dtype, p.T, p.C, p.S, p.H, p.I, device.compute_capability(),
                   device.two_lanes() ? mlp::StreamKernel::kNone : stream_kernel(stream), device.sm_count()},
                  &path));
  if (path == mlp::Path::kStream) {
    MOE_RETURN_IF_ERROR(device.scratch(mlp::stream_scratch(stream), &stream.scratch));
    MOE_CUDA_CHECK(mlp::launch_stream(stream));
  } else if (path == mlp::Path::kPlain) {
    MOE_RETURN_IF_ERROR(fused_moe_plain(backend, p));
  } else {
    MOE_RETURN_IF_ERROR(fused_moe_grouped(backend, p, path));
  }
  backend.note_path("fused_moe", mlp::name_of(path));
  return Status::Ok();
}

MOE_REGISTER(fused_moe, FusedMoe);

}  // namespace moe
