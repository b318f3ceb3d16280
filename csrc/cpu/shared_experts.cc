// shared_experts: out = routed + sigmoid(hidden . expert_gate) * down(swiglu(gate_up(hidden))), a dense MLP.
//
// Algorithm: the groups of moe_experts, with one expert that has every token. Part kGateUp ends after the projection,
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
  LaneGroups loaded(pool, T, H, cpu(backend).scratch_budget());
  const int64_t most_rows = loaded.most_rows(), budget = cpu(backend).scratch_budget() - loaded.bytes();
  const int64_t fitting = std::min(T, budget / (I * int64_t{sizeof(float)}));
  const int64_t piece = std::max<int64_t>(1, fitting / most_rows) * most_rows, room = std::min(piece, T);
  float *active = nullptr, *gates = nullptr, *gate_weight = nullptr, *gate_rows = nullptr;
  Group* groups = nullptr;
  MOE_RETURN_IF_ERROR(workspace.take(ceil_div(piece, most_rows), &groups));
  if (projects) MOE_RETURN_IF_ERROR(loaded.reserve(workspace));
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
    const int64_t here = std::min(piece, T - begin);
    const auto hidden = [&](int64_t row) { return element(p.hidden.data, p.hidden.dtype, (begin + row) * H); };
    int64_t count = 0;
    for_each_part(here, most_rows, [&](int64_t first, int64_t m) { groups[count++] = {0, m, begin + first, first}; });

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

    if (projects) loaded.forget();
    const auto up = [&](const Group& group, int64_t panel) {
      const int64_t i = panel * kHalf, n = std::min(kHalf, I - i);
      float out[kGroupRows * kPanel];
      if (projects) {
        const auto row = [&](int64_t r) { return hidden(group.place + r); };
        const float* x = loaded.load(kernels, group, p.hidden.dtype, row);
        project_gate_up(kernels, experts, 0, x, group.rows, panel, nullptr, out);
      }
      const Tensor& between = projects ? p.projected : p.projected_in;
      for (int64_t r = 0; r < group.rows && p.part != SharedPart::kWhole; r++) {
        float *gate = out + r * kPanel, *up = gate + kHalf;
        void* at = element(between.data, between.dtype, (group.first + r) * 2 * I + i);
        if (projects) {
          kernels.narrow(gate, n, at, between.dtype);
          kernels.narrow(up, n, element(at, between.dtype, I), between.dtype);
        } else {
          std::fill_n(gate, kPanel, 0.0f);
          kernels.widen(at, between.dtype, n, gate);
          kernels.widen(element(at, between.dtype, I), between.dtype, n, up);
        }
      }
      if (finishes) activate(kernels, experts, out, group.rows, panel, active + group.place * I);
    };
    for_each_panel(pool, groups, count, panels13(experts.layout), dtype, H, up);
    if (!finishes) continue;

    const auto down = [&](const Group& group, int64_t panel) {
      const int64_t h = panel * kPanel, n = std::min(kPanel, H - h);
      float out[kGroupRows * kPanel], routed[kPanel];
      project_down(kernels, experts, 0, active + group.place * I, group.rows, panel, out, kPanel);
      for (int64_t r = 0; r < group.rows; r++) {
        const int64_t at = (group.first + r) * H + h;
        float* row = out + r * kPanel;
        if (p.expert_gate) {
          for (int64_t c = 0; c < n; c++) row[c] *= gates[group.place + r];
        }
        if (p.routed) {
          kernels.widen(element(p.routed.data, p.routed.dtype, at), p.routed.dtype, n, routed);
          for (int64_t c = 0; c < n; c++) row[c] += routed[c];
        }
        kernels.narrow(row, n, element(p.output.data, p.output.dtype, at), p.output.dtype);
      }
    };
    for_each_panel(pool, groups, count, panels2(experts.layout), dtype, I, down);
  }
  return cpu(backend).finished();
}

MOE_REGISTER(shared_experts, SharedExperts);

}  // namespace moe
