#include "float_rows.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "../common/float_formats.h"

namespace moe {

namespace {

// The conversions of common/float_formats.h without branches, which is what lets a compiler vectorise these loops.
inline float widen_f16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  const uint32_t mask = 0u - static_cast<uint32_t>(magnitude >= 0x7c00u);
  return std::bit_cast<float>(sign | (special & mask) | (finite & ~mask));
}

inline uint16_t narrow_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  const uint32_t mask = 0u - static_cast<uint32_t>((bits & 0x7fffffffu) > 0x7f800000u);
  return static_cast<uint16_t>((nan & mask) | (rounded & ~mask));
}

}  // namespace

void widen(const void* from, DType dtype, int64_t n, float* to) {
  if (dtype == DType::kF32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBF16) {
    const auto* bits = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; i++) to[i] = std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16);
  } else {
    const auto* bits = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; i++) to[i] = widen_f16(bits[i]);
  }
}

void narrow(const float* from, int64_t n, void* to, DType dtype) {
  if (dtype == DType::kF32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBF16) {
    auto* bits = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; i++) bits[i] = narrow_bf16(from[i]);
  } else {
    auto* bits = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; i++) bits[i] = from_float<f16>(from[i]).bits;
  }
}

void widen_padded(const void* from, DType dtype, int64_t n, float* to) {
  widen(from, dtype, n, to);
  std::fill(to + n, to + padded(n), 0.0f);
}

Status FloatRows::reserve(Workspace& workspace, const Tensor& tensor, int64_t width, int64_t places) {
  data_ = tensor.data;
  dtype_ = tensor.dtype;
  width_ = width;
  stride_ = padded(width);
  if (in_place(tensor, width)) return Status::Ok();
  return workspace.take(places * stride_, &buffer_);
}

void FloatRows::load(int64_t first, int64_t count, int64_t at) {
  if (buffer_ == nullptr) return;
  for (int64_t i = 0; i < count; i++) {
    widen_padded(element(data_, dtype_, (first + i) * width_), dtype_, width_, buffer_ + (at + i) * stride_);
  }
}

}  // namespace moe
