// Which implementation of the expert MLP a call takes. Host code without CUDA, so that its borders are tested anywhere.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace moe::mlp {

enum class Path { kPlain, kMma, kWgmma, kStream };

// As context.paths() reports them.
const char* name_of(Path path);

struct Shape {
  DType rows, weights;
  int64_t T, C, S, H, I;   // C choices of each of T tokens among S local experts
  int compute_capability;  // 10 * major + minor
  bool streamable;         // the call is within the limits of `stream`
  int sm_count;
};

// `stream` where the blocks of `wgmma` would not fill the device (few_blocks), `wgmma` else on Hopper, `mma` on other
// devices from sm_80 on, `plain` for f32, mixed dtypes, sizes that are no multiple of 8 and more than 4,096 columns.
// `wanted` (the value of MOE_KERNELS_CUDA_EXPERTS, or null): the path of that name wherever it can run.
// False for a name that there is not.
bool choose(const Shape& shape, const char* wanted, Path* out);

// Whether `wgmma` has so few blocks of 256 gate and up rows, of the experts that uniform routing would hit, that
// `stream` is quicker: fewer than 1.35 a multiprocessor up to 4 tokens, than one up to 32. From `experts_bench
// paths` on an H200, which times both beside this rule (bench/cuda/EXPERTS.md).
bool few_blocks(const Shape& shape);

// The paths by name, for messages.
inline constexpr const char* kPathNames = "plain, mma, wgmma, stream";

// Rows of a tile of the grouped paths for `rows` rows among `experts` experts.
int tile_rows(Path path, int64_t rows, int64_t experts);

}  // namespace moe::mlp
