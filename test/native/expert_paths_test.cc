// The choice among the paths of the expert MLP on CUDA, at its borders. Needs no CUDA.
#include "../../csrc/cuda/expert_paths.h"

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <utility>

using moe::DType;
using moe::mlp::Path;
using moe::mlp::Shape;
using moe::mlp::StreamKernel;

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

// Layers on an H200, by the kernel of `stream` for many tokens or by that for few.
Shape layer(int64_t tokens, int64_t columns, int64_t experts, int64_t H, int64_t I) {
  return {DType::kBF16, DType::kBF16, tokens, columns, experts, H, I, 90, StreamKernel::kMany, 132};
}
Shape few(Shape shape) {
  shape.stream = StreamKernel::kFew;
  return shape;
}
Shape v3_tp8(int64_t tokens) { return layer(tokens, 9, 257, 7168, 256); }
Shape v3_ep(int64_t tokens) { return layer(tokens, 2, 9, 7168, 2048); }
Shape qwen3(int64_t tokens) { return layer(tokens, 8, 128, 2048, 768); }
Shape olmoe(int64_t tokens) { return layer(tokens, 8, 64, 2048, 1024); }
Shape gpt_oss(int64_t tokens) { return layer(tokens, 4, 32, 2880, 2880); }
Shape qwen3_next(int64_t tokens) { return layer(tokens, 10, 512, 2048, 512); }
Shape mixtral(int64_t tokens) { return layer(tokens, 2, 8, 4096, 14336); }
Shape v3_ep32(int64_t tokens) { return layer(tokens, 1, 8, 7168, 2048); }

// Where one path overtakes the other, of `experts_bench paths` on an H200 on 2026-11-22: us by `stream` and by `wgmma`.
const struct {
  const char* name;
  Shape shape;
  double stream, wgmma;
} kMeasured[] = {
    {"V3-TP8", few(v3_tp8(3)), 66.6, 77.3},
    {"V3-TP8", v3_tp8(4), 92.7, 88.1},
    {"V3-TP8", v3_tp8(6), 120.7, 131.2},
    {"V3-TP8", v3_tp8(8), 151.9, 150.2},
    {"V3-EP", v3_ep(6), 140.0, 147.9},
    {"V3-EP", v3_ep(8), 154.5, 157.0},
    {"V3-EP", v3_ep(12), 178.3, 171.7},
    {"V3-EP", v3_ep(16), 188.5, 178.7},
    {"Qwen3", few(qwen3(3)), 54.5, 59.5},
    {"Qwen3", few(qwen3(4)), 67.2, 68.4},
    {"Qwen3", qwen3(6), 100.7, 92.0},
    {"Qwen3", qwen3(8), 121.5, 111.3},
    {"OLMoE", few(olmoe(2)), 49.6, 53.7},
    {"OLMoE", few(olmoe(3)), 67.7, 69.4},
    {"OLMoE", few(olmoe(4)), 81.3, 80.6},
    {"OLMoE", olmoe(6), 114.2, 105.6},
    {"gpt-oss-20b", few(gpt_oss(1)), 51.8, 65.3},
    {"gpt-oss-20b", few(gpt_oss(2)), 93.2, 95.5},
    {"gpt-oss-20b", few(gpt_oss(3)), 133.1, 131.6},
    {"gpt-oss-20b", gpt_oss(4), 164.9, 156.5},
    {"Qwen3-Next", few(qwen3_next(2)), 34.9, 46.3},
    {"Qwen3-Next", few(qwen3_next(3)), 49.0, 54.7},
    {"Qwen3-Next", qwen3_next(4), 70.7, 63.6},
    {"Qwen3-Next", qwen3_next(6), 93.9, 85.1},
    {"Mixtral-8x7B", few(mixtral(1)), 161.0, 164.0},
    {"Mixtral-8x7B", mixtral(2), 273.1, 270.9},
    {"Mixtral-8x7B", mixtral(3), 358.1, 358.6},
    {"Mixtral-8x7B", mixtral(4), 416.4, 418.2},
    {"Mixtral-8x7B", mixtral(6), 493.3, 488.0},
    {"V3-EP32", v3_ep32(12), 136.1, 145.1},
    {"V3-EP32", v3_ep32(16), 157.0, 158.1},
    {"V3-EP32", v3_ep32(24), 162.0, 161.1},
    {"V3-EP32", v3_ep32(32), 169.8, 165.0},
};
constexpr double kMostLost = 0.01;

void expect_quick(const char* name, const Shape& shape, double stream, double wgmma) {
  Path chosen{};
  moe::mlp::choose(shape, nullptr, &chosen);
  checks++;
  const double lost = (chosen == Path::kStream ? stream : wgmma) / std::min(stream, wgmma) - 1;
  if ((chosen == Path::kStream || chosen == Path::kWgmma) && lost <= kMostLost) return;
  failures++;
  std::printf("%s, %lld tokens: %s loses %.1f%%\n", name, static_cast<long long>(shape.T), moe::mlp::name_of(chosen),
              100 * lost);
}

template <class Change>
Shape changed(Shape shape, Change change) {
  change(shape);
  return shape;
}

}  // namespace

int main() {
  for (const auto& [name, shape, stream, wgmma] : kMeasured) expect_quick(name, shape, stream, wgmma);
  for (const int64_t tokens : {1, 2, 3}) expect("V3-TP8", few(v3_tp8(tokens)), Path::kStream);
  for (const int64_t tokens : {16, 64, 4096}) expect("V3-TP8", v3_tp8(tokens), Path::kWgmma);
  for (const int64_t tokens : {16, 32, 64, 16384}) expect("V3-EP", v3_ep(tokens), Path::kWgmma);
  // The limits themselves: blocks of 256 gate and up rows, and tokens.
  const auto one_expert = [](int64_t blocks) { return layer(5, 1, 1, 2048, 128 * blocks); };
  expect("125 blocks", one_expert(125), Path::kStream);
  expect("126 blocks", one_expert(126), Path::kWgmma);
  expect("237 blocks, few", few(one_expert(237)), Path::kStream);
  expect("238 blocks, few", few(one_expert(238)), Path::kWgmma);
  expect("4 tokens", layer(4, 1, 1, 2048, 2048), Path::kWgmma);
  expect("5 tokens", layer(5, 1, 1, 2048, 2048), Path::kStream);
  expect("32 tokens", layer(32, 1, 1, 2048, 2048), Path::kStream);
  expect("33 tokens", layer(33, 1, 1, 2048, 2048), Path::kWgmma);
  expect("few tokens that stream does not take", changed(v3_ep(1), [](Shape& s) { s.stream = StreamKernel::kNone; }),
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
  expect("no wish", few(v3_tp8(1)), Path::kStream, "");
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
  // Tiles of few rows up to 64 an expert on average.
  for (const auto& [rows, tile] : {std::pair{64 * 257, 80}, std::pair{64 * 257 + 1, 176}}) {
    checks++;
    if (moe::mlp::tile_rows(Path::kWgmma, rows, 257) == tile) continue;
    failures++;
    std::printf("%d rows among 257 experts: expected tiles of %d rows\n", rows, tile);
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures > 0;
}
