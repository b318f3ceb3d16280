// fused_moe: dispatch, experts and combine without gathered rows.
//
// Algorithm: tokens are taken in pieces whose activations and f32 expert outputs fit 1 GiB of scratch. Per piece,
// moe_dispatch sorts the choices, the tiles of expert_mlp.cuh read the tokens' rows where they are, and a last launch
// adds every token's columns up in f32, in column order, scales and rounds once. Zero experts and weights_on_input as
// in moe_combine; ids neither local nor zero add nothing. Plain and exact: f32 on ordinary cores. Limits: none of its
// own. NaN and infinities take their course.
#include <algorithm>

#include "expert_mlp.cuh"

namespace moe {

namespace {

constexpr int64_t kScratchBytes = int64_t{1} << 30;
constexpr int kThreads = 256;

struct StoreFloat {
  float* out;
  int64_t H;
  __device__ void operator()(int64_t row, int64_t h, float value) const { out[row * H + h] = value; }
};

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

}  // namespace

Status fused_moe(Backend& backend, const FusedMoe& p) {
  if (p.T == 0 || p.H == 0) return Status::Ok();
  CudaBackend& device = cuda(backend);
  const int64_t C = p.C, S = p.S;
  if (registered_kernel<MoeDispatch> == nullptr) {
    return Status::Error(Code::kUnsupported, "this addon was built without moe_dispatch");
  }
  if (C == 0) return device.fill_zero(p.output.data, static_cast<size_t>(p.T * p.H) * size_of(p.output.dtype));
  backend.note_path("fused_moe", "f32 tiles");

  // Scratch of the largest piece
  const int64_t token_bytes = C * ((p.H + p.I) * int64_t{sizeof(float)} + 16);
  const int64_t tokens = std::clamp<int64_t>(kScratchBytes / token_bytes, 1, std::min<int64_t>(p.T, 1 << 20));
  const int64_t P = tokens * C, most = most_tiles(P, S);
  MOE_RETURN_IF_ERROR(check_tiles(most));
  RowTile* tiles = nullptr;
  int32_t *tile_count = nullptr, *order = nullptr, *inverse = nullptr, *counts = nullptr, *offsets = nullptr;
  float *active = nullptr, *rows = nullptr;
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(most), &tiles));
  MOE_RETURN_IF_ERROR(device.scratch(1, &tile_count));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(P), &order));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(P), &inverse));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(S), &counts));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(S + 1), &offsets));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(P * p.I), &active));
  MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(P * p.H), &rows));

  return with_float(p.hidden.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    for (int64_t first = 0; first < p.T; first += tokens) {
      const FusedMoe piece = piece_of(p, first, std::min(tokens, p.T - first));
      const int64_t places = piece.T * C, tiles_here = most_tiles(places, S);
      MoeDispatch sort{};
      sort.T = piece.T, sort.C = C, sort.P = places;
      sort.ids = piece.ids;
      sort.order = {order, DType::kI32, places};
      sort.inverse = {inverse, DType::kI32, places};
      sort.counts = {counts, DType::kI32, S};
      sort.offsets = {offsets, DType::kI32, S + 1};
      sort.experts = static_cast<int32_t>(S), sort.first_expert = p.first_expert;
      MOE_RETURN_IF_ERROR(registered_kernel<MoeDispatch>(backend, sort));
      MOE_RETURN_IF_ERROR(cut_tiles(device, counts, offsets, S, places, tiles, tile_count));
      RowWeights weights;
      if (p.weights_on_input) weights = {order, piece.weights.as<const float>(), places};
      const RowSource source = {piece.hidden.data, order, C};
      MOE_RETURN_IF_ERROR(
          launch_gate_up<T>(device, source, p.experts, tiles, tile_count, tiles_here, weights, active, nullptr));
      MOE_RETURN_IF_ERROR(
          launch_down(device, active, p.experts, tiles, tile_count, tiles_here, StoreFloat{rows, p.H}));
      const bool wide = p.H % 4 == 0;
      const dim3 grid(static_cast<unsigned>(piece.T),
                      static_cast<unsigned>(std::min<int64_t>(ceil_div(p.H / (wide ? 4 : 1), kThreads), 65535)));
      if (wide) {
        add_columns<T, 4><<<grid, kThreads, 0, device.stream()>>>(piece, rows, inverse);
      } else {
        add_columns<T, 1><<<grid, kThreads, 0, device.stream()>>>(piece, rows, inverse);
      }
      MOE_CUDA_LAUNCHED("fused_moe");
    }
    return Status::Ok();
  });
}

MOE_REGISTER(fused_moe, FusedMoe);

}  // namespace moe
