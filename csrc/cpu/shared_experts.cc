// shared_experts: out = routed + sigmoid(hidden . expert_gate) * down(swiglu(gate_up(hidden))), a dense MLP.
//
// Algorithm: the groups of moe_experts with one expert that has every token. Part kGateUp ends after the projection,
// biases included, rounded to the dtype of hidden; part kDown begins with it. The gate is computed per token, the
// product is scaled, `routed` is added, and the result is rounded once. Limits: none. Order of accumulation: kernels.h.
// NaN and infinities take their course.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "expert_mlp.h"

namespace moe {

Status shared_experts(Backend& backend, const SharedExperts& p) {
  const int64_t T = p.T, H = p.H, I = p.I;
  const bool projects = p.part != SharedPart::kDown, finishes = p.part != SharedPart::kGateUp;
  const Kernels& kernels = cpu(backend).kernels();
  backend.note_path("shared_experts", kernels.name);
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();

  // Pieces of whole groups
  const int64_t row_bytes = (H + I) * int64_t{sizeof(float)};
  const int64_t fitting = std::min(T, cpu(backend).scratch_budget() / row_bytes);
  const int64_t piece = std::max<int64_t>(1, fitting / kGroupRows) * kGroupRows, room = std::min(piece, T);
  float *x = nullptr, *active = nullptr, *gates = nullptr, *gate_weight = nullptr, *gate_rows = nullptr;
  if (projects) MOE_RETURN_IF_ERROR(workspace.take(room * H, &x));
  if (finishes) MOE_RETURN_IF_ERROR(workspace.take(room * I, &active));
  if (p.expert_gate) {
    MOE_RETURN_IF_ERROR(workspace.take(room, &gates));
    MOE_RETURN_IF_ERROR(workspace.take(padded(H), &gate_weight));
    MOE_RETURN_IF_ERROR(workspace.take(padded(H) * pool.threads(), &gate_rows));
    widen_padded(kernels, p.expert_gate.data, p.expert_gate.dtype, H, gate_weight);
  }
  const ExpertsView experts(p.experts);
  const DType dtype = experts.layout.dtype;

  for (int64_t begin = 0; begin < T && !pool.cancelled(); begin += piece) {
    const int64_t here = std::min(piece, T - begin), groups = ceil_div(here, kGroupRows);
    const auto rows_of = [&](int64_t group) { return std::min(kGroupRows, here - group * kGroupRows); };
    const auto hidden = [&](int64_t row) { return element(p.hidden.data, p.hidden.dtype, (begin + row) * H); };

    if (projects) {
      pool.parallel_for(groups, 1, [&](int64_t group, int64_t) {
        const void* rows[kGroupRows];
        for (int64_t r = 0; r < rows_of(group); r++) rows[r] = hidden(group * kGroupRows + r);
        load_group(kernels, rows, rows_of(group), p.hidden.dtype, H, x + group * kGroupRows * H);
      });
    }
    if (p.expert_gate) {
      pool.parallel_for(here, 16, [&](int64_t from, int64_t to) {
        float* row = gate_rows + ThreadPool::lane() * padded(H);
        for (int64_t t = from; t < to; t++) {
          widen_padded(kernels, hidden(t), p.hidden.dtype, H, row);
          const float* rows = row;
          float logit = 0;
          kernels.dots(&rows, 1, gate_weight, DType::kF32, 1, H, &logit, 1);
          gates[t] = 1.0f / (1.0f + std::exp(-logit));
        }
      });
    }

    const int64_t panels = panels13(experts.layout), grain = panels_per_task(H, dtype, groups * panels);
    pool.parallel_for(groups * panels, grain, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; task++) {
        const int64_t first = task / panels * kGroupRows, m = rows_of(task / panels), panel = task % panels;
        const int64_t i = panel * kHalf, n = std::min(kHalf, I - i);
        float out[kGroupRows * kPanel];
        if (projects) project_gate_up(kernels, experts, 0, x + first * H, m, panel, nullptr, out);
        const Tensor& between = projects ? p.projected : p.projected_in;
        for (int64_t r = 0; r < m && p.part != SharedPart::kWhole; r++) {
          float *gate = out + r * kPanel, *up = gate + kHalf;
          void* at = element(between.data, between.dtype, (begin + first + r) * 2 * I + i);
          if (projects) {
            kernels.narrow(gate, n, at, between.dtype);
            kernels.narrow(up, n, element(at, between.dtype, I), between.dtype);
          } else {
            std::fill_n(gate, kPanel, 0.0f);
            kernels.widen(at, between.dtype, n, gate);
            kernels.widen(element(at, between.dtype, I), between.dtype, n, up);
          }
        }
        if (finishes) activate(kernels, experts, out, m, panel, active + first * I);
      }
    });
    if (!finishes) continue;

    const int64_t out_panels = panels2(experts.layout), out_grain = panels_per_task(I, dtype, groups * out_panels);
    pool.parallel_for(groups * out_panels, out_grain, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; task++) {
        const int64_t first = task / out_panels * kGroupRows, m = rows_of(task / out_panels);
        const int64_t h = task % out_panels * kPanel, n = std::min(kPanel, H - h);
        float out[kGroupRows * kPanel], routed[kPanel];
        project_down(kernels, experts, 0, active + first * I, m, task % out_panels, out);
        for (int64_t r = 0; r < m; r++) {
          const int64_t at = (begin + first + r) * H + h;
          float* row = out + r * kPanel;
          if (p.expert_gate) {
            for (int64_t c = 0; c < n; c++) row[c] *= gates[first + r];
          }
          if (p.routed) {
            kernels.widen(element(p.routed.data, p.routed.dtype, at), p.routed.dtype, n, routed);
            for (int64_t c = 0; c < n; c++) row[c] += routed[c];
          }
          kernels.narrow(row, n, element(p.output.data, p.output.dtype, at), p.output.dtype);
        }
      }
    });
  }
  return cpu(backend).finished();
}

MOE_REGISTER(shared_experts, SharedExperts);

}  // namespace moe
