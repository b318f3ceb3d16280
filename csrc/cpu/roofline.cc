// The ceilings of this run: the best of a few passes over memory that no cache holds, and of a loop that only
// multiplies and adds, with the vectors that the kernels use.
#include <algorithm>
#include <chrono>
#include <cstdint>

#include "backend.h"

namespace moe {

namespace {

constexpr int kPasses = 6;
constexpr int64_t kValues = int64_t{64} << 20, kPieces = 64;  // 256 MiB
constexpr int64_t kRounds = 1 << 19;

// The shortest time of `work`, in seconds.
template <class F>
double best_time(F&& work) {
  double best = 1e30;
  for (int pass = 0; pass < kPasses; pass++) {
    const auto begun = std::chrono::steady_clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
  }
  return best;
}

}  // namespace

Status CpuBackend::roofline(Roofline* out) {
  Workspace workspace(*this);
  float* memory = nullptr;
  float sinks[kPieces] = {};
  MOE_RETURN_IF_ERROR(workspace.take(kValues, &memory));
  MOE_RETURN_IF_ERROR(fill_zero(memory, kValues * sizeof(float)));
  const auto read = [&](int64_t piece, int64_t) {
    sinks[piece] += kernels_.read(memory + piece * (kValues / kPieces), kValues / kPieces);
  };
  const double bytes = kValues * sizeof(float);
  out->read_one = bytes / best_time([&] {
                    for (int64_t piece = 0; piece < kPieces; piece++) read(piece, 0);
                  });
  out->read_all = bytes / best_time([&] { pool_.parallel_for(kPieces, 1, read); });

  double done = 0;
  const double alone = best_time([&] { done = 2 * kernels_.multiply_add(kRounds, sinks); });
  out->flops_one = done / alone;
  const int64_t lanes = pool_.threads();
  const double together = best_time([&] {
    pool_.parallel_for(4 * lanes, 1, [&](int64_t, int64_t) {
      float sink = 0;
      kernels_.multiply_add(kRounds / 2, &sink);
    });
  });
  out->flops_all = 2 * static_cast<double>(lanes) * done / together;
  return finished();
}

}  // namespace moe
