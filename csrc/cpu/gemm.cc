#include "gemm.h"

#include <algorithm>

namespace moe {

namespace {

constexpr int64_t kChunk = 512;     // with kWeightRows rows: 16 KiB of widened weights, half of a small L1
constexpr int64_t kWeightRows = 8;
static_assert(kChunk % kLanes == 0);

// n is a multiple of kLanes.
inline float dot(const float* x, const float* w, int64_t n) {
  float sums[kLanes] = {};
  for (int64_t k = 0; k < n; k += kLanes) {
    for (int64_t l = 0; l < kLanes; l++) sums[l] += x[k + l] * w[k + l];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; l++) sums[l] += sums[l + half];
  }
  return sums[0];
}

}  // namespace

void multiply_rows(const float* const* rows, int64_t m, const void* weights, DType dtype, int64_t n, int64_t k,
                   float* out, int64_t stride) {
  if (k == 0) {
    for (int64_t i = 0; i < m; i++) std::fill_n(out + i * stride, n, 0.0f);
    return;
  }
  alignas(64) float widened[kWeightRows][kChunk];
  for (int64_t first = 0; first < n; first += kWeightRows) {
    const int64_t count = std::min(kWeightRows, n - first);
    for (int64_t begin = 0; begin < k; begin += kChunk) {
      const int64_t length = std::min(kChunk, k - begin);
      const bool in_place = dtype == DType::kF32 && length % kLanes == 0;
      const float* chunk[kWeightRows];
      for (int64_t j = 0; j < count; j++) {
        const void* source = element(weights, dtype, (first + j) * k + begin);
        if (!in_place) widen_padded(source, dtype, length, widened[j]);
        chunk[j] = in_place ? static_cast<const float*>(source) : widened[j];
      }
      for (int64_t i = 0; i < m; i++) {
        const float* x = rows[i] + begin;
        float* to = out + i * stride + first;
        for (int64_t j = 0; j < count; j++) {
          const float sum = dot(x, chunk[j], padded(length));
          to[j] = begin == 0 ? sum : to[j] + sum;
        }
      }
    }
  }
}

}  // namespace moe
