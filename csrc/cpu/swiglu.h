// The gated activation, in f32: (u + beta) * g * sigmoid(alpha * g), clamped before where there is a limit. NaN
// passes through the clamps.
#pragma once
#include <cmath>
#include <cstdint>

#include "../ops.h"

namespace moe {

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// out[i] = activation of gate[i] and up[i].
inline void swiglu(const SwiGLU& p, const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) {
    float g = gate[i], u = up[i];
    if (p.limit > 0) {
      g = g > p.limit ? p.limit : g;
      u = u > p.limit ? p.limit : u < -p.limit ? -p.limit : u;
    }
    out[i] = (u + p.beta) * (g * sigmoid(p.alpha * g));
  }
}

}  // namespace moe
