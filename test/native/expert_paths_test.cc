// The choice among the paths of the expert MLP on CUDA, at its borders. Needs no CUDA.
#include "../../csrc/cuda/expert_paths.h"

#include <cstdio>
#include <initializer_list>

using moe::DType;
using moe::mlp::Path;
using moe::mlp::Shape;

namespace {

int failures = 0, checks = 0;

void expect(const char* what, Shape shape, Path expected, const char* wanted = nullptr) {
  Path chosen{};
  const bool known = moe::mlp::choose(shape, wanted, &chosen);
  checks++;
  if (known && chosen == expected) return;
  failures++;
  std::printf("%s, %lld tokens: expected %s but received %s\n", what, static_cast<long long>(shape.T),
              moe::mlp::name_of(expected), known ? moe::mlp::name_of(chosen) : "an unknown name");
}

// Layers of the measured table on an H200.
Shape v3_tp8(int64_t tokens) { return {DType::kBF16, DType::kBF16, tokens, 9, 257, 7168, 256, 90, true, 132}; }
Shape v3_ep(int64_t tokens) { return {DType::kBF16, DType::kBF16, tokens, 2, 9, 7168, 2048, 90, true, 132}; }
Shape qwen3(int64_t tokens) { return {DType::kBF16, DType::kBF16, tokens, 8, 128, 2048, 768, 90, true, 132}; }

template <class Change>
Shape changed(Shape shape, Change change) {
  change(shape);
  return shape;
}

}  // namespace

int main() {
  for (const int64_t tokens : {1, 8}) expect("V3-TP8", v3_tp8(tokens), Path::kStream);
  for (const int64_t tokens : {10, 16, 64, 4096}) expect("V3-TP8", v3_tp8(tokens), Path::kWgmma);
  for (const int64_t tokens : {1, 4}) expect("Qwen3", qwen3(tokens), Path::kStream);
  for (const int64_t tokens : {5, 8, 1024}) expect("Qwen3", qwen3(tokens), Path::kWgmma);
  for (const int64_t tokens : {1, 8, 9}) expect("V3-EP", v3_ep(tokens), Path::kStream);
  for (const int64_t tokens : {10, 16, 32, 64, 16384}) expect("V3-EP", v3_ep(tokens), Path::kWgmma);
  expect("few tokens that stream does not take", changed(v3_ep(1), [](Shape& s) { s.streamable = false; }),
         Path::kWgmma);
  for (const int device : {80, 86, 89, 100, 120}) {
    expect("another device", changed(v3_ep(1), [=](Shape& s) { s.compute_capability = device; }), Path::kMma);
  }
  expect("an old device", changed(v3_ep(1), [](Shape& s) { s.compute_capability = 75; }), Path::kPlain);
  expect("f32", changed(v3_ep(1), [](Shape& s) { s.rows = s.weights = DType::kF32; }), Path::kPlain);
  expect("mixed dtypes", changed(v3_ep(1), [](Shape& s) { s.rows = DType::kF32; }), Path::kPlain);
  expect("an odd width", changed(v3_ep(1), [](Shape& s) { s.H = 7164; }), Path::kPlain);
  expect("an odd intermediate", changed(v3_ep(1), [](Shape& s) { s.I = 2052; }), Path::kPlain);
  expect("4,096 columns", changed(v3_ep(100), [](Shape& s) { s.C = 4096; }), Path::kWgmma);
  expect("4,097 columns", changed(v3_ep(100), [](Shape& s) { s.C = 4097; }), Path::kPlain);
  for (const Path path : {Path::kPlain, Path::kMma, Path::kWgmma, Path::kStream}) {
    expect("a wanted path", v3_tp8(4096), path, moe::mlp::name_of(path));
  }
  expect("a wanted path that cannot run", changed(v3_tp8(1), [](Shape& s) { s.compute_capability = 80; }), Path::kMma,
         "wgmma");
  expect("no wish", v3_tp8(1), Path::kStream, "");
  Path ignored{};
  checks++;
  if (moe::mlp::choose(v3_tp8(1), "wgma", &ignored)) {
    failures++;
    std::printf("an unknown name was taken\n");
  }
  for (const Path path : {Path::kMma, Path::kWgmma}) {
    for (const int64_t rows : {0, 1, 1000, 147456}) {
      const int tile = moe::mlp::tile_rows(path, rows, 257), most = path == Path::kMma ? 128 : 176;
      checks++;
      if (tile >= 8 && tile % 8 == 0 && tile <= most) continue;
      failures++;
      std::printf("tiles of %d rows\n", tile);
    }
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures > 0;
}
