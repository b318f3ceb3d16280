// How products of the expert MLP are cut into work items: every step of every block once, and parts that add up to the
// same sums whoever comes first. Needs no CUDA.
#include "../../csrc/cuda/expert_items.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

using namespace moe::mlp;

namespace {

int checks = 0;

void expect(bool good, const char* what, long long a, long long b, long long c) {
  checks++;
  if (good) return;
  std::printf("%s: %lld %lld %lld\n", what, a, b, c);
  std::exit(1);
}

void divisions() {
  std::mt19937 random(1);
  for (uint32_t d = 1; d <= 5000; d++) {
    const Divisor divide = divisor(d);
    for (const uint32_t n : {0u, 1u, d - 1, d, d + 1, 7 * d - 1, 7 * d, 0x7fffffffu, 0x7fffffffu / d * d,
                             0x7fffffffu / d * d - 1, static_cast<uint32_t>(random()) >> 1}) {
      expect(quotient(n, divide) == n / d, "a quotient", n, d, quotient(n, divide));
    }
  }
}

void pieces(int32_t all, int32_t grid, int32_t steps) {
  const Blocks blocks = blocks_of(all, grid, steps);
  expect(blocks.whole <= all && (blocks.parts == 1) == (blocks.whole == all), "blocks", all, grid, steps);
  expect(blocks.parts == 1 || all < 2 * grid, "more than two blocks each are not cut", all, grid, steps);
  expect(blocks.items - blocks.whole <= grid, "a part each", all, grid, steps);
  int32_t block = 0, at = 0;
  for (int32_t i = 0; i < blocks.items; i++) {
    const Piece piece = piece_of(blocks, i, steps);
    expect(piece.block == block && piece.first == at, "the next piece", all, grid, steps);
    expect(piece.steps >= (piece.parts > 1 ? kPartSteps : steps), "steps of a piece", all, grid, steps);
    expect(piece.parts == 1 || piece.slot + piece.part == i - blocks.whole, "a slot", all, grid, steps);
    at += piece.steps;
    if (at == steps) block++, at = 0;
  }
  expect(block == all && at == 0, "all blocks", all, grid, steps);
}

// As add_parts() does it, the parts in the order of `arrivals`.
float sum_of(const std::vector<float>& values, const std::vector<int32_t>& arrivals) {
  const auto parts = static_cast<int32_t>(values.size());
  std::vector<float> place(values.size());
  std::vector<int> arrived(values.size());
  float whole = 0;
  int last = 0;
  for (const int32_t part : arrivals) {
    float sum = values[part];
    bool on = true;
    for (int32_t width = 1; on && width < parts; width *= 2) {
      const int32_t mine = carrier(part, width), sibling = sibling_of(mine, width);
      if (sibling >= parts) continue;
      place[mine] = sum;
      on = arrived[std::max(mine, sibling)]++ == 1;
      if (on) sum += place[sibling];
    }
    if (on) whole = sum, last++;
  }
  expect(last == 1, "one that comes last", parts, last, 0);
  return whole;
}

void trees() {
  std::mt19937 random(2);
  for (int32_t parts = 1; parts <= 132; parts++) {
    std::vector<float> values(parts);
    for (float& value : values) value = static_cast<float>(random()) * 1e-9f - 2.0f;
    std::vector<int32_t> arrivals(parts);
    std::iota(arrivals.begin(), arrivals.end(), 0);
    const float sum = sum_of(values, arrivals);
    const double exact = std::accumulate(values.begin(), values.end(), 0.0);
    expect(std::abs(sum - exact) < 1e-4, "a sum", parts, 0, 0);
    for (int i = 0; i < 20; i++) {
      std::shuffle(arrivals.begin(), arrivals.end(), random);
      expect(sum_of(values, arrivals) == sum, "the same sum in another order", parts, i, 0);
    }
  }
}

void orders(int32_t a, int32_t b) {
  std::vector<int> taken(a + b);
  for (int32_t i = 0; i < a; i++) taken.at(place_of_first(i, a, b))++;
  for (int32_t i = 0; i < b; i++) taken.at(place_of_second(i, a, b))++;
  for (const int times : taken) expect(times == 1, "a place once", a, b, times);
}

}  // namespace

int main() {
  divisions();
  for (const int32_t grid : {1, 2, 78, 114, 132, 144}) {
    for (const int32_t steps : {1, 4, 15, 16, 31, 32, 33, 112, 448}) {
      for (int32_t all = 0; all <= 3 * grid + 1; all++) pieces(all, grid, steps);
    }
  }
  // 9 experts of 4,096 gate and up rows on an H200: 132 blocks at once, 12 in 7 parts each.
  const Blocks v3_ep = blocks_of(144, 132, 112);
  expect(v3_ep.whole == 132 && v3_ep.parts == 7, "V3-EP", v3_ep.items, v3_ep.whole, v3_ep.parts);
  trees();
  for (int32_t a = 0; a < 200; a++) {
    for (int32_t b = 0; b < 200; b++) orders(a, b);
  }
  orders(1'000'003, 999'983);
  std::printf("%d passed\n", checks);
}
