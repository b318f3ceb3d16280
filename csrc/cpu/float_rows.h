// Rows of f32, bf16 or f16 as f32, which is what Kernels::dots reads: widened, and padded with zeros to a multiple of
// kLanes so that inner loops have no tail. Rows that are so already are used where they lie.
#pragma once
#include <cstddef>
#include <cstdint>

#include "backend.h"
#include "kernels.h"

namespace moe {

// As many as the widest vector has.
inline constexpr int64_t kLanes = 16;

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + static_cast<size_t>(index) * size_of(dtype);
}
inline void* element(void* data, DType dtype, int64_t index) {
  return static_cast<char*>(data) + static_cast<size_t>(index) * size_of(dtype);
}

// Widens and writes zeros up to padded(n).
void widen_padded(const Kernels& kernels, const void* from, DType dtype, int64_t n, float* to);

// A window over the rows [*, width] of a tensor. load() fills places of the window; row() then gives them.
class FloatRows {
 public:
  Status reserve(Workspace& workspace, const Tensor& tensor, int64_t width, int64_t places);
  // Rows first .. first+count-1 of the tensor to places at .. at+count-1, on the calling thread.
  void load(const Kernels& kernels, int64_t first, int64_t count, int64_t at);
  const float* row(int64_t index, int64_t place) const {
    return buffer_ == nullptr ? static_cast<const float*>(data_) + index * width_ : buffer_ + place * stride_;
  }
  // Scratch bytes that one place takes.
  static int64_t bytes_per_place(const Tensor& tensor, int64_t width) {
    return in_place(tensor, width) ? 0 : padded(width) * static_cast<int64_t>(sizeof(float));
  }

 private:
  static bool in_place(const Tensor& tensor, int64_t width) {
    return tensor.dtype == DType::kF32 && width % kLanes == 0;
  }

  const void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  int64_t width_ = 0, stride_ = 0;
  float* buffer_ = nullptr;
};

}  // namespace moe
