// pack_experts: every value in its place, and no other touched.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../../../csrc/cpu/experts_layout.h"
#include "layer.h"

namespace moe::testing {

void test_pack() {
  Random r(8);
  for (int round = 0; round < 72; round++) {
    current = "pack round " + std::to_string(round);
    const DType from = kFloatTypes[round % 3], to = kFloatTypes[round / 3 % 3];
    const bool interleaved = round / 9 % 2 == 1, transposed = round / 18 % 2 == 1, large = round >= 36;
    const int64_t S = 3, count = 2, H = large ? 70 : 1 + r.below(5), I = large ? 45 : 1 + r.below(5);
    Layer layer(S, H, I, to, true, {}, 4);
    const std::vector<char> before = layer.packed;
    Data w13 = Data::random(from, count * 2 * I * H, 1), w2 = Data::random(from, count * H * I, 2);
    Data b13 = Data::random(from, round % 2 == 0 ? count * 2 * I : 0, 3);
    Data b2 = Data::random(from, count * H, 4);
    layer.pack(w13, w2, b13, b2, interleaved ? GateUp::kInterleaved : GateUp::kHalves, transposed, 1, count);
    const auto value = [&](const char* data, int64_t i) {
      Data one(to, 1);
      std::memcpy(one.bytes.data(), data + static_cast<size_t>(i) * size_of(to), size_of(to));
      return one.at(0);
    };
    const char* data = static_cast<const char*>(layer.experts.data);
    const ExpertsView view(layer.experts);
    const auto place = [&](int64_t k, int64_t column) {
      return k * kPanel + (size_of(to) == 4 ? column : 2 * (column % kHalf) + column / kHalf);
    };
    bool right = true;
    for (int64_t e = 0; e < count; e++) {
      for (int64_t row = 0; row < 2 * I; row++) {
        const int64_t source = !interleaved ? row : row < I ? 2 * row : 2 * (row - I) + 1;
        const int64_t i = row % I, column = row / I * kHalf + i % kHalf;
        const char* panel = static_cast<const char*>(view.w13(e + 1, i / kHalf));
        for (int64_t h = 0; h < H; h++) {
          const int64_t index = e * 2 * I * H + (transposed ? h * 2 * I + source : source * H + h);
          right &= value(panel, place(h, column)) == Data::floats(to, {w13.at(index)}).at(0);
        }
        const float bias = b13.count() > 0 ? b13.at(e * 2 * I + source) : 0;
        right &= view.b13(e + 1, i / kHalf)[column] == bias;
      }
      for (int64_t h = 0; h < panels2(layer.experts.layout) * kPanel; h++) {
        const char* panel = static_cast<const char*>(view.w2(e + 1, h / kPanel));
        for (int64_t i = 0; i < I; i++) {
          const int64_t index = e * H * I + (transposed ? i * H + h : h * I + i);
          const float expected = h < H ? Data::floats(to, {w2.at(index)}).at(0) : 0;
          right &= value(panel, place(i, h % kPanel)) == expected;
        }
        right &= view.b2(e + 1, 0)[h] == (h < H ? b2.at(e * H + h) : 0);
      }
    }
    check(right, "packed values");
    const auto start = static_cast<size_t>(data - layer.packed.data());
    const auto slot = static_cast<size_t>(static_cast<const char*>(view.w13(1, 0)) - data);
    check(std::memcmp(before.data() + start, data, slot) == 0, "other slots untouched");
  }
}

}  // namespace moe::testing
