// Data on its way between JavaScript's arrays and a backend's memory.
#pragma once
#include <napi.h>

#include <cstddef>

#include "../common/dtype.h"
#include "../common/status.h"

namespace moe {

// The typed array that a dtype's bits come in; f32 may also fill the narrower floats.
bool holds(napi_typedarray_type type, DType dtype);

// Floats that JavaScript has no array for: their values travel as f32.
bool widens(DType dtype);

// Copies `count` elements, rounding f32 to a narrower float where `from` is f32 and the buffer is not.
void convert(void* to, DType dtype, const void* from, bool from_f32, size_t count);

// The values of `count` elements of a dtype that widens.
void widen(float* to, DType dtype, const void* from, size_t count);

Status no_host_memory(size_t bytes);

// Made by JavaScript's own constructor: napi_create_arraybuffer ends the process where there is no memory.
Napi::ArrayBuffer new_array_buffer(Napi::Env env, size_t bytes, const char* op);

}  // namespace moe
