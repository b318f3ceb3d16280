// shared_experts: out = routed + sigmoid(hidden . expert_gate) * down(swiglu(gate_up(hidden))), a dense MLP.
//
// Algorithm: the tiles of moe_experts with one expert that has every token. Part kGateUp ends after the projection,
// biases included, rounded to the dtype of hidden; part kDown begins with it. The gate is computed per token, the
// product is scaled, `routed` is added, and the result is rounded once. Limits: none. Order of accumulation: gemm.h;
// the gate's sigmoid is that of swiglu.h. NaN and infinities take their course.
#include <algorithm>
#include <cstdint>

#include "expert_mlp.h"

namespace moe {

Status shared_experts(Backend& backend, const SharedExperts& p) {
  const int64_t T = p.T, H = p.H, I = p.I;
  const bool projects = p.part != SharedPart::kDown, finishes = p.part != SharedPart::kGateUp;
  backend.note_path("shared_experts", "portable");
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();

  const int64_t row_bytes = padded(I) * int64_t{sizeof(float)} + FloatRows::bytes_per_place(p.hidden, H);
  const int64_t piece = std::max(kTileRows, std::min(T, cpu(backend).scratch_budget() / row_bytes));
  const bool reads_hidden = projects || p.expert_gate;
  FloatRows hidden;
  float *active = nullptr, *gates = nullptr, *gate_weight = nullptr;
  if (reads_hidden) MOE_RETURN_IF_ERROR(hidden.reserve(workspace, p.hidden, H, std::min(piece, T)));
  if (finishes) MOE_RETURN_IF_ERROR(workspace.take(std::min(piece, T) * padded(I), &active));
  if (p.expert_gate) {
    MOE_RETURN_IF_ERROR(workspace.take(std::min(piece, T), &gates));
    MOE_RETURN_IF_ERROR(workspace.take(padded(H), &gate_weight));
    widen_padded(p.expert_gate.data, p.expert_gate.dtype, H, gate_weight);
  }
  const ExpertsView experts(p.experts);

  for (int64_t begin = 0; begin < T && !pool.cancelled(); begin += piece) {
    const int64_t here = std::min(piece, T - begin), tiles = ceil_div(here, kTileRows);
    const int64_t width = columns_per_task(I), blocks = ceil_div(I, width);
    if (reads_hidden) {
      pool.parallel_for(here, 16, [&](int64_t from, int64_t to) {
        hidden.load(begin + from, to - from, from);
        for (int64_t t = from; t < to && p.expert_gate; t++) {
          const float* x = hidden.row(begin + t, t);
          float logit = 0;
          multiply_rows(&x, 1, gate_weight, DType::kF32, 1, H, &logit, 1);
          gates[t] = sigmoid(logit);
        }
      });
    }

    pool.parallel_for(tiles * blocks, 1, [&](int64_t task, int64_t) {
      const int64_t first = task / blocks * kTileRows, m = std::min(kTileRows, here - first);
      const int64_t i = task % blocks * width, n = std::min(width, I - i);
      float gate[kTileRows * kMostColumns], up[kTileRows * kMostColumns];
      if (projects) {
        const float* x[kTileRows];
        for (int64_t r = 0; r < m; r++) x[r] = hidden.row(begin + first + r, first + r);
        project_gate_up(experts, 0, x, m, i, n, nullptr, gate, up);
      }
      const Tensor& between = projects ? p.projected : p.projected_in;
      for (int64_t r = 0; r < m && p.part != SharedPart::kWhole; r++) {
        const int64_t at = (begin + first + r) * 2 * I + i;
        if (projects) {
          narrow(gate + r * n, n, element(between.data, between.dtype, at), between.dtype);
          narrow(up + r * n, n, element(between.data, between.dtype, at + I), between.dtype);
        } else {
          widen(element(between.data, between.dtype, at), between.dtype, n, gate + r * n);
          widen(element(between.data, between.dtype, at + I), between.dtype, n, up + r * n);
        }
      }
      if (finishes) activate(experts, m, i, n, gate, up, active + first * padded(I));
    });
    if (!finishes) continue;

    const int64_t out_width = columns_per_task(H), out_blocks = ceil_div(H, out_width);
    pool.parallel_for(tiles * out_blocks, 1, [&](int64_t task, int64_t) {
      const int64_t first = task / out_blocks * kTileRows, m = std::min(kTileRows, here - first);
      const int64_t h = task % out_blocks * out_width, n = std::min(out_width, H - h);
      const float* x[kTileRows] = {};
      float out[kTileRows * kMostColumns], routed[kMostColumns];
      for (int64_t r = 0; r < m; r++) x[r] = active + (first + r) * padded(I);
      project_down(experts, 0, x, m, h, n, out, n);
      for (int64_t r = 0; r < m; r++) {
        const int64_t at = (begin + first + r) * H + h;
        float* row = out + r * n;
        if (p.expert_gate) {
          for (int64_t c = 0; c < n; c++) row[c] *= gates[first + r];
        }
        if (p.routed) {
          widen(element(p.routed.data, p.routed.dtype, at), p.routed.dtype, n, routed);
          for (int64_t c = 0; c < n; c++) row[c] += routed[c];
        }
        narrow(row, n, element(p.output.data, p.output.dtype, at), p.output.dtype);
      }
    });
  }
  return cpu(backend).finished();
}

MOE_REGISTER(shared_experts, SharedExperts);

}  // namespace moe
