#include "expert_paths.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

namespace moe::mlp {

namespace {

constexpr Path kAll[] = {Path::kPlain, Path::kMma, Path::kWgmma, Path::kStream};

bool can_run(Path path, const Shape& s) {
  const bool tensor = s.rows == s.weights && s.rows != DType::kF32 && s.H % 8 == 0 && s.I % 8 == 0 && s.C <= 4096;
  switch (path) {
    case Path::kPlain: return true;
    case Path::kMma: return tensor && s.compute_capability >= 80;
    // sm_90a code runs on Hopper alone.
    case Path::kWgmma: return tensor && s.compute_capability == 90;
    case Path::kStream: return tensor && s.compute_capability == 90 && s.stream != StreamKernel::kNone;
  }
  return false;
}

}  // namespace

const char* name_of(Path path) {
  switch (path) {
    case Path::kPlain: return "plain";
    case Path::kMma: return "mma";
    case Path::kWgmma: return "wgmma";
    case Path::kStream: return "stream";
  }
  return "";
}

double blocks_a_multiprocessor(const Shape& s) {
  const double columns = static_cast<double>(std::min(s.C, s.S)), experts = static_cast<double>(s.S);
  const double hit = experts * (1 - std::pow(1 - columns / experts, static_cast<double>(s.T)));
  return hit * static_cast<double>((2 * s.I + 255) / 256) / s.sm_count;
}

bool stream_is_quicker(const Shape& s) {
  switch (s.stream) {
    case StreamKernel::kNone: return false;
    case StreamKernel::kFew: return blocks_a_multiprocessor(s) < kFewBlocks;
    case StreamKernel::kMany: return s.T >= kManyFrom && s.T <= kManyTo && blocks_a_multiprocessor(s) < kManyBlocks;
  }
  return false;
}

bool choose(const Shape& shape, const char* wanted, Path* out) {
  if (wanted != nullptr && *wanted != 0) {
    const auto* named = std::find_if(std::begin(kAll), std::end(kAll),
                                     [&](Path path) { return std::strcmp(wanted, name_of(path)) == 0; });
    if (named == std::end(kAll)) return false;
    if (can_run(*named, shape)) {
      *out = *named;
      return true;
    }
  }
  for (const Path path :
       {stream_is_quicker(shape) ? Path::kStream : Path::kWgmma, Path::kWgmma, Path::kMma, Path::kPlain}) {
    *out = path;
    if (can_run(path, shape)) break;
  }
  return true;
}

int tile_rows(Path path, int64_t rows, int64_t experts) {
  const int64_t mean = experts > 0 ? (rows + experts - 1) / experts : rows;
  if (path == Path::kMma) return mean <= 32 ? 32 : mean <= 96 ? 64 : 128;
  // A product of `wgmma` fits its tile, however few rows that has; up to 80, its warpgroups take turns.
  if (path == Path::kWgmma) return mean <= 64 ? 80 : 176;
  return 64;
}

}  // namespace moe::mlp
