// The activation of an expert, and what a row's products are multiplied by.
#pragma once
#include "expert_mlp.h"

namespace moe {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float swiglu(const SwiGLU& p, float g, float u) {
  if (p.limit > 0) {
    g = g > p.limit ? p.limit : g;
    u = u > p.limit ? p.limit : u < -p.limit ? -p.limit : u;
  }
  return (u + p.beta) * (g * sigmoid(p.alpha * g));
}

__device__ __forceinline__ float weight_of(const mlp::RowWeights& weights, int64_t row) {
  if (weights.order == nullptr) return 1.0f;
  const int32_t choice = weights.order[row];
  return choice >= 0 && choice < weights.choices ? weights.weights[choice] : 0.0f;
}

// The row of the source that row `row` is.
__device__ __forceinline__ int64_t source_of(const mlp::RowSource& source, int64_t row) {
  return source.order == nullptr ? row : source.order[row] / source.columns;
}

}  // namespace moe
