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
};

// `stream` where few rows an expert make streaming the weights the whole cost, `wgmma` else on Hopper, `mma` on other
// devices from sm_80 on, `plain` for f32, mixed dtypes and sizes that are no multiple of 8. MOE_CUDA_EXPERTS=plain|mma|
// wgmma|stream takes the named one wherever it can run.
Path choose(const Shape& shape);

// Rows of a tile of the grouped paths for `rows` rows among `experts` experts.
int tile_rows(Path path, int64_t rows, int64_t experts);

}  // namespace moe::mlp
