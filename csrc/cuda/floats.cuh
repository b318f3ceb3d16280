// Float dtypes on the device: widening, rounding to nearest even, vectors of 16 bytes, and the choice of a template by
// the dtype of a tensor. Kernels compute in f32 whatever comes in.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../ops.h"

namespace moe {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// N elements that are loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// Plain accesses of a whole vector: on Hopper they streamed 3 to 7 % faster than any cache hint that was tried.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& value) {
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

// Calls fn with a null pointer of the C++ type of a float dtype.
template <class F>
Status with_float(DType dtype, F&& fn) {
  switch (dtype) {
    case DType::kF32: return fn(static_cast<float*>(nullptr));
    case DType::kBF16: return fn(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kF16: return fn(static_cast<__half*>(nullptr));
    default: return Status::Error(Code::kInternal, "not a float dtype");
  }
}
template <class Pointer>
using pointee = std::remove_pointer_t<Pointer>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace moe
