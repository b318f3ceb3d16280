// Every dtype, once: the same rows as `dtypes` in lib/tensor.ts, compared by the contract test.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moe {

enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kI64, kU8, kI8, kBool, kF8E4M3 };

struct DTypeRow {
  const char* name;
  size_t bytes;
};

inline constexpr DTypeRow kDTypes[] = {
    {"f32", 4}, {"bf16", 2}, {"f16", 2}, {"i32", 4}, {"i64", 8}, {"u8", 1}, {"i8", 1}, {"bool", 1}, {"f8_e4m3", 1},
};
inline constexpr int kDTypeCount = sizeof(kDTypes) / sizeof(kDTypes[0]);

constexpr size_t size_of(DType dtype) { return kDTypes[static_cast<int>(dtype)].bytes; }
constexpr const char* name_of(DType dtype) { return kDTypes[static_cast<int>(dtype)].name; }

// A set of dtypes, for the lists of what an argument may be.
using DTypes = uint32_t;
constexpr DTypes one(DType dtype) { return 1u << static_cast<int>(dtype); }
constexpr bool has(DTypes set, DType dtype) { return (set & one(dtype)) != 0; }
inline constexpr DTypes kFloats = one(DType::kF32) | one(DType::kBF16) | one(DType::kF16);

}  // namespace moe
