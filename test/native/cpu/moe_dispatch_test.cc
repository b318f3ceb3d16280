// moe_dispatch against a sort by hand.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "layer.h"

namespace moe::testing {

namespace {

// Against a sort by hand.
void check_dispatch(int64_t T, int64_t C, const std::vector<int32_t>& ids, int experts, int first, int block,
                    Data& hidden, int64_t H, int threads) {
  const Routing got = dispatch(T, C, ids, experts, first, block, &hidden, H, threads);
  std::vector<int32_t> expected_order(got.P, static_cast<int32_t>(T * C)), inverse(ids.size(), -1);
  size_t place = 0;
  bool right = true;
  std::vector<std::vector<size_t>> buckets(static_cast<size_t>(experts));
  for (size_t i = 0; i < ids.size(); i++) {
    const int64_t expert = int64_t{ids[i]} - first;
    if (expert >= 0 && expert < experts) buckets[static_cast<size_t>(expert)].push_back(i);
  }
  for (int e = 0; e < experts; e++) {
    right &= got.offsets.id(e) == static_cast<int32_t>(place);
    const size_t begin = place;
    for (const size_t i : buckets[static_cast<size_t>(e)]) {
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

}  // namespace

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
    check_dispatch(T, C, ids, experts, first, block, hidden, H, 1 + r.below(3));
  }

  // Where ranks are worth it, up to more experts than have any: all ids local, and then one that is not
  for (const int experts : {1, 31, 64, 200, 256, 257, 320, 321, 600}) {
    for (const int64_t T : {129, 4701, 9001}) {
      const int64_t C = 8, H = 1;
      const int first = r.below(2) * 0x70000000, block = r.below(2) * 16;
      std::vector<int32_t> ids(T * C);
      for (int32_t& id : ids) id = first + std::min(r.below(experts), r.below(experts + 5));
      Data hidden = Data::random(DType::kBF16, T * H, 4);
      check_dispatch(T, C, ids, experts, first, block, hidden, H, 2);
      ids[static_cast<size_t>(r.below(static_cast<int>(T * C)))] = first + (r.below(2) == 0 ? experts : -1);
      check_dispatch(T, C, ids, experts, first, block, hidden, H, 3);
    }
  }
}

}  // namespace moe::testing
