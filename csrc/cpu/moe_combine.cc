// moe_combine: out[t] = output_scale * sum over columns c of weights[t, c] * rows[inverse[t, c]].
//
// Algorithm: threads share tokens; a token's columns are added in column order, 512 values at a time, in f32, scaled,
// and rounded once. A zero expert adds weight * hidden[t] in its column, whatever its inverse; weights_on_input makes
// the weight of every other column 1. Limits: none. Columns without a place add nothing, so that their weight may be
// anything; NaN and infinities take their course.
#include <algorithm>
#include <cstdint>
#include <string>

#include "float_rows.h"

namespace moe {

namespace {

bool is_zero_expert(const MoeCombine& p, int64_t choice) {
  if (p.zero == 0) return false;
  const int64_t index = int64_t{p.ids.as<const int32_t>()[choice]} - p.first_zero;
  return index >= 0 && index < p.zero;
}

}  // namespace

Status moe_combine(Backend& backend, const MoeCombine& p) {
  constexpr int64_t kBlock = 512;
  const int64_t T = p.T, C = p.C, H = p.H;
  const int32_t* inverse = p.inverse.as<const int32_t>();
  const Kernels& kernels = cpu(backend).kernels();
  backend.note_path("moe_combine", kernels.name);
  for (int64_t choice = 0; choice < T * C; choice++) {
    if (inverse[choice] < p.P || is_zero_expert(p, choice)) continue;
    return Status::Error(Code::kRange,
                         "expected inverse below " + std::to_string(p.P) + " (capacity from rows) but received " +
                             std::to_string(inverse[choice]),
                         "inverse");
  }
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, H * std::max<int64_t>(C, 1)));
  cpu(backend).pool().parallel_for(T, grain, [&](int64_t begin, int64_t end) {
    float sums[kBlock], row[kBlock];
    for (int64_t t = begin; t < end; t++) {
      for (int64_t h = 0; h < H; h += kBlock) {
        const int64_t n = std::min(kBlock, H - h);
        std::fill_n(sums, n, 0.0f);
        for (int64_t choice = t * C; choice < (t + 1) * C; choice++) {
          float weight = p.weights.as<const float>()[choice];
          if (is_zero_expert(p, choice)) {
            kernels.widen(element(p.hidden.data, p.hidden.dtype, t * H + h), p.hidden.dtype, n, row);
          } else if (inverse[choice] >= 0) {
            kernels.widen(element(p.rows.data, p.rows.dtype, inverse[choice] * H + h), p.rows.dtype, n, row);
            if (p.weights_on_input) weight = 1;
          } else {
            continue;
          }
          kernels.add_scaled(sums, row, weight, n);
        }
        for (int64_t i = 0; i < n; i++) sums[i] *= p.output_scale;
        kernels.narrow(sums, n, element(p.output.data, p.output.dtype, t * H + h), p.output.dtype);
      }
    }
  });
  return cpu(backend).finished();
}

MOE_REGISTER(moe_combine, MoeCombine);

}  // namespace moe
