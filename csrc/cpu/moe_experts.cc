// moe_experts: the expert MLP of every dispatched row.
//
// Algorithm: the rows of each expert are cut into groups of at most 128 (expert_mlp.h). Groups are taken in pieces that
// fit the scratch budget; per piece, threads share group x panel tasks that project gate and up and activate into f32
// scratch, and then group x panel tasks that project down and round into the output. The weight of a row multiplies the
// accumulator before the bias. Places without a row are zeroed. Limits: none; an expert's rows may lie anywhere, but
// no place may belong to two of them. Order of accumulation: kernels.h. NaN and infinities take their course.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "expert_mlp.h"

namespace moe {

namespace {

std::string text(int64_t number) { return std::to_string(number); }

Status refuse(const char* arg, const std::string& expectation) {
  return Status::Error(Code::kRange, "expected " + expectation, arg);
}

// Marks the places that hold a row, counts groups, and checks what only the data can tell.
Status check(const MoeExperts& p, uint8_t* taken, int64_t group_rows, int64_t* groups) {
  const int32_t* counts = p.counts.as<const int32_t>();
  const int32_t* offsets = p.offsets.as<const int32_t>();
  std::memset(taken, 0, static_cast<size_t>(p.P));
  for (int64_t e = 0; e < p.S; e++) {
    const int64_t count = counts[e], first = offsets[e];
    if (count < 0) return refuse("counts", "counts[" + text(e) + "] >= 0 but received " + text(count));
    if (count > 0 && (first < 0 || first + count > p.P)) {
      return refuse("offsets", "the rows of expert " + text(e) + " among 0.." + text(p.P - 1) + " but received " +
                                   text(first) + ".." + text(first + count - 1));
    }
    for (int64_t place = first; place < first + count; place++) {
      if (taken[place] != 0) {
        return refuse("offsets", "every row to belong to one expert but row " + text(place) + " of expert " + text(e) +
                                     " belongs to an earlier one too");
      }
      taken[place] = 1;
      if (!p.order) continue;
      const int64_t choice = p.order.as<const int32_t>()[place];
      if (choice < 0 || choice >= p.weights.elements) {
        return refuse("order", "order[" + text(place) + "] among the " + text(p.weights.elements) +
                                   " choices but received " + text(choice));
      }
    }
    *groups += ceil_div(count, group_rows);
  }
  return Status::Ok();
}

}  // namespace

Status moe_experts(Backend& backend, const MoeExperts& p) {
  const int64_t H = p.H, I = p.I;
  const Kernels& kernels = cpu(backend).kernels();
  backend.note_path("moe_experts", kernels.name);
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();
  LaneGroups loaded(pool, p.P, H, cpu(backend).scratch_budget());

  uint8_t* taken = nullptr;
  int64_t count = 0;
  MOE_RETURN_IF_ERROR(workspace.take(p.P, &taken));
  MOE_RETURN_IF_ERROR(check(p, taken, loaded.most_rows(), &count));
  const size_t output_bytes = static_cast<size_t>(H) * size_of(p.output.dtype);
  pool.parallel_for(p.P, std::max<int64_t>(1, 16384 / H), [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; place++) {
      if (taken[place] == 0) std::memset(element(p.output.data, p.output.dtype, place * H), 0, output_bytes);
    }
  });

  // Groups, placed in pieces of at most `room` rows
  const int64_t budget = cpu(backend).scratch_budget() - loaded.bytes();
  const int64_t room = std::max(loaded.most_rows(), std::min(p.P, budget / (I * int64_t{sizeof(float)})));
  Group* groups = nullptr;
  MOE_RETURN_IF_ERROR(workspace.take(count, &groups));
  int64_t filled = 0, place = 0;
  for (int64_t e = 0; e < p.S; e++) {
    const int64_t rows = p.counts.as<const int32_t>()[e], first = p.offsets.as<const int32_t>()[e];
    for_each_part(rows, loaded.most_rows(), [&](int64_t r, int64_t m) {
      if (place + m > room) place = 0;
      groups[filled++] = {e, m, first + r, place};
      place += m;
    });
  }

  float* active = nullptr;
  MOE_RETURN_IF_ERROR(loaded.reserve(workspace));
  MOE_RETURN_IF_ERROR(workspace.take(std::min(room, p.P) * I, &active));
  const ExpertsView experts(p.experts);
  const DType dtype = experts.layout.dtype;
  for (int64_t begin = 0, end = 0; begin < count && !pool.cancelled(); begin = end) {
    for (end = begin + 1; end < count && groups[end].place != 0;) end++;
    const Group* piece = groups + begin;
    const int64_t pieces = end - begin;

    const auto up = [&](const Group& group, int64_t panel) {
      const auto row = [&](int64_t r) { return element(p.rows.data, p.rows.dtype, (group.first + r) * H); };
      const float* x = loaded.load(kernels, group, p.rows.dtype, row);
      float weights[kGroupRows], out[kGroupRows * kPanel];
      for (int64_t r = 0; r < group.rows && p.order; r++) {
        weights[r] = p.weights.as<const float>()[p.order.as<const int32_t>()[group.first + r]];
      }
      project_gate_up(kernels, experts, group.expert, x, group.rows, panel, p.order ? weights : nullptr, out);
      activate(kernels, experts, out, group.rows, panel, active + group.place * I);
    };
    for_each_panel(pool, piece, pieces, panels13(experts.layout), dtype, H, up);

    const auto down = [&](const Group& group, int64_t panel) {
      const int64_t h = panel * kPanel, n = std::min(kPanel, H - h);
      float out[kGroupRows * kPanel];
      project_down(kernels, experts, group.expert, active + group.place * I, group.rows, panel, out, kPanel);
      for (int64_t r = 0; r < group.rows; r++) {
        void* to_row = element(p.output.data, p.output.dtype, (group.first + r) * H + h);
        kernels.narrow(out + r * kPanel, n, to_row, p.output.dtype);
      }
    };
    for_each_panel(pool, piece, pieces, panels2(experts.layout), dtype, I, down);
  }
  return cpu(backend).finished();
}

MOE_REGISTER(moe_experts, MoeExperts);

}  // namespace moe
