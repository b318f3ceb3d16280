// moe_dispatch against a sort by hand.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "layer.h"

namespace moe::testing {

void test_dispatch() {
  current = "dispatch";
  const Routing doc = dispatch(4, 3, {2, 3, 4, 1, 2, 4, 1, 3, 4, 1, 2, 3}, 5, 0, 4, nullptr, 0);
  const std::vector<int32_t> sorted = {3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12};
  const std::vector<int32_t> order = doc.order.ids();
  check(std::equal(sorted.begin(), sorted.end(), order.begin()) &&
            std::all_of(order.begin() + 16, order.end(), [](int32_t i) { return i == 12; }),
        "vLLM's example");
  check(doc.offsets.ids() == std::vector<int32_t>({0, 0, 4, 8, 12, 16}), "offsets");
  const std::vector<int32_t> blocks = doc.block_experts.ids();
  check(std::vector<int32_t>(blocks.begin(), blocks.begin() + 4) == std::vector<int32_t>({1, 2, 3, 4}) &&
            std::all_of(blocks.begin() + 4, blocks.end(), [](int32_t e) { return e == -1; }),
        "blocks");

  Random r(3);
  for (int round = 0; round < 60; round++) {
    const bool large = round >= 57;
    const int64_t T = large ? 40000 : r.below(30), C = 1 + r.below(5), H = 1 + r.below(9);
    const int experts = 1 + r.below(12), first = r.below(4), block = r.below(2) == 0 ? 0 : 1 + r.below(8);
    std::vector<int32_t> ids(T * C);
    for (int32_t& id : ids) id = r.below(20) == 0 ? std::numeric_limits<int32_t>::min() : r.below(experts + 6) - 1;
    Data hidden = Data::random(kFloatTypes[r.below(3)], T * H, 4);
    const Routing got = dispatch(T, C, ids, experts, first, block, &hidden, H, 1 + r.below(3));
    std::vector<int32_t> expected_order(got.P, static_cast<int32_t>(T * C)), inverse(ids.size(), -1);
    size_t place = 0;
    bool right = true;
    for (int e = 0; e < experts; e++) {
      right &= got.offsets.id(e) == static_cast<int32_t>(place);
      const size_t begin = place;
      for (size_t i = 0; i < ids.size(); i++) {
        if (ids[i] != first + e) continue;
        expected_order[place] = static_cast<int32_t>(i);
        inverse[i] = static_cast<int32_t>(place++);
      }
      right &= got.counts.id(e) == static_cast<int32_t>(place - begin);
      while (block > 0 && place % static_cast<size_t>(block) != 0) place++;
      for (size_t b = begin; block > 0 && b < place; b += static_cast<size_t>(block)) {
        right &= got.block_experts.id(b / static_cast<size_t>(block)) == e;
      }
    }
    for (size_t b = place; block > 0 && b < static_cast<size_t>(got.P); b += static_cast<size_t>(block)) {
      right &= got.block_experts.id(b / static_cast<size_t>(block)) == -1;
    }
    right &= got.offsets.id(experts) == static_cast<int32_t>(place);
    check(right, "counts, offsets, blocks");
    check(got.order.ids() == expected_order && got.inverse.ids() == inverse, "order and inverse");
    bool rows_right = true;
    for (size_t at = 0; at < expected_order.size(); at++) {
      for (int64_t h = 0; h < H; h++) {
        const int64_t token = expected_order[at] / C;
        const float expected = expected_order[at] == T * C ? 0 : hidden.at(token * H + h);
        rows_right &= got.rows.at(at * static_cast<size_t>(H) + static_cast<size_t>(h)) == expected;
      }
    }
    check(rows_right, "rows");
  }
}

}  // namespace moe::testing
