// The choice among the paths of the expert MLP on CUDA, at its borders. Needs no CUDA.
#include "../../csrc/cuda/expert_paths.h"

#include <algorithm>
#include <cstdio>
#include <initializer_list>

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
    {"V3-TP8", few(v3_tp8(3)), 67.7, 79.1},
    {"V3-TP8", v3_tp8(4), 94.0, 90.8},
    {"V3-TP8", v3_tp8(6), 122.7, 132.1},
    {"V3-TP8", v3_tp8(8), 154.6, 154.9},
    {"V3-TP8", v3_tp8(12), 212.6, 200.8},
    {"V3-EP", v3_ep(6), 142.4, 151.6},
    {"V3-EP", v3_ep(8), 156.8, 160.7},
    {"V3-EP", v3_ep(12), 181.5, 176.3},
    {"V3-EP", v3_ep(16), 191.8, 183.4},
    {"Qwen3", few(qwen3(3)), 55.5, 61.8},
    {"Qwen3", few(qwen3(4)), 68.4, 70.7},
    {"Qwen3", qwen3(6), 101.9, 94.9},
    {"Qwen3", qwen3(8), 123.1, 114.6},
    {"OLMoE", few(olmoe(3)), 68.9, 71.8},
    {"OLMoE", few(olmoe(4)), 82.7, 83.3},
    {"OLMoE", olmoe(6), 115.9, 108.6},
    {"OLMoE", olmoe(8), 130.7, 123.3},
    {"gpt-oss-20b", few(gpt_oss(1)), 52.6, 67.0},
    {"gpt-oss-20b", few(gpt_oss(2)), 94.8, 98.2},
    {"gpt-oss-20b", few(gpt_oss(3)), 135.4, 135.2},
    {"gpt-oss-20b", gpt_oss(4), 167.8, 160.8},
    {"Qwen3-Next", few(qwen3_next(2)), 35.4, 46.7},
    {"Qwen3-Next", few(qwen3_next(3)), 49.9, 56.2},
    {"Qwen3-Next", qwen3_next(4), 71.5, 65.6},
    {"Qwen3-Next", qwen3_next(6), 95.3, 87.5},
    {"Mixtral-8x7B", few(mixtral(1)), 164.2, 168.7},
    {"Mixtral-8x7B", mixtral(2), 278.5, 277.3},
    {"Mixtral-8x7B", mixtral(3), 365.3, 366.4},
    {"Mixtral-8x7B", mixtral(4), 424.6, 425.9},
    {"Mixtral-8x7B", mixtral(6), 503.9, 499.6},
    {"V3-EP32", v3_ep32(12), 138.3, 147.5},
    {"V3-EP32", v3_ep32(16), 159.8, 161.7},
    {"V3-EP32", v3_ep32(24), 165.0, 165.0},
    {"V3-EP32", v3_ep32(32), 172.7, 169.4},
    {"V3-EP32", v3_ep32(48), 176.4, 169.4},
};
constexpr double kMostLost = 0.04;

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
  const auto one_expert = [](int64_t blocks) { return layer(1, 1, 1, 2048, 128 * blocks); };
  expect("125 blocks", one_expert(125), Path::kStream);
  expect("126 blocks", one_expert(126), Path::kWgmma);
  expect("237 blocks, few", few(one_expert(237)), Path::kStream);
  expect("238 blocks, few", few(one_expert(238)), Path::kWgmma);
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
