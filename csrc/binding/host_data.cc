#include "host_data.h"

#include <cstring>
#include <string>

#include "../common/float_formats.h"
#include "context.h"

namespace moe {

namespace {

// Calls `visit` with a value of the C++ type of a dtype that widens.
template <class Visit>
void with_narrow_type(DType dtype, Visit visit) {
  if (dtype == DType::kBF16) return visit(bf16{});
  if (dtype == DType::kF16) return visit(f16{});
  visit(f8e4m3{});
}

}  // namespace

bool widens(DType dtype) { return dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF8E4M3; }

void convert(void* to, DType dtype, const void* from, bool from_f32, size_t count) {
  if (count == 0) return;
  if (!from_f32 || dtype == DType::kF32) {
    std::memcpy(to, from, count * size_of(dtype));
    return;
  }
  with_narrow_type(dtype, [=]<class T>(T) {
    const auto* values = static_cast<const float*>(from);
    for (size_t i = 0; i < count; i++) static_cast<T*>(to)[i] = from_float<T>(values[i]);
  });
}

void widen(float* to, DType dtype, const void* from, size_t count) {
  with_narrow_type(dtype, [=]<class T>(T) {
    for (size_t i = 0; i < count; i++) to[i] = to_float(static_cast<const T*>(from)[i]);
  });
}

Status no_host_memory(size_t bytes) {
  return Status::Error(Code::kOutOfMemory,
                       "out of memory: requested " + std::to_string(bytes) + " bytes of host memory");
}

bool holds(napi_typedarray_type type, DType dtype) {
  switch (dtype) {
    case DType::kF32: return type == napi_float32_array;
    case DType::kBF16:
    case DType::kF16: return type == napi_uint16_array || type == napi_float32_array;
    case DType::kF8E4M3: return type == napi_uint8_array || type == napi_float32_array;
    case DType::kI32: return type == napi_int32_array;
    case DType::kI64: return type == napi_bigint64_array;
    case DType::kI8: return type == napi_int8_array;
    case DType::kU8:
    case DType::kBool: return type == napi_uint8_array;
  }
  return false;
}

Napi::ArrayBuffer new_array_buffer(Napi::Env env, size_t bytes, const char* op) {
  try {
    return env.GetInstanceData<AddonData>()
        ->array_buffer.New({Napi::Number::New(env, static_cast<double>(bytes))})
        .As<Napi::ArrayBuffer>();
  } catch (const Napi::Error& error) {
    throw make_error(env, no_host_memory(bytes), op);
  }
}

}  // namespace moe
