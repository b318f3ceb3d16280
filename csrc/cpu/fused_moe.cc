// fused_moe: dispatch, experts and combine without gathered rows and without expert outputs in memory.
//
// Algorithm: tokens are taken in pieces that fit the scratch budget. Per piece, the local choices are counting-sorted
// by expert and cut into groups of at most 128 rows (expert_mlp.h), which threads load from where the tokens' rows are.
// Threads share group x panel tasks, first gate, up and activation, then down, all into f32 scratch; and then tokens,
// whose columns are added up in column order before anything is rounded. So f32 gives the bits of moe_dispatch,
// moe_experts and moe_combine; narrow dtypes are rounded once instead of twice. Zero experts and weights_on_input as in
// moe_combine; ids neither local nor zero add nothing. Limits: T * C of one piece below 2^31. Order of accumulation:
// kernels.h, then column order.
#include <algorithm>
#include <cstdint>

#include "expert_mlp.h"

namespace moe {

namespace {

constexpr int32_t kNowhere = -1;     // not local: adds nothing
constexpr int32_t kZeroExpert = -2;  // adds weight * hidden

}  // namespace

Status fused_moe(Backend& backend, const FusedMoe& p) {
  const int64_t T = p.T, C = p.C, H = p.H, S = p.S, I = p.I;
  const int32_t* ids = p.ids.as<const int32_t>();
  const float* weights = p.weights.as<const float>();
  const Kernels& kernels = cpu(backend).kernels();
  backend.note_path("fused_moe", kernels.name);
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();
  const ExpertsView experts(p.experts);
  const DType dtype = experts.layout.dtype;

  // Scratch
  const int64_t width = panels2(experts.layout) * kPanel;  // of a row of results
  const int64_t choice_bytes = (width + I) * int64_t{sizeof(float)} + 16;
  LaneGroups loaded(pool, T * C, H, cpu(backend).scratch_budget());
  const int64_t budget = cpu(backend).scratch_budget() - loaded.bytes();
  const int64_t fitting = budget / std::max<int64_t>(C * choice_bytes, 1);
  const int64_t piece = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(T, 1));
  const int64_t room = piece * C;
  float *results = nullptr, *active = nullptr, *row_weights = nullptr;
  int32_t *places = nullptr, *tokens = nullptr, *next = nullptr;
  Group* groups = nullptr;
  MOE_RETURN_IF_ERROR(loaded.reserve(workspace));
  MOE_RETURN_IF_ERROR(workspace.take(room * I, &active));
  MOE_RETURN_IF_ERROR(workspace.take(room * width, &results));
  MOE_RETURN_IF_ERROR(workspace.take(room, &places));       // of each choice
  MOE_RETURN_IF_ERROR(workspace.take(room, &tokens));       // of each place, within the piece
  MOE_RETURN_IF_ERROR(workspace.take(room, &row_weights));  // of each place
  MOE_RETURN_IF_ERROR(workspace.take(S + 1, &next));
  MOE_RETURN_IF_ERROR(workspace.take(std::min(S, room) + room / loaded.most_rows(), &groups));

  for (int64_t begin = 0; begin < T && !pool.cancelled(); begin += piece) {
    const int64_t here = std::min(piece, T - begin), choices = here * C;
    const auto hidden = [&](int64_t token, int64_t h) {
      return element(p.hidden.data, p.hidden.dtype, (begin + token) * H + h);
    };

    // Sort the choices
    std::fill_n(next, S + 1, 0);
    for (int64_t choice = 0; choice < choices; choice++) {
      const int64_t id = ids[begin * C + choice], zero = id - p.first_zero, expert = id - p.first_expert;
      places[choice] = kNowhere;
      if (p.zero > 0 && zero >= 0 && zero < p.zero) {
        places[choice] = kZeroExpert;
      } else if (id >= 0 && expert >= 0 && expert < S) {
        places[choice] = 0;
        next[expert + 1]++;
      }
    }
    int64_t count = 0;
    for (int64_t e = 0; e < S; e++) {
      const int64_t first = next[e], rows = next[e + 1];
      next[e + 1] += next[e];
      for_each_part(rows, loaded.most_rows(),
                    [&](int64_t r, int64_t m) { groups[count++] = {e, m, first + r, first + r}; });
    }
    for (int64_t choice = 0; choice < choices; choice++) {
      if (places[choice] < 0) continue;
      const int32_t place = next[ids[begin * C + choice] - p.first_expert]++;
      places[choice] = place;
      tokens[place] = static_cast<int32_t>(choice / C);
      row_weights[place] = weights[begin * C + choice];
    }

    loaded.forget();
    const auto up = [&](const Group& group, int64_t panel) {
      const auto row = [&](int64_t r) { return hidden(tokens[group.place + r], 0); };
      const float* x = loaded.load(kernels, group, p.hidden.dtype, row);
      float out[kGroupRows * kPanel];
      project_gate_up(kernels, experts, group.expert, x, group.rows, panel,
                      p.weights_on_input ? row_weights + group.place : nullptr, out);
      activate(kernels, experts, out, group.rows, panel, active + group.place * I);
    };
    for_each_panel(pool, groups, count, panels13(experts.layout), dtype, H, up);

    const auto down = [&](const Group& group, int64_t panel) {
      project_down(kernels, experts, group.expert, active + group.place * I, group.rows, panel,
                   results + group.place * width + panel * kPanel, width);
    };
    for_each_panel(pool, groups, count, panels2(experts.layout), dtype, I, down);

    pool.parallel_for(here, std::max<int64_t>(1, 32768 / (H * std::max<int64_t>(C, 1))), [&](int64_t from, int64_t to) {
      constexpr int64_t kBlock = 1024;
      float sums[kBlock], row[kBlock];
      for (int64_t t = from; t < to; t++) {
        for (int64_t h = 0; h < H; h += kBlock) {
          const int64_t n = std::min(kBlock, H - h);
          std::fill_n(sums, n, 0.0f);
          for (int64_t choice = t * C; choice < (t + 1) * C; choice++) {
            const float weight = weights[begin * C + choice];
            if (places[choice] == kZeroExpert) {
              kernels.widen(hidden(t, h), p.hidden.dtype, n, row);
              kernels.add_scaled(sums, row, weight, n);
            } else if (places[choice] != kNowhere) {
              kernels.add_scaled(sums, results + places[choice] * width + h, p.weights_on_input ? 1.0f : weight, n);
            }
          }
          for (int64_t i = 0; i < n; i++) sums[i] *= p.output_scale;
          kernels.narrow(sums, n, element(p.output.data, p.output.dtype, (begin + t) * H + h), p.output.dtype);
        }
      }
    });
  }
  return cpu(backend).finished();
}

MOE_REGISTER(fused_moe, FusedMoe);

}  // namespace moe
