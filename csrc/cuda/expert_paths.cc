#include "expert_paths.h"

#include <cstdlib>
#include <cstring>

namespace moe::mlp {

namespace {

constexpr Path kAll[] = {Path::kPlain, Path::kMma, Path::kWgmma, Path::kStream};

bool can_run(Path path, const Shape& s) {
  const bool tensor = s.rows == s.weights && s.rows != DType::kF32 && s.H % 8 == 0 && s.I % 8 == 0;
  switch (path) {
    case Path::kPlain: return true;
    case Path::kMma: return tensor && s.compute_capability >= 80;
    // sm_90a code runs on Hopper alone.
    case Path::kWgmma: return tensor && s.compute_capability == 90;
    case Path::kStream: return tensor && s.compute_capability == 90 && s.streamable;
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

Path choose(const Shape& shape) {
  if (const char* wanted = std::getenv("MOE_CUDA_EXPERTS")) {
    for (const Path path : kAll) {
      if (std::strcmp(wanted, name_of(path)) == 0 && can_run(path, shape)) return path;
    }
  }
  if (can_run(Path::kStream, shape) && shape.T <= 128) return Path::kStream;
  if (can_run(Path::kWgmma, shape)) return Path::kWgmma;
  return can_run(Path::kMma, shape) ? Path::kMma : Path::kPlain;
}

int tile_rows(Path path, int64_t rows, int64_t experts) {
  const int64_t mean = experts > 0 ? (rows + experts - 1) / experts : rows;
  if (path == Path::kMma) return mean <= 32 ? 32 : mean <= 96 ? 64 : 128;
  if (path == Path::kWgmma) return 176;  // a product fits its tile, however few rows that has
  return 64;
}

}  // namespace moe::mlp
