#include "expert_mlp.h"

namespace moe {

void project_gate_up(const ExpertsView& experts, int64_t expert, const float* const* rows, int64_t m, int64_t i,
                     int64_t n, const float* row_weights, float* gate, float* up) {
  const int64_t H = experts.layout.H, I = experts.layout.I;
  const float* bias = experts.b13(expert);
  float* const halves[] = {gate, up};
  for (int64_t half = 0; half < 2; half++) {
    float* out = halves[half];
    multiply_rows(rows, m, experts.w13(expert, half * I + i), experts.layout.dtype, n, H, out, n);
    for (int64_t r = 0; r < m && row_weights != nullptr; r++) {
      for (int64_t c = 0; c < n; c++) out[r * n + c] *= row_weights[r];
    }
    for (int64_t r = 0; r < m && bias != nullptr; r++) {
      for (int64_t c = 0; c < n; c++) out[r * n + c] += bias[half * I + i + c];
    }
  }
}

void project_down(const ExpertsView& experts, int64_t expert, const float* const* rows, int64_t m, int64_t h, int64_t n,
                  float* out, int64_t stride) {
  multiply_rows(rows, m, experts.w2(expert, h), experts.layout.dtype, n, experts.layout.I, out, stride);
  const float* bias = experts.b2(expert);
  if (bias == nullptr) return;
  for (int64_t r = 0; r < m; r++) {
    for (int64_t c = 0; c < n; c++) out[r * stride + c] += bias[h + c];
  }
}

}  // namespace moe
