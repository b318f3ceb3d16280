// Which implementation of the expert MLP a call takes. Host code without CUDA, so that its borders are tested anywhere.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace moe::mlp {

enum class Path { kPlain, kMma, kWgmma, kStream };

// As context.paths() reports them.
const char* name_of(Path path);

// Which of its kernels `stream` would run a call by, if its limits allow any (stream_kernel in expert_tiles.h).
enum class StreamKernel { kNone, kFew, kMany };

struct Shape {
  DType rows, weights;
  int64_t T, C, S, H, I;   // C choices of each of T tokens among S local experts
  int compute_capability;  // 10 * major + minor
  StreamKernel stream;
  int sm_count;
};

// `stream` where `wgmma` has few blocks for every multiprocessor (stream_is_quicker), `wgmma` else on Hopper, `mma` on
// other devices from sm_80 on, `plain` for f32, mixed dtypes, sizes that are no multiple of 8 and more than 4,096
// columns.
// `wanted` (the value of MOE_KERNELS_CUDA_EXPERTS, or null): the path of that name wherever it can run.
// False for a name that there is not.
bool choose(const Shape& shape, const char* wanted, Path* out);

// Blocks of 256 gate and up rows that `wgmma` has for each multiprocessor, of the experts that uniform routing would
// hit.
double blocks_a_multiprocessor(const Shape& shape);

// Below how many of them `stream` is quicker, by its kernel. From `experts_bench paths` on an H200, which times both
// paths beside this rule and prints what it would have set (bench/cuda/EXPERTS.md).
constexpr double kFewBlocks = 1.8, kManyBlocks = 0.95;
constexpr int64_t kManyFrom = 5, kManyTo = 32;  // and at how many tokens its kernel for many

bool stream_is_quicker(const Shape& shape);

// The paths by name, for messages.
inline constexpr const char* kPathNames = "plain, mma, wgmma, stream";

// Rows of a tile of the grouped paths for `rows` rows among `experts` experts.
int tile_rows(Path path, int64_t rows, int64_t experts);

}  // namespace moe::mlp
