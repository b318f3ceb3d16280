#include "float_rows.h"

#include <algorithm>

namespace moe {

void widen_padded(const Kernels& kernels, const void* from, DType dtype, int64_t n, float* to) {
  kernels.widen(from, dtype, n, to);
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

void FloatRows::load(const Kernels& kernels, int64_t first, int64_t count, int64_t at) {
  if (buffer_ == nullptr) return;
  for (int64_t i = 0; i < count; i++) {
    widen_padded(kernels, element(data_, dtype_, (first + i) * width_), dtype_, width_, buffer_ + (at + i) * stride_);
  }
}

}  // namespace moe
